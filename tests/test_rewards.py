"""Every reward against hand numbers or a slow loop written from its equation."""

import json
import math

import numpy as np
import pytest
import torch

from common.formats import answer_of
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
)

S, Z, E_ = "<|latent_start|>", "<|latent|>", "<|latent_end|>"
L = S + Z * 2 + E_
R, A = "<reason>the ball goes left</reason>", "<answer>red wall</answer>"
OPTIONS = ["red wall", "green wall", "blue wall", "yellow wall"]
PLAIN = "the ball goes left and then up"
E1, E2 = [1.0, 0.0], [0.0, 1.0]
e = math.e


def words(n, start=0):
    return [f"w{i}" for i in range(start, start + n)]


def vectors(*rows):
    return torch.tensor(rows)  # (N, D)


# -------------------------------------------------------------------------------- format and answer

# responses in letters: a block or marker each, M the end of turn, t text, o an answer left open
PARTS = dict(R=R, L=L, A=A, S=S, Z=Z, E=E_, M="<|im_end|>", t="so", o="<answer>red")


def spelled(letters):
    return "".join(PARTS[letter] for letter in letters)


@pytest.mark.parametrize(
    "response",
    [
        *map(spelled, "RLRA LRA RLRLRA LRLRLRA RLRAM RSZERA".split()),
        f"\n{R}\n{L}\n\n{R} \t\n{A}\n",
        R + L + R + A + "<|im_end|>\n<|endoftext|><|endoftext|>",
        R + L + R + A + " <|im_end|> ",
        R + f"{S}\n{Z}\n{Z}\n{E_}" + R + A,
        L + "<reason>two\nlines, 3 < 4</reason>" + A,
        R + L + R + "<answer>B\n</answer>",
    ],
)
def test_format_accepts(response):
    """Breaks if one of the two forms, white space between blocks or a chat terminator at the end
    is refused.
    """
    assert format_reward(response) == 1.0


REFUSED = """
    A R RA RRA L LA RLA RL                | no span, or no reason after it
    RSERA RLRSERA                         | an empty span
    RLZRA RLRSA RLERA ZLRA RLRAZ          | a stray marker
    RZZRA RSLRA RSZRA RZERA               | a span opened twice, never closed, never opened
    tRLRA RtLRA RLtRA RLRtA RLRAt RLRAMt  | text outside
    MLRA RMLRA                            | a terminator elsewhere
    RLRo RLR ARLR RLAR RALRA LRRA RRLRA   | wrong order, an answer left open or missing
    LLRA RLRAA RLRARLRA                   | something twice
"""


@pytest.mark.parametrize(
    "response",
    [
        *(spelled(x) for line in REFUSED.splitlines() for x in line.partition("|")[0].split()),
        *("", " ", "red", R + S + " " + E_ + R + A, S + Z + " x " + Z + E_ + R + A),
        *(L + f"<reason>x {Z} y</reason>" + A, L + f"<reason>x {L}</reason>" + A),
        *(L + R + f"<answer>{L}red</answer>", L + R + "<answer>a<answer>b</answer>"),
        *(L + "<reason>a<reason>b</reason>" + A, L + "<reason>a<reason>b</reason></reason>" + A),
        *(L + "<reason>a</reason></reason>" + A, L + "<reason>a <answer>b</answer></reason>" + A),
        *(L + "<reason>a" + A, R + L + R + "red</answer>", R + L + R + "<answer>"),
        *(R + L + R + A.upper(), "<think>x</think>" + L + R + A),
    ],
)
def test_format_refuses(response):
    """Breaks if anything but the two forms is paid for: each string is one step away from a right
    one. Official accepts some of them (deviation 5).
    """
    assert format_reward(response) == 0.0


ELEVEN = "ball hits a"


