"""Clips and pictures: decord, PyAV, image files; pixels to patches; key frames."""

import io
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from common.formats import Clip, Frame
from common.reader import READERS, Reader, ReaderError

# Qwen3-VL: pixels a patch, patches a token (each way), frames a patch
PATCH, MERGE, TEMPORAL = 16, 2, 2
CELL = PATCH * MERGE  # pixels a token, each way


def fit(num_frames, height, width, min_pixels, max_pixels):
    """Size (H, W) in 32-pixel cells that keeps the shape and meets the budget over all frames.

    Source: the sizes of Qwen3-VL's image (one frame) and video processors. Raises ValueError beyond
    200:1.
    """
    # the video processor first scales a tiny clip up to one cell
    if num_frames > 1 and min(height, width) < CELL:
        scale = CELL / min(height, width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"{width}x{height} pixels: the aspect ratio is beyond 200:1")
    H, W = round(height / CELL) * CELL, round(width / CELL) * CELL
    T = max(1, round(num_frames / TEMPORAL) * TEMPORAL) if num_frames > 1 else 1
    if T * H * W > max_pixels:
        shrink = math.sqrt(num_frames * height * width / max_pixels)
        H, W = (max(CELL, math.floor(s / shrink / CELL) * CELL) for s in (height, width))
    elif T * H * W < min_pixels:
        grow = math.sqrt(min_pixels / (num_frames * height * width))
        H, W = (math.ceil(s * grow / CELL) * CELL for s in (height, width))
    return H, W


