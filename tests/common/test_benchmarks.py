"""Readers of the releases, on records with the fields that are public."""

import json
import sys
import types

import pytest
from scripted import futurebench

import evaluate
from common.benchmarks import ASK_LETTER, MVBENCH, RELEASES, normal_form, read_benchmark
from common.formats import Clip, Frame, RecordError, read_record

# name: (a record with the fields of the public release; its id, video, answer, group; its options)
RECORDS = {
    "Video-MME": (
        """{"video_id": "001", "duration": "short", "videoID": "fFj", "question_id": "001-1",
        "answer": "C", "question": "How many?", "options": ["A. One.", "B. Two.", "C. Three."]}""",
        ("001-1", "fFj.mp4", "C", "short"),
        ["One.", "Two.", "Three."],
    ),
    "EgoSchema": (
        """{"question_idx": "7", "question": "Why?", "video_idx": "0aa-1", "answer": "4",
        "option": ["A. C eats", "B. C runs", "C. sits", "D. x", "E. y"]}""",
        ("7", "0aa-1.mp4", "E", "all"),
        ["C eats", "C runs", "sits", "x", "y"],
    ),
    "NExT-QA": (
        """{"video": 401, "frame_count": 9, "width": 6, "height": 4, "question": "why", "answer": 1,
        "qid": 6, "type": "CW", "a0": "a", "a1": "it", "a2": "c", "a3": "d", "a4": "e",
        "additional_ref_answer": null}""",
        ("401-6", "401.mp4", "B", "CW"),
        ["a", "it", "c", "d", "e"],
    ),
    "MLVU": (
        """{"video": "m_1.mp4", "duration": 480.0, "question": "Which?", "answer": "Red",
        "candidates": ["A. B", "Green", "Red"], "question_type": "plotQA"}""",
        ("f-3", "f/m_1.mp4", "Red", "plotQA"),
        ["A. B", "Green", "Red"],
    ),
    "SEED-Bench-R1": (
        """{"sample_id": "s_2", "task_goal": "bake", "choice_a": "attach", "choice_b": "place tray",
        "choice_c": "operate oven", "choice_d": "set", "golden_choice_idx": "C", "task_level": "L1",
        "answer": "operate oven", "video_source": "Ego4D", "video_basename": "s_2.mp4",
        "current_observation_basename": "s_2.png", "question": "What next?",
        "task_progress_metadata": [{"narration_text": "open", "start_frame": 0}]}""",
        ("s_2", "videos/Ego4D/s_2.mp4", "C", "L1"),
        ["attach", "place tray", "operate oven", "set"],
    ),
    "MLVU_dev": (
        """{"video_name": "AR_1.mp4", "duration": 1.0, "answer": "B", "task_type": "order",
        "question": "Which?\\n(A) red\\n(B) blue 2\\n(C) x."}""",
        ("f-3", "AR_1.mp4", "B", "order"),
        ["red", "blue 2", "x."],
    ),
    "MVBench": (
        """{"video": "Z.mp4", "question": "What?", "candidates": ["x", "y", "z"], "answer": "y",
        "start": 1.0, "end": 2.0}""",
        ("state_change-3", "perception/videos/Z.mp4", "y", "state_change"),
        ["x", "y", "z"],
    ),
}


def record(name, **more):
    return json.loads(RECORDS[name][0]) | more


def write(path, *records):
    path.write_text(json.dumps(records))
    return str(path)


@pytest.mark.parametrize("name", RELEASES)
def test_releases(name):
    """Breaks if a release is taken for another, a field is misread, or an answer's number becomes
    the wrong letter.
    """
    stem = "state_change" if name == "MVBench" else "f"
    got, release = normal_form(record(name), "x", stem=stem, n=3)
    assert read_record(got, "x").options == RECORDS[name][2]
    assert tuple(got[key] for key in ("id", "video", "answer", "group")) == RECORDS[name][1]
    assert got["question"] == record(name)["question"]
    assert release is RELEASES[name]
    assert (release.average == "macro") == name.startswith("MLVU")


def test_releases_refuse(tmp_path, monkeypatch):
    """Breaks if a record without an answer is scored, TVBench or LongVideoBench is read as MVBench,
    with clips from nowhere, or a message does not say what is missing where.
    """
    school = record("EgoSchema")
    with pytest.raises(RecordError, match="f:1: 'answer' should be 0..4, found None .*subset"):
        normal_form(dict(school, answer=None), "f:1")
    del school["question"]
    with pytest.raises(RecordError, match="f:1: key 'question' is missing"):
        normal_form(school, "f:1")
    with pytest.raises(RecordError, match="'scene_shuffle' is none of MVBench's 20 tasks"):
        read_benchmark("mcq", write(tmp_path / "scene_shuffle.json", record("MVBench")))
    with pytest.raises(ValueError, match="expected one of futurebench, twiffbench, mcq"):
        read_benchmark("imagenet", "x.json")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RecordError, match="nobody/nothing: no such file.*pip install datasets"):
        read_benchmark("twiffbench", "nobody/nothing")


