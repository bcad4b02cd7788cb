"""The training loop: order, resume, what cannot be read, what is refused. The equations and whole
steps are compared with a second definition in test_twin_sft.py, two ranks in test_twin_ranks.py.
"""

import dataclasses
import math
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from test_model import ROWS, make_batch

import sft
from common.folder import checkpoints
from common.run import read_lines
from tests.conftest import changed_rows
from toy import tiny

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SMALL = dict(tiny.settings("sft"), global_batch=8, micro_batch=4, workers=0)


def settings(world, out, cls=sft.Config, **more):
    own = dict(model=world["model"], data=world["data"], out=str(out), steps=4)
    return cls(**{**SMALL, **own, **more})


def weights(checkpoint):
    return load_file(os.path.join(checkpoint, "model.safetensors"))


def read_log(out):
    return read_lines(os.path.join(out, "log.jsonl"))


def test_batch_without_latents(model, tokenizer):
    """Breaks if a text-only batch gives NaN, or leaves the head without a gradient (DDP would
    hang).
    """
    model.add_latent_head()
    batch = make_batch(tokenizer, ROWS["images"])
    got = sft.sft_loss(model, **batch, labels=batch["input_ids"], latent_var=2.0, stop_term=True)
    assert got["n_latent"] == got["latent"] == 0 and got["loss"] == got["ce"] > 0
    got["loss"].backward()
    assert not model.latent_head.weight.grad.any() and not model.latent_head.bias.grad.any()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_the_samples_of_a_step(world_size):
    """Breaks if the number of ranks changes what a step sees, or how often a rank runs forward."""
    order = sft.sample_order(10, 32, seed=3)
    plans = [list(sft.micro_batches(order, 1, 4, 8, 2, r, world_size)) for r in range(world_size)]
    (count,) = {len(plan) // 3 for plan in plans}  # micro-batches a step, the same on all ranks
    for step in range(3):
        parts = [plan[step * count : (step + 1) * count] for plan in plans]
        seen = [i for part in parts for batch in part for i in batch]
        assert sorted(seen) == sorted(order[8 * (step + 1) : 8 * (step + 2)])


def assert_resumes(train, config):
    """A straight run of 4 steps, and one resumed after 2, have the same weights and log lines."""
    straight = train(config)
    other = config.out + "_resumed"
    shutil.copytree(config.out, other)
    shutil.rmtree(os.path.join(other, "step_000004"))
    resumed = train(dataclasses.replace(config, out=other, resume=True))
    a, b, half = map(weights, (straight, resumed, os.path.join(config.out, "step_000002")))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], half[k]) for k in a)
    states = [
        torch.load(os.path.join(done, "trainer", "rank_0.pt"), weights_only=True)["random"]
        for done in (straight, resumed)
    ]
    for name, state in states[0].items():  # whoever draws next draws the same
        other_state = states[1][name]
        assert torch.equal(state, other_state) if name == "torch" else state == other_state, name
    lines = [
        [{name: line[name] for name in line if "seconds" not in name} for line in read_log(out)]
        for out in (config.out, other)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4


def test_a_straight_run_equals_a_resumed_one_bit_for_bit(world, tmp_path):
    """Breaks if anything that decides the weights is missing from the checkpoint: order, Adam
    state, step.
    """
    assert_resumes(sft.train, settings(world, tmp_path / "a", save_every=2))
    assert os.path.getsize(tmp_path / "a" / "loss.png") > 5000


def test_killed_while_saving_leaves_the_older_checkpoint(world, tmp_path, monkeypatch):
    """Breaks if a half-written checkpoint can be taken for a whole one."""
    real = torch.save

    def dies(what, path, *rest):
        if what.get("step") == 4 and "optimizer" in what:
            with open(path, "wb") as f:
                f.write(b"half")
            raise KeyboardInterrupt
        return real(what, path, *rest)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(KeyboardInterrupt):
        sft.train(settings(world, tmp_path, save_every=2))
    monkeypatch.undo()
    assert [os.path.basename(p) for p in checkpoints(str(tmp_path))] == ["step_000002"]
    done = sft.train(settings(world, tmp_path, save_every=2, resume=True))
    assert done.endswith("step_000004") and len(read_log(tmp_path)) == 4


def test_resume_of_a_finished_run_does_nothing_and_a_used_folder_is_refused(world, tmp_path):
    """Breaks if a second run in the same folder overwrites the first, or other settings are
    resumed silently.
    """
    done = sft.train(settings(world, tmp_path, steps=1))
    before = os.stat(os.path.join(done, "model.safetensors")).st_mtime_ns
    assert sft.train(settings(world, tmp_path, steps=1, resume=True)) == done
    assert os.stat(os.path.join(done, "model.safetensors")).st_mtime_ns == before
    with pytest.raises(SystemExit, match="already holds step_000001"):
        sft.train(settings(world, tmp_path, steps=1))
    with pytest.raises(SystemExit, match="other values of lam"):
        sft.train(settings(world, tmp_path, steps=1, lam=0.7, resume=True))


def test_bad_settings_are_refused(world, tmp_path):
    """Breaks if a run without data, or a setting without meaning, goes on."""
    with pytest.raises(SystemExit, match="--data is missing"):
        sft.train(settings(world, tmp_path, data=""))
    with pytest.raises(SystemExit, match="nothing to train on: 24 rows, 0.0 epochs"):
        sft.train(settings(world, tmp_path, steps=0, epochs=0.0))
    with pytest.raises(ValueError, match="expected mse or nmse"):
        settings(world, tmp_path, latent_loss="l1")
    with pytest.raises(ValueError, match="micro_batch is 0, expected at least 1"):
        settings(world, tmp_path, micro_batch=0)


def test_a_step_without_a_readable_sample_ends_the_run(world, tmp_path):
    """Breaks if a wrong media_root trains for hours on nothing."""
    with pytest.raises(SystemExit, match="no sample of step 0 could be used, e.g. .*no such file"):
        sft.train(settings(world, tmp_path / "a", media_root=str(tmp_path), latent_loss="mse"))
    with pytest.raises(SystemExit, match="none of the first 64 samples"):
        sft.train(settings(world, tmp_path / "b", media_root=str(tmp_path)))


def test_a_later_step_without_a_readable_sample_is_logged_and_skipped(world, tmp_path, capsys):
    """Breaks if rotten clips in the middle of a run, or where it is resumed, end it, or are lost
    without a name.
    """
    order = sft.sample_order(24, 4, 0)
    rotten = order[1], order[2]
    missing = dict(video="clips/missing.mp4")
    data = changed_rows(world, "rotten.jsonl", lambda i, row: i in rotten and row.update(missing))
    more = dict(data=data, global_batch=1, micro_batch=1, save_every=2, seed=0)
    for resume in (False, True):
        done = sft.train(settings(world, tmp_path, **more, resume=resume))
        log = read_log(tmp_path)
        assert "step 2: no sample could be used, no update" in capsys.readouterr().out
        assert [line["update_skipped"] for line in log] == [False, True, True, False]
        assert log[2]["ce"] is None and log[2]["skipped"][0][0] == f"{data}:{order[2]}"
        shutil.rmtree(done)  # step 2 is now the first one


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_logged(world, tmp_path, monkeypatch):
    """Breaks if a NaN reaches the weights."""
    real = sft.batch_sums
    monkeypatch.setattr(sft, "batch_sums", lambda *a: [x * math.nan for x in real(*a)])
    done = sft.train(settings(world, tmp_path, steps=1))
    a, b = weights(world["model"]), weights(done)
    assert all(torch.equal(a[k], b[k]) for k in a) and read_log(tmp_path)[0]["update_skipped"]
