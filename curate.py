"""Curation by visual gain: which questions does seeing the future help with? (sec. 3.2)

    p_t = right answers of n rollouts under (t): observed prefix + question
    p_v = right answers of n rollouts under (v): the same, plus the later key frames as images
    gain = p_v - p_t;  keep p_t <= 6 and gain >= 2 (of n = 8)
    rank by gain, take the top K = 50,000

    python curate.py --model DIR --data pool.jsonl --out runs/curate --k 50000    # both parts
    torchrun --nproc_per_node 8 curate.py --part probe --model DIR --data pool.jsonl
    python curate.py --part select --data pool.jsonl --k 20000 --min_gain 3       # cut again

*Probe* writes a line a candidate to OUT/probe.jsonl, in the pool's order. A second run does what is
missing (common/walk.py); what the judge gave no verdict on is judged again from its stored
responses, without generating. *Select* is a pure function of that file. It writes OUT/selected
(.jsonl, or .parquet as the pool), best first, and OUT/select.txt, .json and .png.

How an answer is read: the first closed <answer>; a model that has never learnt the tags may do
without, then it is the last line that is not empty, provided the response came to its end. What is
right: rewards.py's rule, then its judge if there is one. A candidate of which any rollout is
unjudged counts as unjudged, never as wrong.

A candidate is generated with its block (`batch` neighbours in the pool), whose random numbers
follow from the seed and its ids: neither ranks, order nor what was done before change them, or the
rounding, which seeds for single rows would not fix.

Where this differs from the paper (the authors released no code for this part):
 1. Ties, which the paper leaves open, go to the lower p_t, then to the smaller sha256 of the id.
 2. With another n the thresholds keep their shares: p_t <= floor(6n/8), gain >= ceil(2n/8). Flags
    overrule both.
 3. Sampling is that of the RL stage (temperature 0.9, top-p 0.99); future frames have the pixel
    budget of observed ones.
 4. The noise is stated: with equal true accuracy 0.5 more than a fifth of the candidates pass at n
    = 8 by chance.
A cheaper score, one forward instead of 2n rollouts, is in variants/logprob_gain.py.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections import Counter

import torch

from common.cli import run_script
from common.formats import (
    Frame,
    RecordError,
    Row,
    Skipped,
    answer_of,
    read_record,
    read_records,
    report_bad,
)
from common.judge import Judge
from common.report import draw_selection, selection_text, tabulate_selection
from common.rollouts import one_mark_a_span
from common.runs import Machine, need_data, write, write_json
from common.walk import Book, check_rows, read_book, settings_of, walk
from data import DataConfig, at_least, model_inputs, to_device
from latent_decode import generate
from rewards import accuracy_reward, needs_judge, pick

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
    temperature: float = 0.9  # official RL
    top_p: float = 0.99  # official RL
    max_new_tokens: int = 2048  # paper sec. 4 (FutureBench)
    max_latents: int = 8  # longest span: 2 * l_max  # official
    # candidates generated together: 2 * n * batch rows; decides the random numbers  # ours
    batch: int = 4
    # OpenAI-compatible server for open answers; "" = exact match alone; needs judge_model
    judge_url: str = ""
    judge_model: str = ""  # its model
    judge_args: str = ""  # JSON merged into each request to it, e.g. {"temperature": 1}  # ours
    bf16: bool = True  # weights on CUDA  # paper Table 8
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
FREE |= {"judge_args", "k", "max_p_t", "min_gain"}


# -------------------------------------------------------------------------------------- visual gain


def visual_gain(p_t, p_v):
    """sec. 3.2: how much the intermediate future frames help, p_v - p_t. Counts of n rollouts."""
    return p_v - p_t


def keep(p_t, p_v, max_p_t=6, min_gain=2):
    """sec. 3.2: not solved without the future (p_t <= 6), and helped by it (gain >= 2).

    Counts of n = 8.
    """
    return p_t <= max_p_t and visual_gain(p_t, p_v) >= min_gain


def select(rows, k, max_p_t=6, min_gain=2):
    """sec. 3.2: the kept rows by falling gain, the first k of them (0 = all).

    rows: dicts with id, p_t, p_v, in any order. Ties (ours): the lower p_t first, then the smaller
    sha256 of the id.
    """

    def rank(row):
        tie = hashlib.sha256(row["id"].encode()).hexdigest()
        return -visual_gain(row["p_t"], row["p_v"]), row["p_t"], tie

    kept = [row for row in rows if keep(row["p_t"], row["p_v"], max_p_t, min_gain)]
    return sorted(kept, key=rank)[: k or None]


def thresholds(n):
    """(max_p_t, min_gain): the paper's 6 and 2 of 8 as shares of n rollouts. Ours."""
    return 6 * n // 8, -(-2 * n // 8)


