"""The paddle box by hand and by eye."""

import json
import math
import os

import numpy as np
import pytest

import curate
from common.clips import key_frame_positions, read_clip
from common.formats import Frame, read_rows
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
    hop = {"1-hop": 4, "2-hop": 5, "3-hop": 6, "4-hop": 7}
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
    """Breaks if a future frame is in the prompt, a span is missing, or a chain that says places has
    another place than the captions of that frame, or other frames.
    """
    for row in read_rows(world["data"]):
        seen = [p.index for p in row.prompt if not isinstance(p, str)]
        future = [p.index for p in row.response if not isinstance(p, str)]
        assert seen == [2, 3] and future == list(range(4, 4 + int(row.group[0])))
        assert row.response[0].startswith("moves") and not isinstance(row.response[-1], tuple)
        assert row.response[-1] == f"hits {row.answer}"

    folder, said = os.path.dirname(world["data"]), {}
    for row in read_rows(os.path.join(folder, "captions.jsonl")):
        if row.question.startswith("where"):
            said[row.prompt[0]] = row.answer
    bare = {row.id: row for row in read_rows(world["data"])}
    for row in read_rows(os.path.join(folder, "places.jsonl")):
        words = row.response[2::2]
        assert [text.split(" hits ")[0] for text in words] == [said[f] for f in row.response[1::2]]
        walls = ["hits " + text.split(" hits ")[1] for text in words]
        assert walls == bare.pop(row.id).response[2::2] and row.prompt[-1] != ""
    assert not bare


def test_answers_are_balanced_and_training_and_test_clips_differ():
    """Breaks if one colour answers most questions, or a held-out clip was trained on."""
    answers = []
    for seed in range(600):
        path = paddle.contacts(seed, paddle.Config.bend)
        answers += [paddle.WALLS[wall] for wall, _ in path[3:7]]
    shares = [answers.count(w) / len(answers) for w in paddle.WALLS]
    assert min(shares) > 0.2 and max(shares) < 0.3
    assert paddle.Config.eval_seed > paddle.Config.clips
    assert paddle.contacts(3, -1.3) == paddle.contacts(3, -1.3)


def test_two_of_three_candidates_ask_for_what_is_visible(world, tmp_path):
    """Breaks if such an answer is not in the frames that are shown, or the pool does not take 1-,
    2-, 3- and 4-hop by turns.
    """
    clips = os.path.join(os.path.dirname(world["data"]), "clips")
    records = []
    for seed in range(6):
        video = os.path.join(clips, f"{seed}.mp4")
        records += paddle.candidates(seed, paddle.Config.bend, video)
    paddle.write_rows(str(tmp_path / "pool.jsonl"), records)
    rows = read_rows(str(tmp_path / "pool.jsonl"))
    groups = []
    for hop in ("1-hop", "2-hop", "3-hop", "4-hop", "1-hop", "2-hop"):
        groups += ["near", "move", hop]
    assert [row.group for row in rows] == groups
    for near, move in zip(rows[::3], rows[1::3]):
        frames, _, _ = read_clip(near.prompt[0].source, key_frame_positions)
        (x0, y0, _), (x1, y1, wall) = ball(frames[1]), ball(frames[2])
        assert near.answer == wall
        way = f"{'right' if x1 > x0 else 'left'} {'up' if y1 < y0 else 'down'}"
        assert move.answer == f"moves {way}"
        for row in (near, move):
            assert [p.index for p in row.prompt if not isinstance(p, str)] == [2, 3]
            assert row.answer in row.options
            assert [p.index for p in row.response if not isinstance(p, str)] == [4]


def test_what_the_probed_model_learns(world):
    """Breaks if a question with its later frames in sight is not asked as curation asks it, or
    without them: what it reads would then be new to it.
    """
    folder = os.path.dirname(world["data"])
    rows = read_rows(os.path.join(folder, "curation_able.jsonl"))
    records = []
    for seed in range(3, 6):  # the second half of six clips
        records += paddle.candidates(seed, paddle.Config.bend, f"clips/{seed}.mp4")
    path = os.path.join(folder, "candidates.jsonl")
    paddle.write_rows(path, records)
    expected = []
    for row in read_rows(path):
        expected += [curate.with_future(row), curate.without_future(row)]

    def parts(row):
        texts = [part.split() if isinstance(part, str) else part for part in row.prompt]
        return texts, row.response, row.answer, row.options, row.group

    assert [parts(row) for row in rows] == [parts(row) for row in expected]
    assert len({row.id for row in rows}) == len(rows) == 18


def test_two_sets_of_one_size(tmp_path):
    """Breaks if the selected rows do not keep the pool's order, if the random ones are more, or the
    same for every seed.
    """
    pool = [dict(id=str(i)) for i in range(50)]
    paddle.write_rows(str(tmp_path / "pool.jsonl"), pool)
    paddle.write_rows(str(tmp_path / "selected.jsonl"), [pool[i] for i in (30, 4, 17)])
    drawn = []
    for seed in (0, 1):
        files = [str(tmp_path / f"{name}.jsonl") for name in ("pool", "selected")]
        paddle.same_number(*files, seed, str(tmp_path))
        chosen = paddle.read_jsonl(str(tmp_path / "chosen.jsonl"))
        assert [row["id"] for row in chosen] == ["4", "17", "30"]
        drawn.append(paddle.read_jsonl(str(tmp_path / "random.jsonl")))
        assert len({row["id"] for row in drawn[-1]}) == 3
    assert drawn[0] != drawn[1]
    assert drawn[0] == [pool[i] for i in np.random.default_rng(0).permutation(50)[:3]]


def test_the_files_of_a_world(world):
    """Breaks if RL or the pool's probe sees a chain, or other clips than those meant are
    annotated.
    """
    folder = os.path.dirname(world["data"])
    rows = {name: read_rows(os.path.join(folder, f"{name}.jsonl")) for name in FILES}
    assert {name: len(some) for name, some in rows.items()} == FILES
    assert not any(row.response for name in ("prompts", "captions") for row in rows[name])
    assert [row.answer for row in rows["prompts"]] == [row.answer for row in rows["all"]]
    for row in rows["all"]:
        assert any(isinstance(part, Frame) for part in row.response)


# six training clips, all annotated, and two held-out ones
FILES = dict(captions=102, train=24, places=24, all=24, prompts=24, test=8)
FILES.update(curation_pool=9, curation_able=18)


def test_a_world_of_other_settings_is_refused(tmp_path, capsys):
    """Breaks if clips of two worlds are mixed in one folder, if a world that was interrupted is
    taken for a whole one, or one that is there is made again.
    """
    sizes = dict(clips=2, annotated=1, eval_clips=1, eval_seed=50)
    config = paddle.Config(out=str(tmp_path / "data"), **sizes)
    paddle.make_world(config)  # as a killed command leaves it: without the picture
    (tmp_path / "data" / "test.jsonl").unlink()
    paddle.main(config)
    files = [tmp_path / "data" / name for name in ("test.jsonl", "clip.png", "clips/50.mp4")]
    assert all(path.stat().st_size > 1000 for path in files)
    times = [path.stat().st_mtime_ns for path in files]
    paddle.main(config)
    assert [path.stat().st_mtime_ns for path in files] == times
    other = paddle.Config(out=config.out, **dict(sizes, clips=3), bend=0.5)
    with pytest.raises(SystemExit, match="other values of clips, bend.*another --out"):
        paddle.main(other)
    assert json.loads((tmp_path / "data" / "world.json").read_text())["clips"] == 2
