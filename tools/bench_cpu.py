"""What each prompt once saves, on a CPU: all ratios from one run, some minutes.

    python -m tools.bench --cpu
    python -m tools.bench --cpu --out bench.json --picture docs/growth.png

Each piece of work is done in our way and in the usual one (tools/ways.py), in turn. Seconds are
CPU seconds of this process on one thread: medians of the rounds, and beside them how far the rounds
lie apart. Memory is the peak of live tensors beyond weights and gradients. Weights are random.
Nothing here says how good a model is, or how fast a GPU. Source: ours.
"""

import contextlib
import dataclasses
import math
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F

from common.report import as_text, axes
from common.run import write_json
from common.shared_prefix import DecodingCache
from latent_decode import CHUNK
from tools import ways
from tools.live import peak_of
from tools.measure import alternate, ratio
from tools.shapes import make, prompt, random_group, widths

SURE = 1000  # words that hold 99 % of a sure policy's probability


@dataclasses.dataclass
class Config:
    shape: str = "50m"  # update and SFT, see tools/shapes.py
    decoder: str = "110m"  # decoding: the same layers, the released vocabulary
    rounds: int = 2  # each way once a round
    n: int = 8  # rollouts of a prompt
    images: int = 3  # of a prompt, 256 tokens each; decoding: frames of a video
    words: int = 230  # of a prompt
    new_tokens: int = 128  # of the longest rollout; in the update the shortest has a quarter
    sft_tokens: int = 400  # of a row, on average; a third of them are learnt
    contexts: str = "500,1000,2000,4000,8000"  # growth: tokens of a prompt
    groups: str = "1,2,4,8,16"  # growth: rollouts of a prompt
    out: str = ""  # also write all figures as JSON
    picture: str = ""  # also draw the growth into this file


@contextlib.contextmanager
def one_thread():
    """Inside, torch computes on one thread: CPU seconds are then those of the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------- update of a group


def make_trainable(shape):
    """A random model, its tower frozen, each weight with a gradient: both are no one's peak."""
    model = make(shape).train()
    model.model.visual.requires_grad_(False)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    return model


def compare_updates(config):
    """Forward and backward of one group -> {way: {seconds, bytes}}."""
    model, batch = make_trainable(config.shape), prompt(config, 1, "cpu")
    hidden = model.config.text_config.hidden_size
    rollout = random_group(config, hidden, "cpu", shortest=0.25)
    advantages = torch.randn(config.n, 1)

    def way(work, checkpointing):
        def run():
            ways.checkpoint_activations(model, checkpointing)
            work(model, batch, rollout, advantages)

        return run

    return measured(config, {
        "ours": way(ways.update, False),
        "ours, checkpointing": way(ways.update, True),
        "prompt copied": way(ways.naive_update, False),
        "prompt copied, checkpointing": way(ways.naive_update, True),
    })  # fmt: skip


def measured(config, works):
    """{way: work} -> {way: {seconds: [a round], bytes: peak}}."""
    peaks = {name: peak_of(work) for name, work in works.items()}  # also the warm-up
    times = alternate(works, config.rounds)
    return {name: dict(seconds=times[name], bytes=peaks[name]) for name in works}


# ---------------------------------------------------------------------------------------------- SFT


