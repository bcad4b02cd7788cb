"""What latents look like: the frames they are near to, and the pictures they turn back into.

A latent stands for one visual token of a coming frame, a cell of 32 x 32 pixels. `Painter` learns
the way back from such a token to its pixels, from true frames alone (tools/pictures.py), with the
vision tower frozen. It has never seen a latent, so what it paints from one shows what the model
imagined, its errors included. It is kept beside the model: MODEL/painter/painter.safetensors.

Axis letters: N tokens or latents, D hidden, F frames, K tokens of a frame, M spans, H and W pixels.
"""

import base64
import io
import os
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from common.clips import (
    CELL,
    MERGE,
    PATCH,
    TEMPORAL,
    ClipError,
    film,
    fit,
    normalise,
    resize_and_cut,
)
from common.formats import Frame

# ------------------------------------------------------------------------------------- the painter


class Painter(nn.Module):
    """Visual tokens (N, D) -> their cells (N, 3, 32, 32), pixels in [0, 1]. Source: ours.

    It paints the difference to `blank`, the mean cell, which is what it knows without a token.
    """

    def __init__(self, D, width=64):
        super().__init__()
        self.register_buffer("mean", torch.zeros(D))  # of the tokens it learnt from
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("blank", torch.zeros(3, CELL, CELL))
        self.width, widths = width, (width, width, width // 2, width // 4)
        self.read = nn.Linear(D, width * 16)
        layers = []
        for a, b in zip(widths, widths[1:]):  # 4 -> 8 -> 16 -> 32 pixels
            layers += [nn.GELU(), nn.ConvTranspose2d(a, b, 4, stride=2, padding=1)]
        self.grow = nn.Sequential(*layers, nn.GELU(), nn.Conv2d(widths[-1], 3, 3, padding=1))

    def forward(self, e):
        x = self.read((e.float() - self.mean) / self.scale)  # (N, 16 * width)
        return self.blank + self.grow(x.view(-1, self.width, 4, 4))

    @torch.no_grad()
    def picture(self, latents, shape):
        """The latents (N, D) of one frame -> uint8 (H, W, 3). shape: its (rows, columns) of cells.

        Fewer latents leave the last cells grey, more of them add rows: nothing is hidden.
        """
        rows, columns = shape
        cells = self(latents.to(self.blank.device)).clamp(0, 1)
        rows = max(rows, -(-len(cells) // columns))
        grey = cells.new_full((rows * columns - len(cells), *cells.shape[1:]), 0.8)
        return to_pixels(torch.cat([cells, grey]), columns)

    def save(self, folder):
        """Beside the model in `folder`, in a folder of its own: others load all that lies there."""
        os.makedirs(os.path.join(folder, "painter"), exist_ok=True)
        path = os.path.join(folder, "painter", "painter.safetensors")
        save_file({name: w.half() for name, w in self.state_dict().items()}, path + ".part")
        os.replace(path + ".part", path)

    @classmethod
    def beside(cls, folder):
        """The painter of the model in `folder`, or None if it has none."""
        path = os.path.join(folder, "painter", "painter.safetensors")
        if not os.path.exists(path):
            return None
        weights = {name: w.float() for name, w in load_file(path).items()}
        out, D = weights["read.weight"].shape
        painter = cls(D, width=out // 16)
        painter.load_state_dict(weights)
        return painter.eval()


def to_cells(patches):
    """Patches uint8 (P, 1536) of single frames, as `resize_and_cut` cuts them -> (N, 3, 32, 32).

    Pixels in [0, 1], a cell for each token, in the order of the tokens.
    """
    x = patches.float().view(-1, MERGE, MERGE, 3, TEMPORAL, PATCH, PATCH)[:, :, :, :, 0]
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, CELL, CELL) / 255


def to_pixels(cells, columns):
    """Cells (N, 3, 32, 32) of one frame, N = rows * columns -> uint8 (H, W, 3)."""
    x = cells.view(-1, columns, 3, CELL, CELL).permute(0, 3, 1, 4, 2)
    pixels = x.reshape(-1, columns * CELL, 3) * 255
    return pixels.round().to(torch.uint8).cpu().numpy()


def painting_error(painter, e, cells):
    """How far cells painted from e (N, D) are from the true ones: 1 = the mean cell, 0 = equal.

    Squared error over that of `blank`. Source: ours.
    """
    with torch.no_grad():
        error = (painter(e) - cells).square().sum() / (painter.blank - cells).square().sum()
    return error.item()


# ---------------------------------------------------------------------------------- a row's spans


def imagined(model, row, latents, lengths, budget):
    """What a row's spans are near to, and what they show -> a JSON-able dict. Source: ours.

    latents (N, D); lengths: latents of each span; budget: pixels (min, max) of a frame.
    {"spans": lengths, "frames": labels, "cosine": (N, F), "similarity": (M, M), "painted": M PNGs
    in base64}, the similarity of the non-empty spans' means, Eq. (6)'s b_m; or {"error": why}.
    Without a painter beside the model, nothing is painted.
    """
    try:
        frames = film(row)
    except ClipError as e:
        return dict(error=str(e))
    labels = [label for label, _, _ in frames]
    out = dict(spans=lengths, frames=labels, cosine=[], similarity=[], painted=[])
    if not frames or not len(latents):
        return out

    # each latent beside each frame: the best cosine over the frame's tokens
    z = F.normalize(latents.float(), dim=-1)  # (N, D)
    columns = []
    for _, _, pixels in frames:
        patches, grid = resize_and_cut(pixels[None], *budget)
        patches, grid = normalise(patches).to(model.device), grid[None].to(model.device)
        e = F.normalize(model.encode_frames(patches, grid).float(), dim=-1)  # (K, D)
        columns.append((z @ e.T).amax(1))  # (N,)
    out["cosine"] = rounded(torch.stack(columns, 1))  # (N, F)

    spans = latents.float().split([n for n in lengths if n])
    b = F.normalize(torch.stack([span.mean(0) for span in spans]), dim=-1)  # (M, D)
    out["similarity"] = rounded(b @ b.T)

    painter = Painter.beside(model.name_or_path)
    if painter is not None:
        for picture in paint(painter, latents.split(lengths), shape_of(frames, budget)):
            out["painted"].append(base64.b64encode(png(picture)).decode())
    return out


def rounded(matrix):
    """A matrix -> lists of its rows, three digits."""
    return [[round(v, 3) for v in line] for line in matrix.tolist()]


def shape_of(frames, budget):
    """The (rows, columns) of cells that a coming frame has, by the shape of the frames around it.

    frames: those of `film`; budget: pixels (min, max) of a future frame.
    """
    H, W = fit(1, *frames[0][2].shape[:2], *budget)
    return H // CELL, W // CELL


def paint(painter, spans, shape):
    """Spans, (n, D) each, and the shape of their frames -> a picture uint8 (H, W, 3) for each."""
    return [painter.picture(span, shape) for span in spans]


# -------------------------------------------------------------------------------------- the drawing

SIDE, GAP, LINE = 96, 6, 20  # pixels: a picture's longer side, between pictures, a line of text
INK, GREY, RIGHT, WRONG = (30, 30, 36), (110, 110, 118), (28, 122, 53), (179, 38, 30)
COLOURS = {"seen": (55, 120, 191), "imagined": (199, 125, 26), "came": (42, 157, 74)}
HEADS = {"seen": "seen", "imagined": "imagined", "came": "what really came"}


class Strip(NamedTuple):
    """One answer in pictures."""

    seen: list  # of uint8 (H, W, 3)
    imagined: list
    came: list
    title: str  # above the pictures
    verdict: str = ""  # behind the title
    right: bool | None = None  # the colour of the verdict


def strip_of(row, painted, title, verdict="", right=None):
    """A Row, what its spans painted -> its Strip: what is seen, and as many coming frames.

    Coming frames are those of the row's response. Raises ClipError.
    """
    film_of = film(row)
    seen = [pixels for _, role, pixels in film_of if role == "seen"]
    came = [pixels for _, role, pixels in film_of if role == "future"]
    return Strip(seen, painted, came, title, verdict, right)


def coming(frames):
    """Key frames (Frame) that are shown -> the key frames of the clip that follow unseen."""
    seen = {frame.index for frame in frames}
    after = range(min(seen, default=8) + 1, 9)
    return [Frame(frames[0].source, k) for k in after if k not in seen]


def write_strip(path, model, row, spans, answer, budget):
    """What a Row's answer imagined, as a strip at `path` -> a line that says what was written.

    spans: (n, D) each; answer: text or None. A row's strip shows as many coming frames as spans.
    """
    painter = Painter.beside(model.name_or_path)
    if painter is None:
        return f"no strip: {model.name_or_path} has no painter (python -m tools.pictures)"
    painted = paint(painter.to(model.device), spans, shape_of(film(row), budget))
    answer = (answer or "no answer").strip()
    right = answer == row.answer if row.answer else None
    strip = strip_of(row, painted, row.question, answer, right)
    draw_strips([strip._replace(came=strip.came[: len(spans)])], path)
    return f"{path}: what was seen, imagined, and really came"


def font(size):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def tile(pixels, colour):
    """uint8 (H, W, 3) -> a PIL image whose longer side is SIDE, in a frame of a colour."""
    from PIL import Image, ImageOps

    picture = Image.fromarray(pixels)
    scale = SIDE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return ImageOps.expand(picture.resize(size, Image.Resampling.BICUBIC), 3, colour)


def draw_strips(strips, path):
    """Strips, one below the other: seen | imagined | what really came -> a PNG. Source: ours.

    Under the heads, a strip is a line of text and its pictures.
    """
    from PIL import Image, ImageDraw

    # where each kind of pictures begins: as wide as the longest row of it
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
    write_image(sheet, path)


def animate(strip, texts, path):
    """An answer as a GIF: word by word, each span turning into its picture. Source: ours.

    texts: the words before the first span, and behind each span: one more than imagined pictures.
    At the end, what really came stands below what was imagined, and the verdict.
    """
    words, shares = [0] * len(texts), [0.0] * len(strip.imagined)  # how much of each is there
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
    write_image(frames[0], path, **moving)


def panel(strip, texts, words, shares, end=False):
    """One picture of `animate`: the first words of each text, a share of each imagined picture."""
    from PIL import Image, ImageDraw

    step, columns = SIDE + 6 + 4 * GAP, len(strip.seen) + len(strip.imagined)
    top = 2 * LINE
    below = top + SIDE + 10 + 2 * LINE + GAP
    size = max(480, columns * step), below + SIDE + 6 + GAP
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, GAP), strip.title, INK, font(16))
    for column, pixels in enumerate(strip.seen):
        sheet.paste(tile(pixels, COLOURS["seen"]), (GAP + column * step, top))

    # a span opens as an empty frame, which fills with what is imagined
    first = len(strip.seen)
    for m, (pixels, share) in enumerate(zip(strip.imagined, shares)):
        if share:
            faded = pixels * share + 255 * (1 - share)
            picture = tile(faded.astype(np.uint8), COLOURS["imagined"])
            sheet.paste(picture, (GAP + (first + m) * step, top))

    # the words before the first span stand below what is seen, the others below their span
    for k, (text, n) in enumerate(zip(texts, words)):
        x = GAP + (first + k - 1 if k else 0) * step
        room = step * (first if k == 0 else 1) - GAP
        for line, part in enumerate(wrap(text.split()[:n], room, pen)):
            pen.text((x, top + SIDE + 10 + line * LINE), part, INK, font(15))
    if not end:
        return sheet

    pen.text((GAP, below), HEADS["came"], COLOURS["came"], font(15))
    colour = {True: RIGHT, False: WRONG, None: GREY}[strip.right]
    pen.text((GAP, below + 2 * LINE), strip.verdict, colour, font(20))
    for m, pixels in enumerate(strip.came[: len(strip.imagined)]):
        sheet.paste(tile(pixels, COLOURS["came"]), (GAP + (first + m) * step, below))
    return sheet


def wrap(words, room, pen):
    """Words -> lines that are at most `room` pixels wide."""
    lines = []
    for word in words:
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, font(15)) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def write_image(image, path, **options):
    """A PIL image -> a file, as a whole or not at all."""
    if os.path.dirname(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    kind = os.path.splitext(path)[1]
    image.save(path + ".part" + kind, optimize=True, **options)
    os.replace(path + ".part" + kind, path)


def png(pixels):
    """uint8 (H, W, 3) -> bytes of a PNG."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(out, "PNG", optimize=True)
    return out.getvalue()
