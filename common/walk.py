"""A walk over rows that can be killed, shared by ranks and continued. curate's and evaluate's.

    book = Book(folder, "probe", rows, settings, machine)     # what is done already
    blocks = book.blocks(config.batch)                        # this rank's, where a line is missing
    for block in walk(book, blocks, prompts_of, tokenizer, config):
        book.add({id: line for id, line in ...})              # written at once
    lines = book.finish()                                     # of all ranks, in the rows' order

A block is a fixed group of neighbours. It is always encoded and answered as a whole, also where
only one of its lines is missing: what is generated then depends on neither ranks nor restarts.
What could not be read is a line too, and is tried again by the next run.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import os
from typing import NamedTuple

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.clips import ClipError
from common.formats import Frame, RecordError, Row, Skipped
from common.runs import newest, read_lines, write, write_json
from data import collate, encode


def settings_of(config, free):
    """What two runs on one folder must share: all fields but `free`, and the model -> a dict.

    A model trained anew in the same folder is another model: the time of its config.json counts.
    Raises SystemExit without a model.
    """
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in free}
    folder = newest(config.model)
    weights = os.path.join(folder, "config.json")
    written = os.path.getmtime(weights) if os.path.exists(weights) else None
    return dict(settings, model=folder, written=written)


def prompt_hash(row):
    """What is asked, as 16 hex digits: texts, frames by file name, future, answer, options."""

    def plain(part):
        if isinstance(part, str):
            return part
        source, *rest = part
        if isinstance(source, bytes):
            return [hashlib.sha256(source).hexdigest(), *rest]
        return [os.path.basename(source), *rest]

    future = [part for part in row.response if isinstance(part, Frame)]
    parts = [plain(part) for part in (*row.prompt, "future", *future)]
    return hashlib.sha256(json.dumps([parts, row.answer, row.options]).encode()).hexdigest()[:16]


class Book:
    """The result lines of a folder: what is done, by whichever rank, in whichever run. Ours.

    rows: {id: Row, or Skipped for what cannot be used}, in order. Lines go to NAME_RANK.jsonl and
    in the end to NAME.jsonl, settings to settings.json. A line that holds a result is final; one
    that says skipped or unjudged gives way to a result.
    Raises SystemExit if the folder holds lines of other settings, or of other rows by these ids.
    """

    def __init__(self, folder, name, rows, settings, machine):
        self.folder, self.name, self.rows, self.machine = folder, name, rows, machine
        own = read_book(folder, name) if machine.master else {}
        self.lines = machine.gather([own])[0]  # {id: line}; the first rank's view is everybody's
        if self.lines:
            self._refuse_others(settings)
        os.makedirs(folder, exist_ok=True)
        if machine.master:
            write_json(os.path.join(folder, "settings.json"), settings)
        self.part = os.path.join(folder, f"{name}_{machine.rank}.jsonl")
        self.new = []

    def _refuse_others(self, settings):
        path, before = os.path.join(self.folder, "settings.json"), {}
        if os.path.exists(path):
            with open(path) as f:
                before = json.load(f)
        names = sorted(before.keys() | settings.keys())
        changed = [name for name in names if before.get(name) != settings.get(name)]
        if changed:
            raise SystemExit(
                f"{self.folder} holds results with other values of {', '.join(changed)}: "
                "choose another --out"
            )
        check_rows(self.folder, self.lines, self.rows)

    def missing(self, ids):
        """Those that have no line, or one that says they could not be read."""
        return [id for id in ids if "skipped" in self.lines.get(id, {"skipped": ""})]

    def blocks(self, size):
        """Neighbours, `size` together, of which a line is missing: this rank's share of them."""
        ids = list(self.rows)
        blocks = [ids[i : i + size] for i in range(0, len(ids), size)]
        return self.machine.my_part([block for block in blocks if self.missing(block)])

    def add(self, results):
        """Append {id: what to say of it}; what has its result already is left as it is."""
        lines = []
        for id, result in results.items():
            if id in self.lines and is_final(self.lines[id]):
                continue
            row = self.rows[id]
            if "skipped" in result:
                tqdm.write(f"skipped {row.where}: {result['skipped']}")
            about = {}
            if isinstance(row, Row):
                about = dict(group=row.group, prompt=prompt_hash(row))
            lines.append(dict(id=id, **about, **result))
        with open(self.part, "a", encoding="utf-8") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self.new += lines

    def finish(self):
        """All ranks: the parts become one file, in the rows' order -> {id: line} of all rows.

        Lines of other ids stay in the file, behind: a run on fewer rows loses nothing.
        """
        for line in self.machine.gather(self.new):
            if not is_final(self.lines.get(line["id"], {"skipped": ""})):
                self.lines[line["id"]] = line
        of_rows = {id: self.lines[id] for id in self.rows if id in self.lines}
        if self.machine.master:
            every = of_rows | self.lines
            texts = [json.dumps(line, ensure_ascii=False) for line in every.values()]
            path = os.path.join(self.folder, self.name)
            write(f"{path}.jsonl", "".join(text + "\n" for text in texts))
            for part in glob.glob(f"{glob.escape(path)}_*.jsonl"):
                os.remove(part)
        self.machine.wait()
        self.lines = of_rows
        return self.lines


