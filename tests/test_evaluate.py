"""Scores by hand, resume, ablations, and what happens to samples that cannot be scored."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch

import evaluate
import latent_decode
from common import machine
from common import run as runs
from common.formats import Clip, Frame, Row, read_rows
from common.report import as_text, score_rows
from evaluate import clip_of, summarise
from model import load
from toy import tiny

ROOT = os.path.dirname(evaluate.__file__)


def test_summary_is_micro_averaged_by_hand():
    """Breaks if groups of unequal size weigh the same, or an unreadable sample counts as wrong."""
    one = dict(spans=1, latents=2, tokens=10)
    right, wrong = dict(one, right=True, picked=0), dict(one, right=False, picked=None)
    lines = [dict(right, group="a")] * 3 + [dict(wrong, group="b"), dict(group="b", skipped="gone")]
    table = summarise(lines)
    assert {group: s["accuracy"] for group, s in table.items()} == dict(a=1, b=0, all=0.75)
    assert [table["b"][key] for key in ("n", "skipped", "unparsed")] == [1, 1, 1]
    assert list(table) == ["a", "b", "all"] and table["all"]["tokens"] == 10


def config(world, out, **more):
    names = ("image_max_tokens", "l_max", "max_length", "system")
    shared = {name: tiny.settings("sft")[name] for name in names}
    own = dict(model=world["model"], data=world["test"], out=str(out), workers=0)
    return evaluate.Config(**{**shared, **own, "batch": 3, "max_new_tokens": 12, **more})


def lines_of(out):
    found = runs.read_lines(os.path.join(out, "samples.jsonl"))
    return {line.pop("id"): {k: v for k, v in line.items() if k != "seconds"} for line in found}


def test_a_killed_run_resumes_to_the_same_result(world, tmp_path, monkeypatch):
    """Breaks if a half-written line survives, a sample is done twice, or is lost; or if what the
    caller has loaded is not used.
    """
    whole = evaluate.evaluate(config(world, tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    samples, b = tmp_path / "b" / "samples.jsonl", config(world, tmp_path / "b")
    text = samples.read_bytes().split(b"\n")
    samples.write_bytes(b"\n".join(text[:3]) + b"\n" + text[3][:20])
    model, tokenizer = load(world["model"])
    monkeypatch.setattr(machine.Machine, "load", None)
    assert evaluate.evaluate(b, model, tokenizer) == whole
    assert lines_of(tmp_path / "a") == lines_of(tmp_path / "b")
    assert len(samples.read_text().splitlines()) == 8
    summary = json.load(open(tmp_path / "b" / "summary.json"))
    assert summary["found"] == summary["total"] == 8 and summary["scores"] == whole
    with pytest.raises(SystemExit, match="other values of max_new_tokens: choose another --out"):
        evaluate.evaluate(dataclasses.replace(b, max_new_tokens=13))
    assert evaluate.evaluate(dataclasses.replace(b, report=0)) == whole  # no model is needed


@pytest.mark.slow  # processes of their own
def test_two_processes_score_like_one(world, tmp_path):
    """Breaks if a sample is left out or done twice when ranks share the work, if they draw other
    noise or measure another scale, or if the command line differs.
    """
    whole = evaluate.evaluate(config(world, tmp_path / "one", latents="noise"))
    flags = []
    for name, value in vars(config(world, tmp_path / "two", latents="noise")).items():
        is_bool = isinstance(value, bool)
        flags += [f"--{'' if value else 'no-'}{name}"] if is_bool else [f"--{name}", str(value)]
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *two, os.path.join(ROOT, "evaluate.py"), *flags]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.load(open(tmp_path / "two" / "summary.json"))["scores"] == whole
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert one == two and len(one) == 8 and as_text(*score_rows(whole)) in run.stdout


def test_what_cannot_be_scored_is_refused_at_once(world, tmp_path, monkeypatch):
    """Breaks if a gold answer outside the options, missing options or futures, doubled ids, or one
    clip for shuffled go unnoticed, or are found only after the model was loaded.
    """
    monkeypatch.setattr(machine.Machine, "load", None)
    first, *others = rows = read_rows(world["test"])
    replace = dataclasses.replace
    bare = [replace(row, response=["a thought"]) for row in rows]
    alone = [row for row in rows if clip_of(row) == clip_of(first)]
    for some, kind, message in (
        ([replace(first, options=None), *others], "generated", "no options"),
        ([replace(first, answer="purple"), *others], "generated", "'purple' is none of"),
        ([first, first], "generated", "not unique"),
        (bare, "true", "--latents true needs the true future frames"),
        (bare, "shuffled", "--latents shuffled needs the true future frames"),
        (bare, "noise", "--latents noise needs the true future frames"),
        (alone, "shuffled", "at least two clips"),
    ):
        with pytest.raises((ValueError, SystemExit), match=message):
            evaluate.evaluate(config(world, tmp_path, latents=kind), rows=some)
    with pytest.raises(ValueError, match="expected one of"):
        config(world, tmp_path, latents="dreams")


def test_what_a_question_is_about():
    """Breaks if two questions on the same clip or picture seem to be about different ones."""
    prompts = [[Clip("/v.mp4"), "?"], [Frame("/p.png", 3), "?"], [Frame(b"png"), "?"]]
    rows = [Row("f:0", "id", prompt, [], "A") for prompt in prompts]
    assert [clip_of(row) for row in rows] == ["/v.mp4", "/p.png", "id"]


# --------------------------------------------------------------------------------------- ablations


def test_each_latents_feeds_what_it_says(world, tmp_path):
    """Breaks if an ablation feeds something else than it says, or what depends on other rows."""
    model, _ = load(world["model"])
    rows = [row for row in read_rows(world["test"]) if row.group in ("1-hop", "3-hop")]
    zero, budget = torch.zeros(1, 96), config(world, tmp_path).budgets[1]
    true = [evaluate.true_vectors(model, row, budget) for row in rows]

    def fed(kind, some=rows):
        """What spans 0, 1, 2 of each row are fed at their first place: (rows, 3, D)."""
        c = config(world, tmp_path / kind, latents=kind)
        feed, lost = evaluate.make_feed(c, model, rows)(some)
        assert not lost
        row = torch.arange(len(some)).repeat_interleave(3)
        span = torch.arange(3).repeat(len(some))
        state = types.SimpleNamespace(row=row, span=span, count=torch.zeros_like(row), h=zero)
        return feed(model, state).view(len(some), 3, -1)

    def spans(of):
        return torch.stack([of[min(m, len(of) - 1)][0] for m in range(3)])  # (3, D)

    assert torch.equal(fed("true"), torch.stack([spans(of) for of in true]))
    assert torch.equal(fed("true", rows[2:3])[0], fed("true")[2])
    assert fed("zero").abs().sum() == 0
    pause = model.get_input_embeddings().weight[model.config.latent_id]
    assert torch.equal(fed("pause"), pause.expand(len(rows), 3, -1))
    donor_of = evaluate.donors(rows)
    expected = [spans(true[rows.index(donor_of[row.id])]) for row in rows]
    assert torch.equal(fed("shuffled"), torch.stack(expected))

    # noise: one scale for the run, and for each row and span its own draw
    every = torch.cat([torch.cat(of) for of in true])
    noise = fed("noise")
    z = (noise - every.mean(0)) / every.std(0, unbiased=False).clamp(min=1e-9)
    assert abs(z.std() - 1) < 0.1 and abs(z.mean()) < 0.1
    assert len(noise.flatten(0, 1).unique(dim=0)) == 3 * len(rows)
    assert torch.equal(fed("noise", rows[1:2])[0], noise[1])
    for kind in ("generated", "none"):
        feed_for = evaluate.make_feed(config(world, tmp_path, latents=kind), model, rows)
        assert feed_for(rows) == (evaluate.own_latent, {})


def test_shuffled_takes_a_row_of_the_same_group():
    """Breaks if the donor is about the same clip, or of another group where its own has another
    clip. Files list the questions of a clip together: here "3" has no other row of its group.
    """
    asked = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2"), ("b", "3"), ("c", "1"), ("c", "2")]
    rows = [Row("f", f"{c}{g}", [Clip(c)], [], "A", group=g) for c, g in asked]
    donor_of = {id: donor.id for id, donor in evaluate.donors(rows).items()}
    expected = dict(a1="b1", a2="b2", b1="c1", b2="c2", b3="c1", c1="a1", c2="a2")
    assert donor_of == expected


def test_vectors_are_addressed_by_span_and_place():
    """Breaks if span m, place j is not fed frame min(m, M - 1)'s vector min(j, n_m - 1)."""
    one = [torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])]
    two = [torch.tensor([[5.0], [6.0], [7.0]])]
    three = [torch.tensor([[value]]) for value in (8.0, 9.0, 10.0)]
    feed = evaluate.feed_of([one, two, three])
    cases = {(0, 0, 0): 1, (0, 0, 1): 2, (0, 0, 9): 2, (0, 1, 0): 3, (0, 1, 4): 3, (0, 7, 1): 3}
    cases |= {(2, 0, 0): 8, (2, 1, 2): 9, (2, 2, 0): 10, (2, 3, 1): 10}
    cases |= {(1, -1, 0): 5, (1, 0, 2): 7, (1, 0, 3): 7, (1, 5, 1): 6}
    row, span, count = torch.tensor(list(cases)).T
    h = torch.zeros(len(row), 1, dtype=torch.bfloat16)
    state = types.SimpleNamespace(row=row, span=span, count=count, h=h)
    vectors = feed(None, state)
    assert vectors.dtype == h.dtype and vectors[:, 0].tolist() == list(cases.values())


