"""How fast, and in how much memory: random models of the real shapes, on one GPU or, with few
layers, on a CPU.

    # one GPU
    python -m tools.bench --shape 2b
    # a laptop, minutes
    python -m tools.bench --layers 2 --prompts 2 --images 1 --new_tokens 64 --sft_tokens 512
    # does it run at all, seconds
    python -m tools.bench --shape tiny --prompts 1 --n 2 --images 1 --new_tokens 8 --sft_tokens 512
    # only make a random model folder
    python -m tools.bench --shape 2b --layers 4 --save DIR --tokenizer DIR

Weights are random, so nothing here says how good a model is: only what a step costs. Decoding is
compared with what one would use otherwise, transformers' own `generate` on the stock model, in the
same run. Source: ours.
"""

import dataclasses
import time
from typing import NamedTuple

import torch
import transformers
from transformers import AutoTokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from common.flags import run_script
from common.runs import write_json
from la_dapo import adjoint_loss
from latent_decode import Rollout, generate, replay
from model import FutureL1, add_latent_tokens, best_attention
from sft import Config as SFTConfig
from sft import Step


@dataclasses.dataclass
class Config:
    shape: str = "2b"  # 2b | 8b: the shapes of Qwen3-VL-2B and 8B; tiny: to try this script
    layers: int = 0  # fewer layers of words and vision; 0 = all
    save: str = ""  # write the random model (fp32) to this folder and stop
    tokenizer: str = ""  # folder of the tokenizer to put beside it
    prompts: int = 8  # decoding: prompts
    n: int = 8  # decoding: samples a prompt
    images: int = 4  # images a prompt, 256 tokens each
    words: int = 256  # words a prompt
    new_tokens: int = 256  # decoding: tokens a sample; the RL update takes at least 16
    sft_tokens: int = 4096  # SFT: sequence length
    out: str = ""  # also write the numbers as JSON

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}, expected one of {', '.join(SHAPES)}")


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
VISION_START, VISION_END, IMAGE = 151652, 151653, 151655
# the first ids that Qwen's tokenizer leaves free
IDS = dict(latent_start_id=151669, latent_id=151670, latent_end_id=151671)


# ------------------------------------------------------------------------------- models and inputs


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
        num_key_value_heads=8,
        head_dim=128,
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


def make_trainable(config, device):
    """fp32 weights, the vision tower frozen, gradient checkpointing."""
    model = make(config.shape, config.layers, torch.float32, device).train()
    model.model.visual.requires_grad_(False)
    model.set_attn_implementation(best_attention())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def save(config):
    """The random model and a tokenizer as a folder."""
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer)
    ids = add_latent_tokens(tokenizer)
    if list(ids.values()) != list(IDS.values()):
        raise SystemExit(f"{config.tokenizer}: the latent tokens get {ids}, expected {IDS}")
    model = make(config.shape, config.layers)
    model.save_pretrained(config.save)
    tokenizer.save_pretrained(config.save)
    print(f"{config.save}: {sum(p.numel() for p in model.parameters()):,} random weights")


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


