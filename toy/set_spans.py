"""Spans predicted as a set on the embedded world: the tables of docs/variants.md.

    python -m toy.set_spans                                # one seed, all arms
    python -m toy.set_spans --seeds 0,1,2 --arms ar,frame  # three seeds of two

The world is the demo's, with two changes. A frame is 64 x 64 pixels, four visual tokens, so that
one latent of a frame can leak into the next. All coming frames of a chain are imagined one after
the other before they are put into words, so that a set may hold several frames. Each seed has its
own pretraining, from which all its arms start. What is on disk is not made again. Source: ours.
"""

import dataclasses
import json
import os
import time

import numpy as np
import torch

import latent_decode
import sft
from common.cli import run_script
from common.formats import answer_of, read_rows
from common.runs import newest, write, write_json
from data import Samples, collate, model_inputs
from model import load
from rewards import pick
from toy.plan import GROUPS
from toy.seed import train, write_random_model
from toy.tiny import TINY
from toy.world import make_world, write_rows
from variants import set_spans

FOUR = dict(image_max_tokens=4, l_max=4)  # visual tokens of a frame
# arm: what it is decoded with
ARMS = dict(plain=["plain"], ar=["ar"], frame=["frame"], one=["one"], random=["1", "2", "4"])
LONGEST = 48  # tokens of an answer
BATCH = 250


@dataclasses.dataclass
class Config:
    out: str = "runs/toy_sets"  # everything lands here
    seeds: str = "0"  # pretrainings, each with its arms; with commas
    arms: str = "plain,ar,frame,one,random"  # plain: the paper's method
    clips: int = 1300  # of the pretraining: their frames of four tokens fit in the memory cache
    annotated: int = 1300  # of these, clips whose questions have chains of future frames
    eval_clips: int = 500  # held-out clips, four questions each
    eval_seed: int = 4_000_000  # where held-out clips start
    bend: float = 1.05  # rebound angle at the end of a wall, radians
    pretrain_steps: int = 1500  # x 64 captions
    sft_steps: int = 400  # x 64 rows

    def __post_init__(self):
        if unknown := set(self.arms.split(",")) - set(ARMS):
            raise ValueError(f"arms: {', '.join(sorted(unknown))}, expected {', '.join(ARMS)}")


# ------------------------------------------------------------------------------------ the trainings


def joined(row):
    """A record of the world with its future frames side by side, before they are put into words."""
    human, chain = row["conversations"]
    first, *hits = chain["value"].split("<image>")
    chain = dict(chain, value=first + "<image> " * len(hits) + " ".join(hits))
    return dict(row, conversations=[human, chain])


def prepare(config):
    """The world's clips and rows -> {rows: jsonl file}, with train and test joined."""
    torch.set_num_threads(1)
    world = make_world(config)
    for name in ("train", "test"):
        with open(world[name]) as f:
            rows = [joined(json.loads(line)) for line in f]
        world[name] = os.path.join(config.out, "data", f"{name}_joined.jsonl")
        write_rows(world[name], rows)
    return world


def pretrain(home, seed, config, world):
    """The captions model of a seed -> its folder."""
    start = write_random_model(os.path.join(home, "untrained"), seed, world)
    settings = dict(TINY | FOUR, lr=1e-3, steps=config.pretrain_steps, freeze_vision=False)
    settings.update(spans=False, latent_head="", seed=seed, workers=0)
    return train(sft, os.path.join(home, "base"), model=start, data=world["captions"], **settings)


def tune(home, arm, base, seed, config, world):
    """An arm's SFT -> its folder."""
    settings = dict(TINY | FOUR, steps=config.sft_steps, seed=seed, workers=0, model=base)
    if arm != "plain":
        settings.update(schedule=arm, slots=12, stop_term=False)
    script = sft if arm == "plain" else set_spans
    return train(script, os.path.join(home, arm), data=world["train"], **settings)


# ------------------------------------------------------------------------------- what comes of it


def prompt_of(sample):
    """An encoded row without its response."""
    n = next(t for t, label in enumerate(sample["labels"]) if label != -100)
    return dict(sample, ids=sample["ids"][:n], labels=sample["labels"][:n], futures=[])


def blocks_of(sample, c):
    """The lengths of the spans of each block of an encoded row."""
    return [[len(span) for span in block] for block in set_spans.find_blocks(sample["ids"], c)]


def decode(model, samples, schedule):
    """Greedy answers to encoded rows -> Rollout."""
    batch = model_inputs(collate([prompt_of(sample) for sample in samples], 0, "left"))
    if schedule == "plain":
        return latent_decode.generate(model, batch, max_new_tokens=LONGEST, max_latents=4)
    blocks = [blocks_of(sample, model.config) for sample in samples]
    return set_spans.generate(model, batch, blocks, schedule, max_new_tokens=LONGEST)


@torch.no_grad()
def foretell(model, samples, schedule):
    """Under teacher forcing: what is predicted in the latents' places (N, D), and e* (N, D)."""
    batch = collate(samples, 0)
    e = model.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])  # (N, D)
    inputs, c = model_inputs(batch), model.config
    if schedule == "plain":
        h, _ = model.hidden(**inputs, latents=e)  # (B, L, D)
        return model.to_latent(h[:, :-1][batch["input_ids"][:, 1:] == c.latent_id]), e
    layout = set_spans.lay_out(batch["input_ids"], batch["attention_mask"], c, schedule)
    _, q = set_spans.two_streams(model, layout, e, **inputs)
    return model.to_latent(q), e


