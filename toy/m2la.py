"""What a compressed cache costs on the embedded world: ranks, before and after healing.

    python -m toy          # trains latent SFT, which is converted
    python -m toy.m2la     # the tables of docs/variants.md, in minutes

Each rank and each way with the norm of keys is a conversion of the same model (variants/m2la.py)
and 100 steps of the same SFT. Two controls: those steps without a conversion, and after one whose
maps were made random, at half the cache. What is on disk is not made again. Source: ours.
"""

import os
from dataclasses import dataclass

import torch

import sft
from common.cli import run_script
from common.runs import Machine, newest, rows_of, write
from toy.__main__ import markdown
from toy.seed import score, train
from toy.tiny import TINY
from toy.world import paths_of
from variants import m2la


@dataclass
class Config:
    out: str = "runs/toy"  # the demo's folder
    seed: int = 0  # the demo's
    ranks: str = (
        "72,48,36,24,12"  # of the latent; the cache has 96 numbers a token and layer before
    )
    norms: str = "exact,linear"  # of keys
    steps: int = 100  # of healing, x 64 rows
    lr: float = 1e-3  # peak; half of the toy's SFT
    workers: int = 0  # decoding processes


def forget(folder):
    """Make the maps into the latent and out of it random, in a converted model's folder."""
    model, _ = Machine().load(folder)
    torch.manual_seed(0)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        for weight in (attention.kv_a.weight, attention.up_k, attention.up_v):
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    model.save_pretrained(folder)


def heal(folder, random=False, **settings):
    """A conversion in its folder, and its healing -> the two models' folders."""
    converted = os.path.join(folder, "converted")
    config = m2la.Config(**settings, out=folder, resume=os.path.exists(converted))
    if random and not config.resume:
        forget(m2la.write_converted(config, rows_of(config)))
        config.resume = True
    return converted, m2la.train(config)


def run(config):
    """All conversions -> {row: scores} before healing, {row: scores} after, {row: bytes a token}.

    Bytes are measured, of all layers together.
    """
    world, home = paths_of(config), os.path.join(config.out, f"seed_{config.seed}")
    start, test = newest(os.path.join(home, "latent")), world["test"]
    settings = dict(TINY, steps=config.steps, lr=config.lr, model=start, data=world["train"])
    settings.update(seed=config.seed, workers=config.workers)
    before, after, size = {}, {}, {}

    def measure(name, folder, converted, healed):
        before[name] = score(converted, test, os.path.join(folder, "eval_before"), config)
        after[name] = score(healed, test, os.path.join(folder, "eval_after"), config)
        model, _ = Machine().load(converted)
        size[name] = m2la.time_step(model, 64)[1] * len(model.model.language_model.layers)

    folder = os.path.join(home, "m2la", "none")
    measure("not converted", folder, start, train(sft, folder, **settings))
    folder = os.path.join(home, "m2la", "random")
    measure("random, r = 24", folder, *heal(folder, random=True, rank=24, **settings))
    for norm in config.norms.split(","):
        for rank in map(int, config.ranks.split(",")):
            folder = os.path.join(home, "m2la", f"{norm}_{rank}")
            measure(f"{norm}, r = {rank}", folder, *heal(folder, norm=norm, rank=rank, **settings))
    return before, after, size


def main(config):
    """The tables, on the screen and in OUT/m2la.md."""
    before, after, size = run(config)
    titles = {name: f"{name}: {size[name]} bytes" for name in size}
    text = f"Before healing\n\n{markdown([before], titles)}\n\n"
    text += f"After {config.steps} steps\n\n{markdown([after], titles)}\n"
    write(os.path.join(config.out, "m2la.md"), text)
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main, Config)
