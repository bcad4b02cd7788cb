"""How fast, and in how much memory: random models of the real shapes, on one GPU or, with few
layers, on a CPU.

    # one GPU
    python -m tools.bench --shape 2b
    # a laptop, minutes
    python -m tools.bench --layers 2 --prompts 2 --images 1 --new_tokens 64 --sft_tokens 512
    # only make a random model folder
    python -m tools.bench --shape 2b --layers 4 --save DIR --tokenizer DIR

Weights are random, so nothing here says how good a model is: only what a step costs. Decoding is
compared with what one would use otherwise, transformers' own `generate` on the stock model, in the
same run. Source: ours.
"""

import dataclasses
import json
import time

import torch
import transformers
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from common.runs import parse_config
from la_dapo import adjoint_loss
from latent_decode import Rollout, generate, replay
from model import FutureL1, add_latent_tokens, best_attention
from sft import Config as SFTConfig
from sft import Step


@dataclasses.dataclass
class Config:
    shape: str = "2b"  # 2b | 8b: the shapes of Qwen3-VL-2B and 8B
    layers: int = 0  # fewer layers of words and vision; 0 = all
    save: str = ""  # write the random model (fp32) to this folder and stop
    tokenizer: str = ""  # folder of the tokenizer to put beside it
    prompts: int = 8  # decoding: prompts
    n: int = 8  # decoding: samples a prompt
    images: int = 4  # images a prompt, 256 tokens each
    words: int = 256  # words a prompt
    new_tokens: int = 256  # decoding: tokens a sample
    sft_tokens: int = 4096  # SFT: sequence length
    out: str = ""  # also write the numbers as JSON


SHAPES = {  # the released configs
    "2b": (
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
        True,
    ),
    "8b": (
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
        False,
    ),
}


IDS = dict(
    latent_start_id=151669, latent_id=151670, latent_end_id=151671
)  # the first ids Qwen's tokenizer leaves free


