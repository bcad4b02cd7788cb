"""Curation by visual gain: which questions does seeing the future help with? (sec. 3.2)

    p_t = right answers of n rollouts under (t): observed prefix + question
    p_v = right answers of n rollouts under (v): the same, plus the later key frames as images
    gain = p_v - p_t;  keep p_t <= 6 and gain >= 2 (of n = 8)
    rank by gain, take the top K = 50,000

    python curate.py --model DIR --data pool.jsonl --out runs/curate --k 50000    # both steps
    torchrun --nproc_per_node 8 curate.py --step probe --model DIR --data pool.jsonl
    python curate.py --step select --data pool.jsonl --k 20000 --min_gain 3       # cut again

*Probe* appends one line a candidate to OUT/probe_RANK.jsonl and merges them into OUT/probe.jsonl,
in the pool's order. A second run does what is missing; what could not be read is tried again, and
what the judge gave no verdict on is judged again from its stored responses, without generating.
Seconds go to OUT/probe.seconds_RANK.jsonl: they differ from run to run, the probe file does not,
whatever the number of ranks. *Select* is a pure function of that file and writes OUT/selected.jsonl
(or .json, .parquet, as the pool is), best first, and OUT/select.txt, .json and .png.

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
 5. `--score logprob`, ours: the mean token log-probability of the gold answer under v minus that
    under t, one forward each, instead of 2n rollouts. It goes to OUT/logprob.jsonl; what is not
    negative is kept and ranked.

Axis letters: B prompts (t and v of each candidate), L tokens, D hidden, V vocabulary.
"""

import dataclasses
import glob
import hashlib
import json
import math
import os
import re
import time
from collections import Counter

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.formats import Frame, RecordError, Row, Skipped, answer_of, read_record, read_records
from common.judge import Judge
from common.runs import leave, newest, parse_config, read_lines, set_up_ranks, write
from data import DataConfig, Samples, encode, loader, model_inputs, to_device
from latent_decode import generate
from model import LATENT, best_attention, load
from rewards import accuracy_reward, needs_judge, pick

LATER = " Later frames of the same clip: "


@dataclasses.dataclass
class Config(DataConfig):
    step: str = "both"  # probe | select | both
    model: str = ""  # probe: the base model's folder, run's folder or hub id
    data: str = ""  # the pool of candidates: training records, see data.py
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    out: str = "runs/curate"  # the folder of the probe and of the selection
    # counts (paper) | logprob (of the gold answer, one forward a condition)  # ours
    score: str = "counts"
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
    bf16: bool = True  # weights on CUDA  # paper Table 8
    cuda_graph: bool = False  # replay a captured decoding step  # ours
    # select
    k: int = 50000  # rows to choose; 0 = all that are kept  # paper sec. 3.2
    max_p_t: int = -1  # keep p_t <= this; -1 = 6 for n = 8, floor(6n/8)  # paper sec. 3.2
    min_gain: int = -1  # keep p_v - p_t >= this; -1 = 2 for n = 8, ceil(2n/8)  # paper sec. 3.2

    def __post_init__(self):
        super().__post_init__()
        if self.step not in ("probe", "select", "both") or self.score not in ("counts", "logprob"):
            raise ValueError(
                f"step is {self.step!r} (probe | select | both), score {self.score!r} (counts | "
                "logprob)"
            )
        if min(self.rollouts, self.k + 1) < 1:
            raise ValueError(
                f"rollouts is {self.rollouts}, expected at least 1; k {self.k}, at least 0"
            )

    @property
    def name(self):
        return "probe" if self.score == "counts" else "logprob"


HARMLESS = {
    "step",
    "data",
    "media_root",
    "out",
    "k",
    "max_p_t",
    "min_gain",
    "judge_url",
    "workers",
    "max_bad",
    "cuda_graph",
}  # may differ between two runs on one probe file


