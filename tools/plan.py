"""How much memory a training takes on each GPU, by formula: before one rents.

    python -m tools.plan --shape 8b --gpus 8
    python -m tools.plan --shape 2b --gpus 1 --prompt_tokens 2000 --new_tokens 512

Bytes are those of this code: weights, gradients and Adam in fp32, arithmetic in bf16 autocast, each
prompt once. Three ways to keep them: DDP, all on each rank; --shard, a part on each; --lora_rank,
a frozen model in bf16 on each. Not counted: CUDA's context, kernels' workspaces, fragments (leave a
tenth), and the vision tower's passing activations. tests/tools/test_plan.py holds the formulas
against measured peaks of live tensors. Source: ours.

Axis letters: D hidden, F intermediate, Q and K widths of all query and all key heads, V vocabulary,
L layers, N tokens of a row, T new tokens, P prompt tokens, G rollouts.
"""

import dataclasses
from typing import NamedTuple

from common.cli import run_script
from latent_decode import CHUNK, LOGITS
from tools.shapes import SHAPES, weights, widths

CARDS = (24, 80, 141)  # GB
USABLE = 0.9  # of a card


@dataclasses.dataclass
class Config:
    shape: str = "8b"  # 2b | 4b | 8b: those of Qwen3-VL
    gpus: int = 8  # ranks
    prompt_tokens: int = 4000  # words and visual tokens of a prompt
    n: int = 8  # rollouts of a prompt  # paper Table 9
    new_tokens: int = 2048  # of each rollout: the longest there can be
    sft_tokens: int = 4300  # of a sample of SFT
    sft_words: int = 300  # of these, words that carry a label
    lora_rank: int = 64  # of all matrices of the language model

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}, expected one of {', '.join(SHAPES)}")


# ------------------------------------------------------------------------- activations of a forward


def of_a_layer(w, tokens):
    """What the backward of a layer needs, in bytes: everything it was computed from."""
    norms = 2 * (4 + 4) * w.D  # fp32: what comes in, and divided by its deviation
    inputs = 5 * 2 * w.D  # q, k, v, gate, up: autocast makes a bf16 copy each
    heads = (4 + 2 + 2) * (w.Q + w.K) + 2 * w.K  # q and k: before and after their norm, rotated; v
    output = 2 * 2 * w.Q  # of attention, and put back in order
    mlp = 4 * 2 * w.F  # gate, its SiLU, up, their product
    return tokens * (norms + inputs + heads + output + mlp)


def of_a_group(w, c):
    """What the attention of a prompt's rollouts keeps besides: queries, and each row's keys."""
    queries = c.n * c.new_tokens * 2 * w.Q
    return queries + c.n * (c.prompt_tokens + c.new_tokens) * 2 * 2 * w.K


class Forward(NamedTuple):
    """One micro-batch, in bytes where nothing else is said."""

    tokens: int  # of the row
    layer: int  # what the backward of one layer needs
    words: int  # whose logits are in memory at a time
    pieces: int  # how many times


def sft_forward(c):
    return Forward(c.sft_tokens, of_a_layer(widths(c.shape), c.sft_tokens), c.sft_words, 1)


