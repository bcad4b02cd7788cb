"""Plumbing of a run: random state, the guard of its folder."""

import dataclasses
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_sft import settings

import evaluate
import sft
from common import judge
from common.cli import parse_config
from common.folder import checkpoints, model_fingerprint
from common.formats import Clip, Frame, Row
from common.run import fingerprint, random_state, set_random_state
from tests.conftest import changed_rows
from variants import pause_tokens, self_forcing

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

LEAVES = """
import atexit, os, sys
sys.path.insert(0, {root!r})
from common.machine import leave, set_up_ranks
rank, _, _ = set_up_ranks()
atexit.register(os.abort)  # what gloo's threads do when the interpreter is taken down
print(f"done {{rank}} ", end="")  # one piece: two ranks share the screen
leave()
"""


def draws():
    return [random.random(), random.gauss(0, 1), *np.random.standard_normal(3), *torch.rand(3)]


def test_random_state_goes_through_a_file_without_pickled_objects(tmp_path):
    """Breaks if one generator is forgotten, or a checkpoint can only be read by running code."""
    np.random.standard_normal(1)  # numpy and Python keep the second half of a pair of normals
    random.gauss(0, 1)
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draws()
    assert draws() != expected
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draws() == expected


@pytest.mark.parametrize(
    "change",
    [
        dict(id="other"),
        dict(answer="other"),
        dict(options=["a", "c"]),
        dict(prompt=["see", Frame("a.mp4", 3), Clip("c.mp4", 1.0)]),
        dict(response=["so", Frame(b"PNG other", 0)]),
    ],
    ids=lambda change: next(iter(change)),
)
def test_fingerprint_sees_each_part_of_a_row(change):
    """Breaks if a run is continued on rows of which something that is trained on has changed."""
    prompt, response = ["see", Frame("a.mp4", 3), Clip("c.mp4")], ["so", Frame(b"PNG", 0)]
    row = Row("f.json:0", "r", prompt, response, "b", "what ?", ["a", "b"])
    assert fingerprint([row]) == fingerprint([dataclasses.replace(row, where="moved.json:0")])
    assert fingerprint([row]) != fingerprint([dataclasses.replace(row, **change)])
    assert fingerprint([row, row]) != fingerprint([row])


def test_a_run_goes_on_with_the_same_rows_and_the_same_script_only(world, tmp_path):
    """Breaks if other rows under the same ids, or another script's run, are continued silently."""
    config = settings(world, tmp_path / "a", steps=1)
    sft.train(config)
    again = dataclasses.replace(config, resume=True)
    data = changed_rows(world, "other.jsonl", lambda i, r: i == 5 and r.update(answer="other"))
    with pytest.raises(SystemExit, match="was trained on other rows"):
        sft.train(dataclasses.replace(again, data=data))
    forced = settings(world, tmp_path / "a", self_forcing.Config, steps=1, resume=True)
    with pytest.raises(SystemExit, match="other values of self_forcing, self_forcing_from, "):
        self_forcing.train(forced)
    with pytest.raises(SystemExit, match="other values of steps; to train it further, start anot"):
        sft.train(dataclasses.replace(again, steps=2))
    assert len(checkpoints(tmp_path / "a")) == 1
    # a variant with the same fields
    sft.train(settings(world, tmp_path / "c", lam=0.0, steps=1))
    pause = settings(world, tmp_path / "c", pause_tokens.Config, lam=0.0, steps=1, resume=True)
    with pytest.raises(SystemExit, match="trained 'latent', not 'pause'"):
        pause_tokens.train(pause)


LOCKED = """
import sys, time
sys.path.insert(0, {root!r})
from common.run import lock
kept = lock({folder!r})
print("locked", flush=True)
time.sleep(60)
"""


def test_a_folder_belongs_to_one_process(world, tmp_path):
    """Breaks if two processes can write into one run's folder, or a killed one keeps it."""
    folder = str(tmp_path / "a")
    program = LOCKED.format(root=ROOT, folder=folder)
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    config = settings(world, folder, steps=1)
    with pytest.raises(SystemExit, match="another process is running in this folder"):
        sft.train(config)
    other.kill()
    other.wait()
    sft.train(config)


class FakeTracker:
    """wandb's or trackio's three functions, and what they were given."""

    def __init__(self):
        self.started, self.lines, self.finished = None, [], 0

    def init(self, **how):
        self.started = how

    def log(self, line, step):
        self.lines.append((step, line["step"]))

    def finish(self):
        self.finished += 1


def test_a_tracker_gets_the_run(world, tmp_path, monkeypatch):
    """Breaks if the run's name, the project or the step is lost, or a resume opens another run."""
    tracker, name = FakeTracker(), "wandb"
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    sft.train(settings(world, tmp_path / "the_run", steps=2, track=name))
    how = tracker.started
    assert (how["project"], how["name"], how["resume"]) == ("mine", "the_run", "allow")
    assert how["config"]["steps"] == 2 and how["id"] == "the_run"
    assert tracker.lines == [(0, 0), (1, 1)] and tracker.finished == 1
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"--track {name}: pip install {name}"):
        sft.train(settings(world, tmp_path / "b", steps=1, track=name))
    with pytest.raises(SystemExit, match="--track is 'paper', expected wandb or trackio"):
        sft.train(settings(world, tmp_path / "c", steps=1, track="paper"))


def test_ranks_leave_together_and_before_the_interpreter_is_taken_down(tmp_path):
    """Breaks if a run that is done can still fail at its exit, or its last words are lost."""
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES.format(root=ROOT))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([*launch, script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "done 0" in done.stdout and "done 1" in done.stdout


def test_flags_with_hyphens():
    """Breaks if --max-new-tokens is refused, or a value with hyphens is changed."""
    flags = ["--max-new-tokens", "9", "--no-cuda-graph", "--data", "a-b/c-d", "--out=x-y"]
    config = parse_config(evaluate.Config, flags)
    assert config.max_new_tokens == 9 and not config.cuda_graph
    assert (config.data, config.out) == ("a-b/c-d", "x-y")
    url = "--no-a-b"
    assert parse_config(judge.Config, ["--no-images", f"--url={url}"]).url == url


def test_what_a_model_folder_holds(tmp_path):
    """Breaks if other weights, another config or another file of weights goes unnoticed, or what is
    not weights counts.
    """
    weights, config = tmp_path / "model-1.safetensors", tmp_path / "config.json"
    content = random.Random(0).randbytes(3 * 2**20)
    weights.write_bytes(content)
    config.write_text("{}")
    before = model_fingerprint(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model_fingerprint(str(tmp_path)) == before

    changed = [b"x" + content[1:], content[:-1] + b"x", content[: 2**20] + content[2**20 + 1 :]]
    prints = {before}
    for other in changed:
        weights.write_bytes(other)
        prints.add(model_fingerprint(str(tmp_path)))
    config.write_text('{"a": 1}')
    prints.add(model_fingerprint(str(tmp_path)))
    os.rename(weights, tmp_path / "model-2.safetensors")
    prints.add(model_fingerprint(str(tmp_path)))
    assert len(prints) == 6
    with pytest.raises(SystemExit, match="nowhere: no model there"):
        model_fingerprint(str(tmp_path / "nowhere"))
