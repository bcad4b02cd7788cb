"""What one sees of a run: report.html, tables over several runs, charts."""

import json
import re

import numpy as np
import pytest
from scripted import FB, SPAN, futurebench, play, settings

import evaluate
from common import report
from common import run as runs
from common.formats import Frame, Row
from common.judge import stamp
from common.painter import Painter
from model import LATENT, LATENT_END, LATENT_START

# ------------------------------------------------------------------------------------- report.html

EVIL = "<script>alert('1')</script>"


def two_rows(folder):
    """Rows about one clip, markup in all their texts: two key frames seen, two to come."""
    path, rows = str(folder / "0.mp4"), []
    for i in range(2):
        prompt, options = [Frame(path, 1), Frame(path, 2), f"what q{i} ? {EVIL}"], ["one", "two"]
        response, group = [Frame(path, 4), Frame(path, 5)], f"{i}{EVIL}"
        rows.append(Row(f"f:{i}", group, prompt, response, "A", "not shown", options, EVIL))
    return rows


def evaluated(scripted, out, monkeypatch):
    """The two rows' evaluation, one answer with two spans and one with none -> its folder's page,
    summary and result lines.
    """
    folder, tokenizer = scripted
    script = dict(q0=f"{SPAN} <reason> one </reason> {SPAN} <answer> A </answer>")
    play(monkeypatch, tokenizer, script | dict(q1="<answer> B </answer>"))
    monkeypatch.setattr(Painter, "beside", lambda model: Painter(96))
    evaluate.evaluate(settings(folder, out), rows=two_rows(folder))
    summary = json.loads((out / "summary.json").read_text())
    return (out / "report.html").read_text(), summary, runs.read_lines(str(out / "samples.jsonl"))


def samples_of(page):
    """A page's samples as HTML, in order."""
    return page.split("<details")[1:-1]  # the last one holds the settings


def strip_of(sample, kind):
    """The data: URLs of a sample's pictures of a kind."""
    return re.findall(rf'<figure class="{kind}"><img src="([^"]*)"', sample)


def test_a_sample_shows_what_was_seen_imagined_and_came(scripted, tmp_path, monkeypatch):
    """Breaks if a picture is missing or in another strip, a span has no place in the response, a
    verdict is another's, or a visitor has to open a sample to see it.
    """
    page, _, lines = evaluated(scripted, tmp_path, monkeypatch)
    first, second = samples_of(page)
    assert page.count("<details open>") == 2 and "<h2>2 samples</h2>" in page
    for sample in (first, second):
        assert len(strip_of(sample, "seen")) == len(strip_of(sample, "came")) == 2
        urls = strip_of(sample, "seen") + strip_of(sample, "came")
        assert all(url.startswith("data:image/jpeg;base64,") for url in urls)
        assert len(set(urls)) == 4 and "scored among A) one, B) two" in sample
        assert "what q" in sample and "not shown" not in sample  # the prompt that the model saw
    painted = [f"data:image/png;base64,{data}" for data in lines[0]["imagined"]["painted"]]
    assert strip_of(first, "imagined") == painted and len(painted) == 2
    assert strip_of(second, "imagined") == [] and "imagined</p>" not in second
    order = ["span 1: 2 latents", "reason&gt; one", "span 2: 2 latents", "answer&gt; A"]
    at = [first.index(text) for text in order]
    assert at == sorted(at) and "span" not in second
    assert 'class="right">right' in first and 'class="wrong">wrong' in second
    assert "letters: strict A" in first and "letters: strict B" in second
    assert "width=device-width" in page


