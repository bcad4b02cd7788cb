"""LA-DAPO: reinforcement learning on trajectories of words and latents (paper sec. 3.3).

    rollouts -> rewards -> group filter and refill -> advantages -> token-level clipped loss -> step

    A_i  = (R_i - mean R) / (std R + 1e-6)                            advantage in the group of a
         prompt
    r_t  = exp(log pi(a_t) - log pi_old(a_t))                         a_t: a word, or stop /
         continue in a span
    L    = 1/n sum_t max(-r_t A, -clip(r_t, 1 - eps_low, 1 + eps_high) A) + beta KL(pi, pi_SFT)
         n: tokens of the step

    # one process: CPU or one GPU
    python la_dapo.py --model runs/sft --data train.json --out runs/rl
    torchrun --nproc_per_node 8 la_dapo.py --model runs/sft --data train.json --out runs/rl --zero
    ablations, one flag each: --no-filter (no group filter; all else stays)  --lambda_c 0
                                                  --lambda_d 0  --adjoint_terms -1
                              --latent_sigma 0.1  --kl 0

Which path carries which gradient. The log-probability of an answer depends on the weights twice: at
each chosen token, and through the latents, which are a function of the weights themselves and are
read by everything after them.
  adjoint_terms = 0    recorded latents are constants (the paper and its kin): the second path is
                       dropped.
  adjoint_terms = k    k vector-Jacobian products bring the second path back; as many as a response
                       has latents are exact (-1). Each costs about half a backward pass over the
                       response, not over the prompt, and no memory beyond the graph that is kept
                       until the last of them.
  latent_sigma > 0     latents are sampled, z = h + sigma noise, and their log-density carries a
                       score-function gradient. Costs nothing; the noise it brings is the price.
With one update a step (the default) the ratio is 1, in bf16 up to rounding, and the clip has
nothing to do. `minibatches` and `inner_epochs` change that; "exact" is then so for the first
update, after it the recorded latents are no longer the policy's.

Memory: no gradient checkpointing (it would drop the prompt's cache). One group's graph, the fp32
weights, gradients and optimizer have to fit on a GPU: by estimate Qwen3-VL-2B's do, an 8B's with
prompts of 4,000 tokens do not.

Where this differs from the paper:
 1. A latent step's log-probability is that of its one decision, log(1 - p(LE)) or log p(LE); forced
    tokens have none.
 2. Optional, off by default: `adjoint_terms`, `latent_sigma`.
 3. The KL term holds latents constant, on both sides.
Where this differs from the official code:
 4. Recorded latents are fed again when log-probabilities are taken; official feeds the `<|latent|>`
    token.
 5. Every chosen token of the step weighs the same, over all ranks and micro-batches.
 6. A prompt is encoded once for its whole group, in the rollout and in the update; rollouts of a
    group that came out equal are replayed once and counted, where latents are deterministic.
 7. Ranks add up gradients once an update, by hand: they may hold different numbers of groups, and
    wait for each other only after each try and at each update.
 8. What is sampled depends on the seed and the place in the data, not on the number of ranks.

Axis letters: B prompts, G rollouts of a prompt, R rows (rollouts of all prompts), P prompt tokens,
T new tokens, S chosen tokens, N latents of all rows, D hidden, V vocabulary.
"""

import dataclasses
import functools
import json
import math
import os
import time
from collections import Counter

import torch
import torch.distributed as dist
from tqdm import tqdm

from common.judge import Judge
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
from latent_decode import Rollout, generate, join, replay, take, token_logprobs
from model import best_attention, load
from rewards import pick, score