def visual_gain(p_t, p_v):
    """sec. 3.2: how much the intermediate future frames help, p_v - p_t.

    Counts of n rollouts, or log-probabilities.
    """
    return p_v - p_t


def keep(p_t, p_v, max_p_t=6, min_gain=2):
    """sec. 3.2: not solved without the future (p_t <= 6), and helped by it (gain >= 2).

    Counts of n = 8.
    """
    return p_t <= max_p_t and visual_gain(p_t, p_v) >= min_gain


def select(rows, k, max_p_t=6, min_gain=2):
    """sec. 3.2: the kept rows by falling gain, the first k of them (0 = all).

    Rows: dicts with id, p_t, p_v.

    Ties (ours): the lower p_t first, then the smaller sha256 of the id. The order of `rows` does
    not matter.
    """
    kept = [row for row in rows if keep(row["p_t"], row["p_v"], max_p_t, min_gain)]
    kept.sort(
        key=lambda r: (
            -visual_gain(r["p_t"], r["p_v"]),
            r["p_t"],
            hashlib.sha256(r["id"].encode()).hexdigest(),
        )
    )
    return kept[: k or None]


def thresholds(n):
    """(max_p_t, min_gain) for n rollouts: the paper's 6 and 2 of 8 as shares, floor(6n/8) and
    ceil(2n/8). Ours.
    """
    return 6 * n // 8, -(-2 * n // 8)


def limits(config, n):
    """(max_p_t, min_gain) of this run: flags, else the paper's shares of n.

    Log-probabilities only need gain >= 0. Ours.
    """
    if config.score == "logprob":
        return math.inf, 0
    return tuple(
        flag if flag >= 0 else share
        for flag, share in zip((config.max_p_t, config.min_gain), thresholds(n))
    )


def false_keep_rate(n, p, max_p_t=6, min_gain=2):
    """P(keep) if the future does not help: p_t and p_v independent Binomial(n, p). Exact.

    Source: ours.
    """
    pmf = [math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(n + 1)]
    return sum(
        pmf[t] * pmf[v] for t in range(n + 1) for v in range(n + 1) if keep(t, v, max_p_t, min_gain)
    )


def noise_table(n, max_p_t, min_gain):
    """The expected false-keep rate as text, and what more rollouts would make of it at accuracy
    0.5.
    """
    rates = ", ".join(
        f"{p}: {false_keep_rate(n, p, max_p_t, min_gain):.1%}" for p in (0.1, 0.25, 0.5, 0.75, 0.9)
    )
    more = ", ".join(
        f"n = {m}: {false_keep_rate(m, 0.5, *thresholds(m)):.1%}" for m in (2 * n, 4 * n)
    )
    return (
        f"kept by chance (p_t <= {max_p_t}, gain >= {min_gain} of n = {n}) where the future does "
        "not help, by true "
        f"accuracy: {rates}; at 0.5 with {more}"
    )


def with_future(row):
    """Condition v of a Row: its future frames as images behind the last picture of the prompt.

    Sec. 3.2; words ours.
    """
    last = (
        max((i for i, part in enumerate(row.prompt) if not isinstance(part, str)), default=-1) + 1
    )
    future = [part for part in row.response if isinstance(part, Frame)]
    return dataclasses.replace(
        row, prompt=[*row.prompt[:last], LATER, *future, *row.prompt[last:]], response=[]
    )


def final_answer(response):
    """A response with its special tokens -> the answer's text or None, as the file's docstring
    says. Source: ours.
    """
    answer = answer_of(response)
    if answer is not None or not response.rstrip().endswith(("<|im_end|>", "<|endoftext|>")):
        return answer
    lines = [line.strip() for line in re.sub(r"<[/|\w][^<>\s]*>", "\n", response).split("\n")]
    return next((line for line in reversed(lines) if line), None)