def resize_and_cut(frames, min_pixels, max_pixels):
    """frames uint8 (T, H, W, 3) -> patches uint8 (P, 1536) and grid (3,) = (t, h, w) in patches.

    Row order: temporal patch, then 2x2 blocks of patches that the merger joins; a row is (channel,
    2 frames, 16, 16). An odd last frame is doubled. Still bytes: see `normalise`. Source:
    Qwen3-VL's processors, in our own words.
    """
    x = torch.as_tensor(frames).permute(0, 3, 1, 2)  # (T, 3, H, W)
    H, W = fit(len(x), *x.shape[-2:], min_pixels, max_pixels)
    if (H, W) != tuple(x.shape[-2:]):
        # on bytes, as HF's fast processors
        x = F.interpolate(x.contiguous(), (H, W), mode="bicubic", antialias=True)
    if len(x) % TEMPORAL:
        x = torch.cat([x, x[-1:]])
    t, h, w = len(x) // TEMPORAL, H // PATCH, W // PATCH
    x = x.reshape(t, TEMPORAL, 3, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    x = x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # (t, h/2, w/2, 2, 2, 3, 2 frames, 16, 16)
    return x.reshape(t * h * w, -1), torch.tensor([t, h, w])  # (P, 1536), (3,)


def normalise(patches):
    """Bytes -> floats in [-1, 1]: mean and deviation are 0.5 in all channels. Source: Qwen3-VL."""
    return (patches.float() - 127.5) / 127.5


def resize_and_patchify(frames, min_pixels, max_pixels):
    """frames uint8 (T, H, W, 3) -> (patches float (P, 1536), grid (3,)), as HF's processors do.

    T = 1 is an image; otherwise a video, whose budgets count the pixels of all T frames. Source:
    Qwen3-VL.
    """
    patches, grid = resize_and_cut(frames, min_pixels, max_pixels)
    return normalise(patches), grid


class ClipError(ValueError):
    """A clip or image that cannot be read: the message names the file and what each reader said."""


def key_frame_positions(num_frames):
    """Frame numbers (0-based) of a clip's pool of 8 key frames. Source: TwiFF.

    The second and the last but one frame, and the midpoints of six equal intervals between frames
    2 and V-2. V=600 -> 1 51 150 249 349 448 547 598. A clip of fewer than nine frames has fewer
    intervals and repeats the last frame, as official. Raises ValueError if there is no frame.
    """
    if num_frames < 1:
        raise ValueError(f"a clip needs at least one frame, found {num_frames}")
    first = 1 if num_frames > 2 else 0
    last = num_frames - 2 if num_frames - 2 > first else num_frames - 1
    edges = np.linspace(first + 1, last, min(6, last - first) + 1).astype(int)
    middle = ((edges[:-1] + edges[1:] - 1) // 2).tolist()
    return [first, *middle, *[last] * (7 - len(middle))]


def uniform_positions(num_frames, n):
    """At most n frame numbers spread over the whole clip, as Qwen3-VL's video processor does."""
    return np.linspace(0, num_frames - 1, min(n, num_frames)).round().astype(int).tolist()


def read_clip(path, choose):
    """Decode some frames of a clip -> frames uint8 (T, H, W, 3), their numbers, frames a second.

    choose(number of frames) -> list of frame numbers. decord first, PyAV when decord refuses.
    Raises ClipError with what both said. Source: ours.
    """
    return _read(path, lambda total, fps: choose(total))


def read_uniform(clip, n):
    """A Clip -> n frames spread over it, as `read_clip` returns them. Raises ClipError. Ours."""

    def choose(total, fps):
        first, last = int(clip.start * fps), int(min(clip.end * fps, 2**31))
        first, last = min(first, total - 1), min(last, total - 1)
        return [first + i for i in uniform_positions(max(last - first, 0) + 1, n)]

    return _read(clip.path, choose)


_readers = {}  # process id -> its Reader: a worker is forked with its parent's


def _read(path, choose):
    """As `read_clip`; choose(number of frames, frames a second)."""
    if not os.path.isfile(path):
        raise ClipError(f"{path}: no such file")
    reader = _readers.setdefault(os.getpid(), Reader())
    faults = []
    for name in READERS:
        try:
            return reader.read(name, path, choose)
        except ReaderError as e:
            faults.append(str(e))
    raise ClipError(f"{path}: cannot be read as a video ({'; '.join(faults)})")


def read_image(source):
    """An image file's path or bytes -> uint8 (1, H, W, 3). Raises ClipError."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        return np.array(image.convert("RGB"))[None]
    except Exception as e:  # a damaged picture raises almost anything
        name = f"image of {len(source)} bytes" if isinstance(source, bytes) else source
        raise ClipError(f"{name}: cannot be read as an image ({e})") from e


CACHE_BYTES = 256 * 2**20  # cut frames kept in memory by each process  # ours
_cache = {}  # (Frame, budget) -> (patches uint8, grid)
_cache_bytes = 0  # held by _cache; CACHE_BYTES once it is closed


def cut_to(budget, frames, source):
    """`resize_and_cut` of frames from a source (path or bytes), as arrays. Raises ClipError.

    A tensor that a worker process sends keeps a file open as long as it lives; an array does not.
    """
    try:
        patches, grid = resize_and_cut(frames, *budget)
        return patches.numpy(), grid.numpy()
    except ValueError as e:
        raise ClipError(f"{source if isinstance(source, str) else 'image'}: {e}") from e


def load_frames(frames, budget):
    """list of Frame -> list of (patches uint8 (P, 1536), grid (3,)), arrays; clips opened once.

    They are kept in memory until CACHE_BYTES are full; from then on nothing is added. Until then
    all eight key frames of a clip are cut at once. Raises ClipError. Source: ours.
    """
    loaded = {frame: _cache[frame, budget] for frame in frames if (frame, budget) in _cache}
    for frame in frames:
        if frame not in loaded and not frame.index:
            loaded[frame] = cut_to(budget, read_image(frame.source), frame.source)
    missing = [frame for frame in frames if frame not in loaded]
    for path in dict.fromkeys(frame.source for frame in missing):
        numbers = sorted({frame.index for frame in missing if frame.source == path})
        numbers = range(1, 9) if _cache_bytes < CACHE_BYTES else numbers
        pictures, _, _ = read_clip(
            path, lambda n, of=numbers: [key_frame_positions(n)[i - 1] for i in of]
        )
        for i, picture in zip(numbers, pictures):
            loaded[Frame(path, i)] = cut_to(budget, picture[None], path)
    for frame, patches_and_grid in loaded.items():
        _keep(frame, budget, patches_and_grid)
    return [loaded[frame] for frame in frames]


def stack(pairs):
    """[(patches, grid)] of `load_frames` -> one tensor each: uint8 (P, 1536), (frames, 3)."""
    patches, grids = zip(*pairs)
    return torch.from_numpy(np.concatenate(patches)), torch.from_numpy(np.stack(grids))


def _keep(frame, budget, patches_and_grid):
    """Add a cut frame to the cache; the first that does not fit closes it."""
    global _cache_bytes
    if (frame, budget) in _cache or _cache_bytes >= CACHE_BYTES:
        return
    source = len(frame.source) if isinstance(frame.source, bytes) else 0
    size = patches_and_grid[0].nbytes + source
    if _cache_bytes + size > CACHE_BYTES:
        _cache_bytes = CACHE_BYTES
        return
    _cache[frame, budget] = patches_and_grid
    _cache_bytes += size


def pixels_of(frames):
    """Frames -> {Frame: uint8 (H, W, 3)}: the pictures, then all eight key frames of each clip.

    Raises ClipError. Source: ours.
    """
    pixels = {frame: read_image(frame.source)[0] for frame in frames if not frame.index}
    for path in dict.fromkeys(frame.source for frame in frames if frame.index):
        pictures, _, _ = read_clip(path, key_frame_positions)
        for i, picture in enumerate(pictures, 1):
            pixels[Frame(path, i)] = picture
    return pixels


def film(row):
    """The frames around a row -> [(label, role, uint8 (H, W, 3))]; role: seen | future | other.

    A row of key frames: all eight of its clip. A row of whole pictures: these. A clip that enters
    as a video: eight frames spread over what the model saw of it. Raises ClipError. Source: ours.
    """
    seen = [part for part in row.prompt if isinstance(part, Frame)]
    future = [part for part in row.response if isinstance(part, Frame)]
    roles = dict.fromkeys(future, "future") | dict.fromkeys(seen, "seen")
    strip = []
    for i, (frame, picture) in enumerate(pixels_of([*seen, *future]).items(), 1):
        label = str(frame.index or f"picture {i}")
        strip.append((label, roles.get(frame, "other"), picture))
    for clip in (part for part in row.prompt if isinstance(part, Clip)):
        pictures, numbers, fps = read_uniform(clip, 8)
        strip += [(f"{n / fps:.1f} s", "seen", picture) for n, picture in zip(numbers, pictures)]
    return strip


def jpeg(pixels, side):
    """uint8 (H, W, 3) -> bytes of a JPEG, its longer side at most `side` pixels. Source: ours."""
    from PIL import Image

    image, out = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
