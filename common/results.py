"""Results over rows: a walk that can be killed and resumed, and intervals of scores.

    book = Book(folder, "probe", rows, settings, machine)     # the results of earlier runs
    blocks = book.blocks(config.batch)                        # still to do, the same on every rank
    for some, encoded in walk(book, blocks, encode_row, config.workers):
        book.add({row.id: line for row, line in ...})         # written at once
    lines = book.finish()                                     # of all ranks, in the rows' order

A block is a fixed group of neighbouring rows. It is always encoded and answered as a whole, even if
only one of its lines is missing, because the rest of a batch changes what is generated. So the
results depend neither on the number of ranks nor on restarts. A row that cannot be read gets a line
that says why, and the next run tries it again.
"""

import dataclasses
import glob
import hashlib
import json
import math
import os

import numpy as np
from tqdm import tqdm

from common.ahead import read_ahead
from common.clips import ClipError
from common.folder import model_fingerprint, newest, read_json
from common.formats import RecordError, Row, Skipped
from common.run import read_lines, write, write_json


def settings_of(config, free):
    """The settings that two runs on one folder must share, as a dict: all fields but `free`.

    The weights are among them, because the same folder may hold another model by now. Raises
    SystemExit if there is no model.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    folder = newest(config.model)
    return dict(settings, model=folder, weights=model_fingerprint(folder))


def prompt_hash(row):
    """A hash of what a row asks: texts, frames by file name, future frames, answer, options."""

    def plain(part):
        if isinstance(part, str):
            return part
        source, *rest = part
        if isinstance(source, bytes):
            return [hashlib.sha256(source).hexdigest(), *rest]
        return [os.path.basename(source), *rest]

    parts = [plain(part) for part in (*row.prompt, "future", *row.futures)]
    return hashlib.sha256(json.dumps([parts, row.answer, row.options]).encode()).hexdigest()[:16]


# --------------------------------------------------------------------------------- the lines


def is_final(line):
    """Whether a line, or None, holds a result."""
    return line is not None and "skipped" not in line and "unjudged" not in line


def enter(lines, line):
    """Put a line into {id: line}, unless a better one is there.

    A result stays; "unjudged" gives way to a result, "skipped" to anything.
    """
    before = lines.get(line["id"])
    if before is None or "skipped" in before or (is_final(line) and not is_final(before)):
        lines[line["id"]] = line


def read_book(folder, name):
    """The result lines in a folder, of all ranks and runs -> {id: line}."""
    base, lines = os.path.join(glob.escape(folder), name), {}
    for path in sorted(glob.glob(f"{base}.jsonl") + glob.glob(f"{base}_*.jsonl")):
        for line in read_lines(path):
            enter(lines, line)
    return lines


def check_rows(folder, lines, rows):
    """Raises SystemExit if a line is about another question, answer or frames than its row."""
    for id, row in rows.items():
        if not isinstance(row, Row) or "prompt" not in lines.get(id, {}):
            continue
        if lines[id]["prompt"] != prompt_hash(row) and "skipped" not in lines[id]:
            raise SystemExit(
                f"{row.where}: {folder} holds {id!r} with another question, answer or frames: "
                "choose another --out"
            )


def check_settings(folder, settings):
    """Raises SystemExit if the lines in a folder were made with other settings."""
    path = os.path.join(folder, "settings.json")
    before = read_json(path) if os.path.exists(path) else {}
    names = sorted(before.keys() | settings.keys())
    changed = [name for name in names if before.get(name) != settings.get(name)]
    if changed:
        raise SystemExit(
            f"{folder} holds results with other values of {', '.join(changed)}: "
            "choose another --out"
        )


class Book:
    """The result lines of a folder, from all ranks and runs.

    rows: {id: Row, or Skipped for a record that cannot be used}, in order. Each rank appends its
    lines to NAME_RANK.jsonl; `finish` joins them in NAME.jsonl. Settings go to settings.json.
    Raises SystemExit if the folder holds results of other settings, or of other rows with these
    ids.
    """

    def __init__(self, folder, name, rows, settings, machine):
        self.folder, self.name, self.rows, self.machine = folder, name, rows, machine
        # the first rank alone reads, so that all ranks start from the same lines
        [self.lines] = machine.gather([read_book(folder, name)] if machine.master else [])
        if self.lines:
            check_settings(folder, settings)
            check_rows(folder, self.lines, rows)
        os.makedirs(folder, exist_ok=True)
        if machine.master:
            write_json(os.path.join(folder, "settings.json"), settings)
        self.part = os.path.join(folder, f"{name}_{machine.rank}.jsonl")
        self.new = []

    def missing(self, ids):
        """The ids that have no line, or one that says why they could not be read."""
        return [id for id in ids if "skipped" in self.lines.get(id, {"skipped": ""})]

    def blocks(self, size):
        """The blocks of `size` neighbours in which a line is missing: lists of ids, all ranks'."""
        ids = list(self.rows)
        blocks = [ids[i : i + size] for i in range(0, len(ids), size)]
        return [block for block in blocks if self.missing(block)]

    def add(self, results):
        """Append {id: its line's content} to this rank's file. A row that has a result keeps it."""
        with open(self.part, "a", encoding="utf-8") as f:
            for id, result in results.items():
                row = self.rows[id]
                if is_final(self.lines.get(id)):
                    continue
                if "skipped" in result:
                    tqdm.write(f"skipped {row.where}: {result['skipped']}")
                asked = {}
                if isinstance(row, Row):
                    asked = dict(group=row.group, prompt=prompt_hash(row))
                line = dict(id=id, **asked, **result)
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
                self.new.append(line)

    def finish(self):
        """Join the lines of all ranks in one file, in the rows' order -> {id: line} of the rows.

        Lines of other rows stay at the end of the file, so a run on fewer rows loses nothing.
        """
        for line in self.machine.gather(self.new):
            enter(self.lines, line)
        of_rows = {id: self.lines[id] for id in self.rows if id in self.lines}
        if self.machine.master:
            everything = of_rows | self.lines
            texts = [json.dumps(line, ensure_ascii=False) for line in everything.values()]
            path = os.path.join(self.folder, self.name)
            write(f"{path}.jsonl", "".join(text + "\n" for text in texts))
            for part in glob.glob(f"{glob.escape(path)}_*.jsonl"):
                os.remove(part)
        self.machine.wait()
        self.lines = of_rows
        return of_rows


