"""The embedded world: the whole method on a laptop, in minutes, on real mp4 clips.

    # one seed: clips, pretraining, SFT, LA-DAPO, curation, tables
    python -m toy
    python -m toy --seeds 3 --variants all --rl all          # the README's tables

The paddle box: a ball in a square box with four coloured walls. Where on a wall it hits, u in [0,
1], sets the angle of its rebound from the normal: phi = bend * (2u - 1). The picture of a contact
is therefore all one needs to know, and the words "hits red" are not: who wants to know the third
wall has to keep the exact place in mind, twice. Each clip shows six contacts, which fall on key
frames 2..7; the model sees frames 3 and 4 and is asked which wall comes next (1-hop), second
(2-hop), third (3-hop), or second when the third contact's frame is shown too (interp).

Everything below the world is the real path: mp4 -> decord -> patches -> `curate.probe` ->
`sft.train` -> `la_dapo.train` -> `evaluate.evaluate`. This file makes the clips, the rows, a
tokenizer and a tiny random Qwen3-VL; a short training on captions of single frames stands in for
Qwen3-VL's pretraining. A few clips have chains of future frames, which SFT learns from; all have
answers, which RL learns from. Settings differ from the paper's where `TINY` and `TINY_RL` say so,
and only there.

Source: the world and the settings are ours; the four questions are FutureBench's.
"""

import dataclasses
import json
import os
import shutil
import time

import numpy as np
import torch

import curate
import evaluate
import la_dapo
import sft
from common.formats import read_rows
from common.report import draw_bars, draw_key_frames, draw_rl
from common.runs import checkpoints, newest, parse_config, read_lines
from data import DataConfig
from toy.tiny import TINY, make_model, make_tokenizer
from toy.world import candidates, make_world, write_rows
from variants import pause_tokens, self_forcing


@dataclasses.dataclass
class Config:
    out: str = "runs/toy"  # everything lands here
    seeds: int = 1  # trainings, each with its own pretraining
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
    variants: str = "text,latent"  # which SFT trainings to compare, or "all"
    rl: str = "la-dapo"  # which RL trainings to compare, or "all"
    curation: bool = True  # also choose rows of a mixed pool by visual gain, and train on them
    workers: int = 0  # decoding processes; the clips fit in memory, so one pass and a cache do

    @property
    def rl_names(self):
        return (
            list(RL_VARIANTS) if self.rl == "all" else [name for name in self.rl.split(",") if name]
        )

    @property
    def sft_names(self):
        """The trainings asked for, and those that RL starts from."""
        names = (
            list(VARIANTS)
            if self.variants == "all"
            else [name for name in self.variants.split(",") if name]
        )
        return names + sorted(
            {RL_VARIANTS[name][0] for name in self.rl_names if name in RL_VARIANTS} - set(names)
        )


VARIANTS = {
    "text": dict(spans=False),
    "pause": dict(lam=0.0),
    "latent": dict(),
    "latent+self": dict(self_forcing=0.5, self_forcing_passes=3),
    "latent-stop": dict(stop_term=False),
    "latent-long": dict(longer=True),  # what SFT makes of the time that RL takes
    "latent-long-all": dict(longer=True, all=True),
}
SCRIPTS = {"pause": pause_tokens, "latent+self": self_forcing}  # the others: sft


# Its policy is sure of itself, so many samples are needed to see two outcomes: they are decoded
# together while equal.
LONGER = 2.1  # steps of "latent-long" over those of "latent": what the time of the RL run buys


TINY_RL = dict(
    {k: TINY[k] for k in ("image_max_tokens", "l_max", "max_length", "system")},
    groups=10**6,
    prompts=256,
    max_tries=1,
    rollout_batch=128,
    share=True,
    group_size=16,
    low=0.0,
    high=1.0,
    temperature=1.2,
    top_p=1.0,
    max_new_tokens=48,
    max_latents=2,
    micro_batch=64,
    kl=0.0,
    lr=1e-4,
    beta2=0.99,
    warmup_steps=20,
    final_lr=0.1,
    adjoint_terms=-1,
    save_every=20,
)


