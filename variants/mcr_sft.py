"""Scripted loops: what variants/mcr.py learns before it is rewarded.

A fork of sft.py. A record with its chain and future frames becomes loops in which each future frame
is either looked at or imagined, by a draw; then the evidence is checked:

    record      R_0  frame  R_1  frame  R_2                          <answer>
    a loop      R_0  imagine, span  R_1  look K, [frame]  R_2  check, [seen]  <answer>
    another     R_0  imagine, span  R_1  imagine, span  R_2  check, [unseen]
                look K, [frame]  R_2  <answer>

In brackets is the environment's feedback (`mcr.environment` itself says it): it is fed, it has no
label and no part in Eq. (2). Eq. (3) is that of the imagined frames. After `unseen` the frame that
is asked for is looked at or not, by a draw again. No script is the best one: which to follow is for
the reward to say. A loop depends on the seed, the record and the number of its copy alone.

    python -m variants.mcr_sft --model DIR --data train.json --out runs/loops

What stays: Eq. (1)-(3), teacher forcing, the schedule. Source: ours, after InternVideo3.
"""

import dataclasses
import math
import os
import random

import torch

import sft
from common.cli import run_script
from common.clips import ClipError, load_frames
from common.formats import Frame, RecordError, Skipped
from common.machine import Machine, set_sync, whole
from common.report import draw_curves
from common.run import Run, rows_of
from data import MERGE, Samples, Special, at_least, encode, tokenize
from model import LATENT, LATENT_END, LATENT_START
from variants.mcr import Said, Shown, environment, frames_in, user_turn


@dataclasses.dataclass
class Config(sft.Config):
    copies: int = 4  # loops made from a record  # ours

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "copies")
        if not self.spans or self.eval_data:
            raise ValueError("scripted loops: spans, and no eval_data")

    @property
    def label(self):
        return "loops"


def script(row, draw):
    """A Row's chain as a loop: parts of its response and feedback, in order. Source: ours.

    draw: a random.Random.
    """
    parts, seen = [], frames_in(row.prompt)

    def act(action):
        feedback = environment(f"<reason>{action}</reason>", row, seen, looks_left=1)
        parts.extend([action, feedback])
        if isinstance(feedback, Shown):
            seen.append(feedback.frame)
        return feedback

    for part in row.response:
        if not isinstance(part, Frame):
            parts.append(part)
        elif draw.random() < 0.5:
            act(f"look {part.index}")
        else:
            parts.extend(["imagine", part])
    if act("check") == Said("unseen") and draw.random() < 0.5:
        act(f"look {frames_in(row.response)[-1].index}")
        parts.extend([part for part in row.response if isinstance(part, str)][-1:])
    return parts


def scripts(rows, config):
    """Rows -> `copies` loops of each."""
    loops = []
    for row in rows:
        for copy in range(config.copies):
            draw = random.Random(f"{config.seed} {row.id} {copy}")
            response = script(row, draw)
            loops.append(dataclasses.replace(row, id=f"{row.id}#{copy}", response=response))
    return loops


def encode_loop(row, tokenizer, config):
    """A loop -> what `data.encode` makes of a row. Feedback has no label.

    Raises ClipError for media, RecordError for a sample over max_length.
    """
    sample = encode(row, tokenizer, config, train=False)
    ids, labels, images = (list(sample[name]) for name in ("ids", "labels", "images"))
    futures = load_frames(frames_in(row.response), config.budgets.future)
    grids = iter(grid for _, grid in futures)
    latent = tokenizer.convert_tokens_to_ids(LATENT)

    def add(pieces, learnt=True):
        new = tokenize(pieces, tokenizer)
        ids.extend(new)
        labels.extend([token if learnt and token != latent else -100 for token in new])

    for part in row.response:
        if isinstance(part, (Shown, Said)):
            pieces, shown = user_turn(part, config)
            add([Special("<|im_end|>")])  # the policy hands over
            add(pieces, learnt=False)
            images += shown
        elif isinstance(part, Frame):
            n = int(next(grids).prod()) // MERGE**2
            add([Special(LATENT_START), *[Special(LATENT)] * n, Special(LATENT_END)])
        else:
            add([f"<reason>{part}</reason>"])
    add([f"<answer>{row.answer}</answer>", Special("<|im_end|>")])
    if len(ids) > config.max_length:
        raise RecordError(f"{row.where}: {len(ids)} tokens, max_length = {config.max_length}")
    return dict(sample, ids=ids, labels=labels, images=images, futures=futures)


