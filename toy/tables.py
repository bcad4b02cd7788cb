"""The tables of docs/results.md: the demo with more trainings and more seeds.

    python -m toy.tables --seeds 3
    python -m toy.tables --seeds 3 --rows text,pause,latent --annotated 500 --no-curation

Everything is the demo's (toy/plan.py), its folder too: what the demo has trained is not trained
again. Only the rows are more: controls, ablations, and the variants of variants/. A row that others
start from is trained even if it is not asked for. Source: ours.
"""

import dataclasses
import os
import time

import numpy as np

import la_dapo
import sft
from common.cli import run_script
from common.walk import read_book
from curate import visual_gain
from toy import __main__ as demo
from toy.plan import GROUPS, Training
from toy.seed import run_seed
from toy.tiny import TINY_CURATION
from variants import logprob_gain, noisy_latents, own_path, pause_tokens, self_forcing

LONGER = 2.1  # steps of "latent-long" over those of "latent": what the time of the RL run buys


@dataclasses.dataclass
class Config(demo.Config):
    seeds: int = 3  # trainings of each row, each seed with its own pretraining
    rows: str = "all"  # which rows, by name with commas; "all" = every one


def sft_rows(settings):
    """What SFT is compared with. settings: latent SFT's."""
    stop = dict(settings, stop_term=False)
    long = dict(settings, steps=round(settings["steps"] * LONGER))
    forced = dict(settings, self_forcing=0.5, self_forcing_passes=3)
    pause = dict(settings, lam=0.0)
    annotated = "latent SFT, longer, all clips annotated"
    return {
        "pause": Training("pause tokens (control)", pause_tokens, "base", "train", pause),
        "latent+self": Training("latent SFT, self-forcing", self_forcing, "base", "train", forced),
        "latent-stop": Training("latent SFT, no stop term", sft, "base", "train", stop),
        "latent-long": Training("latent SFT, longer", sft, "base", "train", long),
        "latent-long-all": Training(annotated, sft, "base", "all", long),
    }


def rl_rows(settings):
    """What LA-DAPO is compared with. settings: its own."""

    def rl(title, start="latent", script=la_dapo, **changes):
        return Training(title, script, start, "prompts", dict(settings, **changes))

    noise = dict(adjoint_terms=0, latent_sigma=0.1, density="mean", share=False, prompts=64)
    noise_sum = dict(noise, density="sum")
    return {
        "dapo": rl("RL: DAPO", lambda_c=0.0, lambda_d=0.0),
        "dapo+ctr": rl("RL: DAPO + R_ctr", lambda_d=0.0),
        "dapo+div": rl("RL: DAPO + R_div", lambda_c=0.0),
        "constants": rl("RL: LA-DAPO, latents as constants", adjoint_terms=0),
        "noise": rl("RL: noisy latents, mean over D", script=noisy_latents, **noise),
        "noise-sum": rl("RL: noisy latents, sum over D", script=noisy_latents, **noise_sum),
        "own-path": rl("RL: LA-DAPO, rewards' own path", script=own_path),
        "text-rl": rl("RL from text-only SFT", start="text"),
    }


def all_rows(config):
    """{name: Training}: the demo's, the others of SFT, the others of RL."""
    rows = demo.trainings(config)
    rl = rows.pop("la-dapo")
    rows.update(sft_rows(rows["latent"].settings))
    return rows | {"la-dapo": rl} | rl_rows(rl.settings)


def pick_rows(config):
    """The rows asked for, those they start from, and the base. Raises SystemExit for other names.

    They come in the order of `all_rows`, which is that of the tables.
    """
    rows = all_rows(config)
    names = set(rows) if config.rows == "all" else {"base", *config.rows.split(",")}
    if names - set(rows) or config.seeds < 1:
        raise SystemExit(
            f"--rows takes some of {', '.join(rows)}, or all; --seeds at least 1 "
            f"(found {config.rows!r} and {config.seeds})"
        )
    names |= {rows[name].start for name in names}
    return {name: training for name, training in rows.items() if name in names}


def spearman(a, b):
    """Rank correlation of two series; ties share their mean rank. Source: Spearman 1904."""

    def ranks(values):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        return (count.cumsum() - (count - 1) / 2)[place]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def compare_scores(seed, config):
    """The cheap score of the curation's pool beside the counts -> {figure: value}."""
    home = os.path.join(config.out, f"seed_{seed}")
    counts = read_book(os.path.join(home, "curation"), "probe")
    cheap = logprob_gain.Config(
        **dict(TINY_CURATION, seed=seed, workers=config.workers, k=len(counts) // 6),
        model=os.path.join(home, "able"),
        data=os.path.join(config.out, "data", "curation_pool.jsonl"),
        out=os.path.join(home, "logprob_gain"),
    )
    lines, chosen = logprob_gain.probe(cheap), logprob_gain.cut(cheap)
    gains = [visual_gain(counts[id]["p_t"], counts[id]["p_v"]) for id in lines]
    cheap_gains = [visual_gain(line["logp_t"], line["logp_v"]) for line in lines.values()]
    return {
        "share of hops, chosen by log-probability": np.mean([r["group"] in GROUPS for r in chosen]),
        "rank correlation of the two scores": spearman(gains, cheap_gains),
    }


def main(config):
    """The demo's steps for each seed, with more rows."""
    began, plan, results = time.time(), pick_rows(config), []
    world = demo.prepare(config)
    for seed in range(config.seeds):
        results.append(run_seed(seed, config, world, plan))
        if config.curation:
            results[-1].figures.update(compare_scores(seed, config))
    demo.finish(results, plan, config, began)


if __name__ == "__main__":
    run_script(main, Config)