def is_final(line):
    """Whether a line holds a result."""
    return "skipped" not in line and "unjudged" not in line


def read_book(folder, name):
    """The lines of a folder, of all ranks and runs -> {id: line}; a result wins. Source: ours."""
    base, lines = os.path.join(glob.escape(folder), name), {}
    for path in sorted(glob.glob(f"{base}.jsonl") + glob.glob(f"{base}_*.jsonl")):
        for line in read_lines(path):
            if not is_final(lines.get(line["id"], {"skipped": ""})):
                lines[line["id"]] = line
    return lines


def check_rows(folder, lines, rows):
    """Raises SystemExit if a line was made of another question, answer or frames than its row."""
    for id, row in rows.items():
        line = lines.get(id, {"skipped": ""})
        if "skipped" in line or not isinstance(row, Row) or line["prompt"] == prompt_hash(row):
            continue
        raise SystemExit(
            f"{row.where}: {folder} holds {id!r} with another question, answer or frames: "
            "choose another --out"
        )


class Block(NamedTuple):
    """What is answered together."""

    ids: list  # of all its rows
    readable: list  # of those in the batch, in its order
    batch: dict  # `data.collate`'s: the prompts of the readable rows, one row's after another's


class _Prompts(Dataset):
    """The prompts of each row, encoded -> a list, or a Skipped if one of them cannot be read."""

    def __init__(self, rows, prompts_of, tokenizer, config, train):
        self.rows, self.prompts_of = rows, prompts_of
        self.tokenizer, self.config, self.train = tokenizer, config, train

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        if isinstance(row, Skipped):
            return row
        try:
            prompts = self.prompts_of(row)
            return [encode(p, self.tokenizer, self.config, self.train) for p in prompts]
        except (ClipError, RecordError) as e:
            return Skipped(row.where, str(e))


def _collate(rows, pad_id, side):
    """The rows of a block, encoded -> why each is skipped (None = it is not), the batch."""
    why = [row.why if isinstance(row, Skipped) else None for row in rows]
    prompts = [prompt for row, reason in zip(rows, why) if reason is None for prompt in row]
    return why, collate(prompts, pad_id, side)


def walk(book, blocks, prompts_of, tokenizer, config, train=False):
    """-> each Block of which a readable line is missing, read ahead by `config.workers` processes.

    prompts_of(row) -> the Rows whose prompts are encoded for it. train: with their responses,
    right-padded. What cannot be read gets its line here.
    """
    ids = [id for block in blocks for id in block]
    samples = _Prompts([book.rows[id] for id in ids], prompts_of, tokenizer, config, train)
    place = {id: i for i, id in enumerate(ids)}
    batches = DataLoader(
        samples,
        batch_sampler=[[place[id] for id in block] for block in blocks],
        collate_fn=functools.partial(
            _collate, pad_id=tokenizer.pad_token_id or 0, side="right" if train else "left"
        ),
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
    )
    hidden = not book.machine.master
    with tqdm(total=len(ids), desc=book.name, disable=hidden, mininterval=2) as bar:
        for block, (why, batch) in zip(blocks, batches):
            reasons = dict(zip(block, why))
            book.add({id: dict(skipped=w) for id, w in reasons.items() if w is not None})
            readable = [id for id in block if reasons[id] is None]
            if book.missing(readable):
                yield Block(block, readable, batch)
            bar.update(len(block))
