"""Rejection sampling: cross-entropy on right rollouts, by hand; what is kept."""

import pytest
import torch
from test_la_dapo import wide_rollout

import la_dapo
from la_dapo import Batch, Counts, Group, keep_group, no_batch
from latent_decode import gather, replay
from variants import right_rollouts
from variants.right_rollouts import Config


@pytest.mark.parametrize("terms", [0, -1])
def test_the_loss_by_hand(model, tokenizer, terms):
    """Breaks if a wrong rollout has a part, a merged row counts once, or the gradient runs through
    the latents where it should not, or not where it should.
    """
    prompts, rollout = wide_rollout(model, tokenizer)  # 2 prompts, 6 rollouts each
    right = [True, False, True, True, False, False, False, True, True, False, True, False]
    groups = []
    for k in range(2):
        own = range(6 * k, 6 * k + 6)
        parts = dict(correct=right[6 * k : 6 * k + 6], unjudged=[False] * 6)
        groups.append(Group(k, {}, gather([(rollout, own)]), [""] * 6, [[]] * 6, parts))
    times = torch.ones(12, 1)
    times[2] = 3  # it came three times
    prompt_of, members = torch.tensor([0] * 6 + [1] * 6), [[i] for i in range(6)] * 2
    A = torch.zeros(12, 1, dtype=torch.float64)  # not asked
    batch = Batch(prompts, rollout, prompt_of, A, times, members, groups)
    config = Config(temperature=0.9, adjoint_terms=terms)
    loss, _ = right_rollouts.policy_loss(model, batch, Counts(50, 14, 2), config)

    new, by_hand = replay(model, prompts, rollout, 0.9, prompt_of), 0.0
    for i in range(12):
        if right[i]:
            by_hand -= times[i] * new.logprobs[i][rollout.sampled[i]].sum() / 50
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    head = model.latent_head.weight  # reached through the latents alone
    gradient = torch.autograd.grad(loss, head, allow_unused=True)[0]
    assert (gradient is not None and gradient.abs().max() > 0) == (terms == -1)

    nothing = no_batch(96, "cpu")
    loss, _ = right_rollouts.policy_loss(model, nothing, Counts(50, 14, 2), config)
    assert loss.item() == 0


def test_what_is_kept():
    """Breaks if a group of right rollouts alone is dropped, or one without any is kept."""
    config, judged = Config(), [False] * 4
    groups = [[False] * 4, [True] + [False] * 3, [True] * 4]
    verdicts = [keep_group(right, judged, config.low, config.high) for right in groups]
    assert verdicts == ["too hard", "kept", "kept"]
    for bad in (dict(kl=0.1), dict(minibatches=2), dict(inner_epochs=2)):
        with pytest.raises(ValueError, match="right rollouts"):
            Config(**bad)


def test_the_loop_takes_this_loss(monkeypatch):
    """Breaks if the command trains with la_dapo's own loss."""
    monkeypatch.setattr(la_dapo, "train", lambda config, policy_loss: (config, policy_loss))
    assert right_rollouts.train("config") == ("config", right_rollouts.policy_loss)
