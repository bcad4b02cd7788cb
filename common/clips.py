"""Clips and pictures: pixels to patches, key frames, and decoding in a process of its own.

On damaged bytes a decoder may end its whole process (decord: std::bad_alloc), which no `except`
catches. So clips are decoded in a process of their own, and what ends it costs one clip, not the
run: `Decoder` keeps one such process and starts another when it dies. decord comes first; PyAV
takes what decord refuses. This file is also the script of that process.

    parent: (decoder, path)     ->
                                <-  child: ("choose", clock (frames in the clip,), frames a second)
    parent: numbers of frames   ->                      (again if it was another number of frames)
                                <-  child: ("frames", uint8 (T, H, W, 3), numbers, seconds, fps)

The clock says when each frame is shown, counted in frames of the mean rate: 0, 1, 2, ... in a clip
of constant rate. Phones make clips of variable rate, and there a frame's number says little about
its time.

Where this differs from the official code and from Qwen3-VL's processor:
 1. A clip that decord refuses is read by PyAV: many clips cut by stream copy are sound, and decord
    still refuses them or mixes their frames up.
 2. In a clip of variable rate a frame's time is the one that the file gives. Theirs is its number
    over the mean rate, which can be seconds off. Which numbers a video is shown by is the same; key
    frames lie where they would in a clip of constant rate.
"""

import io
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import threading

import numpy as np

if __name__ != "__main__":  # the process that decodes needs none of this, and torch takes seconds
    import torch
    import torch.nn.functional as F

    from common.formats import Clip, Frame

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
    """A clip or image that cannot be read: names the file and what each decoder said."""


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


# -------------------------------------------------------------------------------- frames of a clip


def read_clip(path, choose):
    """Decode some frames of a clip -> frames uint8 (T, H, W, 3), their numbers, frames a second.

    choose(number of frames) -> list of frame numbers. Raises ClipError with what each decoder said.
    """
    frames, numbers, _, fps = read_part(Clip(path), lambda clock: choose(len(clock)))
    return frames, numbers, fps


def read_uniform(clip, n):
    """A Clip -> n frames spread over it uint8 (T, H, W, 3), their numbers, their times in seconds.

    Numbers and times count from the start of the file. Raises ClipError.
    """
    frames, numbers, seconds, _ = read_part(clip, lambda clock: uniform_positions(len(clock), n))
    return frames, numbers, seconds


_decoders = {}  # process id -> its Decoder: a worker is forked with its parent's


def read_part(clip, choose):
    """Decode some frames of a Clip, from its start to its end.

    choose(clock of these frames) -> list of numbers among them.
    -> frames uint8 (T, H, W, 3), their numbers and times (T,) in the file, frames a second.
    Raises ClipError, also for a moment after the last frame.
    """
    if not os.path.isfile(clip.path):
        raise ClipError(f"{clip.path}: no such file")

    def choose_in_file(clock, fps):
        length = (clock[-1] + 1) / fps
        if clip.start == clip.end and clip.start > length + 0.01:
            raise ClipError(f"{clip.path}: no frame at {clip.start} s, it ends at {length:.2f} s")
        # the frames that are on screen at start and end
        first, last = (np.searchsorted(clock, t * fps, "right") - 1 for t in (clip.start, clip.end))
        return [int(first) + int(k) for k in choose(clock[first : last + 1])]

    decoder = _decoders.setdefault(os.getpid(), Decoder())
    faults = []
    for name in DECODERS:
        try:
            return decoder.read(name, clip.path, choose_in_file)
        except DecoderError as e:
            faults.append(str(e))  # deviation 1: the next decoder tries
    raise ClipError(f"{clip.path}: cannot be read as a video ({'; '.join(faults)})")


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


def load_frames(frames, budget, all_eight=True):
    """list of Frame -> list of (patches uint8 (P, 1536), grid (3,)), arrays; clips opened once.

    They are cached until CACHE_BYTES are full; from then on nothing is added. all_eight: until then
    all key frames of a clip are cut at once, because other rows ask for the others. Raises
    ClipError.
    """
    loaded = {frame: _cache[frame, budget] for frame in frames if (frame, budget) in _cache}
    for frame in frames:
        if frame not in loaded and not frame.index:
            loaded[frame] = cut_to(budget, read_image(frame.source), frame.source)
    missing = [frame for frame in frames if frame not in loaded]
    for clip in dict.fromkeys(frame.clip for frame in missing):
        indices = sorted({frame.index for frame in missing if frame.clip == clip})
        indices = range(1, 9) if all_eight and _cache_bytes < CACHE_BYTES else indices
        for frame, picture in read_key_frames(clip, indices).items():
            loaded[frame] = cut_to(budget, picture[None], clip.path)
    for frame, patches_and_grid in loaded.items():
        _keep(frame, budget, patches_and_grid)
    return [loaded[frame] for frame in frames]


