"""Benchmarks on a few records with real mp4 and PNG bytes: exact scores, readers, judge, report,
command line.
"""

import dataclasses
import functools
import http.server
import io
import json
import math
import os
import re
import shutil
import threading
import time
import types

import numpy as np
import pytest
import torch

import evaluate
import latent_decode
import sample
from common import clips, judge, report, runs
from common.benchmarks import ASK_LETTER, CLIPS, PAPER, READERS, normal_form, read_benchmark
from common.clips import read_uniform
from common.formats import Clip, Frame, RecordError, Row
from common.judge import Judge, ScoreJudge, read_scores, score_messages
from common.pictures import imagined
from common.report import as_text, score_rows
from common.summary import about
from evaluate import bootstrap, official_letter, strict_letter, summarise
from latent_decode import Rollout
from model import LATENT, LATENT_END, LATENT_START
from tests.conftest import frames
from toy import tiny
from toy import world as paddle

OPTIONS = ["red", "green wall", "blue", "Answer"]
SPAN = f"{LATENT_START} {LATENT} {LATENT} {LATENT_END}"


# ------------------------------------------------------------------------------------------ letters


@pytest.mark.parametrize(
    "answer, official, strict",
    [
        ("B", "B", "B"),
        ("b", "", "B"),
        ("(c)", "", "C"),
        ("B. green wall", "B", "B"),
        ("green wall", "", "B"),
        ("Answer: C", "A", "C"),
        ("The answer is C.", "C", "C"),
        ("Because of d", "B", "D"),
        ("BLUE", "B", "C"),
        ("A red wall", "A", ""),
        ("a", "", "A"),
        ("A", "A", "A"),
        ("B or C", "B", ""),
        ("B, that is B", "B", "B"),
        ("it's a trap", "", ""),
        ("CD", "C", ""),
        ("E", "", ""),
        ("", "", ""),
        ("none", "", ""),
        ("answer", "", "D"),
        ("\n D \n", "D", "D"),
        ("option_b", "", ""),
        ("A is the correct option", "A", "A"),
        ("A because it hits red", "A", "A"),
        ("It hits a wall, so (c)", "", "C"),
        ("a green wall, so b", "", "B"),
        ("a green wall", "", ""),
        ("B. A green wall", "B", "B"),
        ("C. is wrong, the answer is D", "C", ""),
        ("B) green wall", "B", "B"),
        ("C) green wall", "C", "C"),
    ],
)
def test_letters(answer, official, strict):
    """Breaks if official is not the first of [ABCD] anywhere, or strict reads a letter out of a
    word or an article.
    """
    text = f"<reason>A B C</reason>{SPAN}<answer>{answer}</answer><answer>D</answer>"
    assert (official_letter(text), strict_letter(text, OPTIONS)) == (official, strict)


def test_an_options_text_holds_no_letter():
    """Breaks if the C of EgoSchema's texts ("C eats") is taken for the answer's letter."""
    options = ["C eats", "C runs", "a dog sits", "x", "y"]
    for answer, letter in (("The answer is A. C eats", "A"), ("b: C runs", "B"), ("C eats", "A")):
        assert strict_letter(f"<answer>{answer}</answer>", options) == letter
    assert strict_letter("<answer>A dog sits there</answer>", options) == ""
    assert strict_letter("<answer>E</answer>", options) == "E"


def test_official_is_futurebenchs(scripted, tmp_path, monkeypatch):
    """Breaks if a benchmark with a fifth option shows a column that only knows A to D."""
    folder, tokenizer = scripted
    play(monkeypatch, tokenizer, {"q0": "<answer> D </answer>"})
    path = str(folder / "0.mp4")
    rows = [Row("f:0", "0", [Clip(path), "what q0 ?"], [], "D", "what q0 ?", list("stuvw"))]
    table = evaluate.evaluate(settings(folder, tmp_path), rows=rows)
    assert table["all"]["strict"] == 1 and "official" not in table["all"]
    assert "official" not in as_text(*score_rows(table))
    assert "official" not in (tmp_path / "report.html").read_text()
    assert "official" in as_text(*score_rows(summarise(LINES)))


def test_letters_need_a_closed_answer():
    """Breaks if a letter outside the first closed <answer> counts."""
    for text in ("B", "<answer>B", "B</answer>", ""):
        assert official_letter(text) == strict_letter(text, OPTIONS) == ""


# ----------------------------------------------------------------------------------------- averages


def line(group, gold, strict, official, **more):
    picked = "ABCD".find(strict) if strict else None
    return dict(
        group=group,
        right=gold == strict,
        picked=picked,
        gold=gold,
        strict=strict,
        official=official,
        **{**dict(spans=1, latents=2, tokens=10), **more},
    )


