"""A loop of looks in the embedded world: the table of docs/variants.md.

    python -m toy                                        # makes the world and the base model
    python -m toy.mcr --world runs/toy --out runs/mcr    # reads them; --seeds 0,1,2

The demo's questions, but at first one frame is seen, key frame 4; the others can be looked at. The
next wall is asked for, or the second, or the third: the picture of key frame 5, 6 or 7 shows it,
and whoever does not look has to imagine. The scripted agent looks once, at that frame, and reads
the wall off its pixels: so far one look can lead.

Beside the loop: uniform looks, n of the frames 5..7 put into the prompt whatever is asked. One
model learns all n, by text-only SFT on the records' own chains, in as many steps as the loop. (With
spans it learns to imagine what it is shown: the pictures then change nothing.) It has no reward to
learn from.

Source: ours.
"""

import dataclasses
import json
import os

import numpy as np
import torch
from tokenizers import AddedToken

from common.cli import run_script
from common.clips import pixels_of
from common.formats import read_rows
from common.report import draw_looks
from common.runs import newest, write, write_json
from model import load
from rewards import accuracy_reward
from toy import seed as stages
from toy.__main__ import spread
from toy.tiny import TINY, TINY_RL
from toy.world import WALLS, questions, turns, write_rows
from variants import mcr, mcr_sft

HOPS = ("1-hop", "2-hop", "3-hop")
UNIFORM = {0: [], 1: [6], 2: [5, 7], 3: [5, 6, 7]}  # n looks, spread over the frames to come
DIGITS = tuple("12345678")
LOOP = dict(max_new_tokens=64, max_latents=2, max_turns=8, max_looks=4)


@dataclasses.dataclass
class Config:
    world: str = "runs/toy"  # the demo's folder: its clips, and the base model of seed 0
    out: str = "runs/mcr"  # everything lands here
    seeds: str = "0"  # of the trainings, all from that base; with commas
    annotated: int = 200  # clips whose chains are learnt from
    sft_steps: int = 500  # x 64 loops
    rl_steps: int = 40  # x 32 prompts, 8 rollouts each
    costs: str = "0,0.05,0.2"  # of a look, with commas: a training each
    eval_clips: int = 1000  # held-out clips, three questions each


# -------------------------------------------------------------------------------------------- rows


def records(seed, bend, shown=()):
    """The three questions of a clip with frame 4 in sight, and the frames `shown`."""
    rows = questions(seed, bend, f"clips/{seed}.mp4")[: len(HOPS)]
    for row in rows:
        human, chain = (turn["value"] for turn in row["conversations"])
        question = human.replace("<image> ", "")
        row.update(image=[4, *shown])
        row.update(conversations=turns(1 + len(shown), question, chain))
    return rows


def answers_only(seed, bend):
    """The same without chains: which frame is asked for, and the answer. What RL sees."""
    rows = records(seed, bend)
    for row in rows:
        row["reasoning_image"] = row["reasoning_image"][-1:]
        row["conversations"][1]["value"] = "<image>"
    return rows


def make_rows(config):
    """All rows on disk and read -> {name: [Row]}: loops, uniform, prompts, test, test_n."""
    with open(os.path.join(config.world, "toy.json")) as f:
        world = json.load(f)
    bend, first = world["bend"], world["eval_seed"]
    learnt, test = range(config.annotated), range(first, first + config.eval_clips)
    files = dict(
        loops=[row for seed in learnt for row in records(seed, bend)],
        prompts=[row for seed in range(world["clips"]) for row in answers_only(seed, bend)],
        test=[row for seed in test for row in records(seed, bend)],
        uniform=[],
    )
    for n, shown in UNIFORM.items():
        for row in [row for seed in learnt for row in records(seed, bend, shown)]:
            files["uniform"].append(dict(row, id=f"{row['id']}-{n}"))
        files[f"test_{n}"] = [row for seed in test for row in records(seed, bend, shown)]
    rows, media = {}, os.path.join(config.world, "data")
    for name, some in files.items():
        path = os.path.join(config.out, f"{name}.jsonl")
        write_rows(path, some)
        rows[name] = read_rows(path, media)
    return rows


def add_words(folder, out, seed):
    """A model of the world whose tokenizer also knows the words of the loop, in `out`."""
    if os.path.exists(out):
        return out
    model, tokenizer = load(folder)
    words = [*mcr.WORDS, *DIGITS]
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer))
    model.config.text_config.vocab_size = len(tokenizer)
    model.save_pretrained(out + ".part")
    tokenizer.save_pretrained(out + ".part")
    os.rename(out + ".part", out)
    return out


# ---------------------------------------------------------------------------------------- agents


def nearest_wall(picture):
    """The wall that the ball touches, by its pixels. picture: uint8 (H, W, 3)."""
    dark = picture.astype(int).sum(-1) < 240  # (H, W): the ball is the only dark thing
    i, j = (place.mean() for place in dark.nonzero())
    H, W = dark.shape
    return WALLS[int(np.argmin([j, H - 1 - i, W - 1 - j, i]))]  # left, bottom, right, top


def scripted(rows):
    """The scripted agent: one look, at the frame that is asked for -> [(row, right, looks)]."""
    results = []
    for row in rows:
        asked = mcr.frames_in(row.response)[-1]
        shown = mcr.environment(f"<reason>look {asked.index}</reason>", row, [], 1)
        picture = pixels_of([shown.frame])[shown.frame]
        results.append((row, nearest_wall(picture) == row.answer, 1))
    return results


