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
 5. No KL. Equal words are not merged, because their latents differ.
 6. A step rolls out `prompts` prompts once (0: `groups`) and learns from all that the filter keeps:
    nothing is refilled, and max_tries has no effect.
What stays: the rollouts' words, the rewards, the filter, the advantages.

A latent's noise depends on the seed, the batch of prompts, the rollout and the step alone.

    python -m variants.noisy_latents --model runs/sft --data train.json --density sum

Source: ours, after Gaussian policies (Williams 1992).
"""

import dataclasses
import math
import os
from collections import Counter

import torch

import la_dapo
from common.ahead import read_ahead
from common.cli import run_script
from common.formats import Skipped
from common.judge import judge_of
from common.machine import Machine, set_sync, whole
from common.report import draw_curves
from common.run import Run, rows_of
from data import Samples


@dataclasses.dataclass
class Config(la_dapo.Config):
    latent_sigma: float = 0.1  # deviation of the noise  # ours
    density: str = "sum"  # over D: sum (the score function) | mean (1/D of it)  # ours
    kl: float = 0.0  # no reference

    def __post_init__(self):
        super().__post_init__()
        if self.latent_sigma <= 0 or self.density not in ("sum", "mean"):
            raise ValueError(
                f"latent_sigma {self.latent_sigma}, density {self.density!r}: expected above 0, "
                "and sum or mean"
            )
        if self.adjoint_terms or self.kl or self.minibatches * self.inner_epochs != 1:
            raise ValueError("noisy latents: adjoint_terms 0, no KL, one update a step")
        if self.merge_equal or self.cuda_graph:  # the noise is drawn anew at each step
            raise ValueError("noisy latents: no merge_equal, no cuda_graph")

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


def policy_loss(model, batch, counts, config):
    """`la_dapo.policy_loss` with the latents' log-density, without the adjoint and the KL."""
    new = la_dapo.replayed(model, batch, config)
    loss, _, figures = la_dapo.clipped_loss(new, batch, counts, config)
    z, sizes = new.latents.detach(), [len(z) for z in batch.rollout.latents]
    logp = log_density(z, new.predicted, config.latent_sigma, config.density)  # (N,)
    of_row = torch.stack([part.sum() for part in logp.split(sizes)])  # (R,)
    density = -((batch.A * batch.times)[:, 0] * of_row).sum() / counts.tokens
    return loss + density, dict(figures, density=density.detach())


def each_alone(group):
    """`la_dapo.distinct` without merging: rollouts of equal words have other latents."""
    unjudged = group.parts["unjudged"]
    return [[i] for i in range(len(unjudged)) if not unjudged[i]]


def train(config):
    """LA-DAPO with noisy latents -> path of the last checkpoint. The loop of la_dapo.py, with one
    try and one update a step.

    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, the policy, the prompts in their order
    machine = Machine(config.bf16, config.shard)
    rows = la_dapo.usable(rows_of(config), config)
    steps, judge = la_dapo.count_steps(rows, config), judge_of(config)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load()
    model.model.visual.requires_grad_(False)
    policy = machine.wrap(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    betas = 0.9, config.beta2
    optimizer = torch.optim.AdamW(trained, config.lr, betas, weight_decay=0.0, fused=True)
    next_batch = run.state["batch"] if run.state else 0
    size = config.rollout_batch
    batches_a_step = -(-(config.prompts or config.groups) // size)
    plan = la_dapo.prompt_batches(
        len(rows), size, next_batch, config.seed, machine.rank, machine.world
    )
    prompts = iter(read_ahead(Samples(rows, tokenizer, config, train=False), plan, config.workers))
    run.start(model, optimizer, la_dapo.describe(config, rows, model, steps, machine))

    for step in run.steps(steps):
        # roll out with noise, and score
        groups, skipped, first_batch = [], [], next_batch
        decoder = machine.decoder(model)
        for k in range(next_batch, next_batch + batches_a_step):
            if k % machine.world == machine.rank:
                samples = next(prompts)
                with machine.autocast():
                    feed = Feed(config, k)
                    groups += la_dapo.roll_out(decoder, tokenizer, samples, k, config, feed=feed)
                skipped += [sample for sample in samples if isinstance(sample, Skipped)]
        del decoder
        next_batch += batches_a_step
        la_dapo.score_groups(groups, judge, config)

        # the groups worth learning from, and their advantages; no rollouts are merged
        dropped = ("unjudged", "too hard", "too easy") if config.filter else ("unjudged",)
        kept = [group for group in groups if group.fate not in dropped]
        for group in kept:
            group.A = la_dapo.group_advantages(group.parts["total"])
        hidden = model.config.text_config.hidden_size
        batches, counts = la_dapo.batches_of(kept, hidden, config, machine, each_alone)

        # one update: loss with the latents' density, backward, clip, step
        lr, figures, norms = la_dapo.learning_rate(step, steps, config), Counter(), []
        for batch in batches if counts.tokens else []:
            set_sync(policy, last=batch is batches[-1])
            with machine.autocast():
                loss, logged = policy(policy_loss, batch, counts, config)
            (loss * machine.world).backward()  # DDP and FSDP average the ranks' gradients
            figures.update({name: float(value) for name, value in logged.items()})
        if counts.tokens:
            norms.append(whole(torch.nn.utils.clip_grad_norm_(trained, config.clip)).item())
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            if math.isfinite(norms[-1]):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then a checkpoint
        skipped, failures = run.skips(skipped, judge)
        line = dict(step=step, lr=lr, prompts=[first_batch * size, next_batch * size])
        line.update(la_dapo.update_figures(figures, norms, machine))
        line.update(la_dapo.rollout_figures(groups, kept, kept, machine))
        line.update(skipped=len(skipped), skipped_names=skipped, judge_failures=failures)
        run.log(line, "total", "accuracy", "groups")
        if run.due(step + 1, steps):
            run.save(step + 1, model, tokenizer, optimizer, batch=next_batch)
            if machine.master:
                curves = os.path.join(config.out, "rewards.png")
                draw_curves(run.path, curves, la_dapo.CURVES)
    return run.finish()


if __name__ == "__main__":
    run_script(train, Config)
