"""Noisy latents: a latent is sampled like a word, and its log-density carries a gradient.

A fork of la_dapo.py. What it changes:
 1. A span is fed z = m + sigma * noise, m = h_p the model's own latent.
 2. The log-density of what was fed joins the loss, as a chosen word's log-probability does:

        log N(z; m, sigma^2) = - |z - m|^2 / (2 sigma^2) + constant
        L = la_dapo's L - 1/n sum_latents A_i log N(z_t; m_t, sigma^2)

    `--density sum` is this: the score function, whose mean is the gradient, and whose variance
    grows as D / sigma^2. `--density mean` is 1/D of it: quiet, and biased by that factor, so that
    at real size next to nothing of the term is left.
 3. Latents are not a function of the weights here, so there is no adjoint: adjoint_terms = 0.
 4. One update a step: the ratio is 1, and the loss above is its surrogate. (A latent's density when
    it was sampled is not recorded.)
 5. The KL is that of words and decisions to stop. Equal words are not merged: their latents differ.
What stays: the rollouts' words, the rewards, the filter, the advantages, the loop.

A latent's noise depends on the seed, the batch of prompts, the rollout and the step alone.

    python -m variants.noisy_latents --model runs/sft --data train.json --density sum

Source: ours, after Gaussian policies (Williams 1992).
"""

import dataclasses

import torch

import la_dapo
from common.cli import run_script


@dataclasses.dataclass
class Config(la_dapo.Config):
    latent_sigma: float = 0.1  # deviation of the noise  # ours
    density: str = "sum"  # over D: sum (the score function) | mean (1/D of it)  # ours

    def __post_init__(self):
        super().__post_init__()
        if self.latent_sigma <= 0 or self.density not in ("sum", "mean"):
            raise ValueError(
                f"latent_sigma {self.latent_sigma}, density {self.density!r}: expected above 0, "
                "and sum or mean"
            )
        if self.adjoint_terms or self.updates_a_step != 1:
            raise ValueError("noisy latents: adjoint_terms 0, one update a step")
        if self.share or self.cuda_graph:  # the noise is drawn anew at each step
            raise ValueError("noisy latents: no share, no cuda_graph")

    @property
    def label(self):
        return "noisy latents"


def log_density(z, mean, sigma, density="sum"):
    """log N(z; mean, sigma^2) of latents (N, D), without its constant -> (N,); mean: 1/D of it."""
    logp = -((z - mean) / sigma).square() / 2  # (N, D)
    return logp.sum(-1) if density == "sum" else logp.mean(-1)


class Feed:
    """What spans are fed in batch k of the prompts: the model's own latents plus noise."""

    def __init__(self, config, k):
        # other low bits than the words' seed: torch's CPU generator looks at 32 of them
        seed = 2**31 + config.seed * 1_000_003 + k
        self.sigma, self.generator = config.latent_sigma, torch.Generator().manual_seed(seed)
        self.rows = None

    def __call__(self, model, state):
        mean = model.to_latent(state.h)  # (R, D)
        self.rows = self.rows or len(state.row)  # at the first step all are there
        # drawn for all rows, live or not: a row's noise does not depend on when others finish
        noise = torch.randn(self.rows, mean.shape[1], generator=self.generator)
        return mean + self.sigma * noise.to(mean)[state.row]


def policy_loss(model, batch, n_tokens, config, figures):
    """`la_dapo.policy_loss` with the latents' log-density, and without the adjoint."""
    new = la_dapo.replayed(model, batch, config)
    loss, kl = la_dapo.clipped_loss(new, batch, n_tokens, config, figures)
    z, sizes = new.latents.detach(), [len(z) for z in batch.rollout.latents]
    logp = log_density(z, new.predicted, config.latent_sigma, config.density)  # (N,)
    of_row = torch.stack([part.sum() for part in logp.split(sizes)])  # (R,)
    return loss + kl - ((batch.A * batch.times)[:, 0] * of_row).sum() / n_tokens


def train(config, rows=None):
    """`la_dapo.train` with this loss and feed -> path of the last checkpoint."""
    return la_dapo.train(config, rows, policy_loss, Feed)


if __name__ == "__main__":
    run_script(lambda config: print("last checkpoint:", train(config)), Config)
