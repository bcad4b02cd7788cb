"""On-policy distillation with visual cues: a teacher that sees more scores what the student says.

A fork of la_dapo.py. Source: ViCuR, arXiv 2606.05718. The student answers from X, pictures and a
question. The teacher is frozen and reads S as well, behind a marker at the end of the question. It
says nothing itself: it scores the student's own tokens under its own prompt.

    y   ~  p(. | X)                                                        words and latents
    A_n =  log p_T(y_n | X, S, y_<n) - log p(y_n | X, y_<n)                no gradient       Eq. (6)
    L   =  mean over y of 1/|y| sum_n max(-r_n A_n, -clip(r_n, 1 - eps, 1 + eps) A_n)        Eq. (7)
           r_n = exp(log p(y_n) - log p_old(y_n)), which is 1 where a step has one update

A cue S says in words what can be seen and matters (`--privilege cue`, a record's `cue`). It follows
from X, so that I(y_n; S | X, y_<n) = 0, Eq. (1): what it teaches can be learnt. The gold answer
(`answer`) does not follow from what is seen. With `none`, both read the same.

    python -m variants.opd --model runs/sft --data cues.json                       # self-distilled
    python -m variants.opd --model runs/sft --teacher runs/other --data cues.json --recovery

-A_n is one sample of KL(p, p_T) at step n. The gradient is that of the sum of these KLs with the
visited states held constant: how a word changes what comes after it is not seen (no return-to-go).
--full_kl     the KL itself, over all words, or over stop and continue: no sampling. Ours.
--gate        StreamOPD's weights (arXiv 2608.16320): A <- w A, w = clip(1 + g~ / 2, 0, 2). g is a
              response's mean of log p_T(. | X, S) - log p_T(. | X), g~ standardised over a group.
--lam         adds lam sum ||z - z_T||^2 / sum ||z_T||^2, z_T what the teacher would imagine. Ours.
--recovery    the student's first token looks at all visual tokens (variants/cue_recovery.py).

Where this differs from the paper:
 1. Responses have latents. The teacher is fed the student's, as recorded. In a span the event is
    stop or continue. `adjoint_terms` follows L through the latents, but log p_T is a constant:
    on the toy that does harm (docs/variants.md).
 2. A span's forced stop has no A, and does not count in |y|.
Where this differs from the official code:
 3. The weight is 1/|y|, as the paper writes it; official has `--average token`.
 4. The teacher's prompt is the student's with the hint's tokens put in, not a column of the data.

Axis letters: B prompts, R rows = B * G rollouts, T new tokens, S chosen tokens, V vocabulary.
"""

import dataclasses
import math
import os
from collections import Counter
from typing import NamedTuple

import torch
from common.checkpoint import make_optimizer
from common.groups import Harvest, RolloutLog, check_readable, load_prompts, log_line, prepare
from torch.utils.checkpoint import checkpoint

import la_dapo
from common.cli import run_script
from common.machine import Machine
from common.report import draw_curves
from common.run import Run, rows_of
from data import DataConfig, at_least, collate, model_inputs, tokenize
from latent_decode import LOGITS
from model import log_continue
from rewards import pick, score_group
from variants.cue_recovery import add_recovery

CURVES = (("accuracy",), ("gap",), ("latent",), ("entropy",), ("grad_norm",))
FIGURES = ("loss", "gap", "entropy", "latent")


