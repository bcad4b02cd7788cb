"""The code of docs/contributing.md does what the page says, and a reward without a weight is told.

Changes of files are applied as a reader would: what begins with " " or "-" is there once, and is
replaced by what begins with " " or "+".
"""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import types

import pytest
import torch
from test_la_dapo import log_of, loud, settings, wide_rollout

import la_dapo
import rewards
from tests.conftest import ROOT

loud = loud  # the fixture
with open(os.path.join(ROOT, "docs", "contributing.md")) as f:
    PAGE = f.read()


@pytest.fixture(scope="module")
def gspo():
    """The page's fork of la_dapo.py as a module."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    module = types.ModuleType("gspo")
    sys.modules["gspo"] = module  # dataclasses look there
    exec(compile(code, "gspo.py", "exec"), module.__dict__)
    yield module
    del sys.modules["gspo"]


def test_gspo_by_hand(gspo, model, tokenizer):
    """Breaks if the ratio is not a response's, if responses weigh by their length, or one that
    stands for two counts once. The policy has moved by a known distance at each token.
    """
    prompts, rollout = wide_rollout(model, tokenizer)  # 2 prompts, 6 rollouts each
    R, T = rollout.tokens.shape
    moved = 0.3 * torch.sin(torch.arange(R * T)).view(R, T) * rollout.sampled
    before = dataclasses.replace(rollout, logprobs=rollout.logprobs - moved)
    prompt_of, times = torch.arange(R) // 6, torch.ones(R, 1, dtype=torch.long)
    A, times[3] = torch.linspace(-2, 2, R)[:, None], 2
    batch = la_dapo.Batch(prompts, before, prompt_of, A, times)
    config = gspo.Config(temperature=0.9, eps_low=0.02, eps_high=0.05)
    loss, figures = gspo.policy_loss(model, batch, la_dapo.Counts(10**6, R + 1, 2), config)

    total, ratio, clipped = 0.0, 0.0, set()
    for i in range(R):
        distances = [moved[i, t].item() for t in range(T) if rollout.sampled[i, t]]
        s, a = math.exp(sum(distances) / len(distances)), A[i].item()
        inside = min(max(s, 0.98), 1.05)
        clipped.add(-inside * a > -s * a)
        total += times[i].item() * max(-s * a, -inside * a) / (R + 1)
        ratio += times[i].item() * s / (R + 1)
    assert clipped == {True, False}
    assert loss.item() == pytest.approx(total, abs=1e-4)
    assert figures["sequence_ratio"].item() == pytest.approx(ratio, abs=1e-4)


def test_gspo_trains(gspo, world, loud, tmp_path):
    """Breaks if the page's script does not run as it stands, or its own figure is not logged."""
    more = {k: v for k, v in vars(settings(world, loud, tmp_path)).items()}
    config = gspo.Config(**dict(more, steps=1, minibatches=2, lr=1e-7, kl=0.0))
    la_dapo.train(config, gspo.policy_loss)
    (line,) = log_of(tmp_path)
    assert line["sequence_ratio"] == pytest.approx(1, abs=1e-3) and line["updates"] == 2
    assert "ratio" not in line and config.label == "GSPO"


def apply(diff, folder):
    """Apply the page's changes to the files in a folder."""
    for part in re.split(r"^# (?=\S+\.py\n)", diff, flags=re.M)[1:]:
        name, _, changes = part.partition("\n")
        text = (folder / name).read_text()
        for change in changes.split("...\n"):
            lines = change.splitlines()
            old = "\n".join(line[1:] for line in lines if line[:1] != "+")
            new = "\n".join(line[1:] for line in lines if line[:1] != "-")
            assert text.count(old) == 1, f"{name}: {old}"
            text = text.replace(old, new)
        (folder / name).write_text(text)


def test_the_future_reward_trains(world, loud, tmp_path):
    """Breaks if the page's changes do not fit the files, if the reward is not logged and paid, or
    what is compared is not the true future.
    """
    (diff,) = re.findall(r"```diff\n(.*?)```", PAGE, re.S)
    for name in os.listdir(ROOT):
        if name.endswith(".py"):
            shutil.copy(os.path.join(ROOT, name), tmp_path)
    os.symlink(os.path.join(ROOT, "common"), tmp_path / "common")
    apply(diff, tmp_path)
    out = {}
    for weight in (0.0, 2.0):
        config = settings(world, loud, tmp_path / f"{weight}", steps=1, rollout_batch=4)
        flags = json.dumps(dict(vars(config), lambda_f=weight))
        command = "import sys, json, la_dapo; from common.machine import leave\n"
        command += "la_dapo.train(la_dapo.Config(**json.loads(sys.argv[1]))); leave()"
        done = subprocess.run(
            [sys.executable, "-c", command, flags], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        (out[weight],) = log_of(tmp_path / f"{weight}")
    line, paid = out.values()
    assert line["future"] == pytest.approx(paid["future"]) and line["future_std"] > 0
    assert paid["total"] == pytest.approx(line["total"] + 2 * line["future"], abs=1e-5)
    assert "correct_std" not in line and "unjudged_std" not in line
    rollouts = (tmp_path / "0.0" / "rollouts_0.jsonl").read_text().splitlines()
    assert all(-1 <= json.loads(rollout)["future"] <= 1 for rollout in rollouts)


@dataclasses.dataclass
class Forked(la_dapo.Config):
    lambda_s: float = 0.5


@pytest.mark.parametrize(
    "config, table, message",
    [
        (Forked(), {}, "lambda_s weighs no reward"),
        (la_dapo.Config(), dict(steps="lambda_s"), "'steps' is weighed by lambda_s, which is no f"),
        (Forked(), dict(steps="lambda_s"), "rewards .'contrastive', 'diversity'., but WEIGHTS has"),
        (Forked(), dict(length="lambda_s"), "'length' is the name of another figure"),
        (Forked(), dict(total="lambda_s"), "'total' is the name of another figure"),
    ],
)
def test_a_reward_without_a_weight_is_told_at_the_start(config, table, message, monkeypatch):
    """Breaks if a weight is accepted and does nothing, or a reward overwrites a figure."""
    monkeypatch.setattr(rewards, "WEIGHTS", rewards.WEIGHTS | table)
    with pytest.raises(ValueError, match=message):
        la_dapo.train(dataclasses.replace(config, model="none", data="none"))


def test_the_names_of_the_log(world, loud, tmp_path):
    """Breaks if a figure of the log has a name that a reward may take."""
    la_dapo.train(settings(world, loud, tmp_path, steps=1))
    (line,) = log_of(tmp_path)
    of_rewards = {*rewards.WEIGHTS, *rewards.OF_WORDS}
    of_rewards |= {f"{name}_std" for name in of_rewards}
    assert set(line) - of_rewards == la_dapo.OWN - of_rewards
