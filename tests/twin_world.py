"""What the tests against tests/twin.py share: pictures, records, a tiny model, a comparison."""

import contextlib
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from toy import tiny

SINGLE = torch.float32

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
    model.double().save_pretrained(folder)  # read as fp32, but `in_double`
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
    """Inside, what is called fp32 is float64, so that rounding cannot hide a difference."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(SINGLE)


# ------------------------------------------------------------------------------ a model that varies


# after a word (left) come words with these probabilities; what is left is spread at random
CHAIN = {
    "assistant": {"<reason>": 0.3, "<|latent_start|>": 0.35, "<answer>": 0.3},
    "<reason>": {"moves": 0.5, "hits": 0.45},
    "moves": {"left": 0.5, "right": 0.45},
    "left": {"left": 0.55, "</reason>": 0.4},  # repeats itself
    "right": {"</reason>": 0.95},
    "hits": {"red": 0.5, "blue": 0.45},
    "</reason>": {"<|latent_start|>": 0.55, "<answer>": 0.42},
    "<|latent_start|>": {"<|latent_end|>": 0.4, "red": 0.2},  # in a span: does it stop?
    "<|latent_end|>": {"<reason>": 0.6, "<|latent_start|>": 0.25, "<answer>": 0.1},
    "<answer>": {"red": 0.5, "blue": 0.3, "green": 0.12, "up": 0.05},
    "red": {"</answer>": 0.75, "</reason>": 0.2},
    "blue": {"</answer>": 0.7, "</reason>": 0.2},
    "green": {"</answer>": 0.9},
    "up": {"</answer>": 0.9},
    "</answer>": {"<|im_end|>": 0.97},
}


def speak(model, tokenizer, chain=CHAIN, context=0.25, seed=5):
    """Change a random model so that it speaks as a chain says, moved a little by what it sees.

    Embeddings are orthogonal, so an output layer can hold the table. The layers are made quiet:
    `context` times as loud. A latent head turns the states a little.
    """
    generator = torch.Generator().manual_seed(seed)
    E, out = model.get_input_embeddings().weight, model.lm_head.weight  # (V, D)
    V, D = E.shape
    assert V <= D
    torch.nn.init.orthogonal_(E, gain=D**0.5, generator=generator)
    p = torch.rand(V, V, generator=generator) + 0.1  # no two words as likely: top-p would waver
    p /= p.sum(1, keepdim=True)
    for word, after in chain.items():
        row = p[tokenizer.convert_tokens_to_ids(word)]
        row *= 1 - sum(after.values())
        for following, share in after.items():
            row[tokenizer.convert_tokens_to_ids(following)] += share
    out.copy_(p.log().T @ E / D)
    for layer in model.model.language_model.layers:
        layer.self_attn.o_proj.weight.mul_(context)
        layer.mlp.down_proj.weight.mul_(context)
    model.add_latent_head()
    model.latent_head.weight.add_(torch.randn(D, D, generator=generator) * 0.5 / D**0.5)
    model.latent_head.bias.copy_(torch.randn(D, generator=generator) * 0.1)


def records_with_futures(folder, n=8):
    """Questions with options and one to three future frames, two about each clip; in a file.

    A frame is one, two or four latents.
    """
    sizes = [(32, 32), (32, 64), (64, 64)]
    seen = [picture(folder, f"seen{i}.png", *sizes[i % 3], i) for i in range(n // 2)]
    future = [picture(folder, f"next{i}.png", *sizes[i % 3], 50 + i) for i in range(n)]
    records = []
    for i in range(n):
        frames = [future[(i + k) % n] for k in range(1 + i % 3)]
        answer = ("red", "green", "blue")[i % 3]
        record = dict(id=f"row {i}", video="none.mp4", question=f"which {'wall ' * (i % 3)}next ?")
        record.update(answer="hits <rimage> " * len(frames) + f"<ans>{answer}</ans>")
        record.update(question_images_index=[1], question_images=[seen[i // 2]])
        record.update(reasoning_images_index=[2] * len(frames), reasoning_images=frames)
        records.append(dict(record, options=["red", "green", "blue", "up"]))
    return write_records(os.path.join(folder, "rows.json"), records)


# ------------------------------------------------------------------------ what happens during a run


@contextlib.contextmanager
def recorded_numbers():
    """Yields {seed of a generator: the uniform numbers (rows, T) that were drawn with it}."""
    draw, parts, numbers = torch.rand, {}, {}

    def rand(*size, generator=None, **kwargs):
        u = draw(*size, generator=generator, **kwargs)
        if generator is not None:
            seed = generator.initial_seed()
            parts.setdefault(seed, []).append(u.clone())
            numbers[seed] = torch.cat(parts[seed], 1)
        return u

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        yield numbers


class Judge:
    """Answers yes, no, nothing, no, yes, no, and so on, whatever is asked."""

    VERDICTS = (True, False, None, False, True, False)

    def __init__(self):
        self.asked, self.failures = [], Counter()

    def __call__(self, items):  # (question, gold, answer) each
        first = len(self.asked)
        self.asked += items
        return [self.VERDICTS[i % 6] for i in range(first, len(self.asked))]
