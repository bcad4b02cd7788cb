"""One seed of the demo, stage by stage. What is on disk is not made again."""

import dataclasses
import json
import os

import numpy as np
import torch

import curate
import evaluate
import sft
from common.formats import read_rows
from common.painter import Config as PainterConfig
from common.painter import Painter
from common.painter import main as teach_painter
from common.runs import checkpoints, newest, write_json
from tools import pictures
from toy.plan import ABLATIONS, GROUPS, Config, Results, trainings
from toy.tiny import (
    TINY,
    TINY_CURATION,
    TINY_DATA,
    TINY_EVAL,
    TINY_PICTURES,
    make_model,
    make_tokenizer,
)
from toy.world import candidates, paths_of, write_rows


class Seed:
    """The stages of one seed. Each does what is not on disk yet, and gives what it made."""

    def __init__(self, seed, config, world, plan):
        self.config, self.world, self.plan = config, world, plan
        self.home = os.path.join(config.out, f"seed_{seed}")
        self.common = dict(seed=seed, workers=config.workers)

    def path(self, name):
        """The folder of a training or an evaluation."""
        return os.path.join(self.home, name)

    def train(self, name):
        """-> path of its last checkpoint. The first also makes the random model it starts from."""
        training = self.plan[name]
        if training.start == "untrained":
            write_random_model(self.path("untrained"), self.common["seed"], self.world)
        start, data = newest(self.path(training.start)), self.world[training.data]
        settings = dict(self.common | training.settings, model=start, data=data)
        return train(training.script, self.path(name), **settings)

    def paint(self):
        """Teach the painter of the base's visual tokens -> its folder, its held-out error.

        The vision tower is frozen from then on: one painter serves all models of the seed.
        """
        folder, path = newest(self.path("base")), self.path("painter.json")
        if not os.path.exists(path):
            settings = dict(TINY_DATA, model=folder, steps=self.config.painter_steps)
            settings.update(data=self.world["captions"], seed=self.common["seed"])
            write_json(path, teach_painter(PainterConfig(**settings)))
        with open(path) as f:
            return folder, json.load(f)

    def score(self, name):
        """The scores of a training's model -> {group: scores}."""
        model, (painter, _) = newest(self.path(name)), self.paint()
        if model != painter:
            Painter.beside(painter).save(model)
        latents = "pause" if name == "pause" else "generated"
        out = self.path(f"eval_{name}")
        return score(model, self.world["test"], out, self.config, latents)

    def ablate(self):
        """Does the answer depend on what is imagined? -> {what is fed: scores}."""
        model, scores = newest(self.path("latent")), dict(generated=self.score("latent"))
        for latents in ABLATIONS:
            out = self.path(f"eval_latent_{latents}")
            scores[latents] = score(model, self.world["test"], out, self.config, latents)
        return scores

    def curate(self):
        """-> {training: scores}, {figure: value}."""
        base = newest(self.path("base"))
        return run_curation(self.home, base, self.common, self.config, self.world)

    def draw(self, name):
        """Draw what a training's model imagines -> how far it is from what came, {what: error}."""
        self.score(name)  # so that there is a painter beside it
        settings = dict(TINY_PICTURES, model=newest(self.path(name)), out=self.path("pictures"))
        errors = pictures.main(pictures.Config(**settings, data=self.world["test"]))
        return {"true frames, held out": self.paint()[1], **errors}


def run_seed(seed, config, world, plan):
    """All trainings of one seed, and their scores -> Results. plan: {name: Training}."""
    stages = Seed(seed, config, world, plan)
    scores, ablations, curation, figures, errors = {}, {}, {}, {}, {}
    for name in plan:
        stages.train(name)
        scores[name] = stages.score(name)
    if "latent" in plan:
        ablations = stages.ablate()
        errors = stages.draw("la-dapo" if "la-dapo" in plan else "latent")
    if config.curation:
        curation, figures = stages.curate()
    return Results(scores, ablations, curation, figures, errors)


def run_stage(settings, method, *arguments):
    """One stage of the demo alone, in a folder that `prepare` has made: a method of Seed."""
    torch.set_num_threads(1)
    config = Config(**settings)
    getattr(Seed(0, config, paths_of(config), trainings(config)), method)(*arguments)


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