LINES = [
    line("a", "A", "A", "A"),
    line("a", "B", "B", "A"),
    line("a", "C", "", "C"),
    line("b", "D", "A", "D", spans=3),
    dict(group="b", skipped="gone"),
]  # strict: a 2 of 3, b 0 of 1; official: a 2 of 3, b 1 of 1


def test_micro_and_macro_by_hand():
    """Breaks if macro weighs samples, micro weighs groups, or a reading is scored by another's
    letter.
    """
    micro, macro = summarise(LINES), summarise(LINES, "macro")
    assert micro["all"]["accuracy"] == 2 / 4 and macro["all"]["accuracy"] == pytest.approx(
        (2 / 3 + 0) / 2
    )
    assert micro["all"]["official"] == 3 / 4 and macro["all"]["official"] == pytest.approx(
        (2 / 3 + 1) / 2
    )
    assert (
        macro["all"]["strict"] == pytest.approx(1 / 3)
        and macro["a"] == micro["a"]
        and macro["b"] == micro["b"]
    )
    assert (
        micro["all"]["strict_unparsed"] == micro["all"]["unparsed"] == 1
        and micro["all"]["official_unparsed"] == 0
    )
    assert micro["all"]["n"] == 4 and micro["all"]["skipped"] == 1 and micro["b"]["spans"] == 3
    assert (macro["all"]["low"], macro["all"]["high"]) == tuple(macro["all"]["bootstrap"])