def mark(rows, responses, judge=None):
    """Rows and their responses (a list each) -> lists of True | False | None (unjudged). sec.
    3.2; see rewards.py.

    judge: a rewards.Judge or None; asked once for equal answers, and only where the rule says no.
    """
    said = [[f"<answer>{final_answer(r) or ''}</answer>" for r in mine] for mine in responses]
    asked = (
        {}
        if judge is None
        else {
            (row.question, row.answer, answer_of(a)): None
            for row, mine in zip(rows, said)
            for a in mine
            if needs_judge(a, row.answer, row.options)
        }
    )
    asked.update(zip(asked, judge(list(asked))) if asked else ())
    return [
        [
            asked.get(
                (row.question, row.answer, answer_of(a)),
                bool(accuracy_reward(a, row.answer, row.options)),
            )
            for a in mine
        ]
        for row, mine in zip(rows, said)
    ]


@torch.no_grad()
def mean_logprob(model, batch, empty):
    """Mean log-probability of the gold answer's tokens in `<answer>gold</answer>` -> list of B
    floats. Ours.

    batch: prompts with that answer as labels, right-padded; empty: the labels of an empty answer:
    tokens an answer shares with it at either end are the tags', and are left out.
    """
    h, _ = model.hidden(**model_inputs(batch))  # (B, L, D)
    means = []
    for b, labels in enumerate(batch["labels"]):
        at = (labels != -100).nonzero()[:, 0]  # (answer tokens,)
        ids = labels[at].tolist()
        head = min(len(os.path.commonprefix([ids, empty])), len(ids) - 1)
        tail = min(len(os.path.commonprefix([ids[::-1], empty[::-1]])), len(ids) - 1 - head)
        at = at[head : len(at) - tail]
        logp = model.lm_head(h[b, at - 1]).float().log_softmax(-1)  # (answer tokens, V)
        means.append(logp.gather(1, labels[at, None]).mean().item())
    return means


class Pool:
    """The candidates: records as they stand, ids, and a Row each. Source: ours.

    Where there is no Row, a Skipped says why. An id is the record's own, else "file name:index".
    Raises SystemExit without --data, ValueError for ids used twice.
    """

    def __init__(self, config):
        if not config.data:
            raise SystemExit(
                "--data is missing: a .json, .jsonl or .parquet file of training records"
                " (see common/formats.py)"
            )
        self.records, self.ids, self.rows = read_records(config.data), [], []
        root = config.media_root or os.path.dirname(os.path.abspath(config.data))
        name = os.path.basename(config.data)
        for i, record in enumerate(self.records):
            has_id = isinstance(record, dict) and "id" in record
            self.ids.append(str(record["id"]) if has_id else f"{name}:{i}")
            self.rows.append(candidate(record, f"{config.data}:{i}", root))
        self.row = dict(zip(self.ids, self.rows))
        if len(self.row) < len(self.ids):
            twice = Counter(self.ids).most_common(1)[0][0]
            raise ValueError(f"{config.data}: ids are not unique, e.g. {twice!r}")

    def of(self, ids):
        """The rows of some ids."""
        return [self.row[id] for id in ids]

    def blocks(self, size):
        """Neighbours in the pool that are generated together: lists of ids."""
        return [self.ids[i : i + size] for i in range(0, len(self.ids), size)]


def candidate(record, where, media_root):
    """A record -> its Row, or a Skipped if it cannot be probed. Source: ours."""
    try:
        row = read_record(record, where, media_root)
    except RecordError as e:
        return Skipped(where, str(e).removeprefix(f"{where}: "))
    if not any(isinstance(part, Frame) for part in row.response):
        return Skipped(where, "no future frame, so there is no condition v")
    if row.options and pick(row.answer, row.options) is None:
        return Skipped(where, f"the answer {row.answer!r} is none of {row.options}")
    return row