@dataclasses.dataclass
class Config(DataConfig):
    model: str = "runs/sft"  # where the student starts: a model's or a run's folder
    teacher: str = ""  # of the same width and tokenizer; "" = the student as it starts (OPSD)
    data: str = ""  # records, see data.py; for cues with a text each, `cue`
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    out: str = "runs/opd"  # the run's folder
    resume: bool = False  # continue from the newest checkpoint in `out`
    seed: int = 0  # order of the prompts and all sampling  # ours
    # what the teacher sees
    privilege: str = "cue"  # cue | answer | none
    marker: str = "[Hint]:"  # stands before it  # paper Fig. 8
    # rollouts
    prompts: int = 128  # a step, over all ranks  # paper Table 3
    group_size: int = 1  # G, rollouts of a prompt  # paper Table 3
    rollout_batch: int = 1  # prompts decoded together on one rank  # ours
    temperature: float = 1.0  # of student and teacher  # ours
    top_p: float = 1.0  # on words; log-probabilities are of the full softmax  # ours
    max_new_tokens: int = 4096  # paper Table 3
    max_latents: int = 8  # longest span: 2 * l_max  # Future-L1's
    share: bool = False  # decode once what a group has in common, as in la_dapo.py  # ours
    cuda_graph: bool = False  # replay a captured decoding step; not with share  # ours
    # objective
    average: str = "trajectory"  # weights: trajectory, 1/|y| (paper) | token, all alike (official)
    eps: float = 0.2  # official
    full_kl: bool = False  # the KL itself, over the vocabulary  # ours
    lam: float = 0.0  # weight of the distance to the teacher's latents  # ours
    gate: bool = False  # weigh a rollout by what the cue tells of it  # StreamOPD
    inner_epochs: int = 1  # updates from the same rollouts  # ours
    adjoint_terms: int = 0  # gradient through the latents, as in la_dapo.py: -1 exact  # ours
    recovery: bool = False  # add the cue recovery module to a student without  # paper sec. 3.2
    # optimisation
    steps: int = 0  # 0 = from epochs  # ours
    epochs: float = 5.0  # passes over the prompts  # paper Table 3
    micro_batch: int = 1  # prompts a forward on one rank  # ours
    lr: float = 1e-6  # paper Table 3
    warmup_steps: int = 0  # linear  # ours
    final_lr: float = 1.0  # share of lr at the last step, reached linearly  # ours
    beta1: float = 0.9  # AdamW's default
    beta2: float = 0.999  # AdamW's default
    weight_decay: float = 0.0  # ours
    clip: float = 1.0  # gradient norm  # ours
    freeze_vision: bool = True  # vision tower and merger  # as in SFT
    # machine
    bf16: bool = True  # on CUDA; the CPU computes in fp32  # ours
    gradient_checkpointing: bool = False  # recompute activations: less memory, slower  # ours
    save_every: int = 10  # steps between checkpoints; the last two are kept  # ours
    sample_every: int = 10  # steps between whole rollouts written to rollouts_*.jsonl  # ours
    track: str = ""  # also log to wandb | trackio, a package that is installed  # ours
    lora_rank = 0  # no flag: all weights are trained

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "prompts", "group_size", "rollout_batch", "max_new_tokens")
        at_least(self, 1, "inner_epochs", "micro_batch", "save_every", "sample_every")
        at_least(self, 0, "steps", "max_latents", "warmup_steps")
        at_least(self, -1, "adjoint_terms")
        if self.privilege not in ("cue", "answer", "none"):
            raise ValueError(f"privilege is {self.privilege!r}, expected cue, answer or none")
        if self.average not in ("trajectory", "token"):
            raise ValueError(f"average is {self.average!r}, expected trajectory or token")
        if self.share and self.cuda_graph:
            raise ValueError("share or cuda_graph: a captured step has one size")
        if self.temperature <= 0 or (self.gate and self.group_size < 2):
            raise ValueError("expected a temperature above 0; and with gate, group_size 2 or more")

    @property
    def label(self):
        """What is trained, in a word: it names the run."""
        return f"OPD ({self.privilege})"


# ---------------------------------------------------------------------------- what the teacher sees


def hint(row, config):
    """What the teacher reads at the end of a question, with its marker; "" where there is none."""
    text = dict(cue=row.cue, answer=row.answer, none="")[config.privilege]
    # it starts with a space: then no token reaches from the question into it
    return f" {config.marker} {text}" if text else ""


def hinted(sample, tokenizer, config):
    """An encoded prompt -> the teacher's: the hint's tokens at the end of the user's turn."""
    words = tokenize([hint(sample["row"], config)], tokenizer)
    ids, end = sample["ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")
    turn = len(ids) - 1 - ids[::-1].index(end)
    return dict(sample, ids=[*ids[:turn], *words, *ids[turn:]])


# ---------------------------------------------------------------------------------------- equations


def advantages(logp_teacher, logp):
    """A_n, any shape, without gradient. Source: Eq. (6); clamped as in the official code."""
    return (logp_teacher - logp).detach().clamp(-10, 10)


def token_weights(sampled, average, n_rollouts, n_tokens):
    """What each chosen token, sampled (R, T) bool, counts in L (R, T). Source: Eq. (7).

    n_rollouts, n_tokens: of the step, over all ranks; its weights add up to 1.
    """
    if average == "token":
        return sampled / n_tokens
    return sampled / sampled.sum(1, keepdim=True).clamp(min=1) / n_rollouts


