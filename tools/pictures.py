"""Latents back to pixels: teach a painter from true frames, then show what a model imagines.

    python -m tools.pictures --model DIR --data rows.jsonl                      # teach it
    python -m tools.pictures --model DIR --data rows.jsonl --show test.jsonl --out pictures

The painter (common/pictures.py) turns one visual token back into its 32 x 32 pixels. It learns from
pairs of the frozen tower's tokens and the pixels they stand for, of the key frames of --data's
clips. A tenth of the clips is held out. It is saved beside the model; a second run finds it there.

--show: rows with their answers and coming frames. Of the first `rows` that have most coming frames,
the first three that the model answers right and the first three that it answers wrong are drawn:
OUT/imagined.png, and OUT/imagine.gif of the first right one. OUT/imagined.json has the errors: of
painted held-out frames, of each span's picture against the frame that really came, and against the
one that came in another clip. 1 = painting the mean cell always.

Source: ours.
"""

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tqdm import tqdm

from common.cli import run_script
from common.clips import ClipError, film, load_frames, normalise, stack
from common.formats import Frame, answer_of, read_rows
from common.pictures import (
    Painter,
    animate,
    draw_strips,
    paint,
    painting_error,
    shape_of,
    strip_of,
    to_cells,
)
from common.runs import Machine, newest, write_json
from data import DataConfig, at_least, collate, encode, model_inputs, to_device
from latent_decode import generate
from model import LATENT_END, LATENT_START
from rewards import pick, span_lengths


@dataclass
class Config(DataConfig):
    model: str = ""  # a model folder, or a run's folder (its newest checkpoint)
    data: str = ""  # rows whose clips and pictures the painter learns from
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    frames: int = 8000  # at most so many are learnt from, the held-out ones among them
    steps: int = 800  # of the painter
    batch: int = 128  # tokens a step
    lr: float = 2e-3
    seed: int = 0
    fresh: bool = False  # teach it again where there is one
    show: str = ""  # rows whose answers are drawn; "" = none
    rows: int = 256  # of them, at most so many are answered
    out: str = "pictures"  # where the drawings go
    max_new_tokens: int = 2048  # paper sec. 4
    max_latents: int = 8  # longest span: 2 * l_max  # official

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "steps", "batch", "rows", "max_new_tokens")
        at_least(self, 20, "frames")


# --------------------------------------------------------------------------------- from true frames


class Pairs(NamedTuple):
    """Visual tokens and what they stand for."""

    e: torch.Tensor  # (N, D)
    cells: torch.Tensor  # (N, 3, 32, 32)


def frames_of(rows, limit):
    """The frames of rows, each once, clip by clip -> at most `limit` Frames."""
    frames = {}
    for row in rows:
        for part in (*row.prompt, *row.response):
            if isinstance(part, Frame):
                frames[part] = None
    by_clip = sorted(frames, key=lambda frame: str(frame.source)[:200])
    return by_clip[:limit]


@torch.no_grad()
def look(model, frames, budget, batch=64):
    """Frames -> Pairs. Those that cannot be read are named and left out."""
    loaded = []
    for frame in tqdm(frames, desc="frames", mininterval=2):
        try:
            loaded += load_frames([frame], budget)
        except ClipError as error:
            tqdm.write(f"left out: {error}")
    if not loaded:
        raise SystemExit("no frame can be read: the painter has nothing to learn from")
    e, cells = [], []
    for i in range(0, len(loaded), batch):
        patches, grid = stack(loaded[i : i + batch])
        e.append(model.encode_frames(normalise(patches).to(model.device), grid.to(model.device)))
        cells.append(to_cells(patches))
    return Pairs(torch.cat(e).float(), torch.cat(cells).to(model.device))


