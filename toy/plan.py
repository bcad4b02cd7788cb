"""What the demo trains, with which settings, on which rows of the world."""

import dataclasses
from types import ModuleType
from typing import NamedTuple

import la_dapo
import sft
from toy.tiny import TINY, TINY_RL


@dataclasses.dataclass
class Config:
    out: str = "runs/toy"  # everything lands here
    fresh: bool = False  # delete `out` first
    clips: int = 3000  # training clips: their frames are captioned for the pretraining
    # of these, clips that also have the four questions with their chains of future frames
    annotated: int = 200
    eval_clips: int = 1000  # held-out clips, four questions each
    eval_seed: int = 4_000_000  # where held-out clips start; tuning used 1_000_000 and 2_000_000
    bend: float = 1.05  # rebound angle at the end of a wall, radians; -1.3 is easier
    pretrain_steps: int = 1500  # x 64 captions
    sft_steps: int = 600  # x 64 rows
    rl_steps: int = 80  # of LA-DAPO, on the answers of all training clips
    curation: bool = True  # also choose rows of a mixed pool by visual gain, and train on them
    painter_steps: int = 400  # of what turns latents back into pixels
    workers: int = 0  # decoding processes; the clips fit in memory, so one pass and a cache do
    serial: bool = False  # one stage after the other in this process; the numbers are the same


# may change in a folder that is there
FREE = ("fresh", "curation", "workers", "serial", "seeds", "rows")
GROUPS = ("1-hop", "2-hop", "3-hop", "interp")
# fed to the spans of latent SFT; pause is what stock `generate` would do
ABLATIONS = ("zero", "pause", "noise", "shuffled", "true")
CURATED = {
    "able": "before",
    "selected": "SFT on the selected rows",
    "random": "SFT on as many random rows",
}


class Training(NamedTuple):
    """A training, which is a row of the table."""

    title: str
    script: ModuleType  # sft, la_dapo or a variant: its Config and its train
    start: str  # the training whose model it starts from
    data: str  # which rows of the world it learns from
    settings: dict  # of the script's Config


class Results(NamedTuple):
    """What one seed gives. Scores are those of `evaluate.evaluate`: {group: {figure: value}}."""

    scores: dict  # {training: scores}
    ablations: dict  # {what the spans of latent SFT are fed: scores}
    curation: dict  # {training: scores}
    figures: dict  # of the curation: {name: value}
    errors: dict  # of what is imagined, against what came: {what: error}, 1 = the mean picture


def trainings(config):
    """The demo's trainings in their order: {name: Training}."""
    pretraining = dict(TINY, lr=1e-3, steps=config.pretrain_steps)
    pretraining.update(freeze_vision=False, spans=False, latent_head="")
    pretraining["workers"] = max(1, config.workers)  # nothing else runs yet: a core is free
    tuning = dict(TINY, steps=config.sft_steps)
    rl = dict(TINY_RL, steps=config.rl_steps)
    return {
        "base": Training("base (captions only)", sft, "untrained", "captions", pretraining),
        "text": Training("text-only SFT", sft, "base", "train", dict(tuning, spans=False)),
        "latent": Training("latent SFT", sft, "base", "train", tuning),
        "la-dapo": Training("RL: LA-DAPO (both)", la_dapo, "latent", "prompts", rl),
    }
