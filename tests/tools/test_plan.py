"""The plan of memory against what real models have and what small ones are measured to take."""

import json
import os
import subprocess
import sys

import pytest
import torch
from common.checkpoint import make_optimizer
from common.shard import Whole, shard

from common.lora import add_adapters
from latent_decode import replay
from sft import Config as SFTConfig
from sft import Step
from tools import plan, shapes
from tools.live import peak_of


@pytest.mark.parametrize("shape", ["2b", "4b", "8b", "tiny"])
def test_weights_are_those_of_the_model(shape):
    """Breaks if a matrix, a bias or a tied layer is counted wrongly: all of them, exactly."""
    model = shapes.make(shape, device="meta")
    model.model.visual.requires_grad_(False)
    counts = shapes.weights(shape)
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = model.model.language_model.layers
    matrices = [p.numel() for p in layers.parameters() if p.ndim == 2]
    assert counts.matrices == sum(matrices) == counts.layer * len(layers)


VISION = shapes.SHAPES["tiny"].vision | dict(out_hidden_size=256)
TEXT = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8)
SMALL = shapes.Shape(TEXT, VISION, tied=True)


@pytest.fixture
def small(monkeypatch):
    """Six layers that weigh about as much as the head: a plan that forgets either is found out."""
    monkeypatch.setitem(shapes.SHAPES, "small", SMALL)


class Inputs(plan.Config):
    """The plan's sizes under the names that `shapes.prompt` reads."""

    images = 1

    @property
    def words(self):
        return self.prompt_tokens - 258


def plain(module, model):
    return module


def sft_step(model, config, wrap=plain):
    """-> a function that runs the forward and backward of one sample, in bf16 autocast."""
    batch = shapes.prompt(config, 1, "cpu", length=config.sft_tokens)
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -config.sft_words :] = 5
    step = wrap(Step(model, SFTConfig()), model)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            ce, latent = step(batch)
        (ce + latent).backward()

    return run


def rl_update(model, config, wrap=plain):
    """-> a function that runs the forward and backward of one group, in bf16 autocast."""
    batch = shapes.prompt(config, 1, "cpu")
    rollout = shapes.random_group(config, model.config.text_config.hidden_size, "cpu")
    advantages, trained = torch.randn(config.n, 1), wrap(Whole(model), model)

    def loss(model):
        return (advantages * replay(model, batch, rollout, 0.9).logprobs).mean()

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            value = trained(loss)
        value.backward()

    return run


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("make_step, sizes", [
    (sft_step, dict(prompt_tokens=300, sft_tokens=1500, sft_words=32)),  # most of it: the layers
    (sft_step, dict(prompt_tokens=300, sft_tokens=500, sft_words=200)),  # most of it: the logits
    (rl_update, dict(prompt_tokens=1000, n=4, new_tokens=64)),
])  # fmt: skip
def test_the_formula_is_what_is_measured(make_step, sizes, checkpointing, small):
    """Breaks if an activation, a copy or a gradient in passing is missing, by more than 15 %.

    Weights and gradients are exact, so only what comes on top of them is compared.
    """
    config = Inputs(shape="small", gpus=1, **sizes)
    model = shapes.make("small").train()
    model.model.visual.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = make_step(model, config)
    step()  # gradients are there from now on
    forward = (plan.sft_forward if make_step is sft_step else plan.rl_forward)(config)
    copies = 2 * shapes.weights("small").matrices
    planned = plan.activations("small", forward, checkpointing, copies)
    assert planned == pytest.approx(peak_of(step), rel=0.15)


# words enough that their logits outweigh the fp32 head that _Fp32Product makes on a CPU alone
ADAPTED = [
    (sft_step, dict(prompt_tokens=300, sft_tokens=1500, sft_words=200), False),
    (rl_update, dict(prompt_tokens=1000, n=4, new_tokens=64), True),
]


@pytest.mark.slow
@pytest.mark.parametrize("make_step, sizes, checkpointing", ADAPTED)
def test_the_formula_of_adapters_is_what_is_measured(make_step, sizes, checkpointing, small):
    """Breaks if the frozen matrices are planned with gradients or copies, or adapters with none."""
    config = Inputs(shape="small", gpus=1, **sizes)
    model = add_adapters(shapes.make("small", dtype=torch.bfloat16), 8).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    step = make_step(model, config)
    step()
    forward = (plan.sft_forward if make_step is sft_step else plan.rl_forward)(config)
    planned = plan.activations("small", forward, checkpointing, copies=0, trained=False)
    assert planned == pytest.approx(peak_of(step), rel=0.15)


