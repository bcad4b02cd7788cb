"""LA-DAPO: reinforcement learning on trajectories of words and latents (paper sec. 3.3).

    rollouts -> rewards -> group filter and refill -> advantages -> token-level clipped loss -> step

    A_i  = (R_i - mean R) / (std R + 1e-6)              advantage in the group of a prompt
    r_t  = exp(log pi(a_t) - log pi_old(a_t))           a_t: a word, or stop / continue in a span
    L    = 1/n sum_t max(-r_t A, -clip(r_t, 1 - eps_low, 1 + eps_high) A) + beta KL(pi, pi_SFT)
                                                        n: chosen tokens of the step

    python la_dapo.py --model runs/sft --data train.json --out runs/rl              # CPU or one GPU
    torchrun --nproc_per_node 8 la_dapo.py --model runs/sft --data train.json --out runs/rl --shard

Ablations, one flag each: --lambda_c 0, --lambda_d 0, --kl 0, --adjoint_terms -1, --no-filter. The
last keeps all groups and is not GRPO: token mean, clip-higher and dual clip stay. Another loss is
`train(config, policy_loss=...)`: variants/own_path.py is such a fork.

Which path carries which gradient. The log-probability of an answer depends on the weights twice: at
each chosen token, and through the latents, which are a function of the weights themselves and are
read by everything after them.
  adjoint_terms = 0    recorded latents are constants, as in the paper and its kin: the second path
                       is dropped.
  adjoint_terms = k    k vector-Jacobian products bring the second path back. The gradient is exact
                       with as many as the longest response has latents (-1). Each costs about half
                       a backward pass over the response, not over the prompt, and no memory beyond
                       the graph, which is kept until the last of them.
"Exact" holds for rewards that depend on the words alone. R_ctr and R_div also depend on the latents
directly; that gradient, dR/dz, is dropped, as in the paper. So a group of identical rollouts, whose
advantages are all zero, gives no update.

With one update a step (the default) the policy has not moved: the ratio is 1 and the clip cannot
act. `minibatches` and `inner_epochs` change that. "Exact" then holds for the first update only,
because afterwards the recorded latents are no longer the policy's.

Memory: a group's prompt is stored once (common/shared_prefix.py); `gradient_checkpointing` keeps
only the layers' inputs. `shard` spreads weights, reference and optimizer over the ranks
(common/machine.py). `lora_rank` trains small matrices beside a frozen model (common/lora.py), which
is then the KL's reference, too. In bf16 each GPU also holds a whole frozen bf16 copy of the model
while it generates: 2 bytes per weight, freed before the update. With `lora_rank` there is no copy,
because the frozen model is in bf16 already. With --no-bf16 only --shard makes one, in fp32.

Where this differs from the paper:
 1. A latent step's log-probability is that of its one decision, log(1 - p(LE)) or log p(LE); forced
    tokens have none.
 2. Optional, off by default: `adjoint_terms`.
 3. The KL term holds latents constant, on both sides.
Where this differs from the official code:
 4. Recorded latents are fed again when log-probabilities are taken; official feeds the `<|latent|>`
    token.
 5. Every chosen token of the step weighs the same, over all ranks and micro-batches.
 6. A prompt is encoded once for its whole group, in the rollout and in the update; rollouts of a
    group that came out equal are replayed once and counted.
 7. Every rank runs as many micro-batches as the fullest; what fills up weighs nothing.
 8. What is sampled depends on the seed and the place in the data, not on the number of ranks.
 9. pi_old is the policy's forward before the step's first update, as in official; with one update
    a step it is this forward itself. The decoder's recorded log-probabilities are only compared
    with it: their RMS difference is logged as `replay_rms`.
10. In the filter's mean a repetitive rollout counts 0 (official: -1).
11. Weight decay is 0 (official: 0.01), and the vision tower is frozen (official trains it).
12. Without a judge, open-ended answers must match exactly; the run reports how many there are.
13. A resumed run keeps the KL reference it started with, even if --model has changed since.

Axis letters: B prompts, G rollouts of a prompt, R rows (rollouts of several prompts), T new tokens,
N latents, D hidden.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import time
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from common.ahead import read_ahead
from common.cli import run_script
from common.formats import Skipped, no_option, report_bad
from common.judge import judge_of
from common.lora import frozen_alone
from common.machine import Machine, set_sync, whole
from common.report import draw_curves
from common.run import Run, aside, held_out_rows, in_order, rows_of
from data import DataConfig, Samples, at_least, collate, model_inputs, to_device, unshown_options
from latent_decode import Rollout, ask, gather, replay
from rewards import accuracy_reward, ask_judge, check_weights, score_group, span_lengths


@dataclasses.dataclass
class Config(DataConfig):
    model: str = "runs/sft"  # where to start: a model's or a run's folder; the KL's reference
    data: str = ""  # records with answers, see data.py; chains and future frames are not needed
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    eval_data: str = ""  # held-out records, answered greedily at every checkpoint  # ours
    out: str = "runs/rl"  # the run's folder
    resume: bool = False  # continue from the newest checkpoint in `out`
    seed: int = 0  # order of the prompts and all sampling  # ours
    # rollouts
    groups: int = 64  # prompts a step learns from, over all ranks  # paper Table 9
    group_size: int = 8  # G, rollouts of a prompt  # paper Table 9
    prompts: int = 0  # prompts rolled out at a time, over all ranks; 0 = groups  # ours
    max_tries: int = 10  # so many times; then the step takes what was kept  # ours
    rollout_batch: int = 1  # prompts decoded together on one rank, each with its group  # ours
    temperature: float = 0.9  # paper Table 9
    top_p: float = 0.99  # on words; log-probabilities are of the full softmax  # paper Table 9
    max_new_tokens: int = 2048  # as in evaluation  # ours
    max_latents: int = 8  # longest span; a trained folder brings its own, 2 * l_max  # official
    merge_equal: bool = False  # decode rollouts of a prompt once while they are equal  # ours
    cuda_graph: bool = False  # replay a captured decoding step; not with merge_equal  # ours
    # rewards
    lambda_c: float = 0.2  # weight of R_ctr, Eq. (7)  # paper Table 9
    lambda_d: float = 0.1  # weight of R_div, Eq. (7)  # paper Table 9
    tau: float = 0.5  # temperature of Eq. (5)  # paper Table 9
    judge_url: str = ""  # OpenAI-compatible, for open answers; key: JUDGE_API_KEY  # sec. 3.3
    judge_model: str = ""  # its model's name; "" = no judge
    # objective
    filter: bool = True  # only groups whose mean accuracy lies between low and high  # paper
    low: float = 0.1  # paper Table 9
    high: float = 0.9  # paper Table 9
    eps_low: float = 0.2  # paper Table 9
    eps_high: float = 0.28  # paper Table 9
    dual_clip: float = 3.0  # c, bounds the loss where A < 0  # official
    kl: float = 0.01  # beta, weight of the KL to the starting model  # paper Table 9
    # gradient through the latents: 0 none (paper), k terms, -1 exact  # ours
    adjoint_terms: int = 0
    # optimisation
    steps: int = 0  # 0 = from epochs  # ours
    epochs: float = 1.0  # passes over the prompts  # paper Table 9
    minibatches: int = 1  # updates a pass over the kept groups  # ours
    inner_epochs: int = 1  # passes over them  # ours
    micro_batch: int = 1  # groups a forward on one rank  # ours
    lr: float = 1e-6  # paper Table 9
    warmup_steps: int = 0  # linear  # ours
    final_lr: float = 1.0  # share of lr at the last step, reached linearly; 1 = constant  # ours
    beta2: float = 0.999  # of AdamW; beta1 is 0.9  # AdamW's default
    clip: float = 1.0  # gradient norm  # paper Table 9
    # machine
    bf16: bool = True  # on CUDA; the CPU computes in fp32  # paper Table 8
    # recompute activations: less memory, about two fifths slower  # ours
    gradient_checkpointing: bool = False
    shard: bool = False  # weights, gradients, optimizer spread over the ranks  # ours
    lora_rank: int = 0  # of matrices trained beside a frozen model; 0 = the model itself  # ours
    save_every: int = 10  # steps between checkpoints; the last two are kept  # ours
    track: str = ""  # also log to wandb | trackio, a package that is installed  # ours

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "groups", "max_tries", "rollout_batch", "max_new_tokens", "micro_batch")
        at_least(self, 1, "minibatches", "inner_epochs", "save_every")
        at_least(self, 2, "group_size")  # an advantage compares
        at_least(self, 0, "prompts", "steps", "max_latents", "warmup_steps", "lora_rank")
        at_least(self, -1, "adjoint_terms")
        if self.merge_equal and self.cuda_graph:
            raise ValueError("merge_equal or cuda_graph: a captured step has one size")
        if self.temperature <= 0 or self.tau <= 0:  # a greedy group has nothing to compare
            raise ValueError(f"temperature {self.temperature}, tau {self.tau}: expected above 0")
        if self.shard and self.lora_rank:
            raise ValueError("lora_rank: not with shard; each rank has the whole frozen model")
        if self.shard and self.adjoint_terms:
            raise ValueError("adjoint_terms needs whole weights: 0 with shard")
        if self.judge_url and not self.judge_model:
            raise ValueError("judge_url needs judge_model, the name of a model there")

    @property
    def label(self):
        """What is trained, in a word: it names the run."""
        return "LA-DAPO"


# ---------------------------------------------------------------------------------------- equations


def group_advantages(rewards):
    """A_i = (R_i - mean) / (std + 1e-6), unbiased std -> (G,). Source: sec. 3.3 (GRPO).

    rewards: G floats, None = unjudged: no part in mean and std, and advantage 0. All 0 with fewer
    than two rewards.
    """
    judged = torch.tensor([r is not None for r in rewards])
    known = torch.tensor([r for r in rewards if r is not None], dtype=torch.float64)
    A = torch.zeros(len(rewards), dtype=torch.float64)
    if len(known) > 1:
        A[judged] = (known - known.mean()) / (known.std() + 1e-6)
    return A.float()


def keep_group(correct, unjudged, low=0.1, high=0.9):
    """DAPO's filter on one group -> "kept", "too hard", "too easy", "unjudged". Source: sec. 3.3.

    Kept iff low < mean accuracy < high. A mean needs at least two verdicts.
    """
    # deviation 10: a repetitive rollout is among the wrong ones, 0
    known = [c for c, u in zip(correct, unjudged) if not u]
    if len(known) < 2:
        return "unjudged"
    mean = sum(known) / len(known)
    return "too hard" if mean <= low else "too easy" if mean >= high else "kept"


def clipped_surrogate(logp, old, A, eps_low=0.2, eps_high=0.28, dual_clip=3.0):
    """max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A), where A < 0 at most -dual_clip A.

    logp, old, A: same shape or broadcast -> loss a token, ratio r. Source: sec. 3.3 (DAPO).
    """
    r = (logp - old).exp()
    loss = torch.maximum(-r * A, -r.clamp(1 - eps_low, 1 + eps_high) * A)
    return torch.where(A < 0, torch.minimum(loss, -dual_clip * A), loss), r


def kl_k3(logp, ref):
    """KL(pi, ref) a token, estimated by exp(d) - d - 1 with d = ref - logp: never negative.

    Source: sec. 3.3 (GRPO); official clamps d to +-20 and the estimate to +-10. Where it is at a
    clamp, a token has no gradient: d is above 2.6 or below -11.
    """
    d = (ref - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def adjoint_loss(loss, predicted, latents, terms):
    """A term of value 0 with the gradient of the loss that flows through the latents. Source: ours.

    With f(z, w) the latents predicted while z are fed, decoding makes z = f(z, w). So
    dz/dw = (1 - J)^-1 df/dw with J = df/dz, and

        dloss/dw = (partial, z held constant) + g (1 - J)^-1 df/dw,    g = dloss/dz.

    A latent depends on earlier ones only: J is strictly lower triangular. So the adjoint
    g (1 - J)^-1 = g + gJ + gJJ + ... ends after as many terms as the longest response has latents.
    No Jacobian is formed: each term is a vector-Jacobian product. Keeps the graph.

    loss: scalar; predicted (N, D) = f; latents (N, D), the leaf z; terms: how many of the series.
    """
    adjoint = term = torch.autograd.grad(loss, latents, retain_graph=True)[0]  # (N, D) g
    for _ in range(terms - 1):
        term = torch.autograd.grad(predicted, latents, term, retain_graph=True)[0]  # (N, D) gJ^k
        adjoint = adjoint + term
    return (adjoint.detach() * (predicted - predicted.detach())).sum()


def learning_rate(step, steps, config):
    """Linear warm-up, then linear to final_lr * lr at the last of `steps`. Source: ours."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps - 1)
    return config.lr * (1 + (config.final_lr - 1) * min(1.0, share))


