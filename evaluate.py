"""Multiple-choice evaluation of a video-language model that imagines (paper sec. 4).

    python evaluate.py --model runs/sft --data test.json --out runs/eval            # greedy, one process
    torchrun --nproc_per_node 8 evaluate.py --model DIR --data test.json --out runs/eval --batch 8

Reads every format of data.py whose rows have options. Writes one line a sample to OUT/samples*.jsonl as it is done (a
second run skips what is there), then OUT/summary.json and the table: accuracy by group and over all samples (micro
average), each with a 95% interval.

`--latents` asks whether the answer depends on what is imagined. A span is fed: generated (the model's own states) | zero |
noise (Gaussian, scale of the true embeddings) | shuffled (the true futures of the next sample in the batch) | true (its own
true futures) | pause (the `<|latent|>` token's embedding). The model still decides how long a span is; the vectors are dealt
out one after another, so where a frame has several latents a span that is closed early shifts what the next one gets.

Where this differs from the paper and the official code: 1. A sample that cannot be read or whose answer cannot be
parsed is named and counted in the summary, never dropped in silence; what could not be read is tried again by the next
run. 2. An answer counts if the first closed <answer> holds an option's text, or its letter and nothing but that option's
text after it; official takes the first of A-D anywhere in it. 3. Wilson intervals are given.

Axis letters: B rows, K imagined vectors a row, D hidden.
"""

import dataclasses
import glob
import json
import math
import os
import re
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import DataConfig, Samples, load_frames, loader, model_inputs, parse_config, read_rows, to_device
from latent_decode import generate
from model import LATENT, best_attention, load, normalise
from rewards import answer_of, pick
from sft import newest, set_up_ranks


@dataclasses.dataclass
class Config(DataConfig):
    model: str = ""  # a model folder, or a run's folder (its newest checkpoint)
    data: str = ""  # records with options, see data.py
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    out: str = "runs/eval"  # the evaluation's folder
    limit: int = 0  # only the first samples; 0 = all  # ours
    batch: int = 8  # prompts decoded together on one rank  # ours
    max_new_tokens: int = 2048  # paper sec. 4 (FutureBench)
    max_latents: int = 8  # longest span: 2 * l_max  # official
    latents: str = "generated"  # generated | zero | noise | shuffled | true | pause  # ours
    seed: int = 0  # noise and shuffling  # ours
    bf16: bool = True  # weights on CUDA  # paper Table 8
    cuda_graph: bool = False  # replay a captured decoding step; not yet measured on a GPU  # ours


LATENTS = ("generated", "zero", "noise", "shuffled", "true", "pause")


# ---------------------------------------------------------------------------------------------------------- scoring

