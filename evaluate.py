"""Evaluation of a video-language model that imagines: FutureBench, TwiFF-Bench, multiple choice (paper sec. 4).

    python evaluate.py --benchmark futurebench --model runs/sft --data futurebench.json --media_root videos --out runs/fb
    torchrun --nproc_per_node 8 evaluate.py --benchmark mcq --model DIR --data videomme.parquet --out runs/vm --batch 8
    python evaluate.py --benchmark twiffbench --model DIR --data Liu-Junhua/TwiFF-Bench --out runs/tw --no-judge
    python evaluate.py --benchmark twiffbench --judge-only --data Liu-Junhua/TwiFF-Bench --out runs/tw --judge_model NAME

Without --benchmark: every format of data.py whose rows have options. Writes one line a sample to OUT/samples*.jsonl as it is
done (a second run skips what is there), then OUT/summary.json, OUT/report.html and the table: scores by group and over all.

Three readings of an answer, all of the first closed <answer>: `accuracy` counts what training rewards (rewards.pick: an
option's text, or its letter and nothing but that option's text after it); `strict` also a letter standing alone somewhere in
it; `official` the first of A-D anywhere in it, be it in a word: the one the paper's figures are made with.

`--latents` asks whether the answer depends on what is imagined. A span is fed: generated (the model's own states) | zero |
noise (Gaussian, scale of the true embeddings) | shuffled (the true futures of the next sample in the batch) | true (its own
true futures) | pause (the `<|latent|>` token's embedding) | none (no span can be opened). The model still decides how long a
span is; the vectors are dealt out one after another, so where a frame has several latents a span that is closed early shifts
what the next one gets.

Where this differs from the paper and the official code: 1. A sample that cannot be read (--strict: it ends the run), whose
answer cannot be parsed, or that the judge fails on is named and counted in the summary, never dropped in silence; what
could not be read is tried again by the next run. 2. Samples that were not read or not judged are outside the scores: see
`found` and `total`. 3. Intervals are given: `bootstrap` (1,000 draws, seeded; printed); Wilson's for shares (`low`, `high`).

Axis letters: B rows, K imagined vectors a row, D hidden.
"""