# sizes at which the sum of the gradients, of which gloo makes a copy of its own, is not the peak
IN_PARTS = [
    ("sft", dict(prompt_tokens=300, sft_tokens=1500, sft_words=32), False),
    ("rl", dict(prompt_tokens=1000, n=4, new_tokens=64), True),
]

MEASURE = """
import json, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import test_plan
from common.machine import leave, set_up_ranks
rank, _, _ = set_up_ranks()
measured = test_plan.measure_in_parts()
if rank == 0:
    print("measured", json.dumps(measured))
leave()
"""


def measure_in_parts():
    """On each of two ranks -> for each of IN_PARTS: the planned peak and the measured one; and for
    all: bytes of weights, gradients and Adam.
    """
    shapes.SHAPES["small"], results = SMALL, []
    for name, sizes, checkpointing in IN_PARTS:
        config = Inputs(shape="small", gpus=2, **sizes)
        model = shapes.make("small").train()
        model.model.visual.requires_grad_(False)
        if checkpointing:
            once_more = dict(use_reentrant=False)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=once_more)
        make_step = sft_step if name == "sft" else rl_update
        step = make_step(model, config, lambda module, model: shard(module, model, bf16=True))
        step()
        forward = (plan.sft_forward if name == "sft" else plan.rl_forward)(config)
        planned = plan.sharded_activations("small", forward, checkpointing, 2)
        results.append([planned, peak_of(step)])
    optimizer, trained = make_optimizer(model, SFTConfig())
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values() if x.ndim]
    state = [*model.parameters(), *(p.grad for p in trained), *moments]
    return results, sum(x.to_local().nbytes for x in state)


@pytest.mark.slow
def test_the_formula_in_parts_is_what_is_measured(small, tmp_path):
    """Breaks if what is gathered, or a gradient on its way, is missing from the plan of --shard by
    more than 15 %; or if a rank keeps more than its part.
    """
    folder = os.path.dirname(os.path.abspath(__file__))
    tests = os.path.dirname(folder)
    script = tmp_path / "measure.py"
    script.write_text(MEASURE.format(paths=[os.path.dirname(tests), tests, folder]))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    run = subprocess.run(
        [*launch, str(script)], env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    results, state = json.loads(run.stdout.partition("measured ")[2].splitlines()[0])
    for planned, measured in results:
        assert planned == pytest.approx(measured, rel=0.15)
    parts = plan.layouts(plan.Config(shape="small", gpus=2))[1]
    assert parts.name == "--shard"
    assert parts.weights + parts.gradients + parts.optimizer == pytest.approx(state, rel=0.01)


def test_peak_of_live_tensors():
    """Breaks if what was freed still counts, or what is there at the same time does not."""

    def step():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return second + 1

    assert peak_of(step) == pytest.approx(8e6, rel=0.01)


def test_the_plan_adds_up(capsys):
    """Breaks if ranks, the reference or the copy to roll out with do not enter a peak, a card is
    named that is too small, or an 8B's LA-DAPO no longer fits cards of 80 GB.
    """
    config = plan.Config(shape="8b", gpus=8)
    layouts = plan.main(config)
    counts = shapes.weights("8b")
    ddp, parts = layouts["DDP"], layouts["--shard"]
    rest = 16 * counts.trained + 4 * (counts.total - counts.trained)
    for layout, share in ((ddp, 1), (parts, 1 / 8)):
        activations = layout["activations, LA-DAPO"]
        whole = layout["peak, LA-DAPO"] - activations
        assert whole == pytest.approx(share * (rest + 2 * counts.total))
        assert layout["peak, SFT"] - layout["activations, SFT"] == pytest.approx(share * rest)
    assert plan.fits(parts["peak, LA-DAPO, checkpointing"]) == "80"
    assert plan.fits(0.9 * 80e9) == "80" and plan.fits(0.91 * 80e9) == "141"
    assert plan.fits(140e9) == "none"
    assert "not measured on a GPU" in capsys.readouterr().out

    # a word after a word: the peak is then while rollouts are made, before there are gradients
    long = plan.Config(shape="8b", gpus=8, prompt_tokens=1, n=2, new_tokens=1)
    parts = plan.parts_of(plan.layouts(long)[1], long)
    state = (12 * counts.trained + 6 * counts.total) / 8
    rollout = state - 4 * counts.trained / 8 + 2 * counts.total + parts["caches"]
    assert parts["peak, LA-DAPO, checkpointing"] == pytest.approx(rollout)
