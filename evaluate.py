"""Evaluation of a model that imagines: FutureBench, TwiFF-Bench, multiple choice (paper sec. 4).

    python evaluate.py --benchmark futurebench --model runs/sft --data futurebench.json
    torchrun --nproc_per_node 8 evaluate.py --benchmark mcq --model DIR --data videomme.parquet
    python evaluate.py --benchmark twiffbench --model DIR --data Liu-Junhua/TwiFF-Bench

TwiFF-Bench is judged after that: `python -m common.judge OUT --model NAME`, then the same
command again, which finds all samples done, loads no model and shows the scores.

Without --benchmark: every format of data.py whose rows have options. Writes one line a sample to
OUT/samples*.jsonl as it is done (a second run skips what is there), then OUT/summary.json,
OUT/report.html and the table: scores by group and over all.

Readings of an answer, all of the first closed <answer>: `accuracy` counts what training rewards
(rewards.pick); `strict` the only letter that stands alone in it, or an option's text; `official`,
for FutureBench alone, the first of A-D anywhere in it, be it in a word: the one the paper's figures
are made with.

`--latents` asks whether the answer depends on what is imagined. A span is fed: generated (the
model's own states) | zero | noise (Gaussian, of the true embeddings' mean and deviation, measured
once a run) | shuffled (the true futures of the next row about another clip) | true (its own true
futures) | pause (the `<|latent|>` token's embedding) | none (no span can be opened). The model
still decides how long a span is. What a row is fed depends on nothing but the row: no batch, no
ranks.

Where this differs from the paper and the official code:
 1. A record or sample that cannot be read, whose answer cannot be parsed, or that the judge fails
    on is named and counted in the summary. What could not be read is tried again by the next run.
 2. Samples that were not read or not judged are outside the scores: see `found` and `total`.
 3. Intervals are given: `bootstrap` (1,000 draws of clips, seeded; printed), and Wilson's for
    shares (`low`, `high`; by questions).

Axis letters: B rows, M spans, J places in a span, N imagined vectors, F frames, D hidden.
"""

import dataclasses
import hashlib
import json
import os
import re
import time
from typing import NamedTuple

import numpy as np
import torch

from common.benchmarks import read_benchmark
from common.cli import run_script
from common.clips import ClipError, load_frames, normalise, stack
from common.folder import add_scores
from common.formats import Skipped, answer_of, report_bad
from common.intervals import bootstrap, wilson
from common.judge import add_verdicts
from common.pictures import imagined
from common.rollouts import one_mark_a_span
from common.runs import Machine, need_data, write_json
from common.summary import about, show, shown_in_report
from common.walk import Book, settings_of, walk
from data import DataConfig, at_least, model_inputs, to_device
from latent_decode import generate, own_latent
from rewards import diversity_reward, format_reward, pick, repetition_score, span_lengths

# a benchmark's own frames, pixels and lengths: official, and paper sec. 4
PROTOCOLS = {
    "futurebench": dict(num_frames=32, video_max_tokens=12288),
    "twiffbench": dict(max_new_tokens=4096),
}


@dataclasses.dataclass
class Config(DataConfig):
    benchmark: str = ""  # futurebench | twiffbench | mcq; "" = any rows with options
    model: str = ""  # a model folder, or a run's folder (its newest checkpoint)
    # a file, a folder of files, or a hub id; with options (see data.py), or TwiFF-Bench
    data: str = ""
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    out: str = "runs/eval"  # the evaluation's folder
    limit: int = 0  # only the first samples; 0 = all  # ours
    num_frames: int = 0  # frames of a video; 0 = 32 for FutureBench, else 16  # paper sec. 4
    video_max_tokens: int = 0  # of a video; 0 = 12288 for FutureBench, as official, else 4096
    batch: int = 8  # prompts decoded together on one rank  # ours
    max_new_tokens: int = 0  # 0 = 4096 for TwiFF-Bench, else 2048  # paper sec. 4
    max_latents: int = 8  # longest span: 2 * l_max  # official
    latents: str = "generated"  # generated | zero | noise | shuffled | true | pause | none  # ours
    seed: int = 0  # noise and the bootstrap  # ours
    # samples shown in report.html, spread over the groups; 0 = only its tables  # ours
    report: int = 24
    bf16: bool = True  # weights on CUDA  # paper Table 8
    cuda_graph: bool = False  # replay a captured decoding step; not yet measured on a GPU  # ours

    def __post_init__(self):
        defaults = dict(num_frames=16, video_max_tokens=4096, max_new_tokens=2048)
        defaults.update(PROTOCOLS.get(self.benchmark, {}))
        for name, value in defaults.items():
            setattr(self, name, getattr(self, name) or value)
        super().__post_init__()
        at_least(self, 1, "batch", "max_new_tokens")
        if self.latents not in LATENTS:
            raise ValueError(f"latents is {self.latents!r}, expected one of {', '.join(LATENTS)}")

    @classmethod
    def protocol(cls, values):
        """Of values that were chosen: what their benchmark asks for, whatever the model's own."""
        return PROTOCOLS.get(values.get("benchmark"), {})


