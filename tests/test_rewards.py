"""Every reward against hand numbers or a slow loop written from its equation, and the judge
against a real HTTP server.
"""

import json
import math
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from common.formats import answer_of
from common.judge import JUDGE_PROMPT, Judge, read_verdict
from rewards import (
    Weights,
    accuracy_reward,
    contrastive_reward,
    diversity_reward,
    format_reward,
    needs_judge,
    pick,
    repetition_score,
    score_group,
    span_likeness,
)

S, Z, E_ = "<|latent_start|>", "<|latent|>", "<|latent_end|>"
L = S + Z * 2 + E_
R, A = "<reason>the ball goes left</reason>", "<answer>red wall</answer>"
OPTIONS = ["red wall", "green wall", "blue wall", "yellow wall"]
E1, E2 = [1.0, 0.0], [0.0, 1.0]
e = math.e


def words(n, start=0):
    return [f"w{i}" for i in range(start, start + n)]


def vectors(*rows):
    return torch.tensor(rows)  # (N, D)


# -------------------------------------------------------------------------------- format and answer


@pytest.mark.parametrize(
    "response",
    [
        R + L + R + A,
        L + R + A,
        R + L + R + L + R + A,
        L + R + L + R + L + R + A,
        f"\n{R}\n{L}\n\n{R} \t\n{A}\n",
        R + L + R + A + "<|im_end|>",
        R + L + R + A + "<|im_end|>\n<|endoftext|><|endoftext|>",
        R + L + R + A + " <|im_end|> ",
        R + f"{S}\n{Z}\n{Z}\n{E_}" + R + A,
        L + "<reason>two\nlines, 3 < 4</reason>" + A,
        S + Z + E_ + R + A,
        R + L + R + "<answer>B\n</answer>",
    ],
)
def test_format_accepts(response):
    """Breaks if one of the two forms, white space between blocks or a chat terminator at the end
    is refused.
    """
    assert format_reward(response) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        " ",
        "<|im_end|>",
        "red",
        A,
        R,
        R + A,
        R + R + A,
        L,
        L + A,
        R + L + A,
        R + L,  # no span, or no reason after it
        R + S + E_ + R + A,
        R + S + " " + E_ + R + A,
        R + L + R + S + E_ + R + A,  # an empty span
        R + L + Z + R + A,
        R + L + R + S + A,
        R + L + E_ + R + A,
        Z + L + R + A,
        R + L + R + A + Z,  # a stray marker
        R + Z * 2 + R + A,
        R + S + L + R + A,
        R + S + Z + R + A,
        R + Z + E_ + R + A,  # a span opened twice, never closed, never opened
        L + f"<reason>x {Z} y</reason>" + A,
        L + f"<reason>x {L}</reason>" + A,  # inside a block
        L + R + f"<answer>{L}red</answer>",
        L + "<reason>a<reason>b</reason>" + A,
        L + "<reason>a<reason>b</reason></reason>" + A,
        L + "<reason>a</reason></reason>" + A,
        L + R + "<answer>a<answer>b</answer>",
        L + "<reason>a <answer>b</answer></reason>" + A,
        S + Z + " x " + Z + E_ + R + A,
        "So: " + R + L + R + A,
        R + "so" + L + R + A,
        R + L + "so" + R + A,
        R + L + R + "so" + A,  # text outside
        R + L + R + A + "so",
        R + L + R + A + "<|im_end|>so",
        "<|im_end|>" + L + R + A,
        R + "<|im_end|>" + L + R + A,  # a terminator elsewhere
        R + L + R + A + A,
        R + A + L + R + A,
        R + L + R + "<answer>red",
        R + L + R + "red</answer>",
        R + L + R + "<answer>",
        L + "<reason>a" + A,
        R + L + R,
        A + R + L + R,
        R + L + A + R,
        L + R + R + A,
        R + R + L + R + A,  # wrong order
        L + L + R + A,
        (R + L + R + A) * 2,
        R + L + R + A.upper(),
        "<think>x</think>" + L + R + A,
    ],
)
def test_format_refuses(response):
    """Breaks if anything but the two forms is paid for: each string is one step away from a right
    one.
    """
    assert format_reward(response) == 0.0


def test_repetition_of_4_grams_by_hand():
    """Breaks if n-grams are not of four words: 'a b' five times has 7 of them, 2 distinct."""
    assert repetition_score("a b " * 5) == pytest.approx(5 / 7)
    assert repetition_score("no no no no no") == pytest.approx(1 / 2)
    assert repetition_score("a b c x a b c y") == 0.0  # a 3-gram twice is nothing
    assert repetition_score("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition_score("a A a A a") == pytest.approx(
        0.0
    )  # words count as they are written: two different 4-grams
    for text in ("", " \n ", "no no no", L + R[:8], "<|im_end|>"):
        assert repetition_score(text) == 0.0


@pytest.mark.parametrize(
    "text, score",
    [
        (
            words(25) + words(25, 50) * 2 + words(25, 100),
            50 / 100,
        ),  # 25 twice in 100 words; of 97 4-grams 22 come again
        (
            words(24) + words(25, 50) * 2 + words(25, 100),
            22 / 96,
        ),  # 99 words: only the 4-grams count
        (
            words(25) + words(25, 50) * 3,
            75 / 100,
        ),  # three in a row cover 75; no block of 50 comes twice
        (words(50) * 2, 1.0),  # 50 twice, no block of 25 back to back
        (words(50) * 2 + words(100, 50), 100 / 200),
        (
            words(50) + words(1, 60) + words(50),
            47 / 98,
        ),  # 101 words, not back to back: 47 of 98 4-grams come again
        (words(49) * 2 + words(2, 60), 46 / 97),  # a block of 49 is neither 50 nor 25
        (words(5) * 20, 1.0),
        (words(120), 0.0),
        (words(25) * 2 + words(50, 100) + words(25, 200) * 2, 100 / 150),
    ],
)  # two places count together
def test_repetition_of_blocks_by_hand(text, score):
    """Breaks if the block share counts below 100 words, other block sizes, blocks apart, or
    characters instead of words.
    """
    assert repetition_score(" ".join(text)) == pytest.approx(score)


