"""A loop of looks: reason, act, read the feedback, reason again, in one context that grows.

A fork of la_dapo.py, after InternVideo3's multimodal contextual reasoning. The loop is learnt: from
scripts first (variants/mcr_sft.py), then by reinforcement.

    R_i, A_i ~ pi(. | C_i)              a turn: steps of reasoning, at its end an action
    F_i = environment(A_i)              what the action shows or says
    C_{i+1} = C_i + (R_i, A_i, F_i)     C_1: the question and what is seen at first
    log pi  = sum over the tokens that pi chose; F is fed, never chosen and never trained
    R       = R_acc - cost * looks,    A_i = R_i - mean R

Actions are words in the last <reason> of a turn. The environment answers as a user's turn:

    look K     key frame K of the clip (1..8), its visual tokens; `nothing` where there is none,
               or max_looks are spent
    check      `seen` if the frame that is asked for was shown, else `unseen`: is there evidence?
    imagine    no feedback: a latent span follows in the same turn, as ever
    <answer>   ends the loop, as does a turn without an action

    python -m variants.mcr_sft --model DIR --data train.json --out runs/loops
    python -m variants.mcr --model runs/loops --data train.json --out runs/mcr --cost 0.05

The frame that is asked for is the last future frame of a record; a record that has none gets
`nothing` for a check. The rest of the future is not read here.

Slow and plain: a turn is one `generate` of all rollouts that go on, over the whole context, encoded
anew; the replay is one forward, each rollout by itself. What stays: clipped loss, latent gradient.

Where this differs from InternVideo3 (arXiv 2606.12195, sec. 3.1):
 1. No outside tools and no memory but the context. Its prompts, budgets and schemas are not public:
    these actions and their words are ours.
 2. `check` says whether there is evidence, not whether the answer is right.
 3. The loop is trained. There, no stage trains it.
Where this differs from la_dapo.py:
 4. R has neither format nor latent rewards. A is not divided by the group's deviation: where all
    rollouts are right, that would make the smallest cost push as hard as an answer.
 5. A step plays `prompts` prompts once (0: `groups`) and makes one update. All judged groups are
    kept, because equally right rollouts still differ in their looks: nothing is refilled, and low,
    high and max_tries have no effect.
 6. kl = 0: the reference knows no transcripts. No --shard, --cuda_graph; no eval_data.
 7. In the log `length` and `forced_stops` count the environment's tokens too; `looks` is new.

Axis letters: B prompts, n rollouts a prompt, R rows (rollouts), T tokens after the prompt, L tokens
of the longest context, S of the tokens chosen, N latents, D hidden.
"""

import dataclasses
import math
import os
import re
from collections import Counter
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import la_dapo
from common.ahead import read_ahead
from common.cli import run_script
from common.clips import ClipError, load_frames
from common.formats import Frame, Skipped
from common.judge import judge_of
from common.machine import Machine, set_sync
from common.report import draw_curves
from common.run import Run, rows_of
from data import Samples, Special, at_least, collate, model_inputs, to_device, tokenize, visual
from latent_decode import Replay, Rollout, decisions, generate
from rewards import span_lengths

WORDS = ("look", "imagine", "check", "seen", "unseen", "nothing")  # actions and feedback
# deviation 1: these actions and their words are ours, because the published ones are not public
ACTION = re.compile(
    r"<reason>\s*(?:look\s+(?P<frame>\d{1,3})|(?P<check>check))\s*</reason>\s*(?:<\|im_end\|>)?\s*$"
)


@dataclasses.dataclass
class Config(la_dapo.Config):
    cost: float = 0.05  # of a look  # ours
    max_looks: int = 8  # of a rollout; then a look shows nothing  # ours
    max_turns: int = 12  # of a rollout  # ours
    max_new_tokens: int = 512  # of a turn  # ours
    filter: bool = False  # all groups are kept
    kl: float = 0.0  # no reference
    lambda_c: float = 0.0  # not in this reward
    lambda_d: float = 0.0  # not in this reward

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "cost", "max_looks")
        at_least(self, 1, "max_turns")
        # deviation 6: the reference knows no transcripts
        without = "filter kl lambda_c lambda_d merge_equal shard cuda_graph eval_data".split()
        if any(getattr(self, name) for name in without):
            raise ValueError(f"mcr: no {', '.join(without)}")
        if self.minibatches * self.inner_epochs != 1:
            raise ValueError("mcr: one update a step")

    @property
    def label(self):
        return "MCR"


# ---------------------------------------------------------------------------------- the environment


class Shown(NamedTuple):
    """Feedback: a frame."""

    frame: Frame


class Said(NamedTuple):
    """Feedback: a word."""

    word: str


