"""Scoring by hand, resume, ablations, and what happens to samples that cannot be scored."""

import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch

import evaluate
from common import runs
from common.formats import answer_of, read_rows
from common.report import as_text, score_rows
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
    """Breaks if a letter in a word counts as an option, or an option's text is not recognised."""
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
    """Breaks if the interval is not Wilson's: 8 of 10 gives 0.490 - 0.943, 0 of 20 gives 0 - 0.161
    (published).
    """
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
        for k, v in tiny.settings("sft").items()
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
    found = runs.read_lines(os.path.join(out, "samples.jsonl"))
    return {line.pop("id"): {k: v for k, v in line.items() if k != "seconds"} for line in found}


def test_a_killed_run_resumes_to_the_same_result(world, tmp_path, monkeypatch):
    """Breaks if a half-written line survives, a sample is done twice, or is lost."""
    whole = evaluate.evaluate(config(world, tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    samples = tmp_path / "b" / "samples.jsonl"
    text = samples.read_bytes().split(b"\n")
    samples.write_bytes(b"\n".join(text[:3]) + b"\n" + text[3][:20])
    assert evaluate.evaluate(config(world, tmp_path / "b")) == whole
    assert (
        lines_of(tmp_path / "a") == lines_of(tmp_path / "b") and len(lines_of(tmp_path / "a")) == 8
    )
    assert len(samples.read_text().splitlines()) == 8
    summary = json.load(open(tmp_path / "b" / "summary.json"))
    assert summary["found"] == summary["total"] == 8 and summary["scores"] == whole
    with pytest.raises(SystemExit, match="other values of max_new_tokens: choose another --out"):
        evaluate.evaluate(config(world, tmp_path / "b", max_new_tokens=13))
    monkeypatch.setattr(runs.Machine, "load", None)  # all is done: no model is needed
    assert evaluate.evaluate(config(world, tmp_path / "b", report=0)) == whole


@pytest.mark.slow  # processes of their own
def test_two_processes_score_like_one(world, tmp_path):
    """Breaks if a sample is left out or done twice when ranks share the work, or the command line
    differs.
    """
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
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert one == two and len(one) == 8 and as_text(*score_rows(whole)) in run.stdout


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
        with pytest.raises((ValueError, SystemExit), match=message):
            evaluate.evaluate(config(world, tmp_path), rows=bad)
    with pytest.raises(ValueError, match="not unique"):
        evaluate.evaluate(config(world, tmp_path), rows=[rows[0], rows[0]])
    with pytest.raises(ValueError, match="expected one of"):
        evaluate.evaluate(config(world, tmp_path, latents="dreams"))


def test_replacements(world, tmp_path):
    """Breaks if an ablation feeds something else than it says, or what depends on other rows."""
    model, _ = load(world["model"])
    rows = [row for row in read_rows(world["test"]) if row.group in ("1-hop", "3-hop")]
    rows = sorted(rows, key=lambda r: r.group)  # 1-hop of two clips, then 3-hop
    c = config(world, tmp_path)

    def fed(kind, some=rows, **more):
        ablation = evaluate.Ablation(config(world, tmp_path, latents=kind), model, **more)
        return [torch.cat(evaluate.replacement(row, ablation)) for row in some]

    true = fed("true")
    assert [len(v) for v in true] == [len(evaluate.future_frames(row)) for row in rows]
    assert not torch.allclose(true[-1][0], true[-1][1])
    assert torch.equal(fed("true", rows[:1])[0], true[0])

    # shuffled: the next row about another clip, whatever shares the batch
    donor_of = evaluate.donors(rows)
    for row, vectors in zip(rows, fed("shuffled", donor_of=donor_of)):
        donor = donor_of[row.id]
        assert evaluate.clip_of(donor) != evaluate.clip_of(row)
        assert torch.equal(vectors, true[rows.index(donor)])
    assert donor_of[rows[0].id] is rows[1] and donor_of[rows[-1].id] is rows[0]

    # noise: one scale a run, one draw a row
    scale = evaluate.measure_noise(model, rows, c)
    every = torch.cat(true)
    assert torch.allclose(scale[0], every.mean(0), atol=1e-6)
    assert torch.allclose(scale[1], every.std(0, unbiased=False), atol=1e-6)
    assert torch.equal(evaluate.measure_noise(model, rows[:1], c), scale)  # kept in the folder
    noise = fed("noise", scale=scale)
    assert torch.equal(fed("noise", rows[1:2], scale=scale)[0], noise[1])
    z = (torch.stack(noise) - scale[0]) / scale[1].clamp(min=1e-9)
    assert abs(z.std() - 1) < 0.1 and not torch.equal(noise[0], noise[1])

    assert all(v.abs().sum() == 0 for v in fed("zero"))
    pause = model.get_input_embeddings().weight[model.config.latent_id]
    assert all(torch.equal(v, pause[None]) for v in fed("pause"))
    assert evaluate.feed_for(rows, evaluate.Ablation(c, model)) == (evaluate.own_latent, {})


def test_vectors_are_addressed_by_span_and_place():
    """Breaks if span m, place j is not fed frame min(m, M - 1)'s vector min(j, n_m - 1)."""
    one = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
    two = [torch.tensor([[5.0], [6.0], [7.0]])]
    feed = evaluate.feed_of([one, two])
    cases = {(0, 0, 0): 1, (0, 0, 1): 2, (0, 0, 9): 2, (0, 1, 0): 3, (0, 1, 4): 3, (0, 7, 1): 3}
    cases |= {(1, -1, 0): 5, (1, 0, 2): 7, (1, 0, 3): 7, (1, 5, 1): 6}
    row, span, count = torch.tensor(list(cases)).T
    h = torch.zeros(len(row), 1, dtype=torch.bfloat16)
    state = types.SimpleNamespace(row=row, span=span, count=count, h=h)
    vectors = feed(None, state)
    assert vectors.dtype == h.dtype and vectors[:, 0].tolist() == list(cases.values())


def test_what_has_no_future_says_so_at_once(world, tmp_path, monkeypatch):
    """Breaks if the model is loaded first, or a last batch of one row ends a run of shuffled."""
    rows = read_rows(world["test"])
    monkeypatch.setattr(runs.Machine, "load", None)
    bare = [type(row)(**{**vars(row), "response": ["a thought"]}) for row in rows]
    for latents in ("true", "shuffled", "noise"):
        with pytest.raises(ValueError, match=f"--latents {latents} needs the true future frames"):
            evaluate.evaluate(config(world, tmp_path, latents=latents), rows=bare)
    alone = [row for row in rows if evaluate.clip_of(row) == evaluate.clip_of(rows[0])]
    with pytest.raises(ValueError, match="at least two clips"):
        evaluate.evaluate(config(world, tmp_path, latents="shuffled"), rows=alone)


@pytest.mark.parametrize("latents", ["true", "shuffled", "noise"])
def test_ablations_do_not_depend_on_the_batch(world, tmp_path, latents):
    """Breaks if an answer depends on which rows share its batch; batches of 1, 7 and 8 rows."""
    results = []
    for batch in (1, 7, 8):
        c = config(world, tmp_path / f"{batch}", latents=latents, batch=batch, max_latents=2)
        evaluate.evaluate(c)
        results.append(lines_of(tmp_path / f"{batch}"))
        for line in results[-1].values():
            line.pop("imagined")  # cosines: equal up to rounding
    assert results[0] == results[1] == results[2] and len(results[0]) == 8


def test_a_donor_that_cannot_be_read(world, tmp_path):
    """Breaks if an unreadable future ends the run, or its row is scored with something else."""
    rows = read_rows(world["test"])
    broken = rows[0].response[1]._replace(source=str(tmp_path / "gone.mp4"))
    response = [broken if not isinstance(part, str) else part for part in rows[0].response]
    rows[0] = type(rows[0])(**{**vars(rows[0]), "response": response})
    table = evaluate.evaluate(config(world, tmp_path, latents="true"), rows=rows)
    line = lines_of(tmp_path)[rows[0].id]
    assert "gone.mp4: no such file" in line["skipped"] and "future frames" in line["skipped"]
    assert table["all"]["n"] == 7 and table["all"]["skipped"] == 1
