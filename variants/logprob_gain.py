"""A cheaper visual gain: what the future does to the probability of the gold answer. Ours.

    l_t = 1/n sum_i log p(a_i | a_<i, observed prefix, question)      a_1 ... a_n: the gold answer
    l_v = the same, with the later key frames in sight
    gain = l_v - l_t;  keep gain >= 0, rank by gain, take the top K

    python -m variants.logprob_gain --model DIR --data pool.jsonl --k 50000

A fork of curate.py (sec. 3.2): the same pool, the same two prompts, the same walk. It takes one
forward for each condition instead of n rollouts, and asks no judge. Writes OUT/logprob.jsonl and
OUT/selected.jsonl (.parquet if the pool is), best first.

Where this differs from curate.py:
 1. The score, and the threshold that goes with it: 0.
 2. Ties go to the smaller sha256 of the id.

Axis letters: B rows, L tokens, D hidden, V vocabulary.
"""

import dataclasses
import functools
import hashlib
import os

import torch

from common.cli import run_script
from common.formats import Skipped, report_bad
from common.machine import Machine
from common.results import Book, check_rows, read_book, settings_of, walk
from curate import CONDITIONS, FREE, encode_conditions, read_pool, visual_gain, write_selected
from curate import Config as CurateConfig
from data import collate, encode, model_inputs, to_device


@dataclasses.dataclass
class Config(CurateConfig):
    out: str = "runs/logprob_gain"  # the folder of the scores and of the selection


@torch.no_grad()
def mean_logprob(model, batch, empty):
    """Mean log-probability of the gold answer's tokens in `<answer>gold</answer>` -> B floats.

    batch: prompts with that answer as labels, right-padded. empty: the labels of an empty answer;
    tokens that an answer shares with it at either end are the tags', and are left out. Ours.
    """
    h, _ = model.hidden(**model_inputs(batch))  # (B, L, D)
    means = []
    for b, labels in enumerate(batch["labels"]):
        at = (labels != -100).nonzero()[:, 0]  # (answer tokens,)
        ids = labels[at].tolist()
        head = min(len(os.path.commonprefix([ids, empty])), len(ids) - 1)
        tail = min(len(os.path.commonprefix([ids[::-1], empty[::-1]])), len(ids) - 1 - head)
        at = at[head : len(at) - tail]
        logp = model.logits(h[b, at - 1]).log_softmax(-1)  # (answer tokens, V)
        means.append(logp.gather(1, labels[at, None]).mean().item())
    return means


def probe(config):
    """Score the candidates that have no score yet -> {id: line} with logp_t and logp_v. Ours.

    Raises SystemExit as `curate.probe` does.
    """
    # the pool, and what earlier runs have done
    machine = Machine()
    _, rows = read_pool(config)
    bad = [row for row in rows.values() if isinstance(row, Skipped)]
    report_bad(bad, len(rows), config.max_bad)
    book = Book(config.out, "logprob", rows, settings_of(config, FREE), machine)

    # the model, and which labels of an answer are those of its tags
    blocks, encode_row = book.blocks(config.batch), None
    if blocks:
        model, tokenizer = machine.load(config.model)
        encode_row = functools.partial(
            encode_conditions, tokenizer=tokenizer, config=config, train=True
        )
        any_row = next(row for row in rows.values() if not isinstance(row, Skipped))
        bare = dataclasses.replace(any_row, prompt=[], response=[], answer="")
        labels = encode(bare, tokenizer, config)["labels"]
        empty = [label for label in labels if label != -100]

    # one forward for each condition
    for some, samples in walk(book, blocks, encode_row, config.workers):
        lines = {row.id: {} for row in some}
        for condition in CONDITIONS:
            batch = collate([s[condition] for s in samples], tokenizer.pad_token_id or 0)
            means = mean_logprob(model, to_device(batch, model.device), empty)
            for row, mean in zip(some, means):
                # deviation 1: a log-probability instead of a count of right answers
                lines[row.id][f"logp_{condition}"] = round(mean, 6)
        book.add(lines)
    return book.finish()


def cut(config):
    """The kept candidates' records, best first; written beside the scores. Ours."""
    records, rows = read_pool(config)
    lines = read_book(config.out, "logprob")
    check_rows(config.out, lines, rows)
    gains = {}
    for id in rows:
        if "logp_t" in lines.get(id, {}):
            gains[id] = visual_gain(lines[id]["logp_t"], lines[id]["logp_v"])

    def rank(id):
        return -gains[id], hashlib.sha256(id.encode()).hexdigest()  # deviation 2: no p_t to compare

    chosen = sorted([id for id in gains if gains[id] >= 0], key=rank)[: config.k or None]
    path = write_selected(config, records, chosen)
    skipped = len(rows) - len(gains)
    print(f"{len(chosen)} of {len(rows)} candidates chosen, {skipped} without a score; {path}")
    return [records[id] for id in chosen]


def main(config):
    """The parts that `part` names; the first rank alone selects."""
    if config.part != "select":
        probe(config)
    if config.part != "probe" and int(os.environ.get("RANK", 0)) == 0:
        cut(config)


if __name__ == "__main__":
    run_script(main, Config)