def prompt_hash(row):
    """What is asked, as 16 hex digits: texts, key frames by file name, gold answer, options.

    Source: ours.
    """

    def plain(part):
        return (
            part
            if isinstance(part, str)
            else [
                hashlib.sha256(part[0]).hexdigest()
                if isinstance(part[0], bytes)
                else os.path.basename(part[0]),
                *part[1:],
            ]
        )

    future = [part for part in row.response if isinstance(part, Frame)]
    told = json.dumps(
        [[plain(part) for part in (*row.prompt, "future", *future)], row.answer, row.options]
    )
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def read_probe(config, ids, rows):
    """OUT's probe, finished or not -> {id: line}.

    Raises SystemExit if it mixes settings or is of another pool. Ours.
    """
    lines, base = {}, os.path.join(glob.escape(config.out), config.name)
    for path in sorted(glob.glob(base + ".jsonl") + glob.glob(base + "_*.jsonl")):
        for line in read_lines(path):
            if not {"p_t", "logp_t"} & lines.get(line["id"], {}).keys():  # a result is not replaced
                lines[line["id"]] = line
    kinds = sorted(
        {
            json.dumps([line[k] for k in ("n", "seed", "decode", "model", "judge")])
            for line in lines.values()
        }
    )
    if len(kinds) > 1:
        raise SystemExit(
            f"{config.out}: lines of different settings in one probe: {kinds[0]} and {kinds[1]}"
        )
    for id, row in zip(ids, rows):
        if (
            id in lines
            and "skipped" not in lines[id]
            and lines[id]["prompt"] != (prompt_hash(row) if isinstance(row, Row) else None)
        ):
            raise SystemExit(
                f"{row.where}: {config.out} holds {id!r} with another question, answer or frames: "
                "this is a "
                "probe of another pool, choose another --out"
            )
    return lines


def results(rows, responses, judge, config):
    """Candidates and their responses [under t, under v] -> what their lines say: p_t and p_v, or
    unjudged. sec. 3.2.

    A rollout without an answer is wrong, and counted in no_answer. Responses are kept where they
    are still to be judged.
    """
    marks = mark(
        [row for row in rows for _ in "tv"], [r for both in responses for r in both], judge
    )
    found = []
    for row, both, t, v in zip(rows, responses, marks[::2], marks[1::2]):
        unjudged, empty = (t + v).count(None), sum(not final_answer(r) for r in both[0] + both[1])
        line = (
            dict(unjudged=unjudged, no_answer=empty)
            if unjudged
            else dict(p_t=sum(t), p_v=sum(v), no_answer=empty)
        )
        if unjudged:
            tqdm.write(f"unjudged {row.where}: {unjudged} of {len(t + v)} rollouts")
        if unjudged:
            line["responses"] = both
        found.append(line)
    return found


def probe(config, judge=None):
    """Score the candidates of the pool that have no score yet -> {id: line}. Source: sec. 3.2.

    judge: default a Judge if judge_url is set. Raises SystemExit if OUT holds other settings or
    another pool.
    """
    rank, world, device = set_up_ranks()
    pool = Pool(config)
    if judge is None:
        judge = make_judge(config)
    path = os.path.join(config.out, config.name)
    settings = settings_of(config)
    done = read_probe(config, pool.ids, pool.rows)
    refuse_other_settings(path, settings, done)
    if world > 1:
        dist.barrier()  # nobody writes before everybody has read
    if rank == 0:
        write(path + ".settings.json", json.dumps(settings, indent=1))
        announce(config, pool, judge)

    with Pen(path, rank, pool, config, settings) as pen:
        # what the judge gave no verdict on is judged again, without generating
        if rank == 0 and judge:
            waiting = [id for id in pool.ids if "unjudged" in done.get(id, {})]
            responses = [done[id]["responses"] for id in waiting]
            pen.write(waiting, results(pool.of(waiting), responses, judge, config))
        # a block is generated as a whole, also where only a part of it is missing
        missing = {id for id in pool.ids if id not in done or "skipped" in done[id]}
        blocks = [block for block in pool.blocks(config.batch) if missing.intersection(block)]
        probe_blocks(blocks[rank::world], missing, pool, pen, judge, config, device)

    if world > 1:
        dist.barrier()
    if rank == 0:
        done = merge(path, pool, config)
        report_counts(path, pool, done, judge)
    return done


