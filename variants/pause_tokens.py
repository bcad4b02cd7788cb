"""Pause tokens: the control in which a span has its length but nothing to imagine.

A fork of sft.py. What it changes:
 1. At each latent's place the embedding of `<|latent|>` is fed, a word like any other, instead of
    e*. The embedding is trained. No future frame reaches the model.
 2. There is no Eq. (3): lam = 0. Its value is logged as before, for comparison.
What stays: the rows, the words, the length of each span, Eq. (2), the loop. Evaluate such a model
with `evaluate.py --latents pause`, which feeds the same embedding.

    python -m variants.pause_tokens --model DIR --data train.json

Source: ours, after pause tokens (Goyal et al. 2024).
"""

import dataclasses

import sft
from common.cli import run_script


@dataclasses.dataclass
class Config(sft.Config):
    lam: float = 0.0  # no latent loss: a span has no target

    def __post_init__(self):
        super().__post_init__()
        if self.lam or not self.spans:
            raise ValueError("pause tokens have spans and no latent loss: lam = 0, no --no-spans")

    @property
    def label(self):
        return "pause"


def fed(model, batch, e, progress, config):
    """What spans are fed (N, D): the embedding of `<|latent|>`, in place of the true future e."""
    is_latent = batch["input_ids"] == model.config.latent_id  # (B, T)
    return model.get_input_embeddings()(batch["input_ids"][is_latent])  # (N, D)


def train(config):
    """`sft.train` with another `fed` -> path of the last checkpoint."""
    return sft.train(config, fed)


if __name__ == "__main__":
    run_script(train, Config)
