"""LA-DAPO: reinforcement learning on trajectories of words and latents (paper sec. 3.3).

    rollouts -> rewards -> group filter and refill -> advantages -> token-level clipped loss -> step

    A_i  = (R_i - mean R) / (std R + 1e-6)              advantage in the group of a prompt
    r_t  = exp(log pi(a_t) - log pi_old(a_t))           a_t: a word, or stop / continue in a span
    L    = 1/n sum_t max(-r_t A, -clip(r_t, 1 - eps_low, 1 + eps_high) A) + beta KL(pi, pi_SFT)
                                                        n: chosen tokens of the step

    python la_dapo.py --model runs/sft --data train.json --out runs/rl              # CPU or one GPU
    torchrun --nproc_per_node 8 la_dapo.py --model runs/sft --data train.json --out runs/rl --zero

Ablations, one flag each: --lambda_c 0, --lambda_d 0, --kl 0, --adjoint_terms -1,
--latent_sigma 0.1, and --no-filter: all groups are kept. That is not GRPO: the token mean, the
clip with its higher upper bound and the dual clip stay.

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
                       gradient. It is the mean over D, i.e. 1/D of the score function: quiet and
                       biased (model.log_density).
"Exact" is so for rewards of words. R_ctr and R_div are functions of the latents themselves; their
own path, dR/dz, is dropped here as in the paper: eight equal rollouts give no update.

With one update a step (the default) the policy has not moved: the ratio is 1 and the clip has
nothing to do. `minibatches` and `inner_epochs` change that. "Exact" then holds for the first
update; after it the recorded latents are no longer the policy's.

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
 9. With one update a step, pi_old is this forward itself, as in official; the decoder's recorded
    log-probabilities stay a check: their RMS difference is logged as `replay_rms`.
10. In the filter's mean a repetitive rollout counts 0 (official: -1).
11. Weight decay is 0 (official: 0.01).
12. The vision tower is frozen (official trains it).

Axis letters: B prompts, G rollouts of a prompt, R rows (rollouts of all prompts), P prompt tokens,
T new tokens, S chosen tokens, N latents of all rows, D hidden, V vocabulary.
"""

import dataclasses
import functools
import json
import math
import os
from collections import Counter

import torch

from common.formats import Skipped, report_bad
from common.judge import Judge
from common.report import draw_curves
from common.runs import (
    Log,
    Machine,
    Tally,
    leave,
    make_optimizer,
    newest,
    parse_config,
    restore,
    resume_point,
    rows_of,
    save_checkpoint,
    trim_log,
)
from data import DataConfig, Samples, collate, loader, model_inputs, to_device
from latent_decode import Rollout, generate, join, replay, take, token_logprobs
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
    def updates_a_step(self):
        return self.minibatches * self.inner_epochs

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

    Source: sec. 3.3 (GRPO); official clamps d to +-20 and the estimate to +-10. Where it is at a
    clamp, a token has no gradient: d is above 2.6 or below -11.
    """
    d = (ref - logp).clamp(-20, 20)
    return (d.exp() - d - 1).clamp(-10, 10)


def adjoint_loss(loss, predicted, latents, terms):
    """A term of value 0 whose gradient is the part of dloss/dweights that flows through the
    latents. Source: ours.

    With f(z, w) the latents predicted while z are fed, decoding makes z = f(z, w), so dz/dw = (1 -
    J)^-1 df/dw with J = df/dz, and

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