def make_judge(config):
    """The judge of the settings or None.

    Rule and judge must not mix in one file, so both flags or none.
    """
    if bool(config.judge_url) != bool(config.judge_model):
        raise SystemExit("--judge_url and --judge_model go together")
    return Judge(config.judge_url, config.judge_model) if config.judge_url else None


def settings_of(config):
    """What two runs on one probe file must share, as a dict. Source: ours."""
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in HARMLESS}
    folder = newest(config.model)
    weights = os.path.join(
        folder, "config.json"
    )  # a model trained anew in a folder is another model
    written = os.path.getmtime(weights) if os.path.exists(weights) else None
    return dict(settings, model=folder, written=written)


def refuse_other_settings(path, settings, done):
    """Raises SystemExit if the results in OUT were made with other settings."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if not done:
        return
    old = {}
    if os.path.exists(path + ".settings.json"):
        with open(path + ".settings.json") as f:
            old = json.load(f)
    changed = sorted(k for k in {*old, *settings} if old.get(k) != settings.get(k))
    if changed:
        raise SystemExit(
            f"{os.path.dirname(path)} holds a probe with other values of {', '.join(changed)}: "
            "choose another --out"
        )


def announce(config, pool, judge):
    """What one should know before the hours are spent."""
    if config.score != "counts":
        print("one forward a condition")
        return
    print(noise_table(config.rollouts, *limits(config, config.rollouts)))
    rows = [row for row in pool.rows if isinstance(row, Row)]
    if judge is None and any(not row.options for row in rows):
        print("open answers are judged by exact match alone: no --judge_url")


class Pen:
    """Writes the lines of one rank: each with the settings it was made with. Source: ours."""

    def __init__(self, path, rank, pool, config, settings):
        self.pool = pool
        names = ("temperature", "top_p", "max_new_tokens", "max_latents", "batch")
        self.common = dict(
            n=config.rollouts,
            seed=config.seed,
            decode={name: settings[name] for name in names},
            model=settings["model"],
            judge=config.judge_model,
        )
        self.lines = open(f"{path}_{rank}.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.clock = open(f"{path}.seconds_{rank}.jsonl", "a", 1)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.lines.close()
        self.clock.close()

    def write(self, ids, lines):
        """A line for each id: {p_t, p_v, ...}, {unjudged, ...} or {skipped: why}."""
        for id, line, row in zip(ids, lines, self.pool.of(ids)):
            if "skipped" in line:
                tqdm.write(f"skipped {row.where}: {line['skipped']}")
            prompt = prompt_hash(row) if isinstance(row, Row) else None
            line = dict(id=id, **line, **self.common, prompt=prompt)
            self.lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.lines.flush()

    def tick(self, block, began):
        """How long a block took.

        Kept apart, so that the probe file does not differ from run to run.
        """
        seconds = round(time.time() - began, 4)
        self.clock.write(json.dumps(dict(ids=block, seconds=seconds)) + "\n")


def probe_blocks(blocks, missing, pool, pen, judge, config, device):
    """Generate and judge this rank's blocks, one after another."""
    if not blocks:
        return
    model, tokenizer = load_to_decode(config, device)
    usable, prompts, plan = [], [], []
    for block in blocks:
        usable.append([id for id in block if isinstance(pool.row[id], Row)])
        before = len(prompts)
        for row in pool.of(usable[-1]):
            prompts += [dataclasses.replace(row, response=[]), with_future(row)]  # t, v, t, v, ...
        plan.append(list(range(before, len(prompts))))
    counts = config.score == "counts"
    samples = Samples(prompts, tokenizer, config, train=not counts)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    side = "left" if counts else "right"
    batches = loader(samples, plan, config.workers, pad_id=pad, side=side)

    rank = int(os.environ.get("RANK", 0))
    total = sum(len(block) for block in blocks)
    with tqdm(
        total=total, desc=config.name, unit=" candidates", disable=rank > 0, mininterval=2
    ) as bar:
        for block, good, batch in zip(blocks, usable, batches):
            began = time.time()
            lines = {id: dict(skipped=pool.row[id].why) for id in block if id not in good}
            lines.update(unreadable(good, batch))
            todo = [id for id in good if id in missing and id not in lines]
            if todo:
                values = measure(model, tokenizer, to_device(batch, device), config, block)
                value_of = dict(zip(batch["kept"], values))
                places = [good.index(id) for id in todo]
                pairs = [(value_of[2 * k], value_of[2 * k + 1]) for k in places]
                lines.update(zip(todo, score_pairs(pool.of(todo), pairs, judge, config)))
            ids = [id for id in block if id in missing]
            pen.write(ids, [lines[id] for id in ids])
            pen.tick(block, began)
            bar.update(len(block))


