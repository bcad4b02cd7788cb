"""Stages beside each other: their order, their limit, what a failing one does, the time left."""

import io
import time

import pytest

from toy import __main__ as demo
from toy import seed, stages
from toy.stages import Running, Stage


def said(name, *after, call=("builtins", "print", "done")):
    return Stage(name, after, 1, call)


def test_stages_wait_for_each_other_and_share_the_cores(tmp_path):
    """Breaks if a stage begins before what it needs, more run than there are cores, or what they
    say is lost.
    """
    # each writes when it began and when it ended
    script = "import sys,time; print(time.time()); time.sleep(.4); print(time.time())"
    call = "builtins", "exec", script
    plan = [said("a", call=call), said("b", "a", call=call), said("c", call=call)]
    plan.append(said("d", "b", "c", call=call))
    stages.run_stages(plan, str(tmp_path / "logs"), cores=2)
    times = {}
    for name in "abcd":
        times[name] = [float(t) for t in (tmp_path / "logs" / f"{name}.txt").read_text().split()]
    assert times["a"][1] <= times["b"][0] and times["d"][0] >= max(times["b"][1], times["c"][1])
    assert times["c"][0] < times["a"][1]  # beside each other
    for began, _ in times.values():
        assert sum(a <= began <= b for a, b in times.values()) <= 2


def test_a_stage_that_fails_ends_the_run(tmp_path):
    """Breaks if a failure is not told with the end of its log, or the others run on."""
    began = time.time()
    plan = [said("good"), said("bad", "good", call=("builtins", "int", "one"))]
    plan.append(said("slow", call=("time", "sleep", 60)))
    with pytest.raises(SystemExit, match=r"(?s)stage bad failed.*bad.txt.*invalid literal"):
        stages.run_stages(plan, str(tmp_path), cores=2)
    assert time.time() - began < 40
    assert (tmp_path / "good.txt").read_text() == "done\n"


def test_time_left_by_hand(monkeypatch):
    """Breaks if the plan is not played through: a took twice as long as planned, so all will."""
    plan = [Stage("a", (), 5, ()), Stage("b", ("a",), 10, ()), Stage("c", ("a",), 4, ())]
    plan += [Stage("d", ("b", "c"), 3, ()), Stage("e", (), 1, ())]
    monkeypatch.setattr(stages.time, "time", lambda: 106.0)
    running = [Running(plan[1], None, 100.0, "")]  # b: 20 - 6 = 14 left
    left = stages.time_left(running, plan[2:], {"a": 10.0}, plan, cores=2)
    assert left == pytest.approx(14 + 6)  # c (8) and e (2) beside b, d after b
    assert stages.time_left([], plan[2:], {"a": 10.0}, plan, 1) == pytest.approx(8 + 6 + 2)
    assert stages.clock(601.4) == "10:01"


def test_one_line_on_a_terminal_and_few_elsewhere():
    """Breaks if a log file is filled with progress, or a terminal is scrolled."""
    for tty, written in ((True, 3), (False, 2)):
        stream = io.StringIO()
        stream.isatty = lambda tty=tty: tty
        line = stages.Line(stream)
        for text in ("0 of 2 · a · 0:01", "0 of 2 · a · 0:02", "1 of 2 · b · 0:03"):
            line.show(text)
        assert stream.getvalue().count(" of 2 ") == written
        assert stream.getvalue().count("\n") == (0 if tty else 2)


def test_the_demos_stages(tmp_path):
    """Breaks if a stage waits for one that is not there or comes later, or the serial run knows a
    stage that this does not.
    """
    config = demo.Config(out=str(tmp_path))
    plan, done, called = demo.stages_of(demo.trainings(config), config), set(), []
    for stage in plan:
        assert set(stage.after) <= done | {"painter"}, stage.name
        done.add(stage.name)
        module, function, settings, *call = stage.call
        assert (module, function) == ("toy.seed", "run_stage")
        assert demo.Config(**settings) == config
        called.append(tuple(call))
    assert "painter" in done

    # what the serial run calls, in the same words
    words = []

    class Spy(seed.Seed):
        def __init__(self, *arguments):
            pass

        def __getattribute__(self, name):
            answer = (("folder", 0.1), {}) if name == "curate" else {}
            return lambda *arguments: words.append((name, *arguments)) or answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(seed, "Seed", Spy)
        demo.run_seed(0, config, {}, demo.trainings(config))
    within = {("score", "latent"), ("score", "la-dapo")}  # of ablate and of draw
    assert (set(words) | {("paint",)}) - within == set(called)
