"""Selection on hand-made counts, the noise by brute force, and a probe that is killed, shared,
damaged and resumed.
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

import curate
from common import formats
from common.formats import read_rows
from curate import false_keep_rate, final_answer, keep, mark, select, visual_gain
from data import encode
from model import load
from toy import tiny
from toy import world as paddle

SCRIPT = os.path.join(os.path.dirname(curate.__file__), "curate.py")


def config(world, out, **more):
    shared = {
        k: v
        for k, v in tiny.settings("sft").items()
        if k in ("image_max_tokens", "l_max", "max_length", "system")
    }
    return curate.Config(
        **{
            **shared,
            **dict(
                model=world["model"],
                data=world["test"],
                out=str(out),
                batch=3,
                rollouts=2,
                max_new_tokens=6,
                workers=0,
            ),
            **more,
        }
    )


def flags(c):
    return [
        f
        for k, v in dataclasses.asdict(c).items()
        for f in ([f"--{'' if v else 'no-'}{k}"] if isinstance(v, bool) else [f"--{k}", str(v)])
    ]


def read(out, name="probe.jsonl"):
    with open(os.path.join(out, name)) as f:
        return {line["id"]: line for line in map(json.loads, f)}


def pool(world, name, change):
    """A copy of the test rows, changed, beside their clips."""
    with open(world["test"]) as f:
        records = [json.loads(line) for line in f]
    change(records)
    path = os.path.join(os.path.dirname(world["test"]), name)
    with open(path, "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in records)
    return path


@pytest.fixture(scope="module")
def probed(world, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("probe") / "run")
    curate.probe(config(world, out))
    return out


# ----------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize(
    "p_t, p_v, kept",
    [
        (6, 8, True),
        (7, 8, False),
        (6, 7, False),
        (0, 2, True),
        (0, 1, False),
        (0, 8, True),
        (4, 6, True),
        (8, 8, False),
        (7, 9, False),
        (5, 3, False),
    ],
)
def test_keep_at_the_edges(p_t, p_v, kept):
    """Breaks if a threshold is exclusive where the paper's is inclusive, or the other way round."""
    assert keep(p_t, p_v) is kept and visual_gain(p_t, p_v) == p_v - p_t


def test_select_by_hand():
    """Breaks if the order is not gain, then the lower p_t, then the hash of the id, or the order
    of the rows matters.
    """
    counts = {
        "a": (0, 2),
        "b": (6, 8),
        "c": (3, 8),
        "d": (0, 5),
        "e": (7, 8),
        "f": (1, 2),
        "g": (0, 8),
        "h": (0, 2),
        "i": (0, 2),
    }
    rows = [dict(id=id, p_t=t, p_v=v) for id, (t, v) in counts.items()]
    tied = sorted("ahi", key=lambda id: hashlib.sha256(id.encode()).hexdigest())
    assert tied != ["a", "h", "i"]  # else the hash would decide nothing here
    expected = ["g", "d", "c", *tied, "b"]  # gains 8; 5 5 (p_t 0, 3); 2 2 2 2 (p_t 0 0 0 6)
    for order in (rows, rows[::-1], rows[4:] + rows[:4]):
        assert [r["id"] for r in select(order, 0)] == expected
        for k in range(1, 9):
            assert [r["id"] for r in select(order, k)] == expected[:k]
    assert [r["id"] for r in select(rows, 9, max_p_t=2, min_gain=5)] == ["g", "d"]
    assert select([], 3) == [] and select(rows[4:6], 3) == []


@pytest.mark.parametrize("n, max_p_t, min_gain", [(3, 2, 1), (4, 3, 1), (4, 2, 2)])
@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
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


def test_false_keep_rate_of_the_paper():
    """Breaks if the rate at n = 8 is not the known one: P(V - T >= 2) = P(Bin(16, 1/2) >= 10) =
    14893/65536; p_t fits.
    """
    assert false_keep_rate(8, 0.5) == pytest.approx(
        14893 / 65536
    )  # gain >= 2 alone already implies p_t <= 6
    assert (
        curate.thresholds(8) == (6, 2)
        and curate.thresholds(16) == (12, 4)
        and curate.thresholds(5) == (3, 2)
    )
    assert false_keep_rate(32, 0.5, *curate.thresholds(32)) < 0.03


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


