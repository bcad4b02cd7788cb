"""Groups of rollouts as data: which prompts come next, how groups are batched and written down.

    prompts -> Group: a prompt and its G rollouts
            -> Harvest: all groups of a step on one rank -> figures in the log
            -> Batch: a few of them, as one forward of the update takes them

A reader of LA-DAPO may skip this file: what a group is worth and what is learnt from it stands in
la_dapo.py.

Axis letters: G rollouts of a prompt, R rows (rollouts of several prompts), T new tokens.
"""

import functools
import json
import math
import os
from dataclasses import dataclass, field

import torch

from common.rollouts import Rollout, join, take
from common.runs import Tally, trim_log
from data import Samples, collate, loader, model_inputs


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n rows in an epoch. Source: ours."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def prompt_batches(n, size, first, seed, rank, world):
    """Indices of the prompts that one rank decodes together, from batch `first` on, without end.

    Batch b is rank b % world's. It holds places b * size ... of the endless order of epochs,
    whatever the number of ranks. Source: official's iterator wraps, too.
    """
    b = first
    while True:
        if b % world == rank:
            places = range(b * size, (b + 1) * size)
            yield [permutation(n, seed, place // n)[place % n] for place in places]
        b += 1


def load_prompts(rows, tokenizer, first, config, machine):
    """This rank's batches of encoded prompts, from batch `first` of the data on, decoded ahead."""
    rank, world = machine.rank, machine.world
    plan = prompt_batches(len(rows), config.rollout_batch, first, config.seed, rank, world)
    samples = Samples(rows, tokenizer, config, train=False)
    pad = tokenizer.pad_token_id or 0
    return iter(loader(samples, plan, config.workers, pad_id=pad, side="left"))


@dataclass
class Group:
    """One prompt and its G rollouts, on the rank that made them."""

    place: int  # of the prompt in the order of the data
    sample: dict  # the encoded prompt
    rollout: Rollout  # G rows
    texts: list  # G responses
    spans: list  # G lists: the latents in each span
    parts: dict = None  # of `rewards.score_group`
    verdict: str = ""  # of `la_dapo.keep_group`
    A: torch.Tensor | None = None  # (G,) advantages
    slot: int | None = None  # its number among the step's groups to learn from, over all ranks

    @property
    def rewards(self):
        """{name: G values}: the reward and its parts, whatever `rewards.score_group` gives."""
        return {k: v for k, v in self.parts.items() if k not in ("correct", "unjudged")}


@dataclass
class Harvest:
    """What a step rolled out on this rank."""

    groups: list = field(default_factory=list)
    skipped: list = field(default_factory=list)  # samples that could not be read
    tally: Tally = field(default_factory=Tally)

    @property
    def kept(self):
        """The groups to learn from."""
        return [group for group in self.groups if group.slot is not None]

    def count(self):
        """Add up everything in the tally."""
        self.tally.count("groups", len(self.kept))
        self.tally.count("skipped", len(self.skipped))
        for group in self.groups:
            count(self.tally, group)


@dataclass
class Batch:
    """What one forward of the update takes: R rows of a few groups, equal rollouts merged."""

    prompts: dict  # with their pixels, in the host's memory until it is their turn
    rollout: Rollout
    prompt_of: torch.Tensor  # (R,) which prompt, and which of `groups`
    A: torch.Tensor  # (R, 1) advantages
    times: torch.Tensor  # (R, 1) how many rollouts a row stands for
    members: list = ()  # R lists: which rollouts of its group those are
    groups: list = ()
    ref: torch.Tensor | None = None  # (R, T) log-probabilities of the reference

    @property
    def weight(self):
        """(R, T): how often each chosen token counts."""
        return self.rollout.sampled * self.times


def distinct(group, merge=True):
    """A group's judged rollouts, equal ones together: lists of their numbers. Source: ours.

    Equal words have equal latents. With merge=False (noise was added) each stays alone. Equal words
    of which a judge that wavers calls one right stay apart. Unjudged ones are left out.
    """
    rows = {}
    lengths = group.rollout.lengths.tolist()
    for i, (tokens, n) in enumerate(zip(group.rollout.tokens.tolist(), lengths)):
        key = (group.parts["correct"][i], *tokens[:n]) if merge else i
        if not group.parts["unjudged"][i]:
            rows.setdefault(key, []).append(i)
    return list(rows.values())


def prepare(groups, merge, device):
    """Groups that have advantages -> Batch. merge: replay equal rollouts once. Source: ours."""
    prompts = model_inputs(collate([g.sample for g in groups], 0, side="left"))  # pads are masked
    prompt_of, A, members, rollouts = [], [], [], []
    for k, group in enumerate(groups):
        rows = distinct(group, merge)
        prompt_of += [k] * len(rows)
        A += [group.A[row].mean() for row in rows]
        members += rows
        rollouts.append(take(group.rollout, [row[0] for row in rows]))
    prompt_of = torch.tensor(prompt_of, device=device)
    times = torch.tensor([[len(row)] for row in members], device=device)
    A = torch.stack(A)[:, None].to(device)
    return Batch(prompts, join(rollouts), prompt_of, A, times, members, groups)


def no_batch(hidden, device):
    """A Batch of one token that nobody chose: it weighs 0. Source: ours.

    With shard a forward is a meeting of all ranks: one whose groups are done runs this meanwhile.
    hidden: D.
    """
    prompts = model_inputs(collate([], 0, side="left"))
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    latents = [torch.zeros(0, hidden, device=device)]
    rollout = Rollout(zero, zero.bool(), latents, zero.float(), ["length"], zero[0] + 1)
    return Batch(prompts, rollout, zero[0], zero.float(), zero, members=[[]])


# in every line of the log, also of a step without a rollout; a reward that is new joins by itself
REWARDS = ("total", "accuracy", "format", "contrastive", "diversity", "repetition")
VERDICTS = ("kept", "too easy", "too hard", "unjudged groups")
COUNTS = ("rollouts", "unjudged", *VERDICTS, "surplus", "groups", "skipped")
CURVES = (("total", "accuracy", "eval_accuracy"), ("contrastive", "diversity"))
CURVES += (("entropy", "kl"), ("grad_norm",))


def count(tally, group):
    """Add a group's figures to the tally."""
    rollout = group.rollout
    tokens, lengths = rollout.tokens, rollout.lengths
    steps = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    tally.count("rollouts", len(tokens))
    tally.count("tokens", int(lengths.sum()))
    tally.count("spans", sum(map(len, group.spans)))
    tally.count("latents", sum(len(z) for z in rollout.latents))
    tally.count("forced", int((steps & ~rollout.sampled).sum()))
    tally.count("cut_off", rollout.finish.count("length"))
    tally.count("unjudged groups" if group.verdict == "unjudged" else group.verdict)
    tally.count("unjudged", sum(group.parts["unjudged"]))
    for name, values in group.rewards.items():
        tally.add(name, values)


def log_line(tally, skipped, failures):
    """What all ranks tallied and skipped in a step, the judge's failures -> figures of its line."""
    n = max(1, tally["rollouts"])
    return dict(
        tally.means(REWARDS),
        length=tally["tokens"] / n,
        spans=tally["spans"] / n,
        latents=tally["latents"] / n,
        forced_stops=tally["forced"] / max(1, tally["spans"]),
        cut_off=tally["cut_off"] / n,
        **{name.replace(" ", "_"): tally[name] for name in COUNTS},
        skipped_names=[list(skip) for skip in skipped],
        judge_failures=dict(failures),
        **tally.seconds(),
    )


def update_figures(figures, norms, machine):
    """Sums of this rank, norms of the updates -> the step's figures; None = there was no update."""
    n = len(norms)
    names = ("loss", "ratio", "clip_fraction", "kl", "entropy", "replay_ms")
    sums = machine.sum([figures[name] for name in names])
    means = {name: total / n if n else None for name, total in zip(names, sums)}
    mean_square = means.pop("replay_ms")
    return dict(
        means,
        replay_rms=math.sqrt(mean_square) if n else None,
        ratio_max=max(machine.gather([float(figures["ratio_max"])])),
        grad_norm=norms[-1] if n else None,
        updates=n,
        updates_skipped=sum(not math.isfinite(norm) for norm in norms),
    )


def check_readable(step, tally, skipped):
    """Raises SystemExit if the first step rolled nothing out: a wrong media_root, most likely."""
    if step == 0 and not tally["rollouts"]:
        why = f", e.g. {skipped[0].why}" if skipped else ""
        raise SystemExit(f"none of the first prompts could be used{why}")


class RolloutLog:
    """rollouts_R.jsonl of rank R: every sample_every steps one whole rollout of each group."""

    def __init__(self, run):
        self.config = run.config
        self.path = os.path.join(run.config.out, f"rollouts_{run.machine.rank}.jsonl")
        trim_log(self.path, run.first)

    def write(self, step, groups):
        """Append a line a group, each time another rollout of the group."""
        if step % self.config.sample_every:
            return
        i = step // self.config.sample_every % self.config.group_size
        with open(self.path, "a", encoding="utf-8") as f:
            for group in groups:
                row = group.sample["row"]
                line = dict(step=step, id=row.id, verdict=group.verdict, question=row.question)
                line.update(answer=row.answer, response=group.texts[i])
                line.update(group_accuracy=group.parts["accuracy"])
                line.update({name: values[i] for name, values in group.rewards.items()})
                f.write(json.dumps(line, ensure_ascii=False) + "\n")
