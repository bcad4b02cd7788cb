"""The rewards of LA-DAPO (paper sec. 3.3): pure functions of responses and latents.

    R     = 0.9 R_acc + 0.1 R_fmt + lambda_c R_ctr + lambda_d R_div                     Eq. (7)
    s_ij  = 1/T sum_{t<=T} (1 + <z_i,t , z_j,t>) / 2                                    Eq. (4)
            unit-norm latents, T = min(T_i, T_j)
    R_ctr = exp(s_i+/tau) / ( exp(s_i+/tau) + sum_{j in N_i} exp(s_ij/tau) )            Eq. (5)
    R_div = - 1/(M-1) sum_m cos^2(b_m, b_{m+1})      b_m = mean latent of span m        Eq. (6)

Nothing here knows a model or a file. `ask_judge` calls a judge that it is given (common/judge.py).

Where this differs from the paper:
 1. A span needs at least one latent to count for R_fmt.
 2. The judge is asked only if the rule says no and the judge's answer could change something.
Where this differs from the official code:
 3. A rollout without a verdict of the judge is *unjudged*: it has no reward and no part in its
    group. Official calls it wrong.
 4. R_ctr and R_div have one weight each; official's documented switch does not turn R_div on.
 5. R_fmt is stricter: a tag or a span marker inside a block makes it 0. Official accepts, for
    example, a second <answer>, or a stray </reason> inside a reason.
The edge cases of R_ctr follow the official code even where they look odd; otherwise results would
not be comparable.

Axis letters: G rollouts of a group, N latents of a rollout, T latents two rollouts share, D hidden.
"""

import functools
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# answer_of(response): the text of the first closed <answer>, or None. plain(text): in lower case,
# single spaces, no outer punctuation. pick(answer, options): the number of the option whose text or
# letter the answer is, or None.
from common.formats import answer_of, pick, plain
from model import LATENT, LATENT_END, LATENT_START

_START, _LATENT, _END = (re.escape(marker) for marker in (LATENT_START, LATENT, LATENT_END))
_TAG = rf"</?(?:reason|answer)>|{_START}|{_LATENT}|{_END}"
# deviation 5: anything but tags and markers, so that nothing can hide inside a block
_TEXT = rf"(?:(?!{_TAG}).)*"
_R = rf"<reason>{_TEXT}</reason>\s*"
_A = rf"<answer>{_TEXT}</answer>(?:\s|<\|im_end\|>|<\|endoftext\|>)*"
# deviation 1: an empty span imagines nothing, and would be the cheapest way to earn the reward
_L = rf"{_START}(?:\s*{_LATENT})+\s*{_END}\s*"
_FORMAT = re.compile(rf"\s*(?:{_R})?(?:{_L}{_R})+{_A}", re.S)


@functools.lru_cache(maxsize=4096)  # a low-entropy policy repeats its responses
def format_reward(response):
    """R_fmt in {0, 1}: the whole response is `R (L R)+ A` or `(L R)+ A`. Source: sec. 3.3.

    R a <reason> block, L a span with its latents, A an <answer> block; white space between blocks
    and chat terminators at the end are allowed, anything else outside a block, or a tag inside one,
    is not.
    """
    return float(_FORMAT.fullmatch(response) is not None)


@functools.lru_cache(maxsize=4096)
def repetition_score(text):
    """How much of a response repeats itself, in [0, 1]: the largest of three shares. Official's.

    1 - distinct / all word 4-grams; the share of words in a block of 50 or 25 repeated back to back
    (texts of 100 words or more); 1 - distinct / all lines of more than 10 characters (three or more
    such lines). Tags and markers are left out.
    """
    text = re.sub(_TAG + r"|<\|im_end\|>|<\|endoftext\|>", " ", text)
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(4))))
    score = 1 - len(set(grams)) / len(grams) if grams else 0.0
    if len(words) >= 100:
        for size in (50, 25):
            inside = set()
            for i in range(len(words) - 2 * size + 1):
                end = i + size
                if words[i:end] == words[end : end + size]:
                    inside.update(range(i, end + size))
            score = max(score, len(inside) / len(words))
    lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 10]
    if len(lines) >= 3:
        score = max(score, 1 - len(set(lines)) / len(lines))
    return score


def accuracy_reward(response, gold, options=None):
    """R_acc's rule in {0, 1}: the first <answer> is the gold answer. Source: sec. 3.3.

    Normalised exact match (case, spaces, outer punctuation); with options, gold and answer may each
    be an option's text or letter. Raises ValueError if gold is none of the options.
    """
    answer = answer_of(response)
    if not options:
        return float(answer is not None and plain(answer) == plain(gold))
    wanted = pick(gold, options)
    if wanted is None:
        raise ValueError(f"the answer {gold!r} is none of the options {options}")
    return float(pick(answer, options) == wanted)