def test_bootstrap():
    """Breaks if the draws are not seeded, or the interval is not that of the mean of the groups'
    means.
    """
    values = [0, 1] * 50
    low, high = bootstrap([values])
    few = np.arange(50) ** 2
    assert bootstrap([few]) == bootstrap([few]) != bootstrap([few], seed=1)
    assert (low, high) == pytest.approx(
        (0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.02
    )  # sqrt(.25 / 100) = .05
    assert bootstrap([[1, 1, 1], [0, 0]]) == [0.5, 0.5] and bootstrap([[2.5]]) == [2.5, 2.5]
    low, high = bootstrap([values, [1] * 7])  # half of the spread, around .75
    assert (low, high) == pytest.approx((0.75 - 0.049, 0.75 + 0.049), abs=0.012) and bootstrap(
        [[]], top=5
    ) == [0, 5]


def test_the_bootstrap_draws_clips():
    """Breaks if two questions on one clip count as two draws: their interval must not be narrower.

    100 clips with two equal values each: the spread is that of 100 values, not of 200.
    """
    values, clips = [0, 1] * 50, [str(i) for i in range(100)]
    once = bootstrap([values], [clips])
    assert bootstrap([values * 2], [clips * 2]) == once == bootstrap([values])
    assert np.diff(bootstrap([values * 2])) < 0.8 * np.diff(once)
    lines = [dict(line("a", "A", "AB"[v], "A"), clip=c) for v, c in zip(values * 2, clips * 2)]
    assert np.diff(summarise(lines)["all"]["bootstrap"]) == pytest.approx(np.diff(once))
    rows = [[Clip("/v.mp4"), "?"], [Frame("/p.png", 3), "?"], [Frame(b"png"), "?"]]
    shown = [evaluate.clip_of(Row("f:0", "id", prompt, [], "A")) for prompt in rows]
    assert shown == ["/v.mp4", "/p.png", "id"]


# ------------------------------------------------------------------------------------------ readers

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


@pytest.mark.parametrize("name", READERS)
def test_readers(name):
    """Breaks if a release is taken for another, a field is misread, or an answer's number becomes
    the wrong letter.
    """
    record, wanted = RECORDS[name]
    got, reader = normal_form(record, "x", stem="state_change" if name == "MVBench" else "f", n=3)
    assert (
        got == wanted
        and reader is READERS[name]
        and (reader.average == "macro") == name.startswith("MLVU")
    )


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
    assert average == "macro" and [r.id for r in rows] == [
        "1_plotQA-0",
        "1_plotQA-1",
        "2_needle-0",
        "2_needle-1",
    ]
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
    assert read_uniform(Clip(path, 1.0, 2.0), 3)[1] == [10, 15, 20] and read_uniform(Clip(path), 4)[
        1
    ] == [0, 13, 26, 39]
    assert read_uniform(Clip(path, 3.5, 99.0), 2)[1] == [35, 39] and read_uniform(
        Clip(path, 99.0, 100.0), 4
    )[1] == [39]
    (tmp_path / "state_change.json").write_text(
        json.dumps([dict(RECORDS["MVBench"][0], video="v.mp4")])
    )
    rows, _ = read_benchmark("mcq", str(tmp_path / "state_change.json"), str(tmp_path))
    assert rows[0].prompt[0] == Clip(str(tmp_path / "perception/videos/v.mp4"), 1.0, 2.0)


# -------------------------------------------------------------------------------- whole evaluations


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A folder with clips, a model that takes words and an answer for each word q0, q1 ... in a
    question.
    """
    folder = tmp_path_factory.mktemp("bench")
    words = "system user assistant A B C D ) what next ? one two it is seconds"
    words += " <answer> </answer> <reason> </reason>"
    tokenizer = tiny.make_tokenizer([words, " ".join(f"q{i}" for i in range(9))])
    tiny.make_model(tokenizer, seed=0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for i in range(3):
        paddle.write_mp4(str(folder / f"{i}.mp4"), frames(12, 64, 64, seed=i), fps=10)
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder, tokenizer


def play(monkeypatch, tokenizer, script, seen=None):
    """Let generate answer from the script: {"q0": response, ...}; latents are ones."""

    def generate(model, batch, **kwargs):
        texts = []
        for ids in batch["input_ids"]:
            words = tokenizer.decode(ids).split()
            texts.append(script[next(w for w in words if w in script)])
            if seen is not None:
                seen.append(words)
        tokens = [
            torch.tensor(tokenizer(t + "<|im_end|>", add_special_tokens=False).input_ids)
            for t in texts
        ]
        lengths = torch.tensor([len(t) for t in tokens])
        padded = torch.nn.utils.rnn.pad_sequence(tokens, True, tokenizer.pad_token_id)
        latents = [torch.ones(int((t == model.config.latent_id).sum()), 96) for t in tokens]
        return Rollout(padded, padded > 0, latents, padded * 0.0, ["eos"] * len(tokens), lengths)

    monkeypatch.setattr(evaluate, "generate", generate)


def settings(folder, out, **more):
    return evaluate.Config(
        **{
            **dict(
                model=str(folder / "model"),
                out=str(out),
                workers=0,
                batch=2,
                image_max_tokens=4,
                video_max_tokens=64,
                max_length=4000,
                system="system",
                max_new_tokens=40,
            ),
            **more,
        }
    )


def futurebench(folder):
    """Seven questions: hop1 right, hop1 wrong, hop2 right only officially, hop3 unparsed, hop5
    right, two bad clips.
    """
    kinds = [
        ("hop1", "0.mp4"),
        ("hop1", "1.mp4"),
        ("hop2", "2.mp4"),
        ("hop3", "0.mp4"),
        ("hop5", "1.mp4"),
        ("hop5", "gone.mp4"),
        ("hop2", "broken.mp4"),
    ]
    records = [
        dict(
            id=f"x{i % 6}",
            question_type=kind,
            video_path=f"any/video_dataset/{clip}",
            qa=dict(
                Question=f"what next ? q{i}",
                Options=dict(A="one", B="two", C="it", D="is"),
                Answer="B",
            ),
        )
        for i, (kind, clip) in enumerate(kinds)
    ]
    (folder / CLIPS).mkdir(exist_ok=True)
    for clip in ("0.mp4", "1.mp4", "2.mp4", "broken.mp4"):
        shutil.copy(folder / clip, folder / CLIPS / clip)
    (folder / "futurebench.json").write_text(json.dumps(records))
    return str(folder / "futurebench.json")


FB = {
    "q0": f"<reason> one </reason> {SPAN} <answer> B </answer>",
    "q1": f"{SPAN} {SPAN} <answer> C </answer>",
    "q2": "<answer> it is B A </answer>",
    "q3": "<reason> B </reason>",
    "q4": "<answer> two </answer>",
}


def test_futurebench_to_the_letter(scripted, tmp_path, monkeypatch, capsys):
    """Breaks if a split, a reading, the coverage or an entry of the result file is not what the
    seven records give.
    """
    (folder, tokenizer), seen = scripted, []
    play(monkeypatch, tokenizer, FB, seen)
    config = settings(folder, tmp_path, benchmark="futurebench", data=futurebench(folder))
    assert (
        config.num_frames == 32 and evaluate.Config(benchmark="futurebench").max_new_tokens == 2048
    )
    table = evaluate.evaluate(config)
    got = {
        g: tuple(
            s[k] for k in ("n", "accuracy", "strict", "official", "unparsed", "skipped", "spans")
        )
        for g, s in table.items()
    }
    assert got == {
        "1-hop": (2, 0.5, 0.5, 0.5, 0, 0, 1.5),
        "2-hop": (1, 0, 0, 1, 1, 1, 0),
        "3-hop": (1, 0, 0, 0, 1, 0, 0),
        "interp": (1, 1, 1, 0, 0, 1, 0),
        "all": (5, 0.4, 0.4, 0.4, 2, 2, 0.6),
    }
    assert (
        seen[0].count("<|vision_start|>") == 6
    )  # a clip of 12 frames gives all of them, two a patch
    summary = json.load(open(tmp_path / "summary.json"))
    assert (summary["found"], summary["total"], summary["unparsed"], summary["judge_failures"]) == (
        5,
        7,
        2,
        0,
    )
    assert summary["coverage"] == 5 / 7 and {m["id"] for m in summary["missing"]} == {"x5", "x0#2"}
    assert "gone.mp4: no such file" in str(summary["missing"]) and "broken.mp4" in str(
        summary["missing"]
    )
    assert (
        summary["frames"] == 32
        and summary["pixels"]["future"] == [1024, 4096]
        and len(summary["prompt_hash"]) == 16
    )
    assert summary["generation"] == dict(greedy=True, max_new_tokens=40, max_latents=8)
    assert (
        set(summary["seconds"]) == set(table)
        and summary["average"] == "micro"
        and summary["latents"] == "generated"
    )
    out = capsys.readouterr().out
    assert "5 of 7 samples found" in out and "beside what the paper published (not run here)" in out
    assert "ours: 32 frames a video at most, 131,072 pixels a video" in out
    rows = [line.split("  ") for line in out.splitlines()]
    ours, theirs = (
        next([c.strip() for c in row if c.strip()] for row in rows if row[0].startswith(name))
        for name in ("ours", "paper's: Future-L1-RL")
    )
    assert ours[:7] == [
        "ours, 5 of 7 found",
        "50.0",
        "100.0",
        "0.0",
        "0.0",
        "40.0",
        "7.6",
    ]  # by official letters
    assert theirs == [
        "paper's: Future-L1-RL",
        "83.2",
        "86.5",
        "86.6",
        "85.1",
        "85.4",
        "195.3",
        "0.91",
    ]
    assert "api_key" not in json.dumps(summary) and os.path.exists(tmp_path / "report.html")


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


def test_the_prompt_hash_is_of_the_prompts(scripted, tmp_path, monkeypatch):
    """Breaks if two runs that ask other words, or have another system message, look alike."""
    folder, tokenizer = scripted
    data, hashes = futurebench(folder), []
    rows, _ = read_benchmark("futurebench", data)
    for system, some in (("system", rows), ("system", rows), ("user", rows), ("system", rows[:6])):
        config = dataclasses.replace(settings(folder, tmp_path), system=system)
        hashes.append(about(some, [], config, [])["prompt_hash"])
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


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


def test_noise_repeats_after_a_kill(world, tmp_path, monkeypatch):
    """Breaks if what is drawn for a sample depends on what was done: here 4 of 8 lines are lost."""
    from tests.test_evaluate import config, lines_of

    drawn, draw = [], evaluate.draw_noise

    def listen(row, *args):
        drawn.append((row.id, draw(row, *args)))
        return drawn[-1][1]

    monkeypatch.setattr(evaluate, "draw_noise", listen)
    whole = evaluate.evaluate(config(world, tmp_path, latents="noise", limit=8))
    before, path, first = lines_of(tmp_path), tmp_path / "samples.jsonl", dict(drawn)
    kept = path.read_bytes().split(b"\n")[:4]
    path.write_bytes(b"\n".join(kept) + b'\n{"id": "half')
    drawn.clear()
    assert evaluate.evaluate(config(world, tmp_path, latents="noise", limit=8)) == whole
    assert lines_of(tmp_path) == before and len(path.read_text().splitlines()) == 8
    assert len(first) == 8 and 4 <= len(drawn) < 8  # whole blocks of three
    assert all(torch.equal(first[id], noise) for id, noise in drawn)


def test_none_opens_no_span(world, tmp_path, monkeypatch):
    """Breaks if --latents none lets a span be opened, or another ablation does not."""
    from tests.test_evaluate import config

    asked, generate = [], latent_decode.generate
    monkeypatch.setattr(
        evaluate,
        "generate",
        lambda model, batch, **k: (
            asked.append([model.config.latent_start_id] == k["banned"])
            or generate(model, batch, **k)
        ),
    )
    for latents in ("none", "zero"):
        evaluate.evaluate(config(world, tmp_path / latents, latents=latents, limit=1))
    assert asked == [True, False]


def test_banned_tokens(model, tokenizer):
    """Breaks if --latents none can still open a span: the greedy word is banned and must not come
    back.
    """
    batch = dict(input_ids=torch.tensor([tokenizer("watch the ball").input_ids]))
    first = latent_decode.generate(model, batch, max_new_tokens=12, eos_token_id=[])
    words = [
        t
        for t in first.tokens[0].tolist()
        if t not in (model.config.latent_id, model.config.latent_end_id)
    ]
    second = latent_decode.generate(
        model, batch, max_new_tokens=12, eos_token_id=[], banned=[words[0]]
    )
    assert words[0] in first.tokens and words[0] not in second.tokens


# -------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize(
    "reply, chain, answer",
    [
        ('{"chain": 4, "answer": 5}', 4, 5),
        ('```json\n{"chain": 3.5, "answer": 2}\n```', 3.5, 2),
        ('{"chain": "4", "answer": "3/5"}', 4, 3),
        ('{"chain": [[2]], "answer": [1]}', 2, 1),
        ("[[4, 5]]", 4, 5),
        ("[1, 0]", 1, 0),
        ('{"chain": 9, "answer": -3}', 5, 0),
        ('{"answer_score": 2, "Chain quality": 1}', 1, 2),
        ('<think>{"chain": 0, "answer": 0}</think> Fine: {"chain": 1, "answer": 2}', 1, 2),
        ('[{"chain": {"score": 3}, "answer": 4}]', 3, 4),
        ('{"scores": {"chain": 3, "answer": 4}}', 3, 4),
        ('{"chain": 4, {"chain": 2, "answer": 2}', 2, 2),
        ('{"chain": 1e400, "answer": 1}', None, None),
        ('{"chain": NaN, "answer": 1}', None, None),
        ('{"chain": true, "answer": 1}', None, None),
        ('{"chain": 4}', None, None),
        ('{"chain": [1, 2], "answer": 3}', None, None),
        ('{"chain": 4, "answer": 3}, see frames [1, 2]', 4, 3),
        ("four and five", None, None),
        ("", None, None),
        (None, None, None),
        ("[" * 3000, None, None),
        ('{"chain": "4 or 5", "answer": 1}', None, None),
    ],
)
def test_read_scores(reply, chain, answer):
    """Breaks if a shape judges reply in is lost, an ambiguous one is guessed, or a score leaves
    0..5.
    """
    assert read_scores(reply) == (None if chain is None else dict(chain=chain, answer=answer))


@pytest.fixture
def server():
    """A chat server on this machine: replies[word in the request] is a text, a status, or a wait in
    seconds.
    """
    state = dict(replies={}, requests=[], headers={})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            state["requests"].append(json.loads(body))
            reply = next(r for word, r in state["replies"].items() if word in body)
            if isinstance(reply, list):  # one after another, the last one stays
                reply = reply.pop(0) if len(reply) > 1 else reply[0]
            if isinstance(reply, float):
                time.sleep(reply)
            status = reply if isinstance(reply, int) else 200
            message = dict(
                index=0, finish_reason="stop", message=dict(role="assistant", content=str(reply))
            )
            data = json.dumps(
                dict(id="1", object="chat.completion", created=0, model="m", choices=[message])
            ).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                for name, value in state["headers"].items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except (BrokenPipeError, ConnectionResetError):  # the client gave up waiting
                pass

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield dict(state, url=f"http://127.0.0.1:{httpd.server_port}/v1")
    httpd.shutdown()
    httpd.server_close()


def test_a_failed_request_is_the_clients_to_repeat(server, monkeypatch):
    """Breaks if our loop multiplies the client's retries, or Retry-After is not heeded."""
    waits = []
    monkeypatch.setattr("common.judge.time.sleep", waits.append)
    server["replies"].update(q=503)
    asker = Judge(server["url"], "m", retries=2, timeout=5.0)
    assert asker([("q", "g", "a")]) == [None] and len(server["requests"]) == 3
    assert asker.client.max_retries == 2 and asker.failures == {"InternalServerError 503": 1}
    server["replies"].update(q=[429, "yes"])
    server["headers"]["Retry-After"] = "7"
    assert asker([("q", "g", "a")]) == [True] and waits[-1] == 7


def test_arguments_of_the_request(server, tmp_path):
    """Breaks if a judge that takes no temperature cannot be asked, or is answered from another's
    cache.
    """
    server["replies"].update(truth='{"chain": 1, "answer": 2}')
    row = Row("f:0", "0", ["what ?"], [], "truth", "what ?")
    cases = (None, dict(temperature=1, seed=3), dict(temperature=None))
    for args in cases:
        asker = ScoreJudge(server["url"], "m", cache=str(tmp_path / "cache.jsonl"), args=args)
        assert asker([(row, "x")]) == [(dict(chain=1, answer=2), None)]
    asked = [{k: r[k] for k in r if k not in ("model", "messages")} for r in server["requests"]]
    assert asked == [dict(temperature=0), dict(temperature=1, seed=3), {}]


def png(seed):
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frames(1, 40, 64, seed)[0]).save(out, "PNG")
    return out.getvalue()


