"""Whole evaluations on a few records: exact scores, intervals, coverage."""

import json
import os

import numpy as np
import pytest
from scripted import FB, futurebench, line, play, settings

import evaluate
from common.formats import Clip, Row
from common.report import as_text, score_rows
from common.results import bootstrap, wilson
from evaluate import summarise

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
    assert micro["all"]["accuracy"] == 2 / 4
    assert macro["all"]["accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert micro["all"]["official"] == 3 / 4
    assert macro["all"]["official"] == pytest.approx((2 / 3 + 1) / 2)
    assert macro["all"]["strict"] == pytest.approx(1 / 3)
    assert macro["a"] == micro["a"]
    assert macro["b"] == micro["b"]
    assert micro["all"]["strict_unparsed"] == micro["all"]["unparsed"] == 1
    assert micro["all"]["official_unparsed"] == 0
    assert micro["all"]["n"] == 4 and micro["all"]["skipped"] == 1 and micro["b"]["spans"] == 3
    assert micro["a"]["interval"] == pytest.approx(wilson(2, 3), abs=1e-6)  # few clips


def test_an_interval_draws_clips_once():
    """Breaks if a score's interval counts two questions on one clip as two draws, or a macro
    average draws the clips of each group apart.
    """
    values, clips = [0, 1] * 50, [f"{i:02}" for i in range(100)]

    def lines(group):
        return [dict(line(group, "A", "BA"[v], "A"), clip=c) for v, c in zip(values, clips)]

    expected = bootstrap(values, clips)
    for average in ("micro", "macro"):
        table = summarise(lines("a") + lines("b"), average)
        assert [s["interval"] for s in table.values()] == [expected] * 3
    shifted = [dict(one, clip=one["clip"] + "x") for one in lines("b")]
    table = summarise(lines("a") + shifted)
    assert np.diff(table["all"]["interval"]) < 0.8 * np.diff(expected)


def test_the_protocols_budgets():
    """Breaks if a benchmark's pixels are not those that evaluate.py says are official's: 1,605,632
    a picture of TwiFF-Bench, 32 frames of 768 * 32 * 32 a clip of FutureBench.
    """
    twiff, future = (evaluate.Config(benchmark=b) for b in ("twiffbench", "futurebench"))
    assert twiff.budgets[0][1] == 1_605_632 and evaluate.Config().image_max_tokens == 256
    assert future.budgets[2][1] == 32 * 768 * 32 * 32 and future.num_frames == 32
    assert evaluate.Config(benchmark="twiffbench", image_max_tokens=9).image_max_tokens == 9
    assert (twiff.max_new_tokens, future.max_new_tokens) == (4096, 2048)


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


def test_futurebench_to_the_letter(scripted, tmp_path, monkeypatch, capsys):
    """Breaks if a split, a reading, the coverage or an entry of the result file is not what the
    seven records give.
    """
    folder, tokenizer = scripted
    asked = play(monkeypatch, tokenizer, FB)
    config = settings(folder, tmp_path, benchmark="futurebench", data=futurebench(folder))
    assert config.num_frames == 32
    table = evaluate.evaluate(config)
    names = ("n", "accuracy", "strict", "official", "unparsed", "skipped", "spans")
    assert {group: tuple(s[k] for k in names) for group, s in table.items()} == {
        "1-hop": (2, 0.5, 0.5, 0.5, 0, 0, 1.5),
        "2-hop": (1, 0, 0, 1, 1, 1, 0),
        "3-hop": (1, 0, 0, 0, 1, 0, 0),
        "interp": (1, 1, 1, 0, 0, 1, 0),
        "all": (5, 0.4, 0.4, 0.4, 2, 2, 0.6),
    }
    # a clip of 12 frames gives all of them, two a patch
    assert asked[0][0][0].count("<|vision_start|>") == 6
    summary = json.load(open(tmp_path / "summary.json"))
    assert summary["found"] == 5 and summary["total"] == 7
    assert {m["id"] for m in summary["missing"]} == {"x5", "x0#2"}
    assert "gone.mp4: no such file" in str(summary["missing"])
    assert "broken.mp4" in str(summary["missing"])
    settings_kept = dict(num_frames=32, max_new_tokens=40, latents="generated", average="micro")
    assert settings_kept.items() <= summary.items()
    assert "5 of 7 samples found" in capsys.readouterr().out
    assert "api_key" not in json.dumps(summary) and os.path.exists(tmp_path / "report.html")
