"""Two processes train as one does: the same saved weights, with DDP and with --shard."""

import dataclasses
import json
import os

import pytest
import test_twin_la_dapo
import test_twin_sft
from safetensors.torch import load_file
from twin_world import disagreement, in_double

import la_dapo
import sft
from tests.conftest import ROOT, run_python

RUNS = """
import json, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import la_dapo, sft
from common.machine import leave
from twin_world import in_double
scripts = dict(sft=sft, la_dapo=la_dapo)
with in_double():
    for name, config in json.loads(sys.argv[1]):
        scripts[name].train(scripts[name].Config(**config))
leave()
"""

sft_world, rl_world = test_twin_sft.world, test_twin_la_dapo.world


def on_two_ranks(folder, configs):
    """Trainings, one after another, on two processes."""
    script = folder / "runs.py"
    script.write_text(RUNS.format(paths=[ROOT, f"{ROOT}/tests"]))
    runs = [(type(config).__module__, vars(config)) for config in configs]
    run_python([script, json.dumps(runs)], processes=2)


@pytest.mark.slow
def test_two_ranks_train_as_one(sft_world, rl_world, tmp_path):
    """Breaks if ranks see other samples or numbers than one process, count a step's tokens each for
    itself, or add up gradients wrongly: seven samples a step are four and three, five groups are
    three and two, in minibatches that one rank may have no part in.
    """
    options = dict(latent_loss="nmse", latent_head="linear", stop_term=True)
    fine_tuned = sft.Config(**sft_world, **test_twin_sft.SETTINGS, **options)
    learnt = la_dapo.Config(**rl_world, **test_twin_la_dapo.SETTINGS)
    exact = dataclasses.replace(learnt, **test_twin_la_dapo.EXACT, filter=False, rollout_batch=2)
    runs = dict(sft=(fine_tuned, True), rl=(learnt, True), exact=(exact, False))

    one, two = {}, {}
    for name, (config, can_shard) in runs.items():
        script = dict(sft=sft, la_dapo=la_dapo)[type(config).__module__]
        config = dataclasses.replace(config, out=str(tmp_path / name))
        with in_double():
            one[name] = script.train(config), config.model
        two[name, "ddp"] = dataclasses.replace(config, out=str(tmp_path / f"{name}_ddp"))
        if can_shard:
            out = str(tmp_path / f"{name}_shard")
            two[name, "shard"] = dataclasses.replace(config, out=out, shard=True)
    on_two_ranks(tmp_path, two.values())

    for (name, kind), config in two.items():
        checkpoint, start = one[name]
        ours = os.path.join(config.out, os.path.basename(checkpoint))
        expected = load_file(os.path.join(checkpoint, "model.safetensors"))
        ratio = disagreement(start, ours, expected)
        print(f"{name} on two ranks, {kind}: {ratio:.1e}")
        assert ratio < 1e-9, (name, kind)
