"""Supervised fine-tuning: words by cross-entropy, latents by alignment with real future frames.

Source: paper sec. 3.2.

    L_SFT    = L_CE + lam * L_latent                                                    Eq. (1)
    L_CE     = - sum_{t in T} log p(w_t | w_<t, V, q)    text, answer, control tokens   Eq. (2)
    L_latent = 1/|S| sum_{t in S} || h_{t-1} - e*_t ||^2                                Eq. (3)

    python sft.py --model DIR --data train.json                        # one process: CPU or one GPU
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen3-VL-8B-Instruct --data train.json --shard
    python sft.py ... --no-spans            # the text-only baseline on the same rows

The vision tower and merger are frozen (they define e*), the language model is fully tuned. Weights
are kept in fp32; on CUDA the arithmetic runs in bf16 autocast. Ranks are DDP's, each with all
weights; with --shard each holds a part (common/shard.py). With --lora_rank small matrices are
trained beside a frozen model (common/lora.py). Writes OUT/log.jsonl, OUT/loss.png and OUT/step_N (a
Hugging Face folder; its trainer/ is what a resumed run needs).

Where this differs from the paper:
 1. Eq. (2) is a mean over the tokens of the step, Eq. (3) a mean over the D dimensions, as in the
    official code: with the printed sum, lam = 0.1 would weigh the latents 4,096 times more.
 2. Optional, off by default: `latent_loss`, `latent_head`, `stop_term`. What is fed to a span in
    training can be changed in a few lines: variants/pause_tokens.py, variants/self_forcing.py.
 3. Weights and optimizer are kept in fp32, the arithmetic is bf16 (Table 8 says bf16): at lr 1e-5
    most updates of a bf16 weight would round to nothing.
Where this differs from the official code:
 4. lam = 0.1 and L_max = 4 as in the paper; the shipped script says 0.2 and 32, left over from
    another project.
 5. Every token of the optimizer step weighs the same: counts are summed over ranks and
    micro-batches before the first backward. A mean of means would favour short samples.
 6. A sample that cannot be read is named in log.jsonl; its rank takes the step without it.

Axis letters: B rows, L tokens, N latents, D hidden.
"""

import contextlib
import dataclasses
import math
import os
import time
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common.checkpoint import make_optimizer
from common.cli import run_script
from common.heldout import HeldOut, held_out_rows
from common.report import draw_curves
from common.runs import Machine, Run, check_ranks, rows_of, step_or_skip
from data import DataConfig, Samples, at_least, collate, loader, model_inputs, to_device
from model import LATENT, log_continue


