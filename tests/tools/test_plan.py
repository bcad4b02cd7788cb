"""The plan of memory against what real models have and what small ones are measured to take."""

import pytest
import torch

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


@pytest.fixture
def small(monkeypatch):
    """Six layers that weigh about as much as the head: a plan that forgets either is found out."""
    vision = shapes.SHAPES["tiny"].vision | dict(out_hidden_size=256)
    text = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8)
    monkeypatch.setitem(shapes.SHAPES, "small", shapes.Shape(text, vision, tied=True))


class Inputs(plan.Config):
    """The plan's sizes under the names that `shapes.prompt` reads."""

    images = 1

    @property
    def words(self):
        return self.prompt_tokens - 258


def sft_step(model, config):
    """-> a function that runs the forward and backward of one sample, in bf16 autocast."""
    batch = shapes.prompt(config, 1, "cpu", length=config.sft_tokens)
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][:, -config.sft_words :] = 5
    step = Step(model, SFTConfig())

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            ce, latent = step(batch)
        (ce + latent).backward()

    return run


def rl_update(model, config):
    """-> a function that runs the forward and backward of one group, in bf16 autocast."""
    batch = shapes.prompt(config, 1, "cpu")
    rollout = shapes.random_group(config, model.config.text_config.hidden_size, "cpu")
    advantages = torch.randn(config.n, 1)

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            loss = (advantages * replay(model, batch, rollout, 0.9).logprobs).mean()
        loss.backward()

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


def test_peak_of_live_tensors():
    """Breaks if what was freed still counts, or what is there at the same time does not."""

    def step():
        first = torch.ones(1000, 1000)
        second = first + 1
        del first
        return second + 1

    assert peak_of(step) == pytest.approx(8e6, rel=0.01)


def test_the_plan_adds_up(capsys):
    """Breaks if ranks, the reference or --zero do not enter a peak, or a card is named that is too
    small.
    """
    config = plan.Config(shape="8b", gpus=8)
    layouts = plan.main(config)
    counts = shapes.weights("8b")
    ddp, zero = layouts["DDP"], layouts["DDP --zero"]
    saved = 8 * counts.trained * 7 / 8
    for name in ("peak, SFT", "peak, LA-DAPO, checkpointing"):
        assert ddp[name] - zero[name] == pytest.approx(saved)
    rest = 16 * counts.trained + 4 * (counts.total - counts.trained)
    activations = ddp["activations, LA-DAPO"]
    assert ddp["peak, LA-DAPO"] == pytest.approx(rest + 2 * counts.total + activations)
    assert plan.fits(0.9 * 80e9) == "80" and plan.fits(0.91 * 80e9) == "141"
    assert plan.fits(140e9) == "none"
    assert "not measured on a GPU" in capsys.readouterr().out
