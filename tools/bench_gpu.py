"""Real sizes on one GPU: seconds, memory, and shares of what the card can do.

    make gpu                                        # one card of 80 GB: the tests, then this
    python -m tools.bench --gpu --out bench.json    # this alone
    # does it run at all: seconds, on a CPU too
    python -m tools.bench --gpu --shape tiny --prompts 1 --n 2 --images 1 --new_tokens 32

Weights are random. A 2B is whole. An 8B decodes whole in bf16; its trainings, in fp32 weights and
bf16 arithmetic, take 9 of its 36 layers unless more than 100 GB are free. Trainings are forward and
backward, without the optimizer. GiB are all that is on the card at the peak.

    floor of a decoding step = bytes that it must read / the card's bandwidth
        bytes: weights of words without the input embeddings, each prompt's keys and values once,
        those of half the new tokens of each row
    FLOPs of SFT = 6 (N T + V D W) + 6 L Q T^2
        N: weights of L layers; T tokens; W of them have a label; Q: width of all query heads; the
        second term is attention, causal. What checkpointing computes again does not count, nor
        does the frozen tower.

Bandwidth and peak are measured in the same run: by a large copy, by a large product in bf16.
Source: ours.
"""

import dataclasses
import time

import torch
import transformers

from common.run import write_json
from sft import Config as SFTConfig
from sft import Step
from tools import ways
from tools.measure import Book, free, seconds
from tools.shapes import check_shape, make, prompt, random_group, special, weights, widths


@dataclasses.dataclass
class Config:
    shape: str = "2b,8b"  # of tools/shapes.py, one after another; tiny: to try this script
    prompts: int = 8  # decoding: prompts
    n: int = 8  # samples a prompt
    images: int = 4  # images a prompt, 256 tokens each
    words: int = 256  # words a prompt
    new_tokens: int = 256  # tokens a sample; in the update the shortest has a quarter
    sft_tokens: int = 4096  # SFT: sequence length
    minutes: float = 9.0  # what cannot end by then is not begun
    began: float = 0.0  # from when minutes count, in seconds since 1970; 0 = now
    out: str = ""  # also write the figures as JSON

    def __post_init__(self):
        for shape in self.shapes:
            check_shape(shape)

    @property
    def shapes(self):
        return self.shape.split(",")


CUT, WHOLE_FROM = 9, 100e9  # layers of an 8B's trainings; bytes that must be free for all
# what a row of the table says
DECODING = ("tokens/s", "ms a step", "share of the floor", "GiB")
SFT = ("tokens/s", "share of the peak", "GiB")
UPDATE = ("s", "GiB")


def one_shape(config, shape):
    """The config as `prompt` and `random_group` read it."""
    return dataclasses.replace(config, shape=shape)


def timed(work, device, times=1):
    """Run work() so many times -> seconds a time, GiB on the card at the peak (None on a CPU)."""
    if device == "cpu":
        return sum(seconds(work) for _ in range(times)) / times, None
    torch.cuda.reset_peak_memory_stats()
    mean = sum(seconds(work, device) for _ in range(times)) / times
    return mean, torch.cuda.max_memory_allocated() / 2**30


# ----------------------------------------------------------------------------------------- the card


def measure_card(device):
    """-> {bytes a second of a copy, FLOPs a second of a product in bf16}."""
    size, side = (2**30, 8192) if device == "cuda" else (2**24, 256)
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    figures = {}
    for name, amount, work in (
        ("bandwidth", 2 * size, lambda: b.copy_(a)),  # read and written
        ("peak", 2 * side**3, lambda: x @ x),
    ):
        work()  # warm-up
        took = timed(lambda work=work: [work() for _ in range(20)], device)[0] / 20
        figures[name] = amount / took
    return figures


def about(config, device, card):
    """What was measured where."""
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, fp32: no GPU's figures"
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    return dict(device=name, **versions, card=card, config=dataclasses.asdict(config))