def twiff(folder):
    """Seven rows of TwiFF-Bench, as paths of PNG files; q5's question picture is missing."""
    for i in range(2):
        (folder / f"{i}.png").write_bytes(png(i))
    records = [
        dict(
            video="v.mp4",
            question=f"<image> what next ? q{i}",
            question_images_index=[3],
            reasoning_images_index=[5],
            question_images=["gone.png" if i == 5 else "0.png"],
            reasoning_images=["1.png"],
            answer=f"THOUGHT 1: ref{i} <rimage> so <ans>truth{i}</ans>",
            meta_data={"class": "sport" if i < 3 else "home"},
        )
        for i in range(7)
    ]
    (folder / "twiff.jsonl").write_text("\n".join(map(json.dumps, records)))
    return str(folder / "twiff.jsonl")


def test_twiffbench_judged_later(scripted, tmp_path, monkeypatch, server, capsys):
    """Breaks if a failing, stalling or mumbling judge loses a row or scores it, or a second run
    asks again.

    By hand: sport (4, 5), (3.5, 2), fails; home: (5, 0) clamped, stalls, gone, (2, 1) at the second
    attempt. chain: (4 + 3.5 + 5 + 2) / 4, answer: (5 + 2 + 0 + 1) / 4.
    """
    folder, tokenizer = scripted
    play(
        monkeypatch,
        tokenizer,
        {f"q{i}": f"<reason> one </reason> {SPAN} <answer> two q{i} </answer>" for i in range(7)},
    )
    config = settings(folder, tmp_path, benchmark="twiffbench", data=twiff(folder))
    ask = judge.Config(model="m", url=server["url"], retries=1, timeout=1.0)
    monkeypatch.setattr(judge, "ScoreJudge", functools.partial(ScoreJudge, backoff=0.01))
    monkeypatch.setenv("JUDGE_API_KEY", "secret-key")
    table = evaluate.evaluate(config)
    out = capsys.readouterr().out
    assert f"6 responses wait for a judge: python -m common.judge {tmp_path} --model NAME" in out
    assert not server["requests"] and [
        table["all"][k] for k in ("waiting", "n", "skipped", "unparsed")
    ] == [6, 0, 1, 0]
    for wrong, run, message in (
        (judge.Config(), tmp_path, "--model is missing"),
        (ask, tmp_path / "x", "settings.json: no such file"),
    ):
        with pytest.raises(SystemExit, match=message):
            judge.score_run(str(run), wrong)
    server["replies"].update(
        truth0='{"chain": 4, "answer": 5}',
        truth1='{"chain": 3.5, "answer": "2"}',
        truth2=500,
        truth3="[[9, -1]]",
        truth4=2.5,
        truth6=["well", 'x ```{"chain": [2], "answer": 1}```'],
    )
    judge.score_run(str(tmp_path), ask)
    table = evaluate.evaluate(config)
    got = {
        g: tuple(s[k] for k in ("n", "chain", "answer", "average", "failed", "skipped", "waiting"))
        for g, s in table.items()
    }
    assert got == {
        "home": (2, 3.5, 0.5, 2.0, 1, 1, 0),
        "sport": (2, 3.75, 3.5, 3.625, 1, 0, 0),
        "all": (4, 14.5 / 4, 2.0, 22.5 / 8, 2, 1, 0),
    }
    asked = server["requests"]
    assert (
        len(asked) == 3 + 2 + 2 + 2
    )  # three at once, twice each: the failing, the stalling, the mumbling
    kinds = [part["type"] for part in asked[0]["messages"][1]["content"]]
    assert kinds.count("image_url") == 2 and "truth5" not in json.dumps(asked)
    summary = json.load(open(tmp_path / "summary.json"))
    assert summary["judge_failures"] == 2 and summary["found"] == 6 and summary["total"] == 7
    judged = {j["id"][-1]: j for j in runs.read_lines(str(tmp_path / "judged.jsonl"))}
    assert (
        judged["2"]["why"] == "InternalServerError 500"
        and judged["4"]["why"] == "APITimeoutError"
        and len(judged) == 6
    )
    out = capsys.readouterr().out
    assert "judge: 1 x APITimeoutError" in out and re.search(
        r"ours, 6 of 7 found +3.62 +2.00 +2.81\n", out
    )

    server["requests"].clear()
    server["replies"].update(truth2='{"chain": 1, "answer": 1}', truth4='{"chain": 1, "answer": 1}')
    judge.score_run(str(tmp_path), ask)
    table = evaluate.evaluate(config)
    assert (
        len(server["requests"]) == 2 and table["all"]["n"] == 6 and table["all"]["failed"] == 0
    )  # the rest is cached
    for file in os.listdir(tmp_path):
        assert b"secret-key" not in (tmp_path / file).read_bytes()
    lines = [dict(id=j["id"], response="another response") for j in judged.values()]
    judge.add_verdicts(str(tmp_path), lines)  # what was said of another response does not count
    assert not any("judged" in line or "why" in line for line in lines)
    written = json.load(open(tmp_path / "settings.json"))
    json.dump(dict(written, benchmark="mcq"), open(tmp_path / "settings.json", "w"))
    with pytest.raises(SystemExit, match="only --benchmark twiffbench is judged"):
        judge.score_run(str(tmp_path), ask)


