"""The embedded world: the whole method on a laptop, in minutes, on real mp4 clips.

    python -m toy              # clips, pretraining, SFT, LA-DAPO, curation, evaluation, table
    python -m toy --fresh      # the same, from nothing
    python -m toy --serial     # one stage after the other, all words on the screen

The paddle box: a ball in a square box with four coloured walls. Where on a wall it hits, u in [0,
1], sets the angle of its rebound from the normal: phi = bend * (2u - 1). The picture of a contact
is therefore all one needs to know, and the words "hits red" are not: who wants to know the third
wall has to keep the exact place in mind, twice. Each clip shows six contacts, which fall on key
frames 2..7; the model sees frames 3 and 4 and is asked which wall comes next (1-hop), second
(2-hop), third (3-hop), or second when the third contact's frame is shown too (interp).

Everything below the world is the real path: mp4 -> decord -> patches -> `curate.probe` ->
`sft.train` -> `la_dapo.train` -> `evaluate.evaluate`. Around it stand the clips and their rows
(toy/world.py), a tokenizer and a tiny random Qwen3-VL (toy/tiny.py). A short training on captions
of single frames stands in for Qwen3-VL's pretraining. A few clips have chains of future frames,
which SFT learns from; all have answers, which RL learns from. Settings differ from the paper's
where toy/tiny.py says so, and only there.

Stages that need not wait for each other run side by side (toy/stages.py), each on one thread. Every
stage keeps what it made on disk; at the end the same stages are gone through in their order, find
all done, and give the table.

The tables of docs/results.md, with more rows and seeds, come from toy/tables.py.

Source: the world and the settings are ours; the four questions are FutureBench's.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time

import numpy as np
import torch

from common.cli import run_script
from common.report import draw_bars, draw_key_frames, draw_rl
from common.runs import write, write_json
from toy.plan import CURATED, FREE, GROUPS, Config, trainings
from toy.seed import run_seed
from toy.stages import Stage, run_stages
from toy.world import make_world


def stages_of(plan, config):
    """The first seed's stages, in the order in which they should begin -> [Stage]."""
    seconds = dict(base=165, text=105, latent=125)
    stages, settings = [], dataclasses.asdict(config)

    def add(name, after, time, method, *arguments):
        call = "toy.seed", "run_stage", settings, method, *arguments
        stages.append(Stage(name, tuple(after), time, call))

    for name, training in plan.items():
        after = [] if training.start == "untrained" else [training.start]
        add(name, after, seconds.get(name, 165), "train", name)
    add("painter", ["base"], 55, "paint")
    if config.curation:
        add("curation", ["base"], 150, "curate")
    last = "la-dapo" if "la-dapo" in plan else "latent"
    if "latent" in plan:  # both score their model first, and read the clips once for all
        add("ablations", ["latent", "painter"], 85, "ablate")
        scored = "ablations" if last == "latent" else last  # one writes, the other waits
        add("pictures", [scored, "painter"], 25, "draw", last)
    for name in plan:
        if name not in ("latent", last):
            add(f"score-{name}", [name, "painter"], 15, "score", name)
    return stages


# ----------------------------------------------------------------------------------------- tables


