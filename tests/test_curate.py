"""Curation's noise by brute force, and a probe that is killed, shared, damaged and resumed. What is
counted and chosen is compared with a second definition in test_twin_curate.py.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter

import pytest
import torch

import curate
from common.formats import read_records, read_rows
from curate import false_keep_rate, final_answer, mark
from tests.conftest import ROOT, TINY_DATA, changed_rows, flags, launch
from toy import world as paddle


def config(world, out, **more):
    own = dict(model=world["model"], data=world["test"], out=str(out), workers=0)
    small = dict(batch=3, rollouts=2, max_new_tokens=6)
    return curate.Config(**{**TINY_DATA, **own, **small, **more})


def read(out, name="probe.jsonl"):
    with open(os.path.join(out, name)) as f:
        return {line["id"]: line for line in map(json.loads, f)}


def pool(world, name, change):
    """A copy of the test rows, each after change(i, record), beside their clips."""
    return changed_rows(dict(data=world["test"]), name, change)


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("probe") / "run")
    curate.probe(config(world, out))
    return out


def copy_of(probed, folder):
    """A probe that is done, in a folder of its own -> its lines in order."""
    os.makedirs(folder, exist_ok=True)
    for name in ("probe.jsonl", "settings.json"):
        shutil.copy(os.path.join(probed, name), folder)
    return list(read(folder).values())


# ----------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize(
    "n, max_p_t, min_gain, p", [(3, 2, 1, 0.0), (4, 3, 1, 0.2), (4, 2, 2, 0.9)]
)
def test_false_keep_rate_by_brute_force(n, max_p_t, min_gain, p):
    """Breaks if the exact figure is not the sum over all 4^n outcomes of two series of coin
    tosses.
    """
    total = 0.0
    for tosses in itertools.product((0, 1), repeat=2 * n):
        t, v = sum(tosses[:n]), sum(tosses[n:])
        if t <= max_p_t and v - t >= min_gain:
            total += p ** sum(tosses) * (1 - p) ** (2 * n - sum(tosses))
    assert false_keep_rate(n, p, max_p_t, min_gain) == pytest.approx(total)


def test_the_papers_thresholds():
    """Breaks if the rate at n = 8 is not the known one, P(V - T >= 2) = P(Bin(16, 1/2) >= 10) =
    14893/65536 (gain >= 2 alone implies p_t <= 6), another n has other shares, or a flag is lost.
    """
    assert false_keep_rate(8, 0.5) == pytest.approx(14893 / 65536)
    c = curate.Config()
    assert [curate.limits(c, n) for n in (8, 16, 5)] == [(6, 2), (12, 4), (3, 2)]
    assert curate.limits(curate.Config(max_p_t=0, min_gain=0), 8) == (0, 0)


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<reason>x</reason><answer> red </answer><answer>blue</answer><|im_end|>", "red"),
        ("red<|im_end|>", "red"),
        ("First it turns.\nSo the answer is\n\nB) red\n<|im_end|>", "B) red"),
        ("<answer>red", None),
        ("red", None),
        ("<answer></answer><|im_end|>", ""),
        ("<|im_end|>", None),
        ("<answer>red<|im_end|>", "red"),
        ("<|latent_start|><|latent|><|latent_end|>blue<|endoftext|>", "blue"),
    ],
)
def test_read_answer(response, answer):
    """Breaks if an untagged answer is lost, a cut-off response has one, or a tag is part of it."""
    assert final_answer(response) == answer


class Answers:
    """A judge with a list of what it calls right; None = out of order."""

    def __init__(self, right):
        self.right, self.asked = right, []
        self.failures = Counter({"no server": 1} if right is None else {})

    def __call__(self, items):
        self.asked += items
        return [None if self.right is None else answer in self.right for _, _, answer in items]


@pytest.fixture
def open_row(world):
    row = read_rows(world["test"])[0]
    return dataclasses.replace(row, answer="red", question="q", options=None)


def test_mark(open_row):
    """Breaks if the judge is asked twice, or about what the rule has decided, or an outage counts
    as wrong.
    """
    rows, end = [open_row, open_row], "<|im_end|>"
    said = [[f"red{end}", f"Red.{end}", f"crimson{end}", f"blue{end}", end], [f"crimson{end}"]]
    judge = Answers(["crimson"])
    assert mark(rows, said, judge) == [[True, True, True, False, False], [True]]
    assert judge.asked == [("q", "red", "crimson"), ("q", "red", "blue")]
    assert mark(rows, said) == [[True, True, False, False, False], [False]]
    assert mark(rows, said, Answers(None)) == [[True, True, None, None, False], [None]]
    closed = dataclasses.replace(open_row, options=list(paddle.WALLS))
    assert mark([closed], [[f"A{end}", f"blue{end}"]], Answers([])) == [[True, False]]


# -------------------------------------------------------------------------------------------- probe


@pytest.mark.slow  # processes of their own
def test_killed_and_shared_by_two_ranks_gives_the_same_bytes(world, probed, tmp_path):
    """Breaks if SIGKILL loses or doubles a line, the number of ranks changes the output, or ranks
    do the same work.
    """
    whole = open(os.path.join(probed, "probe.jsonl"), "rb").read()
    env, c = dict(os.environ, OMP_NUM_THREADS="1"), config(world, tmp_path, part="probe")
    dies = (
        "import curate, os, signal; made = []; ask = curate.ask\n"
        "def third_is_the_last(*a, **k):\n    made.append(0)\n    "
        "if len(made) == 3: os.kill(os.getpid(), signal.SIGKILL)\n    return ask(*a, **k)\n"
        "curate.ask = third_is_the_last; curate.run_script(curate.probe, curate.Config)"
    )
    run = subprocess.run([sys.executable, "-c", dies, *flags(c)], env=env, cwd=ROOT)
    part = tmp_path / "probe_0.jsonl"
    assert run.returncode == -signal.SIGKILL and len(part.read_text().splitlines()) == 3
    said = launch(c, 2)
    assert (tmp_path / "probe.jsonl").read_bytes() == whole and not part.exists()
    assert "kept by chance" in said and "8 done" in said


def test_settings_and_pools_do_not_mix(world, probed, tmp_path):
    """Breaks if another n, seed, model or question joins a probe, or a finished one is not left
    as it is.
    """
    before = open(os.path.join(probed, "probe.jsonl"), "rb").read()
    judge = dict(judge_model="x", judge_url="http://x/v1")
    for change in (dict(rollouts=3), dict(seed=1), dict(temperature=1.0), judge):
        with pytest.raises(SystemExit, match="other values of " + next(iter(change))):
            curate.probe(config(world, probed, **change))

    def other(i, record):
        if i == 1:
            record["conversations"][0].update(value="<image> <image> what ?")

    path = pool(world, "asked.jsonl", other)
    for step in (curate.probe, curate.cut):
        with pytest.raises(SystemExit, match="asked.jsonl:1.*another question"):
            step(config(world, probed, data=path))
    curate.probe(config(world, probed, model=world["model"], workers=1))
    assert open(os.path.join(probed, "probe.jsonl"), "rb").read() == before
    with pytest.raises(SystemExit, match="--part probe first"):
        curate.cut(config(world, tmp_path / "nothing"))
    for bad in (dict(part="prob"), dict(k=-1), dict(rollouts=0)):
        with pytest.raises(ValueError, match="expected at least|expected probe|needs judge_model"):
            config(world, tmp_path, **bad)


def test_what_cannot_be_probed_is_named_and_tried_again(
    world, probed, tmp_path, capsys, monkeypatch
):
    """Breaks if a missing clip, a row without future frames or without an answer stops the run,
    gets counts, or is lost.
    """

    def damage(i, record):
        asked = record["conversations"][0]
        if i == 0:
            record["video"] = "clips/gone.mp4"
        if i == 1:
            record.update(reasoning_image=[], conversations=[asked, {"from": "gpt", "value": "x"}])
        if i in (2, 3):
            record["answer"] = " " if i == 2 else "purple"

    # four rows are named, four are scored; the third block is whole, and as it was
    path = pool(world, "damaged.jsonl", damage)
    c = config(world, tmp_path, data=path, max_p_t=2, min_gain=0, max_bad=0.5)
    curate.probe(c)
    lines, good, shown = read(tmp_path), read(probed), capsys.readouterr().out
    why = ["no such file", "no future frame", "the answer is empty", "'purple' is none"]
    for i, (line, reason) in enumerate(zip(lines.values(), why)):
        assert reason in line["skipped"] and "p_t" not in line and f"skipped {path}:{i}: " in shown
    assert len(lines) == 8 and "4 done, 4 skipped" in shown
    assert [lines[id] for id in list(good)[6:]] == [good[id] for id in list(good)[6:]]
    chosen = curate.cut(c)
    summary = json.load(open(tmp_path / "select.json"))
    assert [reason in named for reason, named in zip(why, summary["named"].values())] == [True] * 4
    assert all(reason in capsys.readouterr().out for reason in why[:1]) and len(chosen) <= 4
    assert summary["tables"]["all"]["all"]["skipped"] == 4

    # still damaged: tried again, without generating for their neighbours
    with monkeypatch.context() as patch:
        patch.setattr(curate, "ask", None)
        curate.probe(c)

    # repaired: nothing but the four is done again
    shutil.copy(world["test"], path)
    after = curate.probe(c)
    assert all("p_t" in line for line in after.values())
    assert all(after[id] == lines[id] for id in list(lines)[4:])


def test_a_judge_outage_is_caught_up_without_generating(world, tmp_path, monkeypatch, capsys):
    """Breaks if an unjudged rollout counts as wrong, its response is lost, or the caught-up file
    is another one.
    """

    def talk(model, tokenizer, samples, *, n, generator, **how):
        assert how["cuda_graph"] is False
        lengths = torch.randint(1, 5, (len(samples) * n,), generator=generator).tolist()
        return None, None, [f"<answer>{'x' * length}</answer>" for length in lengths]

    path = pool(world, "open.jsonl", lambda i, record: record.pop("options"))
    more = dict(data=path, judge_model="j", cuda_graph=False)
    a, b = (config(world, tmp_path / name, **more) for name in "ab")
    monkeypatch.setattr(curate, "ask", talk)
    even = Answers(["xx", "xxxx"])
    curate.probe(a, judge=even)
    assert any(line["p_t"] + line["p_v"] for line in read(a.out).values())
    lines = curate.probe(b, judge=Answers(None))
    waiting = [id for id, line in lines.items() if "unjudged" in line]
    assert waiting and all("p_t" not in lines[id] for id in waiting)
    assert "no verdict from the judge: 1 x no server" in capsys.readouterr().out
    curate.cut(b)
    summary = json.load(open(tmp_path / "b" / "select.json"))
    assert summary["tables"]["all"]["all"]["unjudged"] == len(waiting)
    assert set(summary["named"]) == set(waiting)
    monkeypatch.setattr(curate, "ask", None)
    curate.probe(b, judge=Answers(None))
    assert [id for id, line in read(b.out).items() if "unjudged" in line] == waiting
    curate.probe(b, judge=even)
    assert read(b.out) == read(a.out)
    assert (tmp_path / "b/probe.jsonl").read_bytes() == (tmp_path / "a/probe.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------- select


def test_cut_writes_the_records_as_they_came(world, probed, tmp_path, capsys):
    """Breaks if a chosen record is changed or out of order, or the tables do not add up to the
    pool.
    """
    records = {r["id"]: r for r in read_records(world["test"])}
    rows = copy_of(probed, tmp_path)
    for i, row in enumerate(rows):  # hand-made counts; the sixth was never probed
        row.update(p_t=i % 2, p_v=[2, 2, 1, 0, 2, 2, 2, 1][i])
    with open(tmp_path / "probe.jsonl", "w") as f:
        f.writelines(json.dumps(r) + "\n" for i, r in enumerate(rows) if i != 5)
    curate.cut(config(world, tmp_path, part="select", k=2, max_p_t=0, min_gain=1))
    chosen = read_records(str(tmp_path / "selected.jsonl"))
    tied = [rows[i]["id"] for i in (0, 4, 6)]
    best = sorted(tied, key=lambda id: hashlib.sha256(id.encode()).hexdigest())[:2]
    assert [r["id"] for r in chosen] == best and all(r == records[r["id"]] for r in chosen)
    summary = json.load(open(tmp_path / "select.json"))
    assert summary["chosen"] == best and summary["n"] == 2
    fates = {"chosen": 2, "beyond K": 2, "p_t too high": 3, "missing": 1}
    tables = summary["tables"]
    assert tables["all"]["all"] == fates
    assert tables["gain"]["2"] == {"chosen": 2, "beyond K": 1} and "-1" in tables["gain"]
    for by in ("category", "future frames", "gain"):
        assert sum(n for count in tables[by].values() for n in count.values()) == 8
    assert tables["future frames"].keys() == {"1", "2", "3", "4"}
    assert "2 of 8 candidates chosen" in capsys.readouterr().out
    assert (tmp_path / "select.png").stat().st_size > 5000


@pytest.mark.parametrize("kind, written", [("json", "jsonl"), ("parquet", "parquet")])
def test_cut_keeps_the_records(world, probed, tmp_path, kind, written):
    """Breaks if the records of a list or of a parquet pool come back as something else."""
    records = read_records(world["test"])
    data = os.path.join(os.path.dirname(world["test"]), f"pool.{kind}")
    if kind == "json":
        json.dump(records, open(data, "w"))
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), data)
    copy_of(probed, tmp_path)
    chosen = curate.cut(config(world, tmp_path, data=data, max_p_t=2, min_gain=0, k=3))
    assert read_records(str(tmp_path / f"selected.{written}")) == chosen and len(chosen) == 3
    assert all(r in read_records(data) for r in chosen)
