"""How fast, and in how much memory. One door to three commands, each with flags of its own:

    python -m tools.bench --plan --shape 8b --gpus 8    # memory by formula, seconds: tools/plan.py
    python -m tools.bench --cpu                         # ratios, some minutes: tools/bench_cpu.py
    python -m tools.bench --gpu --out bench.json        # one GPU, minutes: tools/bench_gpu.py
    python -m tools.bench --gpu --help                  # the flags of that command

Models are random (tools/shapes.py): only what a step costs can be seen with them. Source: ours.
"""

import dataclasses
import sys

from common.cli import run_script
from tools import bench_cpu, bench_gpu, plan


@dataclasses.dataclass
class Config:
    plan: bool = False  # what a training takes on each GPU, by formula; --plan --help
    cpu: bool = False  # our way against the usual one, on one thread; --cpu --help
    gpu: bool = False  # real sizes, seconds, memory, shares of the card; --gpu --help


COMMANDS = {"--plan": plan, "--cpu": bench_cpu, "--gpu": bench_gpu}


def main(config):
    raise SystemExit(f"which bench? expected one of {', '.join(COMMANDS)}")


def command(argv):
    """The command line -> main and Config of the command that it names, its flags."""
    for flag, module in COMMANDS.items():
        if flag in argv:
            return module.main, module.Config, [x for x in argv if x != flag]
    return main, Config, argv


if __name__ == "__main__":
    run_script(*command(sys.argv[1:]))
