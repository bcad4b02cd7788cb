"""The tables of "Latents without annotated futures" in docs/variants.md.

    python -m toy                                 # clips, the captions model, latent SFT
    python -m toy.video_latent                    # trains and scores each row, then the tables
    python -m toy.video_latent --rows pause,B --seeds 3

All rows but the last start from the demo's captions model, learn from the answers of all its clips,
see the same questions in the same order, and take as many steps. The last is the demo's latent SFT
on the chains of a few clips. Each held-out question is answered three times: with the model's own
latents, with zeros, with those of another clip's row about the same kind of question. If the last
two cost nothing, the latents are not read. What is on disk is not made again. Source: ours.
"""

import dataclasses
import json
import os

import numpy as np
import torch

import sft
from common.cli import run_script
from common.formats import read_rows
from common.runs import Machine, newest, read_log, write, write_json
from data import DataConfig, collate, encode, model_inputs
from evaluate import feed_of, read_answer
from latent_decode import generate
from toy.__main__ import markdown, spread
from toy.plan import GROUPS, Training
from toy.seed import train
from toy.tiny import TINY, TINY_DATA, TINY_EVAL
from variants import video_latent

FED = ("own", "zeros", "another's")
PROBED = ("answer", "answer_zero", "answer_swapped")  # the log's names of the same


@dataclasses.dataclass
class Config:
    demo: str = "runs/toy"  # the demo's folder
    out: str = "runs/video_latent"  # everything lands here
    rows: str = "all"  # which rows, by name with commas; "all" = every one
    seeds: int = 1  # trainings of each row, all from the demo's captions model
    steps: int = 400  # x 64 questions
    n_latents: int = 3  # of a span
    eval_clips: int = 1000  # held-out clips, four questions each


def trainings(config):
    """{name: Training}, all from the captions model. TINY's other values are the demo's."""
    plain = dict(TINY, steps=config.steps, latent_head="", latent_loss="mse", stop_term=False)
    own = dict(plain, n_latents=config.n_latents, alpha=0.0, beta=0.0)

    def latent(title, **changes):
        return Training(title, video_latent, "base", "prompts", dict(own, **changes))

    none = Training("answers alone", sft, "base", "prompts", dict(plain, spans=False))
    return {
        "none": none,
        "pause": latent("pause tokens", pause=True),
        "own": latent("latents, no loss on them"),
        "linear": latent("the same, a linear head", latent_head="linear"),
        "A": latent("+ alignment A: sees the answer", align="A", alpha=0.1),
        "B": latent("+ alignment B: evidence", align="B", alpha=0.1),
        "C": latent("+ alignment C: own context", align="C", alpha=0.1),
        "div": latent("+ diversity", beta=0.01),
        "B+div": latent("+ B + diversity", align="B", alpha=0.1, beta=0.01),
        "C+div": latent("+ C + diversity", align="C", alpha=0.1, beta=0.01),
    }


def pick_rows(config):
    """The rows asked for. Raises SystemExit for other names."""
    rows = trainings(config)
    names = list(rows) if config.rows == "all" else config.rows.split(",")
    if set(names) - set(rows) or config.seeds < 1:
        raise SystemExit(
            f"--rows takes some of {', '.join(rows)}, or all; --seeds at least 1 "
            f"(found {config.rows!r} and {config.seeds})"
        )
    return {name: training for name, training in rows.items() if name in names}


# ------------------------------------------------------------------------------------------ answers


def pause(model, state):
    """A feed: the embedding of `<|latent|>`."""
    word = model.get_input_embeddings().weight[model.config.latent_id]
    return word.expand_as(state.h)


def answer(model, tokenizer, rows, config, feed):
    """Rows about different clips, answered with each of FED -> {fed: which are right [bool]}.

    feed: what the model's own spans hold, None = own latents. config: what is decoded with.
    """
    samples = [encode(row, tokenizer, DataConfig(**TINY_DATA), train=False) for row in rows]
    batch = model_inputs(collate(samples, tokenizer.pad_token_id, side="left"))
    feeds, right = {"own": feed}, {}
    for name in FED:
        more = dict(feed=feeds[name]) if feeds[name] else {}
        rollout = generate(model, batch, **config, **more)
        if name == "own":
            nothing = torch.zeros(1, model.lm_head.in_features)
            fed = [z if len(z) else nothing for z in rollout.latents]
            feeds["another's"] = feed_of([[z] for z in fed[1:] + fed[:1]])
            feeds["zeros"] = feed_of([[nothing]] * len(rows))
        texts = [tokenizer.decode(t[:n]) for t, n in zip(rollout.tokens, rollout.lengths)]
        right[name] = [read_answer(row, text)["right"] for row, text in zip(rows, texts)]
    return right