RL_VARIANTS = {  # name: (the SFT it starts from, settings)
    "dapo": ("latent", dict(lambda_c=0.0, lambda_d=0.0)),
    "dapo+ctr": ("latent", dict(lambda_d=0.0)),
    "dapo+div": ("latent", dict(lambda_c=0.0)),
    "la-dapo": ("latent", dict()),
    "constants": ("latent", dict(adjoint_terms=0)),
    "noise": ("latent", dict(adjoint_terms=0, latent_sigma=0.1, share=False, prompts=64)),
    "text-rl": ("text", dict()),
}


NAMES = {
    "base": "base (captions only)",
    "text": "text-only SFT",
    "pause": "pause tokens (control)",
    "latent": "latent SFT",
    "latent+self": "latent SFT, self-forcing",
    "latent-stop": "latent SFT, no stop term",
    "latent-long": "latent SFT, longer",
    "latent-long-all": "latent SFT, longer, all clips annotated",
    "dapo": "RL: DAPO",
    "dapo+ctr": "RL: DAPO + R_ctr",
    "dapo+div": "RL: DAPO + R_div",
    "la-dapo": "RL: LA-DAPO (both)",
    "constants": "RL: LA-DAPO, latents as constants",
    "noise": "RL: LA-DAPO, noisy latents",
    "text-rl": "RL from text-only SFT",
    "able": "before",
    "selected": "SFT on the selected rows",
    "random": "SFT on as many random rows",
}


ABLATIONS = ("zero", "noise", "shuffled", "true")


GROUPS = ("1-hop", "2-hop", "3-hop", "interp")


def trained(script, out, rows=None, **settings):
    """The checkpoint of a training, run unless it is complete.

    script: sft, la_dapo or a variant.
    """
    done = checkpoints(out)
    if done and done[-1].endswith(f"step_{settings['steps']:06d}"):
        return done[-1]
    print(f"\n== training {out}")
    return script.train(script.Config(**{**settings, "out": out, "resume": bool(done)}), rows)


def scored(model, data, out, config, latents="generated"):
    print(f"\n== evaluating {out}")
    shared = {f.name for f in dataclasses.fields(DataConfig)} & set(TINY)
    return evaluate.evaluate(
        evaluate.Config(
            model=model,
            data=data,
            out=out,
            latents=latents,
            batch=250,
            max_new_tokens=48,
            max_latents=2,
            workers=config.workers,
            **{k: TINY[k] for k in shared},
        )
    )


def run_seed(seed, config, world):
    """All trainings and evaluations of one seed -> {row of the table: {group: accuracy}},
    {ablation: ...}.
    """
    home = os.path.join(config.out, f"seed_{seed}")
    start = os.path.join(home, "random")
    if not os.path.exists(start):
        with open(world["captions"]) as f, open(world["train"]) as g:
            records = [json.loads(line) for line in [*f, *g]]
        texts = ["system user assistant", TINY["system"]]
        for r in records:
            texts += [
                r["answer"],
                *(t["value"].replace("<image>", " ") for t in r["conversations"]),
            ]
        tokenizer = make_tokenizer(texts)
        make_model(tokenizer, seed).save_pretrained(start + ".part")
        tokenizer.save_pretrained(start + ".part")
        os.rename(start + ".part", start)
    common = dict(seed=seed, workers=config.workers)
    base = trained(
        sft,
        os.path.join(home, "base"),
        **{
            **TINY,
            **common,
            **dict(
                model=start,
                data=world["captions"],
                steps=config.pretrain_steps,
                freeze_vision=False,
                spans=False,
                latent_head="",
                lr=1e-3,
            ),
        },
    )
    models, scores, ablations = (
        {},
        {"base": scored(base, world["test"], os.path.join(home, "eval_base"), config)},
        {},
    )
    for name in config.sft_names:
        variant = dict(VARIANTS[name])
        steps = (
            round(config.sft_steps * LONGER) if variant.pop("longer", False) else config.sft_steps
        )
        data = world["all" if variant.pop("all", False) else "train"]
        models[name] = trained(
            SCRIPTS.get(name, sft),
            os.path.join(home, name),
            **{**TINY, **common, **variant, **dict(model=base, data=data, steps=steps)},
        )
    for name in config.rl_names:
        start, variant = RL_VARIANTS[name]
        models[name] = trained(
            la_dapo,
            os.path.join(home, name),
            **{
                **TINY_RL,
                **common,
                **variant,
                **dict(model=models[start], data=world["prompts"], steps=config.rl_steps),
            },
        )
    for name, model in models.items():
        scores[name] = scored(
            model,
            world["test"],
            os.path.join(home, f"eval_{name}"),
            config,
            "pause" if name == "pause" else "generated",
        )
    for kind in ABLATIONS if "latent" in models else ():
        ablations[kind] = scored(
            models["latent"], world["test"], os.path.join(home, f"eval_latent_{kind}"), config, kind
        )
    if ablations:
        ablations = {"generated": scores["latent"], **ablations}
    return scores, ablations


