"""Plumbing of a run: random state, the guard of its folder."""

import dataclasses
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_sft import settings

import sft
from common.folder import checkpoints, model_fingerprint
from common.formats import Clip, Frame, Row
from common.run import fingerprint, random_state, set_random_state
from tests.conftest import ROOT, changed_rows
from variants import pause_tokens, self_forcing


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


def test_fingerprint_sees_each_part_of_a_row():
    """Breaks if a run is continued on rows of which something that is trained on has changed."""
    prompt, response = ["see", Frame("a.mp4", 3), Clip("c.mp4")], ["so", Frame(b"PNG", 0)]
    row = Row("f.json:0", "r", prompt, response, "b", "what ?", ["a", "b"])
    changes = [dict(id="other"), dict(answer="other"), dict(options=["a", "c"])]
    changes += [dict(prompt=["see", Frame("a.mp4", 3), Clip("c.mp4", 1.0)])]
    changes += [dict(response=["so", Frame(b"PNG other", 0)])]
    others = [[dataclasses.replace(row, **change)] for change in changes]
    assert len({fingerprint(rows) for rows in ([row], [row, row], *others)}) == 2 + len(changes)
    assert fingerprint([row]) == fingerprint([dataclasses.replace(row, where="moved.json:0")])


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


def test_a_tracker_gets_the_run(world, tmp_path, monkeypatch):
    """Breaks if the run's name, the project or the step is lost, or a resume opens another run."""
    name, started, logged, ended = "wandb", {}, [], []
    tracker = SimpleNamespace(init=lambda **how: started.update(how))
    tracker.log = lambda line, step: logged.append((step, line["step"]))
    tracker.finish = lambda: ended.append(len(logged))
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    sft.train(settings(world, tmp_path / "the_run", steps=2, track=name))
    config = started.pop("config")
    assert started == dict(project="mine", name="the_run", id="the_run", resume="allow")
    assert config["steps"] == 2 and logged == [(0, 0), (1, 1)] and ended == [2]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"--track {name}: pip install {name}"):
        sft.train(settings(world, tmp_path / "b", steps=1, track=name))
    with pytest.raises(SystemExit, match="--track is 'paper', expected wandb or trackio"):
        sft.train(settings(world, tmp_path / "c", steps=1, track="paper"))


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