def score(folder, path, config, max_latents, feed=None):
    """Answer the held-out questions once -> {group: {fed: which are right}}, kept in `path`."""
    if os.path.exists(path):
        with open(path) as f:
            return json.load(f)
    print(f"== answering with {folder}")
    model, tokenizer = Machine().load(folder)
    rows, right = read_rows(os.path.join(config.demo, "data", "test.jsonl")), {}
    settings = dict(max_new_tokens=TINY_EVAL["max_new_tokens"], max_latents=max_latents)
    for group in GROUPS:
        some = [row for row in rows if row.group == group][: config.eval_clips]
        right[group] = {name: [] for name in FED}
        for i in range(0, len(some), TINY_EVAL["batch"]):
            part = some[i : i + TINY_EVAL["batch"]]
            for name, values in answer(model, tokenizer, part, settings, feed).items():
                right[group][name] += values
    write_json(path, right)
    return right


# ------------------------------------------------------------------------------------------- tables


def accuracy(right, fed="own"):
    """What `score` gives -> {group: {accuracy}}, "all" among them."""
    values = {group: right[group][fed] for group in GROUPS}
    values["all"] = sum(values.values(), [])
    return {group: dict(accuracy=float(np.mean(v))) for group, v in values.items()}


def difference(right, other, group):
    """Accuracy of one minus that of another on the same questions -> it and its standard error."""
    gap = np.array(right[group]["own"], float) - np.array(other[group]["own"], float)
    return gap.mean(), gap.std(ddof=1) / len(gap) ** 0.5


def last_figures(log):
    """A run's log -> the last of each figure that it has."""
    figures = {}
    for line in read_log(log):
        figures.update({k: line[k] for k in ("cosine", *PROBED) if k in line})
    return figures


def ablations(results, logs, titles):
    """Are the latents read? Accuracy and the answer's loss with each of FED; their cosine."""
    head = [f"{what}, {fed}" for what in ("accuracy", "loss") for fed in FED]
    lines = ["| | " + " | ".join([*head, "cosine"]) + " |", "|---" * (len(head) + 2) + "|"]
    for name in results[0]:
        cells = []
        for fed in FED:
            every = [accuracy(scores[name], fed)["all"]["accuracy"] for scores in results]
            cells.append(spread(every))
        for figure in (*PROBED, "cosine"):
            values = [figures[name].get(figure) for figures in logs]
            cells.append("" if None in values else spread(values))
        lines.append(f"| {titles[name]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tabulate(results, logs, titles, config):
    """[{row: `score`'s} a seed], [{row: figures} a seed] -> all tables as text."""
    text = f"Accuracy on {config.eval_clips} held-out clips a group, {len(results)} seed(s)\n\n"
    own = [{name: accuracy(right) for name, right in scores.items()} for scores in results]
    text += markdown(own, titles)
    spans = {name: title for name, title in titles.items() if name not in ("none", "pause")}
    only = [{name: scores[name] for name in spans if name in scores} for scores in results]
    text += "\n\nOther latents in the place of the model's own\n\n" + ablations(only, logs, titles)
    if "pause" in results[0]:
        text += "\n\n3-hop minus that of pause tokens, a seed each (standard error)\n"
        for name in results[0]:
            pairs = [difference(scores[name], scores["pause"], "3-hop") for scores in results]
            text += f"\n- {titles[name]}: " + ", ".join(f"{d:+.3f} ({e:.3f})" for d, e in pairs)
    return text


def main(config):
    """Train and score the rows asked for, then the tables."""
    torch.set_num_threads(1)
    plan, results, logs = pick_rows(config), [], []
    demo = os.path.join(config.demo, "seed_0")
    common = dict(model=newest(os.path.join(demo, "base")), workers=0)
    common.update(data=os.path.join(config.demo, "data", "prompts.jsonl"))
    for seed in range(config.seeds):
        home, scores, figures = os.path.join(config.out, f"seed_{seed}"), {}, {}
        for name, row in plan.items():
            out = os.path.join(home, name)
            folder = train(row.script, out, **row.settings, **common, seed=seed)
            feed = pause if name == "pause" else None
            path = os.path.join(home, f"{name}.json")
            scores[name] = score(folder, path, config, config.n_latents, feed)
            figures[name] = last_figures(os.path.join(out, "log.jsonl"))
        path = os.path.join(home, "latent.json")
        longest = TINY_EVAL["max_latents"]
        scores["latent"] = score(newest(os.path.join(demo, "latent")), path, config, longest)
        results.append(scores)
        logs.append(dict(figures, latent={}))
    titles = {name: row.title for name, row in plan.items()}
    titles["latent"] = "latent SFT, 200 annotated clips"
    text = tabulate(results, logs, titles, config)
    write(os.path.join(config.out, "table.md"), text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main, Config)