# ----------------------------------------------------------------------- roll out, score and filter


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n rows in an epoch. Source: ours."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def prompt_batches(n, size, first, seed, rank, world):
    """Indices of the prompts that one rank decodes together, from batch `first` on, without end.

    Batch k is rank k % world's. It holds places k * size ... of the endless order of epochs,
    whatever the number of ranks. Source: official's iterator wraps, too.
    """
    for k in itertools.count(first):
        if k % world == rank:
            places = range(k * size, (k + 1) * size)
            yield [permutation(n, seed, place // n)[place % n] for place in places]


@dataclasses.dataclass
class Group:
    """One prompt and its G rollouts, on the rank that made them."""

    place: int  # of the prompt in the order of the data
    sample: dict  # the encoded prompt
    rollout: Rollout  # G rows
    texts: list  # G responses
    spans: list  # G lists: the latents in each span
    parts: dict = None  # of `rewards.score_group`
    fate: str = ""  # what `keep_group` says
    A: torch.Tensor | None = None  # (G,) advantages


def roll_out(model, tokenizer, samples, k, config, **more):
    """Batch k of the prompts, encoded or Skipped -> a Group for each that could be read.

    more: other arguments of `generate`.
    """
    numbers = [i for i, sample in enumerate(samples) if not isinstance(sample, Skipped)]
    if not numbers:
        return []
    rollout, tokens, texts = ask(
        model,
        tokenizer,
        [samples[i] for i in numbers],
        n=config.group_size,
        temperature=config.temperature,
        top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
        max_latents=config.max_latents,
        merge_equal=config.merge_equal,
        cuda_graph=config.cuda_graph,
        # deviation 8: the seed and k decide what is sampled, whatever the number of ranks
        generator=torch.Generator().manual_seed(config.seed * 1_000_003 + k),
        **more,
    )
    groups, c = [], model.config
    for j, i in enumerate(numbers):
        own = range(j * config.group_size, (j + 1) * config.group_size)
        spans = [span_lengths(tokens[r], c.latent_start_id, c.latent_id) for r in own]
        place, said = k * config.rollout_batch + i, [texts[r] for r in own]
        groups.append(Group(place, samples[i], gather([(rollout, own)]), said, spans))
    return groups


def score_groups(groups, judge, config):
    """Eq. (7) for each group, and what the filter says of it. The judge gets all in one call."""
    responses = [text for group in groups for text in group.texts]
    rows = [group.sample["row"] for group in groups for _ in group.texts]
    verdicts = ask_judge(judge, responses, rows)
    for j, group in enumerate(groups):
        row = group.sample["row"]
        group.parts = score_group(
            group.texts,
            group.rollout.latents,
            group.spans,
            row.answer,
            row.options,
            verdicts[j * config.group_size : (j + 1) * config.group_size],
            weights=config,
        )
        correct, unjudged = group.parts["correct"], group.parts["unjudged"]
        group.fate = keep_group(correct, unjudged, config.low, config.high)


# -------------------------------------------------------------------------------- a batch, its loss


@dataclasses.dataclass
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
    old: torch.Tensor | None = None  # (R, T) of the policy before the step's first update

    @property
    def weight(self):
        """(R, T): how often each chosen token counts."""
        return self.rollout.sampled * self.times


class Counts(NamedTuple):
    """What an update learns from, over all ranks and micro-batches."""

    tokens: int  # chosen ones: n of L
    rollouts: int
    groups: int


def distinct(group):
    """A group's judged rollouts, equal ones together: lists of their numbers. Source: ours.

    Equal words have equal latents. Equal words of which the judge called one right and one wrong
    stay apart. Unjudged ones are left out.
    """
    rows = {}
    lengths = group.rollout.lengths.tolist()
    for i, (tokens, n) in enumerate(zip(group.rollout.tokens.tolist(), lengths)):
        if not group.parts["unjudged"][i]:
            rows.setdefault((group.parts["correct"][i], *tokens[:n]), []).append(i)
    return list(rows.values())


def batch_of(groups, device, distinct=distinct):
    """Groups that have advantages -> Batch. distinct(group): which rollouts share a row."""
    samples = [group.sample for group in groups]
    prompts = model_inputs(collate(samples, 0, side="left", raw=True))  # padding is masked
    prompt_of, A, members, parts = [], [], [], []
    for k, group in enumerate(groups):
        rows = distinct(group)  # deviation 6: equal rollouts are replayed once and counted
        prompt_of += [k] * len(rows)
        A += [group.A[row].mean() for row in rows]
        members += rows
        parts.append((group.rollout, [row[0] for row in rows]))
    prompt_of = torch.tensor(prompt_of, device=device)  # (R,)
    times = torch.tensor([[len(row)] for row in members], device=device)  # (R, 1)
    A = torch.stack(A)[:, None].to(device)  # (R, 1)
    return Batch(prompts, gather(parts), prompt_of, A, times, members, groups)


def no_batch(hidden, device):
    """A Batch of one token that nobody chose: it weighs nothing. hidden: D.

    A forward needs all ranks, so a rank without a group left runs this while others go on.
    """
    prompts = model_inputs(collate([], 0, side="left"))
    zero = torch.zeros(1, 1, dtype=torch.long, device=device)
    latents = [torch.zeros(0, hidden, device=device)]
    rollout = Rollout(zero, zero.bool(), latents, zero.float(), ["length"], zero[0] + 1)
    return Batch(prompts, rollout, zero[0], zero.float(), zero, members=[[]])


def batches_of(groups, hidden, config, machine, distinct=distinct):
    """This rank's groups of an update -> its batches, and the Counts of all ranks."""
    size = config.micro_batch
    parts = [groups[i : i + size] for i in range(0, len(groups), size)]
    batches = [batch_of(part, machine.device, distinct) for part in parts]
    tokens = sum(batch.weight.sum() for batch in batches)
    rollouts = sum(batch.times.sum() for batch in batches)
    counts = machine.sum([tokens, rollouts, len(groups)])
    # deviation 7: DDP and FSDP need every rank in every forward
    missing = max(machine.gather([len(batches)])) - len(batches)
    batches += [no_batch(hidden, machine.device) for _ in range(missing)]
    return batches, Counts(*(int(n) for n in counts))


def replayed(model, batch, config):
    """A batch's rollouts fed again -> latent_decode.Replay."""
    # deviation 4: with their latents
    # deviation 1: a latent step's log-probability is that of its decision, in `decisions` there
    prompts = to_device(batch.prompts, batch.A.device)
    return replay(model, prompts, batch.rollout, config.temperature, batch.prompt_of)


def policy_loss(model, batch, counts, config):
    """A batch's share of the update's loss L -> scalar, {name: scalar} for the log.

    counts: Counts of the update. The figures are summed over micro-batches and ranks.
    Source: the docstring's L.
    """
    new = replayed(model, batch, config)
    loss, kl, figures = clipped_loss(new, batch, counts, config)
    # deviation 3: the KL has no part in the gradient through the latents
    return loss + config.kl * kl + through_latents(loss, new, batch, config), figures


def clipped_loss(new, batch, counts, config):
    """A batch's Replay -> its share of both sums of L (clipped, KL), and figures for the log.

    Latents are held constant.
    """
    # deviation 5: every chosen token of the step counts 1/n
    weight = batch.weight / counts.tokens  # (R, T)
    # deviation 9: with one update a step pi_old is this very forward
    old = new.logprobs.detach() if batch.old is None else batch.old
    bounds = config.eps_low, config.eps_high, config.dual_clip
    surrogate, r = clipped_surrogate(new.logprobs, old, batch.A, *bounds)  # (R, T)
    kl = torch.zeros_like(surrogate) if batch.ref is None else kl_k3(new.logprobs, batch.ref)
    figures = token_figures(new, batch, surrogate, r, kl, config)
    figures = {name: (value.detach() * weight).sum() for name, value in figures.items()}
    return (surrogate * weight).sum(), (kl * weight).sum(), figures


def through_latents(loss, new, batch, config):
    """`adjoint_loss` with as many terms as the config wants and the longest response has."""
    # deviation 2: without terms the latents are constants, as in the paper
    longest = max(len(z) for z in batch.rollout.latents)
    terms = longest if config.adjoint_terms < 0 else min(config.adjoint_terms, longest)
    return adjoint_loss(loss, new.predicted, new.latents, terms) if terms else 0.0


# --------------------------------------------------------------------------------------------- loop


def train(config, policy_loss=policy_loss):
    """Run LA-DAPO -> path of the last checkpoint.

    policy_loss(model, batch, counts, config) -> loss, {name: scalar}: see `policy_loss`.
    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, the policy, the KL's reference, the prompts in their order
    check_weights(config, OWN)
    machine = Machine(config.bf16, config.shard)
    rows, held_out = usable(rows_of(config), config), usable(held_out_rows(config), config)
    steps, judge = count_steps(rows, config), judge_of(config)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load()
    model.model.visual.requires_grad_(False)  # deviation 11: the vision tower is frozen
    hidden = model.config.text_config.hidden_size
    reference = load_reference(run, model)
    # policy(f, ...) is f(model, ...); with several ranks it goes through DDP or FSDP2, and DDP has
    # to know that a latent head gets no gradient where latents are constants
    policy = machine.wrap(model, unused=model.latent_head is not None)
    # matrices before vectors, as in sft.py: the order decides how the gradient's norm is rounded
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.ndim < 2)
    betas, decay = (0.9, config.beta2), 0.0  # deviation 11: no weight decay
    optimizer = torch.optim.AdamW(trained, config.lr, betas, weight_decay=decay, fused=True)
    next_batch = run.state["batch"] if run.state else 0  # its number, k
    size = config.rollout_batch
    batches_a_try = -(-(config.prompts or config.groups) // size)
    plan = prompt_batches(len(rows), size, next_batch, config.seed, machine.rank, machine.world)
    prompts = iter(read_ahead(Samples(rows, tokenizer, config, train=False), plan, config.workers))
    run.start(model, optimizer, describe(config, rows, model, steps, machine))

    for step in run.steps(steps):
        # roll out and score prompts until enough groups, of all ranks, are worth learning from
        groups, skipped, first_batch, began = [], [], next_batch, time.time()
        # in bf16 or sharded a whole copy of the policy, else the policy itself
        decoder = machine.decoder(model)
        dropped = ("unjudged", "too hard", "too easy") if config.filter else ("unjudged",)
        for _ in range(config.max_tries):
            new = []
            for k in range(next_batch, next_batch + batches_a_try):
                if k % machine.world == machine.rank:
                    samples = next(prompts)
                    with machine.autocast():
                        new += roll_out(decoder, tokenizer, samples, k, config)
                    skipped += [sample for sample in samples if isinstance(sample, Skipped)]
            score_groups(new, judge, config)
            groups += new
            next_batch += batches_a_try
            worth = [group for group in groups if group.fate not in dropped]
            # the first ones in the order of the data
            places = sorted(machine.gather([group.place for group in worth]))[: config.groups]
            if len(places) == config.groups:
                break
        del decoder
        kept = [group for group in worth if group.place in places]

        # advantages; log-probabilities of the reference, and of the policy if it is to move
        # more than once
        rolled_out = time.time()
        for group in kept:
            group.A = group_advantages(group.parts["total"])
        minibatches = []
        for m in range(config.minibatches):
            part = [g for g in kept if places.index(g.place) % config.minibatches == m]
            batches, counts = batches_of(part, hidden, config, machine)
            for batch in batches:
                with torch.no_grad(), machine.autocast():
                    if reference is not None:
                        batch.ref = reference(replayed, batch, config).logprobs
                    if config.minibatches * config.inner_epochs > 1:  # deviation 9
                        batch.old = policy(replayed, batch, config).logprobs
            if counts.tokens:  # there may be fewer groups than minibatches
                minibatches.append((batches, counts))

        # an update for each minibatch: loss, backward, clip, step
        lr, figures, norms = learning_rate(step, steps, config), Counter(), []
        optimizer.param_groups[0]["lr"] = lr
        for batches, counts in minibatches * config.inner_epochs:
            for batch in batches:
                set_sync(policy, last=batch is batches[-1])  # DDP averages once an update
                with machine.autocast():
                    loss, logged = policy(policy_loss, batch, counts, config)
                (loss * machine.world).backward()  # DDP and FSDP average the ranks' gradients
                # summed in float64 on the GPU and read after the step, so that nothing waits here
                figures.update({k: torch.as_tensor(x).double() for k, x in logged.items()})
            norms.append(whole(torch.nn.utils.clip_grad_norm_(trained, config.clip)).item())
            if math.isfinite(norms[-1]):  # the norm is equal on all ranks
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then whole rollouts and a checkpoint
        seconds = round(rolled_out - began, 4), round(time.time() - rolled_out, 4)
        skipped, failures = run.skips(skipped, judge)
        line = dict(step=step, lr=lr, prompts=[first_batch * size, next_batch * size])
        line.update(seconds_rollout=seconds[0], seconds_update=seconds[1])
        line.update(update_figures(figures, norms, machine))
        line.update(rollout_figures(groups, kept, worth, machine))
        line.update(skipped=len(skipped), skipped_names=skipped, judge_failures=failures)
        check_step(line, run)
        if run.due(step + 1, steps):
            shown = step // config.save_every % config.group_size  # another rollout each time
            write_rollouts(run, step, groups, shown)
            if held_out:
                line.update(held_out_accuracy(model, tokenizer, held_out, judge, run))
        run.log(line, "total", "accuracy", "groups", "eval_accuracy")
        if run.due(step + 1, steps):
            run.save(step + 1, model, tokenizer, optimizer, batch=next_batch)
            if machine.master:
                draw_curves(run.path, os.path.join(config.out, "rewards.png"), CURVES)
    return run.finish()


def load_reference(run, model):
    """The frozen model that the KL compares with -> run(f, ...) = f(it, ...); None without a KL."""
    if not run.config.kl:
        return None
    if run.config.lora_rank:
        return frozen_alone(model)
    # deviation 13: the folder that the run began with
    reference, _ = run.machine.load(run.start_folder(), frozen=True)
    return run.machine.wrap(reference.requires_grad_(False))


def usable(rows, config):
    """The rows whose answers can be rewarded; the others are counted, named and left out.

    Raises SystemExit if they are more than the share max_bad.
    """
    reasons = [no_option(row) for row in rows]
    report_bad([reason for reason in reasons if reason], len(rows), config.max_bad)
    return [row for row, reason in zip(rows, reasons) if reason is None]


def count_steps(rows, config):
    """Updates of the run: one epoch is N // groups, because refills cost passes, not updates."""
    prompts = int(len(rows) * config.epochs)
    if not rows or (prompts < 1 and not config.steps):
        raise SystemExit(f"nothing to train on: {len(rows)} rows, {config.epochs} epochs")
    return config.steps or max(1, prompts // config.groups)


def describe(config, rows, model, steps, machine):
    """The run in one line."""
    updates = config.minibatches * config.inner_epochs
    n_open = sum(not row.options for row in rows)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # deviation 12: how many answers are open, and who judges them
    return (
        f"{config.label}: {len(rows)} prompts{unshown_options(rows, config)}, "
        f"{steps} steps of {config.groups} groups x "
        f"{config.group_size} rollouts, {config.prompts or config.groups} prompts a try, "
        f"{machine.world} ranks, {machine.device.type}, seed {config.seed}, {trained:,} parameters "
        f"trained, {updates} update(s) a step{': the ratio is 1' if updates == 1 else ''}, "
        f"{n_open} open answers judged by {config.judge_model or 'exact match alone'}"
    )


# ----------------------------------------------------------------------------------- what is logged

CURVES = (
    ("total", "accuracy", "eval_accuracy"),
    ("contrastive", "diversity"),
    ("entropy", "kl"),
    ("grad_norm",),
)


def token_figures(new, batch, surrogate, r, kl, config):
    """What is logged of the update's tokens -> {name: (R, T)}; the log has their weighted sums."""
    too_high = (r > 1 + config.eps_high) & (batch.A > 0)
    too_low = (r < 1 - config.eps_low) & (batch.A < 0)
    error = (new.logprobs.detach() - batch.rollout.logprobs).square()
    figures = dict(loss=surrogate, ratio=r, kl=kl, entropy=new.entropy)
    return dict(figures, clip_fraction=too_high | too_low, replay_ms=error)


def rewards_of(group):
    """{name: G values}: the reward and its parts, whatever `rewards.score_group` gives."""
    return {k: v for k, v in group.parts.items() if k not in ("correct", "unjudged")}


def rollout_figures(groups, kept, worth, machine):
    """This rank's groups of a step -> figures of all ranks' rollouts, a field each.

    Each reward and its parts as mean and deviation; length, spans, latents a rollout; the share of
    spans that were forced to stop and of rollouts that were cut off; counts.
    """
    counts, values = Counter(groups=len(kept), surplus=len(worth) - len(kept)), []
    for group in groups:
        rollout = group.rollout
        steps = torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device)
        fed = steps < rollout.lengths[:, None]  # (G, T)
        counts.update(rollouts=len(group.texts), tokens=int(rollout.lengths.sum()))
        counts.update(spans=sum(map(len, group.spans)), latents=sum(map(len, rollout.latents)))
        counts.update(forced=int((fed & ~rollout.sampled).sum()))
        counts.update(cut_off=rollout.finish.count("length"))
        counts.update(unjudged=sum(group.parts["unjudged"]))
        counts["unjudged_groups" if group.fate == "unjudged" else group.fate] += 1
        values.append(rewards_of(group))

    total, rewards = Counter(), {name: [] for name in REWARDS}
    for some_counts, some_values in machine.gather([(counts, values)]):
        total.update(some_counts)
        for of_group in some_values:
            for name, of_rollouts in of_group.items():
                known = [value for value in of_rollouts if value is not None]
                rewards.setdefault(name, []).extend(known)
    figures = {}
    for name, known in rewards.items():
        figures[name] = float(np.mean(known)) if known else 0.0
        figures[f"{name}_std"] = float(np.std(known)) if known else 0.0
    n = max(1, total["rollouts"])
    return dict(
        figures,
        length=total["tokens"] / n,
        spans=total["spans"] / n,
        latents=total["latents"] / n,
        forced_stops=total["forced"] / max(1, total["spans"]),
        cut_off=total["cut_off"] / n,
        kept=total["kept"],
        too_easy=total["too easy"],
        too_hard=total["too hard"],
        **{name: total[name] for name in COUNTS},
    )


# in every line, also of a step without a rollout; a new part of the reward joins by itself
REWARDS = ("total", "accuracy", "format", "contrastive", "diversity", "repetition")
COUNTS = ("rollouts", "unjudged", "unjudged_groups", "surplus", "groups")
# the other names in a line, which a reward cannot have
OWN = {*COUNTS, "step", "lr", "prompts", "skipped", "skipped_names", "judge_failures"}
OWN |= {"loss", "ratio", "clip_fraction", "kl", "entropy", "replay_rms", "grad_norm"}
OWN |= {"updates", "updates_skipped", "length", "spans", "latents", "forced_stops", "cut_off"}
OWN |= {"kept", "too_easy", "too_hard", "seconds_rollout", "seconds_update"}


def update_figures(figures, norms, machine):
    """Sums of this rank over its updates -> figures of all ranks, means over the updates.

    replay_ms, a mean of squares, becomes replay_rms. None = there was no update.
    """
    every = machine.gather([{name: float(value) for name, value in figures.items()}])
    names = list(dict.fromkeys(name for some in every for name in some))
    n = len(norms)
    out = {name: sum(some[name] for some in every) / n for name in names if n}
    if "replay_ms" in out:
        out["replay_rms"] = math.sqrt(out.pop("replay_ms"))
    skipped = sum(not math.isfinite(norm) for norm in norms)
    return dict(out, grad_norm=norms[-1] if n else None, updates=n, updates_skipped=skipped)


def check_step(line, run):
    """Say what the reader of a step's line should not overlook.

    Raises SystemExit if none of the first step's prompts could be used.
    """
    step, skipped = line["step"], line["skipped_names"]
    if step == 0 and not line["rollouts"]:
        why = f", e.g. {skipped[0][1]}" if skipped else ""
        raise SystemExit(f"none of the first prompts could be used{why}")
    if not line["updates"]:
        run.say(f"step {step}: no group kept, no update")
    if step == run.first and line["rollouts"] and not line["spans"]:
        run.say(f"step {step}: no rollout opened a span: nothing is imagined (see sft.py)")
    if line["updates_skipped"]:
        run.say(f"step {step}: gradient is not finite, update skipped")


def write_rollouts(run, step, groups, i):
    """Append rollout i of each group, whole, to rollouts_R.jsonl of rank R."""
    path = os.path.join(run.config.out, f"rollouts_{run.machine.rank}.jsonl")
    with open(path, "a", encoding="utf-8") as f:
        for group in groups:
            row = group.sample["row"]
            line = dict(step=step, id=row.id, fate=group.fate, question=row.question)
            line.update(answer=row.answer, response=group.texts[i])
            line.update(group_accuracy=group.parts["accuracy"])
            line.update({name: values[i] for name, values in rewards_of(group).items()})
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def held_out_accuracy(model, tokenizer, rows, judge, run):
    """Greedy accuracy on rows that are not learnt from -> fields of the step's line.

    What R_acc's rule or the judge calls right counts. eval_accuracy is the mean over the judged
    rows of all ranks, or None if there is none.
    """
    config, machine, began = run.config, run.machine, time.time()
    decoder = machine.decoder(model)
    size = config.rollout_batch * config.group_size  # as many rows together as in a rollout
    how = dict(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    right, judged, skipped = 0, 0, []
    with aside(decoder), machine.autocast():
        for some in in_order(rows, tokenizer, size, config, machine, train=False):
            samples = [sample for sample in some if not isinstance(sample, Skipped)]
            skipped += [sample for sample in some if isinstance(sample, Skipped)]
            texts = ask(decoder, tokenizer, samples, **how)[2] if samples else []
            asked = [sample["row"] for sample in samples]
            for text, row, verdict in zip(texts, asked, ask_judge(judge, texts, asked)):
                right += bool(verdict or accuracy_reward(text, row.answer, row.options))
                judged += verdict is not None
    right, judged = machine.sum([right, judged])
    skipped, failures = run.skips(skipped, judge)
    return dict(
        eval_accuracy=right / judged if judged else None,
        eval_judge_failures=failures,
        eval_skipped=skipped,
        eval_seconds=round(time.time() - began, 4),
    )


if __name__ == "__main__":
    run_script(train, Config)
