"""The control in which spans hold a word and no future."""

import pytest
import torch
from test_sft import read_log, settings

import sft
from variants import pause_tokens


def test_pause_tokens_learn_their_embedding_and_have_no_latent_loss(batch):
    """Breaks if the control sees the future frames, or is trained to match them."""
    model, b = batch
    model.requires_grad_(True)

    def step(batch):
        return sft.batch_sums(model, batch, pause_tokens.fed, 0.0, 1.0, pause_tokens.Config())

    ce, latent = step(b)
    b2 = dict(b, future_pixel_values=torch.randn_like(b["future_pixel_values"]))
    assert latent.item() > 0 and torch.equal(step(b2)[0], ce)
    ce.backward()
    assert model.get_input_embeddings().weight.grad[model.config.latent_id].abs().sum() > 0


def test_a_run_trains_on_words_alone(world, tmp_path):
    """Breaks if the loop adds a latent loss, or takes settings that contradict the control."""
    config = settings(world, tmp_path / "a", pause_tokens.Config, lam=0.0, steps=1)
    pause_tokens.train(config)
    line = read_log(tmp_path / "a")[0]
    assert line["latents"] > 0 and line["latent"] > 0 and line["loss"] == line["ce"]
    for wrong in (dict(lam=0.1), dict(spans=False)):
        with pytest.raises(ValueError, match="pause tokens have spans and no latent loss"):
            pause_tokens.Config(**wrong)