@dataclasses.dataclass
class Config(DataConfig):
    # folder, run's folder or hub id; stock or Future-L1  # paper sec. 4
    model: str = "Qwen/Qwen3-VL-8B-Instruct"
    data: str = ""  # training records, see data.py
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    eval_data: str = ""  # held-out records: their loss is logged, they are not learnt from  # ours
    eval_every: int = 50  # steps between two looks at them; also at the last step  # ours
    eval_rows: int = 0  # only the first so many; 0 = all  # ours
    out: str = "runs/sft"  # the run's folder
    resume: bool = False  # continue from the newest checkpoint in `out`
    seed: int = 0  # order of the data  # ours
    # optimisation
    epochs: float = 1.0  # passes over the data  # paper Table 8
    steps: int = 0  # optimizer steps; 0 = from epochs  # ours
    global_batch: int = 128  # samples a step over all ranks  # paper Table 8
    micro_batch: int = 1  # samples a forward on one rank  # ours
    lr: float = 1e-5  # peak  # paper Table 8
    warmup: float = 0.1  # share of the steps, linear; then cosine to 0  # paper Table 8
    beta1: float = 0.9  # paper Table 8
    beta2: float = 0.95  # paper Table 8
    weight_decay: float = 0.1  # on matrices  # paper Table 8
    clip: float = 1.0  # gradient norm  # paper Table 8
    # method
    lam: float = 0.1  # weight of the latent term, Eq. (1)  # paper Table 8
    latent_loss: str = "mse"  # mse (paper) | nmse (over the targets' variance)  # ours
    latent_head: str = ""  # "" = none (paper) | linear  # ours
    spans: bool = True  # --no-spans: text-only SFT, the paper's baseline
    stop_term: bool = False  # also train "do not stop yet" inside spans  # ours
    freeze_vision: bool = True  # vision tower and merger  # paper Table 8
    # machine
    bf16: bool = True  # on CUDA; the CPU computes in fp32  # paper Table 8
    # recompute activations: less memory, about a third slower  # ours
    gradient_checkpointing: bool = False
    shard: bool = False  # weights, gradients, optimizer spread over the ranks  # ours
    lora_rank: int = 0  # of matrices trained beside a frozen model; 0 = the model itself  # ours
    save_every: int = 50  # steps between checkpoints; the last two are kept  # ours
    track: str = ""  # also log to wandb | trackio, a package that is installed  # ours

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "global_batch", "micro_batch", "save_every", "eval_every")
        at_least(self, 0, "eval_rows")
        check_ranks(self)
        if self.latent_loss not in ("mse", "nmse"):
            raise ValueError(f"latent_loss is {self.latent_loss!r}, expected mse or nmse")

    @property
    def label(self):
        """What is trained, in a word: it names the run."""
        return "latent" if self.spans else "text"


def sft_loss(
    model, *, labels, latents=None, lam=0.1, targets=None, latent_var=1.0, stop_term=False, **inputs
):
    """Eq. (1)-(3) on one batch -> dict of means, sums and counts. Source: sec. 3.2.

    inputs: HF-named tensors (input_ids, attention_mask, pixel_values, image_grid_thw, ...).
    labels (B, T): -100 = no label, aligned with input_ids (the shift is inside).
    latents (N, D): what is fed, the true e* under teacher forcing.
    targets (N, D): what Eq. (3) compares with, default `latents`; no gradient goes there.
    latent_var: Eq. (3) is divided by it; 1 = the paper's.
    stop_term: also train "do not stop yet", - log(1 - p(<|latent_end|>)) on each step that feeds a
    latent, as further members of T.
    The dict: loss, ce and latent are means; ce_sum and latent_sum are sums over n_text and
    n_latent, which the loop divides by the counts of the whole step. Raises ValueError on a count
    mismatch.
    """
    h, _ = model.hidden(**inputs, latents=latents)  # (B, T, D)

    # Eq. (2): words, answer and control tokens; only positions that carry a label reach the head
    has_label = labels[:, 1:] != -100  # (B, T - 1): the state at t - 1 predicts t
    words = labels[:, 1:][has_label]  # (n_text,)
    logits = model.logits(h[:, :-1][has_label])  # (n_text, V)
    ce_sum, n_text = F.cross_entropy(logits, words, reduction="sum"), words.numel()

    # Eq. (3), as a mean over D
    is_latent = inputs["input_ids"][:, 1:] == model.config.latent_id  # (B, T - 1)
    h_before = h[:, :-1][is_latent]  # (N, D)
    z = model.to_latent(h_before).float()  # (N, D)
    e = latents if targets is None else targets
    e = z.new_zeros(0, z.shape[-1]) if e is None else e.detach().float()
    distance = (z - e).pow(2).mean(-1) / latent_var  # (N,)
    latent_sum, n_latent = distance.sum(), len(distance)

    if stop_term:
        log_stop = model.logits(h_before).log_softmax(-1)[:, model.config.latent_end_id]
        ce_sum = ce_sum - log_continue(log_stop).sum()
        n_text = n_text + n_latent

    ce, latent = ce_sum / max(n_text, 1), latent_sum / max(n_latent, 1)
    means = dict(loss=ce + lam * latent, ce=ce, latent=latent)  # Eq. (1)
    return dict(means, ce_sum=ce_sum, n_text=n_text, latent_sum=latent_sum, n_latent=n_latent)


