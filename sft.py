"""Supervised fine-tuning: words by cross-entropy, latents by alignment with real future frames
(paper sec. 3.2).

    L_SFT    = L_CE + lam * L_latent                                                    Eq. (1)
    L_CE     = - sum_{t in T} log p(w_t | w_<t, V, q)    text, answer, control tokens   Eq. (2)
    L_latent = 1/|S| sum_{t in S} || h_{t-1} - e*_t ||^2                                Eq. (3)

    python sft.py --model DIR --data train.json                        # one process: CPU or one GPU
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen3-VL-8B-Instruct --data train.json --zero
    # the text-only baseline on the same rows
    python sft.py ... --no-spans

The vision tower and merger are frozen (they define e*), the language model is fully tuned. Weights
are kept in fp32; on CUDA the arithmetic runs in bf16 autocast. Writes OUT/log.jsonl, OUT/loss.png
and OUT/step_N (a Hugging Face folder plus trainer.pt).

Where this differs from the paper:
 1. Eq. (2) is a mean over the tokens of the step, Eq. (3) a mean over the D dimensions, as in the
    official code: with the printed sum, lam = 0.1 would weigh the latents 4,096 times more.
 2. Optional, off by default: `latent_loss`, `latent_head`, `stop_term`;
    `self_forcing`, which from a point of the training on feeds a row its own predicted latents
    instead of the true ones, as decoding will; `pause_tokens`, a control in which a span has its
    length but no visual content and no target.
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
import functools
import json
import math
import os
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from common.report import draw_curves
from common.runs import (
    make_optimizer,
    newest,
    parse_config,
    restore,
    resume_point,
    rows_of,
    save_checkpoint,
    set_up_ranks,
    sum_over_ranks,
    trim_log,
)
from data import DataConfig, Samples, collate, loader, model_inputs, to_device
from model import best_attention, load, log_continue, target_variance


@dataclasses.dataclass
class Config(DataConfig):
    # folder, run's folder or hub id; stock or Future-L1  # paper sec. 4
    model: str = "Qwen/Qwen3-VL-8B-Instruct"
    data: str = ""  # training records, see data.py
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    out: str = "runs/sft"  # the run's folder
    resume: bool = False  # continue from the newest checkpoint in `out`
    seed: int = 0  # order of the data, self-forcing draws  # ours
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
    self_forcing: float = 0.0  # share of the rows fed their own latents, 0 = paper  # ours
    self_forcing_from: float = 0.3  # from this share of the steps on  # ours
    # forward passes without gradient that make them; each fixes one more latent  # ours
    self_forcing_passes: int = 1
    # control: spans hold a learned token, no latents, no latent loss  # ours
    pause_tokens: bool = False
    freeze_vision: bool = True  # vision tower and merger  # paper Table 8
    # machine
    bf16: bool = True  # on CUDA; the CPU computes in fp32  # paper Table 8
    # recompute activations: less memory, about a third slower  # ours
    gradient_checkpointing: bool = False
    zero: bool = False  # optimizer state spread over the ranks  # ours
    save_every: int = 50  # steps between checkpoints; the last two are kept  # ours
    wandb: bool = False  # also log to Weights & Biases  # ours

    def __post_init__(self):
        super().__post_init__()
        if self.latent_loss not in ("mse", "nmse"):
            raise ValueError(f"latent_loss is {self.latent_loss!r}, expected mse or nmse")

    @property
    def label(self):
        return "pause" if self.pause_tokens else "latent" if self.spans else "text"


def sft_loss(
    model, *, labels, latents=None, lam=0.1, targets=None, latent_var=1.0, stop_term=False, **inputs
):
    """Eq. (1)-(3) on one batch -> dict(loss, ce, latent: means.

    Ce_sum, n_text, latent_sum, n_latent).

    inputs: HF-named tensors (input_ids, attention_mask, pixel_values, image_grid_thw, ...).
    labels (B, T): -100 = no label, aligned with input_ids (the shift is inside).
    latents (N, D): what is fed, the true e* under teacher forcing.
    targets (N, D): what Eq. (3) compares with, default `latents`; no gradient goes there.
    latent_var: Eq. (3) is divided by it; 1 = the paper's.
    stop_term: also train "do not stop yet", - log(1 - p(<|latent_end|>)) on each step that feeds a
    latent, as further members of T.
    The sums and counts are what is trained: the loop divides sums by the counts of the whole step.
    Raises ValueError on a count mismatch.
    """
    h, _ = model.hidden(**inputs, latents=latents)  # (B, T, D)

    # Eq. (2): words, answer and control tokens; only positions that carry a label reach the head
    has_label = labels[:, 1:] != -100  # (B, T - 1): the state at t - 1 predicts t
    words = labels[:, 1:][has_label]  # (n_text,)
    logits = model.lm_head(h[:, :-1][has_label]).float()  # (n_text, V)
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
        log_stop = model.lm_head(h_before).float().log_softmax(-1)[:, model.config.latent_end_id]
        ce_sum = ce_sum - log_continue(log_stop).sum()
        n_text = n_text + n_latent

    ce, latent = ce_sum / max(n_text, 1), latent_sum / max(n_latent, 1)
    means = dict(loss=ce + lam * latent, ce=ce, latent=latent)  # Eq. (1)
    return dict(means, ce_sum=ce_sum, n_text=n_text, latent_sum=latent_sum, n_latent=n_latent)


class Step(torch.nn.Module):
    """The forward that DDP wraps: batch -> Eq. (1)'s sums.

    Everything that feeds latents is decided here.
    """

    def __init__(self, model, config, latent_var=None):
        super().__init__()
        self.model, self.config, self.latent_var = model, config, latent_var

    def forward(self, batch, own=None):
        """batch from `data.collate`.

        Own (B,) bool: rows that are fed their own latents (self-forcing).

        -> the sum of Eq. (2) over the batch, lam times that of Eq. (3), and the latter alone
        without gradient.
        """
        m, c, inputs = self.model, self.config, model_inputs(batch)
        is_latent = batch["input_ids"] == m.config.latent_id  # (B, L)
        e = (
            m.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])
            if "future_pixel_values" in batch
            else None
        )  # (N, D)
        fed, lam = e, c.lam
        if c.pause_tokens and e is not None:
            fed, lam = m.get_input_embeddings()(batch["input_ids"][is_latent]), 0.0
        elif own is not None and e is not None:
            row_of = is_latent.nonzero()[:, 0]  # (N,)
            with torch.no_grad():
                for _ in range(
                    c.self_forcing_passes
                ):  # after pass k a row's first k latents are what decoding gives
                    h, _ = m.hidden(**inputs, latents=fed.to(e.dtype))  # (B, L, D)
                    z = m.to_latent(
                        h[:, :-1][is_latent[:, 1:]]
                    )  # (N, D): the state before each latent predicts it
                    fed = torch.where(own[row_of, None], z.to(e.dtype), e)
        out = sft_loss(
            m,
            **inputs,
            latents=fed,
            targets=e,
            labels=batch["labels"],
            lam=lam,
            latent_var=self.latent_var or 1.0,
            stop_term=c.stop_term,
        )
        return out["ce_sum"], lam * out["latent_sum"], out["latent_sum"].detach()


def learning_rate(step, steps, config):
    """Linear warm-up, then cosine to 0. Source: paper Table 8."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def sample_order(n, total, seed):
    """Which of n samples is used at each of `total` places: a new permutation each epoch.

    Source: ours.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(-(-total // n))])[
        :total
    ].tolist()


def micro_batches(order, first_step, steps, global_batch, micro_batch, rank, world):
    """The lists of indices one rank reads from first_step on: the same number a step on each
    rank, some may be empty.

    Step s owns order[s*G:(s+1)*G] whatever the number of ranks, so that 1 process and 8 see the
    same batches.
    """
    count = -(-global_batch // (world * micro_batch))
    for step in range(first_step, steps):
        mine = order[step * global_batch : (step + 1) * global_batch][rank::world]
        for k in range(count):
            yield mine[k * micro_batch : (k + 1) * micro_batch]


def print_row(batch, tokenizer, latent_id):
    """One training row as a table: token, label, what is fed, text.

    Runs of equal tokens share a line.
    """
    print("row 0:   token   label  fed      text")
    real = batch["attention_mask"][0].bool()
    ids, labels, runs = batch["input_ids"][0][real].tolist(), batch["labels"][0][real].tolist(), []
    for token, label in zip(ids, labels):
        if runs and runs[-1][:2] == [token, label]:
            runs[-1][2] += 1
        else:
            runs.append([token, label, 1])
    for token, label, times in runs:
        text = tokenizer.decode([token])
        fed = (
            "latent"
            if token == latent_id
            else "visual"
            if text in ("<|image_pad|>", "<|video_pad|>")
            else "text"
        )
        print(
            f"       {token:>7} {label if label != -100 else '.':>7}  {fed:<7}  {text!r}"
            + (f" x {times}" if times > 1 else "")
        )


def train(config, rows=None):
    """Run the training -> path of the last checkpoint.

    Raises SystemExit on a folder in use, ValueError on bad input.

    rows: list of data.Row, default those of config.data.
    """
    rank, world, device = set_up_ranks()
    master = rank == 0
    rows = rows_of(config) if rows is None else rows
    checkpoint, resumed, fingerprint = resume_point(config, rows, world)
    if config.resume and not checkpoint and master:
        print(f"nothing to resume in {config.out}: starting at step 0")
    os.makedirs(config.out, exist_ok=True)

    torch.manual_seed(config.seed)
    bf16 = config.bf16 and device.type == "cuda"
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    model, tokenizer = load(
        checkpoint or newest(config.model),
        latent_head=config.latent_head or None,
        dtype=torch.float32,
        attn_implementation=best_attention() if bf16 else "sdpa",
    )
    model.to(device).train()
    model.model.visual.requires_grad_(not config.freeze_vision)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # data: the order is fixed by the seed, the place in it by the step
    total = config.steps * config.global_batch or round(len(rows) * config.epochs)
    if total < 1:
        raise SystemExit(
            f"nothing to train on: {config.steps} steps, {config.epochs} epochs of {len(rows)} rows"
        )
    steps, first = -(-total // config.global_batch), resumed["step"] if resumed else 0
    order = sample_order(len(rows), total, config.seed)
    samples = Samples(rows, tokenizer, config, train=True, spans=config.spans)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    plan = list(
        micro_batches(order, first, steps, config.global_batch, config.micro_batch, rank, world)
    )
    accumulate = len(plan) // max(1, steps - first)
    batches = iter(loader(samples, plan, config.workers, pad_id=pad))

    latent_var = resumed["latent_var"] if resumed else None
    if (
        config.latent_loss == "nmse" and not resumed
    ):  # one number for the whole run, from its first 64 readable samples
        some = to_device(collate([samples[i] for i in order[:64]], pad), device)
        if config.spans and "future_pixel_values" in some:
            with autocast():
                e = model.encode_frames(some["future_pixel_values"], some["future_grid_thw"])
            latent_var = (
                sum_over_ranks([target_variance(e)], device)[0] / world
            )  # the same number on every rank
        elif config.spans and any(
            not isinstance(part, str) for row in rows for part in row.response
        ):
            raise SystemExit(
                "none of the first 64 samples has a readable future frame to measure the variance "
                "of"
            )

    optimizer, trained = make_optimizer(model, config, world)
    step_module = Step(model, config, latent_var)
    ddp = (
        DistributedDataParallel(
            step_module,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=not config.freeze_vision,
        )
        if world > 1
        else step_module
    )
    if resumed:
        restore(optimizer, checkpoint, resumed, rank)

    log_path = os.path.join(config.out, "log.jsonl")
    if master:
        print(
            f"{config.label} SFT: {len(rows)} rows, {steps} steps x {config.global_batch} samples "
            f"= {world} ranks x "
            f"{accumulate} micro-batches x {config.micro_batch}, {device.type}, seed "
            f"{config.seed}, "
            f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters "
            "trained of "
            f"{sum(p.numel() for p in model.parameters()):,}, a checkpoint every "
            f"{config.save_every} steps"
        )
        trim_log(log_path, first)
    run = None
    if config.wandb and master:
        import wandb

        run = wandb.init(project="future-l1", config=dataclasses.asdict(config))

    bar = tqdm(
        range(first, steps),
        initial=first,
        total=steps,
        desc=config.label,
        disable=not master,
        mininterval=2,
    )
    for step in bar:
        began = time.time()
        micro = [next(batches) for _ in range(accumulate)]
        if step == 0 and master:
            print_row(micro[0], tokenizer, model.config.latent_id)
        skipped = [s for batch in micro for s in batch["skipped"]]
        for where, why in skipped:
            tqdm.write(f"skipped {where}: {why}")
        # the denominators of Eq. (2) and (3): all tokens of the step, all ranks, before the first
        # backward
        n_latent = sum(int((b["input_ids"] == model.config.latent_id).sum()) for b in micro)
        n_text = (
            sum(int((b["labels"][:, 1:] != -100).sum()) for b in micro)
            + n_latent * config.stop_term
        )
        n_text, n_latent, n_tokens, n_skipped = sum_over_ranks(
            (n_text, n_latent, sum(b["input_ids"].numel() for b in micro), len(skipped)), device
        )
        if n_skipped and world > 1:
            everyones = [None] * world
            dist.all_gather_object(everyones, skipped)
            skipped = sum(everyones, [])
        if n_text == 0:  # a wrong media_root, most likely
            raise SystemExit(
                f"no sample of step {step} could be used, e.g. {skipped[0].why}"
                if skipped
                else f"no sample of step {step} has a word to learn"
            )

        own = None
        if config.self_forcing and step >= config.self_forcing_from * steps:
            generator = torch.Generator().manual_seed(
                config.seed * 1_000_003 + step
            )  # the same draw on every rank,
            own = (
                torch.rand(config.global_batch, generator=generator) < config.self_forcing
            )  # whatever their number
            own = [
                own[rank::world][k * config.micro_batch : (k + 1) * config.micro_batch]
                for k in range(accumulate)
            ]
        sums = torch.zeros(2, dtype=torch.float64)
        for k, batch in enumerate(micro):
            last = k == accumulate - 1
            with (
                contextlib.nullcontext() if last or world == 1 else ddp.no_sync()
            ):  # set before the forward
                with autocast():
                    mine = None if own is None else own[k][batch["kept"]].to(device)
                    ce_sum, weighted, latent_sum = ddp(to_device(batch, device), mine)
                loss = ce_sum / n_text + weighted / max(n_latent, 1)  # Eq. (1)
                (loss * world).backward()  # DDP takes the mean over ranks; the sum is wanted
            sums += torch.stack([ce_sum.detach(), latent_sum]).double().cpu()
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip).item()
        lr = learning_rate(step, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):  # the norm is that of the reduced gradient: all ranks decide alike
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        ce, latent = sum_over_ranks(sums, device)
        line = dict(
            step=step,
            ce=ce / n_text,
            latent=latent / max(n_latent, 1),
            lr=lr,
            grad_norm=norm,
            tokens=int(n_tokens),
            latents=int(n_latent),
            skipped=[list(s) for s in skipped],
            update_skipped=not math.isfinite(norm),
            seconds=round(time.time() - began, 4),
        )
        line["loss"] = line["ce"] + (0 if config.pause_tokens else config.lam) * line["latent"]
        if master:
            with open(log_path, "a") as f:
                f.write(json.dumps(line) + "\n")
            bar.set_postfix(ce=f"{line['ce']:.3f}", latent=f"{line['latent']:.3f}")
            if run:
                run.log(line)
        if (step + 1) % config.save_every == 0 or step + 1 == steps:
            checkpoint = os.path.join(config.out, f"step_{step + 1:06d}")
            save_checkpoint(
                checkpoint,
                model,
                tokenizer,
                dict(
                    step=step + 1,
                    config=dataclasses.asdict(config),
                    world=world,
                    rows=fingerprint,
                    latent_var=latent_var,
                ),
                optimizer,
                rank,
                world,
            )
            if master:
                draw_curves(log_path, os.path.join(config.out, "loss.png"))
    return checkpoint


if __name__ == "__main__":
    print("last checkpoint:", train(parse_config(Config)))