LATENTS = ("generated", "zero", "noise", "shuffled", "true", "pause", "none")
# may differ between two runs on one folder
FREE = {"out", "workers", "max_bad", "cuda_graph", "report", "batch", "limit"}


def official_letter(text):
    """A response -> the first of [ABCD] in its first closed <answer>, or "". Source: official."""
    found = re.search("[ABCD]", answer_of(text) or "")
    return found.group() if found else ""


def strict_letter(text, options):
    """A response -> the letter that its first closed <answer> means, or "". Source: ours.

    An option's whole text means that option. Else it is the only option letter that stands alone
    as a word, any case, outside an option's text: "The answer is C." is C. Two letters are none:
    "B or C", "C. is wrong, the answer is D". An "a" directly before an option's text is an
    article ("A red wall" is none), and so is a lower-case one between words ("it's a trap").
    """
    answer, texts = answer_of(text) or "", [plain(o) for o in options]
    if plain(answer) in texts:
        return chr(65 + texts.index(plain(answer)))
    answer = plain(re.sub(r"(?<=\w )a (?=[a-z]{2})", "", answer))

    # texts of several words may hold a letter of their own: "C opens the door"
    bare = sorted({re.sub(r"^an? ", "", t) for t in texts if t}, key=len, reverse=True)
    either = "|".join(map(re.escape, bare))
    phrases = "|".join(re.escape(t) for t in bare if " " in t)
    answer = re.sub(rf"(?<![\w'])a (?=(?:{either})(?!\w))", "", answer)
    answer = re.sub(rf"(?<![\w'])(?:{phrases})(?!\w)", " ", answer) if phrases else answer

    last = chr(96 + len(options))
    letters = set(re.findall(rf"(?<![\w'])[a-{last}](?![\w'])", answer))
    return letters.pop().upper() if len(letters) == 1 else ""


def plain(text):
    """Lower case, single spaces, no punctuation around it."""
    return " ".join(text.lower().split()).strip(" .,:;!?\"'()")


def summarise(lines, average="micro", seed=0):
    """Result lines -> {group: scores}, "all" last. Source: sec. 4.

    Of each group: n, accuracy (over the n that were read), low, high (Wilson), bootstrap, unparsed,
    skipped, strict and official accuracy and unparsed, spans, latents and tokens an answer. Lines
    of TwiFF-Bench: chain, answer and average over the n judged ones, failed (asked without an
    answer), waiting (not asked yet). average: "all" is micro, over the samples, or macro, the mean
    of the groups (its low and high are then the bootstrap's).
    """
    groups = sorted({line["group"] for line in lines} - {"all"})
    table = {g: scores([line for line in lines if line["group"] == g], seed=seed) for g in groups}
    table["all"] = scores(lines, groups if average == "macro" else (), seed)
    return table


