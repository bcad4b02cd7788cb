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
import glob
import hashlib
import json
import os
import re
import subprocess
import time
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from common.benchmarks import PAPER, read_benchmark
from common.clips import ClipError, film, load_frames, normalise, resize_and_cut
from common.formats import Skipped, answer_of
from common.intervals import bootstrap, wilson
from common.judge import add_verdicts
from common.report import as_text, paper_rows, score_rows, used, write_report
from common.runs import leave, newest, parse_config, read_lines, set_up_ranks, write_json
from data import DataConfig, Samples, loader, model_inputs, to_device
from latent_decode import generate, own_latent
from model import LATENT, best_attention, load
from rewards import diversity_reward, format_reward, pick, repetition_score, span_lengths


@dataclasses.dataclass
class Config(DataConfig):
    benchmark: str = ""  # futurebench | twiffbench | mcq; "" = any rows with options
    model: str = ""  # a model folder, or a run's folder (its newest checkpoint)
    data: str = (
        ""  # a file, a folder of files, or a hub id; with options (see data.py), or TwiFF-Bench
    )
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
    report: int = (
        24  # samples shown in report.html, spread over the groups; 0 = only its tables  # ours
    )
    bf16: bool = True  # weights on CUDA  # paper Table 8
    cuda_graph: bool = False  # replay a captured decoding step; not yet measured on a GPU  # ours

    def __post_init__(self):
        future = self.benchmark == "futurebench"
        self.num_frames = self.num_frames or (32 if future else 16)
        self.video_max_tokens = self.video_max_tokens or (12288 if future else 4096)
        self.max_new_tokens = self.max_new_tokens or (
            4096 if self.benchmark == "twiffbench" else 2048
        )
        super().__post_init__()
        if self.latents not in LATENTS:
            raise ValueError(f"latents is {self.latents!r}, expected one of {', '.join(LATENTS)}")


LATENTS = ("generated", "zero", "noise", "shuffled", "true", "pause", "none")


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


def format_table(table):
    """The summary as text."""
    return as_text(*score_rows(table))