@dataclasses.dataclass
class Config(DataConfig):
    # where to start: a model's folder or a run's folder; also the KL's reference
    model: str = "runs/sft"
    data: str = ""  # records with answers, see data.py; chains and future frames are not needed
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
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
    max_latents: int = 8  # longest span: 2 * l_max  # official
    # decode what rollouts of a prompt have in common once; for sure policies, short answers  # ours
    share: bool = False
    # rewards
    lambda_c: float = 0.2  # weight of R_ctr, Eq. (7)  # paper Table 9
    lambda_d: float = 0.1  # weight of R_div, Eq. (7)  # paper Table 9
    tau: float = 0.5  # temperature of Eq. (5)  # paper Table 9
    # OpenAI-compatible server that judges open answers; key: JUDGE_API_KEY  # paper sec. 3.3
    judge_url: str = ""
    judge_model: str = ""  # its model's name; "" = no judge
    # objective

    # DAPO: only groups whose mean accuracy lies between low and high; --no-filter: all groups;
    # token mean, clip-higher and dual clip stay  # paper
    filter: bool = True
    low: float = 0.1  # paper Table 9
    high: float = 0.9  # paper Table 9
    eps_low: float = 0.2  # paper Table 9
    eps_high: float = 0.28  # paper Table 9
    dual_clip: float = 3.0  # c, bounds the loss where A < 0  # official
    kl: float = 0.01  # beta, weight of the KL to the starting model  # paper Table 9
    # gradient through the latents: 0 none (paper), k truncated, -1 exact  # ours
    adjoint_terms: int = 0
    latent_sigma: float = 0.0  # Gaussian exploration on latents; 0 = paper  # ours
    # optimisation
    steps: int = 0  # 0 = from epochs  # ours
    epochs: float = 1.0  # passes over the prompts  # paper Table 9
    minibatches: int = 1  # updates a pass over the kept groups  # ours
    inner_epochs: int = 1  # passes over them  # ours
    micro_batch: int = 1  # groups a forward on one rank  # ours
    lr: float = 1e-6  # paper Table 9
    warmup_steps: int = 0  # linear  # ours
    # share of lr at the last of `steps`, reached linearly; 1 = constant  # ours
    final_lr: float = 1.0
    beta1: float = 0.9  # AdamW's default
    beta2: float = 0.999  # AdamW's default
    weight_decay: float = 0.0  # ours
    clip: float = 1.0  # gradient norm  # paper Table 9
    freeze_vision: bool = True  # vision tower and merger  # as in SFT
    # machine
    bf16: bool = True  # on CUDA; the CPU computes in fp32  # paper Table 8
    zero: bool = False  # optimizer state spread over the ranks  # ours
    save_every: int = 10  # steps between checkpoints; the last two are kept  # ours
    sample_every: int = 10  # steps between whole rollouts written to rollouts_*.jsonl  # ours
    wandb: bool = False  # also log to Weights & Biases  # ours

    def __post_init__(self):
        super().__post_init__()
        for name, least in dict(
            groups=1,
            max_tries=1,
            rollout_batch=1,
            minibatches=1,
            inner_epochs=1,
            sample_every=1,
            prompts=0,
            steps=0,
        ).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if self.group_size < 2:
            raise ValueError(
                f"group_size is {self.group_size}: an advantage compares at least 2 rollouts"
            )
        if self.temperature <= 0 or self.tau <= 0:
            raise ValueError(
                f"temperature {self.temperature} or tau {self.tau} is not positive (a greedy "
                "group has nothing "
                "to compare)"
            )
        if self.judge_url and not self.judge_model:
            raise ValueError("judge_url needs judge_model, the name of a model there")
        if self.adjoint_terms < -1 or self.latent_sigma < 0:
            raise ValueError(
                f"adjoint_terms {self.adjoint_terms} or latent_sigma {self.latent_sigma} is out "
                "of range"
            )
        if self.adjoint_terms and self.latent_sigma:
            raise ValueError(
                "adjoint_terms is the gradient through deterministic latents: with latent_sigma "
                "the "
                "log-density already carries it"
            )

    @property
    def prompts_a_try(self):
        return self.prompts or self.groups


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
    """DAPO's filter on one group -> "kept", "too hard", "too easy" or "unjudged" (fewer than two
    verdicts). Sec. 3.3.

    Kept iff low < mean accuracy < high. A repetitive rollout counts as wrong.
    """
    known = [c for c, u in zip(correct, unjudged) if not u]
    if len(known) < 2:
        return "unjudged"
    mean = sum(known) / len(known)
    return "too hard" if mean <= low else "too easy" if mean >= high else "kept"


