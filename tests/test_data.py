"""From records and clips to batches: key frames, patches, formats, broken input, chat layout, collation."""

import json
import os
import sys
import wave

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
import sft
from conftest import frames
from data import (Clip, ClipError, DataConfig, Frame, RecordError, Row, Samples, Skipped, collate, encode,
                  key_frame_positions, load_frames, loader, parse_config, read_clip, read_record, read_rows,
                  uniform_positions)
from model import LATENT, fit, resize_and_patchify

CELL = 32 * 32


# ---------------------------------------------------------------------------------------------- frames and patches

def test_key_frames_by_hand():
    """Breaks if a key frame moves by one: then every latent target is another picture."""
    assert key_frame_positions(600) == [1, 51, 150, 249, 349, 448, 547, 598]  # TwiFF's own example
    assert key_frame_positions(40) == [1, 4, 10, 16, 22, 28, 34, 38]  # edges 2 8 14 20 26 32 38
    assert key_frame_positions(1) == [0] * 8 and key_frame_positions(3) == [0, 1, 2, 2, 2, 2, 2, 2]
    for n in range(1, 200):
        found = key_frame_positions(n)
        assert len(found) == 8 and found == sorted(found) and 0 <= found[0] and found[-1] < n
    with pytest.raises(ValueError, match="at least one frame"):
        key_frame_positions(0)
    assert uniform_positions(11, 5) == [0, 2, 5, 8, 10] and uniform_positions(3, 16) == [0, 1, 2]


@pytest.mark.parametrize("shape", [(1, 64, 96), (4, 32, 64), (3, 64, 32)])
def test_patch_order_by_explicit_loops(shape):
    """Breaks if two patches, channels, frames or pixels change places, or the scale is not (x - 127.5) / 127.5."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    patches, grid = resize_and_patchify(pixels, CELL, 10**6)
    whole = pixels if shape[0] % 2 == 0 else np.concatenate([pixels, pixels[-1:]])
    rows = []
    for t in range(0, len(whole), 2):
        for block_y in range(0, shape[1], 32):
            for block_x in range(0, shape[2], 32):
                for y in (block_y, block_y + 16):
                    for x in (block_x, block_x + 16):
                        rows.append([whole[f, y:y + 16, x:x + 16, c] for c in range(3) for f in (t, t + 1)])
    expected = (np.array(rows, np.float64).reshape(len(rows), -1) - 127.5) / 127.5
    assert grid.tolist() == [len(whole) // 2, shape[1] // 16, shape[2] // 16]
    assert patches.shape == expected.shape and np.abs(patches.numpy() - expected).max() < 1e-6


@pytest.mark.parametrize("T, H, W, low, high, expected", [
    (1, 360, 640, 1, 4, (32, 64)),  # 16:9 -> 1 x 2 latents
    (1, 500, 500, 1, 4, (64, 64)),  # square -> 2 x 2
    (1, 640, 360, 1, 4, (64, 32)),  # portrait
    (1, 2, 2, 1, 4, (32, 32)),
    (1, 80, 80, 1, 100, (64, 64)),  # 2.5 cells round to 2 (half to even, as HF)
    (1, 100, 100, 1, 100, (96, 96)),
    (1, 33, 32, 16, 100, (160, 128)),  # too small: up to at least 16 cells, each side rounded up
    (8, 360, 640, 1, 64, (64, 96)),  # 8 frames of at most 8 cells: beta = sqrt(8*360*640/65536) = 5.3
    (4, 20, 40, 4, 64, (32, 64)),  # a video below one cell is first scaled up
])
def test_sizes_by_hand(T, H, W, low, high, expected):
    """Breaks if the budget counts one frame instead of all, or rounding differs from Qwen3-VL's."""
    assert fit(T, H, W, low * CELL, high * CELL) == expected


def test_extreme_shapes_are_refused():
    """Breaks if a 201:1 picture reaches the model."""
    with pytest.raises(ValueError, match="200:1"):
        fit(1, 10, 2010, CELL, 4 * CELL)


def test_resizing_is_bicubic_with_antialias():
    """Breaks if the filter changes: Pillow's bicubic agrees within two grey levels."""
    picture = frames(1, 150, 210)[0]
    patches, grid = resize_and_patchify(picture[None], CELL, 6 * CELL)
    assert grid.tolist() == [1, 4, 4]
    x = patches.reshape(2, 2, 2, 2, 3, 2, 16, 16)[..., 0, :, :]  # block y, block x, y, x, channel, 16, 16
    x = x.permute(0, 2, 5, 1, 3, 6, 4).reshape(64, 64, 3) * 127.5 + 127.5
    pillow = np.asarray(Image.fromarray(picture).resize((64, 64), Image.BICUBIC), np.float32)
    assert np.abs(x.numpy() - pillow).max() <= 2


