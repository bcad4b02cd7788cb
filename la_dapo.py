"""LA-DAPO: reinforcement learning on trajectories of words and latents (paper sec. 3.3).

    rollouts -> rewards -> group filter and refill -> advantages -> token-level clipped loss -> step

    A_i  = (R_i - mean R) / (std R + 1e-6)              advantage in the group of a prompt
    r_t  = exp(log pi(a_t) - log pi_old(a_t))           a_t: a word, or stop / continue in a span
    L    = 1/n sum_t max(-r_t A, -clip(r_t, 1 - eps_low, 1 + eps_high) A) + beta KL(pi, pi_SFT)
                                                        n: chosen tokens of the step

    python la_dapo.py --model runs/sft --data train.json --out runs/rl              # CPU or one GPU
    torchrun --nproc_per_node 8 la_dapo.py --model runs/sft --data train.json --out runs/rl --shard

Ablations, one flag each: --lambda_c 0, --lambda_d 0, --kl 0, --adjoint_terms -1, --no-filter. The
last keeps all groups and is not GRPO: token mean, clip-higher and dual clip stay.
Variants: variants/noisy_latents.py samples latents, variants/own_path.py adds dR/dz.

Which path carries which gradient. The log-probability of an answer depends on the weights twice: at
each chosen token, and through the latents, which are a function of the weights themselves and are
read by everything after them.
  adjoint_terms = 0    recorded latents are constants (the paper and its kin): the second path is
                       dropped.
  adjoint_terms = k    k vector-Jacobian products bring the second path back; as many as a response
                       has latents are exact (-1). Each costs about half a backward pass over the
                       response, not over the prompt, and no memory beyond the graph that is kept
                       until the last of them.
"Exact" is so for rewards of words. R_ctr and R_div are functions of the latents themselves; their
own path, dR/dz, is dropped here as in the paper: eight equal rollouts give no update.

With one update a step (the default) the policy has not moved: the ratio is 1 and the clip has
nothing to do. `minibatches` and `inner_epochs` change that. "Exact" then holds for the first
update; after it the recorded latents are no longer the policy's.

Memory: a group's prompt is there once (common/shared_prefix.py); `gradient_checkpointing` keeps
only the layers' inputs. `shard` spreads weights, reference and optimizer over the ranks
(common/shard.py): an 8B then fits cards of 80 GB, by formula (docs/scale.md). Rollouts are made
with a whole copy in bf16, 2 bytes a weight on each GPU, there until the update. `lora_rank` trains
small matrices beside a frozen model (common/lora.py), which is then the KL's reference too.

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
 7. Ranks add up gradients once an update, by hand: they may hold different numbers of groups, and
    wait for each other only after each try and at each update. With shard all ranks run as many
    forwards as the one with most groups; the others' last ones are of one token and weigh 0.
 8. What is sampled depends on the seed and the place in the data, not on the number of ranks.
 9. With one update a step, pi_old is this forward itself, as in official; the decoder's recorded
    log-probabilities stay a check: their RMS difference is logged as `replay_rms`.
10. In the filter's mean a repetitive rollout counts 0 (official: -1).
11. Weight decay is 0 (official: 0.01). The vision tower is frozen (official trains it).
12. Without a judge an open answer has to match exactly. How many rows are open is said at the
    start. If all are, the run ends there, unless `exact_match` says that it is meant.
13. A run that goes on compares with the folder it began with (kl), wherever `model` leads by then.

Axis letters: G rollouts of a prompt, R rows (rollouts), T new tokens, N latents, D hidden.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch

from common.checkpoint import make_optimizer
from common.cli import run_script
from common.formats import Skipped, report_bad
from common.groups import (
    CURVES,
    Group,
    Harvest,
    RolloutLog,
    check_readable,
    load_prompts,
    log_line,
    no_batch,
    prepare,
    update_figures,
)
from common.heldout import HeldOut, held_out_rows
from common.judge import judge_of, read_args
from common.lora import frozen_alone
from common.report import draw_curves
from common.rollouts import take
from common.runs import Machine, Run, check_ranks, rows_of
from common.shard import whole_copy
from data import DataConfig, at_least, model_inputs, to_device
from latent_decode import generate, own_latent, replay
from rewards import Weights, accuracy_reward, ask_judge, pick, score_group, span_lengths


@dataclasses.dataclass
class Config(DataConfig):
    model: str = "runs/sft"  # where to start: a model's or a run's folder; the KL's reference
    data: str = ""  # records with answers, see data.py; chains and future frames are not needed
    media_root: str = ""  # where relative clip paths start; "" = the folder of the data file
    eval_data: str = ""  # held-out records: answered greedily, not learnt from  # ours
    eval_every: int = 10  # steps between two looks at them; also at the last step  # ours
    eval_rows: int = 0  # only the first so many; 0 = all  # ours
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
    share: bool = False  # decode once what rollouts have in common, while they are equal  # ours
    cuda_graph: bool = False  # replay a captured decoding step; not with share  # ours
    # rewards
    lambda_c: float = 0.2  # weight of R_ctr, Eq. (7)  # paper Table 9
    lambda_d: float = 0.1  # weight of R_div, Eq. (7)  # paper Table 9
    tau: float = 0.5  # temperature of Eq. (5)  # paper Table 9
    judge_url: str = ""  # OpenAI-compatible, for open answers; key: JUDGE_API_KEY  # sec. 3.3
    judge_model: str = ""  # its model's name; "" = no judge
    judge_args: str = "{}"  # JSON merged into each request, such as {"temperature": null}  # ours
    exact_match: bool = False  # no row has options, there is no judge, and that is meant  # ours
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
    beta1: float = 0.9  # AdamW's default
    beta2: float = 0.999  # AdamW's default
    weight_decay: float = 0.0  # ours
    clip: float = 1.0  # gradient norm  # paper Table 9
    freeze_vision: bool = True  # vision tower and merger  # as in SFT
    # machine
    bf16: bool = True  # on CUDA; the CPU computes in fp32  # paper Table 8
    # recompute activations: less memory, about two fifths slower  # ours
    gradient_checkpointing: bool = False
    shard: bool = False  # weights, gradients, optimizer spread over the ranks  # ours
    lora_rank: int = 0  # of matrices trained beside a frozen model; 0 = the model itself  # ours
    save_every: int = 10  # steps between checkpoints; the last two are kept  # ours
    sample_every: int = 10  # steps between whole rollouts written to rollouts_*.jsonl  # ours
    track: str = ""  # also log to wandb | trackio, a package that is installed  # ours

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 1, "groups", "max_tries", "rollout_batch", "max_new_tokens", "micro_batch")
        at_least(self, 1, "minibatches", "inner_epochs", "save_every", "sample_every")
        at_least(self, 1, "eval_every")
        at_least(self, 2, "group_size")  # an advantage compares
        at_least(self, 0, "prompts", "steps", "max_latents", "warmup_steps", "eval_rows")
        at_least(self, -1, "adjoint_terms")
        check_ranks(self)
        if self.share and self.cuda_graph:
            raise ValueError("share or cuda_graph: a captured step has one size")
        if self.temperature <= 0 or self.tau <= 0:  # a greedy group has nothing to compare
            raise ValueError(f"temperature {self.temperature}, tau {self.tau}: expected above 0")
        if self.shard and self.adjoint_terms:
            raise ValueError("adjoint_terms needs whole weights: 0 with shard")
        if self.judge_url and not self.judge_model:
            raise ValueError("judge_url needs judge_model, the name of a model there")
        read_args(self.judge_args)

    @property
    def label(self):
        """What is trained, in a word: it names the run."""
        return "LA-DAPO"

    @property
    def updates_a_step(self):
        return self.minibatches * self.inner_epochs

    @property
    def prompts_a_try(self):
        return self.prompts or self.groups


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

    Kept iff low < mean accuracy < high. A repetitive rollout counts as wrong. A mean needs at least
    two verdicts.
    """
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


