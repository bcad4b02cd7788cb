"""Readers of the releases on made records with real mp4 and PNG bytes."""

import json
import types

import pytest
from scripted import futurebench, play, png, settings

import evaluate
from common import clips
from common.benchmarks import ASK_LETTER, MVBENCH, RELEASES, normal_form, read_benchmark
from common.clips import read_uniform
from common.formats import Clip, Frame, RecordError, read_record
from tests.conftest import frames
from toy import world as paddle

RECORDS = {  # name: (a record with the fields of the public release, what it should become)
    "Video-MME": (
        dict(
            video_id="001",
            duration="short",
            domain="Knowledge",
            sub_category="Art",
            url="u",
            videoID="fFj",
            question_id="001-1",
            task_type="Counting",
            question="How many?",
            options=["A. One.", "B. Two.", "C. Three.", "D. Four."],
            answer="C",
        ),
        dict(
            id="001-1",
            video="fFj.mp4",
            question="How many?",
            options=["One.", "Two.", "Three.", "Four."],
            answer="C",
            group="short",
        ),
    ),
    "EgoSchema": (
        dict(
            question_idx="7",
            question="Why?",
            video_idx="0aa-1",
            answer="4",
            option=["A. C eats", "B. C runs", "C. sits", "D. x", "E. y"],
        ),
        dict(
            id="7",
            video="0aa-1.mp4",
            question="Why?",
            options=["C eats", "C runs", "sits", "x", "y"],
            answer="E",
            group="all",
        ),
    ),
    "NExT-QA": (
        dict(
            video=401,
            frame_count=9,
            width=6,
            height=4,
            question="why",
            answer=1,
            qid=6,
            type="CW",
            a0="a",
            a1="it",
            a2="c",
            a3="d",
            a4="e",
            additional_ref_answer=None,
        ),
        dict(
            id="401-6",
            video="401.mp4",
            question="why",
            options=["a", "it", "c", "d", "e"],
            answer="B",
            group="CW",
        ),
    ),
    "MLVU": (
        dict(
            video="m_1.mp4",
            duration=480.0,
            question="Which?",
            candidates=["A. B", "Green", "Red"],
            answer="Red",
            question_type="plotQA",
        ),
        dict(
            id="f-3",
            video="f/m_1.mp4",
            question="Which?",
            options=["A. B", "Green", "Red"],
            answer="Red",
            group="plotQA",
        ),
    ),
    "SEED-Bench-R1": (
        dict(
            sample_id="s_2",
            task_goal="bake",
            choice_a="attach stopwatch",
            choice_b="place tray",
            choice_c="operate oven",
            choice_d="set stopwatch",
            golden_choice_idx="C",
            answer="operate oven",
            task_progress_metadata=[dict(narration_text="open oven", start_frame=0, stop_frame=28)],
            video_source="Ego4D",
            video_basename="s_2.mp4",
            current_observation_basename="s_2.png",
            question="What next?",
            task_level="L1",
        ),
        dict(
            id="s_2",
            video="videos/Ego4D/s_2.mp4",
            picture="images/Ego4D/s_2.png",
            question="What next?",
            options=["attach stopwatch", "place tray", "operate oven", "set stopwatch"],
            answer="C",
            group="L1",
        ),
    ),
    "MLVU_dev": (
        dict(
            video_name="AR_1.mp4",
            duration=1.0,
            question="Which?\n(A) red\n(B) blue 2\n(C) x.",
            answer="B",
            task_type="order",
        ),
        dict(
            id="f-3",
            video="AR_1.mp4",
            question="Which?\n(A) red\n(B) blue 2\n(C) x.",
            options=["red", "blue 2", "x."],
            answer="B",
            group="order",
        ),
    ),
    "MVBench": (
        dict(
            video="Z.mp4",
            question="What?",
            candidates=["x", "y", "z"],
            answer="y",
            start=1.0,
            end=2.0,
        ),
        dict(
            id="state_change-3",
            video="perception/videos/Z.mp4",
            question="What?",
            options=["x", "y", "z"],
            answer="y",
            group="state_change",
            start=1.0,
            end=2.0,
        ),
    ),
}


