"""data.py and the patches of model.py, against hand numbers, plain loops and other libraries."""

import dataclasses
import io
import json
import re
import sys

import av
import numpy as np
import pytest
import torch
import transformers
from conftest import WORDS
from PIL import Image

import data
import sft
from common import clips, formats, runs
from common.clips import ClipError, fit, read_clip, resize_and_cut, resize_and_patchify
from common.formats import Clip, Frame, RecordError, Row, Skipped
from data import Samples
from toy import tiny
from toy import world as paddle

CELL = 32 * 32
SPECIALS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|latent_start|>",
    "<|latent|>",
    "<|latent_end|>",
    "<|endoftext|>",
]


def flat(numbers, height=64, width=64):
    """Grey frames that tell their number (mod 40): neighbours differ by 42 levels. `shown` reads it back."""
    return np.stack([np.full((height, width, 3), 8 + 6 * (7 * k % 40), np.uint8) for k in numbers])


def shown(pictures):
    return [
        round((float(np.asarray(p).mean()) - 8) / 6) * 23 % 40 for p in pictures
    ]  # 7 * 23 = 1 (mod 40)


@pytest.fixture
def film(tmp_path):
    def make(name="film.mp4", numbers=range(40), height=64, width=64, fps=12):
        paddle.write_mp4(str(tmp_path / name), flat(numbers, height, width), fps)
        return str(tmp_path / name)

    return make


# frame numbers and patches


def test_positions():
    """Another rounding or pool, or a short clip asked for frames it lacks, moves the frames that a row means."""
    for count, expected in {
        600: [1, 51, 150, 249, 349, 448, 547, 598],
        40: [1, 4, 10, 16, 22, 28, 34, 38],
        9: [1, 1, 2, 3, 4, 5, 6, 7],
        8: [1, 1, 2, 3, 4, 5, 6, 6],
        5: [1, 1, 2, 3, 3, 3, 3, 3],
        3: [1, 1, 2, 2, 2, 2, 2, 2],
        2: [0, 0, 1, 1, 1, 1, 1, 1],
        1: [0] * 8,
    }.items():
        assert clips.key_frame_positions(count) == expected
    for count in range(8, 300):
        found = clips.key_frame_positions(count)
        assert (
            len(found) == 8 and found == sorted(found) and found[0] == 1 and found[-1] == count - 2
        )
    with pytest.raises(ValueError, match="found 0"):
        clips.key_frame_positions(0)
    for args, expected in {
        (40, 4): [0, 13, 26, 39],
        (40, 1): [0],
        (3, 16): [0, 1, 2],
        (1, 16): [0],
    }.items():
        assert clips.uniform_positions(*args) == expected