@pytest.mark.parametrize(
    "text, score",
    [
        # 4-grams: 7 of them, 2 distinct; a 3-gram twice is nothing; words as they are written
        ("a b " * 5, 5 / 7),
        ("a b c x a b c y", 0),
        ("a b c d a b c d", 1 / 5),
        ("a A a A a a", 0),
        ("", 0),
        # blocks: 25 twice in 100 words; in 96 words only the 4-grams count
        (words(25) + words(25, 50) * 2 + words(25, 100), 50 / 100),
        (words(24) + words(25, 50) * 2 + words(25, 100), 22 / 96),
        (words(25) + words(25, 50) * 3, 75 / 100),  # three in a row cover 75
        (words(50) * 2 + words(100, 50), 100 / 200),  # 50 twice, no block of 25 back to back
        (words(50) + words(1, 60) + words(50), 47 / 98),  # not back to back
        (words(49) * 2 + words(2, 60), 46 / 97),  # a block of 49 is neither 50 nor 25
        # two places count together
        (words(25) * 2 + words(50, 100) + words(25, 200) * 2, 100 / 150),
        # lines: three of more than 10 characters, without their outer space
        (f"{ELEVEN}\n  {ELEVEN} \n\t{ELEVEN}\n", 2 / 3),
        ("elevenchars\nelevenchars\nanotherword", 1 / 3),
        ("elevenchars\n\nelevenchars\n\ntencharact", 0),  # two are too few
        (" tencharact \n" * 3, 0),
        # the largest share
        ("a b a b a b\nelevenchars\nelevenchars\nanotherword", 1 / 4),
        ("a b " * 5 + "\nelevenchars\nanotherword", 5 / 9),
        # tags and markers are left out, also glued to words
        (f"<reason>{PLAIN}</reason>{S}{Z * 200}{E_}<reason>so it is</reason>{A}", 0),
        (f"{PLAIN} {' '.join([Z] * 200)}" + "<|im_end|>" * 50 + "<|endoftext|>" * 50, 0),
        (f"a{Z}b{Z}" * 5, 5 / 7),
        (f"{Z}{Z}{Z}\n" * 5, 0),
    ],
)
def test_repetition_by_hand(text, score):
    """Breaks if n-grams are not of four words, blocks count below 100 words, apart or in other
    sizes, lines of 10 characters or two lines count, or latents count as repeated words.
    """
    text = text if isinstance(text, str) else " ".join(text)
    assert repetition_score(text) == pytest.approx(score)


def test_answer_of():
    """Breaks if the last answer counts, an unclosed one is taken, or the line breaks end it."""
    assert answer_of("<answer>\n red \n</answer><answer>blue</answer>") == "red"
    assert answer_of("<answer>a\nb</answer>") == "a\nb" and answer_of("<answer></answer>") == ""
    assert answer_of("red") is answer_of("") is answer_of("<answer>red") is None
    assert answer_of("red</answer><answer>blue</answer>") == "blue"


def test_pick():
    """Breaks if a word's first letter counts as an option, a letter beyond the options does, a
    text is not normalised, or an option that is itself a letter is read as another's letter.
    """
    meant = {0: ["A", "a. red wall"], 1: ["(b)", "b)", "B ", "B) green wall", "B. green wall."]}
    meant |= {2: ["C.", "'blue wall.'"], 3: ["d", "D: yellow wall"]}
    meant[1].append("GREEN   Wall!")
    meant[None] = ["E", "z)", "1", "", None, "Blue", "a red thing", "A red wall", "Bad", "not B"]
    meant[None] += [
        "C: red wall",
        "B. whatever",
        "C. is wrong, the answer is D",
        "A) or B)",
        "redd",
    ]
    for index, answers in meant.items():
        assert [pick(answer, OPTIONS) for answer in answers] == [index] * len(answers)
    assert [pick(answer, ["B", "A", "x"]) for answer in ("B", "a.", "C")] == [0, 1, 2]


@pytest.mark.parametrize(
    "answer, gold, options, right",
    [
        (" RED\n wall.", '"Red  Wall"', None, 1),
        *[(answer, "red wall", None, 0) for answer in ("red walls", "the red wall", "", "A")],
        *[("A", gold, OPTIONS, 1) for gold in ("A", "red wall")],
        ("Red wall.", "A", OPTIONS, 1),
        *[(answer, "A", OPTIONS, 0) for answer in ("green wall", "B", "red", "", "E")],
        ("red</answer><answer>blue", "red", None, 1),  # the first of several
    ],
)
def test_accuracy(answer, gold, options, right):
    """Breaks if letter and text are not one, or an answer that is no option counts."""
    assert accuracy_reward(f"<reason>B</reason><answer>{answer}</answer>", gold, options) == right


