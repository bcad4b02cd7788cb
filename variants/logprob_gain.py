"""A cheaper visual gain: what the future does to the probability of the gold answer. Ours.

    l_t = 1/n sum_i log p(a_i | a_<i, observed prefix, question)      a_1 ... a_n: the gold answer
    l_v = the same, with the later key frames in sight
    gain = l_v - l_t;  keep gain >= 0, rank by gain, take the top K

    python -m variants.logprob_gain --model DIR --data pool.jsonl --k 50000

A fork of curate.py (sec. 3.2): the same pool, the same two prompts, the same walk. It takes one
forward a condition instead of n rollouts, and asks no judge. Writes OUT/logprob.jsonl and
OUT/selected.jsonl (.parquet where the pool is), best first.

Where this differs from curate.py:
 1. The score, and the threshold that goes with it: 0.
 2. Ties go to the smaller sha256 of the id.
"""

import dataclasses
import hashlib
import os

import torch

import curate
from common.cli import run_script
from common.formats import Skipped, report_bad
from common.runs import Machine
from common.walk import Book, read_book, settings_of, walk
from curate import FREE, conditions, read_pool, visual_gain, write_selected
from curate import Config as CurateConfig
from data import encode, model_inputs, to_device


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
    machine = Machine(config.bf16)
    _, rows = read_pool(config)
    bad = [row for row in rows.values() if isinstance(row, Skipped)]
    report_bad(bad, len(rows), config.max_bad)
    settings = settings_of(config, FREE)
    book = Book(config.out, "logprob", rows, settings, machine)
    if blocks := book.blocks(config.batch):
        model, tokenizer = machine.load(settings["model"])
        nothing = dataclasses.replace(next(iter(rows.values())), prompt=[], response=[], answer="")
        labels = encode(nothing, tokenizer, config)["labels"]
        empty = [label for label in labels if label != -100]
        for block in walk(book, blocks, conditions, tokenizer, config, train=True):
            means = mean_logprob(model, to_device(block.batch, machine.device), empty)
            pairs = zip(means[::2], means[1::2])
            lines = [dict(logp_t=round(t, 6), logp_v=round(v, 6)) for t, v in pairs]
            book.add(dict(zip(block.readable, lines)))
    return book.finish()


def cut(config):
    """The kept candidates' records, best first; written beside the scores. Ours."""
    records, rows = read_pool(config)
    lines = read_book(config.out, "logprob")
    gains = {}
    for id in rows:
        if "logp_t" in lines.get(id, {}):
            gains[id] = visual_gain(lines[id]["logp_t"], lines[id]["logp_v"])

    def rank(id):
        return -gains[id], hashlib.sha256(id.encode()).hexdigest()

    chosen = sorted([id for id in gains if gains[id] >= 0], key=rank)[: config.k or None]
    place = {id: i for i, id in enumerate(records)}
    chosen_records = [records[id] for id in chosen]
    path = write_selected(config, chosen_records, [place[id] for id in chosen])
    skipped = len(rows) - len(gains)
    print(f"{len(chosen)} of {len(rows)} candidates chosen, {skipped} without a score; {path}")
    return chosen_records


def main(config):
    """`curate.main` with this score and this threshold."""
    curate.main(config, probe, cut)


if __name__ == "__main__":
    run_script(main, Config)
