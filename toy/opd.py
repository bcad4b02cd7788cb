"""On-policy distillation on the embedded world: the tables of docs/variants.md.

    python -m toy                                # first: clips, captions, and the base model
    python -m toy.opd                            # the teacher, all rows, one seed
    python -m toy.opd --seeds 3 --rows la-dapo,cue

The cue of a question is where the ball is in each picture that is shown, in the words that the
captions have taught. It follows from the pictures. The teacher is a latent SFT in which every
second question ends in a hint, by turns its cue and its answer; it is where all rows start, too.
First it is asked the held-out questions without a hint and with either.

The seeds share the demo's base. Each has its own teacher. Seconds are those of the CPU, of one
thread: two trainings side by side do not change them much. What is on disk is not made again.
Source: ours.
"""

import dataclasses
import json
import os
import time

import torch

import evaluate
import la_dapo
import sft
from common.cli import run_script
from common.formats import read_rows
from common.runs import newest, write_json
from toy import plan
from toy.__main__ import markdown
from toy.seed import train
from toy.tiny import TINY, TINY_DATA, TINY_EVAL, TINY_RL
from toy.world import contacts, place_words, prompts, questions, write_rows
from variants import opd

MARKER = "where is the ball ?"  # words that the tokenizer has; the captions ask so

TINY_OPD = dict(
    TINY_DATA,
    marker=MARKER,
    prompts=256,
    rollout_batch=128,
    max_new_tokens=48,
    max_latents=2,
    micro_batch=128,
    lr=1e-4,
    beta2=0.99,
    warmup_steps=20,
    final_lr=0.1,
    save_every=20,
)

EXPERT = dict(privilege="none", lr=3e-4)
# the words' gradient goes into the latents; without, as is opd.py's default, they are constants
ADJOINT = dict(adjoint_terms=-1)

# row: its title, its script, what differs from TINY_RL or TINY_OPD
ROWS = {
    "la-dapo": ("LA-DAPO", la_dapo, {}),
    "answer": ("OPD, answer", opd, dict(privilege="answer")),
    "cue": ("OPD, cue", opd, dict(privilege="cue")),
    "cue+module": ("OPD, cue + module", opd, dict(privilege="cue", recovery=True)),
    "none": ("OPD, no privilege", opd, dict(privilege="none")),
    "cue-kl": ("OPD, cue, full KL", opd, dict(privilege="cue", full_kl=True)),
    "cue-adjoint": ("OPD, cue, adjoint", opd, dict(ADJOINT, privilege="cue")),
    # the teacher is another model, which knows more: words alone, and latents
    "expert": ("OPD, the expert", opd, EXPERT),
    "expert-adjoint": ("OPD, the expert, adjoint", opd, dict(EXPERT, **ADJOINT)),
    "expert-latents": ("OPD, the expert, lam = 10", opd, dict(EXPERT, lam=10.0)),
    "expert-latents-adjoint": ("OPD, lam = 10, adjoint", opd, dict(EXPERT, lam=10.0, **ADJOINT)),
}


@dataclasses.dataclass
class Config:
    out: str = "runs/toy"  # the demo's folder: its clips and its base are used
    seeds: int = 1  # teachers, each with its rows
    rows: str = "la-dapo,answer,cue,cue+module,none"  # some of ROWS; "" = none
    # steps of captions of the base: few make a model whose eyes are weak; 0 = the demo's base
    pretrain_steps: int = 0
    annotated: int = 0  # clips with chains that the teacher is trained on; 0 = the demo's
    sft_steps: int = 600  # of the teacher
    steps: int = 95  # of each distillation
    rl_steps: int = 95  # of LA-DAPO: as many seconds
    freeze_vision: bool = True  # in the rows; the teacher's SFT never trains it


def cued(make, seeds, bend):
    """Records that `make` gives for each clip, with the cue: where the ball is in what is shown."""
    records = []
    for seed in seeds:
        path = contacts(seed, bend)
        for record in make(seed, bend, f"clips/{seed}.mp4"):
            places = [place_words(path[k - 1]) for k in record["image"]]
            records.append(dict(record, cue=" ".join(places)))
    return records


def read_demo(out):
    """The settings of the demo in its folder. Raises SystemExit if there is none."""
    path = os.path.join(out, "toy.json")
    if not os.path.exists(path):
        raise SystemExit(f"{path}: no such file; python -m toy --out {out} comes first")
    with open(path) as f:
        return plan.Config(**json.load(f))


def write_cues(config):
    """The world's rows once more, with cues -> {train, prompts, test: jsonl file}.

    config: the demo's, with the teacher's number of annotated clips.
    """
    test = range(config.eval_seed, config.eval_seed + config.eval_clips)
    kinds = dict(train=(questions, range(config.annotated)), test=(questions, test))
    kinds.update(prompts=(prompts, range(config.clips)))
    paths = {}
    for name, (make, seeds) in kinds.items():
        file = f"cued_{name}_{len(seeds)}.jsonl"
        paths[name] = os.path.join(config.out, "data", file)
        if not os.path.exists(paths[name]):
            write_rows(paths[name], cued(make, seeds, config.bend))
    return paths