@pytest.mark.parametrize("gold", ["E", "purple wall", ""])
def test_a_gold_that_is_no_option_is_an_error(gold):
    """Breaks if a faulty row gives every rollout 0 (or, None being None, 1 to a wrong answer) in
    silence, or goes to the judge instead of being named.
    """
    for response in (A, "<answer>purple</answer>", "none"):
        with pytest.raises(ValueError, match="none of the options"):
            accuracy_reward(response, gold, OPTIONS)
    with pytest.raises(ValueError, match="none of the options"):
        needs_judge("<answer>the wall in red</answer>", gold, OPTIONS)


# ----------------------------------------------------------------------------------- latent rewards


def slow_contrastive(latents, correct, tau):
    """Eq. (4)-(5) pair by pair in float64, with official's edge cases one by one: lists of (N, D)
    arrays or None.
    """
    there = [i for i, z in enumerate(latents) if z is not None and len(z)]

    def s(i, j):
        T = min(len(latents[i]), len(latents[j]))
        total = 0.0
        for t in range(T):
            a, b = np.asarray(latents[i][t], np.float64), np.asarray(latents[j][t], np.float64)
            cosine = float(np.dot(a, b)) / math.sqrt(np.dot(a, a)) / math.sqrt(np.dot(b, b))
            total += (1 + cosine) / 2
        return total / T

    rewards = []
    for i in range(len(latents)):
        if i not in there or len(latents) == 1:
            rewards.append(0.0)
            continue
        positives = [s(i, j) for j in there if j != i and correct[j]]
        negatives = [math.exp(s(i, j) / tau) for j in there if not correct[j]]
        if not positives and not correct[i]:
            rewards.append(1 / (1 + sum(negatives)))
            continue
        plus = max(positives) if positives else 1.0
        x = math.exp(plus / tau)
        rewards.append(x / (x + sum(negatives)) if negatives else plus / tau)
    return rewards


def test_contrastive_edge_cases_by_hand():
    """Breaks if one of official's edge cases is another, or tau is not the paper's 0.5: exp(s/tau)
    is e^2 for equal, e for orthogonal, 1 for opposite latents.
    """
    one, two, opposite = vectors(E1), vectors(E2), vectors([-1.0, 0.0])
    three = [one, two, opposite]
    for latents, correct, expected in (
        ([one], [1], [0]),  # a group of one
        ([one, two, one], [1, 1, 1], [2, 1, 2]),  # no negatives: s+ / tau
        # a lone correct one is its own positive, s+ = 1; for the wrong ones it is the only positive
        (three, [1, 0, 0], [e**2 / (e**2 + e + 1), e / (e + e**2 + e), 1 / (1 + e + e**2)]),
        # all wrong: no positives, 1 / (1 + sum), i itself in the sum
        (three, [0] * 3, [1 / (1 + x) for x in (e**2 + e + 1, e + e**2 + e, 1 + e + e**2)]),
        # the other correct one has no latents: the first is a lone correct one
        ([one, None, two], [1, 1, 0], [e**2 / (e**2 + e), 0, e / (e + e**2)]),
        ([torch.zeros(0, 2), None], [1, 0], [0, 0]),
        ([torch.zeros(1, 2), one], [1, 1], [1, 1]),  # of a zero latent s is 0.5 with all
    ):
        assert contrastive_reward(latents, correct).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_contrastive_equals_the_slow_loop(seed):
    """Breaks if the padded matrix form differs from Eq. (4)-(5) pair by pair, for any lengths,
    gaps, verdicts and tau.
    """
    rng = np.random.default_rng(seed)
    G, latents = int(rng.integers(1, 9)), []
    for n in rng.integers(-1, 7, G):
        z = rng.normal(size=(max(n, 0), 5)).astype(np.float32) * 10 ** rng.uniform(-3, 3)
        latents.append(z if n >= 0 else None)
    correct = [bool(c) for c in rng.random(G) < rng.choice([0.0, 0.2, 0.5, 0.8, 1.0])]
    tau = float(rng.choice([0.1, 0.5, 2.0]))
    torch_latents = [None if z is None else torch.from_numpy(z) for z in latents]
    found = contrastive_reward(torch_latents, correct, tau)
    assert found.shape == (G,) and found.dtype == torch.float32
    slow = slow_contrastive(latents, correct, tau)
    assert found.tolist() == pytest.approx(slow, rel=1e-4, abs=1e-6)


