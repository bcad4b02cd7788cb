"""Latents back to pixels: the painter, how it learns, and strips that show what was imagined.

    python -m common.painter --model DIR --data rows.jsonl

A latent stands for one visual token of a coming frame, a cell of 32 x 32 pixels. `Painter` turns
such a token back into its pixels. The command teaches it with the vision tower frozen, from key
frames of the clips in --data: pairs of a token and the pixels that it stands for. It has never seen
a latent, so a picture painted from one shows what the model imagined, errors included.

The painter is saved in MODEL/painter, where evaluate.py, sample.py and tools/pictures.py find it.

Source: ours.

Axis letters: N tokens or latents, D hidden, H and W pixels.
"""

import base64
import io
import os
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from common.cli import run_script
from common.clips import (
    CELL,
    MERGE,
    PATCH,
    TEMPORAL,
    ClipError,
    film,
    fit,
    load_frames,
    normalise,
    stack,
)
from common.folder import newest
from common.formats import Frame, pick
from common.machine import Machine
from common.run import rows_of
from data import DataConfig, at_least


@dataclass
class Config(DataConfig):
    model: str = ""  # a model folder, or a run's folder (its newest checkpoint)
    data: str = ""  # rows with the clips and pictures that the painter learns from
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    frames: int = 8000  # at most this many frames, a tenth of their clips held out
    steps: int = 800
    batch: int = 128  # tokens a step
    lr: float = 2e-3
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "steps", "batch")
        at_least(self, 20, "frames")