def reverse_kl(logp, logq, in_span, stop):
    """KL(p, q) of the choice there was at each position -> (S,). Source: ours.

    logp, logq (S, V). in_span (S,) bool: there the choice is to stop, with the id `stop`, or not.
    """

    def events(logp):
        return torch.stack([logp[:, stop], log_continue(logp[:, stop])], -1)  # (S, 2)

    words, p, q = (logp.exp() * (logp - logq)).sum(-1), events(logp), events(logq)
    return torch.where(in_span, (p.exp() * (p - q)).sum(-1), words)


def gate(g):
    """g, what the cue tells of each rollout (B, G) -> StreamOPD's w = clip(1 + g~ / 2, 0, 2)."""
    mean, std = g.mean(1, keepdim=True), g.std(1, correction=0, keepdim=True)
    return (1 + 0.5 * (g - mean) / (std + 1e-4)).clamp(0, 2)


# ------------------------------------------------------------------------------------------- update


class Pair(NamedTuple):
    """Who learns from whom."""

    model: torch.nn.Module  # the student
    tokenizer: object
    teacher: torch.nn.Module
    feed: None = None  # la_dapo.roll_out: latents are the model's own


@torch.no_grad()
def ask_teacher(pair, batch, config):
    """What the teacher makes of a batch's rollouts -> its Replay, the weight w of each (R, 1)."""
    samples = [hinted(group.sample, pair.tokenizer, config) for group in batch.groups]
    prompts = model_inputs(collate(samples, 0, side="left"))  # pads are masked
    told = la_dapo.replayed(pair.teacher, dataclasses.replace(batch, prompts=prompts), config)
    if not config.gate:
        return told, torch.ones_like(batch.A)
    plain = la_dapo.replayed(pair.teacher, batch, config)
    g = (told.logprobs - plain.logprobs).sum(1) / batch.weight.sum(1).clamp(min=1)  # (R,)
    return told, gate(g.view(-1, config.group_size)).view(-1, 1)


def opd_loss(pair, batch, teacher, weight, size, config, figures):
    """A batch's share of L, Eq. (7); weight (R, T), size: sum ||z_T||^2 of the step."""
    new = la_dapo.replayed(pair.model, batch, config)
    # with one update a step the policy has not moved: what differs is only the decoder's kernels
    old = new.logprobs.detach() if config.inner_epochs == 1 else batch.rollout.logprobs
    A = advantages(teacher.logprobs, old)  # (R, T)
    if config.full_kl:
        kl = full_kl(pair, new, teacher, batch, config)  # (S,)
        each = torch.zeros_like(A).masked_scatter(batch.rollout.sampled, kl)
    else:
        each, _ = la_dapo.clipped_surrogate(new.logprobs, old, A, config.eps, config.eps)
    error = (new.predicted - teacher.predicted).square().sum() / max(size, 1e-12)
    loss = (each * weight).sum() + (config.lam * error if config.lam else 0)
    for name, value in dict(loss=each.detach(), gap=A, entropy=new.entropy).items():
        figures[name] += (value * weight).sum().item()
    figures["latent"] += error.item()
    return loss + la_dapo.through_latents(loss, new, batch, config)


def full_kl(pair, new, teacher, batch, config):
    """KL(p, p_T) at each visited position (S,); logits are in memory a piece at a time. Ours."""
    c, token = pair.model.config, batch.rollout.tokens[batch.rollout.sampled]  # (S,)
    in_span = (token == c.latent_id) | (token == c.latent_end_id)

    def piece(h, h_teacher, in_span):
        logp = (pair.model.logits(h) / config.temperature).log_softmax(-1)  # (S', V)
        logq = (pair.teacher.logits(h_teacher) / config.temperature).log_softmax(-1)
        return reverse_kl(logp, logq, in_span, c.latent_end_id)

    pieces = zip(*(x.split(LOGITS) for x in (new.states, teacher.states, in_span)))
    return torch.cat([checkpoint(piece, *some, use_reentrant=False) for some in pieces])


