"""Evaluation of a model that imagines: FutureBench, TwiFF-Bench, multiple choice (paper sec. 4).

    python evaluate.py --benchmark futurebench --model runs/sft --data futurebench.json
    torchrun --nproc_per_node 8 evaluate.py --benchmark mcq --model DIR --data videomme.parquet
    python evaluate.py --benchmark twiffbench --model DIR --data Liu-Junhua/TwiFF-Bench

TwiFF-Bench needs a judge: afterwards run `python -m common.judge OUT --model NAME`, then the same
command again. It finds all samples done, loads no model and shows the scores.

Without --benchmark it takes every format of data.py whose rows have options. It writes a line for
each sample to OUT/samples*.jsonl as soon as it is answered, so a second run only does the missing
ones. At the end it writes OUT/summary.json and OUT/report.html, and prints the scores by group and
over all.

The first closed <answer> is read in three ways: `accuracy` counts what training rewards
(rewards.pick); `strict` counts the only letter that stands alone in it, or an option's text;
`official`, for FutureBench alone, counts the first of A-D anywhere in it, even inside a word. The
paper reports the last.

`--latents` asks whether the answer depends on what is imagined. A span is fed
    generated    the model's own states
    zero         zeros
    noise        Gaussian noise with the mean and deviation of the true embeddings
    shuffled     the true futures of the next row of the same group about another clip
    true         the row's own true futures
    pause        the embedding of `<|latent|>`
    none         nothing, because no span can be opened
The model still decides how long a span is. What a row is fed depends on the row alone, not on its
batch. Several kinds (`--latents zero,noise`) are evaluated one after the other, each in OUT_KIND.

Where this differs from the paper and the official code:
 1. A sample that cannot be read, whose answer cannot be parsed, or on which the judge fails is
    counted in the summary. The next run tries again what could not be read.
 2. Samples that were not read or not judged are not scored: see `found` and `total`.
 3. Each score has one 95 % interval: a bootstrap of clips (1,000 draws, seeded), or Wilson's where
    a group has fewer than 30 clips or all its answers are equal.
 4. TwiFF-Bench: pictures stand where the question has them, without official's instruction before
    them. Official puts all pictures first, and enlarges each to at least 196 tokens.
 5. FutureBench: one pixel budget for the whole clip, 32 frames of 768 * 32 * 32 pixels. Official
    gives each frame 196 to 768 times 32 * 32, so it enlarges small frames, and shrinks large ones
    even in a clip of fewer frames.

Axis letters: B rows, M spans, J places in a span, N imagined vectors, D hidden.
"""

import dataclasses
import functools
import hashlib
import re
import time

import torch

from common.benchmarks import read_benchmark
from common.cli import run_script
from common.clips import ClipError, load_frames, normalise, stack
from common.formats import answer_of, no_option, report_bad
from common.judge import add_verdicts
from common.machine import Machine
from common.painter import imagined
from common.report import about, show, shown_in_report
from common.results import Book, bootstrap, mean_of, settings_of, share_interval, walk
from common.run import need_data
from data import DataConfig, at_least, encode
from latent_decode import ask, one_mark_a_span, own_latent
from rewards import diversity_reward, format_reward, pick, plain, repetition_score, span_lengths