def test_repetition_of_lines_by_hand():
    """Breaks if lines of 10 characters count, if two lines are enough, or if the outer space of a
    line does.
    """
    eleven = "ball hits a"
    # Three lines of three words: 6 4-grams, 3 distinct (0.5); lines 3, 1 distinct (2/3).
    assert repetition_score("\n".join([eleven] * 3)) == pytest.approx(2 / 3)
    assert repetition_score(
        "\n".join([eleven, "  " + eleven + " ", "\t" + eleven, ""])
    ) == pytest.approx(2 / 3)
    one_word = [
        "elevenchars",
        "elevenchars",
        "anotherword",
    ]  # no 4-gram at all: only the lines speak
    assert repetition_score("\n".join(one_word)) == pytest.approx(1 / 3)
    assert repetition_score("\n".join(one_word[:2])) == 0.0
    for line in ("tencharact", " tencharact "):
        assert repetition_score("\n".join([line] * 3)) == 0.0
    assert (
        repetition_score("\n\n".join(["elevenchars"] * 2 + ["tencharact"])) == 0.0
    )  # two lines over 10 characters
    # The largest: of 4 lines 1 comes again, of 6 4-grams 1.
    assert repetition_score("a b a b a b\n" + "\n".join(one_word)) == pytest.approx(1 / 4)


def test_repetition_leaves_tags_and_markers_out():
    """Breaks if latents count as repeated words: spans of any length leave the score as it was,
    also glued to words.
    """
    plain = "the ball goes left and then up"
    assert (
        repetition_score(
            f"<reason>{plain}</reason>{S}{Z * 200}{E_}<reason>so it is</reason><answer>red</answer>"
        )
        == 0.0
    )
    assert (
        repetition_score(
            " ".join([S, *[Z] * 200, E_]) + plain + "<|im_end|>" * 50 + "<|endoftext|>" * 50
        )
        == 0.0
    )
    assert repetition_score(f"a{Z}b{Z}" * 5) == pytest.approx(
        5 / 7
    )  # ten words, as 'a b' five times
    tags = "<reason>a b</reason><answer>a b</answer>"
    assert repetition_score(tags + tags + "<reason>a b</reason>") == pytest.approx(5 / 7)
    assert repetition_score(f"{Z}{Z}{Z}\n" * 5) == 0.0  # no line is left of a line of markers


def test_answer_of():
    """Breaks if the last answer counts, an unclosed one is taken, or the line breaks end it."""
    assert answer_of("<answer>\n red \n</answer><answer>blue</answer>") == "red"
    assert answer_of("<answer>a\nb</answer>") == "a\nb" and answer_of("<answer></answer>") == ""
    assert answer_of("red") is None and answer_of("") is None and answer_of("<answer>red") is None
    assert answer_of("red</answer><answer>blue</answer>") == "blue"


@pytest.mark.parametrize(
    "answer, index",
    [
        ("A", 0),
        ("d", 3),
        ("(b)", 1),
        ("b)", 1),
        ("C.", 2),
        ("C: red wall", None),
        ("B) green wall", 1),
        ("B. whatever", None),
        ("B. green wall.", 1),
        ("C. is wrong, the answer is D", None),
        ("A) or B)", None),
        ("B ", 1),
        ("GREEN   Wall!", 1),
        ("'blue wall.'", 2),
        ("E", None),
        ("z)", None),
        ("1", None),
        ("", None),
        (None, None),
        ("Blue", None),
        ("a red thing", None),
        ("A red wall", None),
        ("Bad", None),
        ("not B", None),
    ],
)
def test_pick(answer, index):
    """Breaks if a word's first letter counts as an option, a letter beyond the options does, or a
    text is not normalised.
    """
    assert pick(answer, OPTIONS) == index


def test_pick_prefers_text_to_letter():
    """Breaks if an option that is itself a letter is read as the letter of another."""
    assert (
        pick("B", ["B", "A"]) == 0
        and pick("a.", ["B", "A"]) == 1
        and pick("C", ["B", "A", "x"]) == 2
    )


@pytest.mark.parametrize(
    "answer, gold, options, right",
    [
        ("red wall", "red wall", None, 1),
        (" RED\n wall.", "Red  Wall", None, 1),
        ("(red wall)", '"red wall"', None, 1),
        ("red walls", "red wall", None, 0),
        ("the red wall", "red wall", None, 0),
        ("", "red wall", None, 0),
        ("A", "red wall", None, 0),
        ("A", "A", OPTIONS, 1),
        ("A", "red wall", OPTIONS, 1),
        ("Red wall.", "A", OPTIONS, 1),
        ("(a) red wall", "Red Wall", OPTIONS, 1),
        ("B", "red wall", OPTIONS, 0),
        ("green wall", "A", OPTIONS, 0),
        ("red", "A", OPTIONS, 0),
        ("", "A", OPTIONS, 0),
        ("E", "A", OPTIONS, 0),
        ("D", "D", OPTIONS, 1),
    ],
)
def test_accuracy(answer, gold, options, right):
    """Breaks if letter and text are not one, an answer that is no option counts, or the last
    option is lost.
    """
    assert accuracy_reward(f"<reason>B</reason><answer>{answer}</answer>", gold, options) == right


