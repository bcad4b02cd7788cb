"""Weights in parts, and adapters, over two processes: the training is that of one process."""

import dataclasses
import functools
import json
import math
import os
import shutil

import pytest
import torch
from test_la_dapo import apart, loud  # noqa: F401  a fixture
from test_la_dapo import settings as rl_settings
from test_sft import read_log, settings, weights
from transformers import Qwen3VLForConditionalGeneration

import la_dapo
import sft
from common import machine
from tests.conftest import ROOT, changed_rows, run_python
from variants import self_forcing

# A first step of AdamW is a sign. With this eps it is a smooth function of the gradient.
SMOOTH = functools.partial(torch.optim.AdamW, eps=0.1)

RUNS = """
import functools, json, shutil, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
torch.optim.AdamW = functools.partial(torch.optim.AdamW, eps=0.1)
import la_dapo, sft, test_machine
from common.machine import leave, set_up_ranks
rank, _, _ = set_up_ranks()
for name, what in json.loads(sys.argv[1]):
    if name == "undo":  # the last checkpoint of a run
        if rank == 0:
            shutil.rmtree(what + "/step_000002")
        torch.distributed.barrier()
    elif name == "parts":
        test_machine.parts_of_a_model(what)
    elif name == "uneven":  # from here on
        la_dapo.roll_out = test_machine.uneven
    elif name == "bf16":  # from here on, where it is asked for
        sft.Machine = la_dapo.Machine = test_machine.Narrow
    else:
        script = dict(sft=sft, la_dapo=la_dapo)[name]
        script.train(script.Config(**what))
leave()
"""


def on_two_ranks(folder, *runs):
    """One thing after another on two ranks: trainings, ("sft" or "la_dapo", config), and more."""
    script = folder / "runs.py"
    script.write_text(RUNS.format(paths=[ROOT, f"{ROOT}/tests", f"{ROOT}/tests/common"]))
    runs = [(name, what if isinstance(what, str) else vars(what)) for name, what in runs]
    run_python([script, json.dumps(runs)], processes=2)


def uneven(model, tokenizer, samples, k, config, roll_out=la_dapo.roll_out):
    """`la_dapo.roll_out`, but of two ranks the second has rollouts ten times as long."""
    n = config.max_new_tokens * (10 if k % 2 else 1)
    return roll_out(model, tokenizer, samples, k, dataclasses.replace(config, max_new_tokens=n))


class Narrow(machine.Machine):
    """A CPU that computes in bf16 as CUDA does."""

    def __init__(self, bf16=True, shard=False):
        super().__init__(bf16, shard)
        self.bf16 = bf16


def parts_of_a_model(folder):
    """On each rank: half the bytes of a training's state; bf16 arithmetic is that of autocast."""
    from common.machine import Calls, set_up_ranks, shard, whole, whole_copy, whole_weights
    from model import load

    device = set_up_ranks()[2]
    ids = torch.arange(40, device=device)[None] % 7 + 150

    def loss(model):
        with torch.autocast(device.type, torch.bfloat16):
            return model.logits(model.hidden(ids)[0]).log_softmax(-1)[..., 160].mean()

    (plain, _), (model, _) = load(folder), load(folder)
    plain.to(device)
    expected = loss(plain)
    expected.backward()
    run = shard(Calls(model), model, bf16=True)
    assert not [p for p in model.parameters() if p.dtype != torch.float32]  # what is kept
    got = run(loss)
    got.backward()  # the mean over two ranks, whose halves are equal
    assert abs(got - expected) < 2e-3 * abs(expected)
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        if p.grad is not None and "language_model" in name:
            assert (whole(q.grad) - p.grad).norm() < 0.03 * p.grad.norm(), name

    trained = list(model.parameters())
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    state = [*model.parameters(), *(p.grad for p in trained if p.grad is not None), *moments]
    own = sum(x.to_local().nbytes for x in state)
    assert 0.45 < own / sum(x.nbytes for x in state) < 0.55

    # to decode with: the weights as they are now, in bf16; what is saved is fp32
    copy = whole_copy(model, bf16=True)
    for (name, x), y in zip(whole_weights(model).items(), copy.state_dict().values()):
        assert torch.equal(x.bfloat16(), y), name
    before, after = loss(copy).item(), run(loss).item()
    assert abs(before - after) < 1e-3 * abs(before) and after != got.item()