def spread(values):
    """Mean and, for two seeds or more, the standard deviation over seeds."""
    return f"{np.mean(values):.3f}" + (
        f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    )


def markdown(results, names, groups=GROUPS):
    """[{row: {group: scores}} a seed] -> a table as text; avg is the micro average."""
    lines = ["| | " + " | ".join([*groups, "avg"]) + " |", "|---" * (len(groups) + 2) + "|"]
    for name in results[0]:
        cells = [spread([r[name][g]["accuracy"] for r in results]) for g in (*groups, "all")]
        lines.append(f"| {names.get(name, name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spearman(a, b):
    """Rank correlation of two series; ties share their mean rank. Source: Spearman 1904."""

    def ranks(values):
        _, at, count = np.unique(values, return_inverse=True, return_counts=True)
        return (count.cumsum() - (count - 1) / 2)[at]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def run_curation(seed, config, world):
    """Curation with one seed -> {training: {group: scores}}, {figure: value}. sec. 3.2.

    The pool is ours.

    The captions model first learns, on clips of its own, to answer such questions with and without
    the later frames in sight. That stands in for Qwen3-VL, which can read a frame it is given but
    hardly foresee it. The result is the model that is probed, and that then learns from the chosen
    rows, or from as many random ones.
    """
    home, folder = os.path.join(config.out, f"seed_{seed}"), os.path.dirname(world["train"])
    clips = dict(
        pool=range(min(400, config.clips // 2)), able=range(config.clips // 2, config.clips)
    )
    files = {name: os.path.join(folder, f"curation_{name}.jsonl") for name in (*clips, "test")}
    for name, seeds in clips.items():
        write_rows(
            files[name],
            [row for s in seeds for row in candidates(s, config.bend, f"clips/{s}.mp4")],
        )
    with open(world["test"]) as f:
        write_rows(files["test"], [row for row in map(json.loads, f) if row["group"] != "interp"])
    able = [
        r
        for row in read_rows(files["able"])
        for r in (curate.with_future(row), dataclasses.replace(row, response=[]))
    ]
    common = dict(TINY, seed=seed, workers=config.workers)
    base = trained(
        sft,
        os.path.join(home, "able"),
        able,
        **{
            **common,
            **dict(
                model=newest(os.path.join(home, "base")),
                spans=False,
                lr=1e-3,
                steps=max(1, config.pretrain_steps // 15),
            ),
        },
    )
    pool, figures, gains = read_rows(files["pool"]), {}, []
    c = curate.Config(
        model=base,
        data=files["pool"],
        out=os.path.join(home, "curation"),
        seed=seed,
        batch=50,
        max_latents=2,
        max_new_tokens=12,
        k=len(pool) // 6,
        workers=config.workers,
        **{f.name: TINY[f.name] for f in dataclasses.fields(DataConfig) if f.name in TINY},
    )
    for c.score in ("logprob", "counts"):
        lines = curate.probe(c).values()
        t, v = ("p_t", "p_v") if c.score == "counts" else ("logp_t", "logp_v")
        gains.append([line[v] - line[t] for line in lines])
        chosen = {record["id"] for record in curate.cut(c)}
        figures[f"share of hops, chosen by {c.score}"] = np.mean(
            [row.group in GROUPS for row in pool if row.id in chosen]
        )
        spent = read_lines(os.path.join(c.out, f"{c.name}.seconds_0.jsonl"))
        figures[f"seconds, {c.score}"] = sum(line["seconds"] for line in spent)
    figures["rank correlation of the two scores"] = spearman(*gains)
    some = np.random.default_rng(seed).permutation(len(pool))[: len(chosen)]
    sets = dict(selected=[row for row in pool if row.id in chosen], random=[pool[i] for i in some])
    figures["rows in each set"] = len(chosen)
    scores = {"able": scored(base, files["test"], os.path.join(home, "eval_able"), config)}
    for name, rows in sets.items() if chosen else ():
        figures[f"share of hops, {name}"] = np.mean([row.group in GROUPS for row in rows])
        model = trained(
            sft,
            os.path.join(home, name),
            rows,
            **common,
            model=base,
            steps=max(1, config.sft_steps // 3),
        )
        scores[name] = scored(model, files["test"], os.path.join(home, f"eval_{name}"), config)
    return scores, figures


def main(config):
    torch.set_num_threads(
        1
    )  # so small a model gains little from a second one, and loses much on a busy machine
    if (
        set(config.sft_names) - set(VARIANTS)
        or set(config.rl_names) - set(RL_VARIANTS)
        or config.seeds < 1
    ):
        raise SystemExit(
            f"--variants takes some of {', '.join(VARIANTS)}, --rl of {', '.join(RL_VARIANTS)}, "
            "and --seeds "
            "at least 1"
        )
    path = os.path.join(config.out, "toy.json")
    if config.fresh and os.path.isdir(config.out):
        if os.listdir(config.out) and not os.path.exists(path):
            raise SystemExit(
                f"{config.out} was not made by this script (it has no toy.json): not deleting it"
            )
        shutil.rmtree(config.out)
    os.makedirs(config.out, exist_ok=True)
    free = {"seeds", "fresh", "workers", "variants", "rl", "curation"}
    settings = dict(
        {k: v for k, v in dataclasses.asdict(config).items() if k not in free},
        tiny=TINY,
        tiny_rl=TINY_RL,
        trainings=VARIANTS,
        rl_trainings={name: list(v) for name, v in RL_VARIANTS.items()},
        longer=LONGER,
    )
    if os.path.exists(path):
        with open(path) as f:
            if json.load(f) != settings:
                raise SystemExit(
                    f"{config.out} was made with other settings (toy.json): pass --fresh to start "
                    "over, "
                    "or another --out"
                )
    with open(path, "w") as f:
        json.dump(settings, f, indent=1)

    began = time.time()
    world = make_world(config)
    titles = {3: "3 seen", 4: "4 seen", 5: "5 future", 6: "6 future", 7: "7 future"}
    draw_key_frames(
        os.path.join(config.out, "data", "clips", "0.mp4"),
        titles,
        os.path.join(config.out, "clip.png"),
    )
    results, ablations = zip(*(run_seed(seed, config, world) for seed in range(config.seeds)))
    text = (
        f"Accuracy on {config.eval_clips} held-out clips a group, {config.seeds} seed(s)\n\n"
        + markdown(results, NAMES)
    )
    if ablations[0]:
        text += "\n\nLatent SFT, with its spans fed other vectors\n\n" + markdown(ablations, {})
    curated, figures = [], []
    if config.curation:
        curated, figures = zip(*(run_curation(seed, config, world) for seed in range(config.seeds)))
        text += (
            "\n\nCuration: a pool of which a third asks for the future\n\n"
            + markdown(curated, NAMES, GROUPS[:3])
            + "\n"
        )
        text += "".join(f"\n- {name}: {spread([f[name] for f in figures])}" for name in figures[0])
    with open(os.path.join(config.out, "table.md"), "w") as f:
        f.write(text + "\n")
    found = dict(
        settings=settings, results=results, ablations=ablations, curation=curated, figures=figures
    )
    with open(os.path.join(config.out, "table.json"), "w") as f:
        json.dump(found, f, indent=1)
    draw_bars(results, NAMES, GROUPS, os.path.join(config.out, "accuracy.png"))
    if config.rl_names:
        draw_rl(
            {
                NAMES[name]: [
                    os.path.join(config.out, f"seed_{seed}", name, "log.jsonl")
                    for seed in range(config.seeds)
                ]
                for name in config.rl_names
            },
            os.path.join(config.out, "rl.png"),
        )
    print(
        f"\n{text}\n\n{time.time() - began:.0f} s; in {config.out}: table.md, accuracy.png, "
        "rl.png, clip.png, and each "
        "training's loss.png or rewards.png"
    )


if __name__ == "__main__":
    main(parse_config(Config))
