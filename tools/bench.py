"""How fast, and in how much memory: our way beside the usual one, on a CPU or a GPU.

    python -m tools.bench --out bench.json                       # a CPU
    make gpu                                                       # a GPU: the tests, then this
    python -m tools.bench --shape tiny --decoder tiny --rounds 1         # does it run at all

    case                   ours                                   the usual way
    decoding a group       the prompt's keys and values once      transformers' `generate`, copies
    SFT, rows of 4 sizes   one row without padding                a padded batch, all tokens' logits
    update of a group      the prompt once, in one row            a copy of the prompt a rollout

*The usual way* is transformers' own class and attention on the same weights, which are random
(tools/shapes.py). It does not know latents: a `<|latent|>` is fed as its token, which costs the
same. For words alone both give the same loss and gradient (tests/tools/test_bench.py).

All ratios are of one run, in which the ways take turns. On a CPU seconds are CPU seconds of this
process on one thread, and memory is the peak of live tensors beyond what was there before; on a GPU
seconds are those of the wall, and memory is what PyTorch allocated at most (in brackets: reserved).
Trainings are forward and backward, without the optimizer. Source: ours.

Axis letters: R rollouts of one prompt, P prompt tokens, T new tokens, V vocabulary.
"""

import contextlib
import dataclasses
import gc
import statistics
import time
from itertools import accumulate

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3VLForConditionalGeneration

from common.cli import run_script
from common.report import as_text
from common.run import write_json
from la_dapo import adjoint_loss
from latent_decode import MEDIA, generate, replay
from model import FutureL1, best_attention
from sft import sft_loss
from tools.shapes import check_shape, make, prompt, random_group

TEMPERATURE, TOP_P = 0.9, 0.99  # paper Table 9
SURE = 1000  # words that hold 99 % of the probability in a low-entropy policy


@dataclasses.dataclass
class Config:
    shape: str = ""  # SFT and update, see tools/shapes.py; "" = 50m on a CPU, 2b on a GPU
    decoder: str = ""  # decoding; "" = 110m on a CPU (the released vocabulary), 2b on a GPU
    rounds: int = 2  # each way once a round
    n: int = 8  # rollouts of a prompt
    images: int = 3  # of a prompt, 258 tokens each; decoding: frames of a video
    words: int = 230  # of a prompt
    new_tokens: int = 128  # of the longest rollout; in the update the shortest has a quarter
    sft_tokens: int = 400  # of a row, on average; a third of them are learnt
    minutes: float = 0.0  # what has not begun by then is left out; 0 = no end
    began: float = 0.0  # from when minutes count, in seconds since 1970; 0 = now
    out: str = ""  # also write all figures as JSON

    def __post_init__(self):
        on_gpu = torch.cuda.is_available()
        self.shape = self.shape or ("2b" if on_gpu else "50m")
        self.decoder = self.decoder or ("2b" if on_gpu else "110m")
        check_shape(self.shape)
        check_shape(self.decoder)


# ------------------------------------------------------------------------------------ the two ways


@contextlib.contextmanager
def stock(model):
    """transformers' own class and attention on the same weights, inside the context."""
    model.__class__ = Qwen3VLForConditionalGeneration
    model.set_attn_implementation(best_attention())
    try:
        yield
    finally:
        model.__class__ = FutureL1  # puts its own attention back when it is called


