"""data.py: samples, batches and the configs made of them."""

import dataclasses
import multiprocessing
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import curate
import data
import la_dapo
import sft
from common import clips
from common.formats import ASK_LETTER, Clip, Frame, RecordError, Row, Skipped, read_record
from data import Samples
from tests.conftest import TINY_DATA, WORDS, changed_rows, shown
from toy import tiny

NAMES = "im_start im_end vision_start vision_end image_pad video_pad latent_start latent latent_end"
SPECIALS = [f"<|{name}|>" for name in (NAMES + " endoftext").split()]


# samples and batches


@pytest.fixture(scope="module")
def words():
    """The shared tiny vocabulary and the time stamps 0.0 to 3.9."""
    return tiny.make_tokenizer([WORDS, "seconds> " + " ".join(f"<{k / 10:.1f}" for k in range(40))])


def row(path, where="f:0", question="which wall ?"):
    prompt = [Frame(path, 3), Frame(path, 4), question]
    response = ["moves right", Frame(path, 5), Frame(path, 6), "hits red"]
    return Row(where, "0", prompt, response, "red")


@pytest.mark.parametrize("height, width, n", [(64, 96, 2), (96, 64, 2), (64, 64, 4)])
def test_encode(height, width, n, film, words, data_config):
    """Breaks if the layout, the order of frames, or what carries a label (Eq. 2) is another."""
    sight = row(film("c.mp4", range(40), height, width))
    picture = f"<|vision_start|> {'<|image_pad|> ' * n}<|vision_end|> "
    prompt = "<|im_start|> system watch the ball <|im_end|> <|im_start|> user " + picture * 2
    prompt = (prompt + "which wall ? <|im_end|> <|im_start|> assistant").split()
    before = "<reason> moves right </reason> ".split()
    span = f"<|latent_start|> {'<|latent|> ' * n}<|latent_end|> ".split()
    after = "<reason> hits red </reason> <answer> red </answer> <|im_end|>".split()
    tokens = prompt + before + span * 2 + after

    sample = data.encode(sight, words, data_config)
    assert words.convert_ids_to_tokens(sample["ids"]) == tokens
    labels = list(sample["ids"])
    for k, token in enumerate(tokens):
        if k < len(prompt) or token == "<|latent|>":
            labels[k] = -100
    assert sample["labels"] == labels
    pictures = sample["images"] + sample["futures"]
    assert [int(grid.prod()) // 4 for _, grid in pictures] == [n] * 4
    levels = shown(torch.from_numpy(patches).float() for patches, _ in pictures)
    assert levels == [10, 16, 22, 28]  # key frames 3, 4 and 5, 6 of 40
    for settings, wanted in (
        (dict(spans=False), prompt + before + after),
        (dict(train=False), prompt),
    ):
        sample = data.encode(sight, words, data_config, **settings)
        assert words.convert_ids_to_tokens(sample["ids"]) == wanted and not sample["futures"]
    sample = data.encode(sight, words, data_config, train=False, futures=True)  # for a reward
    assert words.convert_ids_to_tokens(sample["ids"]) == prompt and len(sample["futures"]) == 2


def test_text_never_becomes_a_special_token(film, words, data_config):
    """Breaks if a "<|latent|>" typed into data opens a position with no latent for it, or an
    "<|im_end|>" ends the turn.
    """
    path, typed = film(), " " + " ".join(SPECIALS) + "".join(SPECIALS)
    dirty = dataclasses.replace(row(path, question="which" + typed), answer="red" + typed)
    dirty.response = [p if isinstance(p, Frame) else p + typed for p in dirty.response]
    config = dataclasses.replace(data_config, system="watch" + typed)
    special = set(words.convert_tokens_to_ids(SPECIALS))
    found = []
    for r, c in ((row(path), data_config), (dirty, config)):
        found.append([i for i in data.encode(r, words, c)["ids"] if i in special])
    assert len(special) == len(SPECIALS) and found[0] == found[1]


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
    """Breaks if time stamps, frames, or the number of pads are wrong: Qwen3-VL tells time by the
    text before each pair of frames.
    """
    clip = Clip(film("v.mp4", range(count), 64, 96, fps))
    config = dataclasses.replace(data_config, num_frames=n)
    sample = data.encode(Row("f:0", "0", [clip, "which wall ?"], [], "red"), words, config)
    pads = f"<|vision_start|> {'<|video_pad|> ' * 6}<|vision_end|>"  # 64 x 96: 2 x 3 tokens
    tokens = words.convert_ids_to_tokens(sample["ids"])
    between = tokens[tokens.index("user") + 1 : tokens.index("which")]
    assert between == " ".join(f"<{stamp} seconds> {pads}" for stamp in stamps).split()
    ((patches, grid),) = sample["videos"]
    assert grid.tolist() == [len(stamps), 4, 6]
    frames = torch.from_numpy(patches).reshape(-1, 24, 3, 2, 256)
    assert shown(frames.float().movedim(3, 1).flatten(0, 1)) == numbers


def test_a_clip_and_moments_after_it(film, words, data_config):
    """Breaks if a question about seconds 0 to 1 shows what comes later, if its future frames are
    not those of their seconds, or curation or the report show others.
    """
    gpt = {"from": "gpt", "value": "THOUGHT 1: moves right <image> THOUGHT 2: hits red <image>"}
    talk = [{"from": "human", "value": "which wall ?"}, gpt]
    record = dict(video=film(), observed=[0, 1], future=[1.5, 3], conversations=talk, answer="red")
    row = read_record(record, "f:0")  # 12 frames a second: numbers 0 to 12, then 18 and 36
    config = dataclasses.replace(data_config, num_frames=4, l_max=1)
    sample = data.encode(row, words, config)
    pads = f"<|vision_start|> {'<|video_pad|> ' * 4}<|vision_end|> "
    prompt = f"<|im_start|> user <0.2 seconds> {pads}<0.8 seconds> {pads}which wall ? <|im_end|>"
    span = "<|latent_start|> <|latent|> <|latent_end|> "
    reply = f"<reason> moves right </reason> {span}<reason> hits red </reason> {span}<answer> red"
    text = " ".join(words.convert_ids_to_tokens(sample["ids"]))
    assert prompt in text and reply in text

    ((patches, _),) = sample["videos"]
    frames = torch.from_numpy(patches).reshape(-1, 16, 3, 2, 256)
    assert shown(frames.float().movedim(3, 1).flatten(0, 1)) == [0, 4, 8, 12]
    assert [shown(p[None])[0] for p, _ in sample["futures"]] == [18, 36]
    shown_to_v = data.encode(curate.with_future(row), words, config, train=False)
    assert [shown(p[None])[0] for p, _ in shown_to_v["images"]] == [18, 36]
    assert len(shown_to_v["videos"]) == 1
    strip = clips.film(row)
    assert [label for label, _, _ in strip[-3:]] == ["1.0 s", "1.5 s", "3.0 s"]
    assert [role for _, role, _ in strip] == ["seen"] * 8 + ["future"] * 2
    assert shown(picture for _, _, picture in strip[-3:]) == [12, 18, 36]


SHOWN = "\nA) red\nB) blue"


@pytest.mark.parametrize(
    "rule, conversations, rl", [("auto", "", SHOWN), ("always", SHOWN, SHOWN), ("never", "", "")]
)
def test_show_options(rule, conversations, rl, words, data_config):
    """Breaks if a setting shows the options of a format that it should hide, hides the question's
    own, or asks for the letter of options that are hidden.
    """
    question, options = "which wall ?", ["red", "blue"]
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": ""}]
    records = [
        dict(video="v.mp4", conversations=talk, options=options, answer="red"),
        dict(problem=question, options=options, answer="B"),
        dict(problem=question + " A) red B) blue", options=options, answer="B"),
    ]
    letter = "" if rule == "never" else ASK_LETTER
    wanted = [conversations, rl + letter, " A) red B) blue" + letter]
    for record, text in zip(records, wanted):
        row = read_record(record, "f:0")
        config = dataclasses.replace(data_config, show_options=rule)
        ids = data.encode(row, words, config, train=False)["ids"]
        plain = Row("f:0", "0", [question + text], [], "red")
        assert ids == data.encode(plain, words, data_config, train=False)["ids"]


def test_too_long_and_broken_samples_are_skipped(film, words, data_config):
    """Breaks if one bad row in a million costs more than that row, or is not named."""
    good, gone = row(film()), row("gone.mp4", "f:1")
    length = len(data.encode(good, words, data_config)["ids"])
    exact, short = (dataclasses.replace(data_config, max_length=n) for n in (length, length - 1))
    assert len(data.encode(good, words, exact)["ids"]) == length
    message = f"f:0: {length} tokens, more than max_length = {length - 1}"
    with pytest.raises(RecordError, match=message):
        data.encode(good, words, short)
    samples = Samples([good, gone], words, data_config)
    assert len(samples) == 2 and samples[0]["row"] is good
    assert Samples([good], words, short)[0] == ("f:0", message)
    where, why = samples[1]
    assert where == "f:1" and "gone.mp4" in why


def sample(ids, labels, level=None):
    """An encoded sample made by hand, its only image and future four equal patches."""
    images = [] if level is None else [(np.full((4, 1536), level, np.uint8), np.array([1, 2, 2]))]
    about = dict(images=images, videos=[], futures=images[:])
    return dict(about, ids=ids, labels=labels, row=f"row {ids[0]}")


RIGHT = [[1, 9, 3], [4, 9, 9]], [[-100, 9, 3], [4, -100, -100]], [[1, 1, 1], [1, 0, 0]]
LEFT = [[1, 9, 3], [9, 9, 4]], [[-100, 9, 3], [-100, -100, 4]], [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("side, expected", [("right", RIGHT), ("left", LEFT)])
def test_padding(side, expected):
    """Breaks if padding is on the wrong side, attended to or learned, patches are out of order, or
    a skipped sample takes others with it. 9 is the padding, and a text's token.
    """
    samples = [sample([1, 9, 3], [-100, 9, 3], 255), Skipped("f:5", "why"), sample([4], [4], 0)]
    batch = data.collate(samples, 9, side)
    names = "input_ids", "labels", "attention_mask"
    assert tuple(batch[name].tolist() for name in names) == expected
    assert batch["rows"] == ["row 1", "row 4"] and batch["kept"] == [0, 2]
    assert batch["samples"] == [samples[0], samples[2]] and batch["skipped"] == [("f:5", "why")]
    assert not any("video" in key for key in batch)
    for medium in ("", "future_"):
        grids = batch["future_grid_thw" if medium else "image_grid_thw"]
        pixels = batch[medium + "pixel_values"]
        assert grids.tolist() == [[1, 2, 2]] * 2 and pixels.shape == (8, 1536)
        assert pixels.mean(1).tolist() == [1.0] * 4 + [-1.0] * 4


def test_nothing_but_skipped_samples():
    """Breaks if there is no stand-in row: then one rank leaves its step out and all others wait."""
    batch = data.collate([Skipped("f:0", "why"), Skipped("f:1", "why")], 9)
    assert batch["input_ids"].tolist() == [[9]] and batch["labels"].tolist() == [[-100]]
    assert batch["attention_mask"].tolist() == [[1]] and batch["rows"] == []
    assert [s.where for s in batch["skipped"]] == ["f:0", "f:1"]


def test_workers_change_nothing(film, words, data_config):
    """Breaks if batches come in another order or with other content from the background."""
    rows = [row(film(f"{k}.mp4", range(k, k + 12), 64, 64 + 32 * k), f"f:{k}") for k in range(3)]
    samples = Samples([*rows, row("gone.mp4", "f:3")], words, data_config)
    batches = [[2, 0], [3], [1], [1, 3, 2], [0]]
    plain, ahead = (list(data.loader(samples, batches, n, pad_id=0)) for n in (0, 2))
    numbers = [[int(r.where[2:]) for r in batch["rows"]] for batch in plain]
    assert numbers == [[2, 0], [], [1], [1, 2], [0]]
    for a, b in zip(plain, ahead, strict=True):
        assert all(a[k].dtype == torch.uint8 for k in a if "pixel" in k)  # fp32 is four times more
        assert a.keys() == b.keys() and all(a[k] == b[k] for k in ("rows", "skipped", "kept"))
        assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


class Fatal(Samples):
    """Samples of which two end the process that reads them."""

    def __getitem__(self, i):
        if i in (3, 8):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_worker_that_is_killed_costs_its_sample(film, words, data_config):
    """Breaks if it ends the run, takes others with it, changes their order, or is not named; or the
    run's random state moves.
    """
    rows = [row(film(), f"f:{k}") for k in range(11)]
    batches = [[0, 1], [2, 3, 4], [5], [6], [8, 7], [10, 9]]
    torch.manual_seed(0)
    found = list(data.loader(Fatal(rows, words, data_config), batches, 2, pad_id=0))
    assert torch.initial_seed() == 0 and torch.equal(torch.rand(3), rand_of(0))
    numbers = [[int(r.where[2:]) for r in batch["rows"]] for batch in found]
    assert numbers == [[0, 1], [2, 4], [5], [6], [7], [10, 9]]
    skipped = [skip for batch in found for skip in batch["skipped"]]
    assert skipped == [(f"f:{k}", "the process that read it was killed") for k in (3, 8)]


def rand_of(seed):
    return torch.rand(3, generator=torch.Generator().manual_seed(seed))


def test_a_fault_of_a_worker_is_no_skip(film, words, data_config):
    """Breaks if a bug in the code that reads is taken for a killed worker."""
    with pytest.raises(AttributeError):
        list(data.loader(Samples([row(film()), None], words, data_config), [[0], [1]], 1, pad_id=0))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_workers_keep_no_files_open(film, words, data_config):
    """Breaks if a cached frame that was sent holds a file open for good: after 10,000 small frames
    a run would end with "Too many open files".
    """
    samples = Samples([row(film(f"{k}.mp4")) for k in range(16)], words, data_config)
    others = multiprocessing.active_children()
    batches = iter(data.loader(samples, [[k] for k in range(16)], 1, pad_id=0))
    kept = [next(batches)]  # 1 to 5 are on their way
    (worker,) = [child for child in multiprocessing.active_children() if child not in others]
    files = f"/proc/{worker.pid}/fd"
    before = len(os.listdir(files))
    kept += [next(batches) for _ in range(10)]
    assert len(kept) == 11 and len(os.listdir(files)) < before + 20


# config


def test_budgets():
    """L_max counts tokens of 32 x 32 pixels; a video token covers two frames, so its budget holds
    twice the pixels.
    """
    config = data.DataConfig(image_max_tokens=3, l_max=4, video_max_tokens=5)
    budgets = dict(image=(1024, 3072), future=(1024, 4096), video=(1024, 10240))
    assert config.budgets._asdict() == budgets


def test_numbers_below_their_least_are_refused():
    """Breaks if a config takes a number without meaning, or does not say which."""
    for name in ("num_frames", "l_max", "image_max_tokens", "video_max_tokens", "max_length"):
        with pytest.raises(ValueError, match=f"^{name} is 0, expected at least 1$"):
            data.DataConfig(**{name: 0})
    with pytest.raises(ValueError, match="show_options is 'yes', expected auto, always or never"):
        data.DataConfig(show_options="yes")


# what a run says when its data hides something, or nothing imagines


def options(*texts, **more):
    talk = [{"from": "human", "value": "which wall ?"}, {"from": "gpt", "value": "it falls"}]
    record = dict(video="v.mp4", conversations=talk, options=list(texts), answer=texts[0])
    return read_record(record | more, "f:0")


@pytest.mark.parametrize(
    "rule, said", [("auto", ", 2 rows with"), ("always", ""), ("never", ", 3 rows with")]
)
def test_options_that_are_not_shown_are_counted(rule, said, model):
    """Breaks if nothing says that a model is not shown the options that it is scored by."""
    mcq = read_record(dict(question="Who?", options=["a", "b"], answer="A", video="v"), "f:1")
    rows = [options("red", "blue"), options("left", "right"), mcq, Row("f", "", ["q"], [], "a")]
    machine = SimpleNamespace(world=1, device=torch.device("cpu"))
    for script in (sft, la_dapo):
        config = script.Config(show_options=rule)
        text = script.describe(config, rows, model, 3, machine)
        assert said in text and ("not shown" in text) == bool(said)


def test_a_training_in_which_nothing_imagines_says_so(world, tmp_path, capsys):
    """Breaks if SFT on rows without spans, or RL whose rollouts open none, pass for latent
    training.
    """

    def bare(i, row):
        row["conversations"][1]["value"], row["reasoning_image"] = "", []

    about = dict(model=world["model"], workers=0, **TINY_DATA)
    said = "no row has a future frame: nothing teaches the model to imagine"
    plain = changed_rows(world, "plain.jsonl", bare, 4)
    for spans, rows in ((True, plain), (False, plain), (True, world["data"])):
        more = dict(data=rows, out=str(tmp_path / f"{spans} {rows == plain}"), spans=spans)
        sft.train(sft.Config(steps=1, global_batch=2, micro_batch=2, **about, **more))
        assert (said in capsys.readouterr().out) == (spans and rows == plain)

    small = dict(steps=1, groups=1, group_size=2, filter=False, max_latents=2, max_new_tokens=1)
    about.update(data=world["data"], out=str(tmp_path / "rl"))
    la_dapo.train(la_dapo.Config(**about, **small))
    assert "step 0: no rollout opened a span: nothing is imagined" in capsys.readouterr().out