def schedule(step, steps, config):
    """Linear warm-up, then linear to final_lr * lr at the last of `steps`. Source: ours."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, steps - config.warmup_steps - 1)
    return config.lr * (1 + (config.final_lr - 1) * min(1.0, share))


# ----------------------------------------------------------------- roll out, score, keep and refill


class Policy(NamedTuple):
    """What a run trains, what it is compared with, and where a variant differs."""

    model: torch.nn.Module
    tokenizer: object
    trained: Callable  # runs a function of the model, its weights there: f -> f(model)
    reference: Callable | None  # the same of the KL's reference; None = no KL
    loss: Callable  # `policy_loss`, or another function of its arguments
    feed: Callable | None  # None = own latents; else feed(config, k) -> the `feed` of batch k
    roll_out: Callable  # `roll_out` or another, as `loss`
    score: Callable  # `score_groups` or another


def to_roll_out(policy, machine):
    """The policy to roll out with: with shard all its weights on each rank, as long as it lives."""
    if not machine.shard:
        return policy
    return policy._replace(model=whole_copy(policy.model, machine.bf16))


def decode(policy, batch, machine, **how):
    """A batch of prompts, continued -> Rollout, its tokens as lists, its texts."""
    with machine.autocast():
        rollout = generate(policy.model, model_inputs(to_device(batch, machine.device)), **how)
    tokens = [row[:n].tolist() for row, n in zip(rollout.tokens.cpu(), rollout.lengths)]
    return rollout, tokens, policy.tokenizer.batch_decode(tokens)


def roll_out(policy, batch, k, config, machine):
    """Batch k of the prompts -> a Group each, not scored yet. Seed and k decide what is sampled."""
    if not batch["rows"]:
        return []
    G = config.group_size
    how = dict(temperature=config.temperature, top_p=config.top_p, share=config.share, n=G)
    how.update(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    how.update(feed=policy.feed(config, k) if policy.feed else own_latent)
    how.update(cuda_graph=config.cuda_graph)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + k)
    rollout, tokens, texts = decode(policy, batch, machine, generator=generator, **how)
    ids = policy.model.config.latent_start_id, policy.model.config.latent_id
    spans = [span_lengths(row, *ids) for row in tokens]

    groups = []
    for j, (sample, place) in enumerate(zip(batch["samples"], batch["kept"])):
        own = slice(j * G, (j + 1) * G)
        rows = take(rollout, range(len(tokens))[own])
        place += k * config.rollout_batch
        groups.append(Group(place, sample, rows, texts[own], spans[own]))
    return groups


def score_groups(groups, judge, config):
    """Eq. (7) for each group, and the filter's verdict on it. The judge is asked once for all."""
    responses, rows = [], []
    for group in groups:
        responses += group.texts
        rows += [group.sample["row"]] * len(group.texts)
    verdicts = iter(ask_judge(judge, responses, rows))

    weights = Weights(config.lambda_c, config.lambda_d, config.tau)
    for group in groups:
        row, judged = group.sample["row"], [next(verdicts) for _ in group.texts]
        rollouts = group.texts, group.rollout.latents, group.spans
        group.parts = parts = score_group(*rollouts, row.answer, row.options, judged, weights)
        group.verdict = keep_group(parts["correct"], parts["unjudged"], config.low, config.high)


