"""Random models of the real shapes, and random inputs for them. Source: ours.

Weights and words are random: only what a step costs can be seen with them.
"""

from typing import NamedTuple

import torch
from transformers import Qwen3VLConfig

from latent_decode import Rollout
from model import FutureL1


class Shape(NamedTuple):
    """Sizes of words and vision; whether input and output embeddings are one."""

    text: dict
    vision: dict
    tied: bool


SHAPES = {  # the released configs
    "2b": Shape(
        dict(
            hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16
        ),
        dict(
            depth=24,
            hidden_size=1024,
            intermediate_size=4096,
            out_hidden_size=2048,
            deepstack_visual_indexes=[5, 11, 17],
        ),
        tied=True,
    ),
    "4b": Shape(
        dict(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32
        ),
        dict(
            depth=24,
            hidden_size=1024,
            intermediate_size=4096,
            out_hidden_size=2560,
            deepstack_visual_indexes=[5, 11, 17],
        ),
        tied=True,
    ),
    "8b": Shape(
        dict(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32
        ),
        dict(
            depth=27,
            hidden_size=1152,
            intermediate_size=4304,
            out_hidden_size=4096,
            deepstack_visual_indexes=[8, 16, 24],
        ),
        tied=False,
    ),
    "tiny": Shape(
        dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=8),
        dict(
            depth=2,
            hidden_size=64,
            intermediate_size=128,
            out_hidden_size=64,
            deepstack_visual_indexes=[0],
        ),
        tied=True,
    ),
}


VOCABULARY, EOS = 151936, 151645
KEY_HEADS, HEAD_DIM = 8, 128
VISION_START, VISION_END, IMAGE = 151652, 151653, 151655
# the first ids that Qwen's tokenizer leaves free
IDS = dict(latent_start_id=151669, latent_id=151670, latent_end_id=151671)


# ------------------------------------------------------------------------------- models and inputs


class Weights(NamedTuple):
    """Numbers of weights, not bytes."""

    layer: int  # the matrices of one layer of the language model
    layers: int  # all layers of the language model, their norms too
    words: int  # input embeddings; the output layer too, where it is another
    head: int  # output layer
    vision: int  # tower and merger, frozen
    matrices: int  # what autocast keeps a bf16 copy of

    @property
    def trained(self):
        return self.layers + self.words

    @property
    def total(self):
        return self.trained + self.vision


class Widths(NamedTuple):
    D: int
    F: int
    Q: int
    K: int
    L: int


def widths(shape):
    text = SHAPES[shape].text
    heads, L = text["num_attention_heads"], text["num_hidden_layers"]
    sizes = text["hidden_size"], text["intermediate_size"]
    return Widths(*sizes, heads * HEAD_DIM, KEY_HEADS * HEAD_DIM, L)


def weights(shape):
    """A shape's name -> Weights, as a model of it has them."""
    D, F, Q, K, L = widths(shape)
    layer = 2 * D * Q + 2 * D * K + 3 * D * F
    layers = L * (layer + 2 * D + 2 * HEAD_DIM) + D
    words = VOCABULARY * D * (1 if SHAPES[shape].tied else 2)

    vision = SHAPES[shape].vision
    H, wide, out = (vision[k] for k in ("hidden_size", "intermediate_size", "out_hidden_size"))
    block = 4 * H * H + 4 * H + 2 * H * wide + wide + H + 4 * H
    merger = 4 * H * (4 * H + 1) + out * (4 * H + 1)  # without its norm
    deepstack = len(vision["deepstack_visual_indexes"]) * (merger + 8 * H)
    tower = vision["depth"] * block + (1536 + 1 + 2304) * H + merger + 2 * H + deepstack
    return Weights(layer, layers, words, VOCABULARY * D, tower, L * layer)


def make(shape, layers=0, dtype=torch.float32, device="cpu"):
    """A random FutureL1 of a released shape, with its full vocabulary."""
    text, vision, tied = SHAPES[shape]
    if layers:
        text = dict(text, num_hidden_layers=layers)
        vision = dict(vision, depth=layers, deepstack_visual_indexes=list(range(min(3, layers))))
    rope = dict(
        rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=[24, 20, 20]
    )
    text = dict(
        text,
        vocab_size=VOCABULARY,
        num_key_value_heads=KEY_HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=tied,
        max_position_embeddings=262144,
        eos_token_id=EOS,
        rope_parameters=rope,
    )
    vision = dict(vision, num_heads=16, num_position_embeddings=2304)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = FutureL1(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_latent_tokens(IDS)
    model.generation_config.eos_token_id = EOS
    return model


def prompt(config, rows, device, latents=0, length=0):
    """Random prompts with images -> dict of tensors.

    latents: for a training, so many latents, four to a future frame. length: random words follow
    until a row has so many tokens.
    """
    one = [VISION_START, *[IMAGE] * 256, VISION_END] * config.images
    one += torch.randint(1000, 9000, (config.words,)).tolist()
    one += [IDS["latent_start_id"], *[IDS["latent_id"]] * 4, IDS["latent_end_id"]] * (latents // 4)
    one += torch.randint(1000, 9000, (max(0, length - len(one)),)).tolist()
    ids = torch.tensor([one] * rows, device=device)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(rows * config.images * 1024, 1536, device=device),
        image_grid_thw=torch.tensor([[1, 32, 32]] * rows * config.images, device=device),
    )


def random_group(config, hidden, device):
    """A rollout of n random rows, each with 4 spans of 2 latents."""
    length = max(config.new_tokens, 16)
    span = [IDS["latent_start_id"], *[IDS["latent_id"]] * 2, IDS["latent_end_id"]]
    row = torch.randint(1000, 9000, (length,))
    for k in range(4):
        row[k * length // 4 :][:4] = torch.tensor(span)
    tokens = row.to(device).repeat(config.n, 1)  # (n, length)
    return Rollout(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        [torch.randn(8, hidden, device=device)] * config.n,
        torch.zeros(tokens.shape, device=device),
        ["length"] * config.n,
        torch.full((config.n,), length, device=device),
    )