def frames_in(parts):
    return [part for part in parts if isinstance(part, Frame)]


def environment(turn, row, seen, looks_left):
    """A turn's text -> Shown, Said, or None: it holds no action, the loop ends. Source: ours.

    seen: the frames that were shown so far, the prompt's included.
    """
    action = ACTION.search(turn)
    if action is None:
        return None
    if action["check"]:  # deviation 2: it says whether there is evidence, not whether it is right
        asked = frames_in(row.response)[-1:]
        return Said(("seen" if asked[0] in seen else "unseen") if asked else "nothing")
    clips = [frame.source for frame in frames_in(row.prompt) if frame.index]
    k = int(action["frame"])
    there = bool(clips) and 1 <= k <= 8 and looks_left > 0
    return Shown(Frame(clips[0], k)) if there else Said("nothing")


def user_turn(feedback, config):
    """Shown or Said -> the pieces of the turn it comes in, its images [(patches, grid)].

    The pieces follow the end of the policy's turn and lead up to its next one. Raises ClipError.
    """
    images, content = [], [getattr(feedback, "word", "")]
    if isinstance(feedback, Shown):
        images = load_frames([feedback.frame], config.budgets.image)
        content = visual("<|image_pad|>", images[0][1])
    pieces = ["\n", Special("<|im_start|>"), "user\n", *content, Special("<|im_end|>")]
    return [*pieces, "\n", Special("<|im_start|>"), "assistant\n"], images


# ----------------------------------------------------------------------------------------- the loop


@dataclasses.dataclass
class Episode:
    """One rollout: what was added to the prompt's context, and which of it the policy chose."""

    sample: dict  # the encoded prompt
    tokens: list = dataclasses.field(default_factory=list)  # T ids
    sampled: list = dataclasses.field(default_factory=list)  # T: False for the environment's
    logprobs: list = dataclasses.field(default_factory=list)  # T: 0 where not chosen
    latents: list = dataclasses.field(default_factory=list)  # tensors (n, D)
    images: list = dataclasses.field(default_factory=list)  # (patches, grid) a look
    seen: list = dataclasses.field(default_factory=list)  # a Frame a look
    finish: str = "length"
    turn: int = 0  # where the last turn begins

    @property
    def context(self):
        """C_i, as `data.collate` takes it."""
        sample = self.sample
        more = dict(ids=sample["ids"] + self.tokens, images=sample["images"] + self.images)
        return dict(sample, **more)

    def add_turn(self, rollout, i):
        """R_i and A_i: row i of a Rollout whose tensors are lists."""
        n, self.turn = rollout.lengths[i], len(self.tokens)
        self.tokens += rollout.tokens[i][:n]
        self.sampled += rollout.sampled[i][:n]
        self.logprobs += rollout.logprobs[i][:n]
        self.latents.append(rollout.latents[i])
        self.finish = rollout.finish[i]

    def add_feedback(self, tokenizer, config):
        """F_i, if the last turn ended in an action -> whether it did."""
        if self.finish != "eos":  # the turn was cut off
            return False
        row, text = self.sample["row"], tokenizer.decode(self.tokens[self.turn :])
        left = config.max_looks - len(self.seen)
        feedback = environment(text, row, frames_in(row.prompt) + self.seen, left)
        if feedback is None:
            return False
        try:
            pieces, images = user_turn(feedback, config)
        except ClipError as e:
            tqdm.write(f"nothing to look at in {row.where}: {e}")
            feedback = Said("nothing")
            pieces, images = user_turn(feedback, config)
        new = tokenize(pieces, tokenizer)
        self.tokens += new
        self.sampled += [False] * len(new)
        self.logprobs += [0.0] * len(new)
        self.images += images
        self.seen += [feedback.frame] if images else []
        return True


def contexts(episodes, side, device):
    """Episodes -> the inputs of one forward over all of each, latents apart."""
    batch = collate([episode.context for episode in episodes], 0, side=side)
    return model_inputs(to_device(batch, device))


def play(model, tokenizer, samples, config, n=1, **how):
    """Each prompt n times, turn by turn, to the end -> [Episode], the n of a prompt together.

    samples: encoded prompts. how: `generate`'s temperature, generator, banned, ...
    Without an action in a first turn, or with max_turns = 1, it is that `generate`. Source: ours.
    """
    how.update(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)
    episodes = [Episode(sample) for sample in samples for _ in range(n)]
    live, inputs = episodes, contexts(episodes[::n], "left", model.device)
    for turn in range(config.max_turns):
        if turn:
            live = [episode for episode in live if episode.add_feedback(tokenizer, config)]
            if not live:
                break
            inputs, n = contexts(live, "left", model.device), 1
            latents = [z for episode in live for z in episode.latents]
            inputs["latents"] = torch.cat(latents)  # (N, D), row by row in order
        rollout = generate(model, inputs, n=n, **how)
        names = "tokens", "sampled", "logprobs", "lengths"
        lists = {name: getattr(rollout, name).tolist() for name in names}
        for i, episode in enumerate(live):
            episode.add_turn(dataclasses.replace(rollout, **lists), i)
    return episodes