def test_the_judge_sees_what_it_should(tmp_path):
    """Breaks if the judge misses a part, sees a future as a shown frame, or a text-only judge is
    sent pictures.
    """
    row = Row(
        "f:0",
        "0",
        [Frame(png(0)), "what next ?"],
        ["one", Frame(png(1)), "two"],
        "true",
        "what next ?",
    )
    span = f"{LATENT_START}{LATENT}{LATENT_END}"
    response = f"<reason>guess</reason>{span}<reason>so</reason><answer>mine</answer><|im_end|>"
    _, user = score_messages(row, response, images=False)
    order = [
        "## Question",
        "[a frame]",
        "what next ?",
        "## Reference chain",
        "one",
        "[a frame]",
        "two",
        "## True answer",
        "true",
        "## Candidate's chain",
        "guess",
        "[imagines]",
        "so",
        "## Candidate's answer",
        "mine",
    ]
    at = -1
    for part in order:
        at = user["content"].index(part, at + 1)
    assert "<" not in user["content"]
    _, user = score_messages(row, "no answer here")
    assert [p["type"] for p in user["content"]].count("image_url") == 2 and user["content"][-1][
        "text"
    ] == "(none given)"


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


# ------------------------------------------------------------------------------------------- report


def test_imagined_by_hand(model, clip, data_config):
    """Breaks if a cosine is not that of a latent and a frame: a latent that *is* frame 5's
    embedding is nearest to it.
    """
    path = clip(count=600, height=32, width=32)
    row = Row("f", "1", [Frame(path, 3), "?"], [Frame(path, 5)], "x")
    pictures = clips.pixels_of([Frame(path, 5)])
    patches, grid = clips.resize_and_cut(pictures[Frame(path, 5)][None], *data_config.budgets[1])
    e = model.encode_frames(clips.normalise(patches), grid[None])  # one token
    latents = torch.cat([3 * e, -e, e])
    got = imagined(model, row, latents, [1, 0, 2], data_config.budgets[1])
    assert got["frames"] == list("12345678") and got["spans"] == [1, 0, 2]
    assert [line[4] for line in got["cosine"]] == [1, -1, 1] and np.argmax(got["cosine"][0]) == 4
    other = model.encode_frames(
        *(
            f(x)
            for f, x in zip(
                (clips.normalise, lambda g: g[None]),
                clips.resize_and_cut(pictures[Frame(path, 8)][None], *data_config.budgets[1]),
            )
        )
    )
    dot = float(e[0] @ other[0]) / math.sqrt(float(e[0] @ e[0]) * float(other[0] @ other[0]))
    assert got["cosine"][0][7] == pytest.approx(dot, abs=1e-3)
    got = imagined(model, row, torch.cat([3 * e, other, e]), [1, 0, 2], data_config.budgets[1])
    a, b = e[0].numpy(), (other + e)[0].numpy() / 2  # the means of the two spans
    assert got["similarity"][0][0] == got["similarity"][1][1] == 1
    assert got["similarity"][0][1] == pytest.approx(
        a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-3
    )