def teach(pairs, config):
    """Pairs -> a Painter that has learnt from them: squared error, AdamW, cosine."""
    torch.manual_seed(config.seed)
    painter = Painter(pairs.e.shape[1]).to(pairs.e.device)
    painter.mean.copy_(pairs.e.mean(0))
    painter.scale.copy_((pairs.e - pairs.e.mean(0)).square().mean().sqrt())
    painter.blank.copy_(pairs.cells.mean(0))

    optimizer = torch.optim.AdamW(painter.parameters(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    bar = tqdm(range(config.steps), desc="painter", mininterval=2)
    for _ in bar:
        some = torch.randint(len(pairs.e), (config.batch,), device=pairs.e.device)
        loss = (painter(pairs.e[some]) - pairs.cells[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return painter.half().float().eval()  # as it is saved


def make_painter(model, folder, config):
    """The painter beside the model in `folder`, taught unless it is there -> it, its error.

    The error is that of held-out frames, None where it was there.
    """
    painter = Painter.beside(folder)
    if painter is not None and not config.fresh:
        return painter.to(model.device), None
    if not config.data:
        raise SystemExit("--data is missing: rows whose clips the painter learns from")
    frames = frames_of(read_rows(config.data, config.media_root or None, []), config.frames)
    clips = list(dict.fromkeys(frame.source for frame in frames))
    last = set(clips[len(clips) - max(1, len(clips) // 10) :])
    _, budget, _ = config.budgets
    painter = teach(look(model, [f for f in frames if f.source not in last], budget), config)
    held_out = look(model, [f for f in frames if f.source in last], budget)
    painter.save(folder)
    return painter, painting_error(painter, *held_out)


# -------------------------------------------------------------------------------- what is imagined


class Answer(NamedTuple):
    """One answer of the model."""

    row: object  # common.formats.Row
    text: str
    tokens: list
    latents: torch.Tensor  # (N, D)
    lengths: list  # of its spans
    right: bool | None  # None: the row has no options


def longest(rows, n):
    """The first n of the rows that have most coming frames."""
    counts = [sum(isinstance(part, Frame) for part in row.response) for row in rows]
    return [row for row, count in zip(rows, counts) if count == max(counts)][:n]


def answer(model, tokenizer, rows, config, batch=64):
    """Rows -> [Answer], greedy. Raises ClipError, RecordError."""
    c, answers = model.config, []
    limits = dict(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    for i in range(0, len(rows), batch):
        samples = [encode(row, tokenizer, config, train=False) for row in rows[i : i + batch]]
        inputs = collate(samples, tokenizer.pad_token_id or 0, side="left")
        rollout = generate(model, model_inputs(to_device(inputs, model.device)), **limits)
        for k, row in enumerate(rows[i : i + batch]):
            tokens = rollout.tokens[k, : rollout.lengths[k]].tolist()
            lengths = span_lengths(tokens, c.latent_start_id, c.latent_id)
            text, right = tokenizer.decode(tokens), None
            if row.options:
                right = pick(answer_of(text), row.options) == pick(row.answer, row.options)
            answers.append(Answer(row, text, tokens, rollout.latents[k], lengths, right))
    return answers


def errors_of(painter, answers, budget):
    """How far what the spans paint is from what came -> {what: error}, 1 = the mean cell.

    Span m is held against the m-th coming frame, where both are of one length; and against that
    of the next answer about another clip.
    """
    own, other = {}, []
    futures = [[part for part in a.row.response if isinstance(part, Frame)] for a in answers]
    for a, mine, theirs in zip(answers, futures, [*futures[1:], *futures[:1]]):
        spans = a.latents.split(a.lengths)
        for m, (span, frame) in enumerate(zip(spans, mine), 1):
            own.setdefault(f"imagined {m}", []).append((span, cells_of(frame, budget)))
        for span, frame in zip(spans, theirs):
            if frame.source != mine[0].source:
                other.append((span, cells_of(frame, budget)))
    errors = {}
    for name, pairs in [*own.items(), ("imagined, beside another clip's", other)]:
        pairs = [(span, cells) for span, cells in pairs if len(span) == len(cells)]
        if pairs:
            e, cells = (torch.cat(parts) for parts in zip(*pairs))
            errors[name] = painting_error(painter, e, cells.to(e.device))
    return errors


def cells_of(frame, budget):
    """A Frame -> its cells (K, 3, 32, 32), as the painter should paint them."""
    patches, _ = stack(load_frames([frame], budget))
    return to_cells(patches)


def show(painter, answers, budget, out, each=3):
    """The first right and the first wrong answers as strips; the first of them moves -> None."""
    chosen, strips = [], []
    for right in (True, False):
        chosen += [a for a in answers if a.right == right][:each]
    for a in chosen or answers[: 2 * each]:
        painted = paint(painter, a.latents.split(a.lengths), shape_of(film(a.row), budget))
        strips.append(strip_of(a.row, painted, a.row.question, verdict(a), a.right))
    draw_strips(strips, os.path.join(out, "imagined.png"))
    first = (chosen or answers)[0]
    animate(strips[0], texts_of(first.text), os.path.join(out, "imagine.gif"))


def texts_of(response):
    """A response -> its reasons before the first span and behind each span, without markup."""
    parts = response.partition("<answer>")[0].split(LATENT_START)
    texts = [parts[0], *(part.partition(LATENT_END)[2] for part in parts[1:])]
    return [" ".join(re.sub(r"<[^>]*>", " ", text).split()) for text in texts]


def verdict(a):
    """An Answer in a few words."""
    given = (answer_of(a.text) or "no answer").strip()
    if a.right is None:
        return given
    return f"{given}: right" if a.right else f"{given}: wrong, it is {a.row.answer}"


def main(config):
    """Teach the painter, draw what is imagined -> the errors {what: error}."""
    machine, folder = Machine(), newest(config.model)
    model, tokenizer = machine.load(folder)
    painter, error = make_painter(model, folder, config)
    errors = {} if error is None else {"true frames, held out": error}
    if config.show:
        _, budget, _ = config.budgets
        rows = longest(read_rows(config.show, config.media_root or None, []), config.rows)
        answers = answer(model, tokenizer, rows, config)
        errors.update(errors_of(painter, answers, budget))
        show(painter, answers, budget, config.out)
        write_json(os.path.join(config.out, "imagined.json"), errors)
    for name, value in errors.items():
        print(f"{value:.3f}  {name}")
    return errors


if __name__ == "__main__":
    run_script(main, Config)
