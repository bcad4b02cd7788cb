"""On-policy distillation with visual cues: a teacher that sees more scores what the student says.

A fork of la_dapo.py. Source: ViCuR, arXiv 2606.05718. The student answers from X, pictures and a
question. The teacher is frozen and reads S as well, behind a marker at the end of the question. It
generates nothing: it scores the student's own tokens under its own prompt.

    y   ~  p(. | X)                                                        words and latents
    A_n =  log p_T(y_n | X, S, y_<n) - log p(y_n | X, y_<n)                no gradient       Eq. (6)
    L   =  mean over y of 1/|y| sum_n max(-r_n A_n, -clip(r_n, 1 - eps, 1 + eps) A_n)        Eq. (7)
           r_n = exp(log p(y_n) - log p_old(y_n)), which is 1 where a step has one update

A cue S says in words what can be seen and matters (`--privilege cue`, a record's `cue`). It follows
from X, so that I(y_n; S | X, y_<n) = 0, Eq. (1): what it teaches can be learnt. The gold answer
(`answer`) does not follow from what is seen. With `none`, both read the same.

    python -m variants.opd --model runs/sft --data cues.json                       # self-distilled
    python -m variants.opd --model runs/sft --teacher runs/other --data cues.json --recovery
    python -m variants.opd evaluate --model runs/opd --data test.jsonl     # as evaluate.py

-A_n is one sample of KL(p, p_T) at step n. The gradient is that of the sum of these KLs with the
visited states held constant: how a word changes what comes after it is not seen (no return-to-go).
--lam         adds lam sum ||z - z_T||^2 / sum ||z_T||^2, z_T what the teacher would imagine. Ours.
--recovery    the student's first token looks at all visual tokens (variants/cue_recovery.py).

Where this differs from the paper:
 1. Responses have latents. The teacher is fed the student's, as recorded. In a span the event is
    stop or continue. `adjoint_terms` follows L through the latents, but log p_T is a constant:
    on the toy that does harm (docs/variants.md).
 2. A span's forced stop has no A, and does not count in |y|.
Where this differs from the official code:
 3. The weight is 1/|y|, as the paper writes it; official weighs all tokens of a step alike.
 4. The teacher's prompt is the student's with the hint's tokens put in, not a column of the data.
 5. With several updates a step, A_n compares with the decoder's record throughout; official takes
    the current student's log-probabilities at each update.

Axis letters: B prompts, R rows = B * G rollouts, T new tokens, S chosen tokens, V vocabulary.
"""

import dataclasses
import math
import os
import sys
from collections import Counter

import torch

import evaluate
import la_dapo
from common.ahead import read_ahead
from common.cli import run_script
from common.formats import RecordError, Row, Skipped, read_records
from common.machine import Machine, set_sync
from common.report import draw_curves
from common.run import Run, rows_of
from data import DataConfig, Samples, at_least, collate, model_inputs, tokenize
from rewards import pick, score_group
from variants.cue_recovery import Model, add_recovery
from variants.noisy_latents import each_alone

CURVES = (("accuracy",), ("gap",), ("latent",), ("entropy",), ("grad_norm",))


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
    max_latents: int = 8  # longest span; a trained folder brings its own  # Future-L1's
    # objective
    eps: float = 0.2  # official
    lam: float = 0.0  # weight of the distance to the teacher's latents  # ours
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
    beta2: float = 0.999  # AdamW's default
    clip: float = 1.0  # gradient norm  # ours
    # machine
    bf16: bool = True  # on CUDA; the CPU computes in fp32  # ours
    gradient_checkpointing: bool = False  # recompute activations: less memory, slower  # ours
    save_every: int = 10  # steps between checkpoints; the last two are kept  # ours
    track: str = ""  # also log to wandb | trackio, a package that is installed  # ours
    # no flags: all weights are trained, and a prompt's few rollouts share nothing
    lora_rank, merge_equal, cuda_graph = 0, False, False

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "prompts", "group_size", "rollout_batch", "max_new_tokens")
        at_least(self, 1, "inner_epochs", "micro_batch", "save_every")
        at_least(self, 0, "steps", "max_latents", "warmup_steps")
        at_least(self, -1, "adjoint_terms")
        if self.privilege not in ("cue", "answer", "none"):
            raise ValueError(f"privilege is {self.privilege!r}, expected cue, answer or none")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, expected above 0")

    @property
    def label(self):
        """What is trained, in a word: it names the run."""
        return f"OPD ({self.privilege})"


