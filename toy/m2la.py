"""What a compressed cache costs on the embedded world: ranks, before and after healing.

    python -m toy          # trains latent SFT, which is converted
    python -m toy.m2la     # the tables of docs/variants.md, in minutes

Each rank and each way with the norm of keys is a conversion of the same model (variants/m2la.py)
and 100 steps of the same SFT. The control is those steps without a conversion. What is on disk is
not made again. Source: ours.
"""

import os
from dataclasses import dataclass

import sft
from common.flags import run_script
from common.runs import Machine, newest, write
from toy.__main__ import markdown
from toy.seed import score, train
from toy.tiny import TINY
from toy.world import paths_of
from variants import m2la


@dataclass
class Config:
    out: str = "runs/toy"  # the demo's folder
    seed: int = 0  # the demo's
    ranks: str = "48,36,24,12"  # of the latent; the cache has 96 numbers a token and layer before
    norms: str = "exact,linear"  # of keys
    steps: int = 100  # of healing, x 64 rows
    lr: float = 1e-3  # peak; half of the toy's SFT
    workers: int = 0  # decoding processes


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
    for norm in config.norms.split(","):
        for rank in map(int, config.ranks.split(",")):
            folder = os.path.join(home, "m2la", f"{norm}_{rank}")
            resume = os.path.exists(os.path.join(folder, "converted"))
            options = dict(settings, norm=norm, rank=rank, out=folder, resume=resume)
            healed = m2la.train(m2la.Config(**options))
            measure(f"{norm}, r = {rank}", folder, os.path.join(folder, "converted"), healed)
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
