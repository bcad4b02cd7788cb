"""common/clips.py against hand numbers and other libraries; decoders that fail or die."""

import io
import re
import struct
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from common import clips
from common.clips import (
    ClipError,
    Decoder,
    DecoderError,
    fit,
    key_frame_positions,
    load_frames,
    read_clip,
    read_part,
    read_uniform,
    resize_and_cut,
)
from common.formats import Clip, Frame, Row
from common.painter import to_cells, to_pixels
from data import DataConfig, encode
from tests.conftest import flat, shown

CELL = 32 * 32
each_decoder = pytest.mark.parametrize("decoder", clips.DECODERS)


def every(clock, fps):
    """A choice of all frames."""
    return list(range(len(clock)))


def levels(loaded):
    """What `load_frames` gave -> the numbers of the frames."""
    return shown(torch.from_numpy(patches).float() for patches, _ in loaded)


# frame numbers and patches


@pytest.mark.parametrize(
    "count, expected",
    [
        (600, [1, 51, 150, 249, 349, 448, 547, 598]),
        (40, [1, 4, 10, 16, 22, 28, 34, 38]),
        (9, [1, 1, 2, 3, 4, 5, 6, 7]),
        (8, [1, 1, 2, 3, 4, 5, 6, 6]),
        (5, [1, 1, 2, 3, 3, 3, 3, 3]),
        (3, [1, 1, 2, 2, 2, 2, 2, 2]),
        (2, [0, 0, 1, 1, 1, 1, 1, 1]),
        (1, [0] * 8),
    ],
)
def test_positions(count, expected):
    """Breaks if another rounding or pool, or a short clip asked for frames it lacks, moves the
    frames that a row means.
    """
    assert key_frame_positions(count) == expected
    with pytest.raises(ValueError, match="found 0"):
        key_frame_positions(0)


@pytest.mark.parametrize(
    "T, height, width, cells, tokens",
    [
        (1, 90, 160, 4, [1, 1, 2]),
        (1, 64, 64, 4, [1, 2, 2]),
        (1, 2, 2, 4, [1, 1, 1]),
        (4, 64, 64, 16, [2, 2, 2]),
    ],
)
def test_sizes(T, height, width, cells, tokens):
    """Breaks if a budget is taken per frame instead of over all T, sizes are rounded up, or a side
    has no cell. Worked out by hand.
    """
    _, grid = resize_and_cut(np.zeros((T, height, width, 3), np.uint8), CELL, cells * CELL)
    assert grid.tolist() == [tokens[0], 2 * tokens[1], 2 * tokens[2]]


def test_extreme_shapes_are_refused():
    """Breaks if a 201:1 strip becomes a sliver of noise, or ends the run as a record's picture."""
    strip, png = np.zeros((1, 10, 2010, 3), np.uint8), io.BytesIO()
    Image.fromarray(strip[0]).save(png, "PNG")
    with pytest.raises(ValueError, match="200:1"):
        resize_and_cut(strip, CELL, 4 * CELL)
    with pytest.raises(ClipError, match="200:1"):
        load_frames([Frame(png.getvalue())], (CELL, 4 * CELL))


def test_sizes_equal_transformers():
    """Breaks if we and HF's processors disagree on a size, which shifts every later position."""
    pil, video = "qwen2_vl.image_processing_pil_qwen2_vl", "qwen3_vl.video_processing_qwen3_vl"
    image, video = (
        pytest.importorskip("transformers.models." + name, exc_type=ImportError).smart_resize
        for name in (pil, video)
    )
    rng = np.random.default_rng(0)
    for _ in range(3000):
        T, budget = int(rng.integers(1, 34)), (CELL, int(rng.integers(1, 5000)) * CELL)
        size = np.exp(rng.uniform(0, 4.5, 2) + rng.uniform(0, 3)).astype(int).tolist()
        theirs = image(*size, 32, *budget) if T == 1 else video(T, *size, 2, 32, *budget)
        assert fit(T, *size, *budget) == theirs, (T, size, budget)