def fill_slots(groups, config, machine):
    """Number the groups of all ranks that are worth learning from, in the order of the data.

    -> how many have a number, at most `config.groups`; how many of this rank's are surplus.
    """
    dropped = ("unjudged", "too hard", "too easy") if config.filter else ("unjudged",)
    worth = [group for group in groups if group.verdict not in dropped]
    places = sorted(machine.gather([group.place for group in worth]))[: config.groups]
    slots = {place: slot for slot, place in enumerate(places)}
    for group in worth:
        group.slot = slots.get(group.place)
    return len(places), sum(group.slot is None for group in worth)


def collect(policy, batches, first, judge, config, machine):
    """Roll out prompts until `groups` groups are kept, or max_tries times -> Harvest, end.

    batches: this rank's. first, end: the batch of all ranks that is next before and after. Ranks
    walk in step.
    """
    harvest, end, policy = Harvest(), first, to_roll_out(policy, machine)
    for _ in range(config.max_tries):
        begin, end = end, end + -(-config.prompts_a_try // config.rollout_batch)
        for k in range(begin, end):
            if k % machine.world != machine.rank:
                continue
            with harvest.tally.clock("rollout"):
                batch = next(batches)
                groups = policy.roll_out(policy, batch, k, config, machine)
            with harvest.tally.clock("reward"):
                policy.score(groups, judge, config)
            harvest.groups += groups
            harvest.skipped += batch["skipped"]
        filled, surplus = fill_slots(harvest.groups, config, machine)
        if filled == config.groups:
            break
    harvest.tally.count("surplus", surplus)
    harvest.count()
    return harvest, end


# ------------------------------------------------------------------------------------------- update


def replayed(model, batch, config):
    """A batch's rollouts fed again -> latent_decode.Replay."""
    prompts = to_device(batch.prompts, batch.A.device)
    return replay(model, prompts, batch.rollout, config.temperature, batch.prompt_of)


def policy_loss(model, batch, n_tokens, config, figures):
    """A batch's share of the step's loss L; adds to `figures`. Source: the docstring's L.

    n_tokens: chosen tokens of the step, over all ranks.
    """
    new = replayed(model, batch, config)
    loss, kl = clipped_loss(new, batch, n_tokens, config, figures)
    return loss + kl + through_latents(loss, new, batch, config)


def clipped_loss(new, batch, n_tokens, config, figures):
    """A batch's Replay -> its share of both sums of L, clipped and KL, latents held constant."""
    # with one update a step the policy has not moved: what differs is only the decoder's kernels
    recorded, weight = batch.rollout.logprobs, batch.weight / n_tokens  # (R, T)
    old = new.logprobs.detach() if config.updates_a_step == 1 else recorded
    bounds = config.eps_low, config.eps_high, config.dual_clip
    surrogate, r = clipped_surrogate(new.logprobs, old, batch.A, *bounds)
    kl = torch.zeros_like(surrogate) if batch.ref is None else kl_k3(new.logprobs, batch.ref)

    with torch.no_grad():
        too_high = (r > 1 + config.eps_high) & (batch.A > 0)
        too_low = (r < 1 - config.eps_low) & (batch.A < 0)
        values = dict(loss=surrogate, ratio=r, clip_fraction=too_high | too_low, kl=kl)
        values.update(entropy=new.entropy, replay_ms=(new.logprobs - recorded).square())
        for name, value in values.items():
            figures[name] += (value * weight).sum().item()
        largest = r.masked_fill(~batch.rollout.sampled, 0).max().item()
        figures["ratio_max"] = max(figures["ratio_max"], largest)
    return (surrogate * weight).sum(), config.kl * (kl * weight).sum()


def through_latents(loss, new, batch, config):
    """`adjoint_loss` with as many terms as the config wants and the longest response has."""
    longest = max(len(z) for z in batch.rollout.latents)
    terms = longest if config.adjoint_terms < 0 else min(config.adjoint_terms, longest)
    return adjoint_loss(loss, new.predicted, new.latents, terms) if terms else 0.0


def minibatch(groups, policy, config, machine):
    """One minibatch's groups on this rank -> its batches, and its chosen tokens over all ranks."""
    parts = [groups[i : i + config.micro_batch] for i in range(0, len(groups), config.micro_batch)]
    batches = [prepare(part, policy.feed is None, machine.device) for part in parts]
    if machine.shard:  # as many on every rank
        missing = max(machine.gather([len(batches)])) - len(batches)
        hidden = policy.model.config.text_config.hidden_size
        batches += [no_batch(hidden, machine.device) for _ in range(missing)]
    for batch in batches:
        if policy.reference is not None:
            with torch.no_grad(), machine.autocast():
                ref = policy.reference(lambda model, batch=batch: replayed(model, batch, config))
            batch.ref = ref.logprobs
    n_tokens = sum(int(batch.weight.sum()) for batch in batches)
    return batches, machine.sum([n_tokens])[0]


def update(policy, optimizer, groups, lr, config, machine):
    """All updates of a step from this rank's kept groups (may be none) -> figures of all ranks."""
    # advantages; equal rollouts together; the reference's log-probabilities
    for group in groups:
        group.A = group_advantages(group.parts["total"])
    minibatches = []
    for k in range(config.minibatches):
        part = [group for group in groups if group.slot % config.minibatches == k]
        minibatches.append(minibatch(part, policy, config, machine))

    # clipped loss -> step
    figures, norms = Counter(), []
    for batches, n_tokens in minibatches * config.inner_epochs:
        if n_tokens == 0:  # fewer groups than minibatches
            continue
        for batch in batches:
            args = batch, n_tokens, config, figures
            with machine.autocast():
                loss = policy.trained(lambda model, args=args: policy.loss(model, *args))
            loss.backward()
        norms.append(machine.step(optimizer, lr, config.clip))
    return update_figures(figures, norms, machine)


# --------------------------------------------------------------------------------------------- loop


def held_out_accuracy(policy, held_out, judge, log, config, machine):
    """Greedy accuracy on what was held out, a rollout a prompt -> fields of the step's line.

    Right is what R_acc's rule or the judge calls so. The mean over the judged rows of all ranks;
    None if there is none.
    """
    size = config.rollout_batch * config.group_size  # as many rows together as in a rollout
    how = dict(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    right, judged, policy = 0, 0, to_roll_out(policy, machine)
    with held_out.aside(policy.model):
        for batch in held_out.batches(policy.tokenizer, size, side="left", train=False):
            rows = batch["rows"]
            _, _, texts = decode(policy, batch, machine, **how) if rows else ([], [], [])
            for text, row, verdict in zip(texts, rows, ask_judge(judge, texts, rows)):
                right += bool(verdict or accuracy_reward(text, row.answer, row.options))
                judged += verdict is not None
    right, judged = machine.sum([right, judged])
    return held_out.line(log, judge, accuracy=right / judged if judged else None)


def train(
    config, rows=None, policy_loss=policy_loss, feed=None, roll_out=roll_out, score=score_groups
):
    """Run LA-DAPO -> path of the last checkpoint.

    rows: list of Row, default those of config.data. The others: a variant's, see Policy.
    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder; the policy and what it is compared with; the prompts in their order
    machine = Machine(config.bf16, config.shard)
    rows = usable(rows_of(config) if rows is None else rows, config)
    held_out = HeldOut(usable(held_out_rows(config), config), config, machine)
    steps, judge = count_steps(rows, config), judge_of(config)
    run = Run(config, rows, machine, config.label)
    policy = load_policy(run, policy_loss, feed, roll_out, score)
    model, tokenizer = policy.model, policy.tokenizer
    optimizer, _ = make_optimizer(model, config)
    place = run.state["batch"] if run.state else 0  # the batch of prompts that comes next
    batches = load_prompts(rows, tokenizer, place, config, machine)
    run.start(model, optimizer, describe(config, rows, model, steps, machine))
    rollouts = RolloutLog(run)

    for step in run.log.steps(steps, run.name):
        # rollouts -> rewards -> group filter and refill
        harvest, end = collect(policy, batches, place, judge, config, machine)
        skipped, failures = run.log.skips(harvest.skipped, judge)
        tally = harvest.tally.over(machine)
        check_readable(step, tally, skipped)

        # advantages -> clipped loss -> step
        lr = schedule(step, steps, config)
        with tally.clock("update"):
            figures = update(policy, optimizer, harvest.kept, lr, config, machine)

        # a line in the log, now and then a rollout of each group, and a checkpoint
        places = [place * config.rollout_batch, end * config.rollout_batch]
        line = dict(step=step, lr=lr, prompts=places, **figures)
        line.update(log_line(tally, skipped, failures))
        if held_out.due(step + 1, steps):
            line.update(held_out_accuracy(policy, held_out, judge, run.log, config, machine))
        shown = dict(reward=line["total"], accuracy=line["accuracy"], groups=line["groups"])
        run.log.write(line, **shown, **held_out.shown)
        rollouts.write(step, harvest.groups)
        place = end
        due = run.save_if_due(step + 1, steps, model, tokenizer, optimizer, batch=end)
        if due and machine.master:
            draw_curves(run.log.path, os.path.join(config.out, "rewards.png"), CURVES)
    return run.checkpoint


def load_model(run):
    """What is trained, see `Run.load`."""
    torch.manual_seed(run.config.seed)
    return run.load()


def load_policy(run, *variant):
    """The policy, from the newest checkpoint or where the run begins; variant: the rest of it."""
    model, tokenizer = load_model(run)
    trained, reference = run.machine.gathered(model), None
    if run.config.kl and run.config.lora_rank:
        reference = frozen_alone(model)
    elif run.config.kl:
        reference, _ = run.machine.load(run.start_folder())
        reference = run.machine.gathered(reference.requires_grad_(False))
    return Policy(model, tokenizer, trained, reference, *variant)


def usable(rows, config):
    """The rows whose answers can be rewarded; the others are counted, named and left out.

    Raises SystemExit if they are more than the share max_bad; or if all answers are open, there is
    no judge, and exact_match is off.
    """
    bad = [row for row in rows if row.options and pick(row.answer, row.options) is None]
    reasons = [Skipped(r.where, f"the answer {r.answer!r} is none of {r.options}") for r in bad]
    if bad:
        report_bad(reasons, len(rows), config.max_bad)
    all_open = bool(rows) and not any(row.options for row in rows)
    if all_open and not (config.judge_model or config.exact_match):
        raise SystemExit(
            f"all {len(rows)} rows have open answers (no options): --judge_model NAME judges them, "
            "--exact_match says that only the very words are right"
        )
    gone = {row.where for row in bad}
    return [row for row in rows if row.where not in gone]


def count_steps(rows, config):
    """Updates of the run: one epoch is N // groups; refills cost passes, not updates."""
    prompts = int(len(rows) * config.epochs)
    if not rows or (prompts < 1 and not config.steps):
        raise SystemExit(f"nothing to train on: {len(rows)} rows, {config.epochs} epochs")
    return config.steps or max(1, prompts // config.groups)


def describe(config, rows, model, steps, machine):
    """The run in one line."""
    same = ": the ratio is 1" if config.updates_a_step == 1 else ""
    judged_by = config.judge_model or "exact match alone"
    n_open = sum(not row.options for row in rows)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (
        f"{config.label}: {len(rows)} prompts, {steps} steps of {config.groups} groups x "
        f"{config.group_size} rollouts, {config.prompts_a_try} prompts a try, {machine.world} "
        f"ranks, {machine.device.type}, seed {config.seed}, {trained:,} parameters trained, "
        f"{config.updates_a_step} update(s) a step{same}, "
        f"{n_open} open answers judged by {judged_by}"
    )


if __name__ == "__main__":
    run_script(lambda config: print("last checkpoint:", train(config)), Config)