def make(shape, layers=0, dtype=torch.float32, device="cpu"):
    """A random FutureL1 of a released shape, with its full vocabulary."""
    text, vision, tied = SHAPES[shape]
    if layers:
        text = dict(text, num_hidden_layers=layers)
        vision = dict(vision, depth=layers, deepstack_visual_indexes=list(range(min(3, layers))))
    config = Qwen3VLConfig(
        text_config=dict(
            text,
            vocab_size=151936,
            num_key_value_heads=8,
            head_dim=128,
            tie_word_embeddings=tied,
            max_position_embeddings=262144,
            eos_token_id=151645,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=5e6,
                mrope_interleaved=True,
                mrope_section=[24, 20, 20],
            ),
        ),
        vision_config=dict(vision, num_heads=16, num_position_embeddings=2304),
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = FutureL1(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.set_latent_tokens(IDS)
    model.generation_config.eos_token_id = 151645
    return model


def prompt(config, rows, device, latents=0, length=0):
    """Random prompts with images (and, to train, `latents` latents of one future frame each) ->
    dict of tensors.
    """
    one = [151652, *[151655] * 256, 151653] * config.images + torch.randint(
        1000, 9000, (config.words,)
    ).tolist()
    one += [IDS["latent_start_id"], *[IDS["latent_id"]] * 4, IDS["latent_end_id"]] * (latents // 4)
    one += torch.randint(1000, 9000, (max(0, length - len(one)),)).tolist()
    ids = torch.tensor([one] * rows, device=device)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=torch.randn(rows * config.images * 1024, 1536, device=device),
        image_grid_thw=torch.tensor([[1, 32, 32]] * rows * config.images, device=device),
    )


def timed(f):
    """Run f -> seconds, peak GiB on the GPU (nan on a CPU)."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    f()
    if gpu:
        torch.cuda.synchronize()
    return time.time() - began, torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan")


def main(config):
    if config.save:
        model = make(config.shape, config.layers)
        model.save_pretrained(config.save)
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
        assert list(add_latent_tokens(tokenizer).values()) == list(IDS.values())
        tokenizer.save_pretrained(config.save)
        return print(
            f"{config.save}: {sum(p.numel() for p in model.parameters()):,} random weights"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    low = torch.bfloat16 if device == "cuda" else torch.float32  # a CPU decodes in fp32
    result = dict(
        dataclasses.asdict(config),
        torch=torch.__version__,
        transformers=transformers.__version__,
        device=torch.cuda.get_device_name()
        if device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
    )
    model = make(config.shape, config.layers, low, device).eval()
    result["parameters"] = sum(p.numel() for p in model.parameters())

    # 1. the attention kernels agree: bf16 logits of each against fp32 on the same weights (first 4
    # layers' worth)
    small = make(config.shape, config.layers or 4, torch.float32, device).eval()
    batch = prompt(config, 1, device)
    kinds = ["eager", "sdpa"] + (
        ["flash_attention_2"] if best_attention() == "flash_attention_2" else []
    )
    with torch.no_grad():
        small.set_attn_implementation("eager")
        exact = small(**batch).logits
        small.to(torch.bfloat16)
        for kind in kinds:
            small.set_attn_implementation(kind)
            error = (small(**batch).logits.float() - exact).norm() / exact.norm()
            result[f"bf16 {kind} relative error"] = round(error.item(), 5)
    del small, exact

    # 2. decoding: ours (each prompt once, static cache; on CUDA also with a captured step) against
    # transformers' own
    batch = prompt(config, config.prompts, device)
    rows = config.prompts * config.n
    for name, graph in (("ours", False), ("ours, CUDA graph", True))[: 1 + (device == "cuda")]:
        arguments = dict(n=config.n, temperature=0.9, top_p=0.99, eos_token_id=-1, cuda_graph=graph)
        generate(model, batch, max_new_tokens=4, **arguments)  # warm-up
        seconds, memory = timed(
            lambda: generate(model, batch, max_new_tokens=config.new_tokens, **arguments)
        )
        result.update(
            {
                f"decode tokens/s, {name}": round(rows * config.new_tokens / seconds, 1),
                f"decode GiB, {name}": round(memory, 1),
            }
        )
    seconds, _ = timed(lambda: generate(model, batch, max_new_tokens=1, n=config.n))
    result["decode prompt seconds"] = round(seconds, 3)
    model.__class__ = Qwen3VLForConditionalGeneration  # the stock class on the same weights
    stock = dict(batch, mm_token_type_ids=(batch["input_ids"] == 151655).int())
    arguments = dict(
        do_sample=True,
        temperature=0.9,
        top_p=0.99,
        num_return_sequences=config.n,
        eos_token_id=None,
    )
    model.generate(**stock, max_new_tokens=4, **arguments)
    seconds, memory = timed(
        lambda: model.generate(**stock, max_new_tokens=config.new_tokens, **arguments)
    )
    theirs = rows * config.new_tokens / seconds
    result.update(
        {
            "decode tokens/s, transformers": round(theirs, 1),
            "decode GiB, transformers": round(memory, 1),
        }
    )
    for key in [k for k in result if k.startswith("decode tokens/s, ours")]:
        result[key.replace("tokens/s", "ratio")] = round(result[key] / theirs, 2)
    del model

    # 3. SFT: fp32 weights, bf16 autocast, gradient checkpointing; forward and backward, without the
    # optimizer
    model = make(config.shape, config.layers, torch.float32, device).train()
    model.model.visual.requires_grad_(False)
    model.set_attn_implementation(best_attention())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    batch = prompt(config, 1, device, latents=16, length=config.sft_tokens)
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == IDS["latent_id"], -100)
    batch["labels"][:, : config.images * 258 + config.words] = -100
    batch.update(
        future_pixel_values=torch.randn(4 * 16, 1536, device=device),
        future_grid_thw=torch.tensor([[1, 4, 4]] * 4, device=device),
    )
    step = Step(model, SFTConfig())

    def forward_backward():
        with torch.autocast(device, torch.bfloat16):
            ce, weighted, _ = step(batch)
        (ce + weighted).backward()

    forward_backward()
    seconds, memory = timed(lambda: [forward_backward() for _ in range(3)])
    result.update(
        {
            "sft tokens/s": round(3 * batch["input_ids"].numel() / seconds),
            "sft GiB": round(memory, 1),
        }
    )

    # 4. the RL update of one group: its prompt once against once a rollout, and what the gradient
    # through latents costs
    model.gradient_checkpointing_disable()
    span = [IDS["latent_start_id"], *[IDS["latent_id"]] * 2, IDS["latent_end_id"]]
    row = torch.randint(1000, 9000, (config.new_tokens,))
    for k in range(4):
        row[k * config.new_tokens // 4 :][:4] = torch.tensor(span)  # 4 spans, 8 latents
    tokens = row.to(device).repeat(config.n, 1)
    D = model.config.text_config.hidden_size
    rollout = Rollout(
        tokens,
        torch.ones_like(tokens, dtype=torch.bool),
        [torch.randn(8, D, device=device)] * config.n,
        torch.zeros(tokens.shape, device=device),
        ["length"] * config.n,
        torch.full((config.n,), config.new_tokens, device=device),
    )
    A = torch.randn(config.n, 1, device=device)
    for name, rows, terms in (
        ("", 1, 0),
        (", 1 adjoint term", 1, 1),
        (", exact (8 terms)", 1, 8),
        (", a prompt a rollout", config.n, 0),
    ):
        batch = prompt(config, rows, device)

        def policy_gradient():
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                out = replay(model, batch, rollout, 0.9)
                loss = (A * out.logprobs).mean()
                loss = loss + (
                    adjoint_loss(loss, out.predicted, out.latents, terms) if terms else 0
                )
            loss.backward()

        policy_gradient()
        seconds, memory = timed(lambda: [policy_gradient() for _ in range(2)])
        result.update(
            {f"rl update s{name}": round(seconds / 2, 3), f"rl update GiB{name}": round(memory, 1)}
        )
    for key, value in result.items():
        print(f"{key:<40}{value}")
    if config.out:
        with open(config.out, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main(parse_config(Config))
