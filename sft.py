"""Supervised fine-tuning: words by cross-entropy, latents by alignment with real future frames.

Source: paper sec. 3.2.

    L_SFT    = L_CE + lam * L_latent                                                    Eq. (1)
    L_CE     = - sum_{t in T} log p(w_t | w_<t, V, q)    text, answer, control tokens   Eq. (2)
    L_latent = 1/|S| sum_{t in S} || h_{t-1} - e*_t ||^2                                Eq. (3)

    python sft.py --model DIR --data train.json                        # one process: CPU or one GPU
    torchrun --nproc_per_node 8 sft.py --model Qwen/Qwen3-VL-8B-Instruct --data train.json --shard
    python sft.py ... --no-spans            # the text-only baseline on the same rows

The vision tower and merger are frozen, because they define e*; the language model is fully tuned.
Several ranks train through DDP, each with all weights; with --shard each holds a part
(common/machine.py). With --lora_rank small matrices are trained beside a frozen model
(common/lora.py). The run writes OUT/log.jsonl, OUT/loss.png and OUT/step_N, a Hugging Face folder
whose trainer/ is what a resumed run needs. --eval_data measures the loss of held-out records at
every checkpoint.

To feed a span something else than the true future, pass `train` another `fed`:
variants/pause_tokens.py and variants/self_forcing.py do.

Where this differs from the paper:
 1. Eq. (2) is a mean over the tokens of the step, Eq. (3) a mean over the D dimensions, as in the
    official code.
 2. Optional, off by default: `latent_loss`, `latent_head`, `stop_term`.
 3. Weights and optimizer are in fp32, the arithmetic is bf16 on CUDA (Table 8 says bf16).
Where this differs from the official code:
 4. lam = 0.1 and L_max = 4, as in the paper.
 5. Every token of the optimizer step weighs the same, over all ranks and micro-batches.
 6. A sample that cannot be read is named in log.jsonl; its rank takes the step without it.

Axis letters: B rows, T tokens, N latents, D hidden, V vocabulary.
"""

import dataclasses
import math
import os
import time
from itertools import groupby

import torch
import torch.nn.functional as F

from common.cli import run_script
from common.machine import Machine, set_sync, whole, without_ddp
from common.report import draw_curves
from common.run import Run, aside, held_out_rows, in_order, rows_of
from data import (
    DataConfig,
    Samples,
    at_least,
    collate,
    loader,
    model_inputs,
    to_device,
    unshown_options,
)
from model import log_continue


@dataclasses.dataclass
class Config(DataConfig):
    # folder, run's folder or hub id; stock or Future-L1  # paper sec. 4
    model: str = "Qwen/Qwen3-VL-8B-Instruct"
    data: str = ""  # training records, see data.py
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    eval_data: str = ""  # held-out records, whose loss is logged at every checkpoint  # ours
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
    beta2: float = 0.95  # of AdamW; beta1 is 0.9  # paper Table 8
    weight_decay: float = 0.1  # on matrices  # paper Table 8
    clip: float = 1.0  # gradient norm  # paper Table 8
    # method
    # deviation 4: the shipped script says 0.2, and l_max 32, left over from another project
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
        at_least(self, 1, "global_batch", "micro_batch", "save_every")
        at_least(self, 0, "steps", "lora_rank")
        if self.latent_loss not in ("mse", "nmse"):
            raise ValueError(f"latent_loss is {self.latent_loss!r}, expected mse or nmse")
        if self.shard and self.lora_rank:
            raise ValueError("lora_rank: not with shard; each rank has the whole frozen model")
        if self.latent_head and self.lora_rank:
            raise ValueError(
                "latent_head: not with lora_rank, which would freeze a new head as the identity; "
                "a model that has one keeps it without this flag"
            )

    @property
    def label(self):
        """What is trained, in a word: it names the run."""
        return "latent" if self.spans else "text"