def test_mlvu_as_released(world, tmp_path, capsys):
    """Breaks if MLVU's generation files are read, one of its bad rows ends the run or is lost, or
    the ids of two tasks collide.

    Of 40 records one has no answer (outside the score), one an answer that is no option (wrong).
    """
    from tests.test_evaluate import config

    records = [record("MLVU", candidates=["red", "blue"], answer="red") for _ in range(40)]
    records[3]["answer"], records[7]["answer"] = "", "a drone"
    path = tmp_path / "1_plotQA.json"
    write(path, *records)
    for name in ("8_sub_scene", "9_summary"):
        write(tmp_path / f"{name}.json", dict(question="?", answer="long"))
    with pytest.raises(RecordError, match="1_plotQA.json:3: the answer is empty"):
        read_benchmark("mcq", str(tmp_path))
    bad = []
    rows, average = read_benchmark("mcq", str(tmp_path), bad=bad)
    assert [s.where for s in bad] == [f"{path}:3"] and average == "macro" and len(rows) == 39
    assert "9_summary.json: MLVU's generation" in capsys.readouterr().out
    assert rows[0].id == "1_plotQA-0" and rows[0].group == "plotQA"
    assert rows[0].prompt[0] == Clip(str(tmp_path / "1_plotQA" / "m_1.mp4"))

    settings = config(world, tmp_path / "out", benchmark="mcq", data=str(tmp_path))
    evaluate.evaluate(settings)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["no_option"] == ["1_plotQA-7"] and summary["total"] == 39
    assert "the answer is empty" in summary["unusable"][0]["why"]
    row = next(r for r in rows if r.id == "1_plotQA-7")
    line = evaluate.read_answer(row, "<answer>C</answer>")
    assert line["right"] is False and line["strict"] != line["gold"] is None
    records[9]["answer"] = records[10]["answer"] = ""
    write(path, *records)
    with pytest.raises(SystemExit, match="3 of 40 records cannot be used"):
        evaluate.evaluate(settings)


def test_unknown_keys_of_own_rows(tmp_path, capsys):
    """Breaks if a misspelt key of one's own rows passes in silence, or a release's fields, most of
    which nothing needs, are complained about.
    """
    own = dict(id="1", video="v.mp4", question="?", options=["a", "b"], answer="a", strat=1)
    read_benchmark("mcq", write(tmp_path / "f.json", own, record("Video-MME")))
    assert "f.json: no format has these keys: strat (" in capsys.readouterr().out


def test_a_picture_after_the_clip(tmp_path):
    """Breaks if SEED-Bench-R1's picture is not shown, or a clip where nothing was done yet is."""
    name = "SEED-Bench-R1"
    records = record(name), record(name, sample_id="s_3", task_progress_metadata=[])
    rows, _ = read_benchmark("mcq", write(tmp_path / "L1.json", *records), "/d")
    frame = Frame("/d/images/Ego4D/s_2.png")
    assert rows[0].prompt[:2] == [Clip("/d/videos/Ego4D/s_2.mp4"), frame]
    assert rows[1].prompt[0] == frame and len(rows[1].prompt) == 2 and rows[0].answer == "C"


def test_a_hub_id_with_a_config(monkeypatch):
    """Breaks if org/name:config is not that config of the dataset, or its name is lost as task."""
    asked, data = [], types.SimpleNamespace(to_pylist=lambda: [record("MVBench")])
    split = types.SimpleNamespace(data=data)
    hub = types.SimpleNamespace(load_dataset=lambda *a: asked.append(a) or dict(test=split))
    monkeypatch.setitem(sys.modules, "datasets", hub)
    rows, _ = read_benchmark("mcq", "OpenGVLab/MVBench:state_change", "/videos")
    assert asked == [("OpenGVLab/MVBench", "state_change")] and rows[0].group == "state_change"
    assert rows[0].prompt[0] == Clip("/videos/perception/videos/Z.mp4", 1.0, 2.0)


@pytest.mark.parametrize("whole, cut, tasks", [row for row in MVBENCH if row[1]])
def test_clips_that_are_cut_already(tmp_path, whole, cut, tasks):
    """Breaks if a clip of MVBench's `video` revision is not found, or is cut once more; or if
    without it the whole clip is no longer cut.
    """
    data = write(tmp_path / f"{tasks.split()[0]}.json", record("MVBench"))
    (row,), _ = read_benchmark("mcq", data, str(tmp_path))
    assert row.prompt[0] == Clip(str(tmp_path / whole / "Z.mp4"), 1.0, 2.0)
    (tmp_path / cut).mkdir(parents=True)
    (tmp_path / cut / "Z.mp4").touch()
    (row,), _ = read_benchmark("mcq", data, str(tmp_path))
    assert row.prompt[0] == Clip(str(tmp_path / cut / "Z.mp4"))


def test_futurebench_is_asked_on_the_cut_clips(scripted):
    """Breaks if the model is shown the whole video, is not asked for a letter, or sees fewer
    pixels.
    """
    folder, _ = scripted
    data = futurebench(folder)
    rows, _ = read_benchmark("futurebench", data)
    assert rows[0].prompt[0] == Clip(str(folder / "first_part_video" / "0.mp4"))
    assert rows[0].prompt[-1] == ASK_LETTER and "letter" in ASK_LETTER
    assert "<answer>" in ASK_LETTER and ASK_LETTER not in rows[0].question
    rows, _ = read_benchmark("futurebench", data, "/clips")
    assert rows[0].prompt[0] == Clip("/clips/0.mp4")
    with pytest.raises(ValueError, match="video_dataset.*would see the answer.*first_part"):
        read_benchmark("futurebench", data, "V1/video_dataset/")
