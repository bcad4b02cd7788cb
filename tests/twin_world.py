"""What the tests against tests/twin.py share: pictures, records, a tiny model, a comparison."""

import contextlib
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from toy import tiny

COLOURS = ("red", "green", "blue", "up")
WORDS = (
    "system user assistant watch the ball which wall does it hit next ? moves right left down hits "
    "Later frames of same clip: A) B) C) D) "
) + " ".join(COLOURS)


def picture(folder, name, height, width, seed):
    """A PNG of coloured stripes and noise -> its path."""
    rng = np.random.default_rng(seed)
    stripes = rng.integers(0, 256, (height // 8, 1, 3)).repeat(8, 0).repeat(width, 1)
    grain = rng.integers(-20, 20, (height, width, 3))
    path = os.path.join(folder, name)
    Image.fromarray(np.clip(stripes + grain, 0, 255).astype(np.uint8)).save(path)
    return path


def save_model(folder, seed, hidden=32, change=lambda model, tokenizer: None):
    """A tiny random model, changed by `change` -> its folder."""
    tokenizer = tiny.make_tokenizer([WORDS])
    model = tiny.make_model(tokenizer, seed, hidden)
    with torch.no_grad():
        change(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_records(path, records):
    with open(path, "w") as f:
        json.dump(records, f)
    return str(path)


def read_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def disagreement(start, ours, twin):
    """The largest difference between two trainings' weights over the largest movement.

    start: the folder where both began; ours: the folder saved by the script; twin: {name: weight}.
    A weight that the start lacks (a new latent head) began as the identity and zeros.
    """
    before = load_file(os.path.join(start, "model.safetensors"))
    after = load_file(os.path.join(ours, "model.safetensors"))
    assert set(after) == set(twin)
    difference = movement = 0.0
    for name, w in after.items():
        new = torch.eye(len(w)) if w.ndim == 2 else torch.zeros(len(w)) if w.ndim == 1 else None
        movement = max(movement, (w - before.get(name, new)).abs().max().item())
        difference = max(difference, (w - twin[name]).abs().max().item())
    assert movement > 0
    return difference / movement


@contextlib.contextmanager
def in_double():
    """Inside, everything is computed in float64: weights, norms, and what is else cast to fp32."""
    load = PreTrainedModel.from_pretrained.__func__

    def load_wide(cls, *args, **kwargs):
        return load(cls, *args, **{**kwargs, "dtype": torch.float64})

    def norm(self, x):  # transformers' own computes in fp32 whatever comes in
        mean_square = x.square().mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(mean_square + self.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(load_wide))
        patch.setattr(Qwen3VLTextRMSNorm, "forward", norm)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