def test_report_escapes_and_shows(scripted, tmp_path, monkeypatch):
    """Breaks if markup in a question, option, response or group runs, a picture is linked, or a
    span is not drawn.
    """
    folder, tokenizer = scripted
    evil = "<script>alert(1)</script>"
    path = str(folder / "0.mp4")
    rows = [
        Row(
            f"f:{i}",
            f"{i}{evil}",
            [Frame(path, 1), f"what q{i} ? {evil}"],
            [Frame(path, 4)],
            "A",
            f"what q{i} ? {evil}",
            [f"one{evil}", "two"],
            f"{evil}",
        )
        for i in range(3)
    ]
    play(
        monkeypatch,
        tokenizer,
        {
            "q0": f"{SPAN} <reason> one </reason> {SPAN} <answer> A </answer>",
            "q1": "<answer> B </answer>",
            "q2": "<answer> one",
        },
    )
    evaluate.evaluate(settings(folder, tmp_path, report=2), rows=rows)
    page = (tmp_path / "report.html").read_text()
    assert (
        evil not in page and "&lt;script&gt;" in page and "<img" not in page and "http" not in page
    )
    assert (
        page.count('<div class="span">') == 2
        and "similarity of spans" in page
        and "<h2>2 samples</h2>" in page
    )
    assert (
        page.count("background-image:url(data:image/jpeg;base64,") == 2 * 8
        and 'class="right">right' in page
    )
    assert "width=device-width" in page and "the paper" not in page
    lines = runs.read_lines(str(tmp_path / "samples.jsonl"))
    lines[0]["response"], lines[0]["imagined"] = (
        f"{evil}{LATENT_START}{LATENT}{LATENT_END}",
        dict(error=evil),
    )
    report.write_report(
        str(tmp_path / "r.html"), json.load(open(tmp_path / "summary.json")), lines, rows
    )
    assert evil not in (tmp_path / "r.html").read_text()