# ----------------------------------------------------------------------------------------- decoding


def bytes_of_a_step(config, shape, width):
    """What a decoding step must read, weights and caches having `width` bytes a number."""
    w, counts = widths(shape), weights(shape)
    prompts = config.prompts * (config.images * 258 + config.words)
    own = config.prompts * config.n * config.new_tokens / 2
    return width * (counts.layers + counts.head + 2 * w.L * w.K * (prompts + own))


def measure_decoding(config, shape, device, card, book):
    """Ours, plain and captured, and transformers' own on the same weights."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = book.measure(
        f"{shape}: model to decode", 40, lambda: make(shape, 0, dtype, device).eval()
    )
    if model is None:
        return
    batch = prompt(one_shape(config, shape), config.prompts, device)
    floor = bytes_of_a_step(config, shape, dtype.itemsize) / card["bandwidth"]
    total = config.prompts * config.n * config.new_tokens

    def figures(decode):
        decode(2)  # warm-up
        first = seconds(lambda: decode(1), device)  # the prompts and one token a row
        took, gib = timed(lambda: decode(config.new_tokens), device)
        step = (took - first) / (config.new_tokens - 1)
        values = total / took, 1e3 * step, floor / step, gib
        return dict(zip(DECODING, values), prompts_s=first)

    def ours(new_tokens, graph=False):
        ways.decode(model, batch, new_tokens, config.n, cuda_graph=graph)

    def captured(new_tokens):
        ours(new_tokens, graph=new_tokens > 1)  # the first token is not captured

    def theirs(new_tokens):
        ways.naive_decode(model, batch, new_tokens, config.n)

    book.measure(f"{shape}: decoding", 40, lambda: figures(ours))
    if device == "cuda":
        book.measure(f"{shape}: decoding, captured", 40, lambda: figures(captured))
    else:
        book.missing[f"{shape}: decoding, captured"] = "not run: no GPU"
    book.measure(f"{shape}: decoding, transformers", 60, lambda: figures(theirs))


# ---------------------------------------------------------------------------------------- trainings


def layers_of(shape, device):
    """How many layers a training takes here; 0 = all."""
    if shape != "8b" or device == "cpu":
        return 0
    free()
    return 0 if torch.cuda.mem_get_info()[0] > WHOLE_FROM else CUT


def make_trainable(shape, layers, device):
    """fp32 weights, the tower frozen; gradients are there from the start."""
    model = make(shape, layers, torch.float32, device).train()
    model.model.visual.requires_grad_(False)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    return model


def measure_trainings(config, shape, device, card, book):
    """SFT, and the update of one group, with what they are compared with."""
    layers = layers_of(shape, device)
    mark = f" ({layers} of {widths(shape).L} layers)" if layers else ""
    model = book.measure(
        f"{shape}: model to train", 40, lambda: make_trainable(shape, layers, device)
    )
    if model is None:
        return

    def measure(name, work, checkpointing, figures):
        def run():
            ways.checkpoint_activations(model, checkpointing)
            work()  # warm-up
            return figures(*timed(work, device, times=2)) | dict(mark=mark)

        book.measure(f"{shape}: {name}{', checkpointing' * checkpointing}", 20, run)

    sized = one_shape(config, shape)
    step, n_labels = sft_step(model, sized, device)
    flops = sft_flops(shape, layers or widths(shape).L, config.sft_tokens, n_labels)

    def shares(took, gib):
        return dict(zip(SFT, (config.sft_tokens / took, flops / took / card["peak"], gib)))

    for checkpointing in (False, True):
        measure("SFT", step, checkpointing, shares)
    for name, work, checkpointing in updates(model, sized, device):
        measure(name, work, checkpointing, lambda took, gib: dict(zip(UPDATE, (took, gib))))


def updates(model, config, device):
    """-> (name, forward and backward of one group, whether activations are made again)."""
    batch, hidden = prompt(config, 1, device), model.config.text_config.hidden_size
    rollout = random_group(config, hidden, device, shortest=0.25)
    group = model, batch, rollout, torch.randn(config.n, 1, device=device)
    longest = max(len(z) for z in rollout.latents)
    exact = f"update, exact gradient ({longest} terms)"
    return (
        ("update", lambda: ways.update(*group), False),
        ("update", lambda: ways.update(*group), True),
        (exact, lambda: ways.update(*group, longest), False),
        ("update, prompt copied", lambda: ways.naive_update(*group), False),
        ("update, prompt copied", lambda: ways.naive_update(*group), True),
    )


def sft_step(model, config, device):
    """-> forward and backward of one sample with four future frames; its words with a label."""
    batch = prompt(config, 1, device, latents=16, length=config.sft_tokens)
    labels = batch["input_ids"].masked_fill(
        batch["input_ids"] == special(config.shape).latent, -100
    )
    labels[:, : config.images * 258 + config.words] = -100
    batch.update(
        labels=labels,
        future_pixel_values=torch.randn(4 * 16, 1536, device=device),
        future_grid_thw=torch.tensor([[1, 4, 4]] * 4, device=device),
    )
    settings = SFTConfig()
    step, n_labels = Step(model, settings), int((labels[:, 1:] != -100).sum())

    def run():
        with ways.autocast(model.device):
            ce, latent = step(batch)
            loss = ce / n_labels + settings.lam * latent / 16  # Eq. (1)
        loss.backward()
        return loss.detach()

    return run, n_labels


def sft_flops(shape, layers, tokens, labels):
    """6 (N T + V D W) + 6 L Q T^2, see above."""
    counts, w = weights(shape), widths(shape)
    products = counts.layer * layers * tokens + counts.head * labels
    return 6 * (products + layers * w.Q * tokens**2)


# ---------------------------------------------------------------------------------------- the table


def table(head, book, shapes):
    """The book as markdown: a row a figure, a column a shape."""
    card = head["card"]
    title = f"{head['device']}, torch {head['torch']}; copy {card['bandwidth'] / 1e12:.2f} TB/s, "
    title += f"product in bf16 {card['peak'] / 1e12:.0f} TFLOP/s"
    lines = [f"| {title} | " + " | ".join(shapes) + " |", "|---" * (len(shapes) + 1) + "|"]
    rows = [name.partition(": ")[2] for name in [*book.figures, *book.missing]]
    for row in dict.fromkeys(rows):
        names = [f"{shape}: {row}" for shape in shapes]
        figures = DECODING if row.startswith("decoding") else SFT if row[:3] == "SFT" else UPDATE
        if not any(name in book.figures for name in names):
            figures = [""]  # nothing to tell apart
        for figure in figures:
            cells = [cell(book, name, figure) for name in names]
            lines.append(f"| {row}{', ' * bool(figure)}{figure} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(book, name, figure):
    """A figure as text, with its mark, or why there is none."""
    if name not in book.figures:
        return book.missing.get(name, "not run")
    value = book.figures[name][figure]
    return "-" if value is None else f"{value:,.4g}{book.figures[name].get('mark', '')}"


def main(config):
    """Measure until the time is over; print, write -> {head, figures, missing}.

    Raises SystemExit at the end if a measurement failed.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head = about(config, device, measure_card(device))

    def save(book):
        if config.out:
            write_json(config.out, dict(head, figures=book.figures, missing=book.missing))

    book = Book((config.began or time.time()) + 60 * config.minutes, save)
    for shape in config.shapes:
        for part in (measure_decoding, measure_trainings):
            part(config, shape, device, head["card"], book)
            free()
    save(book)
    print(table(head, book, config.shapes))
    for name, reason in book.missing.items():
        print(f"{name}: {reason}")
    if book.failed:
        raise SystemExit(f"failed: {', '.join(book.failed)}")
    return dict(head, figures=book.figures, missing=book.missing)
