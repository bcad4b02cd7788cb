"""What a model imagines while it answers, as pictures.

    python -m common.painter --model DIR --data rows.jsonl                  # teach it first
    python -m tools.pictures --model DIR --data test.jsonl --out pictures

The model answers the rows of --data that have the most future frames. The first three right and
the first three wrong answers are drawn in OUT/imagined.png, and OUT/imagine.gif shows the first of
them word by word. OUT/imagined.json has the errors of the pictures painted from the spans: against
the frame that really came, and against one that came in another clip. 0 = equal, 1 = as far off as
the mean picture.

Source: ours.
"""

import os
import re
import textwrap
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from common.cli import run_script
from common.clips import load_frames, stack
from common.folder import newest
from common.formats import Row, answer_of
from common.machine import Machine
from common.painter import (
    COLOURS,
    GAP,
    GREY,
    HEADS,
    INK,
    LINE,
    RIGHT,
    SIDE,
    WRONG,
    Painter,
    draw_strips,
    font,
    is_right,
    make_folder_of,
    painting_error,
    strip_of,
    tile,
    to_cells,
)
from common.run import rows_of, write_json
from data import DataConfig, at_least, encode
from latent_decode import ask
from model import LATENT_END, LATENT_START
from rewards import span_lengths


@dataclass
class Config(DataConfig):
    model: str = ""  # a model folder with a painter, or a run's folder (its newest checkpoint)
    data: str = ""  # rows with their answers and coming frames
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    rows: int = 256  # at most this many are answered
    batch: int = 64  # prompts decoded together
    out: str = "pictures"  # where the drawings go
    max_new_tokens: int = 2048  # paper sec. 4
    max_latents: int = 8  # longest span; a trained folder brings its own  # official

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "rows", "batch", "max_new_tokens")


class Answer(NamedTuple):
    """One answer of the model."""

    row: Row
    text: str
    spans: list  # of its latents, (n, D) each
    right: bool | None  # None: the row has no options