def scores(lines, groups=(), seed=0):
    """The scores of result lines, as a dict: `summarise` says which. groups: weigh these alike."""
    read = [line for line in lines if "skipped" not in line]
    judged = any("parsed" in line for line in lines)
    counted = [line for line in read if line.get("judged")] if judged else read
    parts = [[line for line in counted if line["group"] == g] for g in groups]
    parts = [part for part in parts if part] or [counted]

    def mean(value):
        if not counted:
            return 0.0
        return float(np.mean([np.mean([value(line) for line in part]) for part in parts]))

    def interval(value, top=1.0):
        clips = [[str(line.get("clip", i)) for i, line in enumerate(part)] for part in parts]
        values = [[value(line) for line in part] for part in parts]
        return bootstrap(values, clips, seed, top=top)

    out = dict(n=len(counted), skipped=len(lines) - len(read))
    if judged:
        for name in ("chain", "answer", "average"):
            out[name] = mean(lambda line, name=name: line["judged"][name])
        out["failed"] = sum("why" in line for line in read)
        out["unparsed"] = sum(not line["parsed"] for line in read)
        out["waiting"] = len(read) - len(counted) - out["failed"]
        out["bootstrap"] = interval(lambda line: line["judged"]["average"], top=5.0)
    else:
        out["right"] = sum(line["right"] for line in read)
        out["accuracy"] = mean(lambda line: line["right"])
        out["bootstrap"] = interval(lambda line: line["right"])
        one = len(parts) == 1
        out["low"], out["high"] = wilson(out["right"], len(read)) if one else out["bootstrap"]
        out["unparsed"] = sum(line["picked"] is None for line in read)
        for name in ("strict", "official"):
            if read and all(name in line for line in read):
                out[name] = mean(lambda line, name=name: line[name] == line["gold"])
                out[f"{name}_unparsed"] = sum(not line[name] for line in read)
    for name in ("spans", "latents", "tokens"):
        out[name] = sum(line[name] for line in read) / max(1, len(read))
    return out


# -------------------------------------------------------------------------- the latents, exchanged

NEEDS_FUTURES = ("true", "shuffled", "noise")
MEASURED = 64  # rows with futures that the scale of `noise` is measured on


class Ablation(NamedTuple):
    """What a span is fed instead of the model's own states."""

    config: Config
    model: torch.nn.Module
    donor_of: dict = {}  # shuffled: {id: the row whose futures are fed}
    scale: torch.Tensor | None = None  # noise: mean and deviation (2, D)


def prepare(config, model, rows):
    """What an ablation needs to know of the whole run -> Ablation."""
    ablation = Ablation(config, model)
    if config.latents == "shuffled":
        return ablation._replace(donor_of=donors(rows))
    if config.latents == "noise":
        return ablation._replace(scale=measure_noise(model, rows, config))
    return ablation


def check_futures(kind, rows):
    """Raise ValueError if `--latents kind` cannot be fed for these rows. Loads nothing."""
    if kind not in NEEDS_FUTURES:
        return
    for row in rows:
        if not future_frames(row):
            raise ValueError(
                f"{row.where}: --latents {kind} needs the true future frames, this row has none"
            )
    if kind == "shuffled" and len({clip_of(row) for row in rows}) < 2:
        raise ValueError("--latents shuffled needs rows of at least two clips")


def future_frames(row):
    return [part for part in row.response if not isinstance(part, str)]


def donors(rows):
    """Whose futures `shuffled` feeds: {id: the next row in the row order about another clip}."""
    order, out = [*rows, *rows], {}
    for i, row in enumerate(rows):
        others = order[i + 1 : i + len(rows)]
        out[row.id] = next((r for r in others if clip_of(r) != clip_of(row)), None)
    return out