def test_mark(world):
    """Breaks if the judge is asked twice, or about what the rule has decided, or an outage counts
    as wrong.
    """
    row = dataclasses.replace(read_rows(world["test"])[0], answer="red", question="q", options=None)
    said = [
        ["red<|im_end|>", "Red.<|im_end|>", "crimson<|im_end|>", "blue<|im_end|>", "<|im_end|>"],
        ["crimson<|im_end|>"],
    ]
    judge = Answers(["crimson"])
    assert mark([row, row], said, judge) == [[True, True, True, False, False], [True]]
    assert judge.asked == [("q", "red", "crimson"), ("q", "red", "blue")]
    assert mark([row, row], said) == [[True, True, False, False, False], [False]]
    assert mark([row, row], said, Answers(None)) == [[True, True, None, None, False], [None]]
    closed = dataclasses.replace(row, options=list(paddle.WALLS))
    assert mark([closed], [["A<|im_end|>", "blue<|im_end|>"]], Answers([])) == [[True, False]]


# ---------------------------------------------------------------------------------- the two prompts


def test_condition_v_shows_the_later_frames(world):
    """Breaks if v lacks a future frame, has it before the observed ones, or t has any.

    Or if the question changes.
    """
    _, tokenizer = load(world["model"])
    c = config(world, "unused")
    for row in read_rows(world["test"]):
        t, v = dataclasses.replace(row, response=[]), curate.with_future(row)
        ids = {
            name: encode(r, tokenizer, c, train=False)["ids"] for name, r in (("t", t), ("v", v))
        }
        future = [part for part in row.response if not isinstance(part, str)]
        image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        seen = 3 if row.group == "interp" else 2
        assert (
            ids["t"].count(image) == seen
            and ids["v"].count(image) == seen + len(future)
            and len(future) >= 1
        )
        pictures = [part for part in v.prompt if not isinstance(part, str)]
        assert pictures == [part for part in row.prompt if not isinstance(part, str)] + future
        assert (
            v.prompt[-1] == row.prompt[-1]
            and curate.LATER in v.prompt
            and ids["v"][-8:] == ids["t"][-8:]
        )


# -------------------------------------------------------------------------------------------- probe


def test_lines_say_what_was_done(world, probed):
    """Breaks if counts go beyond n, the settings are lost, or part files stay behind."""
    lines = read(probed)
    rows = read_rows(world["test"])
    assert list(lines) == [row.id for row in rows] and len(lines) == 8
    for row, line in zip(rows, lines.values()):
        assert 0 <= line["p_t"] <= 2 and 0 <= line["p_v"] <= 2
        assert line["group"] == row.group and len(line["prompt"]) == 16
    assert len({line["prompt"] for line in lines.values()}) == 8
    settings = json.load(open(os.path.join(probed, "settings.json")))
    expected = dict(rollouts=2, seed=0, temperature=0.9, top_p=0.99, max_new_tokens=6, batch=3)
    assert expected.items() <= settings.items() and settings["model"] == world["model"]
    assert sorted(os.listdir(probed)) == ["probe.jsonl", "settings.json"]


@pytest.mark.parametrize("left", [0, 2, 3, 5])
def test_a_torn_part_file_is_completed_to_the_same_bytes(world, probed, tmp_path, left):
    """Breaks if a half-written line survives, or what is generated depends on what was there
    before (blocks of 3).
    """
    os.makedirs(tmp_path / "b")
    shutil.copy(os.path.join(probed, "settings.json"), tmp_path / "b")
    lines = open(os.path.join(probed, "probe.jsonl"), "rb").read().split(b"\n")
    (tmp_path / "b" / "probe_1.jsonl").write_bytes(
        b"\n".join(lines[:left]) + b"\n" * bool(left) + lines[left][:50]
    )
    curate.probe(config(world, tmp_path / "b"))
    assert (tmp_path / "b" / "probe.jsonl").read_bytes() == open(
        os.path.join(probed, "probe.jsonl"), "rb"
    ).read()


@pytest.mark.slow  # processes of their own
def test_killed_and_shared_by_two_ranks_gives_the_same_bytes(world, probed, tmp_path):
    """Breaks if SIGKILL loses or doubles a line, the number of ranks changes the output, or ranks
    do the same work.
    """
    whole = open(os.path.join(probed, "probe.jsonl"), "rb").read()
    env, c = dict(os.environ, OMP_NUM_THREADS="1"), config(world, tmp_path, part="probe")
    dies = (
        "import curate, os, signal, sys; made = []; generate = curate.generate\n"
        "def second_is_the_last(*a, **k):\n    made.append(0) if not made else "
        "os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return generate(*a, **k)\n"
        "curate.generate = second_is_the_last; curate.run_script(curate.probe, curate.Config)"
    )
    run = subprocess.run(
        [sys.executable, "-c", dies, *flags(c)],
        env=env,
        cwd=os.path.dirname(SCRIPT),
        capture_output=True,
    )
    part = tmp_path / "probe_0.jsonl"
    assert run.returncode == -signal.SIGKILL and len(part.read_text().splitlines()) == 3
    again = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            SCRIPT,
            *flags(c),
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert again.returncode == 0, again.stderr[-3000:]
    assert (tmp_path / "probe.jsonl").read_bytes() == whole and not part.exists()
    assert "kept by chance" in again.stdout and "8 done" in again.stdout


