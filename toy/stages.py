"""Trainings side by side: each stage a process of its own, on one core, its words in a log file.

A stage begins when those that it waits for are done. Stages are begun in their order, so those that
others wait longest for come first. On the screen is one line: which stages run, and the time that
is likely left. What a stage makes does not depend on what runs beside it. Source: ours.
"""

import importlib
import multiprocessing
import os
import sys
import time
from typing import NamedTuple


class Stage(NamedTuple):
    """One process."""

    name: str
    after: tuple  # names of the stages that it waits for
    seconds: float  # that it is likely to take, on one core
    call: tuple  # what it does: a function by its module and name, and its arguments


class Running(NamedTuple):
    """A stage that has begun."""

    stage: Stage
    process: multiprocessing.Process
    began: float
    log: str


def run_stages(stages, logs, cores):
    """Run each Stage, `cores` at a time, its output in LOGS/name.txt.

    Raises SystemExit with the end of its log if a stage fails; the others are ended.
    """
    os.makedirs(logs, exist_ok=True)
    waiting, running, spent, began = list(stages), [], {}, time.time()
    line, context = Line(), one_thread_each(stages)
    try:
        while waiting or running:
            for job in [job for job in running if job.process.exitcode is not None]:
                check(job)
                running.remove(job)
                spent[job.stage.name] = time.time() - job.began
            for stage in ready(waiting, spent)[: cores - len(running)]:
                waiting.remove(stage)
                running.append(begin(stage, context, logs))
            line.show(describe(stages, running, waiting, spent, began, cores))
            time.sleep(0.3)
    finally:
        for job in running:
            job.process.terminate()
            job.process.join()
    line.close(f"{len(stages)} stages in {clock(time.time() - began)}; their words are in {logs}")


def one_thread_each(stages):
    """Where processes come from: a server that has imported what they call, on one thread."""
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(sorted({stage.call[0] for stage in stages}))
    return context


def ready(waiting, done):
    """The stages that wait for nothing any more, in their order."""
    return [stage for stage in waiting if set(stage.after) <= set(done)]


def begin(stage, context, logs):
    """Start a stage's process -> Running."""
    log = os.path.join(logs, f"{stage.name}.txt")
    process = context.Process(target=work, args=(log, *stage.call))
    process.start()
    return Running(stage, process, time.time(), log)


def work(log, module, function, *arguments):
    """What a stage's process does: all that is said goes to the log, also from within libraries."""
    f = open(log, "w", buffering=1)  # stays open: a traceback comes after this function
    os.dup2(f.fileno(), 1)
    os.dup2(f.fileno(), 2)
    sys.stdout = sys.stderr = f
    getattr(importlib.import_module(module), function)(*arguments)


def check(job):
    """Raise SystemExit if a stage that has ended has failed."""
    if job.process.exitcode == 0:
        return
    with open(job.log, errors="replace") as f:
        end = "\n".join(f.read().replace("\r", "\n").splitlines()[-15:])
    raise SystemExit(f"stage {job.stage.name} failed; the end of {job.log}:\n{end}")


# ----------------------------------------------------------------------------------------- progress


def describe(stages, running, waiting, spent, began, cores):
    """The line that is shown, as text."""
    names = ", ".join(job.stage.name for job in running)
    left = time_left(running, waiting, spent, stages, cores)
    passed = clock(time.time() - began)
    return f"{len(spent)} of {len(stages)} stages done · {names} · {passed} · ~{clock(left)} left"


def time_left(running, waiting, spent, stages, cores):
    """Seconds that are likely left: the rest of the plan, played through at the speed so far."""
    planned = {stage.name: stage.seconds for stage in stages}
    speed = sum(spent.values()) / sum(planned[name] for name in spent) if spent else 1.0
    ends = {}  # of each stage, seconds from now; 0 = done
    for job in running:
        rest = job.stage.seconds * speed - (time.time() - job.began)
        ends[job.stage.name] = max(rest, 2.0)
    free = sorted([*ends.values(), *[0.0] * (cores - len(ends))])  # when each core is free
    for stage in waiting:
        earliest = max([free[0], *(ends.get(name, 0.0) for name in stage.after)])
        ends[stage.name] = earliest + stage.seconds * speed
        free = sorted([*free[1:], ends[stage.name]])
    return max(ends.values(), default=0.0)


def clock(seconds):
    """Seconds -> minutes and seconds, as text."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02}"


class Line:
    """One line of a terminal, written again and again; elsewhere, a line whenever stages change."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.last = ""

    def show(self, text):
        if self.stream.isatty():
            self.stream.write(f"\r\x1b[K{text}")
        elif text.split(" · ")[:2] != self.last.split(" · ")[:2]:
            self.stream.write(f"{text}\n")
        self.stream.flush()
        self.last = text

    def close(self, text):
        self.stream.write(f"\r\x1b[K{text}\n" if self.stream.isatty() else f"{text}\n")
        self.stream.flush()