@pytest.mark.parametrize("name", RELEASES)
def test_readers(name):
    """Breaks if a release is taken for another, a field is misread, or an answer's number becomes
    the wrong letter.
    """
    record, wanted = RECORDS[name]
    got, reader = normal_form(record, "x", stem="state_change" if name == "MVBench" else "f", n=3)
    assert read_record(got, "x").options == wanted["options"]
    assert dict(got, options=wanted["options"]) == dict(dict(picture=""), **wanted)
    assert reader is RELEASES[name]
    assert (reader.average == "macro") == name.startswith("MLVU")


def test_readers_refuse():
    """Breaks if a record without an answer is scored, or a message does not say what is missing
    where.
    """
    record = RECORDS["EgoSchema"][0]
    with pytest.raises(RecordError, match="f:1: 'answer' should be 0..4, found None .*subset"):
        normal_form(dict(record, answer=None), "f:1")
    with pytest.raises(RecordError, match="f:1: key 'question' is missing"):
        normal_form({k: v for k, v in record.items() if k != "question"}, "f:1")
    with pytest.raises(ValueError, match="expected one of futurebench, twiffbench, mcq"):
        read_benchmark("imagenet", "x.json")
    with pytest.raises(RecordError, match="nobody/nothing: no such file.*pip install datasets"):
        with pytest.MonkeyPatch.context() as m:
            m.setitem(__import__("sys").modules, "datasets", None)
            read_benchmark("twiffbench", "nobody/nothing")


def test_a_folder_of_tasks(tmp_path):
    """Breaks if a task's file is left out, MLVU's average is not macro, or ids of two tasks
    collide.
    """
    for task, record in (
        ("1_plotQA", RECORDS["MLVU"][0]),
        ("2_needle", dict(RECORDS["MLVU"][0], question_type="needle")),
    ):
        (tmp_path / f"{task}.json").write_text(json.dumps([record, record]))
    rows, average = read_benchmark("mcq", str(tmp_path), "/videos")
    assert average == "macro"
    assert [r.id for r in rows] == ["1_plotQA-0", "1_plotQA-1", "2_needle-0", "2_needle-1"]
    assert rows[2].prompt[0] == Clip("/videos/2_needle/m_1.mp4") and rows[2].group == "needle"


def test_mlvu_as_released(world, tmp_path, capsys):
    """Breaks if MLVU's generation files are read, or one of its bad rows ends the run or is lost.

    Of 40 records one has no answer (outside the score), one an answer that is no option (wrong).
    """
    from tests.test_evaluate import config

    record = dict(RECORDS["MLVU"][0], candidates=["red", "blue"], answer="red")
    records = [dict(record) for _ in range(40)]
    records[3]["answer"], records[7]["answer"] = "", "a drone"
    (tmp_path / "1_plotQA.json").write_text(json.dumps(records))
    for name in ("8_sub_scene", "9_summary"):
        (tmp_path / f"{name}.json").write_text(json.dumps([dict(question="?", answer="long")]))
    with pytest.raises(RecordError, match="1_plotQA.json:3: the answer is empty"):
        read_benchmark("mcq", str(tmp_path))
    bad = []
    rows, average = read_benchmark("mcq", str(tmp_path), bad=bad)
    assert [s.where for s in bad] == [f"{tmp_path}/1_plotQA.json:3"] and average == "macro"
    assert len(rows) == 39 and "9_summary.json: MLVU's generation" in capsys.readouterr().out

    out = tmp_path / "out"
    evaluate.evaluate(config(world, out, benchmark="mcq", data=str(tmp_path)))
    summary, printed = json.load(open(out / "summary.json")), capsys.readouterr().out
    assert summary["no_option"] == ["1_plotQA-7"] and summary["total"] == 39
    assert summary["average"] == "macro"
    assert "the answer is empty" in summary["unusable"][0]["why"]
    assert "1_plotQA.json:3: the answer is empty" in printed and "'a drone' is none" in printed
    row = next(r for r in rows if r.id == "1_plotQA-7")
    line = evaluate.read_answer(row, "<answer>C</answer>")
    assert line["right"] is False and line["strict"] != line["gold"] is None
    records[9]["answer"] = records[10]["answer"] = ""
    (tmp_path / "1_plotQA.json").write_text(json.dumps(records))
    with pytest.raises(SystemExit, match="3 of 40 records cannot be used"):
        evaluate.evaluate(config(world, out, benchmark="mcq", data=str(tmp_path)))