def test_settings_and_pools_do_not_mix(world, probed, tmp_path):
    """Breaks if another n, seed, model or question joins a probe, or a finished one is not left
    as it is.
    """
    before = open(os.path.join(probed, "probe.jsonl"), "rb").read()
    for change in (
        dict(rollouts=3),
        dict(seed=1),
        dict(temperature=1.0),
        dict(judge_model="x", judge_url="http://x/v1"),
    ):
        with pytest.raises(SystemExit, match="other values of " + next(iter(change))):
            curate.probe(config(world, probed, **change))
    path = pool(
        world,
        "asked.jsonl",
        lambda records: records[1]["conversations"][0].update(value="<image> <image> what ?"),
    )
    for step in (curate.probe, curate.cut):
        with pytest.raises(SystemExit, match="asked.jsonl:1.*another question"):
            step(config(world, probed, data=path))
    curate.probe(config(world, probed, model=world["model"], workers=1))
    assert open(os.path.join(probed, "probe.jsonl"), "rb").read() == before
    with pytest.raises(SystemExit, match="--part probe first"):
        curate.cut(config(world, tmp_path / "nothing"))
    for bad in (dict(part="prob"), dict(k=-1), dict(rollouts=0)):
        with pytest.raises(ValueError, match="expected at least|expected probe"):
            config(world, tmp_path, **bad)


def test_what_cannot_be_probed_is_named_and_tried_again(
    world, probed, tmp_path, capsys, monkeypatch
):
    """Breaks if a corrupt clip, a row without future frames or without an answer stops the run,
    gets counts, or is lost.
    """
    clips = os.path.join(os.path.dirname(world["test"]), "clips")
    with open(os.path.join(clips, "bad.mp4"), "wb") as f:
        f.write(b"not a video")

    def damage(records):
        records[0]["video"] = "clips/bad.mp4"
        records[1].update(
            reasoning_image=[],
            conversations=[records[1]["conversations"][0], {"from": "gpt", "value": "x"}],
        )
        records[2]["answer"] = " "
        records[3]["answer"] = "purple"

    path = pool(world, "damaged.jsonl", damage)
    c = config(world, tmp_path, data=path, max_p_t=2, min_gain=0, max_bad=0.5)
    curate.probe(c)
    lines, good, shown = read(tmp_path), read(probed), capsys.readouterr().out
    why = [
        "cannot be read as a video",
        "no future frame",
        "the answer is empty",
        "'purple' is none of",
    ]
    for i, reason in enumerate(why):
        line = list(lines.values())[i]
        assert reason in line["skipped"] and "p_t" not in line and f"skipped {path}:{i}: " in shown
    assert len(lines) == 8 and "4 done, 4 skipped" in shown
    assert [lines[id] for id in list(good)[6:]] == [
        good[id] for id in list(good)[6:]
    ]  # the third block was whole
    chosen = curate.cut(c)
    summary, text = json.load(open(tmp_path / "select.json")), (tmp_path / "select.txt").read_text()
    assert len(summary["named"]) == 4 and all(reason in text for reason in why)
    assert summary["tables"]["all"]["all"]["skipped"] == 4 and len(chosen) <= 4
    with (
        monkeypatch.context() as patch
    ):  # still damaged: tried again, without generating for their neighbours
        patch.setattr(curate, "generate", None)
        curate.probe(c)
    # repaired: nothing but the four is done again
    shutil.copy(world["test"], path)
    after = curate.probe(c)
    assert all("p_t" in line for line in after.values()) and all(
        after[id] == lines[id] for id in list(lines)[4:]
    )