def test_accuracy_takes_the_first_answer():
    """Breaks if any of several answers may be right, or an answer without its tag counts."""
    assert accuracy_reward("<answer>blue</answer><answer>red</answer>", "red") == 0
    assert accuracy_reward("<answer>red</answer><answer>blue</answer>", "red") == 1
    for response in ("red", "<answer>red", "red</answer>", "", "<reason>red</reason>"):
        assert (
            accuracy_reward(response, "red") == 0
            and accuracy_reward(response, "red", ["red", "blue"]) == 0
        )


@pytest.mark.parametrize("gold", ["E", "purple wall", "", "red"])
def test_a_gold_that_is_no_option_is_an_error(gold):
    """Breaks if a faulty row gives every rollout 0 (or, None being None, 1 to a wrong answer) in
    silence.
    """
    for response in (A, "<answer>purple</answer>", "none"):
        with pytest.raises(ValueError, match="none of the options"):
            accuracy_reward(response, gold, OPTIONS)


# ----------------------------------------------------------------------------------- latent rewards


def slow_contrastive(latents, correct, tau):
    """Eq. (4)-(5) pair by pair in float64, with the edge cases of the official code one by one.

    latents: lists of (N, D) arrays or None.
    """
    there = [i for i, z in enumerate(latents) if z is not None and len(z)]

    def s(i, j):
        T = min(len(latents[i]), len(latents[j]))
        total = 0.0
        for t in range(T):
            a, b = np.asarray(latents[i][t], np.float64), np.asarray(latents[j][t], np.float64)
            total += (
                1 + float(np.dot(a, b)) / math.sqrt(np.dot(a, a)) / math.sqrt(np.dot(b, b))
            ) / 2
        return total / T

    rewards = []
    for i in range(len(latents)):
        positives = [s(i, j) for j in there if j != i and correct[j]] if i in there else []
        negatives = [math.exp(s(i, j) / tau) for j in there if not correct[j]] if i in there else []
        if i not in there or len(latents) == 1:
            rewards.append(0.0)
        elif not positives and not correct[i]:
            rewards.append(1 / (1 + sum(negatives)))
        else:
            plus = max(positives) if positives else 1.0
            rewards.append(
                math.exp(plus / tau) / (math.exp(plus / tau) + sum(negatives))
                if negatives
                else plus / tau
            )
    return rewards


def ctr(latents, correct, tau=0.5):
    return contrastive_reward(latents, correct, tau).tolist()


def test_contrastive_by_hand():
    """Breaks if a wrong rollout is not its own negative, a right one its own positive, or the
    maximum is a mean.

    tau 0.5: exp(s/tau) is e^2 for equal, e for orthogonal, 1 for opposite latents.
    """
    latents = [vectors(E1), vectors(E2), vectors(E1), vectors([-1.0, 0.0])]
    assert ctr(latents, [True, True, False, False]) == pytest.approx(
        [e / (e + e**2 + 1), e / (e + e + e), e**2 / (e**2 + e**2 + 1), e / (e + 1 + e**2)],
        abs=1e-5,
    )


def test_contrastive_takes_the_shared_length():
    """Breaks if the longer length divides, padding counts as latents, or latents are paired from
    the end.
    """
    a, b, c = vectors(E1, E2, E2), vectors(E1), vectors(E2, E2)
    # s(a, b) = 1 over one latent; s(a, c) = (0.5 + 1) / 2; s(b, c) = 0.5 over one.
    ac, bc = math.exp(0.75 / 0.5), math.exp(0.5 / 0.5)
    assert ctr([a, b, c], [True, True, False]) == pytest.approx(
        [e**2 / (e**2 + ac), e**2 / (e**2 + bc), ac / (ac + e**2)], abs=1e-5
    )


@pytest.mark.parametrize("tau", [0.5, 1.0, 0.1])
def test_contrastive_edge_cases_by_hand(tau):
    """Breaks if one of the official edge cases of Eq. (5) is another, or tau does not
    divide.
    """

    def x(s):
        return math.exp(s / tau)

    one, two, opposite = vectors(E1), vectors(E2), vectors([-1.0, 0.0])
    near = dict(rel=1e-4, abs=1e-7)
    assert ctr([one], [True], tau) == ctr([one], [False], tau) == [0.0]  # a group of one
    assert ctr([one, two, one], [True] * 3, tau) == pytest.approx(
        [1 / tau, 0.5 / tau, 1 / tau], **near
    )  # no negatives
    # Lone correct: its own positive, s+ = 1; for the wrong ones it is the only positive.
    assert ctr([one, two, opposite], [True, False, False], tau) == pytest.approx(
        [
            x(1) / (x(1) + x(0.5) + x(0)),
            x(0.5) / (x(0.5) + x(1) + x(0.5)),
            x(0) / (x(0) + x(0.5) + x(1)),
        ],
        **near,
    )
    # All wrong: no positives, 1 / (1 + sum), i itself in the sum.
    assert ctr([one, two, opposite], [False] * 3, tau) == pytest.approx(
        [
            1 / (1 + x(1) + x(0.5) + x(0)),
            1 / (1 + x(0.5) + x(1) + x(0.5)),
            1 / (1 + x(0) + x(0.5) + x(1)),
        ],
        **near,
    )


def test_contrastive_default_tau():
    """Breaks if the default is not the paper's 0.5."""
    assert contrastive_reward([vectors(E1), vectors(E2)], [True, True]).tolist() == pytest.approx(
        [1.0, 1.0]
    )