def clipped_surrogate(logp, old, A, eps_low=0.2, eps_high=0.28, dual_clip=3.0):
    """max(-r A, -clip(r, 1 - eps_low, 1 + eps_high) A), where A < 0 at most -dual_clip A.

    Source: sec. 3.3 (DAPO).

    logp, old, A: same shape or broadcast -> loss a token, ratio r.
    """
    r = (logp - old).exp()
    loss = torch.maximum(-r * A, -r.clamp(1 - eps_low, 1 + eps_high) * A)
    return torch.where(A < 0, torch.minimum(loss, -dual_clip * A), loss), r


def kl_k3(logp, ref):
    """KL(pi, ref) a token, estimated by exp(d) - d - 1 with d = ref - logp: never negative.

    Source: sec. 3.3 (GRPO).
    """
    d = ref - logp
    return d.exp() - d - 1


def adjoint_loss(loss, predicted, latents, terms):
    """A term of value 0 whose gradient is the part of dloss/dweights that flows through the
    latents. Source: ours.

    With f(z, w) the latents predicted while z are fed, decoding makes z = f(z, w), so dz/dw = (1 -
    J)^-1 df/dw with J = df/dz, and

        dloss/dw = (partial, z held constant) + g (1 - J)^-1 df/dw,    g = dloss/dz.

    A latent depends on earlier ones only: J is strictly lower triangular, and lam = g (1 - J)^-1 =
    g + gJ + gJJ + ... ends after as many terms as the longest response has latents. No Jacobian is
    formed: each term is a vector-Jacobian product. loss: scalar; predicted (N, D) = f; latents (N,
    D), the leaf z; terms: how many of the series. Keeps the graph.
    """
    lam = term = torch.autograd.grad(loss, latents, retain_graph=True)[0]  # (N, D) g
    for _ in range(terms - 1):
        term = torch.autograd.grad(predicted, latents, term, retain_graph=True)[0]  # (N, D) gJ^k
        lam = lam + term
    return (lam.detach() * (predicted - predicted.detach())).sum()


def learning_rate(step, config):
    """Linear warm-up, then linear to final_lr * lr at the last of `steps`.

    Without `steps` constant. Source: ours.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if not config.steps:
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps - 1)
    return config.lr * (1 + (config.final_lr - 1) * min(1.0, done))


@dataclasses.dataclass
class Group:
    """One prompt and what its G rollouts came to, on the rank that made them."""

    place: int  # of the prompt in the order of the data
    sample: dict  # the encoded prompt
    rollout: Rollout  # G rows
    texts: list
    parts: dict  # of `score_group`
    verdict: str  # of `keep_group`
    slot: int = 0  # its number among the groups of the step, over all ranks


@functools.lru_cache(maxsize=2)
def permutation(n, seed, epoch):
    """The order of n rows in an epoch. Source: ours."""
    return torch.randperm(
        n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    ).tolist()


def prompt_batches(n, size, first, last, total, seed, rank, world):
    """Indices of the prompts that one rank decodes together, from batch `first` on.

    Batch b is rank b % world's.

    Batch b holds places b * size ... of the endless order of epochs, whatever the number of ranks;
    places end at total.
    """
    b = first
    while b < last:
        if b % world == rank:
            yield [
                permutation(n, seed, p // n)[p % n]
                for p in range(b * size, min((b + 1) * size, total))
            ]
        b += 1


CURVES = (("total", "accuracy"), ("contrastive", "diversity"), ("entropy", "kl"), ("grad_norm",))


PARTS = ("total", "accuracy", "format", "contrastive", "diversity", "repetition")


COUNTS = (
    "rollouts",
    "tokens",
    "spans",
    "latents",
    "forced",
    "cut_off",
    "unjudged",
    "kept",
    "too easy",
    "too hard",
    "unjudged groups",
    "surplus",
    "skipped",
)


def count(stats, rollout, groups, latent_start_id):
    """Add a batch's figures to stats, a dict of sums."""
    steps = (
        torch.arange(rollout.tokens.shape[1], device=rollout.tokens.device)
        < rollout.lengths[:, None]
    )
    for key, value in (
        ("rollouts", len(rollout.tokens)),
        ("tokens", int(rollout.lengths.sum())),
        ("spans", int((rollout.tokens == latent_start_id).sum())),
        ("latents", sum(len(z) for z in rollout.latents)),
        ("forced", int((steps & ~rollout.sampled).sum())),
        ("cut_off", rollout.finish.count("length")),
    ):
        stats[key] += value
    for group in groups:
        stats["unjudged groups" if group.verdict == "unjudged" else group.verdict] += 1
        stats["unjudged"] += sum(group.parts["unjudged"])
        for part in PARTS:
            known = [v for v in group.parts[part] if v is not None]
            stats[part] += sum(known)
            stats[part + "^2"] += sum(v * v for v in known)