def test_other_releases_with_candidates_are_refused(tmp_path):
    """Breaks if TVBench or LongVideoBench is read as MVBench, with clips from nowhere."""
    (tmp_path / "scene_shuffle.json").write_text(json.dumps([RECORDS["MVBench"][0]]))
    with pytest.raises(RecordError, match="'scene_shuffle' is none of MVBench's 20 tasks"):
        read_benchmark("mcq", str(tmp_path / "scene_shuffle.json"))


def test_a_picture_after_the_clip(tmp_path):
    """Breaks if SEED-Bench-R1's picture is not shown, or a clip where nothing was done yet is."""
    record = RECORDS["SEED-Bench-R1"][0]
    records = [record, dict(record, sample_id="s_3", task_progress_metadata=[])]
    (tmp_path / "L1.jsonl").write_text("\n".join(map(json.dumps, records)))
    rows, _ = read_benchmark("mcq", str(tmp_path / "L1.jsonl"), "/d")
    frame = Frame("/d/images/Ego4D/s_2.png")
    assert rows[0].prompt[:2] == [Clip("/d/videos/Ego4D/s_2.mp4"), frame]
    assert rows[1].prompt[0] == frame and len(rows[1].prompt) == 2 and rows[0].answer == "C"


def test_a_hub_id_with_a_config(monkeypatch):
    """Breaks if org/name:config is not that config of the dataset, or its name is lost as task."""
    split = types.SimpleNamespace(
        data=types.SimpleNamespace(to_pylist=lambda: [RECORDS["MVBench"][0]])
    )
    asked = []
    hub = types.SimpleNamespace(load_dataset=lambda *a: asked.append(a) or dict(test=split))
    monkeypatch.setitem(__import__("sys").modules, "datasets", hub)
    rows, _ = read_benchmark("mcq", "OpenGVLab/MVBench:state_change", "/videos")
    assert asked == [("OpenGVLab/MVBench", "state_change")] and rows[0].group == "state_change"
    assert rows[0].prompt[0] == Clip("/videos/perception/videos/Z.mp4", 1.0, 2.0)


def test_a_part_of_a_clip(tmp_path):
    """Breaks if a question about seconds 1 to 2 is shown other frames; 10 frames a second: numbers
    10 to 20.
    """
    path = str(tmp_path / "v.mp4")
    paddle.write_mp4(path, frames(40, 64, 96), fps=10)
    assert read_uniform(Clip(path, 1.0, 2.0), 3)[1] == [10, 15, 20]
    assert read_uniform(Clip(path), 4)[1] == [0, 13, 26, 39]
    assert read_uniform(Clip(path, 3.5, 99.0), 2)[1] == [35, 39]
    assert read_uniform(Clip(path, 99.0, 100.0), 4)[1] == [39]
    (tmp_path / "state_change.json").write_text(
        json.dumps([dict(RECORDS["MVBench"][0], video="v.mp4")])
    )
    rows, _ = read_benchmark("mcq", str(tmp_path / "state_change.json"), str(tmp_path))
    assert rows[0].prompt[0] == Clip(str(tmp_path / "perception/videos/v.mp4"), 1.0, 2.0)


