"""Tables over several runs, and charts: what is compared, what is drawn."""

import json

import numpy as np
import pytest
from scripted import FB, futurebench, play, settings

import evaluate
from common import report
from common.benchmarks import PAPER
from common.judge import stamp


def test_compare(scripted, tmp_path, monkeypatch):
    """Breaks if two runs side by side show a wrong score, interval or coverage."""
    folder, tokenizer = scripted
    play(monkeypatch, tokenizer, FB)
    evaluate.evaluate(settings(folder, tmp_path, benchmark="futurebench", data=futurebench(folder)))
    text = report.compare([str(tmp_path)])
    assert "| 0.500 (0.095 - 0.905) |" in text
    assert text.endswith("| 5/7 |")
    assert "| generated |" in text
    with pytest.raises(SystemExit, match="nowhere/summary.json: no such file"):
        report.compare(["nowhere"])
    for columns, published in PAPER.values():
        assert all(len(values) in (len(columns), len(columns) - 2) for values in published.values())


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
    other_gold = [dict(answers([1])[0], gold="C")]
    x = write_run(tmp_path / "x", answers([1, 0]))
    y = write_run(tmp_path / "y", answers([1], first=7))
    z = write_run(tmp_path / "z", other_gold)
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


def test_a_curve_is_the_mean_of_ten_steps(tmp_path):
    """Breaks if the thick line lags or leads, or a run of few steps has no line."""
    values = np.arange(12.0) ** 2
    by_hand = [sum(values[k : k + 10]) / 10 for k in range(3)]
    assert report.running_mean(values) == pytest.approx(by_hand)
    assert report.running_mean([3.0, 5.0]).tolist() == [3.0, 5.0]
    lines = [dict(step=k, ce=1.0 / (k + 1), latent=0.0, grad_norm=None) for k in range(12)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr("matplotlib.axes.Axes.plot", lambda ax, x, y, **k: drawn.append(x) or [_Line()])
        m.setattr("matplotlib.axes.Axes.legend", lambda ax, **k: None)
        report.draw_curves(str(tmp_path / "log.jsonl"), str(tmp_path / "loss.png"))
    assert drawn == [list(range(12)), [9, 10, 11]]  # ce alone: the others have no value


class _Line:
    def get_color(self):
        return "C0"