# frames, pixels and lengths of a benchmark: official, and paper sec. 4
PROTOCOLS = {
    # deviation 5: 768 tokens for each of 16 pairs of frames, however many a shorter clip has
    "futurebench": dict(num_frames=32, video_max_tokens=12288),
    # deviation 4: of official's 196 to 1568 tokens (1,605,632 pixels) a picture, the upper bound
    "twiffbench": dict(max_new_tokens=4096, image_max_tokens=1568),
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
    image_max_tokens: int = 0  # of a picture; 0 = 1568 for TwiFF-Bench, as official, else 256
    video_max_tokens: int = 0  # of a video; 0 = 12288 for FutureBench, as official, else 4096
    batch: int = 8  # prompts decoded together on one rank  # ours
    max_new_tokens: int = 0  # 0 = 4096 for TwiFF-Bench, else 2048  # paper sec. 4
    max_latents: int = 8  # longest span; a trained folder brings its own  # official
    # generated | zero | noise | shuffled | true | pause | none, or several with commas  # ours
    latents: str = "generated"
    seed: int = 0  # noise and the bootstrap  # ours
    # samples shown in report.html, spread over the groups; 0 = only its tables  # ours
    report: int = 24
    bf16: bool = True  # weights on CUDA  # paper Table 8
    cuda_graph: bool = False  # replay a captured decoding step; not yet measured on a GPU  # ours

    def __post_init__(self):
        defaults = dict(num_frames=16, image_max_tokens=256, video_max_tokens=4096)
        defaults |= dict(max_new_tokens=2048) | PROTOCOLS.get(self.benchmark, {})
        for name, value in defaults.items():
            setattr(self, name, getattr(self, name) or value)
        super().__post_init__()
        at_least(self, 1, "batch", "max_new_tokens")
        for kind in self.latents.split(","):
            if kind not in LATENTS:
                raise ValueError(f"latents is {kind!r}, expected one of {', '.join(LATENTS)}")


LATENTS = ("generated", "zero", "noise", "shuffled", "true", "pause", "none")
# may differ between two runs on one folder
FREE = {"out", "workers", "max_bad", "cuda_graph", "report", "batch", "limit"}


def official_letter(text):
    """A response -> the first of [ABCD] in its first closed <answer>, or "". Source: official."""
    found = re.search("[ABCD]", answer_of(text) or "")
    return found.group() if found else ""


def strict_letter(text, options):
    """A response -> the letter that its first closed <answer> means, or "". Source: ours.

    The whole text of an option means that option. Otherwise it is the only option letter, of any
    case, that stands alone as a word outside an option's text: "The answer is C." is C. Two letters
    count as none: "B or C", "C. is wrong, the answer is D". An "a" directly before an option's text
    is an article ("A red wall" has no letter), and so is a lower-case "a" between words ("it's a
    trap").
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


def summarise(lines, average="micro", seed=0):
    """Result lines -> {group: scores}, "all" last. Source: sec. 4.

    Each group has n, accuracy (over the n that were read), interval (95 %), unparsed, skipped,
    strict and official accuracy and unparsed, and spans, latents and tokens per answer. Lines of
    TwiFF-Bench have chain, answer and average over the n judged ones, interval (of the average),
    failed (the judge gave no scores) and waiting (the judge was not asked yet). average: "all" is
    micro, over the samples, or macro, the mean of the groups.
    """
    table = {}
    for group in [*sorted({line["group"] for line in lines} - {"all"}), "all"]:
        some = [line for line in lines if group in (line["group"], "all")]
        table[group] = scores(some, group == "all" and average == "macro", seed)
    return table


def scores(lines, macro=False, seed=0):
    """The scores of result lines as a dict, see `summarise`. macro: every group weighs the same."""
    # deviation 2: lines that were not read, or not judged, are in no score
    read = [line for line in lines if "skipped" not in line]
    judged = any("parsed" in line for line in lines)
    counted = [line for line in read if "judged" in line] if judged else read
    clips = [str(line.get("clip", i)) for i, line in enumerate(counted)]
    groups = [line["group"] for line in counted] if macro else None

    out = dict(n=len(counted), skipped=len(lines) - len(read))
    if judged:  # TwiFF-Bench
        for name in ("chain", "answer", "average"):
            out[name] = mean_of([line["judged"][name] for line in counted], groups)
        averages = [line["judged"]["average"] for line in counted]
        out["interval"] = bootstrap(averages, clips, groups, seed) if counted else [0.0, 5.0]
        out["failed"] = sum("why" in line for line in read)
        out["unparsed"] = sum(not line["parsed"] for line in read)
        out["waiting"] = len(read) - len(counted) - out["failed"]
    else:
        right = [line["right"] for line in read]
        out["right"], out["accuracy"] = sum(right), mean_of(right, groups)
        # deviation 3: the paper gives no intervals
        out["interval"] = share_interval(right, clips, groups, seed)
        out["unparsed"] = sum(line["picked"] is None for line in read)
        for name in ("strict", "official"):
            if read and all(name in line for line in read):
                out[name] = mean_of([line[name] == line["gold"] for line in read], groups)
                out[f"{name}_unparsed"] = sum(not line[name] for line in read)
    for name in ("spans", "latents", "tokens"):
        out[name] = sum(line[name] for line in read) / max(1, len(read))
    return out


# -------------------------------------------------------------------------- the latents, exchanged

NEEDS_FUTURES = ("true", "shuffled", "noise")
MEASURED = 64  # rows with futures that the scale of `noise` is measured on


def make_feed(config, model, rows):
    """What `--latents` feeds the spans -> feed_for, a function. Source: ours.

    feed_for(rows of a batch) -> feed, the argument of `generate`, and {id: why} for rows whose
    futures cannot be read: they are fed zeros, and their answers are not used. What a row is fed
    depends on the row alone, not on its batch or rank.
    """
    kind, budget = config.latents, config.budgets.future
    if kind in ("generated", "none"):
        return lambda some: (own_latent, {})
    zero = torch.zeros(1, model.lm_head.in_features, device=model.device)  # (1, D)
    donor_of = donors(rows) if kind == "shuffled" else {}
    if kind == "noise":
        mean, deviation = noise_scale(model, rows, budget)  # (D,) each

    def vectors(row):
        """The vectors fed to a row's spans, a frame each: [(n_m, D), ...]. Raises ClipError."""
        if kind == "zero":
            return [zero]
        if kind == "pause":
            return [model.get_input_embeddings().weight[model.config.latent_id].detach()[None]]
        if kind == "noise":  # for eight spans of the greatest length
            digest = hashlib.sha256(f"{config.seed} {row.id}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            noise = torch.randn(8, config.max_latents, len(mean), generator=generator)
            return list(mean + deviation * noise.to(model.device))
        return true_vectors(model, donor_of.get(row.id, row), budget)

    def feed_for(some):
        fed, lost = [], {}
        for row in some:
            try:
                fed.append(vectors(row))
            except ClipError as e:
                lost[row.id] = f"its future frames cannot be fed: {e}"
                fed.append([zero])
        return feed_of(fed), lost

    return feed_for


def feed_of(vectors):
    """[the frames of each row] -> feed(model, state): span m, place j is fed frame m's vector j.

    The last frame and the last vector of a frame are repeated: min(m, M - 1), min(j, n_m - 1).
    """
    M, J = max(map(len, vectors)), max(len(v) for frames in vectors for v in frames)

    def filled(frames):
        rows = [torch.cat([v, v[-1:].expand(J - len(v), -1)]) for v in frames]
        return torch.stack([*rows, *[rows[-1]] * (M - len(rows))])  # (M, J, D)

    table = torch.stack([filled(frames) for frames in vectors])  # (B, M, J, D)

    def feed(model, state):
        m, j = state.span_number.clamp(0, M - 1), state.count.clamp(0, J - 1)
        return table[state.row, m, j].to(state.h.dtype)  # (R, D)

    return feed


def true_vectors(model, row, budget):
    """The embeddings of a row's true futures, a frame each: [(n_m, D), ...]. Raises ClipError."""
    patches, grid = stack(load_frames(row.futures, budget))
    pixels = normalise(patches).to(model.device)
    e = model.encode_frames(pixels, grid.to(model.device))  # (N, D)
    return list(e.split((grid.prod(1) // 4).tolist()))


def donors(rows):
    """{id: the Row whose futures `shuffled` feeds}: the next of the same group about another clip.

    If the group has none, it is the next row about another clip. The first row follows the last.
    """
    out = {}
    for i, row in enumerate(rows):
        after, clip = [*rows[i + 1 :], *rows[:i]], clip_of(row)
        alike = (r for r in after if r.group == row.group and clip_of(r) != clip)
        other = (r for r in after if clip_of(r) != clip)
        out[row.id] = next(alike, None) or next(other)
    return out


def noise_scale(model, rows, budget):
    """Mean and standard deviation (2, D) of the true embeddings of the first MEASURED rows.

    Rows whose futures cannot be read do not count. Raises ValueError if none can.
    """
    measured = []
    for row in rows:
        if len(measured) == MEASURED:
            break
        try:
            measured.append(torch.cat(true_vectors(model, row, budget)))
        except ClipError:  # named when the row's turn comes
            continue
    if not measured:
        raise ValueError("--latents noise: no true future can be read, so it has no scale")
    e = torch.cat(measured).float()  # (N, D)
    return torch.stack([e.mean(0), e.std(0, unbiased=False)])


# ------------------------------------------------------------------------------------------ the run


def evaluate(config, model=None, tokenizer=None, rows=None):
    """Run the evaluation -> {group: scores}, the same on every rank.

    model, tokenizer: config.model, if the caller has loaded it already. rows: to ask these instead
    of those in config.data. A folder with results of the same settings is continued. Raises
    SystemExit if it has other settings or too many records are bad, ValueError for rows that cannot
    be scored.
    """
    # the rows; records that cannot be used are named before a model is loaded
    machine = Machine(config.bf16)
    average, bad = "micro", []
    if rows is None:
        need_data(config)
        root = config.media_root or None
        rows, average = read_benchmark(config.benchmark, config.data, root, bad)
    report_bad(bad, len(rows) + len(bad), config.max_bad)
    rows = rows[: config.limit or None]
    unanswerable = check(rows, config)

    # the results of earlier runs, to which `book.add` appends lines; prompts of similar length come
    # together, which saves padding
    free = FREE - {"batch", "limit"} if config.latents in ("noise", "shuffled") else FREE
    settings = settings_of(config, free)
    ordered = sorted(rows, key=lambda row: (row.group, len(row.question)))
    book = Book(config.out, "samples", {row.id: row for row in ordered}, settings, machine)

    # a model is needed if anything is left
    blocks, encode_row = book.blocks(config.batch), None
    if blocks:
        if model is None:
            model, tokenizer = machine.load(settings["model"])
        encode_row = functools.partial(encode, tokenizer=tokenizer, config=config, train=False)
        feed_for = make_feed(config, model, rows)
        shown = shown_in_report(rows, config.report)
        ids = model.config.latent_start_id, model.config.latent_id

    # this rank's blocks, a list of rows and of their encoded prompts
    # deviation 1: rows that cannot be read are left out; walk writes why, and the next run tries
    # them again
    for some, samples in walk(book, blocks, encode_row, config.workers):
        # the answers, greedily
        began = time.time()
        feed, lost = feed_for(some)
        rollout, tokens, texts = ask(
            model,
            tokenizer,
            samples,
            feed=feed,
            max_new_tokens=config.max_new_tokens,
            max_latents=config.max_latents,
            banned=ids[:1] if config.latents == "none" else (),
            cuda_graph=config.cuda_graph,
        )
        seconds = round((time.time() - began) / len(some), 5)

        # a line for each row: its answer, and what was imagined
        lines = {}
        for i, row in enumerate(some):
            if row.id in lost:
                lines[row.id] = dict(skipped=lost[row.id])
                continue
            lengths = span_lengths(tokens[i], *ids)
            line = dict(
                clip=clip_of(row),
                **read_answer(row, texts[i], config.benchmark == "futurebench"),
                answer=row.answer,
                response=one_mark_a_span(texts[i]),
                tokens=len(tokens[i]),
                spans=len(lengths),
                latents=sum(lengths),
                finish=rollout.finish[i],
                seconds=seconds,
            )
            if row.id in shown:
                latents = rollout.latents[i]  # (N, D)
                line["imagined"] = dict(
                    imagined(model, row, latents, lengths, config.budgets.future),
                    diversity=round(diversity_reward(latents, lengths), 4),
                    format=format_reward(line["response"]),
                    repetition=repetition_score(line["response"]),
                )
            lines[row.id] = line
        book.add(lines)

    # the scores, over the lines of all ranks in the rows' order
    done = book.finish()
    lines = [done[row.id] for row in rows]
    add_verdicts(config.out, lines)
    table = summarise(lines, average, config.seed)
    if machine.master:
        summary = dict(settings, **about(rows, lines, unanswerable))
        summary.update(average=average, scores=table, unusable=[s._asdict() for s in bad])
        show(config.out, summary, lines, rows)
    return table


def check(rows, config):
    """Refuse rows that cannot be scored -> the ids of those whose answer is none of their options.

    These are named and count as wrong. Raises SystemExit if they are too many, ValueError for a row
    without options, an id that is used twice, and a row without true futures if `--latents` needs
    them.
    """
    if config.latents not in LATENTS:
        raise ValueError(f"latents is {config.latents!r}: several at once is for the command line")
    if len({row.id for row in rows}) < len(rows):
        raise ValueError(
            f"{config.data}: ids are not unique, so a resumed run could not tell its samples apart"
        )
    for row in rows:
        if not row.options and config.benchmark != "twiffbench":
            raise ValueError(f"{row.where}: no options; multiple choice needs them")
        if config.latents in NEEDS_FUTURES and not row.futures:
            raise ValueError(
                f"{row.where}: --latents {config.latents} needs the true future frames, "
                "this row has none"
            )
    if config.latents == "shuffled" and len({clip_of(row) for row in rows}) < 2:
        raise ValueError("--latents shuffled needs rows of at least two clips")
    bad = {row.id: reason for row in rows if (reason := no_option(row))}
    fate = "have an answer that is no option and count as wrong"
    report_bad(list(bad.values()), len(rows), config.max_bad, fate)
    return list(bad)


def clip_of(row):
    """The clip of a question: the path of its first clip or picture; its id if that is bytes."""
    for part in row.prompt:
        source = getattr(part, "path", None) or getattr(part, "source", None)
        if isinstance(source, str):
            return source
    return row.id


def read_answer(row, text, official=False):
    """A response -> the fields of its line that describe the answer, as a dict. Source: ours.

    With options these are the readings of the answer, with `official` if that is asked for. Without
    options it is whether there is an answer.
    """
    if not row.options:
        return dict(parsed=answer_of(text) is not None)
    picked, gold = pick(answer_of(text), row.options), pick(row.answer, row.options)
    readings = dict(
        right=gold is not None and picked == gold,
        picked=picked,
        gold=None if gold is None else chr(65 + gold),
        strict=strict_letter(text, row.options),
    )
    return dict(readings, official=official_letter(text)) if official else readings


def main(config):
    """`evaluate` with each kind of --latents: frames that one has read, the next need not read."""
    kinds = config.latents.split(",")
    for kind in kinds:
        out = config.out if len(kinds) == 1 else f"{config.out}_{kind}"
        evaluate(dataclasses.replace(config, latents=kind, out=out))


if __name__ == "__main__":
    run_script(main, Config)