def similarity(latents):
    """Eq. (4): s_ij, how alike two rollouts imagine -> (g, g) in [0, 1], with a gradient.

    latents: g tensors (N_i, D), none of them empty. Spans are concatenated; compared are the T
    latents that both have, one after another.
    """
    n = torch.tensor([len(z) for z in latents], device=latents[0].device)
    z = torch.nn.utils.rnn.pad_sequence([_wide(z) for z in latents], True)  # (g, T, D)
    z = F.normalize(z, dim=-1).flatten(1)  # (g, T * D); padding adds 0 to a dot product
    return (1 + z @ z.T / torch.minimum(n[:, None], n[None])) / 2


def _wide(z):
    return z.to(torch.promote_types(z.dtype, torch.float32))


def contrastive_reward(latents, correct, tau=0.5):
    """Eq. (5): imagine what the group's correct rollouts do, not what its wrong ones do -> (G,).

    latents: G tensors (N_i, D), or None for a rollout without; correct: G bools. A rollout without
    latents has reward 0 and is in no P_i and no N_i. Differentiable in the latents. The cases
    that Eq. (5) leaves open are official's.
    """
    rows = [i for i, z in enumerate(latents) if z is not None and len(z)]
    if len(latents) < 2 or not rows:  # a group of one has nobody to compare with
        return torch.zeros(len(latents))
    s = similarity([latents[i] for i in rows]).cpu()  # (g, g)
    right = torch.tensor([bool(correct[i]) for i in rows])  # (g,)
    e = (s.double() / tau).exp()

    # exp(s_i+ / tau): the most similar of P_i, the other correct rollouts
    in_P = right & ~torch.eye(len(rows), dtype=torch.bool)  # (g, g): whether j is in P_i
    plus = e.masked_fill(~in_P, 0).amax(1)  # (g,)
    # no P_i: a lone correct rollout is its own positive, s+ = 1; where none is correct, s+ = 0
    plus = torch.where(in_P.any(1), plus, (right.double() / tau).exp())

    # N_i: the wrong rollouts. A wrong one is in its own N_i, with s_ii = 1.
    minus = e[:, ~right].sum(1)  # (g,)
    # If none is wrong, Eq. (5) would be 1 for every rollout. Official changes it to s_i+ / tau,
    # which can exceed 1 but still tells the rollouts apart.
    of_rows = plus.log() if right.all() else plus / (plus + minus)
    reward = torch.zeros(len(latents), dtype=s.dtype)
    reward[rows] = of_rows.to(s.dtype)
    return reward


def span_likeness(latents, span_lengths):
    """Eq. (6) without its sign: how alike neighbouring spans are -> scalar, with a gradient.

    latents (N, D), all spans one after another; span_lengths: latents in each, empty spans are
    passed over. 0 with fewer than two non-empty spans. Raises ValueError if the lengths do not add
    up to N.
    """
    if sum(span_lengths) != len(latents):
        raise ValueError(f"spans of {span_lengths} latents do not make {len(latents)}")
    lengths = [n for n in span_lengths if n]
    if len(lengths) < 2:
        return torch.zeros(())
    b = torch.stack([span.mean(0) for span in _wide(latents).split(lengths)])  # (M, D)
    return F.cosine_similarity(b[:-1], b[1:], dim=-1).square().mean()


def diversity_reward(latents, span_lengths):
    """Eq. (6): spans should not repeat each other -> float in [-1, 0]. Source: sec. 3.3.

    latents (N, D) or None; the rest as in `span_likeness`.
    """
    likeness = span_likeness(torch.zeros(0, 1) if latents is None else latents, span_lengths)
    return 0.0 - likeness.item()  # not -0.0


def needs_judge(response, gold, options=None):
    """Whether the rule says no and a judge could change something. Source: ours."""
    answer = answer_of(response)
    # deviation 2: not without an answer, nor where repetition makes R_acc -1, nor where the answer
    # is another option's text or letter
    return bool(
        answer
        and not accuracy_reward(response, gold, options)
        and repetition_score(response) <= 0.5
        and not (options and pick(answer, options) is not None)
    )


# the rewards that Eq. (7) adds to those of the answer and the format -> the flags of their weights
WEIGHTS = {"contrastive": "lambda_c", "diversity": "lambda_d"}


