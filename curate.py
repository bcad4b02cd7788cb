"""Curation by visual gain: which questions does seeing the future help with? (sec. 3.2)

    p_t = right answers of n rollouts under (t): observed prefix + question
    p_v = right answers of n rollouts under (v): the same, plus the later key frames as images
    gain = p_v - p_t;  keep p_t <= 6 and gain >= 2 (of n = 8)
    rank by gain, take the top K = 50,000

    python curate.py --model DIR --data pool.jsonl --out runs/curate --k 50000    # both parts
    torchrun --nproc_per_node 8 curate.py --part probe --model DIR --data pool.jsonl
    python curate.py --part select --data pool.jsonl --k 20000 --min_gain 3       # select again

*Probe* writes a line for each candidate to OUT/probe.jsonl, in the pool's order. A second run only
does the missing ones (common/results.py). Responses without a verdict from the judge are stored,
and a second run has them judged without generating anything. *Select* is a pure function of that
file. It writes OUT/selected (.jsonl, or .parquet if the pool is), best first, and OUT/select.json
and .png.

The answer of a response is its first closed <answer>. A model that has never learnt the tags may
leave them out; then it is the last line that is not empty, if the response came to its end. It is
right if the rule of rewards.py says so. If the rule says no, a judge may still say yes, where there
is one. A candidate with an unjudged rollout counts as unjudged, never as wrong.

Candidates are generated in fixed blocks (`batch` neighbours in the pool), one condition after the
other. Each block is seeded by (seed, condition, ids of its readable rows). So the results do not
depend on the number of GPUs, the order of the work, or restarts. Seeds for single rows would not be
enough, because the composition of a batch also changes rounding.

Where this differs from the paper (the authors released no code for this part):
 1. Ties, which the paper leaves open, go to the lower p_t, then to the smaller sha256 of the id.
 2. With another n the thresholds keep their shares: p_t <= floor(6n/8), gain >= ceil(2n/8).
 3. Sampling is that of the RL stage; future frames have the pixel budget of observed ones.
 4. The noise of the counts is reported: how many candidates pass by chance.
A cheaper score, one forward instead of 2n rollouts, is in variants/logprob_gain.py.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import re
from collections import Counter

import torch

from common.cli import run_script
from common.folder import read_json
from common.formats import (
    RecordError,
    Row,
    Skipped,
    answer_of,
    no_option,
    read_record,
    read_records,
    report_bad,
)
from common.judge import judge_of
from common.machine import Machine
from common.report import draw_selection, selection_text, tabulate_selection
from common.results import Book, check_rows, read_book, settings_of, walk
from common.run import need_data, write, write_json
from data import DataConfig, at_least, encode
from latent_decode import ask, one_mark_a_span
from rewards import accuracy_reward, ask_judge

LATER = " Later frames of the same clip: "


@dataclasses.dataclass
class Config(DataConfig):
    part: str = "both"  # probe | select | both
    model: str = ""  # probe: the base model's folder, run's folder or hub id
    data: str = ""  # the pool of candidates: training records, see data.py
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    out: str = "runs/curate"  # the folder of the probe and of the selection
    # probe

    # n, of each candidate and condition (torchrun takes --n for its own)  # paper sec. 3.2
    rollouts: int = 8
    seed: int = 0  # of the rollouts  # ours
    # deviation 3: the paper does not say how it samples
    temperature: float = 0.9  # official RL
    top_p: float = 0.99  # official RL
    max_new_tokens: int = 2048  # paper sec. 4 (FutureBench)
    max_latents: int = 8  # longest span  # official: 2 * L_max
    # candidates generated together, n * batch rows; changes the random numbers  # ours
    batch: int = 4
    judge_url: str = ""  # OpenAI-compatible server, for open answers; key: JUDGE_API_KEY  # ours
    judge_model: str = ""  # its model; "" = no judge, open answers must match exactly  # ours
    cuda_graph: bool = False  # replay a captured decoding step  # ours
    # select
    k: int = 50000  # rows to choose; 0 = all that are kept  # paper sec. 3.2
    max_p_t: int = -1  # keep p_t <= this; -1 = 6 for n = 8, floor(6n/8)  # paper sec. 3.2
    min_gain: int = -1  # keep p_v - p_t >= this; -1 = 2 for n = 8, ceil(2n/8)  # paper sec. 3.2

    def __post_init__(self):
        super().__post_init__()
        if self.part not in ("probe", "select", "both"):
            raise ValueError(f"part is {self.part!r}, expected probe, select or both")
        at_least(self, 1, "rollouts", "batch", "max_new_tokens")
        at_least(self, 0, "k")


# may differ between two runs on one probe file
FREE = {"part", "data", "media_root", "out", "workers", "max_bad", "cuda_graph", "judge_url"}
FREE |= {"k", "max_p_t", "min_gain"}


# -------------------------------------------------------------------------------------- visual gain


def visual_gain(p_t, p_v):
    """How much the later frames help: p_v - p_t, counts of n rollouts. Source: sec. 3.2."""
    return p_v - p_t


def keep(p_t, p_v, max_p_t=6, min_gain=2):
    """Whether a row is not solved without the future (p_t <= 6), and helped by it (gain >= 2).

    Source: sec. 3.2; the counts are of n = 8.
    """
    return p_t <= max_p_t and visual_gain(p_t, p_v) >= min_gain


def select(rows, k, max_p_t=6, min_gain=2):
    """The kept rows by falling gain, the first k of them (0 = all). Source: sec. 3.2.

    rows: dicts with id, p_t, p_v, in any order.
    """

    def rank(row):
        # deviation 1: the paper does not say which of equal gains come first
        tie = hashlib.sha256(row["id"].encode()).hexdigest()
        return -visual_gain(row["p_t"], row["p_v"]), row["p_t"], tie

    kept = [row for row in rows if keep(row["p_t"], row["p_v"], max_p_t, min_gain)]
    return sorted(kept, key=rank)[: k or None]


def limits(config, n):
    """(max_p_t, min_gain) for n rollouts: from the flags, else the paper's. Source: sec. 3.2."""
    # deviation 2: the paper has n = 8 alone; its 6 and 2 of 8 are kept as shares
    max_p_t = 6 * n // 8 if config.max_p_t < 0 else config.max_p_t
    min_gain = -(-2 * n // 8) if config.min_gain < 0 else config.min_gain
    return max_p_t, min_gain


def false_keep_rate(n, p, max_p_t=6, min_gain=2):
    """The exact P(keep) if the future does not help: p_t and p_v are independent Binomial(n, p).

    Source: ours.
    """
    pmf = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    rate = 0.0
    for t in range(n + 1):
        for v in range(n + 1):
            rate += pmf[t] * pmf[v] * keep(t, v, max_p_t, min_gain)
    return rate


def noise_text(n, max_p_t, min_gain):
    """The false-keep rate by true accuracy, in words."""
    accuracies = (0.1, 0.25, 0.5, 0.75, 0.9)
    rates = [f"{p}: {false_keep_rate(n, p, max_p_t, min_gain):.1%}" for p in accuracies]
    return (
        f"kept by chance (p_t <= {max_p_t}, gain >= {min_gain} of n = {n}) where the future does "
        f"not help, by true accuracy: {', '.join(rates)}"
    )


# ---------------------------------------------------------------------------- prompts and responses


def without_future(row):
    """Condition t of a Row: the observed frames and the question. Source: sec. 3.2."""
    return dataclasses.replace(row, response=[])


def with_future(row):
    """Condition v of a Row: its future frames as images after the last picture of the prompt.

    Source: sec. 3.2; the words before them are ours.
    """
    media = [i for i, part in enumerate(row.prompt) if not isinstance(part, str)]
    last = media[-1] + 1 if media else 0
    # deviation 3: in the prompt, a future frame has the pixel budget of an observed one
    prompt = [*row.prompt[:last], LATER, *row.futures, *row.prompt[last:]]
    return dataclasses.replace(row, prompt=prompt, response=[])


CONDITIONS = {"t": without_future, "v": with_future}


def encode_conditions(row, tokenizer, config, train=False):
    """A Row -> {condition: its encoded prompt}. train: with the answer and its labels.

    Raises ClipError, RecordError.
    """
    return {c: encode(of(row), tokenizer, config, train) for c, of in CONDITIONS.items()}


def final_answer(response):
    """A response with its special tokens -> its answer or None. Source: ours, see the top."""
    answer = answer_of(response)
    if answer is not None or not response.rstrip().endswith(("<|im_end|>", "<|endoftext|>")):
        return answer
    # tags and special tokens count as ends of lines: <reason>, </answer>, <|latent|>
    lines = [line.strip() for line in re.sub(r"<[/|\w][^<>\s]*>", "\n", response).split("\n")]
    return next((line for line in reversed(lines) if line), None)


def mark(rows, responses, judge=None):
    """Rows and the responses to each -> lists of True | False | None (unjudged).

    judge: a `common.judge.Judge` or None; equal answers to a question are judged once. Source: sec.
    3.2.
    """
    answers = [[f"<answer>{final_answer(r) or ''}</answer>" for r in some] for some in responses]
    asked = {(row.id, answer): row for row, some in zip(rows, answers) for answer in some}
    verdicts = ask_judge(judge, [answer for _, answer in asked], asked.values())
    right = {}
    for ((id, answer), row), verdict in zip(asked.items(), verdicts):
        by_rule = accuracy_reward(answer, row.answer, row.options) > 0
        right[id, answer] = by_rule or verdict
    return [[right[row.id, answer] for answer in some] for row, some in zip(rows, answers)]


def score(rows, responses, judge=None):
    """Rows and {condition: the responses to each row} -> {id: the content of its line}.

    A line has p_t and p_v. If rollouts are unjudged it has their number instead, and all responses
    [under t, under v], so that a later run can have them judged. A rollout without an answer is
    wrong, and counted in no_answer. Source: sec. 3.2.
    """
    marks = {c: mark(rows, responses[c], judge) for c in CONDITIONS}
    lines = {}
    for i, row in enumerate(rows):
        both = [*responses["t"][i], *responses["v"][i]]
        no_answer = sum(not final_answer(response) for response in both)
        unjudged = marks["t"][i].count(None) + marks["v"][i].count(None)
        if unjudged:
            print(f"unjudged {row.where}: {unjudged} of {len(both)} rollouts")
            kept = [responses["t"][i], responses["v"][i]]
            lines[row.id] = dict(unjudged=unjudged, no_answer=no_answer, responses=kept)
        else:
            p_t, p_v = sum(marks["t"][i]), sum(marks["v"][i])
            lines[row.id] = dict(p_t=p_t, p_v=p_v, no_answer=no_answer)
    return lines


# -------------------------------------------------------------------------------------------- probe


def read_pool(config):
    """The pool -> {id: its unchanged record}, {id: its Row, or a Skipped that says why not}.

    A record without an id gets "file name:index". Raises SystemExit without --data, ValueError for
    an id that is used twice.
    """
    need_data(config)
    root = config.media_root or os.path.dirname(os.path.abspath(config.data))
    name, records, rows = os.path.basename(config.data), {}, {}
    for i, record in enumerate(read_records(config.data)):
        has_id = isinstance(record, dict) and "id" in record
        id = str(record["id"]) if has_id else f"{name}:{i}"
        if id in records:
            raise ValueError(f"{config.data}: ids are not unique, e.g. {id!r}")
        records[id], rows[id] = record, candidate(record, f"{config.data}:{i}", root, id)
    return records, rows


def candidate(record, where, media_root, id):
    """A record -> its Row, or a Skipped if it cannot be probed."""
    try:
        row = read_record(record, where, media_root)
    except RecordError as e:
        return Skipped(where, str(e).removeprefix(f"{where}: "))
    if not row.futures:
        return Skipped(where, "no future frame, so there is no condition v")
    row.id = id
    return no_option(row) or row


def probe(config, judge=None):
    """Score the candidates of the pool that have no score yet -> {id: line}. Source: sec. 3.2.

    judge: default a Judge if judge_model is set. Raises SystemExit if OUT holds other settings or
    another pool, or if too many records are unusable.
    """
    # the pool; records that cannot be probed are named before a model is loaded
    machine = Machine()
    _, rows = read_pool(config)
    bad = [row for row in rows.values() if isinstance(row, Skipped)]
    report_bad(bad, len(rows), config.max_bad)
    judge = judge or judge_of(config)
    if machine.master:
        # deviation 4: the paper does not say how many candidates are kept by chance
        print(noise_text(config.rollouts, *limits(config, config.rollouts)))
        if judge is None and any(isinstance(r, Row) and not r.options for r in rows.values()):
            print("open answers must match exactly: no --judge_model")

    # the results of earlier runs, {id: line} in book.lines, which `book.add` appends to;
    # responses without a verdict are judged again
    book = Book(config.out, "probe", rows, settings_of(config, FREE), machine)
    if judge and machine.master:
        usable = [row for row in rows.values() if isinstance(row, Row)]
        waiting = [row for row in usable if "unjudged" in book.lines.get(row.id, {})]
        t = [book.lines[row.id]["responses"][0] for row in waiting]
        v = [book.lines[row.id]["responses"][1] for row in waiting]
        book.add(score(waiting, dict(t=t, v=v), judge))

    # the model is loaded if anything is left to generate
    n, blocks, encode_row = config.rollouts, book.blocks(config.batch), None
    if blocks:
        model, tokenizer = machine.load(config.model)
        encode_row = functools.partial(encode_conditions, tokenizer=tokenizer, config=config)
    # this rank's blocks, a list of rows and of what encode_row made of each; walk writes a line for
    # rows that cannot be read and leaves them out
    for some, samples in walk(book, blocks, encode_row, config.workers):
        # n responses to each row under each condition
        responses = {}
        for condition in CONDITIONS:
            seed = json.dumps([config.seed, condition, *(row.id for row in some)]).encode()
            seed = int.from_bytes(hashlib.sha256(seed).digest()[:7], "big")  # 56 bits
            _, _, texts = ask(
                model,
                tokenizer,
                [sample[condition] for sample in samples],
                n=n,
                temperature=config.temperature,
                top_p=config.top_p,
                max_new_tokens=config.max_new_tokens,
                max_latents=config.max_latents,
                cuda_graph=config.cuda_graph,
                generator=torch.Generator().manual_seed(seed),
            )
            texts = [one_mark_a_span(text) for text in texts]  # row 0's n texts, then row 1's, ...
            responses[condition] = [texts[i * n : (i + 1) * n] for i in range(len(some))]

        # p_t and p_v, written at once
        book.add(score(some, responses, judge))

    # one file for all ranks, and the number of candidates that were probed
    lines = book.finish()
    if machine.master:
        fates = Counter()
        for line in lines.values():
            fates[next((name for name in ("skipped", "unjudged") if name in line), "done")] += 1
        counts = ", ".join(f"{count} {name}" for name, count in sorted(fates.items()))
        print(f"{config.out}/probe.jsonl: {len(rows)} candidates, {counts}")
        for why, count in judge.failures.most_common() if judge else ():
            print(f"no verdict from the judge: {count} x {why}")
    return lines


# ------------------------------------------------------------------------------------------- select

FATES = ("chosen", "beyond K", "p_t too high", "gain too low", "unjudged", "skipped", "missing")


def fate(line, chosen, max_p_t, min_gain):
    """A candidate's line, or None, and whether it was chosen -> one of FATES."""
    if line is None:
        return "missing"
    if "p_t" not in line:
        return "unjudged" if "unjudged" in line else "skipped"
    if chosen:
        return "chosen"
    if keep(line["p_t"], line["p_v"], max_p_t, min_gain):
        return "beyond K"
    return "p_t too high" if line["p_t"] > max_p_t else "gain too low"


def cut(config):
    """Choose from the probe's file; write the rows and a summary -> the chosen records, best first.

    The records are unchanged, so their relative clip paths still start at the pool's folder.
    Source: sec. 3.2, Fig. 6. Raises SystemExit if there is no probe of this pool.
    """
    # the lines of the probe
    records, rows = read_pool(config)
    lines = read_book(config.out, "probe")
    if not lines:
        raise SystemExit(f"{config.out} holds no probe.jsonl: run --part probe first")
    check_rows(config.out, lines, rows)
    n = read_json(os.path.join(config.out, "settings.json"))["rollouts"]
    max_p_t, min_gain = limits(config, n)

    # keep, rank, take the first k
    scored = [lines[id] for id in rows if "p_t" in lines.get(id, {})]
    chosen = [line["id"] for line in select(scored, config.k, max_p_t, min_gain)]
    path = write_selected(config, records, chosen)

    # the fate of each candidate: tables, the names of those without a score, a picture
    fates = {id: fate(lines.get(id), id in {*chosen}, max_p_t, min_gain) for id in rows}
    gains = {line["id"]: visual_gain(line["p_t"], line["p_v"]) for line in scored}
    tables = tabulate_selection(rows, gains, fates)
    named = {id: lines[id].get("skipped", "unjudged") for id in rows if id in lines}
    named = {id: why for id, why in named.items() if fates[id] in ("unjudged", "skipped")}
    no_answer = sum(line.get("no_answer", 0) for line in lines.values())
    text = (
        f"{len(chosen)} of {len(rows)} candidates chosen; {no_answer} rollouts without an answer "
        f"(wrong)\n{noise_text(n, max_p_t, min_gain)}{selection_text(tables, FATES)}\n"
    )
    text += "".join(f"\n{id}: {why}" for id, why in named.items())
    summary = os.path.join(config.out, "select")
    content = dict(k=config.k, n=n, max_p_t=max_p_t, min_gain=min_gain, chosen=chosen)
    write_json(summary + ".json", dict(content, tables=tables, named=named))
    draw_selection(tables, FATES, summary + ".png")
    root = config.media_root or os.path.dirname(config.data) or "."
    print(f"{text}\n\n{path}, whose clip paths start at {root}")
    return [records[id] for id in chosen]


def write_selected(config, records, chosen):
    """Write the records of the chosen ids in that order -> the path. records: {id: record}."""
    path = os.path.join(config.out, "selected")
    if config.data.endswith(".parquet"):  # may hold pictures, which JSON cannot
        import pyarrow.parquet

        place = {id: i for i, id in enumerate(records)}
        table = pyarrow.parquet.read_table(config.data).take([place[id] for id in chosen])
        pyarrow.parquet.write_table(table, f"{path}.part")
        os.replace(f"{path}.part", f"{path}.parquet")
        return f"{path}.parquet"
    texts = [json.dumps(records[id], ensure_ascii=False) for id in chosen]
    write(f"{path}.jsonl", "".join(text + "\n" for text in texts))
    return f"{path}.jsonl"


def main(config):
    """Run the parts that `part` names; only the first rank selects."""
    if config.part != "select":
        probe(config)
    if config.part != "probe" and int(os.environ.get("RANK", 0)) == 0:
        cut(config)


if __name__ == "__main__":
    run_script(main, Config)