# ---------------------------------------------------------------------------- what the teacher sees


@dataclasses.dataclass
class Cued(Row):
    """A Row, and evidence in words for the teacher's eyes alone."""

    cue: str = ""


def with_cues(rows, path):
    """The rows of a file -> the same with their records' cues. Raises RecordError."""
    records, cued = read_records(path), []
    for row in rows:
        cue = records[int(row.where.rpartition(":")[2])].get("cue") or ""
        if not isinstance(cue, str):
            raise RecordError(f"{row.where}: 'cue' should be text, found {cue!r:.60}")
        cued.append(Cued(**vars(row), cue=cue))
    return cued


def hint(row, config):
    """What the teacher reads at the end of a question, with its marker; "" where there is none."""
    text = dict(cue=row.cue, answer=row.answer, none="")[config.privilege]
    # it starts with a space: then no token reaches from the question into it
    return f" {config.marker} {text}" if text else ""


def hinted(sample, tokenizer, config):
    """An encoded prompt -> the teacher's: the hint's tokens at the end of the user's turn."""
    # deviation 4: the hint's tokens are put into the student's prompt
    words = tokenize([hint(sample["row"], config)], tokenizer)
    ids, end = sample["ids"], tokenizer.convert_tokens_to_ids("<|im_end|>")
    turn = len(ids) - 1 - ids[::-1].index(end)
    return dict(sample, ids=[*ids[:turn], *words, *ids[turn:]])


# ---------------------------------------------------------------------------------------- equations


def advantages(logp_teacher, logp):
    """A_n, any shape, without gradient. Source: Eq. (6); clamped as in the official code."""
    return (logp_teacher - logp).detach().clamp(-10, 10)


def token_weights(sampled, n_rollouts):
    """What each chosen token, sampled (R, T) bool, counts in L (R, T). Source: Eq. (7).

    n_rollouts: of the step, over all ranks; its weights add up to 1.
    """
    # deviation 2: a forced stop is not among `sampled`
    # deviation 3: 1/|y|
    return sampled / sampled.sum(1, keepdim=True).clamp(min=1) / n_rollouts


# --------------------------------------------------------------------------------------------- loss


@torch.no_grad()
def ask_teacher(teacher, tokenizer, batch, config):
    """The teacher scores a batch's rollouts under its own prompts -> its Replay."""
    samples = [hinted(group.sample, tokenizer, config) for group in batch.groups]
    prompts = model_inputs(collate(samples, 0, side="left"))  # pads are masked
    # deviation 1: the teacher is fed the student's latents
    return la_dapo.replayed(teacher, dataclasses.replace(batch, prompts=prompts), config)


def opd_loss(model, batch, told, weight, size, config):
    """A batch's share of L, Eq. (7), and figures for the log.

    told: the teacher's Replay. weight (R, T). size: sum ||z_T||^2 of the step.
    """
    new = la_dapo.replayed(model, batch, config)
    # with one update a step the policy has not moved: what differs is only the decoder's kernels
    # deviation 5: with several, the record is what A_n and the ratio compare with
    old = new.logprobs.detach() if config.inner_epochs == 1 else batch.rollout.logprobs
    A = advantages(told.logprobs, old)  # (R, T)
    each, _ = la_dapo.clipped_surrogate(new.logprobs, old, A, config.eps, config.eps)  # (R, T)
    error = (new.predicted - told.predicted).square().sum() / max(size, 1e-12)
    loss = (each * weight).sum() + (config.lam * error if config.lam else 0)
    figures = dict(
        loss=(each.detach() * weight).sum(),
        gap=(A * weight).sum(),
        entropy=(new.entropy * weight).sum(),
        latent=error.detach(),
    )
    return loss + la_dapo.through_latents(loss, new, batch, config), figures


# --------------------------------------------------------------------------------------------- loop


def load_pair(run):
    """-> the student, its tokenizer, the frozen teacher.

    Raises SystemExit if they do not fit, or the teacher is not the one the run began with.
    """
    c, (model, tokenizer) = run.config, run.load(cls=Model)
    if c.recovery and not hasattr(model, "recovery"):
        add_recovery(model)
    folder = run.start_folder(c.teacher)
    teacher, words = run.machine.load(folder, frozen=True, cls=Model)
    same_width = model.lm_head.in_features == teacher.lm_head.in_features
    if not same_width or tokenizer.get_vocab() != words.get_vocab():
        raise SystemExit(f"{folder}: a teacher needs the student's hidden size and its tokenizer")
    return model, tokenizer, teacher.requires_grad_(False)


