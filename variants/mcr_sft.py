"""Scripted loops: what variants/mcr.py learns before it is rewarded.

A fork of sft.py. A record with its chain and future frames becomes loops in which each future frame
is either looked at or imagined, by a draw; then the evidence is checked:

    record      R_0  frame  R_1  frame  R_2                          <answer>
    a loop      R_0  imagine, span  R_1  look K, [frame]  R_2  check, [seen]  <answer>
    another     R_0  imagine, span  R_1  imagine, span  R_2  check, [unseen]
                look K, [frame]  R_2  <answer>

In brackets is the environment's feedback (`mcr.environment` itself says it): it is fed, it has no
label and no part in Eq. (2). Eq. (3) is that of the imagined frames. After `unseen` the frame that
is asked for is looked at or not, by a draw again. No script is the best one: which to follow is for
the reward to say. A loop depends on the seed, the record and the number of its copy alone.

    python -m variants.mcr_sft --model DIR --data train.json --out runs/loops

What stays: Eq. (1)-(3), teacher forcing, the loop of steps. Source: ours, after InternVideo3.
"""

import dataclasses
import random

import sft
from common.cli import run_script
from common.clips import ClipError, load_frames
from common.formats import Frame, RecordError, Skipped
from common.run import rows_of
from data import MERGE, Samples, Special, at_least, encode, tokenize
from model import LATENT, LATENT_END, LATENT_START
from variants.mcr import Said, Shown, environment, frames_in, user_turn


@dataclasses.dataclass
class Config(sft.Config):
    copies: int = 4  # loops made from a record  # ours
    looks: float = 0.5  # share of the future frames that are looked at  # ours

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "copies")
        if not self.spans or self.eval_data or not 0 <= self.looks <= 1:
            raise ValueError("scripted loops: spans, no eval_data, and looks between 0 and 1")

    @property
    def label(self):
        return "loops"


def script(row, draw, looks=0.5):
    """A Row's chain as a loop: parts of its response and feedback, in order. Source: ours.

    draw: a random.Random.
    """
    parts, seen = [], frames_in(row.prompt)

    def act(action):
        feedback = environment(f"<reason>{action}</reason>", row, seen, looks_left=1)
        parts.extend([action, feedback])
        if isinstance(feedback, Shown):
            seen.append(feedback.frame)
        return feedback

    for part in row.response:
        if not isinstance(part, Frame):
            parts.append(part)
        elif draw.random() < looks:
            act(f"look {part.index}")
        else:
            parts.extend(["imagine", part])
    if act("check") == Said("unseen") and draw.random() < looks:
        act(f"look {frames_in(row.response)[-1].index}")
        parts.extend([part for part in row.response if isinstance(part, str)][-1:])
    return parts


def scripts(rows, config):
    """Rows -> `copies` loops of each."""
    loops = []
    for row in rows:
        for copy in range(config.copies):
            draw = random.Random(f"{config.seed} {row.id} {copy}")
            response = script(row, draw, config.looks)
            loops.append(dataclasses.replace(row, id=f"{row.id}#{copy}", response=response))
    return loops


def encode_loop(row, tokenizer, config):
    """A loop -> what `data.encode` makes of a row. Feedback has no label.

    Raises ClipError for media, RecordError for a sample over max_length.
    """
    sample = encode(row, tokenizer, config, train=False)
    ids, labels, images = (list(sample[name]) for name in ("ids", "labels", "images"))
    futures = load_frames(frames_in(row.response), config.budgets[1])
    grids = iter(grid for _, grid in futures)
    latent = tokenizer.convert_tokens_to_ids(LATENT)

    def add(pieces, learnt=True):
        new = tokenize(pieces, tokenizer)
        ids.extend(new)
        labels.extend([token if learnt and token != latent else -100 for token in new])

    for part in row.response:
        if isinstance(part, (Shown, Said)):
            pieces, shown = user_turn(part, config)
            add([Special("<|im_end|>")])  # the policy hands over
            add(pieces, learnt=False)
            images += shown
        elif isinstance(part, Frame):
            n = int(next(grids).prod()) // MERGE**2
            add([Special(LATENT_START), *[Special(LATENT)] * n, Special(LATENT_END)])
        else:
            add([f"<reason>{part}</reason>"])
    add([f"<answer>{row.answer}</answer>", Special("<|im_end|>")])
    if len(ids) > config.max_length:
        raise RecordError(f"{row.where}: {len(ids)} tokens, max_length = {config.max_length}")
    return dict(sample, ids=ids, labels=labels, images=images, futures=futures)


class LoopSamples(Samples):
    """`data.Samples` of loops."""

    def __getitem__(self, i):
        try:
            return encode_loop(self.rows[i], self.tokenizer, self.config)
        except (ClipError, RecordError) as e:
            return Skipped(self.rows[i].where, str(e))


def train(config, rows=None):
    """`sft.train` on loops made of rows -> path of the last checkpoint."""
    rows = rows_of(config) if rows is None else rows
    return sft.train(config, scripts(rows, config), samples=LoopSamples)


if __name__ == "__main__":
    run_script(lambda config: print("last checkpoint:", train(config)), Config)