def as_rollout(episodes, device):
    """Episodes -> a Rollout: the environment's tokens are in it, as not chosen."""

    def rows(name):
        values = [torch.tensor(getattr(episode, name)) for episode in episodes]
        return pad_sequence(values, batch_first=True).to(device)  # (R, T)

    latents = [torch.cat(episode.latents) for episode in episodes]
    lengths = torch.tensor([len(episode.tokens) for episode in episodes], device=device)
    finish = [episode.finish for episode in episodes]
    return Rollout(rows("tokens"), rows("sampled"), latents, rows("logprobs"), finish, lengths)


# ---------------------------------------------------------------- roll out, score, advantages, loss


@dataclasses.dataclass
class Loops(la_dapo.Group):
    """A Group with its episodes."""

    episodes: list = None


def roll_out(model, tokenizer, samples, k, config):
    """`la_dapo.roll_out` of loops: batch k of the prompts -> a group each, not scored yet."""
    places = [i for i, sample in enumerate(samples) if not isinstance(sample, Skipped)]
    if not places:
        return []
    readable, G, groups = [samples[i] for i in places], config.group_size, []
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + k)
    how = dict(temperature=config.temperature, top_p=config.top_p, generator=generator)
    episodes = play(model, tokenizer, readable, config, n=G, **how)
    ids = model.config.latent_start_id, model.config.latent_id
    for j, (sample, i) in enumerate(zip(readable, places)):
        own = episodes[j * G : (j + 1) * G]
        texts = tokenizer.batch_decode([episode.tokens for episode in own])
        spans = [span_lengths(episode.tokens, *ids) for episode in own]
        place, rollout = k * config.rollout_batch + i, as_rollout(own, model.device)
        groups.append(Loops(place, sample, rollout, texts, spans, episodes=own))
    return groups


def score_groups(groups, judge, config):
    """R = R_acc - cost * looks for each group. Source: ours."""
    la_dapo.score_groups(groups, judge, config)
    for group in groups:
        looks = [len(episode.seen) for episode in group.episodes]
        pairs = list(zip(group.parts["accuracy"], looks))
        group.parts["total"] = [None if a is None else a - config.cost * n for a, n in pairs]
        group.parts["looks"] = looks


def differences(rewards):
    """A_i = R_i - mean R -> (G,). Source: ours.

    rewards: G floats, None = unjudged: no part in the mean, and advantage 0.
    """
    known = [r for r in rewards if r is not None]
    return torch.tensor([0.0 if r is None else r - sum(known) / len(known) for r in rewards])


def replay_loops(model, batch, config):
    """A batch's transcripts in one forward -> latent_decode.Replay. Source: ours.

    Each is a sequence of its own: prompt, turns, feedback. Differentiable in weights and latents.
    """
    if not batch.groups:  # it fills up, see `la_dapo.no_batch`
        return la_dapo.replayed(model, batch, config)
    rollout, pairs = batch.rollout, zip(batch.prompt_of.tolist(), batch.members)
    episodes = [batch.groups[k].episodes[members[0]] for k, members in pairs]
    inputs = contexts(episodes, "right", batch.A.device)
    wide = torch.promote_types(model.dtype, torch.float32)
    z = torch.cat(rollout.latents).detach().to(wide).requires_grad_()  # (N, D)
    h, _ = model.hidden(**inputs, latents=z)  # (R, L, D)

    # the state before each token that follows the prompt
    R, T = rollout.tokens.shape
    prompts = torch.tensor([len(e.sample["ids"]) for e in episodes], device=h.device)[:, None]
    before = (prompts - 1 + torch.arange(T, device=h.device)).clamp(max=h.shape[1] - 1)
    h = h[torch.arange(R, device=h.device)[:, None], before]  # (R, T, D)

    # what was chosen there; the environment's tokens are not among it
    sampled, is_latent = rollout.sampled, rollout.tokens == model.config.latent_id
    zero = torch.zeros_like(rollout.tokens, dtype=wide)
    chosen = decisions(model, h[sampled], rollout.tokens[sampled], config.temperature)  # (S,) each
    logprobs, entropy = (zero.masked_scatter(sampled, x) for x in chosen)  # (R, T)
    predicted = model.to_latent(h[is_latent]).to(wide)  # (N, D)
    return Replay(logprobs=logprobs, entropy=entropy, predicted=predicted, latents=z)