def cut(video):
    """Patches in nine plain loops: (t, block row, block column, row and column inside) x (channel, frame, y, x)."""
    T, H, W, _ = video.shape
    return np.array(
        [
            [
                video[min(2 * t + f, T - 1), 32 * by + 16 * iy + y, 32 * bx + 16 * ix + x, c]
                for c in range(3)
                for f in range(2)
                for y in range(16)
                for x in range(16)
            ]
            for t in range((T + 1) // 2)
            for by in range(H // 32)
            for bx in range(W // 32)
            for iy in range(2)
            for ix in range(2)
        ]
    )


def noise(T, height, width):
    return np.random.default_rng(T).integers(0, 256, (T, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("T", [1, 3, 4])
def test_patch_order_and_values(T):
    """Any transposed axis, blocks the merger does not expect, an odd frame left alone, another normalisation."""
    x = noise(T, 64, 96)
    (patches, grid), (raw, _) = resize_and_patchify(x, CELL, 10**7), resize_and_cut(x, CELL, 10**7)
    assert (
        grid.tolist() == [(T + 1) // 2, 4, 6]
        and raw.dtype == torch.uint8
        and (raw.numpy() == cut(x)).all()
    )
    np.testing.assert_allclose(patches.numpy(), (cut(x) - 127.5) / 127.5, atol=1e-6)


@pytest.mark.parametrize(
    "T, height, width, cells, tokens",
    [
        (1, 90, 160, 4, [1, 1, 2]),
        (1, 1080, 1920, 4, [1, 1, 2]),
        (1, 160, 90, 4, [1, 2, 1]),
        (1, 100, 100, 4, [1, 2, 2]),
        (1, 64, 64, 4, [1, 2, 2]),
        (1, 90, 160, 1, [1, 1, 1]),
        (1, 2, 2, 4, [1, 1, 1]),
        (1, 10, 2000, 100, [1, 1, 15]),
        (4, 64, 64, 4, [2, 1, 1]),
        (4, 64, 64, 16, [2, 2, 2]),
        (3, 64, 64, 12, [2, 2, 2]),
        (4, 2, 2, 16, [2, 1, 1]),
    ],
)
def test_sizes(T, height, width, cells, tokens):
    """A budget taken per frame instead of over all T, rounding up, a side of zero cells. Worked out by hand."""
    _, grid = resize_and_cut(np.zeros((T, height, width, 3), np.uint8), CELL, cells * CELL)
    assert grid.tolist() == [tokens[0], 2 * tokens[1], 2 * tokens[2]]


def test_extreme_shapes_are_refused():
    """A 201:1 strip would become a sliver of noise; as the image of a record it has to be a ClipError."""
    strip, png = np.zeros((1, 10, 2010, 3), np.uint8), io.BytesIO()
    Image.fromarray(strip[0]).save(png, "PNG")
    with pytest.raises(ValueError, match="200:1"):
        resize_and_cut(strip, CELL, 4 * CELL)
    with pytest.raises(ClipError, match="200:1"):
        clips.load_frames([Frame(png.getvalue())], (CELL, 4 * CELL))


def test_sizes_equal_transformers():
    """A size on which we and HF's image or video processor disagree would shift every later position."""
    image, video = (
        pytest.importorskip("transformers.models." + name, exc_type=ImportError).smart_resize
        for name in ("qwen2_vl.image_processing_pil_qwen2_vl", "qwen3_vl.video_processing_qwen3_vl")
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
    """Bilinear, no antialiasing, or half a pixel's shift: each is off Pillow's bicubic by far more than two levels."""
    x = noise(1, height, width)
    x[0, :, : width // 2] = (
        np.arange(height)[:, None, None] * 255 // height
    )  # half smooth, half noise
    pillow = np.asarray(Image.fromarray(x[0]).resize(size[::-1], Image.Resampling.BICUBIC))[None]
    assert (
        np.abs(resize_and_cut(x, CELL, cells * CELL)[0].numpy().astype(int) - cut(pillow)).max()
        <= 2
    )


@pytest.mark.parametrize(
    "T, height, width, cells",
    [
        (1, 90, 160, 4),
        (1, 64, 96, 64),
        (1, 2, 2, 4),
        (1, 333, 215, 30),
        (2, 90, 160, 8),
        (3, 64, 96, 100),
        (4, 200, 120, 40),
        (5, 45, 80, 9),
        (4, 2, 2, 16),
    ],
)
def test_patches_equal_transformers(T, height, width, cells):
    """Grid, order or a single value that differs from the processors Qwen3-VL was trained with."""
    pytest.importorskip("torchvision", exc_type=ImportError)
    x, settings = (
        noise(T, height, width),
        dict(
            size=dict(shortest_edge=CELL, longest_edge=cells * CELL),
            patch_size=16,
            merge_size=2,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
    )
    if T == 1:
        cls = (
            getattr(transformers, "Qwen2VLImageProcessorFast", None)
            or transformers.Qwen2VLImageProcessor
        )
        theirs = cls(**settings)(images=Image.fromarray(x[0]), return_tensors="pt")
    else:
        cls = transformers.Qwen3VLVideoProcessor(
            **settings, do_sample_frames=False, cap_pixels_per_frame=False
        )
        theirs = cls(videos=[torch.tensor(x).permute(0, 3, 1, 2)], return_tensors="pt")
    patches, grid = resize_and_patchify(x, CELL, cells * CELL)
    pixels, grids = (
        ("pixel_values", "image_grid_thw") if T == 1 else ("pixel_values_videos", "video_grid_thw")
    )
    assert theirs[grids].tolist() == [grid.tolist()]
    torch.testing.assert_close(patches, theirs[pixels].float(), atol=1e-6, rtol=0)


# clips and images


@pytest.mark.parametrize("reader", ["_decord", "_pyav", "read_clip"])
def test_frame_k_is_frame_k(reader, film):
    """Off by one, decoding order instead of display order, the nearest key frame instead of the one asked for."""
    wanted, counts = (
        [0, 1, 7, 7, 149, 150, 249, 250, 251, 298, 299],
        [],
    )  # 300 frames: more than a group of pictures
    pictures, numbers, fps = getattr(clips, reader)(
        film("x.mp4", range(300), fps=25), lambda n: counts.append(n) or wanted
    )
    assert counts == [300] and numbers == wanted and abs(fps - 25) < 1e-3
    assert pictures.dtype == np.uint8 and pictures.shape == (11, 64, 64, 3)
    assert shown(pictures) == [k % 40 for k in wanted]


@pytest.mark.parametrize("absent", [False, True])
def test_pyav_steps_in(absent, film, monkeypatch):
    """A clip that decord refuses, or a machine without decord, must give the same frames and rate through PyAV."""

    def refuse(path, choose):
        raise ClipError("decord: refused")

    monkeypatch.setitem(sys.modules, "decord", None) if absent else monkeypatch.setattr(
        clips, "_decord", refuse
    )
    pictures, numbers, fps = clips.read_clip(film(), clips.key_frame_positions)
    assert numbers == shown(pictures) == [1, 4, 10, 16, 22, 28, 34, 38] and abs(fps - 12) < 1e-3


@pytest.mark.parametrize(
    "start, back, first, expected",
    [  # first packet, frames the clock is put back, first visible
        (12, 0, 12, [1, 3, 7, 11, 15, 19, 23, 26]),  # at a key frame: nothing special
        (
            12,
            16,
            16,
            [1, 3, 6, 9, 13, 16, 19, 22],
        ),  # ffmpeg -ss T -i x -c copy: frames 12..15 are there but not shown
        (5, 5, 12, [1, 3, 7, 11, 15, 19, 23, 26]),  # between key frames; decord refuses
        (5, 0, 12, [1, 3, 7, 11, 15, 19, 23, 26]),
    ],
)  # the same, clock kept; decord shuffles
def test_clips_cut_by_stream_copy(start, back, first, expected, tmp_path):
    """Counting frames that nobody can see, or returning others than asked for, makes the key frames other ones."""
    whole, path = str(tmp_path / "whole.mp4"), str(tmp_path / "cut.mp4")
    with av.open(whole, "w") as container:  # a key frame every 12
        stream = container.add_stream(
            "libx264", rate=12, options=dict(g="12", bf="0", sc_threshold="0", crf="10")
        )
        stream.width = stream.height = 64
        for picture in flat(range(40)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(whole) as source, av.open(path, "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for k, packet in enumerate(source.demux(video=0)):
            if packet.dts is not None and k >= start:
                ticks, packet.stream = back * packet.duration, stream
                packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
                target.mux(packet)
    assert shown(clips.read_clip(path, clips.key_frame_positions)[0]) == [
        first + k for k in expected
    ]


@pytest.mark.parametrize(
    "name, count, height, width",
    [
        ("one.mp4", 1, 64, 96),
        ("portrait.mp4", 7, 96, 64),
        ("tiny.mp4", 5, 2, 2),
        ("клип é 球.mp4", 3, 64, 64),
    ],
)
def test_unusual_clips(name, count, height, width, film):
    """One frame, height and width swapped, the smallest size, a path that is not ASCII."""
    pictures, _, fps = clips.read_clip(
        film(name, range(count), height, width), lambda n: list(range(n))
    )
    assert (
        pictures.shape[1:] == (height, width, 3)
        and shown(pictures) == list(range(count))
        and abs(fps - 12) < 1e-3
    )


@pytest.mark.parametrize("kind", ["half", "codec", "empty", "text", "audio", "missing", "folder"])
def test_broken_clips_are_named(kind, film, tmp_path):
    """A clip nobody can read must be a ClipError with its name: anything else kills a run, or passes unseen."""
    path, good = tmp_path / f"{kind}.mp4", open(film(), "rb").read()
    if kind == "audio":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=44100)
            sound = av.AudioFrame.from_ndarray(
                np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
            )
            sound.sample_rate = 44100
            container.mux([*stream.encode(sound), *stream.encode()])
    elif kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(
            dict(
                half=good[: len(good) // 2],
                codec=good.replace(b"avc", b"zzz"),
                empty=b"",
                text=b"no film\n" * 99,
            )[kind]
        )
    with pytest.raises(ClipError, match=re.escape(str(path))):
        clips.read_clip(str(path), clips.key_frame_positions)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_read_image(mode, tmp_path, monkeypatch):
    """Grey or transparent pictures must become RGB; a broken one, or one Pillow finds too large, is a ClipError."""
    grey, path = flat([3], 64, 80), tmp_path / "é.png"
    Image.fromarray(grey[0]).convert(mode).save(path)
    good = path.read_bytes()
    assert (clips.read_image(str(path)) == grey).all() and (clips.read_image(good) == grey).all()
    for content in (
        b"",
        b"hello",
        good[: len(good) // 2],
        good,
    ):  # the last is refused for its size alone
        path.write_bytes(content)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**7 if content != good else 1000)
        with pytest.raises(ClipError, match="é.png"):
            clips.read_image(str(path))


@pytest.fixture
def empty_cache(monkeypatch):
    monkeypatch.setattr(clips, "_cache", {})
    monkeypatch.setattr(clips, "_cache_bytes", 0)


@pytest.mark.parametrize("room", [0, 10**9])
def test_load_frames(room, film, tmp_path, monkeypatch, empty_cache):
    """Frames in another order than asked for; a cache that mixes frames or budgets, or reads again."""
    monkeypatch.setattr(clips, "CACHE_BYTES", room)
    a, b, still = film("a.mp4"), film("b.mp4", range(15, 35)), tmp_path / "c.png"
    Image.fromarray(flat([39])[0]).save(still)
    asked = [Frame(b, 8), Frame(a, 1), Frame(str(still)), Frame(b, 2), Frame(b, 8)]
    for _ in range(2):
        for budget, side in (((CELL, CELL), 2), ((CELL, 10**5), 4)):
            loaded = clips.load_frames(asked, budget)
            assert [grid.tolist() for _, grid in loaded] == [[1, side, side]] * 5
            # of 20 frames key frame 8 is number 18, key frame 2 is (2 + 4 - 1) // 2 = 2; b starts at 15
            assert shown(patches.float() for patches, _ in loaded) == [33, 1, 39, 17, 33]
        if room:  # the second time nothing is read, whichever key frames are asked for
            for path in (a, b, still):
                open(path, "w").close()
            assert shown(p.float() for p, _ in clips.load_frames([Frame(a, 8)], budget)) == [38]
    assert len(clips._cache) == (34 if room else 0)  # 2 clips x 8 and a still, two budgets


@pytest.mark.parametrize("frames, cached", [(0, 0), (3, 3), (8, 8), (11, 11), (99, 16)])
def test_cache_is_bounded(frames, cached, film, monkeypatch, empty_cache):
    """Breaks if the cache outgrows CACHE_BYTES, stays empty, or loses frames once it is full."""
    size = 4 * 1536  # bytes of one cut frame: four patches
    monkeypatch.setattr(clips, "CACHE_BYTES", frames * size)
    paths, asked = [film("a.mp4"), film("b.mp4", range(15, 35))], []
    monkeypatch.setattr(
        clips, "read_clip", lambda path, choose: (asked.append(path), read_clip(path, choose))[1]
    )
    for path in paths * 2:
        (patches, _), *_ = clips.load_frames([Frame(path, 1)], (CELL, CELL))
        assert patches.nbytes == size and shown([patches.float()]) == [
            1 if "a" in path[-5:] else 16
        ]
    assert len(clips._cache) == cached and clips._cache_bytes <= frames * size
    whole = [path for path in paths if (Frame(path, 1), (CELL, CELL)) in clips._cache]
    assert asked == paths + [path for path in paths if path not in whole]


def test_eight_key_frames_while_the_cache_is_open(film, monkeypatch, empty_cache):
    """Breaks if each key frame of a clip opens it again, or a full cache still cuts all eight."""
    numbers = []

    def read(path, choose):
        pictures = read_clip(path, choose)
        numbers.append(pictures[1])
        return pictures

    monkeypatch.setattr(clips, "read_clip", read)
    path = film()
    for room, wanted in ((10**9, [1, 4, 10, 16, 22, 28, 34, 38]), (0, [4])):
        monkeypatch.setattr(clips, "_cache", {})
        monkeypatch.setattr(clips, "CACHE_BYTES", room)
        clips.load_frames([Frame(path, 2)], (CELL, CELL))
        assert numbers.pop() == wanted and not numbers


# records

LATER = "THOUGHT 1: goes left {} THOUGHT 2: it falls"
HUMAN, GPT = (
    {"from": "human", "value": "<image><image>was – 次?"},
    {"from": "gpt", "value": LATER.format("<image>")},
)
V = "/m/v.mp4"
RECORDS = {  # format: (record, the Row it is: id, prompt, response, answer, question, options, group), media in "/m"
    "future-l1": (
        dict(
            id=7,
            video="v.mp4",
            image=[1, 3],
            reasoning_image=[5],
            group="g",
            options=["x", "y"],
            answer="y",
            conversations=[HUMAN, GPT],
        ),
        (
            "7",
            [Frame(V, 1), Frame(V, 3), "was – 次?"],
            ["goes left", Frame(V, 5), "it falls"],
            "y",
            "was – 次?",
            ["x", "y"],
            "g",
        ),
    ),
    "twiff": (
        dict(
            id="t",
            video="v.mp4",
            question="What next?",
            question_images_index=[2, 4],
            meta_data={"class": "c"},
            reasoning_images_index=[6],
            answer=LATER.format("<rimage>") + "<ans> a cup </ans>",
        ),
        (
            "t",
            [Frame(V, 2), Frame(V, 4), "What next?"],
            ["goes left", Frame(V, 6), "it falls"],
            "a cup",
            "What next?",
            None,
            "c",
        ),
    ),
    "twiff-bench": (
        dict(
            id="b",
            video="v.mp4",
            question="At <image> what?",
            question_images_index=[2],
            answer="a cup",
            reasoning_images_index=[6],
            question_images=[{"bytes": None, "path": "q.png"}],
            reasoning_images=["r.png"],
            meta_data={},
        ),
        ("b", ["At ", Frame("/m/q.png"), " what?"], [], "a cup", "At  what?", None, "all"),
    ),
    "futurebench": (
        dict(
            id=3,
            question_type="hop2",
            video_path="/data/x/video_dataset/a/v.mp4",
            qa=dict(Question="Who wins?", Options=dict(B="two", A="one"), Answer="B"),
        ),
        (
            "3",
            [Clip("/m/a/v.mp4"), "Who wins?\nA) one\nB) two"],
            [],
            "B",
            "Who wins?\nA) one\nB) two",
            ["one", "two"],
            "hop2",
        ),
    ),
    "rl": (
        dict(
            id="r", problem="<video>Who? <image>", answer=3, videos=["v.mp4"], images=["/abs/i.png"]
        ),
        ("r", [Clip(V), "Who? ", Frame("/abs/i.png")], [], "3", "Who?", None, "all"),
    ),
    "mcq": (
        dict(id="m", video="v.mp4", question="Who?", options=["one", "two"], answer="A"),
        (
            "m",
            [Clip(V), "Who?\nA) one\nB) two"],
            [],
            "A",
            "Who?\nA) one\nB) two",
            ["one", "two"],
            "all",
        ),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("layout", ["[{0}, {0}]", '{{"data": [{0}, {0}]}}', "{0}\n\n  \n{0}\n"])
def test_formats(name, layout, tmp_path):
    """A format told apart wrongly, a key misread, a marker or "THOUGHT n:" left over, a file layout not understood."""
    path = tmp_path / ("r.jsonl" if layout[-1] == "\n" else "r.json")
    path.write_text(
        layout.format(json.dumps(RECORDS[name][0], ensure_ascii=False)), encoding="utf-8"
    )
    rows = formats.read_rows(str(path), "/m")
    assert len(rows) == 2 and rows[0] == Row(f"{path}:0", *RECORDS[name][1])
    assert (
        str(tmp_path) in str(formats.read_rows(str(path))[0].prompt) or name == "rl"
    )  # media are beside the file


@pytest.mark.parametrize("name", RECORDS)
def test_a_wrapped_answer_is_unwrapped(name):
    """Breaks if a gold answer in <answer> tags is compared, or taught, with its tags."""
    record = json.loads(json.dumps(RECORDS[name][0]))
    for holder, key in ((record, "answer"), (record.get("qa", {}), "Answer")):
        if key in holder and "<ans>" in str(holder[key]):
            holder[key] = holder[key].replace(" a cup ", "<answer> a cup </answer>")
        elif key in holder:
            holder[key] = f" <answer> {holder[key]}\n</answer> "
    assert formats.read_record(record, "f:0", "/m") == Row("f:0", *RECORDS[name][1])


def test_conversations_by_column():
    """Breaks if {from: [...], value: [...]} is refused, read in another order, or cut to the shorter."""
    record = RECORDS["future-l1"][0]
    columns = {key: [HUMAN[key], GPT[key]] for key in ("from", "value")}
    row = formats.read_record(record | dict(conversations=columns), "f:0", "/m")
    assert row == Row("f:0", *RECORDS["future-l1"][1])
    for broken in ({"from": ["human"]}, columns | {"from": ["human"]}, columns | {"value": "x"}):
        with pytest.raises(RecordError, match="^f:0: .*(from|value)"):
            formats.read_record(record | dict(conversations=broken), "f:0")


def test_class_of_twiff_bench():
    """Breaks if the released class is not what scores are split by, or the older names no longer count."""
    record, meta = RECORDS["twiff-bench"][0], dict(type="t", category="k", classification="x")
    meta["class"] = "c"
    for key in ("classification", "class", "category", "type"):
        for form in (meta, json.dumps(meta)):
            assert formats.read_record(record | dict(meta_data=form), "f:0").group == meta[key]
        del meta[key]


@pytest.mark.parametrize(
    "question, missing",
    [
        ("Who? A) one B) two", False),
        ("Who?\nA. one\nB. two", False),
        ("A dog or B?", True),
        ("Who?", True),
        ("Who? (A) one (B) two", False),
        ("Team A: red, team B: blue?", True),
    ],
)
def test_options_are_given_once(question, missing):
    """Options missing from the prompt make a question unanswerable; options given twice change the benchmark."""
    record = RECORDS["futurebench"][0]
    row = formats.read_record(record | dict(qa=record["qa"] | dict(Question=question)), "f:0")
    assert row.prompt[1] == question + ("\nA) one\nB) two" if missing else "") and row.options == [
        "one",
        "two",
    ]


def test_parquet(tmp_path, monkeypatch):
    """Of the hub's image columns {bytes, path} the bytes must win; without pyarrow the message names file and cure."""
    with (
        monkeypatch.context() as m,
        pytest.raises(RecordError, match=r"x\.parquet.*pip install pyarrow"),
    ):
        m.setitem(sys.modules, "pyarrow", None)
        formats.read_rows("x.parquet")
    record = RECORDS["twiff-bench"][0] | dict(
        question_images=[{"bytes": b"png", "path": "q.png"}], meta_data=None
    )
    assert formats.read_record(record, "f:0").prompt == ["At ", Frame(b"png"), " what?"]
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "r.parquet")
    assert formats.read_rows(str(tmp_path / "r.parquet"))[0].prompt == [
        "At ",
        Frame(b"png"),
        " what?",
    ]


@pytest.mark.parametrize(
    "name, key, value, message",
    [  # ... = the key is gone
        ("future-l1", "video", ..., "'video' is missing"),
        ("future-l1", "video", 3, "'video' should be str, found int"),
        ("future-l1", "answer", " ", "the answer is empty"),
        ("future-l1", "image", [0, 1], "'image' .*1..8.*0"),
        ("future-l1", "image", [1, 9], "'image' .*1..8.*9"),
        ("future-l1", "image", [1, "3"], "'image' .*1..8.*'3'"),
        ("future-l1", "image", [1, True], "'image' .*1..8"),
        ("future-l1", "image", "13", "'image' should be list"),
        ("future-l1", "image", [1], "2 <image> in the text but 1 entries in 'image'"),
        ("future-l1", "conversations", "hi", "'conversations' should be list"),
        (
            "future-l1",
            "conversations",
            [HUMAN, {"from": "bot", "value": "hi"}],
            "a turn should be .*bot",
        ),
        (
            "future-l1",
            "conversations",
            [HUMAN | dict(value="<image> <image>"), GPT],
            "the question is empty",
        ),
        ("future-l1", "options", ["x"], "2 to 26"),
        ("twiff", "question", ["q"], "'question' should be str"),
        ("twiff", "reasoning_images_index", ..., "'reasoning_images_index' is missing"),
        ("twiff", "answer", 4, "'answer' should be str"),
        ("twiff", "answer", "<ans>x</ans>", "0 <rimage> .* 1 entries"),
        ("twiff-bench", "question_images", [3], "'question_images' should hold paths"),
        ("twiff-bench", "question_images", "q.png", "'question_images' should be list"),
        ("futurebench", "qa", [], "'qa' should be dict"),
        ("futurebench", "question_type", ..., "'question_type' is"),
        ("futurebench", "qa", dict(Options=["a", "b"], Answer="A"), "'Question' is missing"),
        ("futurebench", "qa", dict(Question="q", Options=["a"], Answer="A"), "2 to 26"),
        ("rl", "answer", ..., "'answer' is missing"),
        ("rl", "images", [], "1 <image> .* 0 entries in 'images'"),
        ("rl", "images", [3], "'images' should hold paths"),
        ("rl", "images", "i", "'images' should"),
        ("rl", "videos", "v.mp4", "'videos' should"),
        ("rl", "videos", [3], "'videos' should"),
        ("mcq", "question", ..., "'question' is missing"),
        ("mcq", "options", {"A": "one"}, "2 to 26"),
        ("mcq", "options", None, "'options' should be list or dict"),
        ("mcq", "options", ..., "unknown format .keys answer, id, question, video"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_malformed_records(name, key, value, message):
    """Each must be a RecordError with file, index and fault: a TypeError, or a row read askew, costs a night."""
    record = {k: v for k, v in (RECORDS[name][0] | {key: value}).items() if v is not ...}
    with pytest.raises(RecordError, match=rf"^f\.json:4: .*{message}"):
        formats.read_record(record, "f.json:4")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("f.json", b"", "f.json: no records"),
        ("f.jsonl", b"\n \n", "f.jsonl: no rec"),
        ("f.json", b"[]", "no records"),
        ("f.json", b"3", "f.json: expected a list of records, found int"),
        ("f.json", b"{'a': 1}", "f.json:0: not JSON"),
        ("f.json", b"[[1]]", "f.json:0: expected an object, found list"),
        ("f.json", b'{"data": []}', "no records"),
        ("f.jsonl", json.dumps(RECORDS["mcq"][0]).encode() + b'\n{"id": ', "f.jsonl:1: not JSON"),
        (
            "f.jsonl",
            json.dumps(RECORDS["mcq"][0]).encode() + b'\n{"id": 1}',
            "f.jsonl:1: unknown format .keys id",
        ),
        ("f.json", b"\x89PNG\xff\xfe\x00", r"f\.json.*: not (JSON|UTF-8|text)"),
    ],
    ids=range(10),
)
def test_malformed_files(name, content, message, tmp_path):
    """A file that is cut off, empty or something else altogether must say so and name the place."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        formats.read_rows(str(tmp_path / name))


def test_bad_records_are_counted_and_named(tmp_path, capsys):
    """Breaks if a bad record ends the run, is left out unseen, or too many of them are let pass."""
    good, path = RECORDS["mcq"][0], tmp_path / "f.json"
    content = [good, good | dict(answer=""), 3, good, good | dict(answer=" ")]
    path.write_text(json.dumps(content))
    bad = []
    rows = formats.read_rows(str(path), bad=bad)
    assert [row.where for row in rows] == [f"{path}:0", f"{path}:3"]
    empty = "the answer is empty"
    other = "expected an object, found int"
    assert bad == [(f"{path}:1", empty), (f"{path}:2", other), (f"{path}:4", empty)]
    with pytest.raises(RecordError, match="f.json:1: the answer is empty"):
        formats.read_rows(str(path))

    formats.report_bad([], 5, 0.0)
    assert capsys.readouterr().out == ""
    formats.report_bad(bad, 5, 0.6)
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed[0].startswith("3 of 5 records")
    assert printed[1:] == [f"2 {empty}", f"1 {other}", *(f"{where}: {why}" for where, why in bad)]
    for total, share in ((5, 0.59), (3, 1.0)):
        with pytest.raises(SystemExit, match=f"3 of {total} records"):
            formats.report_bad(bad, total, share)


def test_a_run_ends_on_too_many_bad_records(tmp_path):
    """Breaks if SFT loads a model, or trains, on a file of which more than max_bad is unusable."""
    path = tmp_path / "f.json"
    path.write_text(json.dumps([RECORDS["mcq"][0], RECORDS["mcq"][0] | dict(answer="")]))
    config = sft.Config(model="no such model", data=str(path), out=str(tmp_path / "out"))
    with pytest.raises(SystemExit, match="1 of 2 records"):
        sft.train(config)
    assert len(runs.rows_of(dataclasses.replace(config, max_bad=0.5))) == 1


# samples and batches


@pytest.fixture(scope="module")
def words():
    """The shared tiny vocabulary and the time stamps 0.0 to 3.9."""
    return tiny.make_tokenizer([WORDS, "seconds> " + " ".join(f"<{k / 10:.1f}" for k in range(40))])


def row(path, where="f:0", question="which wall ?"):
    return Row(
        where,
        "0",
        [Frame(path, 3), Frame(path, 4), question],
        ["moves right", Frame(path, 5), Frame(path, 6), "hits red"],
        "red",
    )


@pytest.mark.parametrize("height, width, n", [(64, 96, 2), (96, 64, 2), (64, 64, 4)])
def test_encode(height, width, n, film, words, data_config):
    """The whole layout: markup, placeholders, spans, which frame goes where, and what carries a label (Eq. 2)."""
    sight, span = (
        row(film("c.mp4", range(40), height, width)),
        f"<|latent_start|> {'<|latent|> ' * n}<|latent_end|> ",
    )
    picture = f"<|vision_start|> {'<|image_pad|> ' * n}<|vision_end|> "
    prompt = (
        "<|im_start|> system watch the ball <|im_end|> <|im_start|> user "
        + picture * 2
        + "which wall ? <|im_end|> <|im_start|> assistant "
    ).split()
    before, after = (
        "<reason> moves right </reason> ",
        "<reason> hits red </reason> <answer> red </answer> <|im_end|>",
    )
    tokens = prompt + (before + span * 2 + after).split()
    sample = data.encode(sight, words, data_config)
    assert words.convert_ids_to_tokens(sample["ids"]) == tokens
    assert sample["labels"] == [
        -100 if k < len(prompt) or tokens[k] == "<|latent|>" else i
        for k, i in enumerate(sample["ids"])
    ]
    pictures = sample["images"] + sample["futures"]
    assert [int(grid.prod()) // 4 for _, grid in pictures] == [n] * 4
    assert shown(patches.float() for patches, _ in pictures) == [
        10,
        16,
        22,
        28,
    ]  # key frames 3, 4 and 5, 6 of 40
    plain, asked = (
        data.encode(sight, words, data_config, **kw)
        for kw in (dict(spans=False), dict(train=False))
    )
    assert (
        words.convert_ids_to_tokens(plain["ids"]) == prompt + (before + after).split()
        and not plain["futures"]
    )
    assert words.convert_ids_to_tokens(asked["ids"]) == prompt and not asked["futures"]


def test_text_never_becomes_a_special_token(film, words, data_config):
    """A "<|latent|>" typed into data would open a position with no latent for it, an "<|im_end|>" end the turn."""
    path, typed = film(), " " + " ".join(SPECIALS) + "".join(SPECIALS)
    dirty = dataclasses.replace(row(path, question="which" + typed), answer="red" + typed)
    dirty.response = [p if isinstance(p, Frame) else p + typed for p in dirty.response]
    config = dataclasses.replace(data_config, system="watch" + typed)
    special = set(words.convert_tokens_to_ids(SPECIALS))
    clean, found = (
        data.encode(r, words, c)["ids"] for r, c in ((row(path), data_config), (dirty, config))
    )
    assert len(special) == len(SPECIALS) and [i for i in found if i in special] == [
        i for i in clean if i in special
    ]


@pytest.mark.parametrize(
    "count, n, fps, numbers, stamps",
    [
        (40, 4, 12, [0, 13, 26, 39], ["0.5", "2.7"]),  # 6.5 / 12 = 0.54, 32.5 / 12 = 2.71
        (40, 3, 12, [0, 20, 39, 39], ["0.8", "3.2"]),  # 10 / 12 = 0.83, 39 / 12 = 3.25
        (3, 16, 12, [0, 1, 2, 2], ["0.0", "0.2"]),
        (1, 4, 12, [0, 0], ["0.0"]),  # 0.5 / 12 = 0.04, 2 / 12 = 0.17
        (17, 4, 30, [0, 5, 11, 16], ["0.1", "0.4"]),
    ],
)  # HF's (11 / 30 + 16 / 30) / 2 is just below 0.45
def test_video_prompt(count, n, fps, numbers, stamps, film, words, data_config):
    """Qwen3-VL tells time by the text before each pair of frames: wrong stamps, frames, or pads that do not fit."""
    clip = Clip(film("v.mp4", range(count), 64, 96, fps))
    sample = data.encode(
        Row("f:0", "0", [clip, "which wall ?"], [], "red"),
        words,
        dataclasses.replace(data_config, num_frames=n),
    )
    pads = (
        "<|vision_start|> " + "<|video_pad|> " * 6 + "<|vision_end|>"
    )  # 64 x 96 pixels: 2 x 3 tokens
    tokens = words.convert_ids_to_tokens(sample["ids"])
    assert (
        tokens[tokens.index("user") + 1 : tokens.index("which")]
        == " ".join(f"<{s} seconds> {pads}" for s in stamps).split()
    )
    ((patches, grid),) = sample["videos"]
    assert grid.tolist() == [len(stamps), 4, 6]
    assert shown(patches.reshape(-1, 24, 3, 2, 256).float().movedim(3, 1).flatten(0, 1)) == numbers


def test_too_long_and_broken_samples_are_skipped(film, words, data_config):
    """One bad row in a million must cost that row, named, and not the run."""
    good, gone = row(film()), row("gone.mp4", "f:1")
    length = len(data.encode(good, words, data_config)["ids"])
    exact, short = (dataclasses.replace(data_config, max_length=n) for n in (length, length - 1))
    assert len(data.encode(good, words, exact)["ids"]) == length
    message = f"f:0: {length} tokens, more than max_length = {length - 1}"
    with pytest.raises(RecordError, match=message):
        data.encode(good, words, short)
    samples = Samples([good, gone], words, data_config)
    assert (
        len(samples) == 2
        and samples[0]["row"] is good
        and Samples([good], words, short)[0] == ("f:0", message)
    )
    assert (
        isinstance(samples[1], Skipped)
        and samples[1].where == "f:1"
        and "gone.mp4" in samples[1].why
    )


def sample(ids, labels, level=None):
    """An encoded sample made by hand, its only image and future four equal patches."""
    images = (
        []
        if level is None
        else [(torch.full((4, 1536), level, dtype=torch.uint8), torch.tensor([1, 2, 2]))]
    )
    return dict(
        ids=ids, labels=labels, images=images, videos=[], futures=images[:], row=f"row {ids[0]}"
    )


@pytest.mark.parametrize(
    "side, ids, labels, mask",
    [
        (
            "right",
            [[1, 9, 3], [4, 9, 9]],
            [[-100, 9, 3], [4, -100, -100]],
            [[1, 1, 1], [1, 0, 0]],
        ),  # 9 pads, and is text
        ("left", [[1, 9, 3], [9, 9, 4]], [[-100, 9, 3], [-100, -100, 4]], [[1, 1, 1], [0, 0, 1]]),
    ],
)
def test_padding(side, ids, labels, mask):
    """Padding on the wrong side, attended to or learned; patches out of order; a skipped sample that takes others."""
    batch = data.collate(
        [sample([1, 9, 3], [-100, 9, 3], 255), Skipped("f:5", "why"), sample([4], [4], 0)], 9, side
    )
    assert batch["input_ids"].tolist() == ids and batch["labels"].tolist() == labels
    assert (
        batch["attention_mask"].tolist() == mask
        and batch["rows"] == ["row 1", "row 4"]
        and batch["kept"] == [0, 2]
    )
    assert batch["skipped"] == [("f:5", "why")] and not any(
        "video" in key or key == "seq_lens" for key in batch
    )
    for pixels, grid in (
        ("pixel_values", "image_grid_thw"),
        ("future_pixel_values", "future_grid_thw"),
    ):
        assert batch[grid].tolist() == [[1, 2, 2]] * 2 and batch[pixels].shape == (8, 1536)
        assert batch[pixels].mean(1).tolist() == [1.0] * 4 + [-1.0] * 4


def test_packing():
    """A label at a sample's start would teach the last token of one sample to predict the first of the next."""
    batch = data.collate(
        [sample([1, 2, 3], [1, 2, 3]), sample([4], [4]), sample([5, 6], [5, 6])], 9, pack=True
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6]] and batch["seq_lens"] == [3, 1, 2]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, -100, 6]] and "pixel_values" not in batch


@pytest.mark.parametrize("pack", [False, True])
def test_nothing_but_skipped_samples(pack):
    """Without the stand-in row one rank would leave its step out, and all others would wait for it forever."""
    batch = data.collate([Skipped("f:0", "why"), Skipped("f:1", "why")], 9, pack=pack)
    assert (
        batch["input_ids"].tolist() == [[9]]
        and batch["labels"].tolist() == [[-100]]
        and batch["rows"] == []
    )
    assert [s.where for s in batch["skipped"]] == ["f:0", "f:1"]
    assert batch["seq_lens"] == [1] if pack else batch["attention_mask"].tolist() == [[1]]


def test_workers_change_nothing(film, words, data_config):
    """Batches in another order or with other content once decoding happens in the background."""
    rows = [row(film(f"{k}.mp4", range(k, k + 12), 64, 64 + 32 * k), f"f:{k}") for k in range(3)]
    samples, batches = (
        Samples([*rows, row("gone.mp4", "f:3")], words, data_config),
        [[2, 0], [3], [1], [1, 3, 2], [0]],
    )
    plain, ahead = (list(data.loader(samples, batches, n, pad_id=0)) for n in (0, 2))
    assert [[r.where for r in b["rows"]] for b in plain] == [
        ["f:2", "f:0"],
        [],
        ["f:1"],
        ["f:1", "f:2"],
        ["f:0"],
    ]
    for a, b in zip(plain, ahead, strict=True):
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in ("rows", "skipped", "kept"))
        assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


# config


@dataclasses.dataclass
class Flags:
    steps: int = 3
    lr: float = 1e-5
    out: str = "runs"
    resume: bool = False
    spans: bool = True


def test_parse_config():
    """type=bool would read "--spans False" as True; an untyped number stays text; a misspelt flag is ignored."""
    found = runs.parse_config(Flags, "--steps 7 --lr 1 --out 5 --resume --no-spans".split())
    assert found == Flags(7, 1.0, "5", True, False) and runs.parse_config(Flags, []) == Flags()
    assert [type(v) for v in dataclasses.astuple(found)] == [int, float, str, bool, bool]
    for wrong in ("--step_count 3", "--steps 1.5", "--spans False", "--lr fast", "steps"):
        with pytest.raises(SystemExit):
            runs.parse_config(Flags, wrong.split())


def test_help_shows_the_comments(capsys):
    """Breaks if --help no longer says what a field is and where its value comes from."""
    with pytest.raises(SystemExit):
        runs.parse_config(sft.Config, ["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "weight of the latent term, Eq. (1) # paper Table 8 (default: 0.1)" in said
    assert "frames sampled from a clip" in said and "share of the steps, linear" in said


def test_budgets():
    """L_max counts tokens of 32 x 32 pixels; a video token covers two frames, so its budget holds twice the pixels."""
    config = data.DataConfig(image_max_tokens=3, l_max=4, video_max_tokens=5)
    assert config.budgets == ((1024, 3072), (1024, 4096), (1024, 10240))