def test_equal_to_transformers_processors():
    """Breaks if sizes or values differ from HF's own (which need torchvision)."""
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLImageProcessor, Qwen3VLVideoProcessor
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, patch_size=16, merge_size=2)
    for height, width in ((360, 640), (70, 50), (33, 500)):
        pixels = frames(5, height, width)
        size = dict(shortest_edge=4 * CELL, longest_edge=40 * CELL)
        image = Qwen2VLImageProcessor(size=size, **half)(images=[pixels[0]], return_tensors="pt")
        patches, grid = resize_and_patchify(pixels[:1], 4 * CELL, 40 * CELL)
        assert image["image_grid_thw"][0].tolist() == grid.tolist()
        assert torch.allclose(image["pixel_values"], patches, atol=1e-6)
        video = Qwen3VLVideoProcessor(size=size, do_sample_frames=False, cap_pixels_per_frame=False, **half)(
            videos=[torch.from_numpy(pixels).permute(0, 3, 1, 2)], return_tensors="pt")
        patches, grid = resize_and_patchify(pixels, 4 * CELL, 40 * CELL)
        assert video["video_grid_thw"][0].tolist() == grid.tolist()
        assert torch.allclose(video["pixel_values_videos"], patches, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ clips

@pytest.mark.parametrize("reader", [data._decord, data._pyav])
def test_both_readers_return_the_frames_asked_for(clip, reader):
    """Breaks if a frame is off by one: brightness tells which frame it is."""
    path = clip(count=21, height=48, width=64)
    truth = frames(21, 48, 64).reshape(21, -1).mean(1)
    pictures, numbers, fps = reader(path, lambda n: [0, n // 2, n - 1, n // 2 + 1])
    assert numbers == [0, 10, 20, 11] and fps == 12
    for picture, k in zip(pictures, numbers):
        assert np.abs(truth - picture.mean()).argmin() == k


def test_pyav_reads_what_decord_refuses(clip, monkeypatch):
    """Breaks if the second reader is not asked, or gives other pictures."""
    path = clip(count=9)
    first = read_clip(path, lambda n: [3, 8])[0]

    def refuses(*_):
        raise ClipError("decord: no")
    refuses.__name__ = "_decord"
    monkeypatch.setattr(data, "_decord", refuses)
    second = read_clip(path, lambda n: [3, 8])[0]
    assert np.abs(first.astype(int) - second).max() <= 4


@pytest.mark.parametrize("count, height, width, name", [
    (1, 64, 64, "one.mp4"), (5, 96, 48, "portrait.mp4"), (5, 2, 2, "tiny.mp4"), (5, 32, 32, "Clip Ω 視頻.mp4")])
def test_odd_clips_are_read(clip, count, height, width, name):
    """Breaks if one frame, a tall or tiny picture, or a name in other letters stops the reader."""
    got = load_frames([Frame(clip(name, count, height, width), i) for i in (1, 8)], (CELL, 4 * CELL))
    assert len(got) == 2 and all(patches.shape == (int(grid.prod()), 1536) for patches, grid in got)


def test_broken_clips_are_named(clip, tmp_path):
    """Breaks if an unreadable file raises something else than ClipError, or the message does not name it."""
    whole = open(clip(count=30), "rb").read()
    paths = {name: str(tmp_path / name) for name in ("cut.mp4", "empty.mp4", "text.mp4", "sound.wav")}
    for name, content in (("cut.mp4", whole[:len(whole) // 2]), ("empty.mp4", b""), ("text.mp4", b"not a video")):
        with open(paths[name], "wb") as f:
            f.write(content)
    with wave.open(paths["sound.wav"], "wb") as f:
        f.setnchannels(1), f.setsampwidth(2), f.setframerate(8000), f.writeframes(bytes(16000))
    sound = str(tmp_path / "sound.mp4")
    with av.open(sound, "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    for path in (*paths.values(), sound, str(tmp_path / "missing.mp4"), str(tmp_path)):
        with pytest.raises(ClipError) as error:
            read_clip(path, lambda n: [0])
        assert path in str(error.value)
    with pytest.raises(ClipError, match="text.mp4"):
        load_frames([Frame(paths["text.mp4"], 0)], (CELL, CELL))  # as a picture


def test_the_cache_changes_nothing(clip):
    """Breaks if a cached frame is not the one that would be decoded."""
    wanted = [Frame(clip(count=20), i) for i in (2, 7)]
    plain = load_frames(wanted, (CELL, 4 * CELL))
    for _ in range(2):
        cached = load_frames(wanted, (CELL, 4 * CELL), room=100)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, cached))


# ---------------------------------------------------------------------------------------------------------- records

TRAIN = dict(id=7, video="v/a.mp4", image=[1, 3], reasoning_image=[5], answer="red", options=["red", "blue"], conversations=[
    {"from": "human", "value": "<image> then <image> what is next?"},
    {"from": "gpt", "value": "THOUGHT 1: it moves <image> THOUGHT 2: it hits"}])
TWIFF = dict(video="a.mp4", question="what now?", answer="first <rimage> then <ans> done </ans>",
             question_images_index=[1, 2], reasoning_images_index=[6], meta_data={"class": "cook"})
BENCH = dict(id="q1", question_type="hop2", video_path="x/video_dataset/s/b.mp4",
             qa=dict(Question="Which?", Options=dict(B="two", A="one"), Answer="B"))
RL = dict(problem="<image>why?", answer=3, images=["p.png"])
MCQ = dict(id="m", video="c.mp4", question="Where?", options=["in", "out"], answer="A", group="g")


def test_every_format_by_hand():
    """Breaks if a field of a published format lands in the wrong place."""
    a = read_record(TRAIN, "f:0", "/m")
    assert a == Row("f:0", "7", [Frame("/m/v/a.mp4", 1), " then ", Frame("/m/v/a.mp4", 3), " what is next?"],
                    ["it moves", Frame("/m/v/a.mp4", 5), "it hits"], "red", "then  what is next?", ["red", "blue"], "all")
    b = read_record(TWIFF, "f:1", "/m")
    assert b.prompt == [Frame("/m/a.mp4", 1), Frame("/m/a.mp4", 2), "what now?"]
    assert b.response == ["first", Frame("/m/a.mp4", 6), "then"] and b.answer == "done" and b.group == "cook"
    shipped = read_record({**TWIFF, "question_images": [{"bytes": b"x", "path": None}] * 2, "reasoning_images": ["r.png"]},
                          "f:1", "/m")
    assert shipped.prompt[0] == Frame(b"x", 0) and shipped.response[1] == Frame("/m/r.png", 0)
    c = read_record(BENCH, "f:2", "/m")
    assert c.prompt == [Clip("/m/s/b.mp4"), "Which?\nA) one\nB) two"] and (c.answer, c.group) == ("B", "hop2")
    has = read_record({**BENCH, "qa": {**BENCH["qa"], "Question": "Which? A) one B) two"}}, "f:2", "/m")
    assert has.prompt[1] == "Which? A) one B) two"
    d = read_record(RL, "f:3", "/m")
    assert d.prompt == [Frame("/m/p.png", 0), "why?"] and d.answer == "3" and d.response == []
    e = read_record(MCQ, "f:4", "/m")
    assert e.prompt == [Clip("/m/c.mp4"), "Where?\nA) in\nB) out"] and e.group == "g"


def write(path, text):
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return str(path)


def test_files_of_records(tmp_path):
    """Breaks if a list, a dict with data, blank lines or non-ASCII text are read differently."""
    lines = [json.dumps({**MCQ, "question": q}, ensure_ascii=False) for q in ("Где?", "何処?")]
    for name, text in (("a.jsonl", "\n".join(lines) + "\n\n"), ("b.json", "[" + ",".join(lines) + "]"),
                       ("c.json", '{"data": [' + ",".join(lines) + "]}")):
        rows = read_rows(write(tmp_path / name, text))
        assert [r.question[:2] for r in rows] == ["Гд", "何処"] and rows[0].prompt[0].path == str(tmp_path / "c.mp4")
    assert read_rows(str(tmp_path / "a.jsonl"), media_root="/x")[0].prompt[0].path == "/x/c.mp4"


BAD = [
    ({k: v for k, v in TRAIN.items() if k != "video"}, "'video' is missing"), ({**TRAIN, "video": 3}, "should be str"),
    ({**TRAIN, "image": [0, 3]}, "1..8"), ({**TRAIN, "image": [1, 9]}, "1..8"), ({**TRAIN, "image": ["1", 3]}, "1..8"),
    ({**TRAIN, "image": [1]}, "2 <image> in the text but 1 entries in 'image'"),
    ({**TRAIN, "reasoning_image": [5, 6]}, "1 <image> in the text but 2 entries in 'reasoning_image'"),
    ({**TRAIN, "conversations": [{"from": "robot", "value": "x"}]}, "human|gpt"),
    ({**TRAIN, "conversations": "x"}, "should be list"), ({**TRAIN, "answer": " "}, "answer is empty"),
    ({k: v for k, v in TRAIN.items() if k != "answer"}, "'answer' is missing"), ({**TRAIN, "options": ["a"]}, "2 to 26"),
    ({**TWIFF, "question": 5}, "should be str"), ({**TWIFF, "reasoning_images_index": []}, "1 <rimage> in the text"),
    ({**BENCH, "qa": dict(Question="q", Options={"A": "x", "B": "y"})}, "'Answer' is missing"),
    ({**MCQ, "question": 4}, "should be str"), ({"foo": 1, "bar": 2}, r"unknown format \(keys bar, foo\)"), ([], "an object"),
]


@pytest.mark.parametrize("record, message", BAD)
def test_a_bad_record_is_named(record, message):
    """Breaks if a malformed record passes, or its error does not say which record and what is wrong."""
    with pytest.raises(RecordError, match=r"^file\.json:12: .*" + message.replace("|", r"\|")):
        read_record(record, "file.json:12")


def test_bad_files_are_named(tmp_path, monkeypatch):
    """Breaks if a broken line, an empty file or a missing reader is not said."""
    for name, text, message in (("a.jsonl", json.dumps(MCQ) + "\n{half", "a.jsonl:1: not JSON"), ("b.json", "{", "not JSON"),
                                ("c.json", "[]", "no records"), ("d.jsonl", "", "no records"), ("e.json", "3", "list of records")):
        with pytest.raises(RecordError, match=message):
            read_rows(write(tmp_path / name, text))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(RecordError, match="needs pyarrow"):
        read_rows(write(tmp_path / "f.parquet", ""))
    with pytest.raises(FileNotFoundError):
        read_rows(str(tmp_path / "none.json"))


# --------------------------------------------------------------------------------------------- encoding, collation

def train_row(path, question="which wall next ?", response=("moves right", 5, "hits red")):
    return Row("f:0", "0", [Frame(path, 3), question], [Frame(path, p) if isinstance(p, int) else p for p in response],
               "red", question)


def test_labels_and_spans(clip, tokenizer, data_config):
    """Breaks if a prompt token or a latent has a label, a control token has none, or dropping spans touches words."""
    row = train_row(clip(height=64, width=128), response=("moves right", 5, "hits red", 6))
    s = encode(row, tokenizer, data_config)
    prompt = encode(row, tokenizer, data_config, train=False)
    assert s["ids"][:len(prompt["ids"])] == prompt["ids"] and s["labels"][:len(prompt["ids"])] == [-100] * len(prompt["ids"])
    rest = tokenizer.convert_ids_to_tokens(s["ids"][len(prompt["ids"]):])
    span = ["<|latent_start|>", LATENT, LATENT, "<|latent_end|>"]  # 64 x 128 pixels: 1 x 2 cells within l_max = 4
    assert rest == ["<reason>", "moves", "right", "</reason>", *span, "<reason>", "hits", "red", "</reason>", *span,
                    "<answer>", "red", "</answer>", "<|im_end|>"]
    labels = tokenizer.convert_ids_to_tokens([max(0, x) for x in s["labels"][len(prompt["ids"]):]])
    assert labels == [tokenizer.convert_ids_to_tokens(0) if t == LATENT else t for t in rest]
    plain = encode(row, tokenizer, data_config, spans=False)
    drop = {tokenizer.convert_tokens_to_ids(t) for t in span}
    assert plain["ids"] == [t for t in s["ids"] if t not in drop] and plain["futures"] == []
    assert prompt["ids"].count(tokenizer.convert_tokens_to_ids("<|image_pad|>")) == 2


def test_text_never_becomes_a_control_token(clip, tokenizer, data_config):
    """Breaks if a question can open a span or end its turn."""
    row = train_row(clip(), question="which <|latent|> <|im_end|> <|latent_start|> wall")
    ids = encode(row, tokenizer, data_config, train=False)["ids"]
    assert tokenizer.convert_tokens_to_ids(LATENT) not in ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2  # after system and user
    assert tokenizer.decode(encode(train_row(row.prompt[0].source), tokenizer, data_config)["ids"]).count(LATENT) == 2


def test_a_video_has_time_stamps(clip, tokenizer, data_config, monkeypatch):
    """Breaks if the times are not those of Qwen3-VL: the mean of each pair of sampled frames, by hand."""
    said = []
    monkeypatch.setattr(data, "_tokenize", lambda pieces, _: said.append([str(p) for p in pieces]) or [])
    config = DataConfig(num_frames=4, video_max_tokens=4)
    path = clip(count=13, height=64, width=64)  # 12 frames a second; frames 0 4 8 12
    encode(Row("f:0", "0", [Clip(path), "next ?"], [], "red"), tokenizer, config, train=False)
    start = said[0].index("<0.2 seconds>")  # (0 + 4) / 2 / 12 = 0.17
    times = [i for i, piece in enumerate(said[0]) if "seconds" in piece]
    assert [said[0][i] for i in times] == ["<0.2 seconds>", "<0.8 seconds>"]  # (8 + 12) / 2 / 12 = 0.83
    # 4 tokens are 8,192 pixels over four frames: 64 x 64 shrinks to one cell, so one token for each pair of frames
    assert said[0][start + 1] == "<|vision_start|>" and said[0].count("<|video_pad|>") == 2
    one = encode(Row("f:0", "0", [Clip(clip("one.mp4", 1, 32, 32)), "q"], [], "red"), tokenizer, config, train=False)
    assert one["videos"][0][1].tolist() == [1, 2, 2]


def test_collate(clip, tokenizer, data_config):
    """Breaks if padding is on the wrong side, a sample's labels shift, or an unusable batch stops its rank."""
    path = clip()
    rows = [train_row(path), train_row(path, "which ?", ("hits",)), train_row("gone.mp4")]
    long, short, broken = Samples(rows, tokenizer, data_config)
    assert isinstance(broken, Skipped) and broken.where == "f:0" and "gone.mp4" in broken.why
    n, k = len(long["ids"]), len(short["ids"])
    right, left = collate([long, broken, short], 0), collate([long, short], 0, "left")
    assert right["input_ids"].shape == (2, n) and right["skipped"] == [broken] and right["rows"] == rows[:2]
    assert right["input_ids"][1].tolist() == short["ids"] + [0] * (n - k) and right["attention_mask"][1].sum() == k
    assert left["input_ids"][1].tolist() == [0] * (n - k) + short["ids"] and left["attention_mask"][1, 0] == 0
    assert right["labels"][1].tolist() == short["labels"] + [-100] * (n - k)
    assert len(right["image_grid_thw"]) == 2 and len(right["future_grid_thw"]) == 1
    assert len(right["pixel_values"]) == int(right["image_grid_thw"].prod(-1).sum())
    packed = collate([long, short], 0, pack=True)
    assert packed["input_ids"][0].tolist() == long["ids"] + short["ids"] and packed["seq_lens"] == [n, k]
    empty = collate([broken, broken], 5)
    assert empty["input_ids"].tolist() == [[5]] and empty["labels"].tolist() == [[-100]] and len(empty["skipped"]) == 2


def test_too_long_a_sample_is_skipped_by_name(clip, tokenizer):
    """Breaks if a long sample is cut through a span, or dropped without a word."""
    found = Samples([train_row(clip())], tokenizer, DataConfig(max_length=10, system="watch the ball"))[0]
    assert isinstance(found, Skipped) and "more than max_length = 10" in found.why


def test_workers_change_nothing(world):
    """Breaks if background decoding changes order or content."""
    from model import load
    _, tokenizer = load(world["model"])
    samples = Samples(read_rows(world["data"])[:6], tokenizer, DataConfig(image_max_tokens=1, l_max=1))
    plan = [[5, 0], [3], [], [1, 2]]
    here, there = (list(loader(samples, plan, lambda s: collate(s, 0), workers)) for workers in (0, 2))
    for a, b in zip(here, there):
        assert torch.equal(a["input_ids"], b["input_ids"]) and a["rows"] == b["rows"]
        assert ("pixel_values" in a) == ("pixel_values" in b)
        assert "pixel_values" not in a or torch.equal(a["pixel_values"], b["pixel_values"])
    assert len(here) == len(there) == 4


def test_command_line_comes_from_the_config(capsys):
    """Breaks if a flag's type is lost, a bool cannot be switched off, or a misspelt flag is ignored."""
    c = parse_config(sft.Config, ["--lr", "1e-4", "--no-spans", "--zero", "--steps", "3", "--data", "x.json"])
    assert (c.lr, c.spans, c.zero, c.steps, c.data) == (1e-4, False, True, 3, "x.json") and c.lam == 0.1
    with pytest.raises(SystemExit):
        parse_config(sft.Config, ["--lerning_rate", "1"])
    assert "unrecognized arguments: --lerning_rate" in capsys.readouterr().err
