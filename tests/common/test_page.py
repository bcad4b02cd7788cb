"""The pages: what is shown of a sample, what of several runs, and that nothing of it can run."""

import json
import re
import shutil
from pathlib import Path

import pytest
from scripted import SPAN, play, settings
from transformers import AutoTokenizer

import evaluate
from common import page, runs
from common.formats import Frame, Row
from common.pictures import Painter
from model import LATENT, LATENT_END, LATENT_START
from toy import tiny


def test_report_escapes_and_shows(scripted, tmp_path, monkeypatch):
    """Breaks if markup in a question, option, response or group runs, a picture is linked, or a
    span is not drawn.
    """
    folder, tokenizer = scripted
    evil = "<script>alert(1)</script>"
    path = str(folder / "0.mp4")
    rows = []
    for i in range(3):
        question, options = f"what q{i} ? {evil}", [f"one{evil}", "two"]
        prompt, future = [Frame(path, 1), question], [Frame(path, 4)]
        rows.append(Row(f"f:{i}", f"{i}{evil}", prompt, future, "A", question, options, evil))
    script = dict(q0=f"{SPAN} <reason> one </reason> {SPAN} <answer> A </answer>")
    script.update(q1="<answer> B </answer>", q2="<answer> one")
    play(monkeypatch, tokenizer, script)
    evaluate.evaluate(settings(folder, tmp_path, report=2), rows=rows)
    text = (tmp_path / "report.html").read_text()
    assert evil not in text
    assert "&lt;script&gt;" in text
    assert "<img" not in text
    assert "http" not in text
    assert text.count('<div class="span">') == 2
    assert "similarity of spans" in text
    assert "<h2>2 samples</h2>" in text
    assert text.count("background-image:url(data:image/jpeg;base64,") == 2 * 8
    assert 'class="right">right' in text
    assert "width=device-width" in text and "the paper" not in text
    lines = runs.read_lines(str(tmp_path / "samples.jsonl"))
    lines[0]["response"], lines[0]["imagined"] = (
        f"{evil}{LATENT_START}{LATENT}{LATENT_END}",
        dict(error=evil),
    )
    page.write_report(
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
    answer["response"] = f"{span}x{LATENT_START}{LATENT_END}{span}<answer>B</answer>"
    text = page._sample(0, row, answer, css)
    strips = []
    for part in text.split('<div class="span">')[1:]:
        strips.append(dict(re.findall(r"</i>(\d)<br>([\d.]+)", part)))
    nearest = {"8": "0.800", "7": "0.700", "6": "0.600", "5": "0.500", "4": "0.400"}
    assert list(strips[0].items()) == list(nearest.items()) and strips[1] == {}
    # means of .8 and .9, .7 and .8
    assert list(strips[2].items())[:2] == [("1", "0.850"), ("2", "0.750")]
    assert "<td>0.250</td>" in text
    assert ">wrong</b>" in text
    assert "span 2: 0 latents" in text
    assert len(css) == 8
    assert text.count('<figure class="future"><i class="p0_3">') == 1 + 2
    assert '<figure class="seen"><i class="p0_0">' in text


@pytest.fixture
def two_runs(world, tmp_path, monkeypatch):
    """Two evaluations of one world, of a model with a painter and without."""
    script = {"next": f"{SPAN} <answer> red </answer>", "third": "<answer> red </answer>"}
    script["second"] = f"{SPAN} <reason> hits red </reason> {SPAN} <answer> blue </answer>"
    play(monkeypatch, AutoTokenizer.from_pretrained(world["model"]), script)
    folders = []
    for name in ("painted", "plain"):
        if name == "painted":
            Painter(96).save(world["model"])
        out = str(tmp_path / name)
        config = evaluate.Config(
            **dict(tiny.settings("eval"), max_new_tokens=20),
            model=world["model"],
            data=world["test"],
            out=out,
        )
        evaluate.evaluate(config)
        folders.append(out)
        shutil.rmtree(f"{world['model']}/painter", ignore_errors=True)
    return folders


def test_a_sample_is_open_and_side_by_side(two_runs):
    """Breaks if a visitor has to open a sample to see a picture, a span's picture is missing, or
    a model without a painter shows an empty strip.
    """
    painted, plain = ((Path(folder) / "report.html").read_text() for folder in two_runs)
    assert painted.count("<details open>") == page.OPEN
    for text in (painted, plain):
        assert text.count('<p class="key">seen</p>') == text.count("what really came</p>") == 8
    lines = runs.read_lines(f"{two_runs[0]}/samples.jsonl")
    with_spans = [line for line in lines if line["imagined"]["painted"]]
    spans = sum(line["spans"] for line in lines)
    assert spans == 2 * (1 + 2 + 0 + 0) and painted.count("data:image/png;base64,") == spans
    assert painted.count('<p class="key">imagined</p>') == len(with_spans)
    assert "imagined</p>" not in plain and "image/png" not in plain
    for text in (painted, plain):
        assert "<th>skipped</th>" not in text and "skipped: 0" in text


def test_columns_that_say_nothing():
    """Breaks if a column that differs somewhere goes, or one that never does stays."""
    head = ["group", "accuracy", "strict", "official", "skipped", "unparsed"]
    rows = [["a", "0.5", "0.5", "0.5", 0, 1], ["b", "0.7", "0.7", "0.6", 0, 0]]
    head, rows, note = page.telling(head, rows)
    assert head == ["group", "accuracy", "official", "unparsed"]
    assert rows == [["a", "0.5", "0.5", 1], ["b", "0.7", "0.6", 0]]
    assert note == "skipped: 0; strict: as accuracy"


def test_several_runs_on_one_page(two_runs, tmp_path):
    """Breaks if a run's answers are missing, another's picture is shown, or a score is not its."""
    path = str(tmp_path / "compared.html")
    page.write_comparison(two_runs, path)
    text = Path(path).read_text()
    lines = runs.read_lines(f"{two_runs[0]}/samples.jsonl")
    assert text.count("data:image/png;base64,") == sum(line["spans"] for line in lines)
    assert "<h2>8 questions</h2>" in text and text.count("<details open>") == page.OPEN
    for folder in two_runs:
        assert text.count(f"· {folder}<p") == 8
    accuracy = json.loads((tmp_path / "plain" / "summary.json").read_text())["scores"]["all"]
    assert f"<td>{accuracy['accuracy']:.3f}</td>" in text
    assert "+0.000 (+0.000 to +0.000)" in text  # one model, the same answers
    assert "http" not in text and "<img" not in text and "<script" not in text