def by_token(z, e, variance):
    """Squared errors over the targets' variance, a mean for each of a frame's four tokens."""
    return ((z - e).pow(2).mean(-1) / variance).view(-1, 4).mean(0).tolist()


def price(model, samples, schedule):
    """Of an answer, decoded alone: passes of the language model, milliseconds of the CPU, a median.

    The first pass is the prompt's.
    """
    calls, spent = [], []
    hook = model.model.language_model.register_forward_hook(lambda *_: calls.append(1))
    for sample in samples:
        began = time.process_time()
        decode(model, [sample], schedule)
        spent.append(1000 * (time.process_time() - began))
    hook.remove()
    return dict(passes=len(calls) / len(samples), ms=float(np.median(spent)))


def read_test(world, tokenizer, group=None):
    """The held-out rows, of a group if one is named, encoded; the shortest first."""
    config = set_spans.Config(**FOUR, max_length=256, system=TINY["system"])
    rows = [row for row in read_rows(world["test"]) if group in (None, row.group)]
    samples = Samples(rows, tokenizer, config)
    return sorted((samples[i] for i in range(len(rows))), key=lambda s: len(s["ids"]))


def score(folder, schedule, world):
    """A model's answers -> accuracy by group, errors by token, a dict."""
    model, tokenizer = load(folder)
    model.eval()
    samples = read_test(world, tokenizer)
    right, forced, true = {group: [] for group in GROUPS}, [], []
    free = [torch.zeros(2, 0, model.lm_head.in_features)]
    for start in range(0, len(samples), BATCH):
        some = samples[start : start + BATCH]
        rollout = decode(model, some, schedule)
        z, e = foretell(model, some, schedule)
        forced, true = [*forced, z], [*true, e]
        of_row = e.split([ids.count(model.config.latent_id) for ids in (s["ids"] for s in some)])
        for i, sample in enumerate(some):
            row, tokens = sample["row"], rollout.tokens[i, : rollout.lengths[i]]
            answer = pick(answer_of(tokenizer.decode(tokens)), row.options)
            right[row.group].append(answer == pick(row.answer, row.options))
            # a row that imagined fewer or more than there is to come has no error
            if len(rollout.latents[i]) == len(of_row[i]):
                free.append(torch.stack([rollout.latents[i], of_row[i]]))
    e, free = torch.cat(true), torch.cat(free, 1)
    variance = sft.target_variance(e)
    return dict(
        accuracy={group: float(np.mean(values)) for group, values in right.items()},
        forced=by_token(torch.cat(forced), e, variance),
        free=by_token(*free, variance),
        compared=free.shape[1] / len(e),
    )


def cell(values, digits=3):
    """A value a seed -> mean and, for two seeds or more, deviation, as text."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def tables(results, costs):
    """{(arm, schedule): [scores a seed]}, {the same: price} -> accuracies and errors, as text."""
    heads = ["arm", "decoded", "seeds", *GROUPS, "avg", "passes", "ms"], ["arm", "decoded"]
    heads[1].extend(f"{kind}, {k}" for kind in ("forced", "free") for k in range(1, 5))
    texts = [["| " + " | ".join(head) + " |", "|---" * len(head) + "|"] for head in heads]
    for (arm, schedule), seeds in results.items():
        groups = [[s["accuracy"][group] for s in seeds] for group in GROUPS]
        row = [arm, schedule, str(len(seeds)), *map(cell, [*groups, np.mean(groups, 0)])]
        row += [f"{costs[arm, schedule][name]:.0f}" for name in ("passes", "ms")]
        texts[0].append("| " + " | ".join(row) + " |")
        errors = [[s[kind][k] for s in seeds] for kind in ("forced", "free") for k in range(4)]
        row = [arm, schedule, *(cell(values, 2) for values in errors)]
        texts[1].append("| " + " | ".join(row) + " |")
    return "\n\n".join("\n".join(lines) for lines in texts)


def price_all(home, pairs, world):
    """What a 3-hop answer of each (arm, schedule) costs, measured in one go -> {pair: price}."""
    latent_decode.CHUNK = 1  # plain looks at each step whether it is done, as sets do
    costs = {}
    for arm, schedule in pairs:
        model, tokenizer = load(newest(os.path.join(home, arm)))
        samples = read_test(world, tokenizer, "3-hop")[:20]
        costs[arm, schedule] = price(model.eval(), samples, schedule)
    return costs


def main(config):
    """All trainings and their scores; costs are the last seed's."""
    world, results = prepare(config), {}
    for seed in map(int, config.seeds.split(",")):
        home = os.path.join(config.out, f"seed_{seed}")
        base = newest(pretrain(home, seed, config, world))
        for arm in config.arms.split(","):
            folder = tune(home, arm, base, seed, config, world)
            for schedule in ARMS[arm]:
                path = os.path.join(home, f"{arm}_{schedule}.json")
                if not os.path.exists(path):
                    write_json(path, score(folder, schedule, world))
                with open(path) as f:
                    results.setdefault((arm, schedule), []).append(json.load(f))
                print(arm, schedule, results[arm, schedule][-1])
    text = tables(results, price_all(home, results, world))
    write(os.path.join(config.out, "table.md"), text + "\n")
    print(f"\n{text}")


if __name__ == "__main__":
    run_script(main, Config)