def schedule(step, steps, config):
    """Linear warm-up, then linear to final_lr * lr at the last of `steps`. Source: ours."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps - 1)
    return config.lr * (1 + (config.final_lr - 1) * min(1.0, share))


# ----------------------------------------------------------------------------------------- rollouts


@dataclasses.dataclass
class Policy:
    """What a run trains, what it is compared with, and how far the run is."""

    model: torch.nn.Module
    tokenizer: object
    ref_model: torch.nn.Module | None  # the KL's reference
    optimizer: torch.optim.Optimizer
    trained_on: str  # fingerprint of the rows
    checkpoint: str | None = None  # the last one
    step: int = 0  # the next
    batch: int = 0  # of the data, the next


@dataclasses.dataclass
class Group:
    """One prompt and its G rollouts, on the rank that made them."""

    place: int  # of the prompt in the order of the data
    sample: dict  # the encoded prompt
    rollout: Rollout  # G rows
    texts: list  # G responses
    parts: dict = None  # of `rewards.score_group`
    verdict: str = ""  # of `keep_group`
    slot: int = 0  # its number among the groups of the step, over all ranks

    @property
    def rewards(self):
        """{name: G values}: the reward and its parts, whatever `rewards.score_group` gives."""
        return {k: v for k, v in self.parts.items() if k not in ("correct", "unjudged")}


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


def roll_out(model, tokenizer, batch, k, config, machine):
    """Batch k of the prompts -> a Group each, not scored yet. What is sampled depends on seed and
    k.
    """
    inputs = model_inputs(to_device(batch, machine.device))
    with machine.autocast():
        rollout = generate(
            model,
            inputs,
            n=config.group_size,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_new_tokens,
            max_latents=config.max_latents,
            share=config.share,
            generator=torch.Generator().manual_seed(config.seed * 1_000_003 + k),
        )
    tokens = [row[:n] for row, n in zip(rollout.tokens.cpu(), rollout.lengths)]
    texts = tokenizer.batch_decode(tokens)
    groups = []
    for j, sample in enumerate(batch["samples"]):
        rows = list(range(j * config.group_size, (j + 1) * config.group_size))
        place = k * config.rollout_batch + batch["kept"][j]
        groups.append(Group(place, sample, take(rollout, rows), [texts[i] for i in rows]))
    return groups


def score_groups(groups, model_config, judge, config):
    """Eq. (7) for each group, and the filter's verdict on it. The judge is asked once for all."""
    texts = [text for group in groups for text in group.texts]
    rows = [group.sample["row"] for group in groups]
    rollout = join([group.rollout for group in groups])
    weights = dict(lambda_c=config.lambda_c, lambda_d=config.lambda_d, tau=config.tau)
    for group, parts in zip(groups, score(texts, rollout, rows, model_config, judge, **weights)):
        group.parts = parts
        group.verdict = keep_group(parts["correct"], parts["unjudged"], config.low, config.high)


def first_kept(groups, config, machine):
    """The kept groups of all ranks, the first `config.groups` in the order of the data.

    -> this rank's, with their slots; how many were kept on all ranks; how many of this rank's were
    not needed.
    """
    kept = [g for g in groups if g.verdict == "kept"]
    if not config.filter:
        kept = [g for g in groups if g.verdict != "unjudged"]
    places = sorted(machine.gather([g.place for g in kept]))
    slots = {place: slot for slot, place in enumerate(places[: config.groups])}
    needed = [g for g in kept if g.place in slots]
    for group in needed:
        group.slot = slots[group.place]
    return needed, len(places), len(kept) - len(needed)


# in every line of the log, also of a step without a rollout; a reward that is new joins by itself
REWARDS = ("total", "accuracy", "format", "contrastive", "diversity", "repetition")
VERDICTS = ("kept", "too easy", "too hard", "unjudged groups")
COUNTS = ("rollouts", "unjudged", *VERDICTS, "surplus", "groups", "skipped")
CURVES = (("total", "accuracy"), ("contrastive", "diversity"), ("entropy", "kl"), ("grad_norm",))


def count(tally, group, latent_start_id):
    """Add a group's figures to the tally."""
    rollout = group.rollout
    tokens, lengths = rollout.tokens, rollout.lengths
    steps = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    tally.count("rollouts", len(tokens))
    tally.count("tokens", int(lengths.sum()))
    tally.count("spans", int((tokens == latent_start_id).sum()))
    tally.count("latents", sum(len(z) for z in rollout.latents))
    tally.count("forced", int((steps & ~rollout.sampled).sum()))
    tally.count("cut_off", rollout.finish.count("length"))
    tally.count("unjudged groups" if group.verdict == "unjudged" else group.verdict)
    tally.count("unjudged", sum(group.parts["unjudged"]))
    for name, values in group.rewards.items():
        tally.add(name, values)