def true_vectors(model, row, config):
    """The embeddings of a row's true futures, a frame each: [(n_m, D), ...]. Raises ClipError."""
    patches, grid = stack(load_frames(future_frames(row), config.budgets[1]))
    pixels = normalise(patches).to(model.device)
    e = model.encode_frames(pixels, grid.to(model.device))  # (N, D)
    return list(e.split((grid.prod(1) // 4).tolist()))


def measure_noise(model, rows, config):
    """Mean and deviation (2, D) of the true embeddings, measured once a run and kept in its folder.

    From the first MEASURED rows that can be read, so that no batch and no rank has its own scale.
    """
    path = os.path.join(config.out, "noise.json")
    if os.path.exists(path):
        with open(path) as f:
            return torch.tensor(json.load(f), device=model.device)
    vectors, n = [], 0
    for row in rows:
        try:
            vectors += true_vectors(model, row, config)
        except ClipError:  # named when its turn comes
            continue
        n += 1
        if n == MEASURED:
            break
    if not vectors:
        raise ValueError("--latents noise: no true future can be read, so it has no scale")
    e = torch.cat(vectors).float()
    scale = torch.stack([e.mean(0), e.std(0, unbiased=False)])
    write_json(path, scale.tolist())
    return scale


def draw_noise(row, scale, config, spans=8):
    """Gaussian vectors of the true embeddings' scale (spans, max_latents, D), the row's own."""
    draw = hashlib.sha256(f"{config.seed} {row.id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(draw[:7], "big"))
    noise = torch.randn(spans, config.max_latents, scale.shape[1], generator=generator)
    return scale[0] + scale[1] * noise.to(scale.device)


def replacement(row, ablation):
    """What a row's spans are fed, a frame each: [(n_m, D), ...]. Raises ClipError. Source: ours.

    It depends on the row alone: not on its batch, nor on ranks.
    """
    config, model = ablation.config, ablation.model
    if config.latents == "zero":
        return [torch.zeros(1, model.lm_head.in_features, device=model.device)]
    if config.latents == "pause":
        return [model.get_input_embeddings().weight[model.config.latent_id].detach()[None]]
    if config.latents == "noise":
        return list(draw_noise(row, ablation.scale, config))
    return true_vectors(model, ablation.donor_of.get(row.id, row), config)


def feed_for(rows, ablation):
    """-> what decoding feeds these rows' spans, and {id: why} of those whose futures
    cannot be read.

    Those are fed zeros; their answers are not used.
    """
    if ablation.config.latents in ("generated", "none"):
        return own_latent, {}
    model, vectors, lost = ablation.model, [], {}
    for row in rows:
        try:
            vectors.append(replacement(row, ablation))
        except ClipError as e:
            lost[row.id] = f"its future frames cannot be fed: {e}"
            vectors.append([torch.zeros(1, model.lm_head.in_features, device=model.device)])
    return feed_of(vectors), lost


def feed_of(vectors):
    """[frames of a row] -> feed(model, state): span m, place j is fed frame m's vector j.

    The last frame and the last vector of a frame are repeated: min(m, M - 1), min(j, n_m - 1).
    """
    M, J = max(map(len, vectors)), max(len(v) for frames in vectors for v in frames)

    def filled(frames):
        rows = [torch.cat([v, v[-1:].expand(J - len(v), -1)]) for v in frames]
        return torch.stack([*rows, *[rows[-1]] * (M - len(rows))])  # (M, J, D)

    table = torch.stack([filled(frames) for frames in vectors])  # (B, M, J, D)

    def feed(model, state):
        span, place = state.span.clamp(0, M - 1), state.count.clamp(0, J - 1)
        return table[state.row, span, place].to(state.h.dtype)

    return feed


# ------------------------------------------------------------------------------------------ the run


def evaluate(config, rows=None):
    """Run the evaluation -> {group: scores}, the same on every rank. Raises SystemExit, ValueError.

    A folder with results of the same settings is continued; of other settings: refused.
    """
    # the rows, and what is done already; prompts of like length stand together: less padding
    machine = Machine(config.bf16)
    rows, average, bad = rows_of(config, rows)
    free = FREE - {"batch", "limit"} if config.latents in ("noise", "shuffled") else FREE
    settings = settings_of(config, free)
    ordered = sorted(rows, key=lambda row: (row.group, len(row.question)))
    book = Book(config.out, "samples", {row.id: row for row in ordered}, settings, machine)

    # answers to what is missing, a line a sample
    if blocks := book.blocks(config.batch):
        model, tokenizer = machine.load(settings["model"])
        ablation = prepare(config, model, rows)
        shown = shown_in_report(rows, config.report)
        for block in walk(book, blocks, lambda row: [row], tokenizer, config):
            book.add(answer(block.batch, tokenizer, ablation, shown))

    # scores, over the samples of all ranks in the rows' order
    done = book.finish()
    lines = [done[row.id] for row in rows]
    add_verdicts(config.out, lines)
    table = summarise(lines, average, config.seed)
    if machine.master:
        no_option = [row.id for row in rows if row.options and not_an_option(row)]
        summary = dict(settings, **about(rows, lines, config, no_option))
        summary.update(average=average, scores=table)
        summary["unusable"] = [s._asdict() for s in bad]
        show(config.out, summary, lines, rows)
        if config.latents == "generated" and not config.limit:
            name = config.benchmark or os.path.basename(config.data)
            add_scores(settings["model"], name, table["all"])
    return table


def rows_of(config, rows=None):
    """-> (rows, micro | macro, the records that cannot be used [Skipped]), the latter named.

    Raises SystemExit without data or with too many bad records, ValueError for rows that cannot be
    scored.
    """
    average, bad = "micro", []
    if rows is None:
        need_data(config)
        root = config.media_root or None
        rows, average = read_benchmark(config.benchmark, config.data, root, bad)
    report_bad(bad, len(rows) + len(bad), config.max_bad)
    rows = rows[: config.limit or None]
    if config.benchmark != "twiffbench":
        check_options(rows, config.max_bad)
    check_futures(config.latents, rows)
    if len({row.id for row in rows}) < len(rows):
        raise ValueError(
            f"{config.data}: ids are not unique, so a resumed run could not tell its samples apart"
        )
    return rows, average, bad


def check_options(rows, max_bad):
    """Name the rows whose answer is none of their options: they are scored wrong.

    Raises ValueError for a row without options, SystemExit if such rows are too many.
    """
    for row in rows:
        if not row.options:
            raise ValueError(f"{row.where}: no options; multiple choice needs them")
    odd = [row for row in rows if not_an_option(row)]
    bad = [Skipped(r.where, f"the answer {r.answer!r} is none of {r.options}") for r in odd]
    report_bad(bad, len(rows), max_bad, "have an answer that is no option and are scored wrong")


def not_an_option(row):
    return pick(row.answer, row.options) is None


def answer(batch, tokenizer, ablation, shown):
    """Answer a batch -> {id: its result line}. shown: ids of those that the report shows."""
    config, model, rows = ablation.config, ablation.model, batch["rows"]
    began = time.time()
    feed, lost = feed_for(rows, ablation)
    rollout = generate(
        model,
        model_inputs(to_device(batch, model.device)),
        feed=feed,
        max_new_tokens=config.max_new_tokens,
        max_latents=config.max_latents,
        banned=[model.config.latent_start_id] if config.latents == "none" else [],
        cuda_graph=config.cuda_graph,
    )
    seconds = round((time.time() - began) / len(rows), 5)

    results = {id: dict(skipped=why) for id, why in lost.items()}
    for i, row in enumerate(rows):
        if row.id in lost:
            continue
        tokens = rollout.tokens[i, : rollout.lengths[i]].tolist()
        latents, text = rollout.latents[i], tokenizer.decode(tokens)
        line = result_line(config, model, row, text, tokens, latents)
        if row.id in shown:
            line["imagined"] = look_at(model, row, line, tokens, latents, config)
        results[row.id] = dict(line, finish=rollout.finish[i], seconds=seconds)
    return results


def result_line(config, model, row, text, tokens, latents):
    """What is kept of a response, as a dict."""
    return dict(
        clip=clip_of(row),
        **read_answer(row, text, config.benchmark == "futurebench"),
        answer=row.answer,
        response=one_mark_a_span(text),
        tokens=len(tokens),
        spans=tokens.count(model.config.latent_start_id),
        latents=len(latents),
    )


def look_at(model, row, line, tokens, latents, config):
    """What a row's spans are near to, for the report -> a dict: `imagined` and the rewards."""
    lengths = span_lengths(tokens, model.config.latent_start_id, model.config.latent_id)
    return dict(
        imagined(model, row, latents, lengths, config.budgets[1]),
        diversity=round(diversity_reward(latents, lengths), 4),
        format=format_reward(line["response"]),
        repetition=repetition_score(line["response"]),
    )


def clip_of(row):
    """What a question is about: its first clip's or picture's path, else (bytes) its own id."""
    for part in row.prompt:
        source = getattr(part, "path", None) or getattr(part, "source", None)
        if isinstance(source, str):
            return source
    return row.id


def read_answer(row, text, official=False):
    """A response -> what its result line says of the answer, as a dict. Source: ours.

    With options: the readings of the answer, `official` where it is asked for. Else whether there
    is an answer.
    """
    if not row.options:
        return dict(parsed=answer_of(text) is not None)
    picked, gold = pick(answer_of(text), row.options), pick(row.answer, row.options)
    return dict(
        right=gold is not None and picked == gold,
        picked=picked,
        gold=None if gold is None else chr(65 + gold),
        strict=strict_letter(text, row.options),
        **(dict(official=official_letter(text)) if official else {}),
    )


if __name__ == "__main__":
    run_script(evaluate, Config)