def read_key_frames(clip, indices=range(1, 9)):
    """Some of the eight key frames of a Clip -> {Frame: uint8 (H, W, 3)}. Raises ClipError.

    Of a moment the first, as there are no others.
    """
    indices = [1] if clip.start == clip.end else list(indices)

    def choose(clock):
        # deviation 2: numbers of evenly spaced frames as times; with a constant rate a step is 1.0
        positions = np.array(key_frame_positions(len(clock)))
        step = (clock[-1] - clock[0]) / max(1, len(clock) - 1)
        on_screen = np.searchsorted(clock, clock[0] + step * positions + 1e-6, "right") - 1
        return [on_screen[i - 1] for i in indices]

    pictures, *_ = read_part(clip, choose)
    return {Frame(clip.path, i, *clip[1:]): picture for i, picture in zip(indices, pictures)}


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

    Raises ClipError.
    """
    pixels = {frame: read_image(frame.source)[0] for frame in frames if not frame.index}
    for clip in dict.fromkeys(frame.clip for frame in frames if frame.index):
        pixels |= read_key_frames(clip)
    return pixels


def film(row):
    """The frames around a row -> [(label, role, uint8 (H, W, 3))]; role: seen | future | other.

    A clip that enters as a video: eight frames spread over what the model saw of it. Key frames:
    all eight of their clip. Whole pictures and moments: these. Raises ClipError.
    """
    strip = []
    for clip in (part for part in row.prompt if isinstance(part, Clip)):
        pictures, _, seconds = read_uniform(clip, 8)
        strip += [(f"{t:.1f} s", "seen", picture) for t, picture in zip(seconds, pictures)]
    seen = [part for part in row.prompt if isinstance(part, Frame)]
    future = [part for part in row.response if isinstance(part, Frame)]
    roles = dict.fromkeys(future, "future") | dict.fromkeys(seen, "seen")
    for i, (frame, picture) in enumerate(pixels_of([*seen, *future]).items(), 1):
        label = str(frame.index or f"picture {i}")
        label = f"{frame.start:.1f} s" if frame.start == frame.end else label
        strip.append((label, roles.get(frame, "other"), picture))
    return strip


def jpeg(pixels, side):
    """uint8 (H, W, 3) -> bytes of a JPEG, its longer side at most `side` pixels."""
    from PIL import Image

    image, out = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


# ------------------------------------------------------------------------- the process that decodes

PATIENCE = 600.0  # seconds without an answer, after which the process is ended


class DecoderError(Exception):
    """A clip that this decoder cannot read; the message says why."""


class Decoder:
    """A process that decodes. Threads take turns; a process that is forked needs its own."""

    def __init__(self):
        self.process, self.lock = None, threading.Lock()

    def read(self, name, path, choose):
        """Some frames of a clip -> uint8 (T, H, W, 3), their numbers, times (T,), frames a second.

        name: one of DECODERS. choose(clock, frames a second) -> numbers. Raises DecoderError if the
        clip cannot be read, also where that ends the process.
        """
        with self.lock:
            try:
                self._send((name, os.path.abspath(path)))
                word, *rest = self._receive()
                while word == "choose":
                    self._send(choose(*rest))
                    word, *rest = self._receive()
            except TimeoutError:
                self.end()
                raise DecoderError(f"{name}: no answer in {PATIENCE:.0f} s") from None
            except (EOFError, BrokenPipeError, pickle.UnpicklingError):
                raise DecoderError(f"{name}: {self._how_it_ended()}") from None
            except BaseException:  # such as Ctrl-C between question and answer
                self.end()
                raise
        if word == "fault":
            raise DecoderError(f"{name}: {rest[0]}")
        return rest

    def end(self):
        """End the process, if there is one."""
        if self.process:
            self.process.kill()
            self._how_it_ended()

    def _send(self, message):
        if self.process is None:
            command = [sys.executable, "-P", os.path.abspath(__file__)]
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.process = subprocess.Popen(command, **pipes, start_new_session=True)
        pickle.dump(message, self.process.stdin)
        self.process.stdin.flush()

    def _receive(self):
        ready, _, _ = select.select([self.process.stdout], [], [], PATIENCE)
        if not ready:
            raise TimeoutError
        return pickle.load(self.process.stdout)

    def _how_it_ended(self):
        process, self.process = self.process, None
        process.stdin.close()
        process.stdout.close()
        code = process.wait(timeout=60)
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"it ended the reading process ({cause})"


def decord(path, choose):
    """As `Decoder.read`, by decord. This and what follows runs in the process itself."""
    import decord

    clip = decord.VideoReader(path, num_threads=1)
    if not len(clip):
        raise DecoderError("no frames")
    times = clip.get_frame_timestamp(np.arange(len(clip)))[:, 0].tolist()  # (frames,) seconds
    if times[0] < 0 or (np.diff(times) <= 0).any() or 0 not in clip.get_key_indices():
        # it would count hidden frames, or mix the order up
        raise DecoderError("cut by stream copy")
    fps = _rate(clip.get_avg_fps())
    clock = clock_of(times, fps)
    numbers = choose(clock, fps)
    return clip.get_batch(numbers).asnumpy(), numbers, clock[numbers] / fps, fps


def pyav(path, choose):
    """As `Decoder.read`, by PyAV: a clip is decoded once, unless it holds other frames than its
    packets promise.
    """
    import av

    with av.open(path) as container:
        stream = container.streams.video[0]
        fps = _rate(stream.average_rate or 0)
        times = [_time(packet) for packet in container.demux(stream) if _is_shown(packet)]
    for _ in range(2):
        clock = clock_of(times, fps)
        numbers = choose(clock, fps) if times else []
        promised, (times, pictures) = times, _decode(path, {*numbers})
        if len(times) == len(promised):
            break
    if not times:
        raise DecoderError("no frames")
    return np.stack([pictures[i] for i in numbers]), numbers, clock[numbers] / fps, fps


def _decode(path, wanted):
    """-> the times of all frames that are shown, {number: uint8 (H, W, 3)} of those wanted."""
    import av

    times, pictures = [], {}
    with av.open(path) as container:
        for frame in container.decode(container.streams.video[0]):
            if frame.time is not None and frame.time < 0:
                continue  # a cut by stream copy keeps some before time 0 for the decoder
            if len(times) in wanted:
                # a phone writes how its picture is to be turned; decord turns it by itself
                upright = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                pictures[len(times)] = upright
            times.append(frame.time)
    return times, pictures


def _is_shown(packet):
    """Whether a packet holds a frame that is seen. The last one of a stream is empty."""
    return packet.size > 0 and not packet.is_discard and (packet.pts is None or packet.pts >= 0)


def _time(packet):
    """When a packet's frame is shown, in seconds; None if the file does not say."""
    return None if packet.pts is None else float(packet.pts * packet.time_base)