def test_a_span_is_drawn_as_its_nearest_frames(scripted):
    """Breaks if a span takes another's latents, or its strip is not the mean cosine from the
    nearest on, by hand.
    """
    folder, _ = scripted
    path = str(folder / "0.mp4")
    row = Row("f:0", "0", [Frame(path, 1), "?"], [Frame(path, 4)], "A", "?", ["one", "two"])
    up = [i / 10 for i in range(1, 9)]  # the cosines with frames 1..8
    info = dict(
        spans=[1, 0, 2],
        frames=list("12345678"),
        cosine=[up, up[::-1], [v + 0.1 for v in up[::-1]]],
        similarity=[[1, 0.25], [0.25, 1]],
        diversity=0,
    )
    span = f"{LATENT_START}{LATENT}{LATENT_END}"
    answer = dict(
        evaluate.read_answer(row, "<answer>B</answer>"), imagined=info, id="0", group="all"
    )
    css = []
    page = report._sample(
        0,
        row,
        dict(answer, response=f"{span}x{LATENT_START}{LATENT_END}{span}<answer>B</answer>"),
        css,
    )
    strips = [
        re.findall(r"</i>(\d)<br>([\d.]+)", part) for part in page.split('<div class="span">')[1:]
    ]
    assert strips[0] == [
        ("8", "0.800"),
        ("7", "0.700"),
        ("6", "0.600"),
        ("5", "0.500"),
        ("4", "0.400"),
    ]
    assert strips[1] == [] and strips[2][:2] == [
        ("1", "0.850"),
        ("2", "0.750"),
    ]  # means of .8 and .9, .7 and .8
    assert (
        "<td>0.250</td>" in page
        and ">wrong</b>" in page
        and "span 2: 0 latents" in page
        and len(css) == 8
    )
    assert (
        page.count('<figure class="future"><i class="p0_3">') == 1 + 2
        and '<figure class="seen"><i class="p0_0">' in page
    )