def test_nothing_of_the_page_can_run(scripted, tmp_path, monkeypatch):
    """Breaks if markup in a question, group, id, response or error runs, or the page loads
    anything from elsewhere.
    """
    page, summary, lines = evaluated(scripted, tmp_path, monkeypatch)
    rows = two_rows(scripted[0])
    lines[0]["response"] = f"{EVIL}{LATENT_START}{LATENT}{LATENT_END}"
    lines[0]["imagined"] = dict(error=EVIL)
    for text in (page, report.page(dict(summary, model=EVIL, latents=EVIL), lines, rows)):
        assert EVIL not in text and "<script" not in text and "&lt;script&gt;" in text
        assert "http" not in text and "<link" not in text and "@import" not in text
        assert all(url.startswith("data:image/") for url in re.findall(r'src="([^"]*)"', text))


def test_verdicts():
    """Breaks if an unparsed answer reads as wrong, or a judge's silence as a bad score."""
    right = dict(right=True, picked=0)
    assert report.verdict_of(right) == (True, "right")
    assert report.verdict_of(dict(right=False, picked=1)) == (False, "wrong")
    assert report.verdict_of(dict(right=False, picked=None)) == (False, "unparsed")
    judged = dict(chain=2, answer=4, average=3.0)
    assert report.verdict_of(dict(judged=judged)) == (True, "chain 2, answer 4")
    assert report.verdict_of(dict(judged=dict(judged, average=2.5)))[0] is False
    assert report.verdict_of(dict(why="timeout")) == (None, "not judged (timeout)")
    assert report.verdict_of({}) == (None, "not judged")


# ------------------------------------------------------------------------------------ several runs


def test_compare(scripted, tmp_path, monkeypatch):
    """Breaks if two runs side by side show a wrong score, interval or coverage."""
    folder, tokenizer = scripted
    play(monkeypatch, tokenizer, FB)
    evaluate.evaluate(settings(folder, tmp_path, benchmark="futurebench", data=futurebench(folder)))
    text = report.compare([str(tmp_path)])
    assert "| 0.500 (0.095 - 0.905) |" in text
    assert "| generated |" in text and text.endswith("| 5/7 |")
    with pytest.raises(FileNotFoundError, match="nowhere/summary.json"):
        report.compare(["nowhere"])


