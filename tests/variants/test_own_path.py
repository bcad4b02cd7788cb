"""The rewards' own path into the latents, against finite differences of the rewards."""

import dataclasses

import numpy as np
import pytest
import torch
from test_la_dapo import decoded_again, latents_again, log_of, settings, wide_rollout
from test_latent_decode import spans
from test_rewards import slow_contrastive, slow_likeness

import la_dapo
from common.cli import parse_config
from la_dapo import Batch, Counts, Group
from latent_decode import gather
from tests.conftest import flags
from variants import own_path
from variants.own_path import Config

UNJUDGED, TWICE = 5, 1  # of the first group: a rollout without verdict, and one that came twice


def spans_of(rollout, i, c):
    """The latents in each span of row i, an open one too."""
    return spans(rollout.tokens[i, : rollout.lengths[i]].tolist() + [c.latent_end_id], c)


def two_groups(model, tokenizer, A):
    """A Batch of two prompts with six rollouts each (the first has a seventh, equal to its second,
    and one that is unjudged), and the rollouts of its rows. A (11, 1): advantages of the rows.
    """
    prompts, rollout = wide_rollout(model, tokenizer)  # 2 prompts, 6 rollouts each
    groups, members = [], []
    for k in range(2):
        own = [*range(6 * k, 6 * k + 6)] + [TWICE] * (k == 0)
        G = len(own)
        unjudged = [k == 0 and i == UNJUDGED for i in range(G)]
        correct = [i in (0, TWICE, 3, 6) and not unjudged[i] for i in range(G)]
        # the second group's deviation, .02, is below LEAST_STD
        total = [None if unjudged[i] else 0.9 * correct[i] * (k == 0) + 0.01 * i for i in range(G)]
        parts = dict(correct=correct, total=total, unjudged=unjudged)
        rows = gather([(rollout, own)])
        lengths = [spans_of(rows, i, model.config) for i in range(G)]
        groups.append(Group(0, {}, rows, [""] * G, lengths, parts))
        members += [[i] for i in range(6) if not unjudged[i]]
    members[TWICE] = [TWICE, 6]
    rows = [i for i in range(12) if i != UNJUDGED]
    prompt_of = torch.tensor([0] * 5 + [1] * 6)
    times = torch.tensor([[len(row)] for row in members])
    return Batch(prompts, gather([(rollout, rows)]), prompt_of, A, times, members, groups)


def slow_own_rewards(batch, latents, c):
    """Sum over the rollouts of lambda_c R_ctr + lambda_d R_div over the deviation: float64 numpy.

    latents: of the batch's 11 rows.
    """
    z = [x.numpy() for x in latents]
    first, total = [*z[:5], None, z[TWICE]], 0.0
    for group, of_rollout in zip(batch.groups, (first, z[5:])):
        ctr = sum(slow_contrastive(of_rollout, group.parts["correct"], 0.5))
        div = 0.0
        for i, x in enumerate(of_rollout):
            lengths = [] if x is None else spans_of(group.rollout, i, c)
            if sum(length > 0 for length in lengths) > 1:
                div -= slow_likeness(x, lengths)
        std = max(0.1, np.std([R for R in group.parts["total"] if R is not None], ddof=1))
        total += (0.2 * ctr + 0.1 * div) / std
    return total


def test_the_gradient_equals_finite_differences(model, tokenizer):
    """Breaks if a path from a weight through a latent to a reward is lost, a merged row does not
    count as often as it came, an unjudged one counts, or the unit is another: the group's
    deviation, but at least .1.

    Words, verdicts and the deviation are held fixed; the latents are decoded again.
    """
    generator = torch.Generator().manual_seed(1)
    A = 1e-3 * torch.randn(11, 1, dtype=torch.float64, generator=generator)  # own: a like share
    batch = two_groups(model, tokenizer, A)
    rollout = batch.rollout
    config, n = Config(kl=0.0, temperature=0.9), 7

    def objective():
        with torch.no_grad():
            words = decoded_again(model, batch.prompts, rollout, A * batch.times, batch.prompt_of)
            again = latents_again(model, batch.prompts, rollout, batch.prompt_of)
        return -(words + slow_own_rewards(batch, again.latents, model.config)) / n

    layers = model.model.language_model.layers
    parameters = [model.latent_head.weight, layers[0].self_attn.q_proj.weight]
    parameters += [layers[1].mlp.down_proj.weight, model.get_input_embeddings().weight]
    loss, _ = own_path.policy_loss(model, batch, Counts(n, 12, 2), config)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
    of_words, _ = la_dapo.policy_loss(model, batch, Counts(n, 12, 2), config)
    without = torch.autograd.grad(of_words, parameters)
    for w, gradient, other in zip(parameters, gradients, without):
        direction = torch.randn(w.shape, dtype=w.dtype, generator=generator)
        direction *= 1e-6 / direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                w.add_(sign * direction)
                values.append(objective())
                w.sub_(sign * direction)
        difference = (values[0] - values[1]) / 2
        assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-5, abs=0)
        assert (other * direction).sum().item() != pytest.approx(difference, rel=1e-3, abs=0)


def test_the_rewards_keep_their_precision_under_autocast(model, tokenizer):
    """Breaks if a similarity is rounded to bf16, where the forward is."""
    batch = two_groups(model, tokenizer, torch.zeros(11, 1, dtype=torch.float64))
    latents = [z.float() for z in batch.rollout.latents]
    plain = own_path.batch_rewards(latents, batch, Config())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(own_path.batch_rewards(latents, batch, Config()), plain)


@pytest.mark.slow  # whole trainings
def test_a_run_by_the_command_line(world, loud, tmp_path):
    """Breaks if the command trains without the rewards' own path. At 1e-4 samples are equal:
    without it nothing moves.
    """
    base = settings(world, loud, tmp_path / "a", steps=1, group_size=4, temperature=1e-4, seed=0)
    own_path.train(parse_config(Config, flags(base)))
    la_dapo.train(dataclasses.replace(base, out=str(tmp_path / "b")))
    (own,), (without,) = log_of(tmp_path / "a"), log_of(tmp_path / "b")
    assert own["grad_norm"] > 1e-2 and own["own_reward"] and without["grad_norm"] == 0


def test_settings_without_a_meaning():
    """Breaks if the path has no adjoint to go through."""
    with pytest.raises(ValueError, match="own path: adjoint_terms is 0"):
        Config(adjoint_terms=0)