def limits(config):
    """(max_p_t, min_gain) of this run: flags, else the paper's shares of n. Ours."""
    max_p_t, min_gain = thresholds(config.rollouts)
    return (
        config.max_p_t if config.max_p_t >= 0 else max_p_t,
        config.min_gain if config.min_gain >= 0 else min_gain,
    )


def false_keep_rate(n, p, max_p_t=6, min_gain=2):
    """P(keep) if the future does not help: p_t and p_v independent Binomial(n, p). Exact.

    Source: ours.
    """
    pmf = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    rate = 0.0
    for t in range(n + 1):
        for v in range(n + 1):
            rate += pmf[t] * pmf[v] * keep(t, v, max_p_t, min_gain)
    return rate


def noise_text(n, max_p_t, min_gain):
    """The expected false-keep rate in words, and what more rollouts would make of it."""
    accuracies = (0.1, 0.25, 0.5, 0.75, 0.9)
    rates = [f"{p}: {false_keep_rate(n, p, max_p_t, min_gain):.1%}" for p in accuracies]
    more = [f"n = {m}: {false_keep_rate(m, 0.5, *thresholds(m)):.1%}" for m in (2 * n, 4 * n)]
    return (
        f"kept by chance (p_t <= {max_p_t}, gain >= {min_gain} of n = {n}) where the future does "
        f"not help, by true accuracy: {', '.join(rates)}; at 0.5 with {', '.join(more)}"
    )


# ---------------------------------------------------------------------------- prompts and responses


def without_future(row):
    """Condition t of a Row: what is observed, and the question. Sec. 3.2."""
    return dataclasses.replace(row, response=[])


def with_future(row):
    """Condition v of a Row: its future frames as images behind the last picture of the prompt.

    Sec. 3.2; words ours.
    """
    media = [i for i, part in enumerate(row.prompt) if not isinstance(part, str)]
    last = media[-1] + 1 if media else 0
    prompt = [*row.prompt[:last], LATER, *future_of(row), *row.prompt[last:]]
    return dataclasses.replace(row, prompt=prompt, response=[])


def future_of(row):
    """A Row's future frames."""
    return [part for part in row.response if isinstance(part, Frame)]


def final_answer(response):
    """A response with its special tokens -> its answer or None, by the file's docstring. Ours."""
    answer = answer_of(response)
    if answer is not None or not response.rstrip().endswith(("<|im_end|>", "<|endoftext|>")):
        return answer
    lines = [line.strip() for line in re.sub(r"<[/|\w][^<>\s]*>", "\n", response).split("\n")]
    return next((line for line in reversed(lines) if line), None)


def mark(rows, responses, judge=None):
    """Rows and their responses (a list each) -> lists of True | False | None (unjudged). Sec. 3.2.

    judge: common.judge's or None; asked once for equal answers, and only where the rule says no.
    """
    answers = [[f"<answer>{final_answer(r) or ''}</answer>" for r in some] for some in responses]
    verdicts = {}  # of the judge, by what it is asked
    if judge:
        for row, some in zip(rows, answers):
            for answer in some:
                if needs_judge(answer, row.answer, row.options):
                    verdicts[row.question, row.answer, answer_of(answer)] = None
        verdicts = dict(zip(verdicts, judge(list(verdicts)))) if verdicts else {}

    marks = []
    for row, some in zip(rows, answers):
        by_rule = [bool(accuracy_reward(answer, row.answer, row.options)) for answer in some]
        asked = [(row.question, row.answer, answer_of(answer)) for answer in some]
        marks.append([verdicts.get(item, right) for item, right in zip(asked, by_rule)])
    return marks


def results(rows, pairs, judge=None):
    """Candidates, and the responses of each [under t, under v] -> what their lines say: p_t and
    p_v, or unjudged. sec. 3.2.

    A rollout without an answer is wrong, and counted in no_answer. Responses are kept where they
    are still to be judged.
    """
    twice = [row for row in rows for _ in "tv"]
    marks = mark(twice, [responses for pair in pairs for responses in pair], judge)
    lines = []
    for row, pair, t, v in zip(rows, pairs, marks[::2], marks[1::2]):
        unjudged = (t + v).count(None)
        no_answer = sum(not final_answer(response) for response in pair[0] + pair[1])
        if unjudged:
            print(f"unjudged {row.where}: {unjudged} of {len(t + v)} rollouts")
            lines.append(dict(unjudged=unjudged, no_answer=no_answer, responses=pair))
        else:
            lines.append(dict(p_t=sum(t), p_v=sum(v), no_answer=no_answer))
    return lines