@dataclass(frozen=True)
class Weights:
    """The weights of Eq. (7), and the temperature of Eq. (5). Source: paper Table 9.

    la_dapo.Config has fields of the same names, and takes its place.
    """

    lambda_c: float = 0.2  # of R_ctr
    # deviation 4: a weight above 0 is all that turns R_div on
    lambda_d: float = 0.1  # of R_div
    tau: float = 0.5  # temperature of Eq. (5)


def score_group(
    responses, latents, span_lengths, gold, options=None, verdicts=None, weights=Weights()
):
    """Eq. (7) for the G rollouts of one prompt -> dict of lists of G, with all parts.

    responses: texts; latents, span_lengths as in Eq. (5) and (6), a list each; verdicts: G of a
    judge's True, False (also where it was not asked) or None (no verdict). Keys: accuracy (-1
    where the repetition score exceeds 0.5), correct (bool), format, repetition, contrastive,
    diversity, total, unjudged (bool). An unjudged rollout has accuracy and total None, correct
    False, and is no neighbour in Eq. (5). Raises ValueError as the parts do.
    """
    G, verdicts = len(responses), verdicts or [False] * len(responses)
    unjudged = [verdict is None for verdict in verdicts]  # deviation 3: not the same as wrong
    repetition = [repetition_score(response) for response in responses]
    correct, accuracy = [False] * G, [None] * G
    judged = [i for i in range(G) if not unjudged[i]]
    for i in judged:
        right = accuracy_reward(responses[i], gold, options) or verdicts[i]
        correct[i] = bool(right) and repetition[i] <= 0.5
        accuracy[i] = float(correct[i]) if repetition[i] <= 0.5 else -1.0

    fmt = [format_reward(response) for response in responses]
    known = [None if u else z for u, z in zip(unjudged, latents)]
    ctr = contrastive_reward(known, correct, weights.tau).tolist()
    div = [diversity_reward(z, lengths) for z, lengths in zip(latents, span_lengths)]
    rewards = dict(contrastive=ctr, diversity=div)
    if rewards.keys() != WEIGHTS.keys():
        raise ValueError(f"rewards {[*rewards]}, but WEIGHTS has those of {[*WEIGHTS]}")
    total = [None] * G
    for i in judged:
        total[i] = 0.9 * accuracy[i] + 0.1 * fmt[i]
        for name, flag in WEIGHTS.items():
            total[i] += getattr(weights, flag) * rewards[name][i]
    parts = dict(accuracy=accuracy, correct=correct, format=fmt, repetition=repetition)
    return dict(parts, **rewards, total=total, unjudged=unjudged)


# what `score_group` gives besides the rewards of WEIGHTS
OF_WORDS = {"accuracy", "correct", "format", "repetition", "total", "unjudged"}


def check_weights(config, taken):
    """Raises ValueError unless each reward has a flag that weighs it, and each flag a reward.

    Otherwise a weight could be accepted and do nothing. Flags of weights are called lambda_*.
    taken: names of other figures of the log, which a reward may not have.
    """
    flags = {name for name in vars(config) if name.startswith("lambda_")}
    for flag in sorted(flags - {*WEIGHTS.values()}):
        raise ValueError(f"{flag} weighs no reward: rewards.WEIGHTS has no entry for it")
    for name, flag in WEIGHTS.items():
        if flag not in flags:
            raise ValueError(f"rewards.WEIGHTS: {name!r} is weighed by {flag}, which is no flag")
        if name in taken | OF_WORDS:
            raise ValueError(f"rewards.WEIGHTS: {name!r} is the name of another figure of the log")
    score_group(["", ""], [None, None], [[], []], "an answer", weights=config)


def span_lengths(tokens, latent_start, latent):
    """Generated ids (a list) -> latents in each span, empty ones too. Source: ours."""
    out = []
    for token in tokens:
        if token == latent_start:
            out.append(0)
        elif token == latent:
            out[-1] += 1
    return out


def ask_judge(judge, responses, rows):
    """The judge's verdict on each response to its row: True, False or None (unjudged). Ours.

    All questions go to the judge in one call. A response that needs no judge gets False, as all do
    without a judge (None).
    """
    asked = {}  # number of the response: question, gold, answer
    for i, (response, row) in enumerate(zip(responses, rows)):
        if judge and needs_judge(response, row.answer, row.options):
            asked[i] = (row.question, row.answer, answer_of(response))
    verdicts = dict(zip(asked, judge(list(asked.values())))) if asked else {}
    return [verdicts.get(i, False) for i in range(len(responses))]