def autocast(device):
    """Arithmetic of a training: bf16 on CUDA, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def checkpoint_activations(model, on):
    """Whether a backward of `model` makes its activations again."""
    if on:
        options = {"use_reentrant": False}
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.activation_checkpointing_disable()


def types_of(model, ids):
    """The type of each token, as transformers asks for it: 1 = image, 2 = video, 0 = text."""
    is_image, is_video = (ids == getattr(model.config, f"{x}_token_id") for x in ("image", "video"))
    return is_image.int() + 2 * is_video.int()


def update(model, batch, rollout, advantages, terms=0):
    """Forward and backward of a group -> its loss: -A log p, a mean over what was chosen.

    batch: one prompt. advantages (R, 1). terms: of `adjoint_loss`.
    """
    with autocast(model.device):
        new = replay(model, batch, rollout, TEMPERATURE)
        loss = -(advantages * new.logprobs).sum() / rollout.sampled.sum()
        if terms:
            loss = loss + adjoint_loss(loss, new.predicted, new.latents, terms)
    loss.backward()
    return loss.detach()


def usual_update(model, batch, rollout, advantages):
    """The same with a copy of the prompt before each rollout; logits of new tokens alone."""
    (R, T), tokens = rollout.tokens.shape, rollout.tokens
    ids = torch.cat([batch["input_ids"].expand(R, -1), tokens], 1)  # (R, P + T)
    real = torch.arange(T, device=ids.device) < rollout.lengths[:, None]  # (R, T)
    mask = torch.cat([batch["attention_mask"].expand(R, -1), real.long()], 1)
    media = {name: x.repeat(R, 1) for name, x in batch.items() if name in MEDIA}
    inputs = dict(media, mm_token_type_ids=types_of(model, ids), use_cache=False)
    with stock(model):
        with autocast(model.device):
            out = model(input_ids=ids, attention_mask=mask, logits_to_keep=T + 1, **inputs)
            logp = (out.logits[:, :-1].float() / TEMPERATURE).log_softmax(-1)  # (R, T, V)
            chosen = logp.gather(-1, tokens[..., None])[..., 0]  # (R, T)
            loss = -(advantages * chosen * rollout.sampled).sum() / rollout.sampled.sum()
        loss.backward()
    return loss.detach()


def sft(model, batch):
    """Forward and backward of a padded batch with labels -> its loss, Eq. (1)."""
    with autocast(model.device):
        loss = sft_loss(model, **batch)["loss"]
    loss.backward()
    return loss.detach()


def usual_sft(model, batch):
    """The same in transformers' own class: padding takes part, each token has logits."""
    types = types_of(model, batch["input_ids"])
    with stock(model):
        with autocast(model.device):
            loss = model(**batch, mm_token_type_ids=types, use_cache=False).loss
        loss.backward()
    return loss.detach()


def decode(model, batch, new_tokens, n, **more):
    """n samples a prompt of so many words each -> Rollout. more: as `generate` takes it."""
    words = dict(eos_token_id=-1, banned=(model.config.latent_start_id,))  # no end, no span
    sampling = dict(temperature=TEMPERATURE, top_p=TOP_P, n=n)
    return generate(model, batch, max_new_tokens=new_tokens, **sampling, **words, **more)


def usual_decode(model, batch, new_tokens, n):
    """The same by transformers' `generate` -> its output, with the cache."""
    sampling = dict(do_sample=True, temperature=TEMPERATURE, top_p=TOP_P, top_k=0)
    words = dict(eos_token_id=None, pad_token_id=0, max_new_tokens=new_tokens)
    types = types_of(model, batch["input_ids"])
    settings = dict(num_return_sequences=n, mm_token_type_ids=types, return_dict_in_generate=True)
    with stock(model), torch.no_grad():
        return model.generate(**batch, **settings, **sampling, **words)


# --------------------------------------------------------------------------- models and their input


def make_trainable(shape, layers, device):
    """A random model in fp32, its tower frozen, each trained weight with a gradient."""
    model = make(shape, layers, torch.float32, device).train()
    model.model.visual.requires_grad_(False)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    return model


@torch.no_grad()
def make_sure(model, batch):
    """Scale the states that reach the head until 99 % of the next word's probability lie on at
    most SURE words, as in a trained policy -> how many words that are.
    """
    h, _ = model.hidden(**batch)
    logits, scale = model.logits(h[0, -1]) / TEMPERATURE, 1.0
    while True:
        p = (scale * logits).softmax(-1).sort(descending=True).values
        words = int((p.cumsum(-1) < 0.99).sum()) + 1
        if words <= SURE:
            model.model.language_model.norm.weight.mul_(scale)
            return words
        scale *= 1.1