def spread(values):
    """Mean and, for two seeds or more, the standard deviation over seeds."""
    text = f"{np.mean(values):.3f}"
    return text + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def markdown(results, titles, groups=GROUPS):
    """[{row: {group: scores}} a seed] -> a table as text; avg is the micro average."""
    lines = ["| | " + " | ".join([*groups, "avg"]) + " |", "|---" * (len(groups) + 2) + "|"]
    for name in results[0]:
        cells = []
        for group in (*groups, "all"):
            cells.append(spread([scores[name][group]["accuracy"] for scores in results]))
        lines.append(f"| {titles.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tabulate(results, titles, config):
    """[Results a seed] -> all tables as text."""
    scores, ablations, curation, figures, errors = zip(*results)
    text = f"Accuracy on {config.eval_clips} held-out clips a group, {len(results)} seed(s)\n\n"
    text += markdown(scores, titles)
    if ablations[0]:
        text += "\n\nLatent SFT, with its spans fed other vectors\n\n" + markdown(ablations, {})
    if curation[0]:
        text += "\n\nCuration: a pool of which a third asks for the future\n\n"
        text += markdown(curation, CURATED, GROUPS[:3]) + "\n"
    if errors[0]:
        text += "\n\nPictures of what is imagined: squared error, 1 = the mean picture always\n"
    for name in errors[0]:
        text += f"\n- {name}: {spread([line[name] for line in errors])}"
    for name in figures[0]:
        text += f"\n- {name}: {spread([line[name] for line in figures])}"
    return text


def write_tables(results, plan, config):
    """[Results a seed] -> table.md, table.json and the pictures in config.out; the text."""
    titles = {name: training.title for name, training in plan.items()}
    text = tabulate(results, titles, config)
    write(os.path.join(config.out, "table.md"), text + "\n")
    scores, ablations, curation, figures, errors = zip(*results)
    content = dict(settings=dataclasses.asdict(config), results=scores, ablations=ablations)
    content.update(curation=curation, figures=figures, errors=errors)
    write_json(os.path.join(config.out, "table.json"), content)

    draw_bars(scores, titles, GROUPS, os.path.join(config.out, "accuracy.png"))
    logs = {}
    for name, training in plan.items():
        if training.data == "prompts":
            folders = [os.path.join(config.out, f"seed_{s}", name) for s in range(len(results))]
            logs[training.title] = [os.path.join(folder, "log.jsonl") for folder in folders]
    if logs:
        draw_rl(logs, os.path.join(config.out, "rl.png"))
    return text


# -------------------------------------------------------------------------------------------- all


def claim_folder(config):
    """Make config.out, or see that it was made with these settings. Raises SystemExit if not."""
    path = os.path.join(config.out, "toy.json")
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    if config.fresh and os.path.isdir(config.out):
        if os.listdir(config.out) and not os.path.exists(path):
            raise SystemExit(
                f"{config.out} was not made by this script (it has no toy.json): not deleting it"
            )
        shutil.rmtree(config.out)
    os.makedirs(config.out, exist_ok=True)
    if os.path.exists(path):
        with open(path) as f:
            before = json.load(f)
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            raise SystemExit(
                f"{config.out} was made with other values of {', '.join(changed)} (toy.json): "
                "pass --fresh to start over, or another --out"
            )
    write_json(path, settings)


def prepare(config):
    """The world in its folder, and a picture of its first clip -> {rows: jsonl file}."""
    torch.set_num_threads(1)  # so small a model gains little from a second one
    claim_folder(config)
    world = make_world(config)
    titles = {3: "3 seen", 4: "4 seen", 5: "5 future", 6: "6 future", 7: "7 future"}
    clip = os.path.join(config.out, "data", "clips", "0.mp4")
    draw_key_frames(clip, titles, os.path.join(config.out, "clip.png"))
    return world


def finish(results, plan, config, began):
    """[Results a seed] -> the tables and pictures, in config.out and on the screen."""
    text = write_tables(results, plan, config)
    seconds = time.time() - began
    print(f"\n{text}\n\n{seconds:.0f} s; in {config.out}:")
    print(
        "  seed_0/pictures/imagined.png     what is imagined, right and wrong; imagine.gif: moving"
    )
    print("  seed_0/eval_la-dapo/report.html  answers to look through")
    print("  table.md accuracy.png rl.png clip.png, and each training's loss.png or rewards.png")


def main(config):
    """The demo: one seed."""
    began = time.time()
    world, plan = prepare(config), trainings(config)
    if config.serial or os.path.exists(os.path.join(config.out, "table.json")):
        results = run_seed(0, config, world, plan)
    else:
        logs = os.path.join(config.out, "logs")
        run_stages(stages_of(plan, config), logs, os.cpu_count() or 1)
        with open(os.path.join(logs, "table.txt"), "w") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                results = run_seed(0, config, world, plan)
    finish([results], plan, config, began)


if __name__ == "__main__":
    run_script(main, Config)