def test_compare(scripted, tmp_path, monkeypatch):
    """Breaks if two runs side by side show a wrong score, interval or coverage."""
    folder, tokenizer = scripted
    play(monkeypatch, tokenizer, FB)
    evaluate.evaluate(settings(folder, tmp_path, benchmark="futurebench", data=futurebench(folder)))
    text = report.compare([str(tmp_path)])
    assert (
        "| 0.500 (0.000 - 1.000) |" in text and text.endswith("| 5/7 |") and "| generated |" in text
    )
    with pytest.raises(SystemExit, match="nowhere/summary.json: no such file"):
        report.compare(["nowhere"])
    for columns, published in PAPER.values():
        assert all(len(values) in (len(columns), len(columns) - 2) for values in published.values())


# ------------------------------------------------------------------------------------- command line


def test_streamer(tokenizer, model):
    """Breaks if words are lost or doubled between pieces, or a span has no marker and length."""
    text = f"watch the {SPAN} ball which {LATENT_START} {LATENT_END} wall<|im_end|> hits"
    ids, out = tokenizer(text, add_special_tokens=False).input_ids, []
    feed = sample.streamer(tokenizer, model.config, out.append)
    for i in range(0, len(ids), 3):
        feed(torch.tensor([ids[i : i + 3]]))
    assert "".join(out) == "watch the\n[span 1: 2 latents]\nball which\n[span 2: 0 latents]\nwall"


def test_command_line(world, tmp_path, clip):
    """Breaks if the command does not end with an answer or why there is none, or a bad clip gives
    anything but a message.
    """
    shared = {
        k: v
        for k, v in tiny.TINY.items()
        if k in ("image_max_tokens", "l_max", "max_length", "system")
    }

    def run(**more):
        out = []
        asked = dict(
            model=world["model"],
            video=clip(),
            key_frames="3,4",
            question="which wall ?",
            max_new_tokens=20,
        )
        sample.main(sample.Config(**{**shared, **asked, **more}), out.append)
        return "".join(out)

    assert run().splitlines()[-1].startswith(("answer: ", "no answer: the response ended by "))
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "empty.mp4").write_bytes(b"")
    for change, message in (
        (dict(video="gone.mp4"), "gone.mp4: no such file"),
        (dict(question=""), "--question is missing"),
        (dict(video=str(tmp_path / "text.mp4")), "text.mp4: cannot be read as a video"),
        (dict(video=str(tmp_path / "empty.mp4")), "empty.mp4: cannot be read as a video"),
        (dict(key_frames="0,9"), "numbers from 1 to 8"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(**change)


def test_flags_with_hyphens():
    """Breaks if --max-new-tokens is refused, or a value with hyphens is changed."""
    flags = ["--max-new-tokens", "9", "--no-cuda-graph", "--data", "a-b/c-d", "--out=x-y"]
    config = runs.parse_config(evaluate.Config, flags)
    assert config.max_new_tokens == 9 and not config.cuda_graph
    assert (config.data, config.out) == ("a-b/c-d", "x-y")
    args = '{"a-b": "--no-x"}'
    assert runs.parse_config(judge.Config, ["--no-images", "--args", args]).args == args