def rl_forward(c):
    w, chosen = widths(c.shape), c.n * c.new_tokens
    tokens = c.prompt_tokens + chosen
    layer = of_a_layer(w, tokens) + of_a_group(w, c)
    return Forward(tokens, layer, min(chosen, LOGITS), -(-chosen // LOGITS))


def activations(shape, forward, checkpointing, copies, trained=True):
    """The peak of a forward and backward, in bytes, without weights and gradients.

    copies: the bf16 copies of weights, as long as the forward or its graph. trained: whether the
    matrices have gradients (not so with LoRA).
    """
    w, (_, _, tied, vocabulary) = widths(shape), SHAPES[shape]
    head = vocabulary * w.D * trained
    kept = forward.tokens * 3 * 4 * w.D  # embeddings, last states, their order

    # at the head: fp32 log-probabilities and two gradients of a piece, the weights in bf16; then
    # their gradient in bf16 and fp32, that of the pieces before waiting
    piece = forward.words * vocabulary * 12 + 2 * head
    waiting = 4 * head if forward.pieces > 1 else 0
    top = waiting + max(piece, 6 * head)

    # at the embeddings: their gradient, beside that of the head where both are one
    bottom = (8 if tied else 4) * head
    if not checkpointing:
        return max(kept + copies + w.L * forward.layer + top, bottom)

    # within a layer: made again, with its weights in bf16, their gradients and those of the MLP
    passing = forward.tokens * (8 * w.D + 4 * w.F) + 6 * w.D * w.F * trained
    within = forward.layer + passing + copies // w.L + (4 * head if tied else 0)
    kept += w.L * forward.tokens * 4 * w.D
    return max(kept + max(copies + piece, top, within), bottom)


def sharded_activations(shape, forward, checkpointing, gpus):
    """`activations` with --shard, and what is gathered meanwhile in bf16 (common/shard.py)."""
    w, counts = widths(shape), weights(shape)
    layer, head, words = counts.layer, counts.head, counts.words
    root = 2 * (counts.vision + words)  # there as long as the graph
    kept = root + forward.tokens * 3 * 4 * w.D

    # at the head: as above, but the weights are bf16 as they are, and so is their gradient
    waiting = 2 * head if forward.pieces > 1 else 0
    top = waiting + max(forward.words * SHAPES[shape].vocabulary * 12, 2 * head)

    # within a layer: two are gathered, one of them through a buffer; its gradient, and that once
    # more in fp32 to be added up; the gradient of the head waits
    within = (2 * 2 + 2 + 2 + 4) * layer + 2 * head
    if checkpointing:
        kept += w.L * forward.tokens * 4 * w.D
        within += forward.layer + forward.tokens * (8 * w.D + 4 * w.F)
    else:
        kept += w.L * forward.layer

    # at the end the root's gradients are added up in fp32, of which a part is this rank's
    bottom = (2 + 4 + 4 / gpus) * words
    return max(kept + max(top, within), bottom)


def caches(c):
    """Keys and values while a prompt's rollouts are decoded, in bytes.

    The prompt's once, its keys at first in fp32. Each row's own cache doubles as it grows; the old
    one is there until the new one is filled.
    """
    w, room = widths(c.shape), CHUNK
    while room < c.new_tokens:
        room *= 2
    return w.L * w.K * (6 * c.prompt_tokens + 4 * c.n * (room + room // 2))


# ----------------------------------------------------------------------------------------- the plan


class Layout(NamedTuple):
    """How weights are kept on each GPU, in bytes; `copies` as in `activations`."""

    name: str
    weights: float
    gradients: float
    optimizer: float
    reference: float  # the KL's, bf16
    copies: float  # bf16
    to_roll_out: float  # bf16 weights that are there while rollouts are made
    trained: bool = True

    def activations(self, forward, checkpointing, c):
        if self.name == "--shard":
            return sharded_activations(c.shape, forward, checkpointing, c.gpus)
        return activations(c.shape, forward, checkpointing, self.copies, self.trained)


def layouts(c):
    """Each way to keep the weights -> list of Layout."""
    counts, w = weights(c.shape), widths(c.shape)
    n, trained, copies = counts.total, counts.trained, 2 * counts.matrices
    ddp = 4 * n, 4 * trained, 8 * trained, 2 * n
    plans = [Layout("DDP", *ddp, copies, to_roll_out=copies)]
    if c.gpus > 1:
        parts = [part / c.gpus for part in ddp]
        plans.append(Layout("--shard", *parts, copies=0, to_roll_out=2 * n))
    ends = 2 * w.Q + 2 * w.K + 3 * w.F + 7 * w.D  # widths in and out of a layer's matrices
    adapters = w.L * c.lora_rank * ends
    lora = 2 * n + 4 * adapters, 4 * adapters, 8 * adapters
    return [*plans, Layout("LoRA", *lora, reference=0, copies=0, to_roll_out=0, trained=False)]


def parts_of(layout, c):
    """A layout's bytes on each GPU -> {what: bytes}; last the peaks."""
    names = ("weights", "gradients", "optimizer", "reference", "copies", "to_roll_out")
    parts = {name: getattr(layout, name) for name in names} | dict(caches=caches(c))
    peaks, state = {}, layout.weights + layout.gradients + layout.optimizer
    # gradients are not there yet while rollouts are decoded
    rollout = layout.to_roll_out + caches(c) - layout.gradients
    for name, forward, before, least in (
        ("SFT", sft_forward(c), state, 0),
        ("LA-DAPO", rl_forward(c), state + layout.reference, rollout),
    ):
        for checkpointing in (False, True):
            size = layout.activations(forward, checkpointing, c)
            name_ = name + ", checkpointing" * checkpointing
            parts[f"activations, {name_}"] = size
            peaks[f"peak, {name_}"] = before + max(size, least)
    return parts | peaks


def fits(peak):
    """The smallest card that a peak in bytes fits on, in GB; "none"."""
    return next((str(card) for card in CARDS if peak <= USABLE * card * 1e9), "none")


def main(config):
    """Print the plan -> {layout: {what: bytes}}."""
    plan = {layout.name: parts_of(layout, config) for layout in layouts(config)}
    counts = weights(config.shape)
    print(f"{config.shape}: {counts.total:,} weights, {counts.trained:,} of them trained")
    print(f"GB on each of {config.gpus} GPU(s), by formula; not measured on a GPU")
    print(f"[card]: the smallest of {CARDS} that it fits on, a tenth left free")
    print("activations hold the copies, or with --shard what is gathered\n")
    print(f"{'':<36}" + "".join(f"{name:>16}" for name in plan))
    for name in next(iter(plan.values())):
        sizes = [parts[name] for parts in plan.values()]
        cells = [f"{size / 1e9:.1f}" for size in sizes]
        if name.startswith("peak"):
            cells = [f"{cell} [{fits(size)}]" for cell, size in zip(cells, sizes)]
        print(f"{name:<36}" + "".join(f"{cell:>16}" for cell in cells))
    return plan


if __name__ == "__main__":
    run_script(main, Config)
