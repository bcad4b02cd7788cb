"""Self-forcing: some rows are fed the latents they predict, as decoding will, not the true ones.

A fork of sft.py. What it changes:
 1. From the share `self_forcing_from` of the training on, a row is drawn with probability
    `self_forcing` at each step. Its spans are fed its own latents, z_{k+1} = h_{p+k}.
 2. They come from `self_forcing_passes` forward passes without gradient. After pass k a row's first
    k latents are what decoding would give; the later ones still follow from true frames.
What stays: the targets of Eq. (3), which are the true future for every row; the words; the loop.

A draw depends on the seed, the progress and the row's id alone. So one process and eight, and a
straight run and a resumed one, feed the same.

    python -m variants.self_forcing --model DIR --data train.json

Source: ours, after scheduled sampling (Bengio et al. 2015).
"""

import dataclasses
import random

import torch

import sft
from common.cli import run_script
from data import at_least, model_inputs


@dataclasses.dataclass
class Config(sft.Config):
    self_forcing: float = 0.5  # share of the rows fed their own latents  # ours
    self_forcing_from: float = 0.3  # from this share of the steps on  # ours
    # forward passes without gradient that make them; each fixes one more latent  # ours
    self_forcing_passes: int = 1

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "self_forcing_passes")
        if self.shard:
            raise ValueError("self-forcing: no shard, a rank without drawn rows has no such passes")

    @property
    def label(self):
        return "self-forcing"


def is_drawn(row, progress, config):
    """Whether a row is fed its own latents at this point of the training. Source: ours."""
    draw = random.Random(f"{config.seed} {progress!r} {row.id}").random()  # in [0, 1)
    return progress >= config.self_forcing_from and draw < config.self_forcing


def fed(model, batch, e, progress, config):
    """What spans are fed (N, D): e, but in the drawn rows the model's own latents.

    Arguments as `sft.teacher_forcing`.
    """
    rows = batch["rows"]
    own = torch.tensor([is_drawn(row, progress, config) for row in rows], device=e.device)  # (B,)
    if not own.any():
        return e
    is_latent = batch["input_ids"] == model.config.latent_id  # (B, T)
    own = own[is_latent.nonzero()[:, 0]]  # (N,): whether a latent's row is drawn
    latents = e
    with torch.no_grad():
        for _ in range(config.self_forcing_passes):
            h, _ = model.hidden(**model_inputs(batch), latents=latents)  # (B, T, D)
            z = model.to_latent(h[:, :-1][is_latent[:, 1:]])  # (N, D): predicted at t - 1
            latents = torch.where(own[:, None], z.to(e.dtype), e)
    return latents


def train(config):
    """`sft.train` with another `fed` -> path of the last checkpoint."""
    return sft.train(config, fed)


if __name__ == "__main__":
    run_script(train, Config)
