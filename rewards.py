"""The rewards of LA-DAPO (paper sec. 3.3): pure functions of responses and latents.

    R     = 0.9 R_acc + 0.1 R_fmt + lambda_c R_ctr + lambda_d R_div                     Eq. (7)
    s_ij  = 1/T sum_{t<=T} (1 + <z_i,t , z_j,t>) / 2                                    Eq. (4)
            unit-norm latents, T = min(T_i, T_j)
    R_ctr = exp(s_i+/tau) / ( exp(s_i+/tau) + sum_{j in N_i} exp(s_ij/tau) )            Eq. (5)
    R_div = - 1/(M-1) sum_m cos^2(b_m, b_{m+1})      b_m = mean latent of span m        Eq. (6)

Nothing here knows a model or a file. The judge of open answers lives in common/judge.py.

Where this differs from the paper:
 1. A span needs at least one latent to count for R_fmt: an empty one imagines nothing, and closing
    spans at once would otherwise be the cheapest way to earn the reward.
 2. The judge is asked only where it can change something: the rule said no, there is an answer, the
    response is not repetitive, and the answer is not plainly another option.
Where this differs from the official code:
 3. A judge that fails or mumbles leaves the rollout *unjudged*: no reward, no part in its group.
    Official calls it wrong.
 4. R_ctr and R_div have one flag each; official's documented switch does not turn R_div on.
The edge cases of R_ctr are official's, also where they look odd: they decide whether figures can be
compared.

Axis letters: G rollouts of a group, N latents of a rollout, T latents two rollouts share, D hidden.
"""

import functools
import math
import re

import torch
import torch.nn.functional as F

from common.formats import answer_of
from model import LATENT, LATENT_END, LATENT_START

_START, _LATENT, _END = (re.escape(marker) for marker in (LATENT_START, LATENT, LATENT_END))
_TAG = rf"</?(?:reason|answer)>|{_START}|{_LATENT}|{_END}"
_TEXT = rf"(?:(?!{_TAG}).)*"  # anything that holds no tag and no span marker
_R = rf"<reason>{_TEXT}</reason>\s*"
_A = rf"<answer>{_TEXT}</answer>(?:\s|<\|im_end\|>|<\|endoftext\|>)*"
_L = rf"{_START}(?:\s*{_LATENT})+\s*{_END}\s*"
_FORMAT = re.compile(rf"\s*(?:{_R})?(?:{_L}{_R})+{_A}", re.S)


@functools.lru_cache(maxsize=4096)  # a sure policy repeats itself
def format_reward(response):
    """R_fmt in {0, 1}: the whole response is `R (L R)+ A` or `(L R)+ A`. Source: sec. 3.3.

    R a <reason> block, L a span with its latents, A an <answer> block; white space between blocks
    and chat terminators at the end are allowed, anything else outside a block, or a tag inside one,
    is not.
    """
    return float(_FORMAT.fullmatch(response) is not None)


