"""The embedded world: the whole method on a laptop, in minutes, on real mp4 clips.

    python -m toy              # clips, pretraining, SFT, LA-DAPO, curation, evaluation, table
    python -m toy --fresh      # the same, from nothing

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

The tables of docs/results.md, with more rows and seeds, come from toy/tables.py.

Source: the world and the settings are ours; the four questions are FutureBench's.
"""

import dataclasses
import json
import os
import shutil
import time
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch

import curate
import evaluate
import la_dapo
import sft
from common.flags import run_script
from common.formats import read_rows
from common.report import draw_bars, draw_key_frames, draw_rl
from common.runs import checkpoints, write, write_json
from toy.tiny import TINY, TINY_CURATION, TINY_EVAL, TINY_RL, make_model, make_tokenizer
from toy.world import candidates, make_world, write_rows


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
    workers: int = 0  # decoding processes; the clips fit in memory, so one pass and a cache do


FREE = ("fresh", "curation", "workers", "seeds", "rows")  # may change in a folder that is there
GROUPS = ("1-hop", "2-hop", "3-hop", "interp")
ABLATIONS = ("zero", "noise", "shuffled", "true")  # fed to the spans of latent SFT
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


def trainings(config):
    """The demo's trainings in their order: {name: Training}."""
    pretraining = dict(TINY, lr=1e-3, steps=config.pretrain_steps)
    pretraining.update(freeze_vision=False, spans=False, latent_head="")
    tuning = dict(TINY, steps=config.sft_steps)
    rl = dict(TINY_RL, steps=config.rl_steps)
    return {
        "base": Training("base (captions only)", sft, "random", "captions", pretraining),
        "text": Training("text-only SFT", sft, "base", "train", dict(tuning, spans=False)),
        "latent": Training("latent SFT", sft, "base", "train", tuning),
        "la-dapo": Training("RL: LA-DAPO (both)", la_dapo, "latent", "prompts", rl),
    }


# --------------------------------------------------------------------------------------- one seed


def run_seed(seed, config, world, plan):
    """All trainings of one seed, and their scores -> Results. plan: {name: Training}."""
    home = os.path.join(config.out, f"seed_{seed}")
    common = dict(seed=seed, workers=config.workers)
    models = {"random": write_random_model(os.path.join(home, "random"), seed, world)}
    scores, ablations, curation, figures = {}, {}, {}, {}

    for name, training in plan.items():
        start, data = models[training.start], world[training.data]
        settings = dict(training.settings, **common, model=start, data=data)
        models[name] = train(training.script, os.path.join(home, name), **settings)
        latents = "pause" if name == "pause" else "generated"
        out = os.path.join(home, f"eval_{name}")
        scores[name] = score(models[name], world["test"], out, config, latents)

    # does the answer depend on what is imagined?
    if "latent" in plan:
        ablations["generated"] = scores["latent"]
        for latents in ABLATIONS:
            out = os.path.join(home, f"eval_latent_{latents}")
            ablations[latents] = score(models["latent"], world["test"], out, config, latents)
    if config.curation:
        curation, figures = run_curation(home, models["base"], common, config, world)
    return Results(scores, ablations, curation, figures)


def write_random_model(folder, seed, world):
    """A tokenizer of the world's words and a random model, written once -> the folder."""
    if os.path.exists(folder):
        return folder
    texts = ["system user assistant", TINY["system"]]
    for path in (world["captions"], world["train"]):
        with open(path) as f:
            for record in map(json.loads, f):
                turns = [turn["value"].replace("<image>", " ") for turn in record["conversations"]]
                texts += [record["answer"], *turns]
    tokenizer = make_tokenizer(texts)
    make_model(tokenizer, seed).save_pretrained(folder + ".part")
    tokenizer.save_pretrained(folder + ".part")
    os.rename(folder + ".part", folder)
    return folder


def train(script, out, rows=None, **settings):
    """A training in its folder, begun, continued or done before -> path of its last checkpoint."""
    print(f"\n== training {out}")
    return script.train(script.Config(**settings, out=out, resume=bool(checkpoints(out))), rows)


def score(model, data, out, config, latents="generated"):
    """An evaluation in its folder -> {group: scores}."""
    print(f"\n== evaluating {out}")
    settings = dict(TINY_EVAL, model=model, data=data, latents=latents, workers=config.workers)
    return evaluate.evaluate(evaluate.Config(**settings, out=out))


# --------------------------------------------------------------------------------------- curation