def collect(policy, batches, config, judge, machine, tally):
    """Roll out prompts until `groups` groups are kept, or max_tries times; moves policy.batch on.

    All ranks walk in step. -> this rank's kept groups, all its groups, its skipped samples.
    """
    model, every, skipped = policy.model, [], []
    for _ in range(config.max_tries):
        end = policy.batch + -(-config.prompts_a_try // config.rollout_batch)
        for k in range(policy.batch, end):
            if k % machine.world != machine.rank:
                continue
            with tally.clock("rollout"):
                batch = next(batches)
                skipped += batch["skipped"]
                groups = []
                if batch["rows"]:
                    groups = roll_out(model, policy.tokenizer, batch, k, config, machine)
            with tally.clock("reward"):
                if groups:
                    score_groups(groups, model.config, judge, config)
                for group in groups:
                    count(tally, group, model.config.latent_start_id)
            every += groups
        policy.batch = end
        kept, n_kept, surplus = first_kept(every, config, machine)
        if n_kept >= config.groups:
            break
    tally.count("groups", len(kept))
    tally.count("surplus", surplus)
    tally.count("skipped", len(skipped))
    return kept, every, skipped


# ------------------------------------------------------------------------------------------- update


@dataclasses.dataclass
class Batch:
    """What one forward of the update takes: R rows of a few groups, equal rollouts merged."""

    prompts: dict  # with their pixels, in the host's memory until it is their turn
    rollout: Rollout
    prompt_of: torch.Tensor  # (R,) which prompt
    A: torch.Tensor  # (R, 1) advantages
    times: torch.Tensor  # (R, 1) how many rollouts a row stands for
    ref: torch.Tensor | None = None  # (R, T) log-probabilities of the reference

    @property
    def weight(self):
        """(R, T): how often each chosen token counts."""
        return self.rollout.sampled * self.times


def distinct(group, config):
    """A group's judged rows, equal ones together: lists of rows. Equal words have equal latents.

    (Unless noise was added.) Equal words with different rewards (a judge may waver) stay apart;
    unjudged rows are left out.
    """
    rows = {}
    lengths = group.rollout.lengths.tolist()
    for i, (tokens, n) in enumerate(zip(group.rollout.tokens.tolist(), lengths)):
        if group.parts["unjudged"][i]:
            continue
        key = i if config.latent_sigma else (*tokens[:n], round(group.parts["total"][i], 4))
        rows.setdefault(key, []).append(i)
    return list(rows.values())


def prepare(groups, device, config):
    """Groups -> Batch, with the advantages. Source: ours."""
    prompts = model_inputs(collate([g.sample for g in groups], 0, side="left"))  # pads are masked
    prompt_of, A, times, rollouts = [], [], [], []
    for k, group in enumerate(groups):
        advantages = group_advantages(group.parts["total"])
        picked = distinct(group, config)
        prompt_of += [k] * len(picked)
        A += [advantages[rows].mean() for rows in picked]
        times += [len(rows) for rows in picked]
        rollouts.append(take(group.rollout, [rows[0] for rows in picked]))
    prompt_of, times = (torch.tensor(x, device=device) for x in (prompt_of, times))
    A = torch.stack(A).to(device)
    return Batch(prompts, join(rollouts), prompt_of, A[:, None], times[:, None])


def policy_loss(model, batch, n_tokens, config, figures):
    """A batch's share of the step's loss; adds to `figures`. Source: the docstring's L.

    n_tokens: chosen tokens of the step, over all ranks.
    """
    prompts = to_device(batch.prompts, batch.A.device)
    new = replay(model, prompts, batch.rollout, config.temperature, batch.prompt_of)
    weight = batch.weight / n_tokens  # (R, T)
    # with one update a step the policy has not moved: what differs is only the decoder's kernels
    recorded = batch.rollout.logprobs
    old = new.logprobs.detach() if config.updates_a_step == 1 else recorded
    surrogate, r = clipped_surrogate(
        new.logprobs, old, batch.A, config.eps_low, config.eps_high, config.dual_clip
    )
    loss = (surrogate * weight).sum()
    kl = torch.zeros_like(surrogate) if batch.ref is None else kl_k3(new.logprobs, batch.ref)
    total = loss + config.kl * (kl * weight).sum()

    # the part of the gradient that flows through the latents
    longest = max(len(z) for z in batch.rollout.latents)
    terms = longest if config.adjoint_terms < 0 else min(config.adjoint_terms, longest)
    if terms:
        total = total + adjoint_loss(loss, new.predicted, new.latents, terms)

    with torch.no_grad():
        too_high = (r > 1 + config.eps_high) & (batch.A > 0)
        too_low = (r < 1 - config.eps_low) & (batch.A < 0)
        values = dict(loss=surrogate, ratio=r, clip_fraction=too_high | too_low, kl=kl)
        values.update(entropy=new.entropy, replay_ms=(new.logprobs - recorded).square())
        for name, value in values.items():
            figures[name] += (value * weight).sum().item()
        largest = r.masked_fill(~batch.rollout.sampled, 0).max().item()
        figures["ratio_max"] = max(figures["ratio_max"], largest)
    return total


def minibatch(groups, ref_model, config, machine):
    """One minibatch's groups on this rank -> its batches, and its chosen tokens over all ranks."""
    batches = []
    for i in range(0, len(groups), config.micro_batch):
        batch = prepare(groups[i : i + config.micro_batch], machine.device, config)
        if ref_model is not None:
            prompts = to_device(batch.prompts, machine.device)
            with torch.no_grad(), machine.autocast():
                batch.ref = token_logprobs(
                    ref_model, prompts, batch.rollout, config.temperature, batch.prompt_of
                )
        batches.append(batch)
    n_tokens = sum(int(batch.weight.sum()) for batch in batches)
    return batches, machine.sum([n_tokens])[0]


def update(policy, groups, lr, config, machine):
    """All updates of a step from this rank's kept groups (may be none) -> figures, on all ranks
    alike.
    """
    # advantages, and the reference's log-probabilities
    minibatches = []
    for k in range(config.minibatches):
        part = [group for group in groups if group.slot % config.minibatches == k]
        minibatches.append(minibatch(part, policy.ref_model, config, machine))

    # clipped loss -> step
    figures, norms = Counter(), []
    for _ in range(config.inner_epochs):
        for batches, n_tokens in minibatches:
            if n_tokens == 0:  # fewer groups than minibatches
                continue
            for batch in batches:
                with machine.autocast():
                    loss = policy_loss(policy.model, batch, n_tokens, config, figures)
                loss.backward()
            norms.append(machine.step(policy.optimizer, lr, config.clip))
    return update_figures(figures, norms, machine)


def update_figures(figures, norms, machine):
    """This rank's sums and the gradient norm of each update -> the step's figures, on all ranks
    alike. None where there was no update.
    """
    names = ("loss", "ratio", "clip_fraction", "kl", "entropy", "replay_ms")
    sums = machine.sum([figures[name] / max(1, len(norms)) for name in names])
    means = dict(zip(names, sums if norms else [None] * len(names)))
    mean_square = means.pop("replay_ms")
    return dict(
        means,
        replay_rms=None if mean_square is None else math.sqrt(mean_square),
        ratio_max=max(machine.gather([float(figures["ratio_max"])])),
        grad_norm=norms[-1] if norms else None,
        updates=len(norms),
        updates_skipped=sum(not math.isfinite(norm) for norm in norms),
    )


# --------------------------------------------------------------------------------------------- loop


def start(config, rows, machine):
    """The policy as the run's newest checkpoint or else `config.model` holds it -> Policy.

    Raises SystemExit as `resume_point` does.
    """
    checkpoint, resumed, trained_on = resume_point(config, rows, machine.world)
    os.makedirs(config.out, exist_ok=True)
    torch.manual_seed(config.seed)
    model, tokenizer = machine.load(checkpoint or newest(config.model), train=True)
    model.model.visual.requires_grad_(not config.freeze_vision)
    ref_model = None
    if config.kl:
        ref_model, _ = machine.load(newest(config.model))
        ref_model.requires_grad_(False)
    optimizer, _ = make_optimizer(model, config, machine.world)
    policy = Policy(model, tokenizer, ref_model, optimizer, trained_on, checkpoint)
    if resumed:
        restore(optimizer, checkpoint, resumed, machine.rank)
        policy.step, policy.batch = resumed["step"], resumed["batch"]
    return policy


def save(policy, config, machine):
    """All ranks: write the run's checkpoint before policy.step; the first one draws the curves."""
    policy.checkpoint = os.path.join(config.out, f"step_{policy.step:06d}")
    state = dict(step=policy.step, batch=policy.batch, config=dataclasses.asdict(config))
    state.update(world=machine.world, rows=policy.trained_on)
    model, tokenizer = policy.model, policy.tokenizer
    save_checkpoint(policy.checkpoint, model, tokenizer, state, policy.optimizer, machine)
    if machine.master:
        log, picture = (os.path.join(config.out, name) for name in ("log.jsonl", "rewards.png"))
        draw_curves(log, picture, CURVES)


def prompt_loader(rows, tokenizer, at, config, machine):
    """This rank's batches of encoded prompts, from batch `at` of the data on."""
    rank, world = machine.rank, machine.world
    plan = prompt_batches(len(rows), config.rollout_batch, at, config.seed, rank, world)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    samples = Samples(rows, tokenizer, config, train=False)
    return iter(loader(samples, plan, config.workers, pad_id=pad, side="left"))


def check_readable(step, tally, skipped):
    """Raises SystemExit if the first step rolled nothing out: a wrong media_root, most likely."""
    if step == 0 and not tally["rollouts"]:
        why = f", e.g. {skipped[0].why}" if skipped else ""
        raise SystemExit(f"none of the first prompts could be used{why}")


def log_line(tally, skipped, failures):
    """What all ranks tallied in a step, the samples they skipped and the judge's failures -> the
    figures of its line in log.jsonl.
    """
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


def write_rollouts(path, step, groups, config):
    """Append one whole rollout of each group, another one of the group each time."""
    i = step // config.sample_every % config.group_size
    with open(path, "a", encoding="utf-8") as f:
        for group in groups:
            row = group.sample["row"]
            line = dict(
                step=step,
                id=row.id,
                verdict=group.verdict,
                question=row.question,
                answer=row.answer,
                response=group.texts[i],
                group_accuracy=group.parts["accuracy"],
                **{name: values[i] for name, values in group.rewards.items()},
            )
            f.write(json.dumps(line, ensure_ascii=False) + "\n")


def usable(rows, config):
    """The rows whose answers can be rewarded; the others are counted, named and left out.

    Raises SystemExit if they are more than the share max_bad.
    """
    bad = [row for row in rows if row.options and pick(row.answer, row.options) is None]
    reasons = [Skipped(r.where, f"the answer {r.answer!r} is none of {r.options}") for r in bad]
    if bad:
        report_bad(reasons, len(rows), config.max_bad)
    gone = {row.where for row in bad}
    return [row for row in rows if row.where not in gone]


def count_steps(rows, config):
    """Updates of the run: one epoch is N // groups; refills cost passes, not updates."""
    prompts = int(len(rows) * config.epochs)
    if not rows or (prompts < 1 and not config.steps):
        raise SystemExit(f"nothing to train on: {len(rows)} rows, {config.epochs} epochs")
    return config.steps or max(1, prompts // config.groups)


def train(config, rows=None):
    """Run LA-DAPO on rows (a list of Row, default those of config.data) -> the last checkpoint.

    Raises SystemExit on a folder in use, ValueError on bad input.
    """
    machine = Machine(config.bf16)
    rows = usable(rows_of(config) if rows is None else rows, config)
    steps = count_steps(rows, config)
    policy = start(config, rows, machine)
    batches = prompt_loader(rows, policy.tokenizer, policy.batch, config, machine)
    judge = Judge(config.judge_url, config.judge_model) if config.judge_model else None
    log = Log(config, policy.step, machine)
    rollouts_path = os.path.join(config.out, f"rollouts_{machine.rank}.jsonl")
    trim_log(rollouts_path, policy.step)
    log.say(describe(config, rows, policy.model, steps, machine))

    for step in log.steps(steps, "la_dapo"):
        # rollouts -> rewards -> group filter and refill
        tally, began_at = Tally(), policy.batch
        kept, every, skipped = collect(policy, batches, config, judge, machine, tally)
        skipped, failures = log.skips(skipped, judge)

        # advantages -> clipped loss -> step
        lr = schedule(step, steps, config)
        with tally.clock("update"):
            figures = update(policy, kept, lr, config, machine)
        policy.step = step + 1

        # sums over all ranks -> log, rollouts, checkpoint
        tally = tally.over(machine)
        check_readable(step, tally, skipped)
        places = [b * config.rollout_batch for b in (began_at, policy.batch)]
        line = dict(step=step, lr=lr, prompts=places, **figures)
        line.update(log_line(tally, skipped, failures))
        if step % config.sample_every == 0:
            write_rollouts(rollouts_path, step, every, config)
        log.write(line, reward=line["total"], accuracy=line["accuracy"], groups=line["groups"])
        if policy.step % config.save_every == 0 or policy.step == steps:
            save(policy, config, machine)
    return policy.checkpoint


def describe(config, rows, model, steps, machine):
    """The run in one line."""
    same = ": the ratio is 1" if config.updates_a_step == 1 else ""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"LA-DAPO: {len(rows)} prompts, {steps} steps of {config.groups} groups x "
        f"{config.group_size} rollouts, {config.prompts_a_try} prompts a try, "
        f"{machine.world} ranks, {machine.device.type}, seed {config.seed}, "
        f"{trained:,} parameters trained, "
        f"{config.updates_a_step} update(s) a step{same}"
    )


if __name__ == "__main__":
    print("last checkpoint:", train(parse_config(Config)))
    leave()