def with_hint(row, privilege):
    """A row whose question ends as the teacher's does."""
    hint = opd.hint(row, opd.Config(privilege=privilege, marker=MARKER))
    return dataclasses.replace(row, prompt=[*row.prompt, hint]) if hint else row


def score(model, name, rows, out):
    """Held-out questions -> {group: scores}. name: of the rows."""
    settings = dict(TINY_EVAL, model=newest(model), data=name, workers=0)
    return evaluate.evaluate(evaluate.Config(**settings, out=out), rows)


def timed(script, out, rows=None, **settings):
    """`toy.seed.train` -> path of the last checkpoint, CPU seconds: kept from the first time."""
    path, began = os.path.join(out, "cpu.json"), time.process_time()
    checkpoint = train(script, out, rows, **settings)
    if not os.path.exists(path):
        write_json(path, round(time.process_time() - began))
    with open(path) as f:
        return checkpoint, json.load(f)


def make_base(demo, config):
    """The demo's base, or one with fewer steps -> path of its checkpoint."""
    if not config.pretrain_steps:
        return newest(os.path.join(config.out, "seed_0", "base"))
    fewer = dataclasses.replace(demo, pretrain_steps=config.pretrain_steps)
    settings = dict(plan.trainings(fewer)["base"].settings, workers=0)
    settings.update(model=os.path.join(config.out, "seed_0", "untrained"))
    settings.update(data=os.path.join(config.out, "data", "captions.jsonl"))
    return train(sft, os.path.join(config.out, f"opd_{config.pretrain_steps}", "base"), **settings)


def make_expert(base, home, common, config):
    """A latent SFT on all clips, each annotated -> path of its checkpoint."""
    settings = dict(TINY, **common, model=base, steps=config.sft_steps)
    settings.update(data=os.path.join(config.out, "data", "all.jsonl"))
    return timed(sft, os.path.join(home, "the_expert"), **settings)[0]


def run_seed(seed, base, paths, config):
    """-> {row: {group: scores}} of the teacher with each hint, and of the rows asked for."""
    folder = f"opd_{config.pretrain_steps}_{config.annotated}"
    home, common = os.path.join(config.out, folder, f"seed_{seed}"), dict(seed=seed, workers=0)
    test = read_rows(paths["test"])

    plain = read_rows(paths["train"])
    hinted = [with_hint(row, privilege) for privilege in ("cue", "answer") for row in plain]
    settings = dict(TINY, **common, model=base, steps=config.sft_steps)
    teacher, _ = timed(sft, os.path.join(home, "teacher"), plain + plain + hinted, **settings)
    scores = {}
    for privilege in ("none", "cue", "answer"):
        rows = [with_hint(row, privilege) for row in test]
        out = os.path.join(home, f"eval_teacher_{privilege}")
        scores[f"teacher, {privilege}"] = score(teacher, privilege, rows, out)

    for name in names_of(config):
        title, script, changes = ROWS[name]
        settings = dict(TINY_OPD, steps=config.steps)
        if script is la_dapo:
            settings = dict(TINY_RL, steps=config.rl_steps)
        settings.update(common, **changes, model=teacher, data=paths["prompts"])
        settings["freeze_vision"] = config.freeze_vision
        if name.startswith("expert"):
            settings["teacher"] = make_expert(base, home, common, config)
            out = os.path.join(home, "eval_the_expert")
            scores["the expert"] = score(settings["teacher"], "test", test, out)
        name += "" if config.freeze_vision else "+eyes"
        model, seconds = timed(script, os.path.join(home, name), **settings)
        title = f"{title} ({seconds} s)"
        scores[title] = score(model, "test", test, os.path.join(home, f"eval_{name}"))
    return scores


def names_of(config):
    """The rows asked for."""
    return config.rows.split(",") if config.rows else []


def main(config):
    """All seeds, and a table of each."""
    if unknown := set(names_of(config)) - set(ROWS):
        raise SystemExit(f"--rows takes some of {', '.join(ROWS)}, not {', '.join(unknown)}")
    torch.set_num_threads(1)
    demo = read_demo(config.out)
    annotated = config.annotated or demo.annotated
    paths = write_cues(dataclasses.replace(demo, out=config.out, annotated=annotated))
    base, tables = make_base(demo, config), []
    for seed in range(config.seeds):
        scores = run_seed(seed, base, paths, config)
        tables.append(f"seed {seed}\n\n" + markdown([scores], {}))
    print("\n\n".join(tables))


if __name__ == "__main__":
    run_script(main, Config)