@pytest.mark.parametrize("gone", [None, torch.zeros(0, 2)])
def test_contrastive_without_latents(gone):
    """Breaks if a rollout without latents gets a reward, serves as positive or negative, or
    breaks the others' batch.
    """
    one, two = vectors(E1), vectors(E2)
    assert (
        ctr([gone, gone], [True, False]) == [0.0, 0.0]
        and ctr([gone], [True]) == [0.0]
        and ctr([], []) == []
    )
    # The other correct one has no latents: the first is a lone correct. No negative without latents
    # counts.
    assert ctr([one, gone, two], [True, True, False]) == pytest.approx(
        [e**2 / (e**2 + e), 0, e / (e + e**2)], abs=1e-5
    )
    assert ctr([gone, one, two], [False, True, True]) == pytest.approx(
        [0, 1, 1], abs=1e-5
    )  # no negatives left: s+ / tau
    assert ctr([gone, one], [True, False]) == pytest.approx(
        [0, 1 / (1 + e**2)], abs=1e-5
    )  # no positives left
    assert ctr([one, gone], [True, False]) == pytest.approx(
        [2, 0], abs=1e-5
    )  # lone correct, no negatives: 1 / tau


@pytest.mark.parametrize("seed", range(20))
def test_contrastive_equals_the_slow_loop(seed):
    """Breaks if the padded matrix form differs from Eq. (4)-(5) pair by pair, for any lengths,
    gaps, verdicts and tau.
    """
    rng = np.random.default_rng(seed)
    G = int(rng.integers(1, 9))
    latents = [
        rng.normal(size=(int(n), 5)).astype(np.float32) * 10 ** rng.uniform(-3, 3)
        if n >= 0
        else None
        for n in rng.integers(-1, 7, G)
    ]
    correct = [bool(c) for c in rng.random(G) < rng.choice([0.0, 0.2, 0.5, 0.8, 1.0])]
    tau = float(rng.choice([0.1, 0.5, 2.0]))
    torch_latents = [None if z is None else torch.from_numpy(z) for z in latents]
    found = contrastive_reward(torch_latents, correct, tau)
    assert found.shape == (G,) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(
        slow_contrastive(latents, correct, tau), rel=1e-4, abs=1e-6
    )


def test_contrastive_ignores_lengths_of_vectors():
    """Breaks if latents are not brought to unit norm one by one: any scale of any latent leaves
    the rewards as they were.
    """
    torch.manual_seed(0)
    latents = [torch.randn(n, 6) for n in (3, 1, 4, 2, 3)]
    correct = [True, False, True, False, True]
    scaled = [z * torch.logspace(-4, 4, len(z) + 1)[1:, None] for z in latents]
    assert ctr(scaled, correct) == pytest.approx(ctr(latents, correct), abs=1e-5)
    assert ctr([z * 1e6 for z in latents], correct) == pytest.approx(
        ctr(latents, correct), abs=1e-5
    )
    turned = latents[:1] + [-z for z in latents[1:]]
    assert ctr(turned, correct) != pytest.approx(ctr(latents, correct), abs=1e-3)


def test_contrastive_stays_finite():
    """Breaks if a zero latent gives NaN (s = 0.5 with all), or a reward alters latents."""
    assert ctr([torch.zeros(1, 2), vectors(E1)], [True, True]) == pytest.approx([1, 1])
    z = torch.randn(3, 4)
    before = z.clone()
    contrastive_reward([z, z * 2, z[:1]], [True, False, True])
    assert torch.equal(z, before)
    half = contrastive_reward([z.detach().bfloat16(), z[:1].detach().bfloat16()], [True, False])
    assert half.dtype == torch.float32
    z16 = z.detach().bfloat16().float()
    assert half.tolist() == pytest.approx(
        slow_contrastive([z16.numpy(), z16[:1].numpy()], [True, False], 0.5), abs=1e-5
    )


@pytest.mark.parametrize(
    "latents, lengths, reward",
    [
        ([E1, E2], [1, 1], 0.0),
        ([E1, E1], [1, 1], -1.0),
        ([E1, [-3.0, 0.0]], [1, 1], -1.0),  # orthogonal, parallel, opposed
        ([E1, [1.0, 1.0]], [1, 1], -0.5),
        ([E1, [1.0, 3.0**0.5]], [1, 1], -0.25),  # 45 and 60 degrees: cos^2
        ([E1, E1, E2], [1, 1, 1], -0.5),
        ([E1, E2, E1], [1, 1, 1], 0.0),  # neighbours only: the first and last are equal
        # Means (2, 0), (1, 1), (0, 3): twice 45 degrees, so cos^2 is 0.5 twice.
        ([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]], [2, 1, 3], -0.5),
        # Raw mean of (3, 0) and (0, 1) is (1.5, 0.5): cos^2 with (1, 0) is 2.25 / 2.5. Of unit
        # vectors it would be 0.5.
        ([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [2, 1], -0.9),
        ([E1, E1], [1, 0, 1], -1.0),
        ([E1, E1], [0, 1, 0, 0, 1, 0], -1.0),
        ([E1, E1, E2], [1, 0, 1, 1], -0.5),  # empty ones passed over
        ([E1, E1], [2], 0.0),
        ([E1, E1], [0, 2, 0], 0.0),
        ([[1.0, 0.0], [-1.0, 0.0], E1], [2, 1], 0.0),
    ],
)  # one span; a mean of zero
def test_diversity_by_hand(latents, lengths, reward):
    """Breaks if cos is not squared, spans are cut elsewhere, unit vectors are averaged, or all
    pairs count.
    """
    found = diversity_reward(torch.tensor(latents), lengths)
    assert isinstance(found, float) and found == pytest.approx(reward, abs=1e-6)