@pytest.mark.parametrize("whole, cut, tasks", [row for row in MVBENCH if row[1]])
def test_clips_that_are_cut_already(tmp_path, whole, cut, tasks):
    """Breaks if a clip of MVBench's `video` revision is not found, or is cut once more; or if
    without it the whole clip is no longer cut.
    """
    task = tasks.split()[0]
    (tmp_path / f"{task}.json").write_text(json.dumps([RECORDS["MVBench"][0]]))
    (row,), _ = read_benchmark("mcq", str(tmp_path / f"{task}.json"), str(tmp_path))
    assert row.prompt[0] == Clip(str(tmp_path / whole / "Z.mp4"), 1.0, 2.0)
    (tmp_path / cut).mkdir(parents=True)
    paddle.write_mp4(str(tmp_path / cut / "Z.mp4"), frames(10, 64, 96), fps=10)
    (row,), _ = read_benchmark("mcq", str(tmp_path / f"{task}.json"), str(tmp_path))
    assert row.prompt[0] == Clip(str(tmp_path / cut / "Z.mp4"))
    assert read_uniform(row.prompt[0], 4)[1] == [0, 3, 6, 9]


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
    for root in ("V1/video_dataset", "V1/video_dataset/"):
        with pytest.raises(ValueError, match="video_dataset.*would see the answer.*first_part"):
            read_benchmark("futurebench", data, root)
    budgets = [evaluate.Config(benchmark=b).video_max_tokens for b in ("futurebench", "mcq")]
    assert budgets == [12288, 4096]
    assert evaluate.Config(benchmark="futurebench", video_max_tokens=9).video_max_tokens == 9


def test_video_mme_of_parquet(scripted, tmp_path, monkeypatch):
    """Breaks if Video-MME's parquet is not read or not micro: short 2 of 3, long 0 of 1 -> .5."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder, tokenizer = scripted
    play(
        monkeypatch,
        tokenizer,
        {
            "q0": "<answer> C </answer>",
            "q1": "<answer> it </answer>",
            "q2": "<answer> A </answer>",
            "q3": "<answer> A </answer>",
        },
    )
    base = dict(RECORDS["Video-MME"][0], options=["A. one", "B. two", "C. it", "D. is"])
    records = [
        dict(
            base,
            videoID=str(i % 3),
            question_id=f"{i}",
            question=f"what q{i} ?",
            duration="long" if i == 3 else "short",
        )
        for i in range(4)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "vm.parquet")
    data = str(folder / "vm.parquet")
    table = evaluate.evaluate(settings(folder, tmp_path / "vm", benchmark="mcq", data=data))
    assert table["all"]["accuracy"] == 0.5
    assert table["short"]["accuracy"] == pytest.approx(2 / 3)


def test_parquet_bytes_and_classes(tmp_path):
    """Breaks if TwiFF-Bench's own form (parquet, pictures as bytes) is not read, or a future enters
    the prompt.
    """
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    record = dict(
        video="v.mp4",
        question="what ?",
        answer="a <rimage> b <ans>c</ans>",
        question_images=[dict(bytes=png(0), path=None)],
        question_images_index=[1],
        reasoning_images=[dict(bytes=png(1), path=None)],
        reasoning_images_index=[4],
        meta_data=json.dumps({"class": "sport"}),
    )
    parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "t.parquet")
    (row,), _ = read_benchmark("twiffbench", str(tmp_path / "t.parquet"))
    assert row.prompt == [Frame(png(0)), "what ?"] and row.response == ["a", Frame(png(1)), "b"]
    assert row.group == "sport" and row.id == "t.parquet:0"
    assert [(label, role) for label, role, _ in clips.film(row)] == [
        ("picture 1", "seen"),
        ("picture 2", "future"),
    ]