NEEDS_FUTURES = ("true", "shuffled", "noise")
MEASURED = 64  # rows with futures that the scale of `noise` is measured on


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
    pairs = load_frames(future_frames(row), config.budgets[1])
    patches, grids = zip(*pairs)
    e = model.encode_frames(
        normalise(torch.cat(patches)).to(model.device), torch.stack(grids).to(model.device)
    )
    return list(e.split([int(grid.prod()) // 4 for grid in grids]))


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


def replacement(kind, model, rows, config, donor_of=None, scale=None, lost=None):
    """What is fed instead of the rows' own latents -> [frames of a row: [(n_m, D), ...]], or None.

    None for `generated` and `none`. It depends on the row alone: not on its batch, nor on ranks.
    donor_of: of `donors`; scale: of `measure_noise`. lost: gets {id: why} of each row whose futures
    cannot be read, which is fed zeros; None = that raises ClipError. Source: ours.
    """
    if kind in ("generated", "none"):
        return None
    D = model.config.text_config.hidden_size
    if kind == "zero":
        return [[torch.zeros(1, D, device=model.device)] for _ in rows]
    if kind == "pause":
        pause = model.get_input_embeddings().weight[model.config.latent_id].detach()
        return [[pause[None]] for _ in rows]
    if kind == "noise":
        return [list(draw_noise(row, scale, config)) for row in rows]
    vectors = []
    for row in rows:
        try:
            vectors.append(true_vectors(model, donor_of[row.id] if donor_of else row, config))
        except ClipError as e:
            if lost is None:
                raise
            lost[row.id] = f"its future frames cannot be fed: {e}"
            vectors.append([torch.zeros(1, D, device=model.device)])
    return vectors


def draw_noise(row, scale, config, spans=8):
    """Gaussian vectors of the true embeddings' scale (spans, max_latents, D), the row's own."""
    draw = hashlib.sha256(f"{config.seed} {row.id}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(draw[:7], "big"))
    noise = torch.randn(spans, config.max_latents, scale.shape[1], generator=generator)
    return scale[0] + scale[1] * noise.to(scale.device)


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


def evaluate(config, rows=None):
    """Run the evaluation -> {group: scores}, the same on every rank. Raises SystemExit, ValueError.

    A folder with results of the same settings is continued; of other settings: refused.
    """
    rank, world, device = set_up_ranks()
    rows, average, bad = rows_of(config, rows)
    folder = newest(config.model)
    settings = settings_of(config, folder)
    done = finished(config.out, settings)

    # nobody writes before everybody has read
    if world > 1:
        dist.barrier()
    os.makedirs(config.out, exist_ok=True)
    if rank == 0:
        write_json(os.path.join(config.out, "settings.json"), settings)
    lines = respond(config, folder, rows, done, rank, world, device)

    # all ranks' lines, in the rows' order
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, lines)
        lines = sum(gathered, [])
    line_of = done | {line["id"]: line for line in lines}
    lines = [line_of[row.id] for row in rows if row.id in line_of]
    add_verdicts(config.out, lines)

    table = summarise(lines, average, config.seed)
    if rank == 0:
        summary = dict(settings, **about(rows, lines, settings), average=average, scores=table)
        summary["unusable"] = [s._asdict() for s in bad]
        show(config.out, summary, lines, rows)
    return table


def rows_of(config, rows=None):
    """-> (rows, micro | macro, the records that cannot be used [Skipped]), the latter named.

    Raises SystemExit without data, ValueError for rows that cannot be scored.
    """
    average, bad = "micro", []
    if rows is None:
        if not config.data:
            raise SystemExit(
                "--data is missing: a .json, .jsonl or .parquet file of records with options "
                "(see data.py)"
            )
        root = config.media_root or None
        rows, average = read_benchmark(config.benchmark, config.data, root, bad)
    name_bad(bad, len(rows) + len(bad), "cannot be used and are outside the scores")
    rows = rows[: config.limit or None]
    if config.benchmark != "twiffbench":
        check_options(rows)
    check_futures(config.latents, rows)
    if len({row.id for row in rows}) < len(rows):
        raise ValueError(
            f"{config.data}: ids are not unique, so a resumed run could not tell its samples apart"
        )
    return rows, average, bad


def finished(out, settings):
    """The result lines in a folder, without those of unreadable samples: {id: line}.

    Raises SystemExit if they were made with other settings.
    """
    done = {}
    for path in glob.glob(os.path.join(glob.escape(out), "samples*.jsonl")):
        done |= {line["id"]: line for line in read_lines(path) if "skipped" not in line}
    if not done:
        return done
    path, before = os.path.join(out, "settings.json"), {}
    if os.path.exists(path):
        with open(path) as f:
            before = json.load(f)
    names = sorted(before.keys() | settings.keys())
    changed = [name for name in names if before.get(name) != settings.get(name)]
    if changed:
        raise SystemExit(
            f"{out} holds results with other settings of {', '.join(changed)}: choose another --out"
        )
    return done


def show(out, summary, lines, rows):
    """Write summary.json and report.html, and print the scores."""
    write_json(os.path.join(out, "summary.json"), summary)
    write_report(os.path.join(out, "report.html"), summary, lines, rows)
    every = summary["scores"]["all"]
    print(format_table(summary["scores"]))
    print(
        f"{summary['found']} of {summary['total']} samples found; "
        f"{summary['seconds']['all']:.3g} s and {every['tokens']:.1f} tokens an answer; "
        f"all = {summary['average']} average; {out}/report.html"
    )
    if waiting := every.get("waiting"):
        print(f"{waiting} responses wait for a judge: python -m common.judge {out} --model NAME")
    if summary["benchmark"] in PAPER:
        print("\nbeside what the paper published (not run here)")
        print(as_text(*paper_rows(summary)))
        print(used(summary))


MAX_BAD = 0.05  # share of records that may be unusable before a file is taken for misread


def name_bad(bad, total, what):
    """Name each record of `bad` ([Skipped]). Raises ValueError if they are too many of `total`."""
    if not bad:
        return
    if len(bad) > MAX_BAD * total:
        raise ValueError(f"{len(bad)} of {total} records {what}, among them {bad[0].why}")
    print(f"{len(bad)} of {total} records {what}:", *(s.why for s in bad), sep="\n  ")


def check_options(rows):
    """Name the rows whose answer is none of their options: they are scored wrong.

    Raises ValueError for a row without options, and if such rows are too many.
    """
    for row in rows:
        if not row.options:
            raise ValueError(f"{row.where}: no options; multiple choice needs them")
    bad = [
        Skipped(row.where, f"{row.where}: the answer {row.answer!r} is none of {row.options}")
        for row in rows
        if pick(row.answer, row.options) is None
    ]
    name_bad(bad, len(rows), "have an answer that is no option and are scored wrong")


def settings_of(config, folder):
    """What two runs must share for their samples to be of one kind, as a dict. Source: ours."""
    free = {"out", "workers", "cuda_graph", "report"}
    free |= {"batch"} if config.latents in ("noise", "shuffled") else {"batch", "limit"}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    written = os.path.join(
        folder, "config.json"
    )  # a model trained anew in the same folder is another model
    return dict(
        settings,
        model=folder,
        written=os.path.getmtime(written) if os.path.exists(written) else None,
    )


def about(rows, lines, settings):
    """What one needs to know of a result besides its scores, as a dict. Source: ours.

    seconds: a batch's wall time over its rows, by group (--batch 1 for the time one answer takes;
    paper's Table 7). prompt_hash: of the system message and the prompts, a medium by its kind.
    """
    read = [line for line in lines if "skipped" not in line]
    seconds = {}
    for group in [*sorted({line["group"] for line in read} - {"all"}), "all"]:
        values = [line["seconds"] for line in read if group in ("all", line["group"])]
        seconds[group] = round(float(np.mean(values)), 4) if values else 0.0

    prompts = []
    for row in rows:
        parts = [p if isinstance(p, str) else type(p).__name__ for p in row.prompt]
        prompts.append([settings["system"], *parts])
    names = ("l_max", "image_max_tokens", "video_max_tokens")
    budgets = DataConfig(**{name: settings[name] for name in names}).budgets

    return dict(
        found=len(read),
        total=len(rows),
        coverage=len(read) / len(rows),
        commit=commit(),
        seconds=seconds,
        missing=[dict(id=line["id"], why=line["skipped"]) for line in lines if "skipped" in line],
        no_option=[r.id for r in rows if r.options and pick(r.answer, r.options) is None],
        unparsed=sum(not line.get("parsed", line.get("picked") is not None) for line in read),
        judge_failures=sum("why" in line for line in read),
        frames=settings["num_frames"],
        pixels=dict(zip(("image", "future", "video"), budgets)),
        prompt_hash=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        generation=dict(greedy=True, **{k: settings[k] for k in ("max_new_tokens", "max_latents")}),
    )


def commit():
    """The code's git commit, or None outside a checkout or without git."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def respond(config, folder, rows, done, rank, world, device):
    """Generate what is missing, appending a line a sample -> this rank's new lines."""
    todo, plan = plan_of(config, rows, done, rank, world)
    if not plan:
        return []

    # the model, and what it is asked
    dtype = torch.bfloat16 if config.bf16 and device.type == "cuda" else torch.float32
    attention = best_attention() if dtype == torch.bfloat16 else "sdpa"
    model, tokenizer = load(folder, dtype=dtype, attn_implementation=attention)
    model.to(device).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    samples = Samples(todo, tokenizer, config, train=False)
    batches = loader(samples, plan, config.workers, pad_id=pad, side="left")

    kind = config.latents
    ablation = dict(
        donor_of=donors(rows) if kind == "shuffled" else None,
        scale=measure_noise(model, rows, config) if kind == "noise" else None,
    )

    # a line a sample, written as soon as its batch is done
    lines, shown = [], chosen(rows, config.report)
    total, title = sum(map(len, plan)), f"evaluate {config.latents}"
    bar = tqdm(total=total, desc=title, disable=rank > 0, mininterval=2)
    with open(os.path.join(config.out, f"samples_{rank}.jsonl"), "a", encoding="utf-8") as f:
        for indices, batch in zip(plan, batches):
            new = skipped_lines([todo[i] for i in indices], batch["skipped"])
            if batch["rows"]:
                new += answer(config, model, tokenizer, batch, ablation, shown)
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
            f.flush()
            lines += new
            bar.update(len(indices))
    bar.close()
    return lines


def plan_of(config, rows, done, rank, world):
    """-> (this rank's rows that are missing, batches of their indices). Source: ours.

    Prompts of like length together: less padding, and rows that finish together.
    """
    todo = [row for row in rows if row.id not in done]
    todo.sort(key=lambda row: (row.group, len(row.question)))
    todo, size = todo[rank::world], config.batch
    return todo, [list(range(i, min(i + size, len(todo)))) for i in range(0, len(todo), size)]


def skipped_lines(rows, skipped):
    """The result lines of the rows that could not be read, each named."""
    why, lines = {s.where: s.why for s in skipped}, []
    for row in rows:
        if row.where in why:
            tqdm.write(f"skipped {row.where}: {why[row.where]}")
            lines.append(dict(id=row.id, group=row.group, skipped=why[row.where]))
    return lines


def answer(config, model, tokenizer, batch, ablation, shown):
    """Answer a batch -> its result lines. ablation: the arguments of `replacement`."""
    began, rows = time.time(), batch["rows"]
    lost = {}
    vectors = replacement(config.latents, model, rows, config, **ablation, lost=lost)
    rollout = generate(
        model,
        model_inputs(to_device(batch, model.device)),
        feed=own_latent if vectors is None else feed_of(vectors),
        max_new_tokens=config.max_new_tokens,
        max_latents=config.max_latents,
        banned=[model.config.latent_start_id] if config.latents == "none" else [],
        cuda_graph=config.cuda_graph,
    )
    seconds = round((time.time() - began) / len(rows), 5)
    tokens = [t[:n] for t, n in zip(rollout.tokens.cpu(), rollout.lengths)]
    gone = [Skipped(row.where, lost[row.id]) for row in rows if row.id in lost]
    lines = skipped_lines(rows, gone)
    for i, (row, text) in enumerate(zip(rows, tokenizer.batch_decode(tokens))):
        if row.id in lost:
            continue
        line = result_line(
            config, model, row, text, tokens[i].tolist(), rollout, i, row.id in shown
        )
        lines.append(line | dict(seconds=seconds))
    return lines


def result_line(config, model, row, text, tokens, rollout, i, shown):
    """What is kept of row i of a rollout, as a dict; `shown`: with what its spans are near to."""
    latents, ids = rollout.latents[i], (model.config.latent_start_id, model.config.latent_id)
    lengths = span_lengths(tokens, *ids)
    line = dict(
        id=row.id,
        group=row.group,
        clip=clip_of(row),
        **read_answer(row, text, config.benchmark == "futurebench"),
        answer=row.answer,
        response=re.sub(f"(?:{re.escape(LATENT)}\\s*)+", LATENT, text),
        tokens=len(tokens),
        spans=len(lengths),
        latents=len(latents),
        finish=rollout.finish[i],
    )
    if shown:
        line["imagined"] = imagined(model, row, latents, lengths, config.budgets[1])
        line["imagined"]["format"] = format_reward(line["response"])
        line["imagined"]["repetition"] = repetition_score(line["response"])
    return line


def clip_of(row):
    """What a question is about: its first clip's or picture's path, else (bytes) its own id."""
    for part in row.prompt:
        source = getattr(part, "path", None) or getattr(part, "source", None)
        if isinstance(source, str):
            return source
    return row.id


def chosen(rows, n):
    """Ids of n rows, the groups taking turns. Source: ours."""
    turn = Counter()
    order = []
    for row in rows:
        turn[row.group] += 1
        order.append((turn[row.group], row.id))
    return {id for _, id in sorted(order, key=lambda pair: pair[0])[:n]}


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


def imagined(model, row, latents, lengths, budget):
    """What a row's spans are near to -> a JSON-able dict. `similarity` is that of Eq. (6)'s b_m.

    latents (N, D), lengths: latents of each span, budget: pixels (min, max) of a frame.
    {"spans": lengths, "frames": labels, "cosine": (N, F), "similarity": (M, M) of the non-empty
    spans' means, "diversity": R_div}, or {"error": why}.
    """
    try:
        frames = film(row)
    except ClipError as e:
        return dict(error=str(e))
    out = dict(
        spans=lengths,
        frames=[label for label, _, _ in frames],
        cosine=[],
        similarity=[],
        diversity=round(diversity_reward(latents, lengths), 4),
    )
    if frames and len(latents):
        z = F.normalize(latents.float(), dim=-1)  # (N, D)
        columns = []
        for _, _, pixels in frames:
            patches, grid = resize_and_cut(pixels[None], *budget)
            e = model.encode_frames(
                normalise(patches).to(model.device), grid[None].to(model.device)
            )  # (K, D)
            columns.append((z @ F.normalize(e.float(), dim=-1).T).amax(1))  # (N,)
        out["cosine"] = [[round(v, 3) for v in line] for line in torch.stack(columns, 1).tolist()]
        b = F.normalize(
            torch.stack([s.mean(0) for s in latents.float().split([n for n in lengths if n])]),
            dim=-1,
        )  # (M, D)
        out["similarity"] = [[round(v, 3) for v in line] for line in (b @ b.T).tolist()]
    return out


if __name__ == "__main__":
    evaluate(parse_config(Config))
    leave()