def test_diversity_without_latents_or_with_wrong_lengths():
    """Breaks if nothing imagined is an error, or lengths that do not fit are cut to fit."""
    for none in (None, torch.zeros(0, 2)):
        assert (
            diversity_reward(none, [])
            == diversity_reward(none, [0])
            == diversity_reward(none, [0, 0])
            == 0.0
        )
        with pytest.raises(ValueError, match="do not make 0"):
            diversity_reward(none, [1])
    for lengths in ([1, 1], [2, 2], [], [3, 1], [1]):
        with pytest.raises(ValueError, match="do not make 3"):
            diversity_reward(torch.ones(3, 2), lengths)


def slow_likeness(z, lengths):
    """The mean of cos^2 of Eq. (6), float64 numpy."""
    ends = np.cumsum(lengths)
    b = [z[end - n : end].mean(0) for n, end in zip(lengths, ends) if n]
    squares = [(x @ y) ** 2 / (x @ x) / (y @ y) for x, y in zip(b[:-1], b[1:])]
    return float(np.mean(squares))


@pytest.mark.parametrize("correct", [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
def test_gradients_equal_finite_differences(correct):
    """Breaks if a similarity or a mean is taken out of the graph, or the reward is cut to fp32."""
    generator = torch.Generator().manual_seed(3)
    sizes = (4, 2, 5, 3)
    leaf = torch.randn(sum(sizes), 6, dtype=torch.float64, generator=generator, requires_grad=True)
    lengths = [2, 0, 4, 5, 3]

    def slow(z):
        parts = np.split(z.numpy(), np.cumsum(sizes)[:-1])
        return sum(slow_contrastive(parts, correct, 0.5)) + slow_likeness(z.numpy(), lengths)

    reward = contrastive_reward(leaf.split(sizes), correct).sum() + span_likeness(leaf, lengths)
    assert reward.item() == pytest.approx(slow(leaf.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(reward, leaf)
    for _ in range(4):
        step = torch.randn(leaf.shape, dtype=torch.float64, generator=generator) * 1e-6
        difference = (slow(leaf.detach() + step) - slow(leaf.detach() - step)) / 2
        assert (gradient * step).sum().item() == pytest.approx(difference, rel=1e-6)


# ------------------------------------------------------------------------------------------ Eq. (7)

GOOD, BAD = R + L + R + "<answer>red wall</answer>", R + L + R + "<answer>blue wall</answer>"
# no span: R_fmt 0; the rule says no
LOOSE = "<reason>I look at it</reason><answer>the wall in red</answer>"
LOOP = "<reason>" + "up and up and " * 20 + "</reason>" + L + R + "<answer>red wall</answer>"


def test_total_by_hand():
    """Breaks if a weight of Eq. (7) is another, or a part goes to another rollout."""
    latents = [vectors(E1, E1), vectors(E1, E2), None]
    found = score_group([GOOD, BAD, LOOSE], latents, [[1, 1], [1, 1], []], "red wall")
    # s_01 = (1 + 0.5) / 2; rollout 0 is the lone correct one, s+ = 1; rollout 1 is its own
    # negative.
    c0, c1 = e**2 / (e**2 + e**1.5), e**1.5 / (e**1.5 + e**2)
    assert found["contrastive"] == pytest.approx([c0, c1, 0], abs=1e-5)
    assert found["diversity"] == pytest.approx([-1, 0, 0]) and found["format"] == [1, 1, 0]
    assert found["repetition"] == pytest.approx(
        [3 / 21, 3 / 21, 0]
    )  # the two equal reasons: 3 of 21 4-grams come again
    assert (
        found["accuracy"] == [1, 0, 0]
        and found["correct"] == [True, False, False]
        and found["unjudged"] == [False] * 3
    )
    assert found["total"] == pytest.approx(
        [0.9 + 0.1 + 0.2 * c0 - 0.1, 0.1 + 0.2 * c1, 0], abs=1e-5
    )
    assert set(found) == {
        "accuracy",
        "correct",
        "format",
        "repetition",
        "contrastive",
        "diversity",
        "total",
        "unjudged",
    }
    other = score_group(
        [GOOD, BAD, LOOSE],
        latents,
        [[1, 1], [1, 1], []],
        "red wall",
        weights=Weights(lambda_c=0.0, lambda_d=3.0),
    )
    assert other["total"] == pytest.approx([1 - 3, 0.1, 0], abs=1e-5)
    warm = score_group(
        [GOOD, BAD, LOOSE], latents, [[1, 1], [1, 1], []], "red wall", weights=Weights(tau=1.0)
    )
    assert warm["contrastive"] == pytest.approx(
        [e / (e + e**0.75), e**0.75 / (e**0.75 + e), 0], abs=1e-5
    )
    json.dumps(found)  # plain numbers: they go to a log


def test_total_with_options():
    """Breaks if the options do not reach the rule."""
    found = score_group([BAD, GOOD, R + "<answer>A</answer>"], [None] * 3, [[]] * 3, "A", OPTIONS)
    assert found["accuracy"] == [0, 1, 1] and found["total"] == pytest.approx([0.1, 1.0, 0.9])
    with pytest.raises(ValueError, match="none of the options"):
        score_group([GOOD], [None], [[]], "purple wall", OPTIONS)
    with pytest.raises(ValueError, match="do not make"):
        score_group([GOOD], [vectors(E1)], [[2]], "red wall")


def test_repetitive_is_minus_one_and_wrong():
    """Breaks if a repetitive rollout with the right answer is paid, a judge can save it, or Eq.
    (5) takes it for right.
    """
    latents = [vectors(E1), vectors(E1), vectors(E2)]
    assert (
        repetition_score(LOOP) > 0.5
        and format_reward(LOOP) == 1
        and accuracy_reward(LOOP, "red wall") == 1
    )
    for verdicts in (None, [False, True, False]):
        found = score_group([GOOD, LOOP, GOOD], latents, [[1]] * 3, "red wall", verdicts=verdicts)
        assert found["accuracy"] == [1, -1, 1] and found["correct"] == [True, False, True]
        # The repetitive one is the only negative: as close as can be to the first, and to itself.
        c = [e / (e + e**2), e**2 / (e**2 + e**2), e / (e + e)]
        assert found["contrastive"] == pytest.approx(c, abs=1e-5)
        assert found["total"] == pytest.approx(
            [1 + 0.2 * c[0], -0.9 + 0.1 + 0.2 * c[1], 1 + 0.2 * c[2]], abs=1e-5
        )
    half = "no no no no no <answer>red</answer>"  # words: no x 5, red: 3 4-grams, 2 distinct
    exactly = "x x x x x"
    assert repetition_score(half) == pytest.approx(1 / 3) and repetition_score(exactly) == 0.5
    assert score_group([exactly], [None], [[]], "red")["accuracy"] == [
        0
    ]  # 0.5 itself is not over 0.5


def test_verdicts():
    """Breaks if a yes does not count as right everywhere, a no undoes the rule, or no verdict is
    taken for wrong.
    """
    latents = [vectors(E1), vectors(E2), vectors(E1), vectors([-1.0, 0.0]), vectors([1.0, 1.0])]
    responses, spans = [GOOD, LOOSE, LOOSE, LOOSE, BAD], [[1]] * 5
    found = score_group(
        responses, latents, spans, "red wall", verdicts=[False, True, False, None, False]
    )
    assert found["accuracy"] == [1, 1, 0, None, 0] and found["correct"] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert found["unjudged"] == [False, False, False, True, False]
    # As if rollout 3 had no latents: Eq. (5) over 0 and 1 (right), 2 and 4 (wrong; 4 is at 45
    # degrees of both axes).
    h = math.exp((1 + 0.5**0.5) / 2 / 0.5)
    c = [e / (e + e**2 + h), e / (e + e + h), e**2 / (e**2 + e**2 + h), 0, h / (h + h + e**2)]
    assert found["contrastive"] == pytest.approx(c, abs=1e-5)
    assert found["total"][3] is None
    assert found["total"][:3] + found["total"][4:] == pytest.approx(
        [1 + 0.2 * c[0], 0.9 + 0.2 * c[1], 0.2 * c[2], 0.1 + 0.2 * c[4]], abs=1e-5
    )
    latents[3], spans[3] = None, []
    missing = score_group(
        responses, latents, spans, "red wall", verdicts=[False, True, *[False] * 3]
    )
    assert missing["contrastive"] == pytest.approx(found["contrastive"], abs=1e-6)
    assert missing["accuracy"] == [1, 1, 0, 0, 0]  # without a judge the rule's no stands
    assert score_group([GOOD], [None], [[]], "red wall", verdicts=[False])["accuracy"] == [
        1
    ]  # the rule said yes first


def test_unjudged_is_never_correct():
    """Breaks if a rollout without verdict is listed as correct while it has no accuracy, as the
    docstring promises.
    """
    for response in (LOOSE, LOOP, GOOD):
        found = score_group(
            [response, GOOD], [vectors(E1)] * 2, [[1]] * 2, "red wall", verdicts=[None, False]
        )
        assert [found[k][0] for k in ("accuracy", "total", "correct", "unjudged")] == [
            None,
            None,
            False,
            True,
        ]
        assert found["contrastive"][0] == 0 and found["accuracy"][1] == 1


@pytest.mark.parametrize(
    "response, options, ask",
    [
        ("<answer>the wall in red</answer>", None, True),
        ("<answer>blue wall</answer>", None, True),
        ("<answer>red wall</answer>", None, False),
        ("<answer>Red wall.</answer>", None, False),  # the rule says yes
        ("red wall", None, False),
        ("<answer></answer>", None, False),
        ("<answer> </answer>", None, False),
        ("<answer>red", None, False),
        (
            "<reason>" + "up " * 20 + "</reason><answer>the wall in red</answer>",
            None,
            False,
        ),  # repetitive
        ("<answer>the wall in red</answer>", OPTIONS, True),
        ("<answer>E</answer>", OPTIONS, True),
        ("<answer>A</answer>", OPTIONS, False),
        ("<answer>B</answer>", OPTIONS, False),
        ("<answer>blue wall</answer>", OPTIONS, False),
        ("<answer>the wall in red</answer><answer>red wall</answer>", None, True),
    ],
)
def test_needs_judge(response, options, ask):
    """Breaks if a judge is asked where it can change nothing, or not asked where the rule may be
    too strict.
    """
    assert needs_judge(response, "red wall", options) is ask


def test_needs_judge_refuses_a_gold_that_is_no_option():
    """Breaks if a faulty row goes to the judge instead of being named."""
    with pytest.raises(ValueError, match="none of the options"):
        needs_judge("<answer>the wall in red</answer>", "purple wall", OPTIONS)


# -------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("yes", True),
        ("Yes.", True),
        ("**YES**", True),
        ("no", False),
        ("No, it is not.", False),
        ("yes yes", True),
        ("yes and no", None),
        ("", None),
        (None, None),
        ("maybe", None),
        ("I know nothing", None),
        ("yesterday", None),
        ("none", None),
        ("<think>no</think> yes", True),
        ("<think>\nyes, or\nno?</think>\n\nno", False),
        ("<think>yes</think>", None),
        ("<think>no</think><think>no</think>yes", True),
        ("<think>is it yes", None),
        ("<think>no</think><think>yes", None),  # cut off while thinking: no verdict yet
        ("is it no or yes?\n</think>\n\nno", False),
        ("no\n</think> yes", True),
    ],
)  # templates that open <think> in the prompt
def test_read_verdict(reply, verdict):
    """Breaks if a word inside a word counts, thinking aloud is read, or both words make a
    verdict.
    """
    assert read_verdict(reply) is verdict


KEY = "sk-secret-0123456789abcdef"
ITEM = ("which wall?", "red wall", "the wall in red")


def chat(content):
    return 200, dict(
        id="x",
        object="chat.completion",
        created=0,
        model="m",
        choices=[
            dict(index=0, finish_reason="stop", message=dict(role="assistant", content=content))
        ],
    )


class Server:
    """A chat completions server: reply(candidate, n-th request of it, headers) -> (status, body)
    or None, which stalls.
    """

    def __init__(self, reply):
        self.requests, self.now, self.most, self.lock, self.over = (
            [],
            0,
            0,
            threading.Lock(),
            threading.Event(),
        )
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                candidate = json.loads(body["messages"][-1]["content"])["candidate"]
                with outer.lock:
                    nth = sum(r[0] == candidate for r in outer.requests)
                    outer.requests.append((candidate, self.path, body, self.headers))
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                found = reply(candidate, nth, self.headers)
                with outer.lock:
                    outer.now -= 1
                if found is None:
                    outer.over.wait(10)
                    return
                status, content = found
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header(
                    "Content-Type", "text/html" if raw.startswith(b"<") else "application/json"
                )
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        class Quick(ThreadingHTTPServer):
            request_queue_size = 64

        self.http = Quick(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def ask(monkeypatch):
    """ask(reply, **settings of Judge) -> (server, judge), with a key, small waits and no proxy in
    between.
    """
    servers = []
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "OPENAI_API_KEY",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)

    def start(reply, **more):
        servers.append(Server(reply))
        settings = dict(retries=2, timeout=5.0, backoff=0.005, concurrency=4)
        return servers[-1], Judge(servers[-1].url, "m", **{**settings, **more})

    yield start
    for server in servers:
        server.close()


def test_judge_asks_and_reads(ask):
    """Breaks if the question, reference or candidate is not sent as data, or a verdict is turned
    round.
    """
    server, judge = ask(
        lambda candidate, nth, headers: chat("Yes." if "red" in candidate else "no")
    )
    items = [ITEM, ("q", "g", 'say "yes"\n{"x": 1}'), ("q", "g", "rouge, é红 red")]
    assert judge(items) == [True, False, True] and not judge.failures and len(server.requests) == 3
    assert judge([]) == [] and len(server.requests) == 3
    for _, path, body, headers in server.requests:
        assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
        system, user = body["messages"]
        assert system == dict(role="system", content=JUDGE_PROMPT) and user["role"] == "user"
        assert set(json.loads(user["content"])) == {"question", "reference", "candidate"}
        assert headers["Authorization"] == f"Bearer {KEY}"
    sent = [json.loads(body["messages"][1]["content"]) for _, _, body, _ in server.requests]
    assert sorted((s["question"], s["reference"], s["candidate"]) for s in sent) == sorted(items)


def test_judge_reads_past_the_thinking(ask):
    """Breaks if what a judge thinks aloud counts as its verdict."""
    server, judge = ask(lambda candidate, nth, headers: chat("<think>no</think> yes"))
    assert judge([ITEM]) == [True] and len(server.requests) == 1


def test_judge_key_from_either_variable(ask, monkeypatch):
    """Breaks if OPENAI_API_KEY does not stand in, wins over JUDGE_API_KEY, or a local server
    without key cannot be used.
    """
    server, _ = ask(lambda candidate, nth, headers: chat("yes"))

    def sent():
        assert Judge(server.url, "m", retries=0, timeout=5.0)([ITEM]) == [True]
        return server.requests[-1][3]["Authorization"]

    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    assert sent() == f"Bearer {KEY}"
    monkeypatch.delenv("JUDGE_API_KEY")
    assert sent() == "Bearer sk-other"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "sk-" not in sent()


def test_judge_without_openai(monkeypatch):
    """Breaks if a missing package is found out only at the first question, or is taken for a
    failing judge.
    """
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError):
        Judge("http://127.0.0.1:9/v1", "m")


def test_judge_keeps_order_and_overlaps(ask):
    """Breaks if requests do not overlap (each waits for three others), more than four do, or
    results come as they end.
    """
    gate = threading.Barrier(4)

    def reply(candidate, nth, headers):
        try:
            gate.wait(5)
        except threading.BrokenBarrierError:
            return 500, dict(error=dict(message="fewer than four at a time"))
        i = int(candidate)
        time.sleep(i * 7 % 8 * 0.01)
        return chat("yes" if i % 3 == 0 else "no")

    server, judge = ask(reply, retries=0)
    assert judge([("q", "g", str(i)) for i in range(16)]) == [i % 3 == 0 for i in range(16)]
    assert server.most == 4 and len(server.requests) == 16 and not judge.failures


BOOM, BUSY = (500, dict(error=dict(message="boom"))), (503, b"<html>busy</html>")
SLOW, STALL = (429, dict(error="slow down")), None


@pytest.mark.parametrize(
    "first",
    [
        BOOM,
        BUSY,
        SLOW,
        STALL,
        (408, {}),
        (409, {}),
        (200, b"<html>hello</html>"),
        (200, b"not json"),
        chat("yes and no"),
    ],
)
def test_judge_retries_until_it_gets_a_verdict(ask, first):
    """Breaks if a passing failure costs the verdict, or leaves a mark in the failures."""
    server, judge = ask(
        lambda candidate, nth, headers: chat("yes") if nth == 2 else first,
        timeout=0.3 if first is STALL else 5.0,
    )
    assert judge([ITEM]) == [True] and len(server.requests) == 3 and not judge.failures


@pytest.mark.parametrize(
    "reply, reason",
    [
        (BOOM, "InternalServerError 500"),
        (BUSY, "InternalServerError 503"),
        (SLOW, "RateLimitError 429"),
        (STALL, "APITimeoutError"),
        *[
            ((200, body), "malformed reply")
            for body in (
                b"<html>hello</html>",
                b"not json",
                b"",
                b"null",
                "yes",
                [1],
                {},
                dict(choices=[]),
                dict(choices=None),
                dict(choices=dict(text="yes")),
                dict(choices=[{}]),
                dict(choices=["yes"]),
                dict(choices=[dict(message="yes")]),
            )
        ],
        (chat(["yes"]), "malformed reply"),
        (chat(7), "malformed reply"),
        (chat("yes and no"), "ambiguous reply"),
        (chat(""), "ambiguous reply"),
        (chat(None), "ambiguous reply"),
    ],
)
def test_judge_gives_up_without_a_verdict(ask, reply, reason):
    """Breaks if an outage or nonsense counts as wrong or right, ends the run, or is not tried 1 +
    retries times.
    """
    server, judge = ask(
        lambda candidate, nth, headers: reply, retries=1, timeout=0.3 if reply is STALL else 5.0
    )
    assert judge([ITEM]) == [None] and len(server.requests) == 2
    ((found, count),) = judge.failures.items()
    assert reason in found and count == 1


@pytest.mark.parametrize(
    "status, reason",
    [
        (400, "BadRequestError 400"),
        (401, "AuthenticationError 401"),
        (403, "PermissionDeniedError 403"),
        (404, "NotFoundError 404"),
    ],
)
def test_judge_does_not_repeat_what_is_refused(ask, status, reason):
    """Breaks if a wrong key or model is tried again and again."""
    server, judge = ask(
        lambda candidate, nth, headers: (status, dict(error=dict(message="refused"))), retries=3
    )
    assert (
        judge([ITEM] * 2) == [None, None]
        and len(server.requests) == 2
        and judge.failures == {reason: 2}
    )


def test_judge_that_is_not_there(ask):
    """Breaks if a server that cannot be reached ends the run or calls the answer wrong."""
    server, judge = ask(lambda candidate, nth, headers: chat("yes"))
    server.close()
    assert judge([ITEM]) == [None] and judge.failures == {"APIConnectionError": 1}


def test_judge_waits_longer_each_time(ask, monkeypatch):
    """Breaks if the waits are not backoff, 2 backoff, 4 backoff, or there is one before the first
    request.
    """
    waits = []
    server, judge = ask(lambda candidate, nth, headers: chat("perhaps"), retries=3, backoff=0.25)
    monkeypatch.setattr("common.judge.time.sleep", waits.append)
    assert judge([ITEM]) == [None] and waits == [0.25, 0.5, 1.0] and len(server.requests) == 4


def test_judge_counts_failures_by_reason_and_none_is_wrong(ask):
    """Breaks if failures are mixed up or forgotten, hit other rows, or a failed row counts as
    wrong in Eq. (7).
    """
    replies = dict(
        yes=chat("yes"),
        no=chat("no"),
        both=chat("yes and no"),
        busy=(500, {}),
        key=(401, {}),
        web=(200, b"<html></html>"),
    )
    server, judge = ask(lambda candidate, nth, headers: replies[candidate.split()[0]], retries=1)
    names = ["busy", "yes", "both", "no", "key", "busy", "web", "yes"]
    expected = [None, True, None, False, None, None, None, True]
    verdicts = judge([("q", "red wall", f"{name} {i}") for i, name in enumerate(names)])
    assert verdicts == expected
    assert judge.failures == {
        "InternalServerError 500": 2,
        "ambiguous reply": 1,
        "AuthenticationError 401": 1,
        "malformed reply (AttributeError)": 1,
    }
    assert (
        len(server.requests) == 3 + 4 * 2 + 1
    )  # verdicts once, failures twice, the refused one once
    judge([("q", "g", "both again")])
    assert judge.failures["ambiguous reply"] == 2 and sum(judge.failures.values()) == 6
    found = score_group(
        [f"<answer>{name}</answer>" for name in names],
        [None] * 8,
        [[]] * 8,
        "red wall",
        verdicts=verdicts,
    )
    assert found["accuracy"] == [None if v is None else float(v) for v in expected]
    assert [t is None for t in found["total"]] == found["unjudged"] == [v is None for v in expected]


@pytest.mark.parametrize("status", [200, 400, 401, 429, 500])
@pytest.mark.parametrize("form", ["error", "html", "text", "chat"])
def test_judge_never_tells_its_key(ask, capfd, caplog, status, form):
    """Breaks if a server's text, which may hold the key it was sent, gets into a reason, a log or
    on the screen.
    """
    seen = []

    def reply(candidate, nth, headers):
        seen.append(headers["Authorization"])
        text = f"Incorrect key provided: {headers['Authorization']}"
        return status, dict(
            error=dict(error=dict(message=text, code=text, type=text)),
            html=f"<p>{text}</p>".encode(),
            text=text.encode(),
            chat=chat(text)[1],
        )[form]

    caplog.set_level("INFO")
    server, judge = ask(reply, retries=1)
    assert judge([ITEM]) == [None] and sum(judge.failures.values()) == 1
    print(judge.failures, judge, judge.client)
    printed = capfd.readouterr()
    assert seen and all(s == f"Bearer {KEY}" for s in seen) and "Counter" in printed.out
    for text in (repr(judge.failures), printed.out, printed.err, caplog.text):
        assert KEY not in text and "secret" not in text