# ---------------------------------------------------------------------------------------- equations


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

    # Eq. (3)
    is_latent = inputs["input_ids"][:, 1:] == model.config.latent_id  # (B, T - 1)
    h_before = h[:, :-1][is_latent]  # (N, D)
    z = model.to_latent(h_before).float()  # (N, D)
    e = latents if targets is None else targets
    e = z.new_zeros(0, z.shape[-1]) if e is None else e.detach().float()
    # deviation 1: a mean over D, because with the printed sum lam = 0.1 would weigh the latents
    # 4,096 times more
    distance = (z - e).pow(2).mean(-1) / latent_var  # (N,)
    latent_sum, n_latent = distance.sum(), len(distance)

    if stop_term:  # deviation 2: the paper never trains "do not stop yet"
        log_stop = model.logits(h_before).log_softmax(-1)[:, model.config.latent_end_id]  # (N,)
        ce_sum = ce_sum - log_continue(log_stop).sum()
        n_text = n_text + n_latent

    ce, latent = ce_sum / max(n_text, 1), latent_sum / max(n_latent, 1)
    means = dict(loss=ce + lam * latent, ce=ce, latent=latent)  # Eq. (1)
    return dict(means, ce_sum=ce_sum, n_text=n_text, latent_sum=latent_sum, n_latent=n_latent)


def teacher_forcing(model, batch, e, progress, config):
    """What a span is fed in training (N, D), row by row in order. Source: sec. 3.2.

    It is e, the true future.
    batch: of `data.collate`, on the device. e (N, D): the embeddings of the true future frames.
    progress: the share of the training that is done, in [0, 1).
    """
    return e


def batch_sums(model, batch, fed, progress, latent_var, config):
    """A micro-batch -> its sums of Eq. (2) and Eq. (3). What a span is fed comes from `fed`."""
    e = latents = None
    if "future_pixel_values" in batch:
        e = model.encode_frames(batch["future_pixel_values"], batch["future_grid_thw"])  # (N, D)
        latents = fed(model, batch, e, progress, config)
    out = sft_loss(
        model,
        labels=batch["labels"],
        latents=latents,
        targets=e,
        latent_var=latent_var,
        stop_term=config.stop_term,
        **model_inputs(batch),
    )
    return out["ce_sum"], out["latent_sum"]