def target_variance(e):
    """Targets (N, D) -> their variance, a mean over D: the error of guessing their mean. Ours."""
    return (e.float() - e.float().mean(0)).pow(2).mean()


class Step(torch.nn.Module):
    """The forward that DDP wraps: a batch -> its sums of Eq. (2) and (3).

    A variant that feeds a span something else overrides `fed`.
    """

    def __init__(self, model, config, latent_var=1.0):
        super().__init__()
        self.model, self.config, self.latent_var = model, config, latent_var
        self.figures = {}  # more for the step's line, from a variant: the first rank's last forward

    def fed(self, batch, e, progress):
        """What is fed at the `<|latent|>` positions (N, D), row by row in order. Source: sec. 3.2.

        batch from `data.collate`; e (N, D): the true future, which is fed here (teacher forcing).
        progress: the share of the training that is done, in [0, 1).
        """
        return e

    def forward(self, batch, progress=0.0):
        """-> the sums of Eq. (2) and Eq. (3)."""
        model, e, latents = self.model, None, None
        if "future_pixel_values" in batch:
            frames = batch["future_pixel_values"], batch["future_grid_thw"]
            e = model.encode_frames(*frames)  # (N, D)
            latents = self.fed(batch, e, progress)
        args = dict(model_inputs(batch), labels=batch["labels"], latents=latents, targets=e)
        options = dict(latent_var=self.latent_var, stop_term=self.config.stop_term)
        out = sft_loss(model, **args, **options)
        return out["ce_sum"], out["latent_sum"]


def learning_rate(step, steps, config):
    """Linear warm-up, then cosine to 0. Source: paper Table 8."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def sample_order(n, total, seed):
    """Which of n samples is used at each of `total` places: a new permutation each epoch. Ours."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < total:
        order += torch.randperm(n, generator=generator).tolist()
    return order[:total]


def micro_batches(order, first_step, steps, global_batch, micro_batch, rank, world):
    """Yields the lists of indices that one rank reads from first_step on. Source: ours.

    Step s owns order[s*G:(s+1)*G] whatever the number of ranks, so that 1 process and 8 see the
    same batches. Each rank has the same number of lists a step; some may be empty.
    """
    count = -(-global_batch // (world * micro_batch))
    for step in range(first_step, steps):
        own = order[step * global_batch : (step + 1) * global_batch][rank::world]
        for k in range(count):
            yield own[k * micro_batch : (k + 1) * micro_batch]


def print_row(batch, tokenizer, latent_id):
    """One training row as a table: token, label, what is fed, text. Equal tokens share a line."""
    real = batch["attention_mask"][0].bool()
    ids, labels = (batch[name][0][real].tolist() for name in ("input_ids", "labels"))
    print("row 0:   token   label  fed      text")
    for (token, label), same in groupby(zip(ids, labels)):
        text, times = tokenizer.decode([token]), len(list(same))
        word = "visual" if text in ("<|image_pad|>", "<|video_pad|>") else "text"
        fed = "latent" if token == latent_id else word
        label = "." if label == -100 else label
        more = f" x {times}" if times > 1 else ""
        print(f"       {token:>7} {label:>7}  {fed:<7}  {text!r}{more}")


def plan_order(rows, config):
    """The rows in the order they are used, fixed by the seed -> (list of indices, steps).

    Raises SystemExit if there is nothing to train on.
    """
    total = config.steps * config.global_batch or round(len(rows) * config.epochs)
    if total < 1:
        raise SystemExit(
            f"nothing to train on: {config.steps} steps, {config.epochs} epochs of {len(rows)} rows"
        )
    return sample_order(len(rows), total, config.seed), -(-total // config.global_batch)


def load_steps(samples, order, first, steps, config, machine):
    """From step `first` on: the micro-batches of this rank, a list a step, decoded ahead."""
    sizes = config.global_batch, config.micro_batch, machine.rank, machine.world
    plan = list(micro_batches(order, first, steps, *sizes))
    count, pad = len(plan) // max(1, steps - first), samples.tokenizer.pad_token_id or 0
    # begun here, before a checkpoint's random state is put back: a loader draws a number
    batches = iter(loader(samples, plan, config.workers, pad_id=pad))
    return ([next(batches) for _ in range(count)] for _ in range(first, steps))


def measure_variance(model, samples, order, config, machine):
    """What Eq. (3) is divided by: one number for the whole run.

    mse: 1. nmse: the variance of the targets in the first 64 samples. Raises SystemExit if rows
    have spans but none of these can be read.
    """
    if config.latent_loss != "nmse" or not config.spans:
        return 1.0
    batch = to_device(collate([samples[i] for i in order[:64]], 0), model.device)
    if "future_pixel_values" in batch:
        with machine.autocast():
            e = model.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])
        return machine.sum([target_variance(e)])[0] / machine.world  # the same on every rank
    if any(not isinstance(part, str) for row in samples.rows for part in row.response):
        raise SystemExit("none of the first 64 samples has a future frame that can be read")
    return 1.0