def load_to_decode(config, device):
    """The probed model and its tokenizer, on the device."""
    bf16 = config.bf16 and device.type == "cuda"
    dtype = torch.bfloat16 if bf16 else torch.float32
    attention = best_attention() if bf16 else "sdpa"
    model, tokenizer = load(newest(config.model), dtype=dtype, attn_implementation=attention)
    return model.to(device).eval(), tokenizer


def unreadable(ids, batch):
    """The candidates of a block of which a prompt (t or v) could not be read -> {id: line}."""
    reasons = iter(batch["skipped"])
    lost = sorted({*range(2 * len(ids))} - {*batch["kept"]})
    return {ids[k // 2]: dict(skipped=next(reasons).why) for k in lost}


def score_pairs(rows, pairs, judge, config):
    """Rows and what was measured under (t, v) -> the content of their lines. Source: sec. 3.2."""
    if config.score == "counts":
        return results(rows, pairs, judge, config)
    return [dict(logp_t=t, logp_v=v) for t, v in pairs]


def merge(path, pool, config):
    """The ranks' files -> one, in the pool's order -> {id: line}."""
    done = read_probe(config, pool.ids, pool.rows)
    place = {id: i for i, id in enumerate(pool.ids)}
    order = sorted(done, key=lambda id: place.get(id, len(place)))
    write(path + ".jsonl", "".join(json.dumps(done[id], ensure_ascii=False) + "\n" for id in order))
    for part in glob.glob(glob.escape(path) + "_*.jsonl"):
        os.remove(part)
    return done


def report_counts(path, pool, done, judge):
    """Print how many candidates are done, skipped, unjudged, and what it took."""
    clocks = glob.glob(glob.escape(path) + ".seconds_*.jsonl")
    seconds = sum(line["seconds"] for clock in clocks for line in read_lines(clock))
    count = Counter()
    for id in pool.ids:
        count[next((why for why in ("skipped", "unjudged") if why in done[id]), "done")] += 1
    counts = ", ".join(f"{n} {what}" for what, n in sorted(count.items()))
    print(
        f"{path}.jsonl: {len(pool.ids)} candidates, {counts}, {seconds:.0f} s over all runs and "
        "ranks"
    )
    if judge is not None and judge.failures:
        reasons = ", ".join(f"{n} x {why}" for why, n in judge.failures.most_common())
        print(f"no verdict from the judge: {reasons}")


def measure(model, tokenizer, batch, config, block):
    """A batch of prompts -> for each of them its n responses (counts) or its mean log-probability
    (logprob). Ours.
    """
    if config.score == "logprob":
        labels = encode(Row("", "", [], [], ""), tokenizer, config)["labels"]
        empty = [label for label in labels if label != -100]
        return [round(x, 6) for x in mean_logprob(model, batch, empty)]
    seed = hashlib.sha256(json.dumps([config.seed, *block]).encode()).digest()[:7]  # 56 bits
    out = generate(
        model,
        model_inputs(batch),
        n=config.rollouts,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        max_latents=config.max_latents,
        cuda_graph=config.cuda_graph,
        generator=torch.Generator().manual_seed(int.from_bytes(seed, "big")),
    )
    texts = tokenizer.batch_decode([t[:length] for t, length in zip(out.tokens.cpu(), out.lengths)])
    texts = [re.sub(f"(?:{re.escape(LATENT)}\\s*)+", LATENT, text) for text in texts]
    return [texts[i : i + config.rollouts] for i in range(0, len(texts), config.rollouts)]


FATES = ("chosen", "beyond K", "p_t too high", "gain too low", "unjudged", "skipped", "missing")


def fate(line, chosen, max_p_t, min_gain):
    """A probe's line (or None), and whether it was chosen -> which of FATES became of the
    candidate. sec. 3.2.
    """
    if chosen or line is None or "p_t" not in line:
        return (
            "chosen"
            if chosen
            else "missing"
            if line is None
            else "unjudged"
            if "unjudged" in line
            else "skipped"
        )
    return (
        "beyond K"
        if keep(line["p_t"], line["p_v"], max_p_t, min_gain)
        else "p_t too high"
        if line["p_t"] > max_p_t
        else "gain too low"
    )


def cut(config):
    """Choose from the probe's file.

    Write the rows and the summary -> the chosen records, best first.

    The records are those of the pool, untouched: their relative clip paths still start at the
    pool's folder. Source: sec. 3.2, Fig. 6.
    """
    pool = Pool(config)
    lines = read_probe(config, pool.ids, pool.rows)
    if not lines:
        raise SystemExit(f"{config.out} holds no {config.name}.jsonl: run --step probe first")
    n = next(iter(lines.values()))["n"]
    max_p_t, min_gain = limits(config, n)
    for line in lines.values():
        if "logp_t" in line:
            line.update(p_t=line["logp_t"], p_v=line["logp_v"])
    scored = [lines[id] for id in pool.ids if "p_t" in lines.get(id, {})]
    chosen = [line["id"] for line in select(scored, config.k, max_p_t, min_gain)]  # best first
    fates = {id: fate(lines.get(id), id in {*chosen}, max_p_t, min_gain) for id in pool.ids}

    counts = config.score == "counts"
    suffix, kind = "" if counts else "_logprob", os.path.splitext(config.data)[1]
    out, summary = (os.path.join(config.out, name + suffix) for name in ("selected", "select"))
    picked = write_selected(out + kind, pool, chosen, config.data)

    tables = tabulate(pool, lines, fates, with_gain=counts)
    named = {
        id: lines[id].get("skipped") or f"{lines[id]['unjudged']} rollouts unjudged"
        for id in pool.ids
        if fates[id] in ("unjudged", "skipped")
    }
    text = f"{len(chosen)} of {len(pool.ids)} candidates chosen by {config.score}"
    if counts:
        empty = sum(line.get("no_answer", 0) for line in lines.values())
        text += f"; {empty} rollouts without an answer (wrong)\n{noise_table(n, max_p_t, min_gain)}"
    text += "".join(table_text(by, table) for by, table in tables.items())
    text += "\n" + "".join(f"\n{id}: {why}" for id, why in named.items())
    write(summary + ".txt", text + "\n")
    settings = dict(score=config.score, k=config.k, n=n, min_gain=min_gain)
    settings.update(max_p_t=max_p_t if counts else None)
    content = dict(settings, chosen=chosen, tables=tables, named=named)
    write(summary + ".json", json.dumps(content, indent=1, ensure_ascii=False))
    draw(scored, fates, tables, summary + ".png")
    root = config.media_root or os.path.dirname(config.data) or "."
    print(f"{text}\n\n{out}{kind}, whose clip paths start at {root}")
    return picked


def write_selected(path, pool, chosen, source):
    """The chosen records in the format of the pool -> the records.

    Path: .jsonl, .json or .parquet.
    """
    place = {id: i for i, id in enumerate(pool.ids)}
    picked = [pool.records[place[id]] for id in chosen]
    texts = [json.dumps(record, ensure_ascii=False, default=str) for record in picked]
    if path.endswith(".parquet"):
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(source)
        pyarrow.parquet.write_table(table.take([place[id] for id in chosen]), path + ".part")
        os.replace(path + ".part", path)
    elif path.endswith(".jsonl"):
        write(path, "".join(text + "\n" for text in texts))
    else:
        write(path, "[" + ",\n ".join(texts) + "]\n")
    return picked


def tabulate(pool, lines, fates, with_gain):
    """How many candidates had which fate -> {by: {key: Counter}}.

    By all, category, future frames, gain.
    """
    keys = {"all": {}, "category": {}, "future frames": {}} | ({"gain": {}} if with_gain else {})
    for id in pool.ids:
        row, line = pool.row[id], lines.get(id, {})
        keys["all"][id], readable = "all", isinstance(row, Row)
        keys["category"][id] = row.group if readable else "?"
        frames = [part for part in row.response if isinstance(part, Frame)] if readable else []
        keys["future frames"][id] = len(frames) if readable else "?"
        if with_gain:  # Fig. 6
            keys["gain"][id] = visual_gain(line["p_t"], line["p_v"]) if "p_t" in line else "?"
    tables = {}
    for by, key_of in keys.items():
        order = sorted(set(key_of.values()), key=lambda key: (isinstance(key, str), key))
        tables[by] = {key: Counter() for key in order}
        for id, key in key_of.items():
            tables[by][key][fates[id]] += 1
    return tables


def table_text(by, table):
    """One table of `tabulate` as text."""
    lines = [f"\n\n{by:<16}" + "".join(f"{fate:>14}" for fate in FATES)]
    for key, count in table.items():
        lines.append(f"{key:<16}" + "".join(f"{count[fate]:>14}" for fate in FATES))
    return "\n".join(lines)


def draw(scored, fates, tables, png):
    """The selection as a picture: how many candidates have which gain (Fig. 6), category and
    number of future frames.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        1, 3, figsize=(12, 3.4), constrained_layout=True, width_ratios=(2, 1, 1)
    )
    gains = {
        f: [visual_gain(x["p_t"], x["p_v"]) for x in scored if fates[x["id"]] == f]
        for f in FATES[:4]
    }
    whole = all(isinstance(g, int) for mine in gains.values() for g in mine)
    flat = sum(gains.values(), [0])
    edges = [g - 0.5 for g in range(min(flat), max(flat) + 2)] if whole else 40
    axes[0].hist(list(gains.values()), edges, stacked=True, rwidth=0.9)
    axes[0].locator_params(axis="x", integer=whole)
    axes[0].set(
        xlabel="gain, p_v - p_t" if whole else "gain in mean log-probability", ylabel="candidates"
    )
    for ax, by in zip(axes[1:], ("category", "future frames")):
        below = [0] * len(tables[by])
        for f in FATES:
            counts = [count[f] for count in tables[by].values()]
            ax.bar([str(key) for key in tables[by]], counts, bottom=below, label=f)
            below = [a + b for a, b in zip(below, counts)]
        ax.set_xlabel(by)
    axes[1].tick_params(axis="x", rotation=30)
    axes[2].legend(fontsize=7, frameon=False)
    fig.savefig(png, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    config = parse_config(Config)
    if config.step != "select":
        probe(config)
    if config.step != "probe" and int(os.environ.get("RANK", 0)) == 0:
        cut(config)
    leave()