def rows_of(config, lengths):
    """Random rows of words and one image -> a batch padded on the right; a third has labels."""
    rows, one = [], dataclasses.replace(config, images=1, words=0)
    for length in lengths:
        row = prompt(one, 1, "cpu", length=length)
        row["labels"] = row["input_ids"].clone()
        row["labels"][:, : -(length // 3)] = -100
        rows.append(row)
    batch = {}
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        parts = [
            F.pad(row[name], (0, max(lengths) - row[name].shape[1]), value=fill) for row in rows
        ]
        batch[name] = torch.cat(parts)  # (B, T)
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([row[name] for row in rows])
    return batch


def compare_sft(config):
    """Forward and backward of four rows -> {lengths of the rows: {way: {seconds, bytes}}}."""
    model, mean = make_trainable(config.shape), config.sft_tokens
    uneven = [mean // 2, mean * 3 // 4, mean, mean * 7 // 4]
    figures = {}
    for name, lengths in (("equal rows", [mean] * 4), ("uneven rows", uneven)):
        batch = rows_of(config, lengths)
        figures[name] = measured(config, {
            "ours": lambda batch=batch: ways.sft(model, batch),
            "padded": lambda batch=batch: ways.naive_sft(model, batch),
        })  # fmt: skip
        figures[name]["lengths"] = lengths
    return figures


# ----------------------------------------------------------------------------------------- decoding


@torch.no_grad()
def make_sure(model, batch):
    """Scale the states that reach the head until 99 % of the next word's probability lie on at
    most SURE words, as in a trained policy -> how many words that are.
    """
    h, _ = model.hidden(**batch)
    logits, scale = model.logits(h[0, -1]) / ways.TEMPERATURE, 1.0
    while True:
        p = (scale * logits).softmax(-1).sort(descending=True).values
        words = int((p.cumsum(-1) < 0.99).sum()) + 1
        if words <= SURE:
            model.model.language_model.norm.weight.mul_(scale)
            return words
        scale *= 1.1


def cache_bytes(model, batch, config):
    """Bytes of the tensors in our cache after `new_tokens` steps, grown as `generate` grows it."""
    with torch.no_grad():
        _, cached = model.hidden(**batch, use_cache=True)
    cache = DecodingCache(cached, batch["attention_mask"].sum(1).tolist(), config.n)
    for _ in range(0, config.new_tokens, CHUNK):
        cache.reserve(CHUNK)
        cache.used += CHUNK
    return sum(x.nbytes for pair in [*cache.prompt, *cache.own] for x in pair)


def cache_formula(config, prompt_tokens, copied):
    """Bytes of keys and values in fp32: 8 L K (P + n T); with copies of the prompt 8 L K n (P + T).

    Our room for new tokens doubles: T is a CHUNK times a power of two. Theirs grows token by token,
    and the last is not fed.
    """
    w, new = widths(config.decoder), config.new_tokens
    if copied:
        return 8 * w.L * w.K * config.n * (prompt_tokens + new - 1)
    room = CHUNK * 2 ** math.ceil(math.log2(max(1, new / CHUNK)))
    return 8 * w.L * w.K * (prompt_tokens + config.n * room)


def compare_decoding(config, model):
    """A group's rollouts from a video prompt, and its keys and values."""
    video = prompt(dataclasses.replace(config, shape=config.decoder), 1, "cpu", video=True)
    words, P = make_sure(model, video), video["input_ids"].shape[1]
    last = {}

    def theirs():
        last["cache"] = None  # the one before is not in memory beside the new one
        last["cache"] = ways.naive_decode(model, video, config.new_tokens, config.n).past_key_values

    works = {
        "ours": lambda: ways.decode(model, video, config.new_tokens, config.n),
        "transformers": theirs,
    }
    works["ours"]()  # warm-up
    times = alternate(works, config.rounds)
    copied = sum(x.nbytes for layer in last["cache"].layers for x in (layer.keys, layer.values))
    return {
        "words of 99 %": words,
        "prompt tokens": P,
        "ours": dict(
            seconds=times["ours"],
            cache=cache_bytes(model, video, config),
            formula=cache_formula(config, P, copied=False),
        ),
        "transformers": dict(
            seconds=times["transformers"],
            cache=copied,
            formula=cache_formula(config, P, copied=True),
        ),
    }


# ------------------------------------------------------------------------------------------- growth


def token_seconds(model, config, context, n):
    """Median CPU seconds of a decoded token: a step's over the n rows it gives a token."""
    text = dataclasses.replace(config, shape=config.decoder, images=0, words=context)
    marks = []
    seen = dict(stream=lambda chunk: marks.append(time.process_time()))
    ways.decode(model, prompt(text, 1, "cpu"), 5 * CHUNK, n, **seen)
    steps = [(b - a) / CHUNK for a, b in zip(marks, marks[1:])]  # the prompt's time is before
    return statistics.median(steps) / n


def measure_growth(config, decoder):
    """Seconds of a decoded token against context and against rollouts, of an update against
    rollouts -> {name: [[x, seconds]]}.
    """
    contexts, groups = (
        [int(x) for x in text.split(",")] for text in (config.contexts, config.groups)
    )
    typical = config.images * 258 + config.words
    by_context = [[x, token_seconds(decoder, config, x, config.n)] for x in contexts]
    by_group = [[n, token_seconds(decoder, config, typical, n)] for n in groups]

    model, batch, works = make_trainable(config.shape), prompt(config, 1, "cpu"), {}
    for n in groups:
        sized = dataclasses.replace(config, n=n)
        rollout = random_group(sized, model.config.text_config.hidden_size, "cpu", shortest=0.25)
        args = model, batch, rollout, torch.ones(n, 1)
        works[n] = lambda args=args: ways.update(*args)
    times = alternate(works, config.rounds)
    updates = [[n, statistics.median(times[n])] for n in groups]
    return {
        "a decoded token, context": by_context,
        "a decoded token, rollouts": by_group,
        "an update, rollouts": updates,
    }


# ------------------------------------------------------------------------------------------- tables


def compared(figures, base, size="bytes"):
    """{way: {seconds, bytes}} -> rows of text: each against `base`, and MiB."""
    rows = []
    for name, figure in figures.items():
        median = statistics.median(figure["seconds"])
        against = ratio(figure["seconds"], figures[base]["seconds"])
        share = figure[size] / figures[base][size]
        mib = f"{figure[size] / 2**20:.0f}"
        rows.append([name, f"{median:.2f}", str(against), mib, f"{share:.2f}"])
    return rows


def print_tables(figures, config):
    """All figures, with what they are figures of."""
    head = ["", "seconds", "ratio (range)", "MiB", "ratio"]
    print(f"\nUpdate of {config.n} rollouts; peak of live tensors beyond weights and gradients")
    print(as_text(head, compared(figures["update"], "prompt copied")))
    for name, rows in figures["sft"].items():
        print(f"\nSFT, forward and backward, {name} of {rows['lengths']} tokens; memory as above")
        print(as_text(head, compared({way: rows[way] for way in ("ours", "padded")}, "padded")))
    print_decoding(figures["decoding"], config, head)
    for name, points in figures["growth"].items():
        what, against = name.split(", ")
        print(f"\nCPU ms, {what}, against {against}")
        values = [f"{1e3 * y:.1f}" for _, y in points]
        print(as_text(["", *(x for x, _ in points)], [["ms", *values]]))


def print_decoding(figures, config, head):
    """The group's rollouts: seconds, tokens a second, keys and values."""
    both = {name: figures[name] for name in ("ours", "transformers")}
    tokens, prompt_tokens = config.n * config.new_tokens, figures["prompt tokens"]
    print(f"\n{config.n} x {config.new_tokens} tokens, a video prompt of {prompt_tokens} tokens")
    print(f"99 % of the next word's probability on {figures['words of 99 %']} words")
    print("memory: tensors of keys and values")
    print(as_text(head, compared(both, "transformers", "cache")))
    for name, figure in both.items():
        rate, mib = tokens / statistics.median(figure["seconds"]), figure["formula"] / 2**20
        print(f"{name}: {rate:.1f} tokens a second; {mib:.0f} MiB by formula")


def draw_growth(growth, png):
    """{"what, against": [[x, seconds]]} -> a panel each; the x axis is logarithmic. Ours."""
    fig, places = axes(len(growth), 4 * len(growth), 3)
    for ax, (name, points) in zip(places, growth.items()):
        what, against = name.split(", ")
        x, y = np.array(points).T
        ax.plot(x, 1e3 * y, "o-", lw=1, ms=4)
        ax.set(xscale="log", xlabel=against, ylabel=f"CPU ms of {what}", ylim=(0, 1.1e3 * max(y)))
        ax.set_xticks(x, [f"{int(value):,}" for value in x])
        ax.set_xticks([], minor=True)
    fig.savefig(png, dpi=110)


def main(config):
    """Measure, print, write -> all figures."""
    began = time.process_time()
    with one_thread():
        figures = dict(config=dataclasses.asdict(config), torch=torch.__version__)
        figures["update"] = compare_updates(config)
        figures["sft"] = compare_sft(config)
        decoder = make(config.decoder).eval()
        figures["decoding"] = compare_decoding(config, decoder)
        figures["growth"] = measure_growth(config, decoder)
    figures["minutes"] = (time.process_time() - began) / 60
    print_tables(figures, config)
    if config.out:
        write_json(config.out, figures)
    if config.picture:
        draw_growth(figures["growth"], config.picture)
    return figures