class Counts(NamedTuple):
    """What a step holds, over all micro-batches and ranks."""

    n_text: int  # |T| of Eq. (2)
    n_latent: int  # |S| of Eq. (3)
    n_tokens: int  # all that are fed, padding too


def count_step(micro, latent_id, config, machine):
    """A step's micro-batches on each rank -> Counts, known before the first backward."""
    n_latent = sum(int((batch["input_ids"] == latent_id).sum()) for batch in micro)
    n_text = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro)
    n_text += n_latent * config.stop_term
    n_tokens = sum(batch["input_ids"].numel() for batch in micro)
    return Counts(*(int(n) for n in machine.sum([n_text, n_latent, n_tokens])))


def check_first(counts, skipped):
    """Raises SystemExit if the first step has no word to learn: a wrong media_root, most likely."""
    if counts.n_text == 0:
        why = f"could be used, e.g. {skipped[0].why}" if skipped else "has a word to learn"
        raise SystemExit(f"no sample of step 0 {why}")


def trained_on(batch, machine):
    """What a `Step` takes of a batch. The samples stay: FSDP moves to the GPU what it is given."""
    return to_device({k: v for k, v in batch.items() if k != "samples"}, machine.device)


def backward(step, micro, progress, counts, config, machine):
    """A step's forwards and backwards -> dict of Eq. (1)-(3), the means over all ranks."""
    n_text, n_latent = counts.n_text, max(counts.n_latent, 1)
    sums = torch.zeros(2, dtype=torch.float64)
    for batch in micro:
        # the ranks' gradients add up once a step; sharded ones, which are nowhere whole, at once
        waits = isinstance(step, DistributedDataParallel) and batch is not micro[-1]
        with step.no_sync() if waits else contextlib.nullcontext():
            with machine.autocast():
                ce, latent = step(trained_on(batch, machine), progress)
            (ce / n_text + config.lam * latent / n_latent).backward()  # Eq. (1)
        sums += torch.stack([ce, latent]).detach().double().cpu()
    ce, latent = machine.sum(sums)
    ce, latent = ce / n_text, latent / n_latent
    return dict(ce=ce, latent=latent, loss=ce + config.lam * latent)


