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

import torch
import transformers
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from common.flags import run_script
from common.runs import write_json
from la_dapo import adjoint_loss
from latent_decode import generate, replay
from model import FutureL1, add_latent_tokens, best_attention
from sft import Config as SFTConfig
from sft import Step
from tools.shapes import IDS, IMAGE, SHAPES, make, prompt, random_group


@dataclasses.dataclass
class Config:
    shape: str = "2b"  # 2b | 4b | 8b: those of Qwen3-VL; tiny: to try this script
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