@functools.lru_cache(maxsize=4096)
def repetition_score(text):
    """How much of a response repeats itself, in [0, 1]: the largest of three shares.

    Source: official.

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
                if (
                    words[i] == words[i + size]
                    and words[i : i + size] == words[i + size : i + 2 * size]
                ):
                    inside.update(range(i, i + 2 * size))
            score = max(score, len(inside) / len(words))
    lines = [line.strip() for line in text.split("\n") if len(line.strip()) > 10]
    if len(lines) >= 3:
        score = max(score, 1 - len(set(lines)) / len(lines))
    return score


def pick(answer, options):
    """An answer's text -> index of the option it means, or None. Source: ours.

    The option's text (any case, outer punctuation ignored), else its letter: "B", "(b)", "B) red".
    A letter counts only if nothing contradicts it: what follows is empty or that option's text.
    """
    if answer is None:
        return None
    texts = [_plain(option) for option in options]
    if _plain(answer) in texts:
        return texts.index(_plain(answer))
    letter = re.match(r"\(?([A-Za-z])(?:[).:]|\s*$)", answer)
    index = ord(letter.group(1).upper()) - 65 if letter else -1
    if not 0 <= index < len(options):
        return None
    return index if _plain(answer[letter.end() :]) in ("", texts[index]) else None


def _plain(text):
    return " ".join(text.lower().split()).strip(" .,:;!?\"'()")


def accuracy_reward(response, gold, options=None):
    """R_acc's rule in {0, 1}: the first <answer> is the gold answer. Source: sec. 3.3.

    Normalised exact match (case, spaces, outer punctuation); with options, gold and answer may each
    be an option's text or letter. Raises ValueError if gold is none of the options.
    """
    answer = answer_of(response)
    if not options:
        return float(answer is not None and _plain(answer) == _plain(gold))
    wanted = pick(gold, options)
    if wanted is None:
        raise ValueError(f"the answer {gold!r} is none of the options {options}")
    return float(pick(answer, options) == wanted)


def similarity(latents):
    """Eq. (4): s_ij, how alike two rollouts imagine -> (g, g) in [0, 1].

    latents: g tensors (N_i, D), none of them empty. Spans are concatenated; compared are the T
    latents that both have, one after another.
    """
    n = torch.tensor([len(z) for z in latents], device=latents[0].device)
    z = torch.nn.utils.rnn.pad_sequence([z.detach().float() for z in latents], True)  # (g, T, D)
    z = F.normalize(z, dim=-1).flatten(1)  # (g, T * D); padding adds 0 to a dot product
    return (1 + z @ z.T / torch.minimum(n[:, None], n[None])) / 2


def contrastive_reward(latents, correct, tau=0.5):
    """Eq. (5): imagine what the group's correct rollouts imagine, not what its wrong ones do ->
    (G,).

    latents: G tensors (N_i, D), or None where there are none; correct: G bools. The edge cases are
    official's: without latents the reward is 0 and the rollout is nobody's neighbour; a group of
    one: 0.
    """
    reward = torch.zeros(len(latents))
    rows = [i for i, z in enumerate(latents) if z is not None and len(z)]
    if len(latents) < 2 or not rows:
        return reward
    s = similarity([latents[i] for i in rows]).tolist()
    right = [bool(correct[i]) for i in rows]
    for a, i in enumerate(rows):
        # P_i: the other correct rollouts; a lone correct one is its own positive
        positives = [s[a][b] for b in range(len(rows)) if right[b] and b != a]
        if right[a] and not positives:
            positives = [1.0]
        # N_i: the wrong ones, i itself too if it is wrong
        negatives = [s[a][b] for b in range(len(rows)) if not right[b]]
        minus = sum(math.exp(s_ij / tau) for s_ij in negatives)
        plus = math.exp(max(positives) / tau) if positives else 1.0  # s_i+; without positives 1
        reward[i] = plus / (plus + minus) if negatives else max(positives) / tau
    return reward


def diversity_reward(latents, span_lengths):
    """Eq. (6): spans should not repeat each other -> float in [-1, 0]. Source: sec. 3.3.

    latents (N, D) or None, all spans one after another; span_lengths: latents in each, empty spans
    are passed over. 0 with fewer than two non-empty spans. Raises ValueError if the lengths do not
    add up to N.
    """
    N = 0 if latents is None else len(latents)
    if sum(span_lengths) != N:
        raise ValueError(f"spans of {span_lengths} latents do not make {N}")
    lengths = [n for n in span_lengths if n]
    if len(lengths) < 2:
        return 0.0
    b = torch.stack([span.mean(0) for span in latents.detach().float().split(lengths)])  # (M, D)
    return -F.cosine_similarity(b[:-1], b[1:], dim=-1).square().mean().item()


def needs_judge(response, gold, options=None):
    """Whether the rule says no and a judge could say otherwise (deviation 2). Source: ours."""
    answer = answer_of(response)
    return bool(
        answer
        and not accuracy_reward(response, gold, options)
        and repetition_score(response) <= 0.5
        and not (options and pick(answer, options) is not None)
    )


def score_group(
    responses,
    latents,
    span_lengths,
    gold,
    options=None,
    verdicts=None,
    *,
    lambda_c=0.2,
    lambda_d=0.1,
    tau=0.5,
):
    """Eq. (7) for the G rollouts of one prompt -> dict of lists of G, with all parts.

    responses: texts; latents, span_lengths as in Eq. (5) and (6), a list each; verdicts: {index:
    True | False | None} for what a judge was asked, None = no verdict. Keys: accuracy (R_acc, -1
    where the repetition score exceeds 0.5), correct (bool), format, repetition, contrastive,
    diversity, total, unjudged (bool). An unjudged rollout has accuracy and total None, correct
    False, and is no neighbour in Eq. (5). Raises ValueError as the parts do.
    """
    verdicts = verdicts or {}
    unjudged = [i in verdicts and verdicts[i] is None for i in range(len(responses))]
    repetition = [repetition_score(r) for r in responses]
    repetitive = [score > 0.5 for score in repetition]
    correct = [
        not u and not rep and bool(accuracy_reward(r, gold, options) or verdicts.get(i))
        for i, (r, rep, u) in enumerate(zip(responses, repetitive, unjudged))
    ]
    accuracy = [
        None if u else -1.0 if rep else float(c) for u, rep, c in zip(unjudged, repetitive, correct)
    ]
    fmt = [format_reward(r) for r in responses]
    ctr = contrastive_reward(
        [None if u else z for u, z in zip(unjudged, latents)], correct, tau
    ).tolist()
    div = [diversity_reward(z, n) for z, n in zip(latents, span_lengths)]
    total = [
        None if a is None else 0.9 * a + 0.1 * f + lambda_c * c + lambda_d * d
        for a, f, c, d in zip(accuracy, fmt, ctr, div)
    ]
    return dict(
        accuracy=accuracy,
        correct=correct,
        format=fmt,
        repetition=repetition,
        contrastive=ctr,
        diversity=div,
        total=total,
        unjudged=unjudged,
    )


def span_lengths(tokens, latent_start, latent):
    """Generated ids (a list) -> latents in each span, empty ones too. Source: ours."""
    out = []
    for token in tokens:
        if token == latent_start:
            out.append(0)
        elif token == latent:
            out[-1] += 1
    return out


def score(texts, rollout, rows, config, judge=None, **weights):
    """Rewards of a batch of rollouts, the same number for each row of data -> [dict of
    `score_group`, one a row]. Eq. (7).

    texts: the responses; rollout: latent_decode's; config: the model's, for its span tokens; judge:
    a `Judge`, asked once for all that it is needed for; weights: of `score_group`.
    """
    G = len(texts) // len(rows)
    of_row = [slice(k * G, (k + 1) * G) for k in range(len(rows))]
    verdicts = [{} for _ in rows]
    if judge:
        places, questions = [], []
        for k, row in enumerate(rows):
            for i, text in enumerate(texts[of_row[k]]):
                if needs_judge(text, row.answer, row.options):
                    places.append((k, i))
                    questions.append((row.question, row.answer, answer_of(text)))
        for (k, i), verdict in zip(places, judge(questions)):
            verdicts[k][i] = verdict

    lengths, ids = rollout.lengths.tolist(), (config.latent_start_id, config.latent_id)
    spans = [span_lengths(t[:n], *ids) for t, n in zip(rollout.tokens.tolist(), lengths)]
    return [
        score_group(
            texts[own], rollout.latents[own], spans[own], row.answer, row.options, asked, **weights
        )
        for own, row, asked in zip(of_row, rows, verdicts)
    ]