def wilson(right, n, z=1.96):
    """95% interval of a share: Wilson's score interval (low, high). n = 0: (0, 1). Source: Wilson 1927."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z / (1 + zz) * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(lines):
    """Result lines -> {group: {n, right, accuracy, low, high, unparsed, skipped, latents, tokens}}, "all" last."""
    table = {}
    for group in [*sorted({line["group"] for line in lines} - {"all"}), "all"]:
        mine = [line for line in lines if group in ("all", line["group"])]
        read = [line for line in mine if "skipped" not in line]
        right = sum(line["right"] for line in read)
        low, high = wilson(right, len(read))
        table[group] = dict(n=len(read), right=right, accuracy=right / max(1, len(read)), low=low, high=high,
                            unparsed=sum(line["picked"] is None for line in read), skipped=len(mine) - len(read),
                            spans=sum(line["spans"] for line in read) / max(1, len(read)),
                            latents=sum(line["latents"] for line in read) / max(1, len(read)),
                            tokens=sum(line["tokens"] for line in read) / max(1, len(read)))
    return table


def format_table(table):
    """The summary as text."""
    out = [f"{'group':<16}{'n':>6}{'accuracy':>10}   {'95% interval':<16}{'unparsed':>9}{'skipped':>9}"
           f"{'spans':>8}{'latents':>9}{'tokens':>8}"]
    for group, s in table.items():
        out.append(f"{group:<16}{s['n']:>6}{s['accuracy']:>10.3f}   {s['low']:.3f} - {s['high']:.3f}   "
                   f"{s['unparsed']:>9}{s['skipped']:>9}{s['spans']:>8.2f}{s['latents']:>9.2f}{s['tokens']:>8.1f}")
    return "\n".join(out)


# --------------------------------------------------------------------------------------------------------- ablation

def replacement(kind, model, rows, config, generator):
    """What is fed instead of the row's own latents -> (B, K, D), or None for `generated`. Raises ValueError."""
    if kind == "generated":
        return None
    D, device = model.config.text_config.hidden_size, model.device
    if kind == "pause":
        return model.get_input_embeddings().weight[model.config.latent_id].detach().expand(
            len(rows), config.max_new_tokens, D)
    if kind == "zero":
        return torch.zeros(1, 1, D, device=device).expand(len(rows), config.max_new_tokens, D)
    futures = []  # true embeddings, one (K_i, D) a row
    for row in rows:
        frames = [p for p in row.response if not isinstance(p, str)]
        if not frames:
            raise ValueError(f"{row.where}: --latents {kind} needs the true future frames, this row has none")
        patches, grids = zip(*load_frames(frames, config.budgets[1], config.cache_frames))
        futures.append(model.encode_frames(normalise(torch.cat(patches)).to(device), torch.stack(grids).to(device)))
    if kind == "noise":
        true = torch.cat(futures).float()
        noise = torch.randn(len(rows), max(64, config.max_latents * 8), D, generator=generator).to(device)
        return true.mean(0) + true.std(0, unbiased=False) * noise
    K = max(len(f) for f in futures)
    if kind == "shuffled":
        if len(rows) < 2:
            raise ValueError(f"{rows[0].where}: alone in its batch, so there is no other sample to take the futures of")
        futures = futures[1:] + futures[:1]  # the next row of the batch, which asks the same kind of question
    return torch.stack([torch.cat([f, f[-1:].expand(K - len(f), D)]) for f in futures])  # a short one repeats its last


# ------------------------------------------------------------------------------------------------------------- loop