def write_run(folder, lines, groups=("a", "b"), average="micro"):
    """A folder as evaluate.py leaves it, of result lines alone -> its path."""
    folder.mkdir()
    (folder / "samples_0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scores = dict(accuracy=0.5, interval=(0.4, 0.6))
    summary = dict(scores={group: scores for group in (*groups, "all")}, latents="generated")
    summary.update(found=len(lines), total=len(lines), average=average)
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def answers(rights, group="a", first=0):
    """Result lines of a run, each question on a clip of its own."""
    lines = []
    for i, right in enumerate(rights, first):
        lines.append(dict(id=f"q{i}", clip=f"{i}.mp4", group=group, gold="A", right=bool(right)))
    return lines


def row_of(text, folder):
    """The cells of a run's last row."""
    row = [line for line in text.splitlines() if line.startswith(f"| {folder} |")][-1]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_runs_are_compared_question_by_question(tmp_path):
    """Breaks if runs are not paired by question, or a difference is marked that may be chance.

    Group a: always wrong against always right, +1. Group b: one of four won, one lost, 0. All:
    (8 * 1 + 0) / 12. A question that only one run could read is left out.
    """
    first = write_run(tmp_path / "x", answers([0] * 8) + answers([0, 1, 1, 0], "b", 8))
    lines = answers([1, 0, 1, 0], "b", 8)[::-1] + answers([1] * 8)
    gone = dict(id="q99", group="a", skipped="gone")
    better = write_run(tmp_path / "y", [*lines, *answers([1], first=50), gone])
    text = report.compare([first, better, first])
    a, b, every, n = row_of(text, better)
    assert (a, n) == ("+1.000 (+1.000 to +1.000) *", "12") and every.startswith("+0.667 (+0.")
    assert b.startswith("+0.000 (-0.") and not b.endswith("*") and every.endswith("*")
    assert row_of(text, first) == [*["+0.000 (+0.000 to +0.000)"] * 3, "12"]
    assert "Minus" not in report.compare([first])

    # a macro average weighs the groups alike: (1 + 0) / 2
    last = answers([1] * 8, "b", 8)
    macro = write_run(tmp_path / "m", answers([0] * 8) + last, average="macro")
    other = write_run(tmp_path / "n", answers([1] * 8) + last, average="macro")
    assert row_of(report.compare([macro, other]), other)[2] == "+0.500 (+0.500 to +0.500) *"


def test_runs_on_other_questions_are_refused(tmp_path):
    """Breaks if two runs that were asked different things are compared."""
    x = write_run(tmp_path / "x", answers([1, 0]))
    y = write_run(tmp_path / "y", answers([1], first=7))
    z = write_run(tmp_path / "z", [dict(answers([1])[0], gold="C")])
    with pytest.raises(SystemExit, match="x and .*y have no scored question in common"):
        report.compare([x, y])
    with pytest.raises(SystemExit, match="'q0' is not the same question, its gold is 'A' and 'C'"):
        report.compare([x, z])


def test_judged_runs_are_compared_by_their_average(tmp_path):
    """Breaks if a run of TwiFF-Bench is compared by something else, or unjudged rows count."""
    line = dict(id="q", clip="v", group="a", parsed=True, response="r")
    lines = [line, dict(line, id="late", clip="w")]
    folders = [write_run(tmp_path / name, lines, groups=("a",)) for name in "xy"]
    for folder, chain in zip(folders, (2, 4)):
        judged = dict(chain=chain, answer=3, average=(chain + 3) / 2)
        verdict = dict(id="q", response=stamp("r"), judged=judged, why=None)
        with open(f"{folder}/judged.jsonl", "w") as f:
            f.write(json.dumps(verdict) + "\n")
    cells = row_of(report.compare(folders), folders[1])
    assert cells == ["+1.000 (+1.000 to +1.000) *"] * 2 + ["1"]


# ------------------------------------------------------------------------------------------ charts


def test_a_curve_is_the_mean_of_ten_steps(tmp_path, monkeypatch):
    """Breaks if the thick line lags or leads, a run of few steps has no line, or a panel without a
    value is drawn.
    """
    values = np.arange(12.0) ** 2
    by_hand = [sum(values[k : k + 10]) / 10 for k in range(3)]
    assert report.running_mean(values) == pytest.approx(by_hand)
    assert report.running_mean([3.0, 5.0]).tolist() == [3.0, 5.0]
    lines = [dict(step=k, ce=1.0 / (k + 1), latent=0.0, grad_norm=None) for k in range(12)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    saved = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda fig, *a, **k: saved.append(fig.axes)
    )
    report.draw_curves(str(tmp_path / "log.jsonl"), str(tmp_path / "loss.png"))
    ((ax,),) = saved  # ce alone
    drawn = [list(line.get_xdata()) for line in ax.lines]
    assert drawn == [list(range(12)), [9, 10, 11]]
    assert list(ax.lines[0].get_ydata()) == [1.0 / (k + 1) for k in range(12)]


def test_a_selection_by_hand():
    """Breaks if a candidate is counted twice or under another key, or numbers are out of order."""
    frame = Frame("c.mp4", 5)
    rows = {k: Row("f", k, [], [frame] * n, "A", group="b") for k, n in dict(x=2, y=1).items()}
    rows["z"] = None  # a Skipped: neither a group nor frames are known
    fates = dict(x="chosen", y="missing", z="skipped")
    tables = report.tabulate_selection(rows, dict(x=10, y=2), fates)
    assert tables["category"] == {"?": dict(skipped=1), "b": dict(chosen=1, missing=1)}
    assert list(tables["future frames"]) == [1, 2, "?"]
    text = report.selection_text(tables, ("chosen", "skipped"))
    assert re.search(r"^gain +chosen +skipped\n2 +0 +0\n10 +1 +0\n\? +0 +1$", text, re.M)