def train(config):
    """Run the distillation -> path of the last checkpoint.

    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, student and teacher, the prompts in their order
    machine = Machine(config.bf16)
    rows = with_cues(rows_of(config), config.data)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer, teacher = load_pair(run)
    model.model.visual.requires_grad_(False)
    hints = sum(bool(hint(row, config)) for row in rows)
    steps = config.steps or int(len(rows) * config.epochs) // config.prompts
    if not steps or not (hints or config.privilege == "none"):
        raise SystemExit(f"{len(rows)} rows, {hints} with a hint ({config.privilege}): too few")
    student = machine.wrap(model, unused=True)  # without adjoint_terms a head has no gradient
    # matrices before vectors: the order decides how the gradient's norm is rounded
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.ndim < 2)
    betas = 0.9, config.beta2
    optimizer = torch.optim.AdamW(trained, config.lr, betas, weight_decay=0.0, fused=True)
    next_batch = run.state["batch"] if run.state else 0  # its number, k
    size, hidden = config.rollout_batch, model.config.text_config.hidden_size
    batches_a_step = -(-config.prompts // size)
    plan = la_dapo.prompt_batches(
        len(rows), size, next_batch, config.seed, machine.rank, machine.world
    )
    prompts = iter(read_ahead(Samples(rows, tokenizer, config, train=False), plan, config.workers))
    text = f"{config.label}: {len(rows)} prompts, {hints} with a hint, {steps} steps"
    run.start(model, optimizer, f"{text} of {config.prompts} x {config.group_size}")

    for step in run.steps(steps):
        # the student answers; what its answers earn is for the log alone
        groups, skipped = [], []
        for k in range(next_batch, next_batch + batches_a_step):
            if k % machine.world == machine.rank:
                samples = next(prompts)
                with machine.autocast():
                    groups += la_dapo.roll_out(model, tokenizer, samples, k, config)
                skipped += [sample for sample in samples if isinstance(sample, Skipped)]
        next_batch += batches_a_step
        for group in groups:
            row = group.sample["row"]
            options = row.options if pick(row.answer, row.options or []) is not None else None
            rollouts = group.texts, group.rollout.latents, group.spans
            group.parts = score_group(*rollouts, row.answer, options)
            group.fate, group.A = "kept", torch.zeros(config.group_size)

        # the teacher scores every rollout, equal ones too
        batches, counts = la_dapo.batches_of(groups, hidden, config, machine, each_alone)
        with machine.autocast():
            views = [ask_teacher(teacher, tokenizer, batch, config) for batch in batches]
        (z_size,) = machine.sum([sum(told.predicted.square().sum() for told in views)])

        # the student learns: loss, backward, clip, step
        lr, figures, norms = la_dapo.learning_rate(step, steps, config), Counter(), []
        for _ in range(config.inner_epochs):
            for batch, told in zip(batches, views):
                set_sync(student, last=batch is batches[-1])
                weight = token_weights(batch.rollout.sampled, counts.rollouts)
                with machine.autocast():
                    loss, logged = student(opd_loss, batch, told, weight, z_size, config)
                (loss * machine.world).backward()  # DDP averages the ranks' gradients
                figures.update({name: float(value) for name, value in logged.items()})
            norms.append(torch.nn.utils.clip_grad_norm_(trained, config.clip).item())
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            if math.isfinite(norms[-1]):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then a checkpoint
        skipped, _ = run.skips(skipped)
        line = dict(step=step, lr=lr, **la_dapo.update_figures(figures, norms, machine))
        line.update(la_dapo.rollout_figures(groups, groups, groups, machine))
        line.update(skipped=len(skipped), skipped_names=skipped)
        if step == 0 and not line["rollouts"]:
            raise SystemExit(f"none of the first prompts could be used, e.g. {skipped[:1]}")
        run.log(line, "gap", "accuracy")
        if run.due(step + 1, steps):
            run.save(step + 1, model, tokenizer, optimizer, batch=next_batch)
            if machine.master:
                draw_curves(run.path, os.path.join(config.out, "opd.png"), CURVES)
    return run.finish()


def evaluate_folder(config):
    """`evaluate.evaluate` of a folder that may have the recovery module."""
    return evaluate.evaluate(config, *Machine(config.bf16).load(config.model, cls=Model))


if __name__ == "__main__":
    if sys.argv[1:2] == ["evaluate"]:
        run_script(evaluate_folder, evaluate.Config, sys.argv[2:])
    else:
        run_script(train, Config)