def evaluate(config, rows=None):
    """Run the evaluation -> {group: scores} (every rank gets it). Raises SystemExit or ValueError on bad input."""
    if config.latents not in LATENTS:
        raise ValueError(f"latents is {config.latents!r}, expected one of {', '.join(LATENTS)}")
    rank, world, device = set_up_ranks()
    folder = newest(config.model)
    if not config.data and rows is None:
        raise SystemExit("--data is missing: a .json, .jsonl or .parquet file of records with options (see data.py)")
    rows = read_rows(config.data, config.media_root or None) if rows is None else rows
    rows = rows[:config.limit or None]
    for row in rows:
        if not row.options:
            raise ValueError(f"{row.where}: no options; multiple choice needs them")
        if pick(row.answer, row.options) is None:
            raise ValueError(f"{row.where}: the answer {row.answer!r} is none of {row.options}")
    if len({row.id for row in rows}) < len(rows):
        raise ValueError(f"{config.data}: ids are not unique, so a resumed run could not tell its samples apart")
    os.makedirs(config.out, exist_ok=True)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "workers", "limit", "cuda_graph")
                and (k != "batch" or config.latents in ("noise", "shuffled"))}
    written = os.path.join(folder, "config.json")  # a model trained anew in the same folder is another model
    settings.update(model=folder, written=os.path.getmtime(written) if os.path.exists(written) else None)
    settings_path = os.path.join(config.out, "settings.json")
    done = {}
    for path in glob.glob(os.path.join(glob.escape(config.out), "samples*.jsonl")):
        done.update({line["id"]: line for line in read_lines(path) if "skipped" not in line})
    if done and (not os.path.exists(settings_path) or json.load(open(settings_path)) != settings):
        raise SystemExit(f"{config.out} holds results of other settings (settings.json): choose another --out")
    if world > 1:
        dist.barrier()  # nobody writes before everybody has read
    if rank == 0:
        with open(settings_path + ".part", "w") as f:
            json.dump(settings, f, indent=1)
        os.replace(settings_path + ".part", settings_path)

    todo = [row for row in rows if row.id not in done]
    # prompts of like length together: less padding, and rows that finish together
    todo = sorted(todo, key=lambda row: (row.group, len(row.question)))[rank::world]
    dtype = torch.bfloat16 if config.bf16 and device.type == "cuda" else torch.float32
    lines = []
    if todo:
        attention = best_attention() if dtype == torch.bfloat16 else "sdpa"
        model, tokenizer = load(folder, dtype=dtype, attn_implementation=attention)
        model.to(device).eval()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        plan = [list(range(i, min(i + config.batch, len(todo)))) for i in range(0, len(todo), config.batch)]
        batches = loader(Samples(todo, tokenizer, config, train=False), plan, config.workers, pad_id=pad, side="left")
        generator = torch.Generator().manual_seed(config.seed + rank)
        path = os.path.join(config.out, f"samples_{rank}.jsonl")
        bar = tqdm(total=len(todo), desc=f"evaluate {config.latents}", disable=rank > 0, mininterval=2)
        with open(path, "a", encoding="utf-8") as f:
            for indices, batch in zip(plan, batches):
                began, new = time.time(), []
                skipped = {s.where: s.why for s in batch["skipped"]}
                for row in (todo[i] for i in indices):
                    if row.where in skipped:
                        tqdm.write(f"skipped {row.where}: {skipped[row.where]}")
                        new.append(dict(id=row.id, group=row.group, skipped=skipped[row.where]))
                if batch["rows"]:
                    replace = replacement(config.latents, model, batch["rows"], config, generator)
                    rollout = generate(model, model_inputs(to_device(batch, device)), replace=replace,
                                       max_new_tokens=config.max_new_tokens, max_latents=config.max_latents,
                                       cuda_graph=config.cuda_graph)
                    seconds = (time.time() - began) / len(batch["rows"])
                    texts = tokenizer.batch_decode([t[:n] for t, n in zip(rollout.tokens.cpu(), rollout.lengths)])
                    spans = (rollout.tokens == model.config.latent_start_id).sum(1).tolist()
                    for i, row in enumerate(batch["rows"]):
                        picked = pick(answer_of(texts[i]), row.options)
                        new.append(dict(
                            id=row.id, group=row.group, right=picked == pick(row.answer, row.options), picked=picked,
                            answer=row.answer, response=re.sub(f"(?:{re.escape(LATENT)}\\s*)+", LATENT, texts[i]),
                            tokens=int(rollout.lengths[i]), spans=spans[i], latents=len(rollout.latents[i]),
                            finish=rollout.finish[i], seconds=round(seconds, 5)))
                f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in new)
                f.flush()
                lines += new
                bar.update(len(indices))
    if world > 1:
        gathered = [None] * world
        dist.all_gather_object(gathered, lines)
        lines = sum(gathered, [])
    wanted = {row.id for row in rows}
    lines = [line for line in [*done.values(), *lines] if line["id"] in wanted]
    table = summarise(lines)
    if rank == 0:
        with open(os.path.join(config.out, "summary.json"), "w") as f:
            json.dump(dict(settings, scores=table, found=len(lines), total=len(rows)), f, indent=1)
        print(format_table(table))
    return table


def read_lines(path):
    """A results file -> its lines as dicts. A half-written last line (a killed run) is cut off the file and redone."""
    with open(path, "rb") as f:
        text = f.read()
    whole = text[:text.rfind(b"\n") + 1]
    if whole != text:
        os.truncate(path, len(whole))
    try:
        return [json.loads(line) for line in whole.decode("utf-8").split("\n")[:-1]]
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: not a results file ({e})") from e


if __name__ == "__main__":
    evaluate(parse_config(Config))