def _rate(fps):
    """Frames a second, where a clip does not say: 24."""
    fps = float(fps)
    return fps if fps and math.isfinite(fps) else 24.0


def clock_of(times, fps):
    """The times of all frames, in seconds and any order -> clock (frames,), see above.

    The rate is constant if each frame is within half a frame of even spacing; such a clip's frame
    k is shown at k / fps, as Qwen3-VL's processor has it. None among the times: taken as constant.
    """
    count = len(times)
    if count < 3 or None in times:
        return np.arange(count, dtype=float)
    times = np.sort(np.asarray(times, dtype=float))
    times = (times - times[0]).round(3)  # decord's are of single precision
    even = np.linspace(0, times[-1], count)
    if np.abs(times - even).max() <= even[1] / 2:
        return np.arange(count, dtype=float)
    return times * fps  # deviation 2


DECODERS = dict(decord=decord, PyAV=pyav)


def serve(requests, replies):
    """Answer until the parent is gone. Whatever a damaged file raises is sent as a message."""

    def send(*message):
        pickle.dump(message, replies, protocol=5)
        replies.flush()

    def choose(clock, fps):
        send("choose", clock, fps)
        return pickle.load(requests)

    while True:
        try:
            name, path = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = "frames", *DECODERS[name](path, choose)
        except ImportError as e:
            answer = "fault", f"not installed ({e})"
        except DecoderError as e:
            answer = "fault", str(e)
        except Exception as e:
            last_line = str(e).strip().rpartition("\n")[2]
            answer = "fault", f"{type(e).__name__} {last_line:.100}"
        send(*answer)


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a decoder prints must not come between
    serve(sys.stdin.buffer, replies)
