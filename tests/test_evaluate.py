"""Resume, ranks, and what happens to samples that cannot be scored. What the ablations feed is
compared with a second definition in test_twin_evaluate.py.
"""

import dataclasses
import json
import os
import shutil
import types

import pytest
import torch

import evaluate
from common import machine
from common import run as runs
from common.formats import Clip, Frame, Row, read_rows
from common.report import as_text, score_rows
from evaluate import clip_of
from model import load
from tests.conftest import TINY_DATA, launch


def config(world, out, **more):
    own = dict(model=world["model"], data=world["test"], out=str(out), workers=0)
    return evaluate.Config(**{**TINY_DATA, **own, "batch": 3, "max_new_tokens": 12, **more})


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
    said = launch(config(world, tmp_path / "two", latents="noise"), 2)
    assert json.load(open(tmp_path / "two" / "summary.json"))["scores"] == whole
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert one == two and len(one) == 8 and as_text(*score_rows(whole)) in said


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
        (rows, "zero,true", "several at once is for the command line"),
    ):
        with pytest.raises((ValueError, SystemExit), match=message):
            evaluate.evaluate(config(world, tmp_path, latents=kind), rows=some)
    with pytest.raises(ValueError, match="latents is 'dreams', expected one of"):
        config(world, tmp_path, latents="zero,dreams")


def test_several_kinds_of_latents_are_as_many_evaluations(world, tmp_path):
    """Breaks if a kind is left out, or is another than the same evaluation by itself."""
    evaluate.main(config(world, tmp_path / "both", latents="zero,true"))
    for kind in ("zero", "true"):
        evaluate.main(config(world, tmp_path / kind, latents=kind))
        assert lines_of(f"{tmp_path}/both_{kind}") == lines_of(tmp_path / kind)


def test_what_a_question_is_about():
    """Breaks if two questions on the same clip or picture seem to be about different ones."""
    prompts = [[Clip("/v.mp4"), "?"], [Frame("/p.png", 3), "?"], [Frame(b"png"), "?"]]
    rows = [Row("f:0", "id", prompt, [], "A") for prompt in prompts]
    assert [clip_of(row) for row in rows] == ["/v.mp4", "/p.png", "id"]


# --------------------------------------------------------------------------------------- ablations


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
    state = types.SimpleNamespace(row=row, span_number=span, count=count, h=h)
    vectors = feed(None, state)
    assert vectors.dtype == h.dtype and vectors[:, 0].tolist() == list(cases.values())


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


def test_a_captured_step_reaches_the_decoder(world, tmp_path, monkeypatch):
    """Breaks if cuda_graph, which changes no number, is lost on its way."""
    asked, ask = [], evaluate.ask

    def listen(*args, **how):
        asked.append(how.pop("cuda_graph"))
        return ask(*args, cuda_graph=False, **how)

    monkeypatch.setattr(evaluate, "ask", listen)
    for cuda_graph in (False, True):
        evaluate.evaluate(config(world, tmp_path / str(cuda_graph), limit=1, cuda_graph=cuda_graph))
    assert asked == [False, True]