def rows_of(config, lengths, device="cpu"):
    """Random rows of words and one image -> a batch padded on the right; a third has labels."""
    rows, one = [], dataclasses.replace(config, images=1, words=0)
    for length in lengths:
        row = prompt(one, 1, device, length=length)
        row["labels"] = row["input_ids"].clone()
        row["labels"][:, : -(length // 3)] = -100
        rows.append(row)
    batch = {}
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        parts = [row[name][0] for row in rows]
        batch[name] = pad_sequence(parts, batch_first=True, padding_value=fill)  # (B, T)
    for name in ("pixel_values", "image_grid_thw"):
        batch[name] = torch.cat([row[name] for row in rows])
    return batch


# ------------------------------------------------------------------------------------- measurements


def seconds(work, device="cpu"):
    """Run work() -> seconds: on a GPU those of the wall, on a CPU those of this process.

    Other processes share the CPU, so the wall's seconds would count their work too.
    """
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_of(work, device="cpu"):
    """Run work() -> bytes that tensors took at most: on a GPU all of them, on a CPU beyond what was
    there before.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    events = [event for event in events if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def free():
    """Give memory that nobody holds back, to the GPU as well."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measured(works, device, rounds, deadline):
    """{way: work} -> {way: {seconds: [a round], bytes}}, the ways in turn.

    A way that does not fit into memory, or has not begun by the deadline, says so instead.
    """
    figures = {}
    for name, work in works.items():
        if time.time() > deadline:
            figures[name] = "no time left"
            continue
        try:
            figures[name] = dict(bytes=peak_of(work, device), seconds=[])  # also the warm-up
            if device == "cuda":  # what runs out is this: with fragments and the graphs' own memory
                figures[name]["reserved"] = torch.cuda.max_memory_reserved()
        except torch.OutOfMemoryError:
            figures[name] = "out of memory"
        free()
    for _ in range(rounds):
        for name, work in works.items():
            if isinstance(figures[name], dict):
                figures[name]["seconds"].append(seconds(work, device))
    return figures


# -------------------------------------------------------------------------------------------- cases


def decoding_ways(config, model, device):
    """A group's rollouts from a video prompt -> {way: work}."""
    video = prompt(dataclasses.replace(config, shape=config.decoder), 1, device, video=True)
    print(f"99 % of the next word's probability lies on {make_sure(model, video)} words")
    asked = model, video, config.new_tokens, config.n
    works = {"ours": lambda: decode(*asked), "transformers": lambda: usual_decode(*asked)}
    if device == "cuda":
        works["ours, captured step"] = lambda: decode(*asked, cuda_graph=True)
    return works


def sft_ways(config, model, device):
    """Forward and backward of four rows of different lengths -> {way: work}."""
    mean = config.sft_tokens
    batch = rows_of(config, [mean // 2, mean * 3 // 4, mean, mean * 7 // 4], device)
    return {"ours": lambda: sft(model, batch), "padded": lambda: usual_sft(model, batch)}


def update_ways(config, model, device):
    """Forward and backward of one group -> {way: work}."""
    batch, hidden = prompt(config, 1, device), model.config.text_config.hidden_size
    rollout = random_group(config, hidden, device, shortest=0.25)
    group = model, batch, rollout, torch.randn(config.n, 1, device=device)
    works = {}
    for name, work in (
        ("ours", update),
        ("ours, exact gradient", lambda *group: update(*group, terms=8)),
        ("prompt copied", usual_update),
    ):
        for on in (False, True):

            def run(work=work, on=on):
                checkpoint_activations(model, on)
                work(*group)

            works[name + ", checkpointing" * on] = run
    return works


# ------------------------------------------------------------------------------------------- tables


def table(figures, base):
    """{way: figures} -> rows of text: each way beside the way `base` of the same rounds."""
    rows, other = [], figures[base]
    for name, figure in figures.items():
        if isinstance(figure, str):
            rows.append([name, figure, "", "", ""])
            continue
        size = f"{figure['bytes'] / 2**20:,.0f}"
        if "reserved" in figure:
            size += f" ({figure['reserved'] / 2**20:,.0f})"
        row = [name, f"{statistics.median(figure['seconds']):.3g}", "", size, ""]
        if isinstance(other, dict):
            ratios = [a / b for a, b in zip(figure["seconds"], other["seconds"])]
            row[2] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
            row[4] = f"{figure['bytes'] / other['bytes']:.2f}"
        rows.append(row)
    return rows


def main(config):
    """Measure, print, write -> all figures."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    deadline = (config.began or time.time()) + 60 * config.minutes if config.minutes else torch.inf
    name = torch.cuda.get_device_name() if device == "cuda" else "one CPU thread, fp32"
    print(f"{name}, torch {torch.__version__}; random weights, all ratios of this run")
    if device == "cpu":
        torch.set_num_threads(1)  # then CPU seconds are those of the work
    figures = dict(device=name, torch=torch.__version__, config=dataclasses.asdict(config))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    decoder, model = make(config.decoder, dtype=dtype, device=device).eval(), None
    for case, ways, base in (
        (f"decoding {config.n} x {config.new_tokens} tokens", decoding_ways, "transformers"),
        ("SFT, forward and backward", sft_ways, "padded"),
        (f"update of {config.n} rollouts", update_ways, "prompt copied"),
    ):
        if ways is not decoding_ways and model is None:
            decoder = None
            free()
            model = make_trainable(config.shape, 0, device)
        works = ways(config, model or decoder, device)
        figures[case] = measured(works, device, config.rounds, deadline)
        header = [case, "seconds", "ratio", "MiB", "ratio"]
        print("\n" + as_text(header, table(figures[case], base)))
        if config.out:
            write_json(config.out, figures)
    return figures


if __name__ == "__main__":
    run_script(main, Config)