def distinct(group, config):
    """A group's judged rows, equal ones together: lists of rows.

    Equal words have equal latents unless noise was added.

    Equal words with different rewards (a judge may waver) stay apart; unjudged rows are left out.
    """
    rows = {}
    for i, (tokens, n) in enumerate(
        zip(group.rollout.tokens.tolist(), group.rollout.lengths.tolist())
    ):
        if not group.parts["unjudged"][i]:
            rows.setdefault(
                i if config.latent_sigma else (*tokens[:n], round(group.parts["total"][i], 4)), []
            ).append(i)
    return list(rows.values())


def prepare(groups, pad, device, config):
    """Groups -> (prompts, rollout, prompt_of (R,), advantages (R, 1), times (R, 1)): what one
    forward takes. Ours.

    The prompts, with their pixels, stay in the host's memory until it is their turn.
    """
    batch = model_inputs(collate([g.sample for g in groups], pad, side="left"))
    picked = [distinct(g, config) for g in groups]
    prompt_of = torch.tensor([k for k, same in enumerate(picked) for _ in same], device=device)
    A = torch.stack(
        [
            group_advantages(g.parts["total"])[rows].mean()
            for g, same in zip(groups, picked)
            for rows in same
        ]
    )
    times = torch.tensor([len(rows) for same in picked for rows in same], device=device)
    rollout = join([take(g.rollout, [rows[0] for rows in same]) for g, same in zip(groups, picked)])
    return batch, rollout, prompt_of, A[:, None].to(device), times[:, None]


def policy_loss(model, prepared, ref, n_tokens, config, stats):
    """One micro-batch's share of the step's loss; adds its figures to stats.

    Source: the docstring's L.

    ref: (R, T) log-probabilities of the reference, or None; n_tokens: chosen tokens of the step,
    over all ranks.
    """
    batch, rollout, prompt_of, A, times = prepared
    new = replay(model, to_device(batch, A.device), rollout, config.temperature, prompt_of)
    weight = rollout.sampled * times / n_tokens  # (R, T)
    old = rollout.logprobs
    surrogate, r = clipped_surrogate(
        new.logprobs, old, A, config.eps_low, config.eps_high, config.dual_clip
    )
    loss = (surrogate * weight).sum()
    kl = kl_k3(new.logprobs, ref) if ref is not None else torch.zeros_like(surrogate)
    total = loss + config.kl * (kl * weight).sum()
    longest = max(len(z) for z in rollout.latents)
    terms = longest if config.adjoint_terms < 0 else min(config.adjoint_terms, longest)
    if terms:
        total = total + adjoint_loss(loss, new.predicted, new.latents, terms)
    with torch.no_grad():
        clipped = ((r > 1 + config.eps_high) & (A > 0)) | ((r < 1 - config.eps_low) & (A < 0))
        for key, value in (
            ("loss", surrogate),
            ("ratio", r),
            ("clipped", clipped),
            ("kl", kl),
            ("entropy", new.entropy),
        ):
            stats[key] += (value * weight).sum().item()
        stats["ratio_max"] = max(
            stats["ratio_max"], r.masked_fill(~rollout.sampled, 0).max().item()
        )
    return total