class Painter(nn.Module):
    """Visual tokens (N, D) -> their cells (N, 3, 32, 32), pixels in [0, 1].

    It paints the difference to `blank`, the mean cell, which is the best guess without a token.
    """

    def __init__(self, D, width=64):
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))  # of the tokens it learns from
        self.register_buffer("scale", torch.ones(()))  # their standard deviation
        self.register_buffer("blank", torch.zeros(3, CELL, CELL))
        self.width, widths = width, (width, width, width // 2, width // 4)
        self.read = nn.Linear(D, width * 16)
        layers = []
        for a, b in zip(widths, widths[1:]):  # 4 -> 8 -> 16 -> 32 pixels
            layers += [nn.GELU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]
        self.grow = nn.Sequential(*layers, nn.GELU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, e):
        x = self.read((e.float() - self.mean) / self.scale)  # (N, 16 * width)
        return self.blank + self.grow(x.view(-1, self.width, 4, 4))  # (N, 3, 32, 32)

    @torch.no_grad()
    def picture(self, latents, shape):
        """The latents (N, D) of one frame -> uint8 (H, W, 3). shape: its (rows, columns) of cells.

        Missing latents leave grey cells and surplus latents add rows, so that both are visible.
        """
        rows, columns = shape
        cells = self(latents.to(self.blank.device)).clamp(0, 1)  # (N, 3, 32, 32)
        rows = max(rows, -(-len(cells) // columns))
        grey = cells.new_full((rows * columns - len(cells), *cells.shape[1:]), 0.8)
        return to_pixels(torch.cat([cells, grey]), columns)

    def save(self, folder):
        """Save it with the model in `folder`, in a subfolder that other code ignores."""
        os.makedirs(os.path.join(folder, "painter"), exist_ok=True)
        path = os.path.join(folder, "painter", "painter.safetensors")
        save_file({name: w.half() for name, w in self.state_dict().items()}, path + ".part")
        os.replace(path + ".part", path)

    @classmethod
    def beside(cls, folder):
        """The painter saved with the model in `folder`, or None."""
        path = os.path.join(folder, "painter", "painter.safetensors")
        if not os.path.exists(path):
            return None
        weights = {name: w.float() for name, w in load_file(path).items()}
        out, D = weights["read.weight"].shape
        painter = cls(D, width=out // 16)
        painter.load_state_dict(weights)
        return painter.eval()


def to_cells(patches):
    """Patches uint8 (P, 1536) of single frames, from `resize_and_cut` -> cells (N, 3, 32, 32).

    Pixels are in [0, 1]. There is a cell for each token, in the order of the tokens.
    """
    x = patches.float().view(-1, MERGE, MERGE, 3, TEMPORAL, PATCH, PATCH)[:, :, :, :, 0]
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, CELL, CELL) / 255


def to_pixels(cells, columns):
    """Cells (N, 3, 32, 32) of one frame, N = rows * columns -> uint8 (H, W, 3)."""
    x = cells.view(-1, columns, 3, CELL, CELL).permute(0, 3, 1, 4, 2)
    pixels = x.reshape(-1, columns * CELL, 3) * 255
    return pixels.round().to(torch.uint8).cpu().numpy()


def painting_error(painter, e, cells):
    """The squared error of the cells painted from e (N, D), over the squared error of `blank`.

    0 = exact, 1 = no better than the mean cell everywhere.
    """
    with torch.no_grad():
        error = (painter(e) - cells).square().sum() / (painter.blank - cells).square().sum()
    return error.item()


# ---------------------------------------------------------------------------------- how it learns


class Pairs(NamedTuple):
    """Visual tokens and the pixels that they stand for."""

    e: torch.Tensor  # (N, D)
    cells: torch.Tensor  # (N, 3, 32, 32)


@torch.no_grad()
def look(model, frames, budget, batch=64):
    """Frames -> Pairs. Frames that cannot be read are named and left out.

    budget: pixels (min, max) of a frame. Raises SystemExit if no frame can be read.
    """
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
    """Pairs -> a Painter trained on them: squared error, AdamW, one cycle of the learning rate."""
    torch.manual_seed(config.seed)
    painter = Painter(pairs.e.shape[1]).to(pairs.e.device)
    painter.mean.copy_(pairs.e.mean(0))
    painter.scale.copy_((pairs.e - pairs.e.mean(0)).square().mean().sqrt())
    painter.blank.copy_(pairs.cells.mean(0))

    optimizer = torch.optim.AdamW(painter.parameters(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, config.steps)
    for _ in tqdm(range(config.steps), desc="painter", mininterval=2):
        some = torch.randint(len(pairs.e), (config.batch,), device=pairs.e.device)
        loss = (painter(pairs.e[some]) - pairs.cells[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return painter.half().float().eval()  # rounded as in the file


def main(config):
    """Teach a painter and save it with the model -> its error on the frames of held-out clips.

    Raises SystemExit if the rows' frames are of fewer than two clips.
    """
    # each frame once, clip by clip; the last tenth of the clips is held out
    frames = {}
    for row in rows_of(config):
        frames |= {part: None for part in (*row.prompt, *row.response) if isinstance(part, Frame)}
    frames = sorted(frames, key=lambda frame: str(frame.source)[:200])[: config.frames]
    clips = list(dict.fromkeys(frame.source for frame in frames))
    if len(clips) < 2:
        raise SystemExit(f"{config.data}: key frames of {len(clips)} clips, expected two or more")
    held_out = set(clips[-max(1, len(clips) // 10) :])
    parts = [], []  # to learn from, held out
    for frame in frames:
        parts[frame.source in held_out].append(frame)

    folder = newest(config.model)
    model, _ = Machine().load(folder)
    pairs, others = (look(model, part, config.budgets.future) for part in parts)
    painter = teach(pairs, config)
    error = painting_error(painter, *others)
    painter.save(folder)
    print(f"{error:.3f}  true frames, held out")
    return error


# ------------------------------------------------------------------------- what a model imagined


def paint(painter, row, spans, budget):
    """The spans of a row's answer -> a picture uint8 (H, W, 3) of each. Raises ClipError.

    spans: (n, D) each. budget: pixels (min, max) of a future frame, which has the shape of the
    row's other frames.
    """
    frames = film(row)
    H, W = fit(1, *frames[0][2].shape[:2], *budget) if frames else (CELL, CELL)
    return [painter.picture(span, (H // CELL, W // CELL)) for span in spans]


def imagined(model, row, latents, lengths, budget):
    """The pictures of a row's spans for report.html -> {"spans": lengths, "painted": PNGs, base64}.

    latents (N, D); lengths: the number of latents in each span. {"error": why} if the clip cannot
    be read. Without a painter nothing is painted.
    """
    painter = Painter.beside(model.name_or_path)
    if painter is None or not lengths:
        return dict(spans=lengths, painted=[])
    try:
        pictures = paint(painter, row, latents.split(lengths), budget)
    except ClipError as e:
        return dict(error=str(e))
    return dict(spans=lengths, painted=[base64.b64encode(png(p)).decode() for p in pictures])


class Strip(NamedTuple):
    """One answer in pictures: lists of uint8 (H, W, 3)."""

    seen: list
    imagined: list
    came: list
    title: str  # above the pictures
    verdict: str  # after the title
    right: bool | None  # decides the colour of the verdict


def is_right(row, answer):
    """Whether an answer, or None, is a row's true one; None for a row without options."""
    if not row.options:
        return None
    gold = pick(row.answer, row.options)
    return gold is not None and pick(answer, row.options) == gold


def strip_of(painter, row, spans, answer, budget):
    """A Row's answer (text or None) and its spans ((n, D) each) -> its Strip. Raises ClipError."""
    frames, right = film(row), is_right(row, answer)
    seen = [pixels for _, role, pixels in frames if role == "seen"]
    came = [pixels for _, role, pixels in frames if role == "future"]
    said = (answer or "no answer").strip()
    verdict = said + {None: "", True: ": right", False: f": wrong, it is {row.answer}"}[right]
    return Strip(seen, paint(painter, row, spans, budget), came, row.question, verdict, right)


def coming(frames):
    """The key frames (Frame) that are shown -> those after the first one that are not shown."""

    seen = {frame.index for frame in frames}
    after = range(min(seen, default=8) + 1, 9)
    return [Frame(frames[0].source, k) for k in after if k not in seen]


def write_strip(path, model, row, spans, answer, budget):
    """Draw the strip of a Row's answer at `path` -> a line that says what was written.

    spans: (n, D) each; answer: text or None. Raises ClipError.
    """
    painter = Painter.beside(model.name_or_path)
    if painter is None:
        return f"no strip: {model.name_or_path} has no painter (python -m common.painter)"
    draw_strips([strip_of(painter, row, spans, answer, budget)], path)
    return f"{path}: what was seen, imagined, and really came"


# -------------------------------------------------------------------------------------- the drawing

SIDE, GAP, LINE = 96, 6, 20  # pixels: a picture's longer side, between pictures, a line of text
INK, GREY, RIGHT, WRONG = (30, 30, 36), (110, 110, 118), (28, 122, 53), (179, 38, 30)
COLOURS = {"seen": (55, 120, 191), "imagined": (199, 125, 26), "came": (42, 157, 74)}
HEADS = {"seen": "seen", "imagined": "imagined", "came": "what really came"}
font = ImageFont.load_default


def tile(pixels, colour):
    """uint8 (H, W, 3) -> a PIL image whose longer side is SIDE, with a border of this colour."""
    picture = Image.fromarray(pixels)
    scale = SIDE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return ImageOps.expand(picture.resize(size, Image.Resampling.BICUBIC), 3, colour)


def draw_strips(strips, path):
    """Strips, one below the other: seen | imagined | what really came -> a PNG at `path`.

    Below the column heads, each strip is a line of text and its pictures.
    """
    # each kind of picture has a column, as wide as its longest row
    left, width = {}, GAP
    for kind in COLOURS:
        longest = max(len(getattr(strip, kind)) for strip in strips)
        left[kind] = width
        width += longest * (SIDE + 6 + GAP) + (4 * GAP if longest else 0)
    height = 2 * GAP + LINE + len(strips) * (SIDE + 6 + LINE + 3 * GAP)
    sheet = Image.new("RGB", (max(width, 480), height), "white")
    pen = ImageDraw.Draw(sheet)
    for kind, x in left.items():
        if any(getattr(strip, kind) for strip in strips):
            pen.text((x, GAP), HEADS[kind], COLOURS[kind], font(15))

    for n, strip in enumerate(strips):
        y = 2 * GAP + LINE + n * (SIDE + 6 + LINE + 3 * GAP)
        pen.text((GAP, y), strip.title, INK, font(14))
        colour = {True: RIGHT, False: WRONG, None: GREY}[strip.right]
        x = GAP + pen.textlength(strip.title + "  ", font(14))
        pen.text((x, y), strip.verdict, colour, font(14))
        for kind, x in left.items():
            for k, pixels in enumerate(getattr(strip, kind)):
                place = x + k * (SIDE + 6 + GAP), y + LINE
                sheet.paste(tile(pixels, COLOURS[kind]), place)
    make_folder_of(path)
    sheet.save(path, optimize=True)


def make_folder_of(path):
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)


def png(pixels):
    """uint8 (H, W, 3) -> the bytes of a PNG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG", optimize=True)
    return out.getvalue()


if __name__ == "__main__":
    run_script(main, Config)