# ---------------------------------------------------------------------------------- the walk


class Encoded:
    """{id: row} -> what encode_row makes of each row; a Skipped for a row that cannot be read."""

    def __init__(self, rows, encode_row):
        self.rows, self.encode_row = rows, encode_row

    def __getitem__(self, id):
        row = self.rows[id]
        try:
            return row if isinstance(row, Skipped) else self.encode_row(row)
        except (ClipError, RecordError) as e:
            return Skipped(row.where, str(e))


def walk(book, blocks, encode_row, workers):
    """Yields (rows, encoded) of this rank's share of the blocks, read ahead by worker processes.

    encode_row(row) -> anything but a Skipped. A row that cannot be read gets its line here and is
    left out. A block is left out if all its readable rows have their lines.
    """
    mine = book.machine.my_part(blocks)
    ahead = read_ahead(Encoded(book.rows, encode_row), mine, workers)
    total = sum(map(len, mine))
    with tqdm(total=total, desc=book.name, disable=not book.machine.master, mininterval=2) as bar:
        for block, encoded in zip(mine, ahead):
            readable, skipped = {}, {}
            for id, result in zip(block, encoded):
                if isinstance(result, Skipped):
                    skipped[id] = dict(skipped=result.why)
                else:
                    readable[id] = result
            book.add(skipped)
            if book.missing(readable):
                yield [book.rows[id] for id in readable], list(readable.values())
            bar.update(len(block))


# -------------------------------------------------------------------------------------- intervals


def mean_of(values, groups=None):
    """The mean of values, or with a label for each, the mean of the groups' means (macro).

    values, groups: lists of the same length. Without a value it is 0.
    """
    if not len(values):
        return 0.0
    values = np.asarray(values, float)
    labels = np.zeros(len(values)) if groups is None else np.asarray(groups)
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def wilson(right, n, z=1.96):
    """Wilson's 95 % interval (low, high) of a share of n; (0, 1) if n = 0. Source: Wilson 1927."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z / (1 + zz) * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values, clips=None, groups=None, seed=0, draws=1000):
    """95 % interval of `mean_of(values, groups)`: [low, high]. Source: Efron 1979, percentiles.

    clips: the clip that each value is about. A clip is drawn with all its values, because questions
    about one clip are not independent. Clips are drawn once for all groups, because groups may
    share them; a draw leaves out a group that has no value in it. None = each value has a clip of
    its own. Raises ValueError if there is no value, or the lists differ in length.
    """
    values = np.asarray(values, float)
    clips = np.arange(len(values)) if clips is None else np.asarray(clips)
    groups = np.zeros(len(values)) if groups is None else np.asarray(groups)
    if not 0 < len(values) == len(clips) == len(groups):
        raise ValueError(f"{len(values)} values, {len(clips)} clips, {len(groups)} groups")

    # the sum and the number of the values of each group and clip
    _, clip = np.unique(clips, return_inverse=True)
    _, group = np.unique(groups, return_inverse=True)
    sums = np.zeros((group.max() + 1, clip.max() + 1))  # (groups, clips)
    counts = np.zeros_like(sums)
    np.add.at(sums, (group, clip), values)
    np.add.at(counts, (group, clip), 1)

    # as many clips as there are, drawn with replacement
    rng, means = np.random.default_rng(seed), []
    for _ in range(draws):
        drawn = rng.integers(sums.shape[1], size=sums.shape[1])
        total, n = sums[:, drawn].sum(1), counts[:, drawn].sum(1)  # (groups,)
        means.append((total[n > 0] / n[n > 0]).mean())
    return [round(float(v), 6) for v in np.percentile(means, (2.5, 97.5))]


def share_interval(values, clips, groups=None, seed=0):
    """95 % interval of `mean_of` right (1) and wrong (0) answers: [low, high]. Source: ours.

    It is the bootstrap where that works. It does not if all answers are equal, because then all
    draws are equal, and it is too narrow for fewer than 30 clips (of one group). There it is
    Wilson's, with the number of clips as n.
    """
    n = len(set(clips))
    if len(set(values)) < 2 or (n < 30 and groups is None):
        return [round(v, 6) for v in wilson(mean_of(values) * n, n)]
    return bootstrap(values, clips, groups, seed)


def paired_bootstrap(a, b, clips=None, seed=0, draws=1000, groups=None):
    """Two runs on the same questions -> (mean of b - a, its 95 % interval [low, high]).

    a, b: a value for each question, in the same order; clips and groups as in `bootstrap`. A clip
    is drawn with all its questions, and for both runs at once. Raises ValueError as `bootstrap`.
    """
    gains = np.asarray(b, float) - np.asarray(a, float)
    interval = bootstrap(gains, clips, groups, seed, draws)
    return mean_of(gains, groups), interval