def test_contrastive_of_bf16():
    """Breaks if similarities are rounded as the latents are."""
    z = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, wide = contrastive_reward([z, z[1:]], [True, False]), z.float().numpy()
    expected = slow_contrastive([wide, wide[1:]], [True, False], 0.5)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "latents, lengths, reward",
    [
        # orthogonal, parallel, opposed; 60 degrees: cos^2
        ([E1, E2], [1, 1], 0.0),
        ([E1, E1], [1, 1], -1.0),
        ([E1, [-3.0, 0.0]], [1, 1], -1.0),
        ([E1, [1.0, 3.0**0.5]], [1, 1], -0.25),
        # neighbours only: the first and last are equal
        ([E1, E1, E2], [1, 1, 1], -0.5),
        ([E1, E2, E1], [1, 1, 1], 0.0),
        # Means (2, 0), (1, 1), (0, 3): twice 45 degrees, so cos^2 is 0.5 twice.
        ([[1.0, 0.0], [3.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]], [2, 1, 3], -0.5),
        # Raw mean of (3, 0) and (0, 1) is (1.5, 0.5): cos^2 with (1, 0) is 2.25 / 2.5. Of unit
        # vectors it would be 0.5.
        ([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [2, 1], -0.9),
        # empty spans are passed over
        ([E1, E1, E2], [0, 1, 0, 1, 1, 0], -0.5),
        # one span; a mean of zero
        ([E1, E1], [0, 2, 0], 0.0),
        ([[1.0, 0.0], [-1.0, 0.0], E1], [2, 1], 0.0),
    ],
)
def test_diversity_by_hand(latents, lengths, reward):
    """Breaks if cos is not squared, spans are cut elsewhere, unit vectors are averaged, or all
    pairs count.
    """
    found = diversity_reward(torch.tensor(latents), lengths)
    assert isinstance(found, float) and found == pytest.approx(reward, abs=1e-6)


def test_diversity_without_latents_or_with_wrong_lengths():
    """Breaks if nothing imagined is an error, or lengths that do not fit are cut to fit."""
    for none in (None, torch.zeros(0, 2)):
        assert [diversity_reward(none, lengths) for lengths in ([], [0, 0])] == [0.0] * 2
    for lengths in ([1, 1], [2, 2], []):
        with pytest.raises(ValueError, match="do not make 3"):
            diversity_reward(torch.ones(3, 2), lengths)


def slow_likeness(z, lengths):
    """The mean of cos^2 of Eq. (6), float64 numpy."""
    ends = np.cumsum(lengths)
    b = [z[end - n : end].mean(0) for n, end in zip(lengths, ends) if n]
    squares = [(x @ y) ** 2 / (x @ x) / (y @ y) for x, y in zip(b[:-1], b[1:])]
    return float(np.mean(squares))


# ------------------------------------------------------------------------------------------ Eq. (7)

GOOD, BAD = R + L + R + "<answer>red wall</answer>", R + L + R + "<answer>blue wall</answer>"
# no span: R_fmt 0; the rule says no
LOOSE = "<reason>I look at it</reason><answer>the wall in red</answer>"
LOOP = "<reason>" + "up and up and " * 20 + "</reason>" + L + R + "<answer>red wall</answer>"