def timed(f, times=1):
    """Run f some times -> seconds a time, peak GiB on the GPU (nan on a CPU)."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.time()
    for _ in range(times):
        f()
    if gpu:
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else float("nan")
    return (time.time() - began) / times, peak


# ------------------------------------------------------------------------------------ measurements


def about(config, device):
    """What was measured where."""
    cpu = f"cpu, {torch.get_num_threads()} threads"
    figures = dataclasses.asdict(config)
    figures.update(torch=torch.__version__, transformers=transformers.__version__)
    figures["device"] = torch.cuda.get_device_name() if device == "cuda" else cpu
    model = make(config.shape, config.layers, device="meta")  # sizes without weights
    figures["parameters"] = sum(p.numel() for p in model.parameters())
    return figures


@torch.no_grad()
def compare_kernels(config, device):
    """Whether the attention kernels agree: bf16 logits of each against fp32 on the same weights.

    Four layers, if the config does not say how many.
    """
    model = make(config.shape, config.layers or 4, torch.float32, device).eval()
    batch, figures = prompt(config, 1, device), {}
    model.__class__ = Qwen3VLForConditionalGeneration  # the stock class on the same weights
    types = (batch["input_ids"] == IMAGE).int()
    model.set_attn_implementation("eager")
    exact = model(**batch, mm_token_type_ids=types).logits

    def measure(name):
        error = (model(**batch, mm_token_type_ids=types).logits.float() - exact).norm()
        figures[f"bf16 {name} relative error"] = round((error / exact.norm()).item(), 5)

    model.to(torch.bfloat16)
    for kernel in dict.fromkeys(["eager", "sdpa", best_attention()]):
        model.set_attn_implementation(kernel)
        measure(kernel)
    model.__class__ = FutureL1
    measure("ours")
    return figures


def measure_decoding(config, device):
    """Tokens a second: ours, on CUDA also with a captured step, and transformers' own."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # a CPU decodes in fp32
    model = make(config.shape, config.layers, dtype, device).eval()
    batch, figures = prompt(config, config.prompts, device), {}
    total = config.prompts * config.n * config.new_tokens
    sampling = dict(temperature=0.9, top_p=0.99)

    def measure(name, decode):
        decode(max_new_tokens=4)  # warm-up
        seconds, memory = timed(lambda: decode(max_new_tokens=config.new_tokens))
        figures[f"decode tokens/s, {name}"] = round(total / seconds, 1)
        figures[f"decode GiB, {name}"] = round(memory, 1)

    # ours: each prompt is read once
    def ours(max_new_tokens, eos_token_id=-1, **more):
        settings = dict(n=config.n, max_new_tokens=max_new_tokens, eos_token_id=eos_token_id)
        return generate(model, batch, **settings, **sampling, **more)

    measure("ours", ours)
    if device == "cuda":
        measure("ours, CUDA graph", lambda max_new_tokens: ours(max_new_tokens, cuda_graph=True))
    figures["decode prompt seconds"] = round(timed(lambda: ours(1))[0], 3)

    # theirs: the stock class on the same weights
    model.__class__ = Qwen3VLForConditionalGeneration
    model.set_attn_implementation(best_attention())
    stock = dict(batch, mm_token_type_ids=(batch["input_ids"] == IMAGE).int())

    def theirs(max_new_tokens):
        settings = dict(num_return_sequences=config.n, eos_token_id=None, do_sample=True)
        return model.generate(**stock, max_new_tokens=max_new_tokens, **settings, **sampling)

    measure("transformers", theirs)
    for name in [name for name in figures if name.startswith("decode tokens/s, ours")]:
        ratio = figures[name] / figures["decode tokens/s, transformers"]
        figures[name.replace("tokens/s", "ratio")] = round(ratio, 2)
    return figures


def measure_sft(model, config, device):
    """Forward and backward of one sequence, in bf16 autocast, without the optimizer."""
    batch = prompt(config, 1, device, latents=16, length=config.sft_tokens)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IDS["latent_id"], -100)
    labels[:, : config.images * 258 + config.words] = -100
    batch.update(
        labels=labels,
        future_pixel_values=torch.randn(4 * 16, 1536, device=device),
        future_grid_thw=torch.tensor([[1, 4, 4]] * 4, device=device),
    )
    settings = SFTConfig()
    step = Step(model, settings)

    def forward_backward():
        with torch.autocast(device, torch.bfloat16):
            ce, latent = step(batch)
        (ce + settings.lam * latent).backward()

    forward_backward()  # warm-up
    seconds, memory = timed(forward_backward, times=3)
    tokens = batch["input_ids"].numel()
    return {"sft tokens/s": round(tokens / seconds), "sft GiB": round(memory, 1)}


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


def measure_rl(model, config, device):
    """The update of one group: its prompt once against once a rollout, and what the gradient
    through latents costs.
    """
    model.gradient_checkpointing_disable()
    rollout = random_group(config, model.config.text_config.hidden_size, device)
    advantages = torch.randn(config.n, 1, device=device)

    def policy_gradient(batch, terms):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            out = replay(model, batch, rollout, 0.9)
            loss = (advantages * out.logprobs).mean()
            if terms:
                loss = loss + adjoint_loss(loss, out.predicted, out.latents, terms)
        loss.backward()

    figures = {}
    for name, rows, terms in (
        ("", 1, 0),
        (", 1 adjoint term", 1, 1),
        (", exact (8 terms)", 1, 8),
        (", a prompt a rollout", config.n, 0),
    ):
        batch = prompt(config, rows, device)
        policy_gradient(batch, terms)  # warm-up
        seconds, memory = timed(lambda batch=batch, terms=terms: policy_gradient(batch, terms), 2)
        figures[f"rl update s{name}"] = round(seconds, 3)
        figures[f"rl update GiB{name}"] = round(memory, 1)
    return figures


def main(config):
    if config.save:
        return save(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures = about(config, device)
    figures |= compare_kernels(config, device)
    figures |= measure_decoding(config, device)
    model = make_trainable(config, device)
    figures |= measure_sft(model, config, device)
    figures |= measure_rl(model, config, device)
    for name, value in figures.items():
        print(f"{name:<40}{value}")
    if config.out:
        write_json(config.out, figures)
    return figures


if __name__ == "__main__":
    run_script(main, Config)