@pytest.mark.parametrize("latents", ["true", "shuffled", "noise"])
def test_ablations_do_not_depend_on_the_batch(world, tmp_path, latents):
    """Breaks if an answer depends on which rows share its batch; batches of 1, 7 and 8 rows. Or if
    a part of them cannot be made again after a kill.
    """
    results = []
    for batch in (1, 7, 8):
        c = config(world, tmp_path / f"{batch}", latents=latents, batch=batch, max_latents=2)
        evaluate.evaluate(dataclasses.replace(c, report=0))
        results.append(lines_of(c.out))
    path = tmp_path / "1" / "samples.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:4]) + b'\n{"id": "half')
    c = config(world, tmp_path / "1", latents=latents, batch=1, max_latents=2)
    evaluate.evaluate(dataclasses.replace(c, report=0))
    assert results[0] == results[1] == results[2] == lines_of(c.out) and len(results[0]) == 8


def test_a_future_that_cannot_be_read(world, tmp_path):
    """Breaks if an unreadable future ends the run, or its row is scored with something else."""
    rows = read_rows(world["test"])
    broken = rows[0].response[1]._replace(source=str(tmp_path / "gone.mp4"))
    response = [broken if not isinstance(part, str) else part for part in rows[0].response]
    rows[0] = dataclasses.replace(rows[0], response=response)
    table = evaluate.evaluate(config(world, tmp_path, latents="true"), rows=rows)
    line = lines_of(tmp_path)[rows[0].id]
    assert "gone.mp4: no such file" in line["skipped"] and "future frames" in line["skipped"]
    assert table["all"]["n"] == 7 and table["all"]["skipped"] == 1


def test_how_it_is_decoded(world, tmp_path, monkeypatch):
    """Breaks if a setting does not reach `generate`, or --latents none lets a span be opened, or
    another ablation does not.
    """
    asked, generate = [], latent_decode.generate

    def listen(model, batch, *, feed, banned, **how):
        asked.append((feed is evaluate.own_latent, banned == (model.config.latent_start_id,), how))
        return generate(model, batch, feed=feed, banned=banned, **how)

    monkeypatch.setattr(latent_decode, "generate", listen)
    how = dict(max_new_tokens=7, max_latents=3, cuda_graph=False)
    for latents in ("generated", "none", "zero"):
        evaluate.evaluate(config(world, tmp_path / latents, latents=latents, limit=1, **how))
    assert asked == [(True, False, how), (True, True, how), (False, False, how)]