def answer(model, tokenizer, rows, config):
    """Rows -> [Answer], decoded greedily. Raises ClipError, RecordError."""
    limits = dict(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    answers, ids = [], (model.config.latent_start_id, model.config.latent_id)
    for i in range(0, len(rows), config.batch):
        some = rows[i : i + config.batch]
        samples = [encode(row, tokenizer, config, train=False) for row in some]
        rollout, tokens, texts = ask(model, tokenizer, samples, **limits)
        for k, (row, text) in enumerate(zip(some, texts)):
            spans = rollout.latents[k].split(span_lengths(tokens[k], *ids))
            answers.append(Answer(row, text, spans, is_right(row, answer_of(text))))
    return answers


def errors_of(painter, answers, budget):
    """The errors of the pictures painted from the spans -> {"imagined 1": error, ...}.

    Errors are `painting_error`'s. Span m is compared with the m-th future frame if both have the
    same length, and with the same frame of the next answer if that is about another clip.
    """
    pairs = {}  # {name: [(latents (n, D), cells (n, 3, 32, 32))]}
    for a, following in zip(answers, [*answers[1:], *answers[:1]]):
        for row in (a.row, following.row):
            for m, (span, frame) in enumerate(zip(a.spans, row.futures), 1):
                cells = to_cells(stack(load_frames([frame], budget))[0]).to(span.device)
                name = f"imagined {m}" if row is a.row else "imagined, beside another clip's"
                same_clip = row is not a.row and frame.source == a.row.futures[0].source
                if len(span) == len(cells) and not same_clip:
                    pairs.setdefault(name, []).append((span, cells))
    return {name: painting_error(painter, *map(torch.cat, zip(*p))) for name, p in pairs.items()}


def draw(painter, answers, budget, out, each=3):
    """The first right and the first wrong answers as strips, and the first of them as a GIF."""
    chosen = []
    for right in (True, False):
        chosen += [a for a in answers if a.right is right][:each]
    chosen = chosen or answers[: 2 * each]
    strips = [strip_of(painter, a.row, a.spans, answer_of(a.text), budget) for a in chosen]
    draw_strips(strips, os.path.join(out, "imagined.png"))
    animate(strips[0], texts_of(chosen[0].text), os.path.join(out, "imagine.gif"))


def animate(strip, texts, path):
    """An answer as a GIF at `path`: words appear one by one, and each span fades into its picture.

    texts: the words before the first span and those after each span, one more than there are
    spans. The last picture adds the verdict and, below what was imagined, what really came.
    """
    words, shares = [0] * len(texts), [0.0] * len(strip.imagined)  # how much of each is shown
    frames, times = [panel(strip, texts, words, shares)], [900]
    for k, text in enumerate(texts):
        for share in (0.05, 0.3, 0.6, 1.0) if 0 < k <= len(shares) else ():
            shares[k - 1] = share
            frames.append(panel(strip, texts, words, shares))
            times.append(180)
        for n in range(len(text.split())):
            words[k] = n + 1
            frames.append(panel(strip, texts, words, shares))
            times.append(280)
    frames.append(panel(strip, texts, words, shares, end=True))
    moving = dict(save_all=True, append_images=frames[1:], duration=[*times, 4000], loop=0)
    make_folder_of(path)
    frames[0].save(path, optimize=True, **moving)


def panel(strip, texts, words, shares, end=False):
    """One picture of `animate`: the first `words` of each text, pictures faded by `shares`."""
    step, columns = SIDE + 6 + 4 * GAP, len(strip.seen) + len(strip.imagined)
    top = 2 * LINE
    below = top + SIDE + 10 + 2 * LINE + GAP
    size = max(480, columns * step), below + SIDE + 6 + GAP
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), strip.title, INK, font(16))
    for column, pixels in enumerate(strip.seen):
        sheet.paste(tile(pixels, COLOURS["seen"]), (GAP + column * step, top))

    # a span begins as an empty frame, in which its picture appears
    first = len(strip.seen)
    for m, (pixels, share) in enumerate(zip(strip.imagined, shares)):
        if share:
            faded = pixels * share + 255 * (1 - share)
            picture = tile(faded.astype(np.uint8), COLOURS["imagined"])
            sheet.paste(picture, (GAP + (first + m) * step, top))

    # the words before the first span go below what was seen, the others below their span
    for k, (text, n) in enumerate(zip(texts, words)):
        x = GAP + (first + k - 1 if k else 0) * step
        room = step * (first if k == 0 else 1) - GAP
        shown = " ".join(text.split()[:n])
        for line, part in enumerate(textwrap.wrap(shown, room // 8)):  # 8 pixels a letter
            pen.text((x, top + SIDE + 10 + line * LINE), part, INK, font(15))
    if not end:
        return sheet

    pen.text((GAP, below), HEADS["came"], COLOURS["came"], font(15))
    colour = {True: RIGHT, False: WRONG, None: GREY}[strip.right]
    pen.text((GAP, below + 2 * LINE), strip.verdict, colour, font(20))
    for m, pixels in enumerate(strip.came[: len(strip.imagined)]):
        sheet.paste(tile(pixels, COLOURS["came"]), (GAP + (first + m) * step, below))
    return sheet


def texts_of(response):
    """A response -> its words before the first span and those after each span, without markup."""
    first, *rest = response.partition("<answer>")[0].split(LATENT_START)
    texts = [first, *(part.partition(LATENT_END)[2] for part in rest)]
    return [" ".join(re.sub(r"<[^>]*>", " ", text).split()) for text in texts]


def main(config):
    """Answer, draw -> the errors {name: error}. Raises SystemExit without a painter."""
    rows, folder, budget = rows_of(config), newest(config.model), config.budgets.future
    most = max(len(row.futures) for row in rows)
    rows = [row for row in rows if len(row.futures) == most][: config.rows]
    model, tokenizer = Machine().load(folder)
    painter = Painter.beside(folder)
    if painter is None:
        raise SystemExit(f"{folder} has no painter: python -m common.painter teaches one")

    painter.to(model.device)
    answers = answer(model, tokenizer, rows, config)
    errors = errors_of(painter, answers, budget)
    draw(painter, answers, budget, config.out)
    write_json(os.path.join(config.out, "imagined.json"), errors)
    for name, value in errors.items():
        print(f"{value:.3f}  {name}")
    return errors


if __name__ == "__main__":
    run_script(main, Config)