class LoopSamples(Samples):
    """`data.Samples` of loops."""

    def __getitem__(self, i):
        try:
            return encode_loop(self.rows[i], self.tokenizer, self.config)
        except (ClipError, RecordError) as e:
            return Skipped(self.rows[i].where, str(e))


def train(config):
    """SFT on loops made of the rows -> path of the last checkpoint. The loop of sft.py.

    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, the loops in their order, the model
    machine = Machine(config.bf16, config.shard)
    rows = scripts(rows_of(config), config)
    order, steps = sft.order_of(rows, config)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load(latent_head=config.latent_head or None)
    if not config.lora_rank:
        model.model.visual.requires_grad_(not config.freeze_vision)
    latent_id = model.config.latent_id

    samples = LoopSamples(rows, tokenizer, config)
    batches = sft.batches_of(samples, order, steps, run, tokenizer.pad_token_id or 0)

    # what Eq. (3) is divided by; the model over the ranks; what learns, and how
    state = run.state or dict(
        latent_var=sft.measure_variance(model, samples, order, config, machine)
    )
    latent_var = state["latent_var"]
    parallel = machine.wrap(model, unused=not config.freeze_vision)
    optimizer, trained = sft.adamw(model, config)
    run.start(model, optimizer, sft.describe(config, rows, model, steps, machine))

    for step in run.steps(steps):
        # the step's loops, and the counts of the whole step over all ranks
        micro = next(batches)
        skipped, _ = run.skips([skip for batch in micro for skip in batch["skipped"]])
        counts = [sft.count(batch, latent_id, config) for batch in micro]
        n_text, n_latent, n_tokens = (int(n) for n in machine.sum(map(sum, zip(*counts))))
        if step == 0 and not n_text:
            raise SystemExit(f"no loop of step 0 could be used, e.g. {skipped[:1]}")

        # forward and backward, a micro-batch at a time
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in micro if n_text else []:
            set_sync(parallel, last=batch is micro[-1])
            batch, progress = sft.on_device(batch, machine), step / steps
            with machine.autocast():
                ce, latent = parallel(
                    sft.batch_sums, batch, sft.teacher_forcing, progress, latent_var, config
                )
            loss = ce / n_text + config.lam * latent / max(n_latent, 1)  # Eq. (1)
            (loss * machine.world).backward()  # DDP and FSDP average the ranks' gradients
            sums += torch.stack([ce, latent]).detach().double().cpu()

        # clip and step, unless there was nothing to learn or the gradient is not finite
        lr, norm = sft.learning_rate(step, steps, config), None
        for group in optimizer.param_groups:
            group["lr"] = lr
        if n_text:
            norm = whole(torch.nn.utils.clip_grad_norm_(trained, config.clip)).item()
            if math.isfinite(norm):  # the norm is equal on all ranks
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then a checkpoint
        means = sft.means_of(sums, n_text, n_latent, config, machine)
        line = dict(step=step, lr=lr, tokens=n_tokens, latents=n_latent, **means)
        run.log(dict(line, grad_norm=norm, skipped=skipped), "ce", "latent")
        if run.due(step + 1, steps):
            run.save(step + 1, model, tokenizer, optimizer, latent_var=latent_var)
            if machine.master:
                draw_curves(run.path, os.path.join(config.out, "loss.png"))
    return run.finish()


if __name__ == "__main__":
    run_script(train, Config)