def held_out_loss(module, held_out, tokenizer, log, config, machine):
    """Eq. (1)-(3) on what was held out, the true future fed -> fields of the step's line.

    Means over the tokens of all rows and ranks; None where there is no token. module: a `Step`.
    """
    sums, n_text, n_latent = torch.zeros(2, dtype=torch.float64), 0, 0
    latent_id = tokenizer.convert_tokens_to_ids(LATENT)
    with held_out.aside(module):
        for batch in held_out.batches(tokenizer, config.micro_batch, spans=config.spans):
            counts = count_step([batch], latent_id, config, machine)
            n_text, n_latent = n_text + counts.n_text, n_latent + counts.n_latent
            with machine.autocast():
                sums += torch.stack(module(trained_on(batch, machine))).double().cpu()
    ce, latent = machine.sum(sums)
    ce, latent = ce / n_text if n_text else None, latent / max(n_latent, 1)
    loss = ce + config.lam * latent if n_text else None  # Eq. (1)
    return held_out.line(log, loss=loss, ce=ce, latent=latent)


def train(config, rows=None, module=Step, samples=Samples):
    """Run the training -> path of the last checkpoint.

    rows: list of Row, default those of config.data. module, samples: a variant's subclass of each.
    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder; the data in its order; the model
    machine = Machine(config.bf16, config.shard)
    rows = rows_of(config) if rows is None else rows
    held_out = HeldOut(held_out_rows(config), config, machine)
    run = Run(config, rows, machine, config.label)
    order, steps = plan_order(rows, config)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load(latent_head=config.latent_head or None)
    encoded = samples(rows, tokenizer, config, train=True, spans=config.spans)
    batches = load_steps(encoded, order, run.first, steps, config, machine)

    # what is trained, and the state of a run that goes on
    state = run.state or dict(latent_var=measure_variance(model, encoded, order, config, machine))
    latent_var = state["latent_var"]
    loss = module(model, config, latent_var)
    wrapped = machine.wrap(loss, unused=not config.freeze_vision)
    optimizer, trained = make_optimizer(model, config)
    run.start(model, optimizer, describe(config, rows, model, steps, machine))

    for step in run.log.steps(steps, run.name):
        # the step's samples, and what Eq. (2) and (3) are divided by
        began, micro = time.time(), next(batches)
        if step == 0 and machine.master:
            print_row(micro[0], tokenizer, model.config.latent_id)
        skipped, _ = run.log.skips([skip for batch in micro for skip in batch["skipped"]])
        counts = count_step(micro, model.config.latent_id, config, machine)
        if step == 0:
            check_first(counts, skipped)

        # Eq. (1), its gradient, the update; a step without a word to learn has none
        lr, norm = learning_rate(step, steps, config), None
        means = dict.fromkeys(("ce", "latent", "loss"))
        if counts.n_text:
            means = backward(wrapped, micro, step / steps, counts, config, machine)
            norm = step_or_skip(optimizer, trained, lr, config.clip)

        # a line in the log, and now and then a checkpoint
        line = dict(step=step, lr=lr, tokens=counts.n_tokens, latents=counts.n_latent, **means)
        line.update(loss.figures)
        line.update(grad_norm=norm, update_skipped=norm is None or not math.isfinite(norm))
        line.update(skipped=[list(skip) for skip in skipped], seconds=round(time.time() - began, 4))
        if held_out.due(step + 1, steps):
            line.update(held_out_loss(wrapped, held_out, tokenizer, run.log, config, machine))
        run.log.write(line, ce=means["ce"], latent=means["latent"], **held_out.shown)
        due = run.save_if_due(step + 1, steps, model, tokenizer, optimizer, latent_var=latent_var)
        if due and machine.master:
            draw_curves(run.log.path, os.path.join(config.out, "loss.png"))
    return run.checkpoint


def describe(config, rows, model, steps, machine):
    """The run in one line."""
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"{config.label} SFT: {len(rows)} rows, {steps} steps x {config.global_batch} samples on "
        f"{machine.world} ranks ({machine.device.type}), {config.micro_batch} a forward, seed "
        f"{config.seed}, {trained:,} parameters trained of {weights:,}, a checkpoint every "
        f"{config.save_every} steps"
    )


if __name__ == "__main__":
    run_script(lambda config: print("last checkpoint:", train(config)), Config)
