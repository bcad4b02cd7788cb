"""The paddle box by hand and by eye."""

import math
import os

import numpy as np
import pytest

from common.clips import key_frame_positions, read_clip
from common.formats import read_rows
from toy import __main__ as demo
from toy import world as paddle


@pytest.mark.parametrize(
    "wall, u, bend, expected",
    [
        (0, 0.5, -1.3, (2, 0.5)),  # the middle of a wall: straight across
        (1, 0.5, 1.05, (3, 0.5)),
        (0, 0.75, -0.4, (2, 0.75 - math.tan(0.2))),  # bent by phi = -0.2 towards the middle
        (3, 0.25, -0.4, (1, 0.25 + math.tan(0.2))),
        (0, 0.75, -1.3, (1, 0.75 / math.tan(0.65))),  # steep: the floor comes first
        # bent away from the middle: up from the right wall to the ceiling
        (2, 0.9, 1.0, (3, 1 - 0.1 / math.tan(0.8))),
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
        # it touches the wall there, not a frame later
        assert abs(touch - (paddle.WALL + paddle.BALL - 0.5)) < 1.5
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
        assert future == {"1-hop": [5], "3-hop": [5, 6, 7]}.get(row.group, [5, 6])
        assert row.response[0].startswith("moves") and not isinstance(row.response[-1], tuple)
        assert row.response[-1] == f"hits {row.answer}"


def test_answers_are_balanced_and_training_and_test_clips_differ():
    """Breaks if one colour answers most questions, or a held-out clip was trained on."""
    answers = []
    for seed in range(600):
        path = paddle.contacts(seed, demo.Config.bend)
        answers += [paddle.WALLS[wall] for wall, _ in path[4:7]]
    shares = [answers.count(w) / len(answers) for w in paddle.WALLS]
    assert min(shares) > 0.2 and max(shares) < 0.3
    assert demo.Config.eval_seed > demo.Config.clips
    assert paddle.contacts(3, -1.3) == paddle.contacts(3, -1.3)


def test_two_of_three_candidates_ask_for_what_is_visible(world, tmp_path):
    """Breaks if such an answer is not in the frames that are shown, or the pool does not take 1-,
    2- and 3-hop by turns.
    """
    clips = os.path.join(os.path.dirname(world["data"]), "clips")
    records = []
    for seed in range(6):
        video = os.path.join(clips, f"{seed}.mp4")
        records += paddle.candidates(seed, demo.Config.bend, video)
    paddle.write_rows(str(tmp_path / "pool.jsonl"), records)
    rows = read_rows(str(tmp_path / "pool.jsonl"))
    groups = []
    for hop in ("1-hop", "2-hop", "3-hop") * 2:
        groups += ["near", "move", hop]
    assert [row.group for row in rows] == groups
    for near, move in zip(rows[::3], rows[1::3]):
        frames, _, _ = read_clip(near.prompt[0].source, key_frame_positions)
        (x0, y0, _), (x1, y1, wall) = ball(frames[2]), ball(frames[3])
        assert near.answer == wall
        way = f"{'right' if x1 > x0 else 'left'} {'up' if y1 < y0 else 'down'}"
        assert move.answer == f"moves {way}"
        for row in (near, move):
            assert [p.index for p in row.prompt if not isinstance(p, str)] == [3, 4]
            assert row.answer in row.options
            assert [p.index for p in row.response if not isinstance(p, str)] == [5]
