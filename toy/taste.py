"""The tiny trained model that the repository carries: from a folder of the demo to taste/.

    python -m toy                      # trains it
    python -m toy.taste --commit NAME  # copies it, its painter, two held-out clips and questions

Source: ours.
"""

import os
import shutil
from dataclasses import dataclass

from common.cli import run_script
from common.pictures import Painter
from common.runs import newest, read_lines, write, write_json
from toy.tiny import TINY_PICTURES
from toy.world import write_rows

CARD = """# A taste

A model of half a million weights that imagines, small enough to come with the code: it answers
questions about the embedded world (toy/world.py), and about nothing else.

- `model/`: LA-DAPO on the embedded world, one seed, as `python -m toy` leaves it (code at commit
  {commit}, seed {seed}). `model/painter/` turns its visual tokens and latents back into pixels
  (`python -m tools.pictures`, {frames} frames of training clips, error on held-out frames in
  docs/results.md). `model/future_l1.json`: what it is to be asked with.
- `clips/`, `questions.jsonl`: the first {clips} of the held-out clips, with their four questions,
  answers and coming key frames. The model has never seen them.

Put together by `python -m toy.taste`. Licence as the code's.
"""


@dataclass
class Config:
    out: str = "runs/toy"  # the demo's folder
    seed: int = 0
    name: str = "la-dapo"  # which training's model
    to: str = "taste"  # where it goes
    clips: int = 2  # so many of the held-out ones
    commit: str = "?"  # of the code that trained it, for the card


def copy_model(source, target):
    """A checkpoint -> a model's folder: no state of the training, the painter beside it."""
    painter = Painter.beside(source)
    if painter is None:
        raise SystemExit(f"{source} has no painter: python -m toy teaches one")
    leave = shutil.ignore_patterns("trainer.pt", "rank_*.pt", "trainer", "painter", "README.md")
    shutil.copytree(source, target, ignore=leave, dirs_exist_ok=True)
    painter.save(target)
    write_json(os.path.join(target, "future_l1.json"), TINY_PICTURES)


def copy_questions(data, n, target):
    """The first n clips of the held-out rows, and their rows."""
    records = read_lines(os.path.join(data, "test.jsonl"))
    clips = list(dict.fromkeys(record["video"] for record in records))[:n]
    os.makedirs(os.path.join(target, "clips"), exist_ok=True)
    for clip in clips:
        shutil.copy(os.path.join(data, clip), os.path.join(target, clip))
    write_rows(os.path.join(target, "questions.jsonl"), [r for r in records if r["video"] in clips])


def main(config):
    """Fill `config.to`."""
    source = newest(os.path.join(config.out, f"seed_{config.seed}", config.name))
    copy_model(source, os.path.join(config.to, "model"))
    copy_questions(os.path.join(config.out, "data"), config.clips, config.to)
    facts = dict(commit=config.commit, seed=config.seed, clips=config.clips, frames="7,200")
    write(os.path.join(config.to, "README.md"), CARD.format(**facts))
    print(f"{config.to}: copied from {source}")


if __name__ == "__main__":
    run_script(main, Config)