def update(pair, optimizer, groups, lr, config, machine):
    """All updates of a step from this rank's rollouts (may be none) -> figures of all ranks."""
    parts = [groups[i : i + config.micro_batch] for i in range(0, len(groups), config.micro_batch)]
    batches = [prepare(part, False, machine.device) for part in parts]
    sampled = [row for batch in batches for row in batch.rollout.sampled]
    with machine.autocast():
        views = [ask_teacher(pair, batch, config) for batch in batches]
    size = sum(teacher.predicted.square().sum() for teacher, _ in views)
    *counts, size = machine.sum([len(sampled), sum(row.sum() for row in sampled), size])

    figures = Counter()
    for _ in range(config.inner_epochs):
        for batch, (teacher, w) in zip(batches, views):
            weight = w * token_weights(batch.rollout.sampled, config.average, *counts)
            with machine.autocast():
                loss = opd_loss(pair, batch, teacher, weight, size, config, figures)
            loss.backward()
        norm = machine.step(optimizer, lr, config.clip)
    sums = machine.sum([figures[name] / config.inner_epochs for name in FIGURES])
    return dict(zip(FIGURES, sums), grad_norm=norm, updates_skipped=int(not math.isfinite(norm)))


# --------------------------------------------------------------------------------------------- loop


def collect(pair, batches, first, config, machine):
    """Roll out a step's prompts -> Harvest, the batch of prompts that is next."""
    harvest, end = Harvest(), first + -(-config.prompts // config.rollout_batch)
    for k in range(first, end):
        if k % machine.world != machine.rank:
            continue
        batch = next(batches)
        with harvest.tally.clock("rollout"):
            groups = la_dapo.roll_out(pair, batch, k, config, machine)
        for group in groups:  # what they earn is for the log
            row, rollouts = group.sample["row"], (group.texts, group.rollout.latents, group.spans)
            known = row.options and pick(row.answer, row.options) is not None
            group.parts = score_group(*rollouts, row.answer, row.options if known else None)
            group.verdict, group.slot, group.A = "kept", 0, torch.zeros(config.group_size)
        harvest.groups += groups
        harvest.skipped += batch["skipped"]
    harvest.count()
    return harvest, end


def load_pair(run):
    """-> Pair. Raises SystemExit if they do not fit, or the teacher is not that of the start."""
    c, (model, tokenizer) = run.config, la_dapo.load_model(run)
    if c.recovery and not hasattr(model, "recovery"):
        add_recovery(model)
    folder = run.start_folder(c.teacher)
    teacher, words = run.machine.load(folder)
    same_width = model.lm_head.in_features == teacher.lm_head.in_features
    if not same_width or tokenizer.get_vocab() != words.get_vocab():
        raise SystemExit(f"{folder}: a teacher needs the student's hidden size and its tokenizer")
    return Pair(model, tokenizer, teacher.requires_grad_(False))


def train(config, rows=None):
    """Run the distillation on rows, default those of config.data -> path of the last checkpoint.

    Raises SystemExit on a folder in use or bad input.
    """
    machine = Machine(config.bf16)
    rows = rows_of(config) if rows is None else rows
    run = Run(config, rows, machine, config.label)
    pair = load_pair(run)
    hints = sum(bool(hint(row, config)) for row in rows)
    steps = config.steps or int(len(rows) * config.epochs) // config.prompts
    if not steps or not (hints or config.privilege == "none"):
        raise SystemExit(f"{len(rows)} rows, {hints} with a hint ({config.privilege}): too few")
    optimizer, _ = make_optimizer(pair.model, config)
    place = run.state["batch"] if run.state else 0  # the batch of prompts that comes next
    batches = load_prompts(rows, pair.tokenizer, place, config, machine)
    text = f"{config.label}: {len(rows)} prompts, {hints} with a hint, {steps} steps"
    run.start(pair.model, optimizer, f"{text} of {config.prompts} x {config.group_size}")
    rollouts = RolloutLog(run)

    for step in run.log.steps(steps, run.name):
        # the student answers
        harvest, end = collect(pair, batches, place, config, machine)
        skipped, _ = run.log.skips(harvest.skipped)
        tally = harvest.tally.over(machine)
        check_readable(step, tally, skipped)

        # the teacher scores, and the student learns
        lr = la_dapo.schedule(step, steps, config)
        with tally.clock("update"):
            figures = update(pair, optimizer, harvest.groups, lr, config, machine)

        line = dict(step=step, lr=lr, **figures, **log_line(tally, skipped, {}))
        run.log.write(line, gap=line["gap"], accuracy=line["accuracy"])
        rollouts.write(step, harvest.groups)
        place, trained = end, (pair.model, pair.tokenizer, optimizer)
        due = run.save_if_due(step + 1, steps, *trained, batch=end)
        if due and machine.master:
            draw_curves(run.log.path, os.path.join(config.out, "opd.png"), CURVES)
    return run.checkpoint


if __name__ == "__main__":
    run_script(lambda config: print("last checkpoint:", train(config)), Config)