def update(model, optimizer, trained, groups, ref_model, lr, config, pad, device, autocast, world):
    """All updates of a step from this rank's kept groups (may be none) -> dict of figures, the
    same on all ranks.
    """
    stats = dict.fromkeys(("loss", "ratio", "clipped", "kl", "entropy", "ratio_max"), 0.0)
    norms, skipped = [], 0
    # one entry a minibatch: its prepared micro-batches with the reference's log-probabilities
    todo = []
    for k in range(config.minibatches):
        mine = [g for g in groups if g.slot % config.minibatches == k]
        prepared = [
            prepare(mine[i : i + config.micro_batch], pad, device, config)
            for i in range(0, len(mine), config.micro_batch)
        ]
        refs = [None] * len(prepared)
        if ref_model is not None:
            with torch.no_grad(), autocast():
                refs = [
                    token_logprobs(
                        ref_model, to_device(p[0], device), p[1], config.temperature, p[2]
                    )
                    for p in prepared
                ]
        n_tokens = sum(int((p[1].sampled * p[4]).sum()) for p in prepared)
        todo.append((prepared, refs, sum_over_ranks([n_tokens], device)[0]))
    updates = 0
    for _ in range(config.inner_epochs):
        for prepared, refs, n_tokens in todo:
            if n_tokens == 0:  # fewer groups than minibatches
                continue
            for p, ref in zip(prepared, refs):
                with autocast():
                    loss = policy_loss(model, p, ref, n_tokens, config, stats)
                loss.backward()
            for p in trained:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # on every rank alike
                if world > 1:  # a sum: the loss was divided by the tokens of all ranks
                    dist.all_reduce(p.grad)
            norm = torch.nn.utils.clip_grad_norm_(trained, config.clip).item()
            for group in optimizer.param_groups:
                group["lr"] = lr
            if math.isfinite(
                norm
            ):  # the norm is that of the summed gradient: all ranks decide alike
                optimizer.step()
            skipped += not math.isfinite(norm)
            optimizer.zero_grad(set_to_none=True)
            norms.append(norm)
            updates += 1
    (*means,) = sum_over_ranks(
        [stats[k] / max(1, updates) for k in ("loss", "ratio", "clipped", "kl", "entropy")], device
    )
    ratio_max = torch.tensor(stats["ratio_max"], dtype=torch.float64, device=device)
    if world > 1:
        dist.all_reduce(ratio_max, dist.ReduceOp.MAX)
    if not updates:
        means = [None] * 5
    return dict(
        zip(("loss", "ratio", "clip_fraction", "kl", "entropy"), means),
        ratio_max=ratio_max.item(),
        grad_norm=norms[-1] if norms else None,
        updates=updates,
        updates_skipped=skipped,
    )