import dataclasses
import glob
import hashlib
import json
import math
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
from common.formats import answer_of
from common.judge import ScoreJudge
from common.report import as_text, paper_rows, score_rows, write_report
from common.runs import newest, parse_config, read_lines, set_up_ranks, write_json
from data import DataConfig, Samples, loader, model_inputs, to_device
from latent_decode import generate
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
    resume: bool = True  # skip what is already in `out`; --no-resume refuses a folder that holds results  # ours
    limit: int = 0  # only the first samples; 0 = all  # ours
    strict: bool = (
        False  # a sample that cannot be read ends the run, instead of a line that says so  # ours
    )
    average: str = ""  # over all: micro | macro (mean of the groups); "" = the benchmark's own, MLVU macro, else micro
    num_frames: int = 0  # frames of a clip that enters as a video; 0 = 32 for FutureBench, else 16  # paper sec. 4
    batch: int = 8  # prompts decoded together on one rank  # ours
    max_new_tokens: int = 0  # 0 = 4096 for TwiFF-Bench, else 2048  # paper sec. 4
    max_latents: int = 8  # longest span: 2 * l_max  # official
    latents: str = "generated"  # generated | zero | noise | shuffled | true | pause | none  # ours
    seed: int = 0  # noise and the bootstrap  # ours
    report: int = (
        24  # samples shown in report.html, spread over the groups; 0 = only its tables  # ours
    )
    judge: bool = (
        True  # TwiFF-Bench: ask the judge; --no-judge leaves that to a later run with --judge-only
    )
    judge_only: bool = False  # TwiFF-Bench: judge the responses that are in `out`; loads no model
    judge_url: str = ""  # an OpenAI-compatible server, ".../v1"; "" = OpenAI's. The key: JUDGE_API_KEY or OPENAI_API_KEY
    judge_model: str = ""  # the judge's name there
    judge_images: bool = (
        True  # show it the frames; --no-judge_images for a judge that only reads  # ours
    )
    judge_retries: int = (
        3  # after a failed request or an unreadable reply, with growing waits  # ours
    )
    judge_timeout: float = 120.0  # seconds a request  # ours
    judge_concurrency: int = 16  # requests at a time  # ours
    bf16: bool = True  # weights on CUDA  # paper Table 8
    cuda_graph: bool = False  # replay a captured decoding step; not yet measured on a GPU  # ours

    def __post_init__(self):
        self.num_frames = self.num_frames or (32 if self.benchmark == "futurebench" else 16)
        self.max_new_tokens = self.max_new_tokens or (
            4096 if self.benchmark == "twiffbench" else 2048
        )
        super().__post_init__()
        for name, known in (("latents", LATENTS), ("average", ("", "micro", "macro"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, expected one of {', '.join(k for k in known if k)}"
                )


LATENTS = ("generated", "zero", "noise", "shuffled", "true", "pause", "none")


def official_letter(text):
    """A response -> the first of [ABCD] inside its first closed <answer>, or "". Source: official."""
    found = re.search("[ABCD]", answer_of(text) or "")
    return found.group() if found else ""


def strict_letter(text, options):
    """A response -> the letter that its first closed <answer> means, or "". Source: ours.

    What `pick` finds (an option's text or letter, any case); else the only option letter that stands alone as a word, any
    case, where an "a" before another word is an article: "The answer is C." is C, "B or C" and "A red wall" are none.
    """
    answer = answer_of(text)
    index = pick(answer, options)
    if index is not None:
        return chr(65 + index)
    letters = "".join(chr(65 + i) for i in range(len(options)))
    said = re.sub(r"\b[aA]\s+(?=[a-z]{2})", " ", answer or "")
    found = {
        letter.upper() for letter in re.findall(rf"(?<![\w'])[{letters}](?![\w'])", said, re.I)
    }
    return found.pop() if len(found) == 1 else ""


def wilson(right, n, z=1.96):
    """95% interval of a share: Wilson's score interval (low, high). n = 0: (0, 1). Source: Wilson 1927."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z / (1 + zz) * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(groups, seed=0, draws=1000, top=1.0):
    """95% interval of the mean of group means: [low, high]. Source: Efron 1979, percentiles.

    groups: lists of values, each resampled on its own; one list = a micro average. No value at all: [0, top].
    """
    groups, rng = [np.asarray(g, float) for g in groups if len(g)], np.random.default_rng(seed)
    if not groups:
        return [0.0, top]
    means = [
        [rng.choice(g, len(g)).mean() for _ in range(draws)] for g in groups
    ]  # (groups, draws)
    return [round(float(v), 6) for v in np.percentile(np.mean(means, 0), (2.5, 97.5))]


def summarise(lines, average="micro", seed=0):
    """Result lines -> {group: scores}, "all" last. Source: sec. 4.

    Of each group: n, accuracy (over the n that were read), low, high (Wilson), bootstrap, unparsed, skipped, strict and
    official accuracy and unparsed, spans, latents and tokens an answer. Lines of TwiFF-Bench: chain, answer and average over
    the n judged ones, failed (asked without an answer), waiting (not asked yet). average: "all" is micro, over the
    samples, or macro, the mean of the groups (its low and high are then the bootstrap's).
    """
    table, groups = {}, sorted({line["group"] for line in lines} - {"all"})
    judged = any("parsed" in line for line in lines)
    for group in [*groups, "all"]:
        mine = [line for line in lines if group in ("all", line["group"])]
        read = [line for line in mine if "skipped" not in line]
        scored = [line for line in read if line.get("judged")] if judged else read
        parts = [[line for line in scored if line["group"] == g] for g in groups]
        parts = (
            [part for part in parts if part]
            if average == "macro" and group == "all" and groups
            else [scored]
        )

        def mean(value):
            return (
                float(np.mean([np.mean([value(line) for line in part]) for part in parts]))
                if scored
                else 0.0
            )

        def interval(value, top=1.0):
            return bootstrap([[value(line) for line in part] for part in parts], seed, top=top)

        s = table[group] = dict(n=len(scored), skipped=len(mine) - len(read))
        if judged:
            for name in ("chain", "answer", "average"):
                s[name] = mean(lambda line: line["judged"][name])
            s.update(
                failed=sum("why" in line for line in read),
                unparsed=sum(not line["parsed"] for line in read),
            )
            s.update(
                waiting=len(read) - len(scored) - s["failed"],
                bootstrap=interval(lambda line: line["judged"]["average"], top=5.0),
            )
        else:
            s["right"] = sum(line["right"] for line in read)
            s.update(
                accuracy=mean(lambda line: line["right"]),
                bootstrap=interval(lambda line: line["right"]),
            )
            s["low"], s["high"] = (
                s["bootstrap"] if len(parts) > 1 else wilson(s["right"], len(read))
            )
            s["unparsed"] = sum(line["picked"] is None for line in read)
            for name in (
                ("strict", "official")
                if all(name in line for line in read for name in ("strict", "gold"))
                else ()
            ):
                s[name] = mean(lambda line: line[name] == line["gold"])
                s[f"{name}_unparsed"] = sum(not line[name] for line in read)
        for name in ("spans", "latents", "tokens"):
            s[name] = sum(line[name] for line in read) / max(1, len(read))
    return table


def format_table(table):
    """The summary as text."""
    return as_text(*score_rows(table))


def replacement(kind, model, rows, config, generator):
    """What is fed instead of the row's own latents -> (B, K, D), or None for `generated` and `none`. Raises ValueError."""
    if kind in ("generated", "none"):
        return None
    D, device = model.config.text_config.hidden_size, model.device
    if kind == "pause":
        return (
            model.get_input_embeddings()
            .weight[model.config.latent_id]
            .detach()
            .expand(len(rows), config.max_new_tokens, D)
        )
    if kind == "zero":
        return torch.zeros(1, 1, D, device=device).expand(len(rows), config.max_new_tokens, D)
    futures = []  # true embeddings, one (K_i, D) a row
    for row in rows:
        frames = [p for p in row.response if not isinstance(p, str)]
        if not frames:
            raise ValueError(
                f"{row.where}: --latents {kind} needs the true future frames, this row has none"
            )
        patches, grids = zip(*load_frames(frames, config.budgets[1]))
        futures.append(
            model.encode_frames(
                normalise(torch.cat(patches)).to(device), torch.stack(grids).to(device)
            )
        )
    if kind == "noise":
        true = torch.cat(futures).float()
        noise = torch.randn(len(rows), max(64, config.max_latents * 8), D, generator=generator).to(
            device
        )
        return true.mean(0) + true.std(0, unbiased=False) * noise
    K = max(len(f) for f in futures)
    if kind == "shuffled":
        if len(rows) < 2:
            raise ValueError(
                f"{rows[0].where}: alone in its batch, so there is no other sample to take the futures of"
            )
        futures = (
            futures[1:] + futures[:1]
        )  # the next row of the batch, which asks the same kind of question
    return torch.stack(
        [torch.cat([f, f[-1:].expand(K - len(f), D)]) for f in futures]
    )  # a short one repeats its last


def evaluate(config, rows=None):
    """Run the evaluation -> {group: scores}; every rank gets it, the judge's only rank 0. Raises SystemExit, ValueError."""
    rank, world, device = set_up_ranks()
    twiff = config.benchmark == "twiffbench"
    if not config.data and rows is None:
        raise SystemExit(
            "--data is missing: a .json, .jsonl or .parquet file of records with options (see data.py)"
        )
    if twiff and (config.judge or config.judge_only) and not config.judge_model:
        raise SystemExit(
            "TwiFF-Bench is scored by a judge: give --judge_model (and --judge_url), or pass --no-judge"
        )
    if config.judge_only and not twiff:
        raise SystemExit("--judge_only is for --benchmark twiffbench: nothing else is judged")
    average = "micro"
    if rows is None:
        rows, average = read_benchmark(config.benchmark, config.data, config.media_root or None)
    rows, average = rows[: config.limit or None], config.average or average
    for row in rows:
        if not row.options and not twiff:
            raise ValueError(f"{row.where}: no options; multiple choice needs them")
        if not twiff and pick(row.answer, row.options) is None:
            raise ValueError(f"{row.where}: the answer {row.answer!r} is none of {row.options}")
    if len({row.id for row in rows}) < len(rows):
        raise ValueError(
            f"{config.data}: ids are not unique, so a resumed run could not tell its samples apart"
        )
    settings_path, done = os.path.join(config.out, "settings.json"), {}
    for path in glob.glob(os.path.join(glob.escape(config.out), "samples*.jsonl")):
        for line in read_lines(path):
            if "skipped" not in line or config.judge_only and line["id"] not in done:
                done[line["id"]] = line
    if done and not config.resume and not config.judge_only:
        raise SystemExit(
            f"{config.out} already holds {len(done)} results: choose another --out, or pass --resume"
        )
    if config.judge_only:
        if not done:
            raise SystemExit(
                f"{config.out} holds no responses to judge (samples*.jsonl): run with --no-judge first"
            )
        with open(settings_path) as f:
            settings, lines = json.load(f), []
    else:
        folder = newest(config.model)
        settings = settings_of(config, folder)
        if done and (
            not os.path.exists(settings_path) or json.load(open(settings_path)) != settings
        ):
            raise SystemExit(
                f"{config.out} holds results of other settings (settings.json): choose another --out"
            )
        if world > 1:
            dist.barrier()  # nobody writes before everybody has read
        os.makedirs(config.out, exist_ok=True)
        if rank == 0:
            write_json(settings_path, settings)
        lines = respond(config, folder, rows, done, rank, world, device)
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, lines)
        lines = sum(gathered, [])
    found = {line["id"]: line for line in [*done.values(), *lines]}
    lines = [found[row.id] for row in rows if row.id in found]
    if (
        twiff and (config.judge or config.judge_only) and rank == 0
    ):  # the others are done: a judge may take long
        ask_judge(config, rows, lines)
    table = summarise(lines, average, config.seed)
    if rank == 0:
        summary = dict(settings, **about(rows, lines, settings), average=average, scores=table)
        write_json(os.path.join(config.out, "summary.json"), summary)
        write_report(os.path.join(config.out, "report.html"), summary, lines, rows)
        print(format_table(table))
        print(
            f"{summary['found']} of {summary['total']} samples found; {summary['seconds']['all']:.3g} s and "
            f"{table['all']['tokens']:.1f} tokens an answer; all = {average} average; {config.out}/report.html"
        )
        if waiting := table["all"].get("waiting"):
            print(f"{waiting} responses wait for a judge: --judge-only --judge_model NAME")
        if config.benchmark in PAPER:
            print(
                f"\nbeside what the paper published (not run here)\n{as_text(*paper_rows(summary))}"
            )
    return table


def settings_of(config, folder):
    """What two runs must share for their samples to be of one kind, as a dict. Source: ours."""
    free = {"out", "workers", "resume", "cuda_graph", "strict", "average", "report"}
    free |= {"batch", "limit"} if config.latents not in ("noise", "shuffled") else set()
    settings = {
        k: v
        for k, v in dataclasses.asdict(config).items()
        if k not in free and not k.startswith("judge")
    }
    written = os.path.join(
        folder, "config.json"
    )  # a model trained anew in the same folder is another model
    return dict(
        settings,
        model=folder,
        written=os.path.getmtime(written) if os.path.exists(written) else None,
    )


def about(rows, lines, settings):
    """What one needs to know of a result besides its scores, as a dict. Source: ours; seconds and tokens: paper's Table 7.

    seconds: a batch's wall time over its rows (--batch 1 for the time one answer takes); tokens count latents, too.
    """
    prompts = [
        [settings["system"], *(p if isinstance(p, str) else type(p).__name__ for p in row.prompt)]
        for row in rows
    ]
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        commit = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a git checkout, or no git
        commit = None
    read = [line for line in lines if "skipped" not in line]
    seconds = (
        {
            group: round(
                float(
                    np.mean([line["seconds"] for line in read if group in ("all", line["group"])])
                ),
                4,
            )
            for group in [*sorted({line["group"] for line in read} - {"all"}), "all"]
        }
        if read
        else {"all": 0.0}
    )
    return dict(
        found=len(read),
        total=len(rows),
        coverage=len(read) / len(rows),
        commit=commit,
        seconds=seconds,
        missing=[dict(id=line["id"], why=line["skipped"]) for line in lines if "skipped" in line],
        unparsed=sum(
            line["picked"] is None if "picked" in line else not line["parsed"] for line in read
        ),
        judge_failures=sum("why" in line for line in read),
        frames=settings["num_frames"],
        pixels=dict(
            zip(
                ("image", "future", "video"),
                DataConfig(
                    **{k: settings[k] for k in ("l_max", "image_max_tokens", "video_max_tokens")}
                ).budgets,
            )
        ),
        prompt_hash=hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16],
        generation=dict(
            greedy=True,
            max_new_tokens=settings["max_new_tokens"],
            max_latents=settings["max_latents"],
        ),
    )


def respond(config, folder, rows, done, rank, world, device):
    """Generate what is missing, appending a line a sample -> this rank's new lines. Raises SystemExit with `strict`."""
    # prompts of like length together: less padding, and rows that finish together
    todo = sorted(rows, key=lambda row: (row.group, len(row.question)))
    if config.latents not in (
        "noise",
        "shuffled",
    ):  # these depend on the batch, so there a batch is run again as it was
        todo = [row for row in todo if row.id not in done]
    todo, shown = todo[rank::world], chosen(rows, config.report)
    plan = [
        list(range(i, min(i + config.batch, len(todo)))) for i in range(0, len(todo), config.batch)
    ]
    plan = [indices for indices in plan if any(todo[i].id not in done for i in indices)]
    dtype = torch.bfloat16 if config.bf16 and device.type == "cuda" else torch.float32
    lines = []
    if not plan:
        return lines
    attention = best_attention() if dtype == torch.bfloat16 else "sdpa"
    model, tokenizer = load(folder, dtype=dtype, attn_implementation=attention)
    model.to(device).eval()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batches = loader(
        Samples(todo, tokenizer, config, train=False), plan, config.workers, pad_id=pad, side="left"
    )
    path = os.path.join(config.out, f"samples_{rank}.jsonl")
    bar = tqdm(
        total=sum(map(len, plan)),
        desc=f"evaluate {config.latents}",
        disable=rank > 0,
        mininterval=2,
    )
    with open(path, "a", encoding="utf-8") as f:
        for indices, batch in zip(plan, batches):
            began, new = time.time(), []
            skipped = {s.where: s.why for s in batch["skipped"]}
            for row in (todo[i] for i in indices):
                if row.where in skipped:
                    if config.strict:
                        raise SystemExit(f"{row.where}: {skipped[row.where]} (--strict)")
                    tqdm.write(f"skipped {row.where}: {skipped[row.where]}")
                    new.append(dict(id=row.id, group=row.group, skipped=skipped[row.where]))
            if batch["rows"]:
                draw = hashlib.sha256(f"{config.seed} {todo[indices[0]].id}".encode()).digest()
                replace = replacement(
                    config.latents,
                    model,
                    batch["rows"],
                    config,
                    torch.Generator().manual_seed(int.from_bytes(draw[:7], "big")),
                )
                rollout = generate(
                    model,
                    model_inputs(to_device(batch, device)),
                    replace=replace,
                    max_new_tokens=config.max_new_tokens,
                    max_latents=config.max_latents,
                    banned=[model.config.latent_start_id] if config.latents == "none" else [],
                    cuda_graph=config.cuda_graph,
                )
                seconds = (time.time() - began) / len(batch["rows"])
                kept = [t[:n] for t, n in zip(rollout.tokens.cpu(), rollout.lengths)]
                for i, (row, text) in enumerate(zip(batch["rows"], tokenizer.batch_decode(kept))):
                    line = dict(
                        id=row.id,
                        group=row.group,
                        **read_answer(row, text),
                        answer=row.answer,
                        response=re.sub(f"(?:{re.escape(LATENT)}\\s*)+", LATENT, text),
                    )
                    lengths = span_lengths(
                        kept[i].tolist(), model.config.latent_start_id, model.config.latent_id
                    )
                    line.update(
                        tokens=len(kept[i]),
                        spans=len(lengths),
                        latents=len(rollout.latents[i]),
                        finish=rollout.finish[i],
                        seconds=round(seconds, 5),
                    )
                    if row.id in shown:
                        line["imagined"] = imagined(
                            model, row, rollout.latents[i], lengths, config.budgets[1]
                        )
                        line["imagined"].update(
                            format=format_reward(line["response"]),
                            repetition=repetition_score(line["response"]),
                        )
                    new.append(line)
            new = [line for line in new if line["id"] not in done]
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
            f.flush()
            lines += new
            bar.update(len(indices))
    return lines


def chosen(rows, n):
    """Ids of n rows, the groups taking turns. Source: ours."""
    turn = Counter()
    order = []
    for row in rows:
        turn[row.group] += 1
        order.append((turn[row.group], row.id))
    return {id for _, id in sorted(order, key=lambda pair: pair[0])[:n]}


def read_answer(row, text):
    """What a result line says of a response's answer: three readings with options, else whether there is one. Ours."""
    if not row.options:
        return dict(parsed=answer_of(text) is not None)
    picked, gold = pick(answer_of(text), row.options), pick(row.answer, row.options)
    return dict(
        right=picked == gold,
        picked=picked,
        gold=chr(65 + gold),
        strict=strict_letter(text, row.options),
        official=official_letter(text),
    )


def ask_judge(config, rows, lines):
    """Give each TwiFF-Bench line that was read its `judged` scores, or `why` there are none. Source: ours."""
    by_id = {row.id: row for row in rows}
    read = [line for line in lines if "skipped" not in line]
    judge = ScoreJudge(
        config.judge_url,
        config.judge_model,
        cache=os.path.join(config.out, "judge_replies.jsonl"),
        images=config.judge_images,
        concurrency=config.judge_concurrency,
        retries=config.judge_retries,
        timeout=config.judge_timeout,
    )
    for line, (scores, why) in zip(
        read, judge([(by_id[line["id"]], line["response"]) for line in read])
    ):
        line.update(
            dict(judged=dict(scores, average=sum(scores.values()) / 2)) if scores else dict(why=why)
        )
    with open(os.path.join(config.out, "judged.jsonl.part"), "w", encoding="utf-8") as f:
        f.writelines(
            json.dumps({k: line.get(k) for k in ("id", "group", "judged", "why")}) + "\n"
            for line in read
        )
    os.replace(f.name, f.name.removesuffix(".part"))
    for why, n in judge.failures.items():
        print(f"judge: {n} x {why}")


def imagined(model, row, latents, lengths, budget):
    """What a row's spans are near to -> a JSON-able dict. Source: ours; `similarity` is Eq. (6)'s b_m compared.

    latents (N, D), lengths: latents of each span, budget: pixels (min, max) of a frame. {"spans": lengths, "frames": labels,
    "cosine": (N, F), "similarity": (M, M) of the non-empty spans' means, "diversity": R_div}, or {"error": why}.
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