def run_curation(home, base, common, config, world):
    """Curation with one seed -> {training: scores}, {figure: value}. sec. 3.2; the pool is ours.

    home: the seed's folder. base: the captions model. It first learns, on clips of its own, to
    answer such questions with and without the later frames in sight. That stands in for Qwen3-VL,
    which can read a frame it is given but hardly foresee it. The result is the model that is
    probed, and that then learns from the chosen rows, or from as many random ones.
    """
    files = write_pool(config, world)
    common = dict(TINY, **common)

    # the model that is probed
    able = []
    for row in read_rows(files["able"]):
        able += [curate.with_future(row), dataclasses.replace(row, response=[])]
    steps = max(1, config.pretrain_steps // 15)
    settings = dict(common, model=base, spans=False, lr=1e-3, steps=steps)
    base = train(sft, os.path.join(home, "able"), able, **settings)

    # the rows that are chosen, and as many random ones
    pool = read_rows(files["pool"])
    chosen = choose(base, files["pool"], len(pool) // 6, os.path.join(home, "curation"), common)
    some = np.random.default_rng(common["seed"]).permutation(len(pool))[: len(chosen)]
    sets = dict(selected=[row for row in pool if row.id in chosen], random=[pool[i] for i in some])

    # what a model learns from either
    scores = {"able": score(base, files["test"], os.path.join(home, "eval_able"), config)}
    figures = {"rows in each set": len(chosen)}
    settings = dict(common, model=base, steps=max(1, config.sft_steps // 3))
    for name, rows in sets.items() if chosen else ():
        figures[f"share of hops, {name}"] = np.mean([row.group in GROUPS for row in rows])
        model = train(sft, os.path.join(home, name), rows, **settings)
        scores[name] = score(model, files["test"], os.path.join(home, f"eval_{name}"), config)
    return scores, figures


def write_pool(config, world):
    """The rows of the curation on disk -> {pool, able, test: jsonl file}.

    Two thirds of the pool ask what can be seen, one third for the future. able: such rows on other
    clips. test: the world's, without interp.
    """
    clips = dict(
        pool=range(min(400, config.clips // 2)), able=range(config.clips // 2, config.clips)
    )
    folder = os.path.dirname(world["test"])
    files = {name: os.path.join(folder, f"curation_{name}.jsonl") for name in (*clips, "test")}
    for name, seeds in clips.items():
        rows = []
        for seed in seeds:
            rows += candidates(seed, config.bend, f"clips/{seed}.mp4")
        write_rows(files[name], rows)
    with open(world["test"]) as f:
        write_rows(files["test"], [row for row in map(json.loads, f) if row["group"] != "interp"])
    return files


def choose(model, data, k, out, common):
    """Probe the pool and cut it to the k rows of highest gain -> their ids."""
    settings = dict(TINY_CURATION, seed=common["seed"], workers=common["workers"])
    config = curate.Config(**settings, model=model, data=data, out=out, k=k)
    curate.probe(config)
    return {record["id"] for record in curate.cut(config)}


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
    scores, ablations, curation, figures = zip(*results)
    text = f"Accuracy on {config.eval_clips} held-out clips a group, {len(results)} seed(s)\n\n"
    text += markdown(scores, titles)
    if ablations[0]:
        text += "\n\nLatent SFT, with its spans fed other vectors\n\n" + markdown(ablations, {})
    if curation[0]:
        text += "\n\nCuration: a pool of which a third asks for the future\n\n"
        text += markdown(curation, CURATED, GROUPS[:3]) + "\n"
    for name in figures[0]:
        text += f"\n- {name}: {spread([line[name] for line in figures])}"
    return text


def write_tables(results, plan, config):
    """[Results a seed] -> table.md, table.json and the pictures in config.out; the text."""
    titles = {name: training.title for name, training in plan.items()}
    text = tabulate(results, titles, config)
    write(os.path.join(config.out, "table.md"), text + "\n")
    scores, ablations, curation, figures = zip(*results)
    content = dict(settings=dataclasses.asdict(config), results=scores, ablations=ablations)
    content.update(curation=curation, figures=figures)
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
    print(
        f"\n{text}\n\n{time.time() - began:.0f} s; in {config.out}: table.md, accuracy.png, "
        "rl.png, clip.png, and each training's loss.png or rewards.png"
    )


def main(config):
    """The demo: one seed."""
    began = time.time()
    world, plan = prepare(config), trainings(config)
    finish([run_seed(0, config, world, plan)], plan, config, began)


if __name__ == "__main__":
    run_script(main, Config)
