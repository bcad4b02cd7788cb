"""The report and the tables beside it: what is drawn, what is compared."""

import json
import re

import pytest
from scripted import FB, SPAN, futurebench, play, settings

import evaluate
from common import report, runs
from common.benchmarks import PAPER
from common.formats import Frame, Row
from model import LATENT, LATENT_END, LATENT_START


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
    assert evil not in page
    assert "&lt;script&gt;" in page
    assert "<img" not in page
    assert "http" not in page
    assert page.count('<div class="span">') == 2
    assert "similarity of spans" in page
    assert "<h2>2 samples</h2>" in page
    assert page.count("background-image:url(data:image/jpeg;base64,") == 2 * 8
    assert 'class="right">right' in page
    assert "width=device-width" in page and "the paper" not in page
    lines = runs.read_lines(str(tmp_path / "samples_0.jsonl"))
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
    assert "<td>0.250</td>" in page
    assert ">wrong</b>" in page
    assert "span 2: 0 latents" in page
    assert len(css) == 8
    assert page.count('<figure class="future"><i class="p0_3">') == 1 + 2
    assert '<figure class="seen"><i class="p0_0">' in page


def test_compare(scripted, tmp_path, monkeypatch):
    """Breaks if two runs side by side show a wrong score, interval or coverage."""
    folder, tokenizer = scripted
    play(monkeypatch, tokenizer, FB)
    evaluate.evaluate(settings(folder, tmp_path, benchmark="futurebench", data=futurebench(folder)))
    text = report.compare([str(tmp_path)])
    assert "| 0.500 (0.000 - 1.000) |" in text
    assert text.endswith("| 5/7 |")
    assert "| generated |" in text
    with pytest.raises(SystemExit, match="nowhere/summary.json: no such file"):
        report.compare(["nowhere"])
    for columns, published in PAPER.values():
        assert all(len(values) in (len(columns), len(columns) - 2) for values in published.values())