# -------------------------------------------------------------------------------------------- probe


def read_pool(config):
    """The pool -> {id: its record as it stands}, {id: its Row, or a Skipped that says why not}.

    An id is the record's own, else "file name:index". Raises SystemExit without --data, ValueError
    for ids used twice.
    """
    need_data(config)
    root = config.media_root or os.path.dirname(os.path.abspath(config.data))
    name, records, rows = os.path.basename(config.data), {}, {}
    for i, record in enumerate(read_records(config.data)):
        has_id = isinstance(record, dict) and "id" in record
        id = str(record["id"]) if has_id else f"{name}:{i}"
        if id in records:
            raise ValueError(f"{config.data}: ids are not unique, e.g. {id!r}")
        records[id], rows[id] = record, candidate(record, f"{config.data}:{i}", root)
    return records, rows


def candidate(record, where, media_root):
    """A record -> its Row, or a Skipped if it cannot be probed. Source: ours."""
    try:
        row = read_record(record, where, media_root)
    except RecordError as e:
        return Skipped(where, str(e).removeprefix(f"{where}: "))
    if not future_of(row):
        return Skipped(where, "no future frame, so there is no condition v")
    if row.options and pick(row.answer, row.options) is None:
        return Skipped(where, f"the answer {row.answer!r} is none of {row.options}")
    return row


def make_judge(config):
    """The judge of the settings or None; both flags or none, so that no file mixes two rules."""
    if bool(config.judge_url) != bool(config.judge_model):
        raise SystemExit("--judge_url and --judge_model go together")
    if not config.judge_url:
        return None
    return Judge(config.judge_url, config.judge_model, args=json.loads(config.judge_args or "{}"))


def roll_out(model, tokenizer, block, config):
    """The prompts of a Block -> n responses each: a list of lists of texts.

    The random numbers follow from the seed and the ids of the block. Source: ours.
    """
    seed = hashlib.sha256(json.dumps([config.seed, *block.ids]).encode()).digest()[:7]  # 56 bits
    out = generate(
        model,
        model_inputs(to_device(block.batch, model.device)),
        n=config.rollouts,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        max_latents=config.max_latents,
        cuda_graph=config.cuda_graph,
        generator=torch.Generator().manual_seed(int.from_bytes(seed, "big")),
    )
    texts = tokenizer.batch_decode([t[:n] for t, n in zip(out.tokens.cpu(), out.lengths)])
    texts = [one_mark_a_span(text) for text in texts]
    return [texts[i : i + config.rollouts] for i in range(0, len(texts), config.rollouts)]


def probe(config, judge=None):
    """Score the candidates of the pool that have no score yet -> {id: line}. Source: sec. 3.2.

    judge: default a Judge if judge_url is set. Raises SystemExit if OUT holds other settings or
    another pool, or if too many records are unusable.
    """
    machine = Machine(config.bf16)
    _, rows = read_pool(config)
    bad = [row for row in rows.values() if isinstance(row, Skipped)]
    report_bad(bad, len(rows), config.max_bad)
    judge = judge or make_judge(config)
    settings = settings_of(config, FREE)
    book = Book(config.out, "probe", rows, settings, machine)
    if machine.master:
        print(noise_text(config.rollouts, *limits(config)))
        if judge is None and any(isinstance(r, Row) and not r.options for r in rows.values()):
            print("open answers are judged by exact match alone: no --judge_url")

    # what the judge gave no verdict on is judged again, without generating
    if judge and machine.master:
        usable = [id for id, row in rows.items() if isinstance(row, Row)]
        waiting = [id for id in usable if "unjudged" in book.lines.get(id, {})]
        responses = [book.lines[id]["responses"] for id in waiting]
        judged = results([rows[id] for id in waiting], responses, judge)
        book.add(dict(zip(waiting, judged)))

    # p_t and p_v of what is missing, block by block
    if blocks := book.blocks(config.batch):
        model, tokenizer = machine.load(settings["model"])
        for block in walk(book, blocks, conditions, tokenizer, config):
            responses = roll_out(model, tokenizer, block, config)
            pairs = list(zip(responses[::2], responses[1::2]))
            lines = results([rows[id] for id in block.readable], pairs, judge)
            book.add(dict(zip(block.readable, lines)))

    lines = book.finish()
    if machine.master:
        report_probe(book, judge)
    return lines


