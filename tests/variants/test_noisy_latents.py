"""Latents that are sampled: the noise, the loss, the loop."""

import dataclasses
import shutil
from types import SimpleNamespace

import pytest
import torch
from test_la_dapo import log_of, settings, weights
from test_latent_decode import EOS, ROWS, shuffle
from test_model import make_batch

import la_dapo
from common.cli import parse_config
from la_dapo import Batch, Counts
from latent_decode import generate
from tests.conftest import flags
from variants import noisy_latents
from variants.noisy_latents import Config, Feed


def test_noise_does_not_depend_on_who_is_left():
    """Breaks if a row gets other noise once rows before it have finished, or at another run."""
    model = SimpleNamespace(to_latent=lambda h: h)

    def fed(*rows_of_steps):
        feed = Feed(Config(latent_sigma=2.0), 3)
        rows = [torch.tensor(rows) for rows in rows_of_steps]
        return [feed(model, SimpleNamespace(row=r, h=torch.ones(len(r), 4000))) for r in rows]

    all_rows, fewer = fed([0, 1, 2], [0, 1, 2], [0, 1, 2]), fed([0, 1, 2], [0, 2], [2])
    assert torch.equal(fewer[1], all_rows[1][[0, 2]]) and torch.equal(fewer[2], all_rows[2][2:])
    draws = torch.stack(all_rows)
    assert draws.mean().item() == pytest.approx(1, abs=0.05)
    assert draws.std().item() == pytest.approx(2, rel=0.02)
    assert len({round(x, 6) for x in draws[..., 0].flatten().tolist()}) == 9
    seeds = [Feed(Config(), k).generator.initial_seed() % 2**32 for k in (3, 4)]
    assert len({*seeds, 3, 4}) == 4  # each batch its own, and none of them its words'


@pytest.mark.parametrize("density", ["sum", "mean"])
def test_the_loss_by_hand(model, tokenizer, density):
    """Breaks if the latents' term has another sign, weight or advantage than the words' terms.

    The head's bias moves every mean alike, so that its gradient is - 1/n sum A times noise / sigma,
    the score function; with `mean` 1/D of it.
    The noise is drawn here once more: a row of every step, as the feed draws it.
    """
    config = Config(latent_sigma=0.2, density=density, temperature=0.9, kl=0.0)
    batch, feed = make_batch(tokenizer, ROWS, "left"), Feed(config, 0)
    again = torch.Generator()
    again.set_state(feed.generator.get_state())
    how = dict(max_new_tokens=30, max_latents=3, n=2, temperature=0.9)
    how["eos_token_id"] = tokenizer.convert_tokens_to_ids(EOS.split())
    rollout = generate(shuffle(model, 5, True), batch, **how, feed=feed)
    R, D = len(rollout.tokens), model.latent_head.bias.numel()
    generator = torch.Generator().manual_seed(1)
    A, times = torch.randn(R, 1, generator=generator), torch.ones(R, 1)
    times[1] = 3
    prepared = Batch(batch, rollout, torch.arange(R) // 2, A, times)
    n = int(prepared.weight.sum())

    loss, figures = noisy_latents.policy_loss(model, prepared, Counts(n, R, 1), config)
    (gradient,) = torch.autograd.grad(loss, model.latent_head.bias)
    by_hand = torch.zeros(D)
    for t in range(rollout.tokens.shape[1]):
        noise = torch.randn(R, D, generator=again)
        is_latent = (rollout.tokens[:, t] == model.config.latent_id)[:, None]
        by_hand -= (is_latent * A * times * noise).sum(0) / 0.2 / n
    by_hand /= 1 if density == "sum" else D
    torch.testing.assert_close(gradient, by_hand, rtol=1e-3, atol=1e-5 * by_hand.abs().max())
    assert figures["ratio"].item() == pytest.approx(1) and figures["replay_ms"] < 1e-8

    constants, _ = la_dapo.policy_loss(model, prepared, Counts(n, R, 1), la_dapo.Config(kl=0.0))
    unused = torch.autograd.grad(constants, model.latent_head.bias, allow_unused=True)
    assert unused[0] is None  # without it nothing trains the head


@pytest.mark.slow  # whole trainings
def test_two_steps_by_the_command_line(world, loud, tmp_path, monkeypatch):
    """Breaks if the variant does not train, merges rollouts with equal words, or a run that goes
    on draws other noise than one that was not cut.
    """
    rows, inner = [], la_dapo.batch_of
    monkeypatch.setattr(la_dapo, "batch_of", lambda *a: rows.append(inner(*a)) or rows[-1])
    more = dict(steps=2, save_every=1, adjoint_terms=0, kl=0.0)
    more.update(temperature=0.05, group_size=6)  # so sure that samples coincide
    base = settings(world, loud, tmp_path / "a", **more)
    config = parse_config(Config, flags(base, density="sum"))
    straight = weights(noisy_latents.train(config))
    words = [tuple(t) for batch in rows for t in batch.rollout.tokens.tolist()]
    assert sum(len(batch.rollout.tokens) for batch in rows) == 2 * 4 * 6 > len(set(words))

    shutil.rmtree(tmp_path / "a" / "step_000002")
    resumed = weights(noisy_latents.train(dataclasses.replace(config, resume=True)))
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert any(not torch.equal(straight[k], v) for k, v in weights(loud).items())
    assert [line["updates"] for line in log_of(tmp_path / "a")] == [1, 1]


def test_settings_without_a_meaning():
    """Breaks if noise meets what needs equal samples, or latents that are a function."""
    for bad in (
        dict(density="max"),
        dict(adjoint_terms=-1),
        dict(merge_equal=True),
        dict(minibatches=2),
        dict(kl=0.1),
    ):
        with pytest.raises(ValueError, match="density 'max'|noisy latents"):
            Config(**bad)