# in fp32 on GPUs, too (`make gpus`), where NCCL takes gloo's place
SFT = dict(bf16=False, steps=2, global_batch=5, micro_batch=2, save_every=1, lr=1e-2)
RL = dict(steps=2, groups=3, rollout_batch=1, kl=0.05, minibatches=2, micro_batch=1, lr=1e-3)
RL |= dict(bf16=False, adjoint_terms=0, save_every=1)


@pytest.fixture(scope="module")
def trained(world, loud, tmp_path_factory):  # noqa: F811
    """A folder of runs: "one" of a process that has all weights, the others of two with parts.

    Five samples a step on two ranks: three and two, so the last micro-batch of the second rank is
    empty, without pictures. Three groups a step in two minibatches: two and one. Held out: five
    rows, again three and two.
    """
    folder = tmp_path_factory.mktemp("trained")
    five = changed_rows(dict(data=world["test"]), "five.jsonl", lambda i, row: None, 5)
    held_out, checkpointing = dict(eval_data=five), dict(gradient_checkpointing=True)

    def sft_run(name, **more):
        return settings(world, folder / "sft" / name, **{**SFT, **held_out, **more})

    def rl_run(name, **more):
        return rl_settings(world, loud, folder / "rl" / name, **{**RL, **held_out, **more})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", SMOOTH)
        sft.train(sft_run("one"))
        sft.train(sft_run("one_vision", freeze_vision=False))
        sft.train(sft_run("one_lora", lora_rank=3, latent_head=""))
        la_dapo.train(rl_run("one"))
        la_dapo.train(rl_run("one_lora", lora_rank=3))
        with pytest.MonkeyPatch.context() as longer:
            longer.setattr(la_dapo, "roll_out", uneven)
            la_dapo.train(rl_run("one_uneven"))
        for kind in ("sft", "rl"):
            shutil.copytree(folder / kind / "one", folder / kind / "goes_on")
            shutil.rmtree(folder / kind / "goes_on" / "step_000002")
        on_two_ranks(
            folder,
            ("sft", sft_run("two", shard=True)),
            ("sft", sft_run("two_ddp")),
            ("sft", sft_run("two_vision", shard=True, freeze_vision=False)),
            ("sft", sft_run("two_vision_ddp", freeze_vision=False)),
            ("sft", sft_run("stock", bf16=True, shard=True, latent_head="", **checkpointing)),
            ("sft", sft_run("goes_on", shard=True, resume=True)),
            ("la_dapo", rl_run("two", shard=True, **checkpointing)),
            ("la_dapo", rl_run("goes_on", shard=True, resume=True)),
            ("sft", sft_run("again", shard=True)),
            ("undo", str(folder / "sft" / "again")),
            ("sft", sft_run("again", shard=True, resume=True)),
            ("parts", world["model"]),
            ("sft", sft_run("two_lora", lora_rank=3, latent_head="")),
            ("la_dapo", rl_run("two_lora", lora_rank=3)),
            ("la_dapo", rl_run("two_ddp")),
            ("bf16", ""),
            ("la_dapo", rl_run("two_bf16", bf16=True, shard=True, minibatches=1)),
            ("uneven", ""),
            ("la_dapo", rl_run("two_uneven", shard=True)),
            ("la_dapo", rl_run("two_uneven_ddp")),
        )
        shutil.copytree(folder / "sft" / "two", folder / "sft" / "alone")
        shutil.rmtree(folder / "sft" / "alone" / "step_000002")
        sft.train(sft_run("alone", resume=True))
    return folder


def assert_same(one, two, *figures):
    """The same weights after two steps, which moved them far more; the same lines in the log."""
    a, b = (weights(run / "step_000002") for run in (one, two))
    moved = apart(a, weights(one / "step_000001"))
    assert a.keys() == b.keys() and moved > 1e-4 and apart(a, b) < 1e-3 * moved
    for x, y in zip(read_log(one), read_log(two)):
        for name in figures:
            assert x[name] == pytest.approx(y[name], rel=1e-4, abs=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "two_ddp", "goes_on", "again", "alone"])