def is_right(row, episode, tokenizer):
    """Whether the first answer of an episode is the row's."""
    return accuracy_reward(tokenizer.decode(episode.tokens), row.answer, row.options) > 0


def played(folder, rows, shown=0, **more):
    """A model's greedy loops (more: other settings) -> [(row, right, looks)]."""
    model, tokenizer = load(newest(folder))
    how = {name: more.pop(name) for name in ("temperature", "generator") if name in more}
    settings = {k: v for k, v in TINY_RL.items() if k in ("image_max_tokens", "l_max", "system")}
    config = mcr.Config(**{**settings, **LOOP, **more})
    pairs = mcr.answer(model.eval(), tokenizer, rows, config, **how)
    return [
        (row, is_right(row, episode, tokenizer), len(episode.seen) + shown)
        for row, episode in pairs
    ]


def row_of(name, results):
    """[(row, right, looks)] of all hops -> a line of the table, as a dict."""
    line = dict(name=name, looks=np.mean([looks for _, _, looks in results]))
    for hop in HOPS:
        some = [(right, looks) for row, right, looks in results if row.group == hop]
        line[hop], line[f"looks {hop}"] = np.mean(some, 0)
    return dict(line, all=np.mean([right for _, right, _ in results]))


# ---------------------------------------------------------------------------------------- the table


def markdown(seeds):
    """Lines of `row_of`, a list a seed -> a table as text: accuracy, and looks in brackets."""
    head = ["", "looks", *HOPS, "avg"]
    text = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in [line["name"] for line in seeds[0]]:
        some = [line for lines in seeds for line in lines if line["name"] == name]
        values = {key: [line[key] for line in some] for key in some[0] if key != "name"}
        cells = [name, f"{np.mean(values['looks']):.2f}"]
        for hop in HOPS:
            cells.append(f"{spread(values[hop])} ({np.mean(values[f'looks {hop}']):.2f})")
        text.append("| " + " | ".join([*cells, spread(values["all"])]) + " |")
    return "\n".join(text)


def draw(seeds, png):
    """The same lines as a picture: accuracy against looks, a line a seed."""
    series = {name: [] for name in ("uniform looks", "scripted loops", "LA-DAPO", "scripted agent")}
    for lines in seeds:
        for name, curves in series.items():
            some = [line for line in lines if line["name"].startswith(name)]
            curves.append([(line["looks"], line["all"]) for line in some])
    draw_looks(series, png)


def uniform(home, settings, rows):
    """Uniform looks: a text-only SFT, then a line for each n."""
    folder, lines = os.path.join(home, "uniform"), []
    stages.train(stages.sft, folder, rows["uniform"], **settings, spans=False)
    for n in UNIFORM:
        results = played(folder, rows[f"test_{n}"], shown=n, max_turns=1)
        lines.append(row_of(f"uniform looks, {n}", results))
    return lines


def loops(home, settings, rows):
    """Scripted loops -> the folder of their training, the lines of what it has learnt."""
    folder = os.path.join(home, "loops")
    stages.train(mcr_sft, folder, rows["loops"], **settings)
    greedy = played(folder, rows["test"])
    how = dict(temperature=1.0, generator=torch.Generator().manual_seed(settings["seed"]))
    drawn = played(folder, rows["test"], **how)
    blind = [result for result in drawn if not result[2]]
    lines = [row_of("scripted loops, greedy", greedy), row_of("scripted loops, drawn", drawn)]
    if {row.group for row, _, _ in blind} == set(HOPS):
        lines.append(row_of("of these, without a look", blind))
    return folder, lines


def rewarded(home, settings, rows, config):
    """LA-DAPO with each cost -> a line each."""
    settings, lines = dict(TINY_RL, **LOOP, **settings, steps=config.rl_steps), []
    settings.update(share=False, prompts=32, rollout_batch=32, group_size=8, filter=False)
    settings.update(lr=3e-4, warmup_steps=5)
    for cost in filter(None, config.costs.split(",")):
        folder = os.path.join(home, f"cost_{cost}")
        stages.train(mcr, folder, rows["prompts"], **settings, cost=float(cost))
        lines.append(row_of(f"LA-DAPO, cost {cost}", played(folder, rows["test"])))
    return lines


def run_seed(seed, config, rows):
    """One seed's trainings that are not on disk yet -> the lines of its table."""
    home = os.path.join(config.out, f"seed_{seed}")
    os.makedirs(home, exist_ok=True)
    base = newest(os.path.join(config.world, "seed_0", "base"))
    base = add_words(base, os.path.join(home, "base"), seed)
    common = dict(seed=seed, workers=0)
    settings = dict(TINY, **common, model=base, steps=config.sft_steps, save_every=10**6)

    lines = [row_of("scripted agent", scripted(rows["test"]))]
    lines += uniform(home, settings, rows)
    folder, learnt = loops(home, settings, rows)
    return lines + learnt + rewarded(home, dict(common, model=newest(folder)), rows, config)


def main(config):
    """All seeds; the table, and its picture."""
    torch.set_num_threads(1)
    os.makedirs(config.out, exist_ok=True)
    rows = make_rows(config)
    seeds = [run_seed(int(seed), config, rows) for seed in config.seeds.split(",")]

    text = markdown(seeds)
    write(os.path.join(config.out, "table.md"), text + "\n")
    content = dict(settings=dataclasses.asdict(config), seeds=seeds)
    write_json(os.path.join(config.out, "table.json"), content)
    draw(seeds, os.path.join(config.out, "looks.png"))
    print(text)


if __name__ == "__main__":
    run_script(main, Config)