def test_a_judge_outage_is_caught_up_without_generating(world, tmp_path, monkeypatch, capsys):
    """Breaks if an unjudged rollout counts as wrong, its response is lost, or the caught-up file
    is another one.
    """
    path = pool(world, "open.jsonl", lambda records: [r.pop("options") for r in records])
    everything = Answers([])
    everything.right = type(
        "All", (), {"__contains__": lambda self, answer: len(answer) % 2 == 0}
    )()
    c = {
        name: config(world, tmp_path / name, data=path, judge_model="j", temperature=1.5, seed=1)
        for name in "ab"
    }
    curate.probe(c["a"], judge=everything)
    assert any(line["p_t"] + line["p_v"] for line in read(tmp_path / "a").values())
    lines = curate.probe(c["b"], judge=Answers(None))
    waiting = [id for id, line in lines.items() if "unjudged" in line]
    assert waiting and all("p_t" not in lines[id] for id in waiting)
    assert "no verdict from the judge: 1 x no server" in capsys.readouterr().out
    curate.cut(c["b"])
    summary = json.load(open(tmp_path / "b" / "select.json"))
    assert summary["tables"]["all"]["all"]["unjudged"] == len(waiting) and set(
        summary["named"]
    ) == set(waiting)
    monkeypatch.setattr(curate, "generate", None)
    with pytest.raises(ValueError, match="go together"):  # not by the rule under the judge's name
        curate.probe(c["b"])
    curate.probe(c["b"], judge=Answers(None))
    assert [id for id, line in read(tmp_path / "b").items() if "unjudged" in line] == waiting
    curate.probe(c["b"], judge=everything)
    assert (tmp_path / "b" / "probe.jsonl").read_bytes() == (
        tmp_path / "a" / "probe.jsonl"
    ).read_bytes()


# ------------------------------------------------------------------------------------------- select


def test_cut_writes_the_records_as_they_came(world, probed, tmp_path, capsys):
    """Breaks if a chosen record is changed or out of order, or the tables do not add up to the
    pool.
    """
    for name in ("probe.jsonl", "settings.json"):
        shutil.copy(os.path.join(probed, name), tmp_path)
    records = {r["id"]: r for r in map(json.loads, open(world["test"]))}
    rows = [json.loads(line) for line in open(tmp_path / "probe.jsonl")]
    for i, row in enumerate(rows):  # hand-made counts; the sixth was never probed
        row.update(p_t=i % 2, p_v=[2, 2, 1, 0, 2, 2, 2, 1][i])
    (tmp_path / "probe.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for i, r in enumerate(rows) if i != 5)
    )
    c = config(world, tmp_path, part="select", k=2, max_p_t=0, min_gain=1)
    curate.cut(c)
    chosen = [json.loads(line) for line in open(tmp_path / "selected.jsonl")]
    best = sorted(
        (rows[i]["id"] for i in (0, 4, 6)), key=lambda id: hashlib.sha256(id.encode()).hexdigest()
    )[:2]
    assert [r["id"] for r in chosen] == best and all(r == records[r["id"]] for r in chosen)
    summary = json.load(open(tmp_path / "select.json"))
    assert summary["chosen"] == best and summary["n"] == 2
    assert summary["tables"]["all"]["all"] == {
        "chosen": 2,
        "beyond K": 2,
        "p_t too high": 3,
        "missing": 1,
    }
    assert (
        summary["tables"]["gain"]["2"] == {"chosen": 2, "beyond K": 1}
        and "-1" in summary["tables"]["gain"]
    )
    for by in ("category", "future frames", "gain"):
        assert sum(n for count in summary["tables"][by].values() for n in count.values()) == 8
    assert summary["tables"]["future frames"].keys() == {"1", "2", "3"}
    assert (tmp_path / "select.txt").read_text() in capsys.readouterr().out
    assert (tmp_path / "select.png").stat().st_size > 5000


@pytest.mark.parametrize("kind, written", [("json", "jsonl"), ("parquet", "parquet")])
def test_cut_keeps_the_records(world, probed, tmp_path, kind, written):
    """Breaks if the records of a list or of a parquet pool come back as something else."""
    records = [json.loads(line) for line in open(world["test"])]
    data = os.path.join(os.path.dirname(world["test"]), f"pool.{kind}")
    if kind == "json":
        json.dump(records, open(data, "w"))
    else:
        pyarrow = pytest.importorskip("pyarrow.parquet")
        import pyarrow as pa

        pyarrow.write_table(pa.Table.from_pylist(records), data)
    for name in ("probe.jsonl", "settings.json"):
        shutil.copy(os.path.join(probed, name), tmp_path)
    c = config(world, tmp_path, data=data, max_p_t=2, min_gain=0, k=3)
    chosen = curate.cut(c)
    assert (
        formats.read_records(str(tmp_path / f"selected.{written}")) == chosen and len(chosen) == 3
    )
    assert all(r in formats.read_records(data) for r in chosen)
