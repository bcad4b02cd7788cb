"""The walk of docs/data.md: twenty clips to a report, by the commands that stand there."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest


def cpu_seconds():
    """Of all processes that were started here and are done."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_twenty_clips_to_a_report(tmp_path):
    """Breaks if a command of the walk does, or needs more than is said there; if the five take five
    minutes of CPU time; if a row is lost on the way, or the small model does not imagine.
    """
    with open("docs/data.md") as f:
        page = f.read()
    (walk,) = re.findall(r"```sh\n(.*?)```", page, re.S)
    world = " ".join(re.search(r"`(python -m toy\.world .*?)`", page, re.S)[1].split())
    path = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]

    def run(command):
        command = re.sub(r"(?<=[ ,])(runs/)?my\b", rf"{tmp_path}/\g<0>", command)
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        done = subprocess.run(command, shell=True, env={**os.environ, "PATH": path}, **pipes)
        assert done.returncode == 0, done.stdout[-3000:]

    run(world)
    n, n_test = (
        len((tmp_path / "my" / f"{name}.jsonl").read_text().splitlines())
        for name in ("train", "test")
    )
    began, commands = cpu_seconds(), walk.splitlines()
    for command in commands:
        run(command)
    assert len(commands) == 5 and cpu_seconds() - began < 300
    runs = tmp_path / "runs" / "my"
    assert len((runs / "curate" / "probe.jsonl").read_text().splitlines()) == n
    summary = json.loads((runs / "eval" / "summary.json").read_text())
    assert summary["found"] == summary["total"] == n_test
    assert summary["scores"]["all"]["spans"] > 0
    assert (runs / "eval" / "report.html").stat().st_size > 10_000