def learning_rate(step, steps, config):
    """Linear warm-up, then cosine to 0. Source: paper Table 8."""
    warm = max(1, round(config.warmup * steps))
    if step < warm:
        return config.lr * (step + 1) / warm
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def adamw(model, config):
    """AdamW with weight decay on matrices only -> the optimizer, a list of what it trains.

    Source: paper Table 8.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = dict(params=[p for p in trained if p.ndim >= 2], weight_decay=config.weight_decay)
    vectors = dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0)
    betas = 0.9, config.beta2
    return torch.optim.AdamW([matrices, vectors], config.lr, betas, fused=True), trained


def target_variance(e):
    """Targets (N, D) -> their variance, a mean over D: the error of guessing their mean. Ours."""
    return (e.float() - e.float().mean(0)).pow(2).mean()


# --------------------------------------------------------------------------------------------- data


def order_of(rows, config):
    """Which row is used at each place of the training, and the number of its steps.

    Raises SystemExit if there is nothing to train on.
    """
    total = config.steps * config.global_batch or round(len(rows) * config.epochs)
    if total < 1:
        raise SystemExit(f"nothing to train on: {len(rows)} rows, {config.epochs} epochs")
    return sample_order(len(rows), total, config.seed), -(-total // config.global_batch)


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
    lists = -(-global_batch // (world * micro_batch))  # a step
    for step in range(first_step, steps):
        own = order[step * global_batch : (step + 1) * global_batch][rank::world]
        for k in range(lists):
            yield own[k * micro_batch : (k + 1) * micro_batch]


def batches_of(samples, order, steps, run, pad_id):
    """An iterator over the steps that are still to do: this rank's micro-batches of each."""
    config, machine = run.config, run.machine
    sizes = config.global_batch, config.micro_batch, machine.rank, machine.world
    plan = list(micro_batches(order, run.first, steps, *sizes))
    batches = iter(loader(samples, plan, config.workers, pad_id=pad_id))
    lists = -(-config.global_batch // (config.micro_batch * machine.world))  # a step
    return zip(*[batches] * lists)  # so many in a row from one iterator


def on_device(batch, machine):
    """A batch on the device, without `samples`: FSDP would copy their tensors to the GPU, too."""
    return to_device({k: v for k, v in batch.items() if k != "samples"}, machine.device)


def count(batch, latent_id, config):
    """A batch -> |T| of Eq. (2), |S| of Eq. (3), the number of its tokens with padding."""
    n_latent = int((batch["input_ids"] == latent_id).sum())
    n_text = int((batch["labels"][:, 1:] != -100).sum()) + n_latent * config.stop_term
    return n_text, n_latent, batch["input_ids"].numel()


def measure_variance(model, samples, order, config, machine):
    """latent_var of `sft_loss`, one number for the whole run. Source: ours.

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
    if any(map(has_future, samples.rows)):
        raise SystemExit("none of the first 64 samples has a future frame that can be read")
    return 1.0


# --------------------------------------------------------------------------------------------- loop


def train(config, fed=teacher_forcing):
    """Run the training -> path of the last checkpoint.

    fed(model, batch, e, progress, config) -> (N, D): what spans are fed, see `teacher_forcing`.
    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, the rows in their order, the model
    machine = Machine(config.bf16, config.shard)
    rows, held_out = rows_of(config), held_out_rows(config)
    order, steps = order_of(rows, config)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    # deviation 3: in fp32, because at lr 1e-5 most updates of a bf16 weight would round to nothing
    model, tokenizer = run.load(latent_head=config.latent_head or None)
    if not config.lora_rank:
        model.model.visual.requires_grad_(not config.freeze_vision)
    latent_id = model.config.latent_id

    samples = Samples(rows, tokenizer, config, train=True, spans=config.spans)
    batches = batches_of(samples, order, steps, run, tokenizer.pad_token_id or 0)

    # what Eq. (3) is divided by, which a resumed run finds in run.state, where `run.save` put it;
    # the model over the ranks; the optimizer
    state = run.state or dict(latent_var=measure_variance(model, samples, order, config, machine))
    latent_var = state["latent_var"]
    # parallel(f, ...) is f(model, ...); with several ranks it goes through DDP or FSDP2
    parallel = machine.wrap(model, unused=not config.freeze_vision)  # a batch may lack pictures
    optimizer, trained = adamw(model, config)
    run.start(model, optimizer, describe(config, rows, model, steps, machine))
    if config.spans and not any(map(has_future, rows)):
        run.say("no row has a future frame: nothing teaches the model to imagine")

    for step in run.steps(steps):
        # the step's samples
        # deviation 6: those that cannot be read are named, and the step goes on without them
        began = time.time()
        micro = next(batches)
        skipped, _ = run.skips([skip for batch in micro for skip in batch["skipped"]])
        if step == 0 and machine.master:
            print_row(micro[0], tokenizer, latent_id)

        # deviation 5: |T| and |S| of the whole step, over all ranks, before the first backward
        counts = [sum(some) for some in zip(*(count(batch, latent_id, config) for batch in micro))]
        n_text, n_latent, n_tokens = (int(n) for n in machine.sum(counts))
        if step == 0 and not n_text:
            why = f"could be used, e.g. {skipped[0][1]}" if skipped else "has a word to learn"
            raise SystemExit(f"no sample of step 0 {why}")

        # forward and backward, a micro-batch at a time
        sums = torch.zeros(2, dtype=torch.float64, device=machine.device)
        for batch in micro if n_text else []:
            set_sync(parallel, last=batch is micro[-1])  # DDP averages once a step
            arguments = on_device(batch, machine), fed, step / steps, latent_var, config
            with machine.autocast():
                ce, latent = parallel(batch_sums, *arguments)
            loss = ce / n_text + config.lam * latent / max(n_latent, 1)  # Eq. (1)
            (loss * machine.world).backward()  # DDP and FSDP average the ranks' gradients
            sums += torch.stack([ce, latent]).detach().double()

        # clip and step, unless there was nothing to learn or the gradient is not finite
        lr, norm = learning_rate(step, steps, config), None
        if n_text:
            norm = whole(torch.nn.utils.clip_grad_norm_(trained, config.clip)).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        update_skipped = norm is None or not math.isfinite(norm)  # the norm is equal on all ranks
        if not update_skipped:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then a checkpoint
        means = means_of(sums, n_text, n_latent, config, machine)
        line = dict(step=step, lr=lr, tokens=n_tokens, latents=n_latent, **means)
        line.update(grad_norm=norm, update_skipped=update_skipped, skipped=skipped)
        line.update(seconds=round(time.time() - began, 4))
        if update_skipped:
            why = "no sample could be used" if norm is None else "gradient is not finite"
            run.say(f"step {step}: {why}, no update")
        if held_out and run.due(step + 1, steps):
            line.update(held_out_loss(parallel, held_out, tokenizer, latent_var, run))
        run.log(line, "ce", "latent", "eval_loss")
        if run.due(step + 1, steps):
            run.save(step + 1, model, tokenizer, optimizer, latent_var=latent_var)
            if machine.master:
                draw_curves(run.path, os.path.join(config.out, "loss.png"))
    return run.finish()


def means_of(sums, n_text, n_latent, config, machine):
    """Sums of this rank, counts of all ranks -> the means of Eq. (1)-(3); None without a word."""
    ce, latent = machine.sum(sums.tolist())  # one wait for the GPU
    if not n_text:
        return dict(loss=None, ce=None, latent=None)
    ce, latent = ce / n_text, latent / max(n_latent, 1)
    return dict(loss=ce + config.lam * latent, ce=ce, latent=latent)


def held_out_loss(parallel, rows, tokenizer, latent_var, run):
    """Eq. (1)-(3) on held-out rows, with the true future fed -> fields of the log's line.

    Means over the tokens of all rows and ranks, as eval_loss, eval_ce, eval_latent.
    """
    config, machine, began = run.config, run.machine, time.time()
    sums = torch.zeros(2, dtype=torch.float64, device=machine.device)
    counts, skipped = [0, 0], []
    parallel = without_ddp(parallel)
    with aside(parallel):
        encoding = dict(train=True, spans=config.spans)
        for some in in_order(rows, tokenizer, config.micro_batch, config, machine, **encoding):
            batch = collate(some, tokenizer.pad_token_id or 0)
            skipped += batch["skipped"]
            n_text, n_latent, _ = count(batch, parallel.model.config.latent_id, config)
            counts = [counts[0] + n_text, counts[1] + n_latent]
            arguments = on_device(batch, machine), teacher_forcing, 0.0, latent_var, config
            with machine.autocast():
                sums += torch.stack(parallel(batch_sums, *arguments)).double()
    n_text, n_latent = machine.sum(counts)
    means = means_of(sums, n_text, n_latent, config, machine)
    skipped, _ = run.skips(skipped)
    line = {f"eval_{name}": value for name, value in means.items()}
    return dict(line, eval_skipped=skipped, eval_seconds=round(time.time() - began, 4))


def print_row(batch, tokenizer, latent_id):
    """One training row as a table: token, label, what is fed, text. Equal tokens share a line."""
    real = batch["attention_mask"][0].bool()
    ids, labels = batch["input_ids"][0][real].tolist(), batch["labels"][0][real].tolist()
    print("row 0:   token   label  fed      text")
    for (token, label), same in groupby(zip(ids, labels)):
        text, times = tokenizer.decode([token]), len(list(same))
        word = "visual" if text in ("<|image_pad|>", "<|video_pad|>") else "text"
        fed = "latent" if token == latent_id else word
        label = "." if label == -100 else label
        more = f" x {times}" if times > 1 else ""
        print(f"       {token:>7} {label:>7}  {fed:<7}  {text!r}{more}")


def has_future(row):
    """Whether a row's chain holds a frame to imagine."""
    return any(not isinstance(part, str) for part in row.response)


def describe(config, rows, model, steps, machine):
    """The run in one line."""
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with_future = sum(map(has_future, rows))
    return (
        f"{config.label} SFT: {len(rows)} rows, {with_future} with future frames"
        f"{unshown_options(rows, config)}, {steps} steps x {config.global_batch} samples on "
        f"{machine.world} ranks ({machine.device.type}), {config.micro_batch} a forward, seed "
        f"{config.seed}, {trained:,} parameters trained of {weights:,}, a checkpoint every "
        f"{config.save_every} steps"
    )


if __name__ == "__main__":
    run_script(train, Config)