def test_sft_in_parts_is_sft(trained, name):
    """Breaks if gradients are averaged once too often or not at all, a rank without pictures or
    samples hangs, or the optimizer's state does not come back: on as many ranks, on more, on fewer.
    """
    figures = ("ce", "latent", "grad_norm", "eval_ce", "eval_latent")
    assert_same(trained / "sft" / "one", trained / "sft" / name, *figures)
    if name == "again" and not torch.cuda.is_available():  # as many ranks: to the bit
        a, b = (weights(trained / "sft" / run / "step_000002") for run in ("two", name))
        assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_vision", "two_vision_ddp"])
def test_a_vision_tower_that_is_trained_in_parts(trained, name):
    """Breaks if a rank without pictures takes no part in the gradients of the vision tower."""
    assert_same(trained / "sft" / "one_vision", trained / "sft" / name, "ce", "grad_norm")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two", "two_ddp", "goes_on"])
def test_la_dapo_in_parts_is_la_dapo(trained, name):
    """Breaks if ranks with fewer groups hang or change the update, if the rollouts are made with
    other weights, or if the reference is not what it was. With checkpointing.
    """
    figures = ("total", "ratio", "kl", "entropy", "grad_norm", "length", "groups")
    figures += ("replay_rms", "eval_accuracy")
    assert_same(trained / "rl" / "one", trained / "rl" / name, *figures)
    log = read_log(trained / "rl" / "two")
    assert log[1]["kl"] > 0 and log[0]["updates"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two_uneven", "two_uneven_ddp"])
def test_a_rank_whose_rollouts_are_ten_times_longer(trained, name):
    """Breaks if a rank that is ready first does not wait, or its few tokens count for more."""
    one = trained / "rl" / "one_uneven"
    assert_same(one, trained / "rl" / name, "total", "kl", "grad_norm", "length")
    assert read_log(one)[1]["length"] > 4 * read_log(trained / "rl" / "one")[1]["length"]


@pytest.mark.slow
def test_la_dapo_in_parts_in_bf16(trained):
    """Breaks if policy and reference, both in parts, do not round equally, if what decodes rounds
    otherwise than what learns by more than its kernels do, or if bf16 is what is saved.
    """
    first, second = read_log(trained / "rl" / "two_bf16")
    assert first["kl"] == 0 < second["kl"] and first["groups"] == 3
    assert 1e-4 < first["replay_rms"] < 0.03
    before, after = (weights(trained / "rl" / "two_bf16" / f"step_00000{i}") for i in (1, 2))
    assert all(x.dtype == torch.float32 for x in after.values()) and apart(before, after) > 1e-5
    assert any(not torch.equal(x, x.bfloat16().float()) for x in after.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_adapters_on_two_ranks(trained, kind):
    """Breaks if ranks begin with other adapters, or do not add up their gradients."""
    assert_same(trained / kind / "one_lora", trained / kind / "two_lora", "grad_norm")


@pytest.mark.slow
def test_what_is_saved_in_parts_is_a_stock_folder(trained):
    """Breaks if a part, or a name that FSDP gave, ends up in a checkpoint."""
    folder = trained / "sft" / "stock" / "step_000002"
    _, info = Qwen3VLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    state = torch.load(folder / "trainer" / "trainer.pt", weights_only=True)["optimizer"]
    saved = weights(folder)
    assert all(math.isfinite(line["grad_norm"]) for line in read_log(trained / "sft" / "stock"))
    assert len(state) > 20 and all(state[k]["exp_avg"].shape == saved[k].shape for k in state)


def test_the_device_is_chosen_before_the_ranks_meet(monkeypatch):
    """Breaks if NCCL has to guess which GPU a rank has."""
    order = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", order.append)
    monkeypatch.setattr(
        machine.dist, "init_process_group", lambda *name, **how: order.append((*name, how))
    )
    device = machine.set_up_ranks()[2]
    assert order[0] == device == torch.device("cuda", 3)
    assert order[1][0] == "nccl" and order[1][1]["device_id"] == device


def test_tests_hide_the_gpu(pytestconfig):
    """Breaks if a machine's GPU takes part in tests whose tolerances are those of fp32."""
    if pytestconfig.option.markexpr != "cuda":
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_what_does_not_go_with_shard_is_refused():
    """Breaks if ranks would wait for each other for ever."""
    with pytest.raises(ValueError, match="adjoint_terms"):
        la_dapo.Config(shard=True, adjoint_terms=1)
    with pytest.raises(ValueError, match="shard"):
        self_forcing.Config(shard=True)
    config = sft.Config(shard=True)
    assert not dataclasses.replace(config, shard=False).shard
