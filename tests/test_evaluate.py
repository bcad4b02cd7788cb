"""Scoring by hand, resume, ablations, and what happens to samples that cannot be scored."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import evaluate
from common import runs
from common.formats import answer_of, read_rows
from evaluate import summarise, wilson
from model import load
from rewards import pick
from toy import tiny

OPTIONS = ["red", "green wall", "blue", "yellow"]


@pytest.mark.parametrize(
    "answer, index",
    [
        ("red", 0),
        ("Red.", 0),
        (" GREEN  wall ", 1),
        ("B", 1),
        ("(c)", 2),
        ("d)", 3),
        ("D. yellow", 3),
        ("A: red", 0),
        ("b ", 1),
        ("E", None),
        ("", None),
        (None, None),
        ("A red thing", None),
        ("redd", None),
        ("no idea", None),
    ],
)
def test_pick(answer, index):
    """Breaks if a letter inside a word counts as an option, or an option's text is not recognised."""
    assert pick(answer, OPTIONS) == index


def test_answer_of():
    """Breaks if the last instead of the first answer counts, or an unclosed one is taken."""
    assert answer_of("<reason>x</reason><answer> B </answer><answer>C</answer>") == "B"
    assert (
        answer_of("<answer>B") is None
        and answer_of("B") is None
        and answer_of("<answer>a\nb</answer>") == "a\nb"
    )


def test_wilson_by_known_values():
    """Breaks if the interval is not Wilson's: 8 of 10 gives 0.490 - 0.943, 0 of 20 gives 0 - 0.161 (published)."""
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4) and wilson(0, 0) == (0.0, 1.0)


def test_summary_is_micro_averaged_by_hand():
    """Breaks if groups of unequal size weigh the same, or an unreadable sample counts as wrong."""
    one = dict(spans=1, latents=2, tokens=10)
    lines = [dict(one, group="a", right=True, picked=0)] * 3 + [
        dict(one, group="b", right=False, picked=None),
        dict(group="b", skipped="gone"),
    ]
    table = summarise(lines)
    assert list(table) == ["a", "b", "all"]
    assert (
        table["a"]["accuracy"] == 1
        and table["b"]["accuracy"] == 0
        and table["all"]["accuracy"] == 0.75
    )
    assert table["b"]["n"] == 1 and table["b"]["skipped"] == 1 and table["b"]["unparsed"] == 1
    assert table["all"]["tokens"] == 10


def config(world, out, **more):
    shared = {
        k: v
        for k, v in tiny.TINY.items()
        if k in ("image_max_tokens", "l_max", "max_length", "system")
    }
    return evaluate.Config(
        **{
            **shared,
            **dict(
                model=world["model"],
                data=world["test"],
                out=str(out),
                batch=3,
                max_new_tokens=12,
                workers=0,
            ),
            **more,
        }
    )


def lines_of(out):
    found = runs.read_lines(os.path.join(out, "samples_0.jsonl"))
    return {line.pop("id"): {k: v for k, v in line.items() if k != "seconds"} for line in found}


