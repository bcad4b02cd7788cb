"""Random models of the real shapes, and random inputs for them. Source: ours.

Weights and words are random: only what a step costs can be seen with them.

    python -m tools.shapes --shape 2b --layers 4 --tokenizer DIR --out DIR    # a model's folder
"""

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLMoeConfig

from common.cli import run_script
from latent_decode import Rollout
from model import LATENT_IDS, FutureL1, FutureL1MoE, add_latent_tokens

VOCABULARY, KEY_HEADS, HEAD_DIM = 151936, 8, 128


class Shape(NamedTuple):
    """Sizes of words and vision; whether input and output embeddings are one; the vocabulary."""

    text: dict
    vision: dict
    tied: bool
    vocabulary: int = VOCABULARY


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
    "30b-a3b": Shape(
        dict(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
        ),
        dict(
            depth=27,
            hidden_size=1152,
            intermediate_size=4304,
            out_hidden_size=2048,
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
        vocabulary=32768,
    ),
}


# for a CPU: half of Qwen3-0.6B's widths, 8 layers, a small tower; its weights name it
SMALL = Shape(
    dict(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    dict(
        depth=2,
        hidden_size=128,
        intermediate_size=512,
        out_hidden_size=512,
        deepstack_visual_indexes=[0, 1],
    ),
    tied=True,
    vocabulary=32768,
)
SHAPES["50m"], SHAPES["110m"] = SMALL, SMALL._replace(vocabulary=VOCABULARY)


class Special(NamedTuple):
    """Ids of special tokens; the released ones, and the first that Qwen's tokenizer leaves free."""

    eos: int = 151645
    vision_start: int = 151652
    vision_end: int = 151653
    image: int = 151655
    video: int = 151656
    latent_start: int = 151669
    latent: int = 151670
    latent_end: int = 151671

    @property
    def latent_ids(self):
        """{config key: id}, as `FutureL1.set_latent_tokens` takes them."""
        ids = self.latent_start, self.latent, self.latent_end
        return dict(zip(LATENT_IDS, ids))


def special(shape):
    """A shape's special tokens: as far from the end of its vocabulary as the released ones."""
    missing = VOCABULARY - SHAPES[shape].vocabulary
    return Special(*(id - missing for id in Special()))


def special_of(tokenizer):
    """A tokenizer's special tokens; it gets the latent ones if it has none."""
    latent_ids = add_latent_tokens(tokenizer)
    names = "vision_start", "vision_end", "image_pad", "video_pad"
    ids = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    return Special(tokenizer.eos_token_id, *ids, *(latent_ids[name] for name in LATENT_IDS))


# ------------------------------------------------------------------------------- models and inputs


def make(shape, layers=0, dtype=torch.float32, device="cpu", ids=None):
    """A random model of a shape. layers: fewer of words and vision; 0 = all.

    ids: its Special tokens, default those of its vocabulary.
    """
    (text, vision, tied, vocabulary), ids = SHAPES[shape], ids or special(shape)
    if layers:
        text = dict(text, num_hidden_layers=layers)
        depth = min(layers, vision["depth"])
        vision = dict(vision, depth=depth, deepstack_visual_indexes=list(range(min(3, depth))))
    rope = dict(
        rope_type="default", rope_theta=5e6, mrope_interleaved=True, mrope_section=[24, 20, 20]
    )
    text = dict(num_key_value_heads=KEY_HEADS) | text
    text |= dict(
        vocab_size=vocabulary,
        head_dim=HEAD_DIM,
        tie_word_embeddings=tied,
        max_position_embeddings=262144,
        eos_token_id=ids.eos,
        rope_parameters=rope,
    )
    vision = dict(vision, num_heads=16, num_position_embeddings=2304)
    experts = "num_experts" in text
    config = (Qwen3VLMoeConfig if experts else Qwen3VLConfig)(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=ids.image,
        video_token_id=ids.video,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = (FutureL1MoE if experts else FutureL1)(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_latent_tokens(ids.latent_ids)
    model.generation_config.eos_token_id = ids.eos
    return model


def prompt(config, rows, device, latents=0, length=0, video=False):
    """Random prompts with images, or the frames of a video -> dict of tensors.

    config: its `shape`, `images` of 256 tokens each, and `words`. latents: for a training, so many
    latents, four to a future frame. length: random words follow until a row has so many tokens.
    """
    ids, name = special(config.shape), "pixel_values_videos" if video else "pixel_values"
    one = [ids.vision_start, *[ids.video if video else ids.image] * 256, ids.vision_end]
    one = one * config.images + torch.randint(1000, 9000, (config.words,)).tolist()
    one += [ids.latent_start, *[ids.latent] * 4, ids.latent_end] * (latents // 4)
    one += torch.randint(1000, 9000, (max(0, length - len(one)),)).tolist()
    tokens = torch.tensor([one] * rows, device=device)
    batch = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    if config.images:
        grids = [[config.images, 32, 32]] if video else [[1, 32, 32]] * config.images
        batch[name] = torch.randn(rows * config.images * 1024, 1536, device=device)
        grid_name = "video_grid_thw" if video else "image_grid_thw"
        batch[grid_name] = torch.tensor(grids * rows, device=device)
    return batch


def sft_sample(config, device):
    """A sample of SFT with four future frames of four latents -> what `sft.sft_loss` takes, and the
    frames (future_pixel_values, future_grid_thw). What follows the prompt carries labels.

    config: as `prompt` reads it, and its `sft_tokens`.
    """
    batch = prompt(config, 1, device, latents=16, length=config.sft_tokens)
    ids = batch["input_ids"]
    labels = ids.masked_fill(ids == special(config.shape).latent, -100)
    labels[:, : config.images * 258 + config.words] = -100
    frames = dict(
        future_pixel_values=torch.randn(4 * 16, 1536, device=device),
        future_grid_thw=torch.tensor([[1, 4, 4]] * 4, device=device),
    )
    return dict(batch, labels=labels, **frames)


def random_group(config, hidden, device, shortest=1.0):
    """A rollout of n random rows, each with 4 spans of 2 latents.

    shortest: the first row's share of the length of the last; lengths between them are even.
    """
    ids, longest = special(config.shape), max(config.new_tokens, 16)
    span = torch.tensor([ids.latent_start, ids.latent, ids.latent, ids.latent_end])
    lengths = np.linspace(max(16, shortest * longest), longest, config.n).astype(int).tolist()
    tokens = torch.full((config.n, longest), ids.eos)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(1000, 9000, (length,))
        for k in range(4):
            row[k * length // 4 :][:4] = span
    lengths = torch.tensor(lengths)
    sampled = torch.arange(longest) < lengths[:, None]  # (n, length)
    return Rollout(
        tokens.to(device),
        sampled.to(device),
        [torch.randn(8, hidden, device=device) for _ in range(config.n)],
        torch.zeros(tokens.shape, device=device),
        ["length"] * config.n,
        lengths.to(device),
    )


# --------------------------------------------------------------------------------- a model's folder


@dataclasses.dataclass
class Config:
    shape: str = "2b"  # 2b | 4b | 8b | 30b-a3b: those of Qwen3-VL; 50m | 110m | tiny: to try things
    layers: int = 0  # fewer layers of words and vision; 0 = all
    tokenizer: str = ""  # folder of the tokenizer to put beside the model
    out: str = ""  # folder to write, in fp32

    def __post_init__(self):
        check_shape(self.shape)


def check_shape(shape):
    """Raises ValueError if there is no such shape."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}, expected one of {', '.join(SHAPES)}")


def main(config):
    """Write a random model and a tokenizer as a folder. Raises SystemExit if they do not fit."""
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    ids, room = special_of(tokenizer), SHAPES[config.shape].vocabulary
    if len(tokenizer) > room:
        raise SystemExit(
            f"{config.tokenizer}: {len(tokenizer)} tokens, but {config.shape} has room for {room}"
        )
    model = make(config.shape, config.layers, ids=ids)
    model.save_pretrained(config.out)
    tokenizer.save_pretrained(config.out)
    print(f"{config.out}: {sum(p.numel() for p in model.parameters()):,} random weights")


if __name__ == "__main__":
    run_script(main, Config)