def conditions(row):
    """What a candidate is asked: (t), then (v)."""
    return [without_future(row), with_future(row)]


def report_probe(book, judge):
    """Print how many candidates are done, skipped and unjudged."""
    count = Counter()
    for line in book.lines.values():
        count[next((why for why in ("skipped", "unjudged") if why in line), "done")] += 1
    counts = ", ".join(f"{n} {what}" for what, n in sorted(count.items()))
    print(f"{book.folder}/probe.jsonl: {len(book.rows)} candidates, {counts}")
    if judge is not None and judge.failures:
        reasons = ", ".join(f"{n} x {why}" for why, n in judge.failures.most_common())
        print(f"no verdict from the judge: {reasons}")


# ------------------------------------------------------------------------------------------- select

FATES = ("chosen", "beyond K", "p_t too high", "gain too low", "unjudged", "skipped", "missing")


def fate(line, chosen, max_p_t, min_gain):
    """A probe's line (or None), and whether it was chosen -> one of FATES. Sec. 3.2."""
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
    """Choose from the probe's file; write the rows and the summary -> the chosen records, best
    first. Source: sec. 3.2, Fig. 6.

    The records are those of the pool, untouched: their relative clip paths still start at the
    pool's folder.
    """
    # what is chosen, and what became of each candidate
    records, rows = read_pool(config)
    lines = read_book(config.out, "probe")
    if not lines:
        raise SystemExit(f"{config.out} holds no probe.jsonl: run --part probe first")
    check_rows(config.out, lines, rows)
    with open(os.path.join(config.out, "settings.json")) as f:
        n = json.load(f)["rollouts"]
    max_p_t, min_gain = limits(dataclasses.replace(config, rollouts=n))
    scored = [lines[id] for id in rows if "p_t" in lines.get(id, {})]
    chosen = [line["id"] for line in select(scored, config.k, max_p_t, min_gain)]  # best first
    fates = {id: fate(lines.get(id), id in {*chosen}, max_p_t, min_gain) for id in rows}

    # the records
    place = {id: i for i, id in enumerate(records)}
    path = write_selected(config, [records[id] for id in chosen], [place[id] for id in chosen])

    # tables, names and pictures
    gains = {line["id"]: visual_gain(line["p_t"], line["p_v"]) for line in scored}
    tables = tabulate_selection(rows, gains, fates)
    why = {id: lines[id].get("skipped", "unjudged") for id in rows if id in lines}
    named = {id: why[id] for id in rows if fates[id] in ("unjudged", "skipped")}
    no_answer = sum(line.get("no_answer", 0) for line in lines.values())
    text = (
        f"{len(chosen)} of {len(rows)} candidates chosen; {no_answer} rollouts without an answer "
        f"(wrong)\n{noise_text(n, max_p_t, min_gain)}"
    )
    text += selection_text(tables, FATES)
    text += "\n" + "".join(f"\n{id}: {reason}" for id, reason in named.items())
    content = dict(k=config.k, n=n, max_p_t=max_p_t, min_gain=min_gain)
    content.update(chosen=chosen, tables=tables, named=named)
    summary = os.path.join(config.out, "select")
    write(summary + ".txt", text + "\n")
    write_json(summary + ".json", content)
    draw_selection(tables, FATES, summary + ".png")
    root = config.media_root or os.path.dirname(config.data) or "."
    print(f"{text}\n\n{path}, whose clip paths start at {root}")
    return [records[id] for id in chosen]


def write_selected(config, records, places):
    """The chosen records, as JSON lines; of a parquet pool its rows at `places` -> the path."""
    path = os.path.join(config.out, "selected")
    if config.data.endswith(".parquet"):  # may hold pictures, which JSON cannot
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(config.data).take(places)
        pyarrow.parquet.write_table(table, f"{path}.part")
        os.replace(f"{path}.part", f"{path}.parquet")
        return f"{path}.parquet"
    texts = [json.dumps(record, ensure_ascii=False) for record in records]
    write(f"{path}.jsonl", "".join(text + "\n" for text in texts))
    return f"{path}.jsonl"


def main(config, probe=probe, cut=cut):
    """The parts that are asked for; the first rank alone selects. A variant brings its own two."""
    if config.part != "select":
        probe(config)
    if config.part != "probe" and int(os.environ.get("RANK", 0)) == 0:
        cut(config)


if __name__ == "__main__":
    run_script(main, Config)