@pytest.mark.parametrize(
    "height, width, cells, size",
    [(90, 160, 4, (32, 64)), (300, 200, 9, (96, 64)), (20, 30, 4, (32, 32))],
)
def test_resizing_equals_pillow(height, width, cells, size):
    """Breaks if resizing is bilinear, lacks antialiasing or is shifted by half a pixel: each is off
    Pillow's bicubic by far more than two levels. That patches and their values are those of
    transformers' processors is shown in test_custom_generate.py.
    """
    # half smooth, half noise
    x = np.random.default_rng(1).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    x[0, :, : width // 2] = np.arange(height)[:, None, None] * 255 // height
    pillow = np.asarray(Image.fromarray(x[0]).resize(size[::-1], Image.Resampling.BICUBIC))
    patches, _ = resize_and_cut(x, CELL, cells * CELL)
    ours = to_pixels(to_cells(patches), size[1] // 32)
    assert np.abs(ours.astype(int) - pillow).max() <= 2


# clips and images


@each_decoder
def test_frame_k_is_frame_k(decoder, film):
    """Breaks if a decoder is off by one, gives decoding order instead of display order, or the
    nearest key frame of the codec, or if the time of a frame in an ordinary clip is anything but
    its number over the rate, to the last bit. 300 frames are more than a group of pictures.
    """
    wanted, counts = [0, 1, 7, 7, 149, 150, 249, 250, 251, 298, 299], []

    def choose(clock, fps):
        counts.append(len(clock))
        return wanted

    path = film("x.mp4", range(300), fps=Fraction(30000, 1001))
    pictures, numbers, seconds, fps = clips.DECODERS[decoder](path, choose)
    assert counts == [300] and numbers == wanted and abs(fps - 29.97) < 1e-3
    assert pictures.dtype == np.uint8 and pictures.shape == (11, 64, 64, 3)
    assert shown(pictures) == [k % 40 for k in wanted]
    assert seconds.tolist() == [k / fps for k in wanted]


def test_pyav_steps_in(film, stand_in_decord):
    """Breaks if a machine without decord gives other frames."""
    stand_in_decord("raise ImportError('no')")
    pictures, numbers, fps = read_clip(film(), key_frame_positions)
    assert numbers == shown(pictures) == [1, 4, 10, 16, 22, 28, 34, 38] and abs(fps - 12) < 1e-3


AT_12 = [1, 3, 7, 11, 15, 19, 23, 26]  # key frames of the 28 frames from number 12 on


@pytest.mark.parametrize(
    "start, back, first, expected",
    [
        (12, 0, 12, AT_12),  # at a key frame of the codec: nothing special
        # ffmpeg -ss T -i x -c copy: frames 12..15 are in the file but not shown
        (12, 16, 16, [1, 3, 6, 9, 13, 16, 19, 22]),
        (5, 5, 12, AT_12),  # between key frames: decord refuses
        (5, 0, 12, AT_12),  # the same with the clock kept: decord mixes the order up
    ],
)
def test_clips_cut_by_stream_copy(start, back, first, expected, tmp_path):
    """Breaks if frames that nobody can see count, or others are returned than those asked for.

    start: the first packet; back: frames by which the clock is put back; first: the first visible.
    """
    whole, path = str(tmp_path / "whole.mp4"), str(tmp_path / "cut.mp4")
    every_12 = dict(g="12", bf="0", sc_threshold="0")  # key frames
    write_clip(whole, flat(range(40)), range(0, 4000, 100), **every_12)
    with av.open(whole) as source, av.open(path, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for k, packet in enumerate(source.demux(video=0)):
            if packet.dts is not None and k >= start:
                ticks, packet.stream = int(back / 10 / packet.time_base), stream
                packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                target.mux(packet)
    assert shown(read_clip(path, key_frame_positions)[0]) == [first + k for k in expected]


def test_the_smallest_clip(film):
    """Breaks on a single frame, the smallest size, or a path not in ASCII."""
    pictures, _, fps = read_clip(film("клип é 球.mp4", [7], 2, 2), lambda n: list(range(n)))
    assert pictures.shape == (1, 2, 2, 3) and abs(fps - 12) < 1e-3 and shown(pictures) == [7]


@pytest.mark.parametrize("kind", ["half", "codec", "empty", "text", "missing", "folder"])
def test_broken_clips_are_named(kind, film, tmp_path):
    """Breaks if a clip that nobody can read is anything but a ClipError with its name."""
    path, good = tmp_path / f"{kind}.mp4", open(film(), "rb").read()
    contents = dict(half=good[: len(good) // 2], codec=good.replace(b"avc", b"zzz"), empty=b"")
    contents["text"] = b"no film\n" * 99
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ClipError, match=re.escape(str(path))):
        read_clip(str(path), key_frame_positions)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_read_image(mode, tmp_path, monkeypatch):
    """Breaks if a grey or transparent picture does not become RGB, or a broken one, or one that
    Pillow finds too large, is no ClipError.
    """
    grey, path = flat([3], 64, 80), tmp_path / "é.png"
    Image.fromarray(grey[0]).convert(mode).save(path)
    good = path.read_bytes()
    assert (clips.read_image(str(path)) == grey).all() and (clips.read_image(good) == grey).all()
    for content in (b"", b"hello", good[: len(good) // 2], good):
        path.write_bytes(content)
        if content == good:  # refused for its size alone
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(ClipError, match="é.png"):
            clips.read_image(str(path))


# clips as phones make them: turned pictures, frames at uneven times


def write_clip(path, pictures, milliseconds, **options):
    """An mp4 whose frames are shown at these times -> its path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options=dict(crf="10", bf="2") | options)
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for picture, time in zip(pictures, milliseconds):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def turn_clip(path, a, b):
    """Write into an mp4 how it is to be turned: by 90 degrees with the clock if a, b are 0, 1."""
    with open(path, "r+b") as f:
        content = f.read()
        f.seek(content.index(b"tkhd") + 44)  # the display matrix of ISO 14496-12, 16.16 fixed point
        f.write(struct.pack(">9i", a << 16, b << 16, 0, -b << 16, a << 16, 0, 0, 0, 1 << 30))


@pytest.mark.parametrize("angle, a, b", [(0, 1, 0), (90, 0, 1), (180, -1, 0), (270, 0, -1)])
@each_decoder
def test_turned_clips(decoder, angle, a, b, tmp_path):
    """Breaks if a clip that a phone wrote lying down stays so: then what the model sees depends on
    which decoder takes the file. The picture, red at its upper left, is turned with the clock.
    """
    picture = np.full((5, 64, 96, 3), 90, np.uint8)
    picture[:, :32, :48] = 250, 0, 0
    path = write_clip(tmp_path / "turned.mp4", picture, range(0, 200, 40))
    turn_clip(path, a, b)
    pictures, *_ = clips.DECODERS[decoder](path, lambda clock, fps: [0, 3])
    expected = np.rot90(picture[[0, 3]], -angle // 90, axes=(1, 2)).astype(int)
    assert pictures.shape == expected.shape and np.abs(pictures - expected).mean() < 8


SECONDS = [k / 24 for k in range(24)] + [1 + k / 2 for k in range(24)]  # 12.5 s in all


def write_uneven(tmp_path, start=0):
    """48 frames, the first 24 within a second, then two a second."""
    times = [start + round(1000 * t) for t in SECONDS]
    return write_clip(tmp_path / "uneven.mp4", flat(range(48)), times)


@pytest.mark.parametrize("start", [0, 250])
def test_both_decoders_know_when_a_frame_is_shown(start, tmp_path):
    """Breaks if a frame's time is its number over the mean rate (frame 20: 4.8 s instead of 0.83),
    or the decoders differ in frames or times; also if a file's clock starts late.
    """
    path = write_uneven(tmp_path, start)
    found = [decode(path, every) for decode in clips.DECODERS.values()]
    for pictures, numbers, seconds, _ in found:
        np.testing.assert_allclose(seconds, SECONDS, atol=6e-4)
        assert shown(pictures) == [k % 40 for k in numbers]
    assert (found[0][0] == found[1][0]).all() and (found[0][2] == found[1][2]).all()


@pytest.mark.parametrize(
    "start, end, numbers",
    [(0.5, 1.0, [12, 18, 24]), (1.0, 3.2, [24, 26, 28]), (2.9, 99, [27, 37, 47]), (99, 100, [47])],
)
def test_a_part_lies_where_its_seconds_are(start, end, numbers, tmp_path):
    """Breaks if start and end count by the mean rate: seconds 0.5 to 1 would be frames 1 to 3."""
    frames, found, seconds = read_uniform(Clip(write_uneven(tmp_path), start, end), 3)
    assert found == numbers and shown(frames) == [k % 40 for k in numbers]
    np.testing.assert_allclose(seconds, [SECONDS[k] for k in numbers], atol=6e-4)


# key frames, kept in memory


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch):
    monkeypatch.setattr(clips, "_cache", {})
    monkeypatch.setattr(clips, "_cache_bytes", 0)


@pytest.fixture
def reads(monkeypatch):
    """A list of what is read: (path, numbers of the frames)."""
    reads = []

    def read(clip, choose):
        found = read_part(clip, choose)
        reads.append((clip.path, found[1]))
        return found

    monkeypatch.setattr(clips, "read_part", read)
    return reads


def test_key_frames_of_a_part(film):
    """Breaks if key frames of seconds 1 to 2 are taken from the whole clip, where the answer may
    be, or the cache takes one part for another.
    """
    path = film()  # 12 frames a second: numbers 12 to 24, a pool of 13 frames
    part, whole = Frame(path, 8, 1.0, 2.0), Frame(path, 8)
    for _ in range(2):
        assert levels(load_frames([part, whole], (CELL, CELL))) == [12 + 11, 38]
    assert shown([clips.pixels_of([part])[part]]) == [23]


def test_key_frames_of_a_clip_of_variable_rate(tmp_path):
    """Breaks if key frames are counted by numbers, which crowd where a phone took more frames: of
    12.5 s the last four would lie in the middle.
    """
    pictures = clips.read_key_frames(Clip(write_uneven(tmp_path)))
    wanted = []
    for position in key_frame_positions(48):
        time = position / 47 * SECONDS[-1]
        wanted.append(max(k for k in range(48) if SECONDS[k] <= time + 1e-3))
    assert shown(pictures.values()) == [k % 40 for k in wanted]
    assert wanted[:3] == [6, 24, 28] and wanted != key_frame_positions(48)


@pytest.mark.parametrize("t, number", [(0.0, 0), (0.49, 5), (0.5, 6), (3.3, 39), (3.33, 39)])
def test_a_moment_is_the_frame_on_screen(t, number, film):
    """Breaks if a future frame is another than the one that is shown at its second (12 a second,
    40 in all), is cut eight times over, or one beyond the clip is its last frame.
    """
    path = film()
    moment = Frame(path, 1, t, t)
    assert levels(load_frames([moment], (CELL, CELL))) == [number] and len(clips._cache) == 1
    assert shown([clips.pixels_of([moment])[moment]]) == [number]
    with pytest.raises(ClipError, match=rf"film.mp4: no frame at {t + 3.4} s, it ends at 3.33 s"):
        load_frames([Frame(path, 1, t + 3.4, t + 3.4)], (CELL, CELL))


@pytest.mark.parametrize("room", [0, 10**9])
def test_load_frames(room, film, tmp_path, monkeypatch):
    """Breaks if frames come in another order, or the cache mixes frames or budgets."""
    monkeypatch.setattr(clips, "CACHE_BYTES", room)
    a, b, still = film("a.mp4"), film("b.mp4", range(15, 35)), tmp_path / "c.png"
    Image.fromarray(flat([39])[0]).save(still)
    asked = [Frame(b, 8), Frame(a, 1), Frame(str(still)), Frame(b, 2), Frame(b, 8)]
    for _ in range(2):
        for budget, side in (((CELL, CELL), 2), ((CELL, 10**5), 4)):
            loaded = load_frames(asked, budget)
            assert [grid.tolist() for _, grid in loaded] == [[1, side, side]] * 5
            # of 20 frames key frame 8 is number 18, 2 is (2 + 4 - 1) // 2 = 2; b starts at 15
            assert levels(loaded) == [33, 1, 39, 17, 33]
        if room:  # the second time nothing is read, whichever key frames are asked for
            for path in (a, b, still):
                open(path, "w").close()
            assert levels(load_frames([Frame(a, 8)], budget)) == [38]
    assert len(clips._cache) == (34 if room else 0)  # 2 clips x 8 and a still, two budgets


@pytest.mark.parametrize("frames, cached", [(0, 0), (3, 3), (8, 8), (11, 11), (99, 16)])
def test_cache_is_bounded(frames, cached, film, monkeypatch, reads):
    """Breaks if the cache outgrows CACHE_BYTES, stays empty, or loses frames once it is full; or if
    a full one still cuts all eight.
    """
    size = 4 * 1536  # bytes of one cut frame: four patches
    monkeypatch.setattr(clips, "CACHE_BYTES", frames * size)
    paths = {film("a.mp4"): 1, film("b.mp4", range(15, 35)): 16}
    for path, first in [*paths.items()] * 2:
        loaded = load_frames([Frame(path, 1)], (CELL, CELL))
        assert loaded[0][0].nbytes == size and levels(loaded) == [first]
    assert len(clips._cache) == cached and clips._cache_bytes <= frames * size
    whole = [path for path in paths if (Frame(path, 1), (CELL, CELL)) in clips._cache]
    again = [path for path in paths if path not in whole]
    assert [path for path, _ in reads] == [*paths, *again]
    # a cache that is full cuts no key frame that nobody asks for
    assert frames or reads[0][1] == [1]


@pytest.mark.parametrize("train, wanted", [(False, [2, 3]), (True, range(1, 9))])
def test_a_question_alone_reads_the_frames_that_it_shows(train, wanted, film, reads, tokenizer):
    """Breaks if an evaluation decodes all eight, of which most questions show two, or if training,
    where other rows ask for the others, does not.
    """
    path = film()
    row = Row("f", "id", [Frame(path, 2), Frame(path, 3), "?"], [Frame(path, 4)], "A")
    encode(row, tokenizer, DataConfig(), train)
    positions = key_frame_positions(40)
    assert reads[0] == (path, [positions[k - 1] for k in wanted])


# the process that decodes may die, and that costs a clip, not the run

# decord that ends its process on a file that says so, and leaves all others to PyAV
ABORTS = """
import os

class VideoReader:
    def __init__(self, path, num_threads):
        with open(path, "rb") as f:
            if f.read(5) == b"ABORT":
                os.abort()
        raise RuntimeError("a stand-in")
"""


def test_the_next_clip_is_read(film, stand_in_decord, tmp_path):
    """Breaks if a process that died is asked again, or its end is not said."""
    stand_in_decord(ABORTS)
    (tmp_path / "fatal.mp4").write_bytes(b"ABORT")
    for _ in range(2):
        with pytest.raises(ClipError, match="fatal.mp4: cannot be read.*SIGABRT.*PyAV: Invalid"):
            read_clip(str(tmp_path / "fatal.mp4"), key_frame_positions)
        assert shown(read_clip(film(), key_frame_positions)[0]) == [1, 4, 10, 16, 22, 28, 34, 38]


def test_a_reader_that_hangs(film, stand_in_decord, monkeypatch):
    """Breaks if a decoder that never comes back stops the run."""
    stand_in_decord("import time; time.sleep(60)")
    path = film()
    monkeypatch.setattr(clips, "PATIENCE", 0.5)
    with pytest.raises(DecoderError, match="decord: no answer in 0 s"):
        Decoder().read("decord", path, lambda total, fps: [0])
    monkeypatch.undo()


def test_a_fault_of_the_caller_is_its_own(film):
    """Breaks if an error between question and answer leaves the process half way."""
    own = Decoder()
    with pytest.raises(ZeroDivisionError):
        own.read("PyAV", film(), lambda total, fps: 1 / 0)
    assert len(own.read("PyAV", film(), lambda clock, fps: [0, len(clock) - 1])[0]) == 2
    own.end()
    own.end()


def test_threads_take_turns(film):
    """Breaks if two threads talk to the process at once."""
    paths, results = [film(f"{k}.mp4", range(k, k + 9)) for k in range(4)], {}

    def read(path):
        results[path] = read_clip(path, key_frame_positions)[0]

    threads = [threading.Thread(target=read, args=(path,)) for path in paths for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, path in enumerate(paths):
        assert shown(results[path]) == [k + i for i in key_frame_positions(9)]


def test_pyav_decodes_a_clip_once(film, monkeypatch):
    """Breaks if a long clip is decoded twice, or a count that is wrong is believed."""
    decode, passes = clips._decode, []

    def counted(path, wanted):
        passes.append(path)
        return decode(path, wanted)

    monkeypatch.setattr(clips, "_decode", counted)
    pictures, numbers, seconds, fps = clips.pyav(film(), lambda clock, fps: [0, len(clock) - 1])
    assert shown(pictures) == [0, 39] and numbers == [0, 39] and fps == 12 and len(passes) == 1
    monkeypatch.setattr(clips, "_is_shown", lambda packet: packet.size > 0 and packet.pts % 2)
    pictures, numbers, _, _ = clips.pyav(film(), lambda clock, fps: [0, len(clock) - 1])
    assert shown(pictures) == [0, 39] and len(passes) == 3