def test_total_by_hand():
    """Breaks if a weight of Eq. (7) is another, two are exchanged, or a part goes to another
    rollout.
    """
    group = [GOOD, BAD, LOOSE], [vectors(E1, E1), vectors(E1, E2), None], [[1, 1], [1, 1], []]
    found = score_group(*group, "red wall")
    # s_01 = (1 + 0.5) / 2; rollout 0 is the lone correct one, s+ = 1; rollout 1 is its own
    # negative. The two equal reasons: 3 of 21 4-grams come again.
    c0, c1 = e**2 / (e**2 + e**1.5), e**1.5 / (e**1.5 + e**2)
    total = [0.9 + 0.1 + 0.2 * c0 - 0.1, 0.1 + 0.2 * c1, 0]
    expected = dict(accuracy=[1, 0, 0], correct=[True, False, False], format=[1, 1, 0])
    expected.update(repetition=[3 / 21, 3 / 21, 0], contrastive=[c0, c1, 0], diversity=[-1, 0, 0])
    expected.update(total=total, unjudged=[False] * 3)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-5), name
    for weights, total in (
        (Weights(lambda_c=0.0, lambda_d=3.0), [1 - 3, 0.1, 0]),
        (Weights(lambda_c=3.0, lambda_d=0.0), [1 + 3 * c0, 0.1 + 3 * c1, 0]),
    ):
        other = score_group(*group, "red wall", weights=weights)
        assert other["total"] == pytest.approx(total, abs=1e-5)
    warm = score_group(*group, "red wall", weights=Weights(tau=1.0))["contrastive"]
    assert warm == pytest.approx([e / (e + e**0.75), e**0.75 / (e**0.75 + e), 0], abs=1e-5)
    json.dumps(found)  # plain numbers: they go to a log


def test_what_is_right():
    """Breaks if a judge's yes does not count everywhere, a no undoes the rule, no verdict is taken
    for wrong or a neighbour in Eq. (5), or what repeats itself in more than half is not wrong, at
    -1, whatever the rule or the judge says.
    """
    exactly = "wall red wall red wall <answer>red wall</answer>"  # 0.5 itself is not over 0.5
    assert repetition_score(exactly) == 0.5 and repetition_score(LOOP) > 0.5
    group = [GOOD, LOOSE, LOOSE, LOOP, LOOP, exactly, LOOSE, LOOP, GOOD]
    verdicts = [False, True, False, False, True, False, None, None, None]
    latents = [vectors(row) for row in torch.randn(9, 2).tolist()]
    found = score_group(group, latents, [[1]] * 9, "red wall", verdicts=verdicts)
    assert found["accuracy"] == [1, 1, 0, -1, -1, 1, None, None, None]
    assert found["correct"] == [True, True, False, False, False, True, False, False, False]
    assert found["unjudged"] == [False] * 6 + [True] * 3
    assert found["total"][6:] == [None] * 3
    judged = slow_contrastive([*latents[:6], None, None, None], found["correct"], 0.5)
    assert found["contrastive"] == pytest.approx(judged, abs=1e-5)
    # without a judge the rule's no stands; an option's letter is its text
    alone = score_group([LOOSE, "<answer>A</answer>"], [None] * 2, [[]] * 2, "red wall", OPTIONS)
    assert alone["accuracy"] == [0, 1]


@pytest.mark.parametrize(
    "response, options, ask",
    [
        ("<answer>blue wall</answer>", None, True),
        # the rule says yes
        ("<answer>Red wall.</answer>", None, False),
        # there is no answer
        *[(x, None, False) for x in ("red wall", "<answer></answer>", "<answer>red")],
        # repetitive
        (f"<reason>{'up ' * 20}</reason><answer>the wall in red</answer>", None, False),
        *[(f"<answer>{x}</answer>", OPTIONS, True) for x in ("the wall in red", "E")],
        *[(f"<answer>{x}</answer>", OPTIONS, False) for x in ("A", "B", "blue wall")],
        ("<answer>the wall in red</answer><answer>red wall</answer>", None, True),
    ],
)
def test_needs_judge(response, options, ask):
    """Breaks if a judge is asked where it can change nothing, or not asked where the rule may be
    too strict.
    """
    assert needs_judge(response, "red wall", options) is ask
