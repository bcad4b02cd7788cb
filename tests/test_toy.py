"""The paddle box by hand and by eye, and the whole pipeline in small through its own command."""

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

from common.clips import key_frame_positions, read_clip
from common.formats import read_rows
from toy import __main__ as demo
from toy import world as paddle

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.mark.parametrize(
    "wall, u, bend, expected",
    [
        (0, 0.5, -1.3, (2, 0.5)),  # the middle of a wall: straight across
        (1, 0.5, 1.05, (3, 0.5)),
        (0, 0.75, -0.4, (2, 0.75 - math.tan(0.2))),  # bent by phi = -0.2 towards the middle
        (3, 0.25, -0.4, (1, 0.25 + math.tan(0.2))),
        (0, 0.75, -1.3, (1, 0.75 / math.tan(0.65))),  # steep: the floor comes first
        (
            2,
            0.9,
            1.0,
            (3, 1 - 0.1 / math.tan(0.8)),
        ),  # bent away from the middle: up from the right wall to the ceiling
    ],
)
def test_next_contact_by_trigonometry(wall, u, bend, expected):
    """Breaks if an angle, a wall or a direction along it is mixed up."""
    w, v = paddle.next_contact(wall, u, bend)
    assert w == expected[0] and v == pytest.approx(expected[1])


def ball(frame):
    """Centre of the dark pixels in a frame, and the wall colour nearest to it."""
    dark = frame.astype(int).sum(-1) < 200
    y, x = np.argwhere(dark).mean(0)
    gaps = {"red": x, "blue": 159 - x, "yellow": y, "green": 159 - y}
    return x, y, min(gaps, key=gaps.get)


def test_the_pictures_show_what_the_answers_say(world):
    """Breaks if a contact does not fall on its key frame, a wall has another colour, or a
    question another answer.
    """
    rows = read_rows(world["data"])
    hop = {"1-hop": 5, "2-hop": 6, "3-hop": 7, "interp": 6}
    checked = 0
    for row in rows:
        frames, _, _ = read_clip(row.prompt[0].source, key_frame_positions)
        x, y, nearest = ball(frames[hop[row.group] - 1])
        assert nearest == row.answer
        touch = {"red": x, "blue": 159 - x, "yellow": y, "green": 159 - y}[nearest]
        assert (
            abs(touch - (paddle.WALL + paddle.BALL - 0.5)) < 1.5
        )  # it touches the wall there, not a frame later
        checked += 1
    assert checked == 24 and {row.group for row in rows} == set(hop)


def test_rows_show_the_past_and_ask_for_the_future(world):
    """Breaks if a future frame is in the prompt (but the last one of interp), or a span is
    missing.
    """
    for row in read_rows(world["data"]):
        seen = [p.index for p in row.prompt if not isinstance(p, str)]
        future = [p.index for p in row.response if not isinstance(p, str)]
        assert seen == ([3, 4, 7] if row.group == "interp" else [3, 4])
        assert (
            future
            == {"1-hop": [5], "2-hop": [5, 6], "3-hop": [5, 6, 7], "interp": [5, 6]}[row.group]
        )
        assert row.response[0].startswith("moves") and not isinstance(row.response[-1], tuple)
        assert row.response[-1] == f"hits {row.answer}"


def test_answers_are_balanced_and_training_and_test_clips_differ():
    """Breaks if one colour answers most questions, or a held-out clip was trained on."""
    answers = [
        paddle.WALLS[paddle.contacts(seed, demo.Config.bend)[k][0]]
        for seed in range(600)
        for k in (4, 5, 6)
    ]
    shares = [answers.count(w) / len(answers) for w in paddle.WALLS]
    assert min(shares) > 0.2 and max(shares) < 0.3
    assert demo.Config.eval_seed > demo.Config.clips and paddle.contacts(
        3, -1.3
    ) == paddle.contacts(3, -1.3)


def test_the_tokenizer_loads_as_any_other(world):
    """Breaks if the saved folder is not one that AutoTokenizer understands, or a control token is
    split.
    """
    tokenizer = AutoTokenizer.from_pretrained(world["model"])
    ids = tokenizer(
        "<reason> hits red </reason> <|latent_start|> <|latent|> <|latent_end|> <|im_end|>"
    ).input_ids
    assert len(ids) == 8 and tokenizer.unk_token_id not in ids
    assert (
        tokenizer.decode(ids[:4]) == "<reason> hits red </reason>"
        and tokenizer.eos_token == "<|im_end|>"
    )


@pytest.mark.slow
def test_the_whole_demo_in_small_twice(tmp_path):
    """Breaks if any stage does, or if a second run does not reuse the first, or if changed
    settings are mixed in.
    """
    out = tmp_path / "a toy with a space"
    command = [
        sys.executable,
        "-m",
        "toy",
        "--out",
        str(out),
        "--clips",
        "12",
        "--eval_clips",
        "3",
        "--pretrain_steps",
        "2",
        "--sft_steps",
        "2",
        "--rl_steps",
        "2",
        "--variants",
        "text,pause,latent,latent+self",
    ]
    first = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert first.returncode == 0, first.stderr[-3000:]
    table = json.load(open(out / "table.json"))
    assert set(table["results"][0]) == {"base", "text", "pause", "latent", "latent+self", "la-dapo"}
    assert set(table["ablations"][0]) == {"generated", "zero", "noise", "shuffled", "true"}
    assert all(r[g]["n"] == 3 for r in table["results"][0].values() for g in demo.GROUPS)
    assert "able" in table["curation"][0] and table["figures"][0]["seconds, counts"] > 0
    assert (
        "| text-only SFT |" in first.stdout
        and (out / "table.md").read_text() in first.stdout + "\n"
    )
    for picture in (
        "accuracy.png",
        "clip.png",
        "seed_0/latent/loss.png",
        "rl.png",
        "seed_0/la-dapo/rewards.png",
    ):
        assert (out / picture).stat().st_size > 5000
    model = out / "seed_0" / "latent" / "step_000002" / "model.safetensors"
    stamp = model.stat().st_mtime_ns
    second = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (
        second.returncode == 0
        and model.stat().st_mtime_ns == stamp
        and json.load(open(out / "table.json")) == table
    )
    other = subprocess.run([*command, "--bend", "0.5"], capture_output=True, text=True, timeout=100)
    assert other.returncode != 0 and "--fresh" in other.stderr
