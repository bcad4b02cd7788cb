"""Rows that are fed their own latents in training."""

import dataclasses

import numpy as np
import pytest
import torch
from test_sft import read_log, settings

import sft
from data import model_inputs
from variants import self_forcing
from variants.self_forcing import Config, is_drawn


def step(model, batch, config):
    """What a step's last forward reads as latents (N, D), the true ones, the sum of Eq. (3)."""
    fed, embed = [], model.embed

    def spy(*args, **kw):
        fed.append(args[1] if len(args) > 1 else kw["latents"])
        return embed(*args, **kw)

    model.embed = spy
    _, distance = sft.batch_sums(model, batch, self_forcing.fed, 0.5, 1.0, config)
    model.embed = embed
    return fed[-1], fed[0], distance.item()  # the first pass reads the true latents


def test_self_forcing_feeds_what_decoding_would(batch, monkeypatch):
    """Breaks if the fed latents are not the model's own: after as many passes as spans they are a
    fixed point. Or if they are compared with themselves: Eq. (3) would be met by anything.
    """
    model, b = batch
    drawn = [b["rows"][1].id, b["rows"][3].id]  # three spans each
    monkeypatch.setattr(self_forcing, "is_drawn", lambda row, *_: row.id in drawn)
    z, e, distance = step(model, b, Config(self_forcing_passes=3))
    row = (b["input_ids"] == model.config.latent_id).nonzero()[:, 0]
    assert torch.equal(z[row % 2 == 0], e[row % 2 == 0])
    assert not torch.allclose(z[row == 1], e[row == 1])
    # one word at a time: the latent after LS is to_latent of the state there, with all earlier
    # latents its own
    with torch.no_grad():
        latents = e.clone()
        places = (b["input_ids"] == model.config.latent_id).nonzero().tolist()
        for k, (r, t) in enumerate(places):
            if r % 2 == 1:
                h, _ = model.hidden(**model_inputs(b), latents=latents)
                latents[k] = model.to_latent(h[r, t - 1])
    assert torch.allclose(z, latents, atol=1e-5)
    once, *_ = step(model, b, Config(self_forcing_passes=1))
    assert not torch.allclose(once, z, atol=1e-4)  # the later latents need the later passes

    out = sft.sft_loss(model, **model_inputs(b), labels=b["labels"], latents=z, targets=e)
    assert distance == pytest.approx(out["latent_sum"].item(), rel=1e-5)


def test_draws_depend_on_seed_progress_and_id_alone(batch):
    """Breaks if the rate, the start or the independence of the draws is wrong."""
    row = batch[1]["rows"][0]
    rows = [dataclasses.replace(row, id=f"row {k}") for k in range(2000)]

    def draws(progress=0.5, **settings):
        return np.array([is_drawn(r, progress, Config(**settings)) for r in rows])

    assert draws().mean() == pytest.approx(0.5, abs=0.04)
    assert draws(self_forcing=0.1).mean() == pytest.approx(0.1, abs=0.03)
    assert not draws(progress=0.29).any() and draws(progress=0.3).any()
    assert (draws() == draws()).all()
    for other in (draws(seed=1), draws(progress=0.51)):
        assert (draws() == other).mean() == pytest.approx(0.5, abs=0.05)
    with pytest.raises(ValueError, match="self_forcing_passes is 0"):
        Config(self_forcing_passes=0)


def test_micro_batches_feed_the_same(world, tmp_path):
    """Breaks if the size of a micro-batch decides who is drawn, nobody is, or a flag is lost."""
    more = dict(steps=2, global_batch=8, self_forcing_from=0.0, latent_loss="mse", lam=0.3)
    runs = []
    for size, share in ((8, 0.5), (1, 0.5), (8, 0.0)):
        out = tmp_path / f"{size} {share}"
        config = settings(world, out, Config, **more, micro_batch=size, self_forcing=share)
        self_forcing.train(config)
        runs.append([[line[k] for k in ("ce", "latent", "grad_norm")] for line in read_log(out)])
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-4)
    assert not np.allclose(runs[2], runs[0], rtol=1e-3)