def policy_loss(model, batch, counts, config):
    """`la_dapo.policy_loss` on transcripts, without a KL."""
    new = replay_loops(model, batch, config)
    loss, _, figures = la_dapo.clipped_loss(new, batch, counts, config)
    return loss + la_dapo.through_latents(loss, new, batch, config), figures


# --------------------------------------------------------------------------------------------- loop


def train(config):
    """LA-DAPO of loops -> path of the last checkpoint.

    Raises SystemExit on a folder in use or bad input.
    """
    # the run's folder, the policy, the prompts in their order
    # deviation 3: there, no stage trains the loop
    machine = Machine(config.bf16)
    rows = la_dapo.usable(rows_of(config), config)
    steps, judge = la_dapo.count_steps(rows, config), judge_of(config)
    run = Run(config, rows, machine, config.label)
    torch.manual_seed(config.seed)
    model, tokenizer = run.load()
    model.model.visual.requires_grad_(False)
    policy = machine.wrap(model, unused=model.latent_head is not None)
    # matrices before vectors: the order decides how the gradient's norm is rounded
    trained = sorted((p for p in model.parameters() if p.requires_grad), key=lambda p: p.ndim < 2)
    betas = 0.9, config.beta2
    optimizer = torch.optim.AdamW(trained, config.lr, betas, weight_decay=0.0, fused=True)
    next_batch = run.state["batch"] if run.state else 0  # its number, k
    size, hidden = config.rollout_batch, model.config.text_config.hidden_size
    batches_a_step = -(-(config.prompts or config.groups) // size)
    plan = la_dapo.prompt_batches(
        len(rows), size, next_batch, config.seed, machine.rank, machine.world
    )
    prompts = iter(read_ahead(Samples(rows, tokenizer, config, train=False), plan, config.workers))
    run.start(model, optimizer, la_dapo.describe(config, rows, model, steps, machine))

    for step in run.steps(steps):
        # play this rank's prompts to their ends, and score the transcripts
        groups, skipped, first_batch = [], [], next_batch
        for k in range(next_batch, next_batch + batches_a_step):
            if k % machine.world == machine.rank:
                samples = next(prompts)
                with machine.autocast():
                    groups += roll_out(model, tokenizer, samples, k, config)
                skipped += [sample for sample in samples if isinstance(sample, Skipped)]
        next_batch += batches_a_step
        score_groups(groups, judge, config)

        # deviation 5: all judged groups are kept
        # deviation 4: how their rollouts compare
        kept = [group for group in groups if group.fate != "unjudged"]
        for group in kept:
            group.A = differences(group.parts["total"])
        batches, counts = la_dapo.batches_of(kept, hidden, config, machine)

        # one update: loss, backward, clip, step
        lr, figures, norms = la_dapo.learning_rate(step, steps, config), Counter(), []
        for batch in batches if counts.tokens else []:
            set_sync(policy, last=batch is batches[-1])
            with machine.autocast():
                loss, logged = policy(policy_loss, batch, counts, config)
            (loss * machine.world).backward()  # DDP averages the ranks' gradients
            figures.update({name: float(value) for name, value in logged.items()})
        if counts.tokens:
            norms.append(torch.nn.utils.clip_grad_norm_(trained, config.clip).item())
            for param_group in optimizer.param_groups:
                param_group["lr"] = lr
            if math.isfinite(norms[-1]):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        # a line in the log, and now and then whole transcripts and a checkpoint
        skipped, failures = run.skips(skipped, judge)
        line = dict(step=step, lr=lr, prompts=[first_batch * size, next_batch * size])
        line.update(la_dapo.update_figures(figures, norms, machine))
        # deviation 7: length and forced_stops count the environment's tokens too
        line.update(la_dapo.rollout_figures(groups, kept, kept, machine))
        line.update(skipped=len(skipped), skipped_names=skipped, judge_failures=failures)
        if step == 0 and not line["rollouts"]:
            raise SystemExit(f"none of the first prompts could be used, e.g. {skipped[:1]}")
        run.log(line, "total", "accuracy", "looks")
        if run.due(step + 1, steps):
            shown = step // config.save_every % config.group_size  # another rollout each time
            la_dapo.write_rollouts(run, step, groups, shown)
            run.save(step + 1, model, tokenizer, optimizer, batch=next_batch)
            if machine.master:
                curves = os.path.join(config.out, "rewards.png")
                draw_curves(run.path, curves, la_dapo.CURVES)
    return run.finish()


if __name__ == "__main__":
    run_script(train, Config)