def collect(
    model,
    tokenizer,
    batches,
    first,
    last,
    config,
    judge,
    pad,
    device,
    autocast,
    rank,
    world,
    seconds,
):
    """Roll out prompts until `groups` groups are kept, or max_tries times, or the data ends.

    All ranks walk in step.

    -> this rank's kept groups, all its groups, stats of this rank, skipped samples, the next batch
    of the data.
    """
    stats = dict.fromkeys((*COUNTS, *PARTS, *(part + "^2" for part in PARTS)), 0.0)
    every, skipped, b = [], [], first
    weights = dict(lambda_c=config.lambda_c, lambda_d=config.lambda_d, tau=config.tau)
    per_try = -(-config.prompts_a_try // config.rollout_batch)
    for _ in range(config.max_tries):
        stop = min(b + per_try, last)
        for k in range(b, stop):
            if k % world != rank:
                continue
            began, batch = time.time(), next(batches)
            skipped += batch["skipped"]
            if not batch["rows"]:
                continue
            with autocast():
                rollout = generate(
                    model,
                    model_inputs(to_device(batch, device)),
                    n=config.group_size,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    max_new_tokens=config.max_new_tokens,
                    max_latents=config.max_latents,
                    latent_sigma=config.latent_sigma,
                    share=config.share,
                    generator=torch.Generator().manual_seed(config.seed * 1_000_003 + k),
                )
            texts = tokenizer.batch_decode(
                [t[:n] for t, n in zip(rollout.tokens.cpu(), rollout.lengths)]
            )
            seconds["rollout"] += time.time() - began
            began = time.time()
            new = []
            for j, parts in enumerate(
                score(texts, rollout, batch["rows"], model.config, judge, **weights)
            ):
                rows = list(range(j * config.group_size, (j + 1) * config.group_size))
                new.append(
                    Group(
                        k * config.rollout_batch + batch["kept"][j],
                        batch["samples"][j],
                        take(rollout, rows),
                        [texts[i] for i in rows],
                        parts,
                        keep_group(parts["correct"], parts["unjudged"], config.low, config.high),
                    )
                )
            count(stats, rollout, new, model.config.latent_start_id)
            every += new
            seconds["reward"] += time.time() - began
        b = stop
        kept = [
            g
            for g in every
            if g.verdict == "kept" or (not config.filter and g.verdict != "unjudged")
        ]
        places = [g.place for g in kept]
        if world > 1:
            gathered = [None] * world
            dist.all_gather_object(gathered, places)
            places = sum(gathered, [])
        places = sorted(places)
        if len(places) >= config.groups or b >= last:
            break
    slots = {
        place: slot for slot, place in enumerate(places[: config.groups])
    }  # the first in the order of the data
    stats["surplus"] += sum(g.place not in slots for g in kept)
    stats["skipped"] += len(skipped)
    kept = [dataclasses.replace(g, slot=slots[g.place]) for g in kept if g.place in slots]
    return kept, every, stats, skipped, b


def train(config, rows=None):
    """Run LA-DAPO -> path of the last checkpoint.

    Raises SystemExit on a folder in use, ValueError on bad input.

    rows: list of data.Row, default those of config.data.
    """
    rank, world, device = set_up_ranks()
    master = rank == 0
    rows = rows_of(config) if rows is None else rows
    for row in rows:
        if row.options and pick(row.answer, row.options) is None:
            raise ValueError(f"{row.where}: the answer {row.answer!r} is none of {row.options}")
    checkpoint, resumed, fingerprint = resume_point(config, rows, world)
    if config.resume and not checkpoint and master:
        print(f"nothing to resume in {config.out}: starting at step 0")
    os.makedirs(config.out, exist_ok=True)

    torch.manual_seed(config.seed)
    bf16 = config.bf16 and device.type == "cuda"
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=bf16)
    kind = dict(attn_implementation=best_attention() if bf16 else "sdpa")
    model, tokenizer = load(checkpoint or newest(config.model), dtype=torch.float32, **kind)
    model.to(device).train()
    model.model.visual.requires_grad_(not config.freeze_vision)
    ref_model = None
    if config.kl:
        ref_model, _ = load(
            newest(config.model), dtype=torch.bfloat16 if bf16 else torch.float32, **kind
        )
        ref_model.to(device).eval().requires_grad_(False)
    optimizer, trained = make_optimizer(model, config, world)
    if resumed:
        restore(optimizer, checkpoint, resumed, rank)
    first, at = (resumed["step"], resumed["batch"]) if resumed else (0, 0)
    judge = Judge(config.judge_url, config.judge_model) if config.judge_model else None

    # prompts: the order is fixed by the seed, the place in it is part of the checkpoint
    total = 10**15 if config.steps else round(len(rows) * config.epochs)
    if not rows or total < 1:
        raise SystemExit(f"nothing to train on: {len(rows)} rows, {config.epochs} epochs")
    last = -(-total // config.rollout_batch)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    plan = prompt_batches(
        len(rows), config.rollout_batch, at, last, total, config.seed, rank, world
    )
    batches = iter(
        loader(
            Samples(rows, tokenizer, config, train=False),
            plan,
            config.workers,
            pad_id=pad,
            side="left",
            keep=True,
        )
    )

    log_path, rollouts_path = (
        os.path.join(config.out, name) for name in ("log.jsonl", f"rollouts_{rank}.jsonl")
    )
    trim_log(rollouts_path, first)
    run = None
    if master:
        trim_log(log_path, first)
        print(
            f"LA-DAPO: {len(rows)} prompts, {config.groups} groups x {config.group_size} rollouts "
            "a step, "
            f"{config.prompts_a_try} prompts a try, {world} ranks, {device.type}, seed "
            f"{config.seed}, "
            f"{sum(p.numel() for p in trained):,} parameters trained, "
            f"{config.minibatches * config.inner_epochs} update(s) a step"
            + (
                ": the ratio is 1 up to rounding"
                if config.minibatches * config.inner_epochs == 1
                else ""
            )
        )
        if config.wandb:
            import wandb

            run = wandb.init(project="future-l1", config=dataclasses.asdict(config))

    bar = tqdm(
        total=config.steps or None, initial=first, desc="la_dapo", disable=not master, mininterval=2
    )
    step = first
    while step < config.steps or (not config.steps and at < last):
        seconds, lr, began_at = (
            dict(rollout=0.0, reward=0.0, update=0.0),
            learning_rate(step, config),
            at,
        )
        if judge:
            judge.failures.clear()  # those of the step
        kept, every, stats, skipped, at = collect(
            model,
            tokenizer,
            batches,
            at,
            last,
            config,
            judge,
            pad,
            device,
            autocast,
            rank,
            world,
            seconds,
        )
        for where, why in skipped:
            tqdm.write(f"skipped {where}: {why}")
        stats = dict(zip(stats, sum_over_ranks(stats.values(), device)))
        failures = judge.failures if judge else Counter()
        if world > 1 and (stats["skipped"] or judge):
            everyones = [None] * world
            dist.all_gather_object(everyones, (skipped, failures))
            skipped, failures = (
                sum((s for s, _ in everyones), []),
                sum((f for _, f in everyones), Counter()),
            )
        if not stats["rollouts"] and began_at == 0:  # a wrong media_root, most likely
            raise SystemExit(
                "none of the first prompts could be used"
                + (f", e.g. {skipped[0].why}" if skipped else "")
            )
        began = time.time()
        figures = update(
            model, optimizer, trained, kept, ref_model, lr, config, pad, device, autocast, world
        )
        seconds["update"] = time.time() - began

        judged, n = max(1.0, stats["rollouts"] - stats["unjudged"]), max(1.0, stats["rollouts"])
        line = dict(
            step=step, lr=lr, prompts=[min(total, b * config.rollout_batch) for b in (began_at, at)]
        )
        for part in PARTS:
            over = judged if part in ("total", "accuracy") else n
            mean = stats[part] / over
            line[part], line[part + "_std"] = (
                mean,
                math.sqrt(max(0.0, stats[part + "^2"] / over - mean * mean)),
            )
        line.update(
            figures,
            length=stats["tokens"] / n,
            spans=stats["spans"] / n,
            latents=stats["latents"] / n,
            forced_stops=stats["forced"] / max(1.0, stats["spans"]),
            cut_off=stats["cut_off"] / n,
            **{key.replace(" ", "_"): int(stats[key]) for key in COUNTS[6:]},
            rollouts=int(stats["rollouts"]),
            groups=int(sum_over_ranks([len(kept)], device)[0]),
            skipped_names=[list(s) for s in skipped],
            judge_failures=dict(failures),
            **{f"seconds_{key}": round(value, 4) for key, value in seconds.items()},
        )
        if step % config.sample_every == 0:
            i = step // config.sample_every % config.group_size
            with open(rollouts_path, "a", encoding="utf-8") as f:
                for g in every:
                    row = g.sample["row"]
                    told = dict(
                        step=step,
                        id=row.id,
                        verdict=g.verdict,
                        question=row.question,
                        answer=row.answer,
                        response=g.texts[i],
                        group_accuracy=g.parts["accuracy"],
                        **{part: g.parts[part][i] for part in PARTS},
                    )
                    f.write(json.dumps(told, ensure_ascii=False) + "\n")
        if master:
            with open(log_path, "a") as f:
                f.write(json.dumps(line) + "\n")
            bar.set_postfix(
                reward=f"{line['total']:.3f}",
                accuracy=f"{line['accuracy']:.3f}",
                groups=line["groups"],
            )
            if not line["groups"]:
                tqdm.write(
                    f"step {step}: no group kept of {line['rollouts'] // config.group_size}, no "
                    "update"
                )
            if line["updates_skipped"]:
                tqdm.write(f"step {step}: gradient is not finite, update skipped")
            if run:
                run.log(line)
        step += 1
        bar.update()
        if (
            step % config.save_every == 0
            or step == config.steps
            or (not config.steps and at >= last)
        ):
            checkpoint = os.path.join(config.out, f"step_{step:06d}")
            save_checkpoint(
                checkpoint,
                model,
                tokenizer,
                dict(
                    step=step,
                    batch=at,
                    config=dataclasses.asdict(config),
                    world=world,
                    rows=fingerprint,
                ),
                optimizer,
                rank,
                world,
            )
            if master:
                draw_curves(log_path, os.path.join(config.out, "rewards.png"), CURVES)
    bar.close()
    return checkpoint


if __name__ == "__main__":
    print("last checkpoint:", train(parse_config(Config)))