def test_a_killed_run_resumes_to_the_same_result(world, tmp_path, monkeypatch):
    """Breaks if a half-written line survives, a sample is done twice, or is lost."""
    whole = evaluate.evaluate(config(world, tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    samples = tmp_path / "b" / "samples_0.jsonl"
    text = samples.read_bytes().split(b"\n")
    samples.write_bytes(b"\n".join(text[:3]) + b"\n" + text[3][:20])
    assert evaluate.evaluate(config(world, tmp_path / "b")) == whole
    assert (
        lines_of(tmp_path / "a") == lines_of(tmp_path / "b") and len(lines_of(tmp_path / "a")) == 8
    )
    assert len(samples.read_text().splitlines()) == 8
    summary = json.load(open(tmp_path / "b" / "summary.json"))
    assert summary["found"] == summary["total"] == 8 and summary["scores"] == whole
    with pytest.raises(SystemExit, match="other settings of max_new_tokens: choose another --out"):
        evaluate.evaluate(config(world, tmp_path / "b", max_new_tokens=13))
    monkeypatch.setattr(evaluate, "load", None)  # all is done: no model is needed
    assert evaluate.evaluate(config(world, tmp_path / "b", report=0)) == whole


def test_two_processes_score_like_one(world, tmp_path):
    """Breaks if a sample is left out or done twice when ranks share the work, or the command line differs."""
    whole = evaluate.evaluate(config(world, tmp_path / "one"))
    flags = [
        f
        for k, v in vars(config(world, tmp_path / "two")).items()
        for f in ([f"--{'' if v else 'no-'}{k}"] if isinstance(v, bool) else [f"--{k}", str(v)])
    ]
    script = os.path.join(os.path.dirname(evaluate.__file__), "evaluate.py")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            script,
            *flags,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.load(open(tmp_path / "two" / "summary.json"))["scores"] == whole
    lines = [
        line["id"]
        for r in (0, 1)
        for line in runs.read_lines(str(tmp_path / "two" / f"samples_{r}.jsonl"))
    ]
    assert len(lines) == len(set(lines)) == 8 and evaluate.format_table(whole) in run.stdout


def test_a_missing_clip_is_named_and_not_scored(world, tmp_path, capsys):
    """Breaks if an unreadable clip aborts the run, counts as wrong, or disappears."""
    with open(world["test"]) as f:
        records = [json.loads(line) for line in f]
    records[2]["video"] = "clips/gone.mp4"
    path = os.path.join(os.path.dirname(world["test"]), "holes.jsonl")
    with open(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    table = evaluate.evaluate(config(world, tmp_path, data=path))
    assert table["all"]["n"] == 7 and table["all"]["skipped"] == 1
    assert "gone.mp4: no such file" in lines_of(tmp_path)[records[2]["id"]]["skipped"]
    assert f"skipped {path}:2" in capsys.readouterr().out


def test_rows_that_cannot_be_scored_are_refused(world, tmp_path):
    """Breaks if a gold answer outside the options, missing options or doubled ids go unnoticed."""
    rows = read_rows(world["test"])
    for change, message in (
        (dict(options=None), "no options"),
        (dict(answer="purple"), "is none of"),
    ):
        bad = [*rows[1:], type(rows[0])(**{**vars(rows[0]), **change})]
        with pytest.raises(ValueError, match=message):
            evaluate.evaluate(config(world, tmp_path), rows=bad)
    with pytest.raises(ValueError, match="not unique"):
        evaluate.evaluate(config(world, tmp_path), rows=[rows[0], rows[0]])
    with pytest.raises(ValueError, match="expected one of"):
        evaluate.evaluate(config(world, tmp_path, latents="dreams"))


def test_replacements(world):
    """Breaks if an ablation feeds something else than it says."""
    model, _ = load(world["model"])
    rows = [row for row in read_rows(world["test"]) if row.group in ("1-hop", "3-hop")]
    rows = sorted(rows, key=lambda r: r.group)[:3]  # two 1-hop, one 3-hop
    c, g = config(world, "unused"), torch.Generator().manual_seed(0)
    true = evaluate.replacement("true", model, rows, c, g)
    assert true.shape == (3, 3, 96) and torch.equal(
        true[0, 0], true[0, 2]
    )  # a short row repeats its last
    assert not torch.allclose(true[2, 0], true[2, 1])
    shuffled = evaluate.replacement("shuffled", model, rows, c, g)
    assert torch.equal(shuffled, true[[1, 2, 0]])
    noise = evaluate.replacement("noise", model, rows, c, g)
    assert (
        abs(noise.std() / true.std() - 1) < 0.5
        and evaluate.replacement("zero", model, rows, c, g).abs().sum() == 0
    )
    pause = evaluate.replacement("pause", model, rows, c, g)
    assert torch.equal(pause[1, 5], model.get_input_embeddings().weight[model.config.latent_id])
    assert evaluate.replacement("generated", model, rows, c, g) is None
