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


@pytest.mark.parametrize(
    "text, score",
    [
        ("a b " * 5, 5 / 7),  # 7 4-grams, 2 distinct
        ("no no no no no", 1 / 2),
        ("a b c x a b c y", 0),  # a 3-gram twice is nothing
        ("a b c d a b c d", 1 / 5),
        ("a A a A a", 0),  # words count as they are written: two different 4-grams
        *[(text, 0) for text in ("", " \n ", "no no no", L + R[:8], "<|im_end|>")],
    ],
)
def test_repetition_of_4_grams_by_hand(text, score):
    """Breaks if n-grams are not of four words, or few words repeat themselves."""
    assert repetition_score(text) == pytest.approx(score)


@pytest.mark.parametrize(
    "text, score",
    [
        # 25 twice in 100 words; of 97 4-grams 22 come again. In 99 words only the 4-grams count.
        (words(25) + words(25, 50) * 2 + words(25, 100), 50 / 100),
        (words(24) + words(25, 50) * 2 + words(25, 100), 22 / 96),
        (words(25) + words(25, 50) * 3, 75 / 100),  # three in a row cover 75
        (words(50) * 2, 1.0),  # 50 twice, no block of 25 back to back
        (words(50) * 2 + words(100, 50), 100 / 200),
        # not back to back: 47 of 98 4-grams come again
        (words(50) + words(1, 60) + words(50), 47 / 98),
        (words(49) * 2 + words(2, 60), 46 / 97),  # a block of 49 is neither 50 nor 25
        (words(5) * 20, 1.0),
        (words(120), 0.0),
        # two places count together
        (words(25) * 2 + words(50, 100) + words(25, 200) * 2, 100 / 150),
    ],
)
def test_repetition_of_blocks_by_hand(text, score):
    """Breaks if the block share counts below 100 words, other block sizes, blocks apart, or
    characters instead of words.
    """
    assert repetition_score(" ".join(text)) == pytest.approx(score)


ELEVEN = "ball hits a"


@pytest.mark.parametrize(
    "lines, score",
    [
        # three lines of three words: 6 4-grams, 3 distinct (0.5); lines 3, 1 distinct (2/3)
        ([ELEVEN] * 3, 2 / 3),
        ([ELEVEN, f"  {ELEVEN} ", f"\t{ELEVEN}", ""], 2 / 3),
        # no 4-gram at all: only the lines speak
        (["elevenchars", "elevenchars", "anotherword"], 1 / 3),
        (["elevenchars", "elevenchars"], 0),
        (["tencharact"] * 3, 0),
        ([" tencharact "] * 3, 0),
        (["elevenchars", "", "elevenchars", "", "tencharact"], 0),  # two lines over 10 characters
        # the largest: of 4 lines 1 comes again, of 6 4-grams 1
        (["a b a b a b", "elevenchars", "elevenchars", "anotherword"], 1 / 4),
    ],
)
def test_repetition_of_lines_by_hand(lines, score):
    """Breaks if lines of 10 characters count, if two lines are enough, or if the outer space of a
    line does.
    """
    assert repetition_score("\n".join(lines)) == pytest.approx(score)


PLAIN = "the ball goes left and then up"
TAGS = "<reason>a b</reason><answer>a b</answer>"


@pytest.mark.parametrize(
    "text, score",
    [
        (f"<reason>{PLAIN}</reason>{S}{Z * 200}{E_}<reason>so it is</reason>{A}", 0),
        (" ".join([S, *[Z] * 200, E_]) + PLAIN + "<|im_end|>" * 50 + "<|endoftext|>" * 50, 0),
        (f"a{Z}b{Z}" * 5, 5 / 7),  # ten words, as 'a b' five times
        (TAGS + TAGS + "<reason>a b</reason>", 5 / 7),
        (f"{Z}{Z}{Z}\n" * 5, 0),  # no line is left of a line of markers
    ],
)
def test_repetition_leaves_tags_and_markers_out(text, score):
    """Breaks if latents count as repeated words: spans of any length leave the score as it was,
    also glued to words.
    """
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
        ("red wall", "red wall", None, 1),
        (" RED\n wall.", "Red  Wall", None, 1),
        ("(red wall)", '"red wall"', None, 1),
        *[(answer, "red wall", None, 0) for answer in ("red walls", "the red wall", "", "A")],
        *[("A", gold, OPTIONS, 1) for gold in ("A", "red wall")],
        ("Red wall.", "A", OPTIONS, 1),
        ("(a) red wall", "Red Wall", OPTIONS, 1),
        ("B", "red wall", OPTIONS, 0),
        *[(answer, "A", OPTIONS, 0) for answer in ("green wall", "red", "", "E")],
        ("D", "D", OPTIONS, 1),
        # the first of several answers
        ("blue</answer><answer>red", "red", None, 0),
        ("red</answer><answer>blue", "red", None, 1),
    ],
)
def test_accuracy(answer, gold, options, right):
    """Breaks if letter and text are not one, an answer that is no option counts, or the last
    option or answer does not, or does.
    """
    assert accuracy_reward(f"<reason>B</reason><answer>{answer}</answer>", gold, options) == right


def test_accuracy_needs_a_closed_answer():
    """Breaks if an answer without its tag counts."""
    for response in ("red", "<answer>red", "red</answer>", "", "<reason>red</reason>"):
        assert accuracy_reward(response, "red") == 0
        assert accuracy_reward(response, "red", ["red", "blue"]) == 0


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
    # s(a, b) = 1 over one latent; s(a, c) = (0.5 + 1) / 2; s(b, c) = 0.5 over one
    ac, bc = math.exp(0.75 / 0.5), math.exp(0.5 / 0.5)
    expected = [e**2 / (e**2 + ac), e**2 / (e**2 + bc), ac / (ac + e**2)]
    assert ctr([a, b, c], [True, True, False]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("tau", [0.5, 1.0, 0.1])
def test_contrastive_edge_cases_by_hand(tau):
    """Breaks if one of official's edge cases is another, tau does not divide, or is not the
    paper's 0.5.
    """

    def x(s):
        return math.exp(s / tau)

    one, two, opposite = vectors(E1), vectors(E2), vectors([-1.0, 0.0])
    three, near = [one, two, opposite], dict(rel=1e-4, abs=1e-7)
    assert ctr([one], [True], tau) == ctr([one], [False], tau) == [0.0]  # a group of one
    # no negatives
    right = ctr([one, two, one], [True] * 3, tau)
    assert right == pytest.approx([1 / tau, 0.5 / tau, 1 / tau], **near)
    # a lone correct one is its own positive, s+ = 1; for the wrong ones it is the only positive
    assert ctr(three, [True, False, False], tau) == pytest.approx(
        [
            x(1) / (x(1) + x(0.5) + x(0)),
            x(0.5) / (x(0.5) + x(1) + x(0.5)),
            x(0) / (x(0) + x(0.5) + x(1)),
        ],
        **near,
    )
    # all wrong: no positives, 1 / (1 + sum), i itself in the sum
    sums = [x(1) + x(0.5) + x(0), x(0.5) + x(1) + x(0.5), x(0) + x(0.5) + x(1)]
    assert ctr(three, [False] * 3, tau) == pytest.approx([1 / (1 + s) for s in sums], **near)
    assert contrastive_reward([one, two], [True] * 2).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("gone", [None, torch.zeros(0, 2)])
def test_contrastive_without_latents(gone):
    """Breaks if a rollout without latents gets a reward, serves as positive or negative, or
    breaks the others' batch.
    """
    one, two = vectors(E1), vectors(E2)
    assert ctr([gone, gone], [True, False]) == [0.0, 0.0]
    assert ctr([gone], [True]) == [0.0] and ctr([], []) == []
    for latents, correct, expected in (
        # the other correct one has no latents: the first is a lone correct one
        ([one, gone, two], [1, 1, 0], [e**2 / (e**2 + e), 0, e / (e + e**2)]),
        ([gone, one, two], [0, 1, 1], [0, 1, 1]),  # no negatives left: s+ / tau
        ([gone, one], [1, 0], [0, 1 / (1 + e**2)]),  # no positives left
        ([one, gone], [1, 0], [2, 0]),  # a lone correct one, no negatives: 1 / tau
    ):
        assert ctr(latents, correct) == pytest.approx(expected, abs=1e-5)


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


def test_contrastive_ignores_lengths_of_vectors():
    """Breaks if latents are not brought to unit norm one by one: any scale of any latent leaves
    the rewards as they were.
    """
    torch.manual_seed(0)
    latents = [torch.randn(n, 6) for n in (3, 1, 4, 2, 3)]
    correct = [True, False, True, False, True]
    as_they_are = pytest.approx(ctr(latents, correct), abs=1e-5)
    scaled = [z * torch.logspace(-4, 4, len(z) + 1)[1:, None] for z in latents]
    assert ctr(scaled, correct) == as_they_are
    assert ctr([z * 1e6 for z in latents], correct) == as_they_are
    assert ctr(latents[:1] + [-z for z in latents[1:]], correct) != as_they_are


def test_contrastive_stays_finite():
    """Breaks if a zero latent gives NaN (s = 0.5 with all), or a reward alters latents."""
    assert ctr([torch.zeros(1, 2), vectors(E1)], [True, True]) == pytest.approx([1, 1])
    z = torch.randn(3, 4)
    before = z.clone()
    contrastive_reward([z, z * 2, z[:1]], [True, False, True])
    assert torch.equal(z, before)
    z = z.bfloat16()
    half, wide = contrastive_reward([z, z[:1]], [True, False]), z.float().numpy()
    assert half.dtype == torch.float32
    assert half.tolist() == pytest.approx(
        slow_contrastive([wide, wide[:1]], [True, False], 0.5), abs=1e-5
    )


@pytest.mark.parametrize(
    "latents, lengths, reward",
    [
        # orthogonal, parallel, opposed; 45 and 60 degrees: cos^2
        ([E1, E2], [1, 1], 0.0),
        ([E1, E1], [1, 1], -1.0),
        ([E1, [-3.0, 0.0]], [1, 1], -1.0),
        ([E1, [1.0, 1.0]], [1, 1], -0.5),
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
        ([E1, E1], [1, 0, 1], -1.0),
        ([E1, E1], [0, 1, 0, 0, 1, 0], -1.0),
        ([E1, E1, E2], [1, 0, 1, 1], -0.5),
        # one span; a mean of zero
        ([E1, E1], [2], 0.0),
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
        assert [diversity_reward(none, lengths) for lengths in ([], [0], [0, 0])] == [0.0] * 3
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
    assert repetition_score(LOOP) > 0.5 and format_reward(LOOP) == 1
    assert accuracy_reward(LOOP, "red wall") == 1
    for verdicts in (None, [False, True, False]):
        found = score_group([GOOD, LOOP, GOOD], latents, [[1]] * 3, "red wall", verdicts=verdicts)
        assert found["accuracy"] == [1, -1, 1] and found["correct"] == [True, False, True]
        # The repetitive one is the only negative: as close as can be to the first, and to itself.
        c = [e / (e + e**2), e**2 / (e**2 + e**2), e / (e + e)]
        total = [1 + 0.2 * c[0], -0.9 + 0.1 + 0.2 * c[1], 1 + 0.2 * c[2]]
        assert found["contrastive"] == pytest.approx(c, abs=1e-5)
        assert found["total"] == pytest.approx(total, abs=1e-5)
    exactly = "no no no no <answer>no</answer>"  # 0.5 itself is not over 0.5
    assert repetition_score(exactly) == 0.5
    found = score_group([exactly], [None], [[]], "no")
    assert found["accuracy"] == [1] and found["correct"] == [True]


def test_verdicts():
    """Breaks if a yes does not count as right everywhere, a no undoes the rule, or no verdict is
    taken for wrong.
    """
    latents = [vectors(E1), vectors(E2), vectors(E1), vectors([-1.0, 0.0]), vectors([1.0, 1.0])]
    group, verdicts = [GOOD, LOOSE, LOOSE, LOOSE, BAD], [False, True, False, None, False]
    found = score_group(group, latents, [[1]] * 5, "red wall", verdicts=verdicts)
    assert found["accuracy"] == [1, 1, 0, None, 0]
    assert found["correct"] == [True, True, False, False, False]
    assert found["unjudged"] == [False, False, False, True, False]
    # As if rollout 3 had no latents: Eq. (5) over 0 and 1 (right), 2 and 4 (wrong; 4 is at 45
    # degrees of both axes).
    h = math.exp((1 + 0.5**0.5) / 2 / 0.5)
    c = [e / (e + e**2 + h), e / (e + e + h), e**2 / (e**2 + e**2 + h), 0, h / (h + h + e**2)]
    assert found["contrastive"] == pytest.approx(c, abs=1e-5)
    assert found["total"].pop(3) is None
    total = [1 + 0.2 * c[0], 0.9 + 0.2 * c[1], 0.2 * c[2], 0.1 + 0.2 * c[4]]
    assert found["total"] == pytest.approx(total, abs=1e-5)
    latents[3], verdicts[3], spans = None, False, [[1], [1], [1], [], [1]]
    missing = score_group(group, latents, spans, "red wall", verdicts=verdicts)
    assert missing["contrastive"] == pytest.approx(found["contrastive"], abs=1e-6)
    assert missing["accuracy"] == [1, 1, 0, 0, 0]  # without a judge the rule's no stands


@pytest.mark.parametrize("response", [LOOSE, LOOP, GOOD])
def test_unjudged_is_never_correct(response):
    """Breaks if a rollout without verdict is listed as correct while it has no accuracy, as the
    docstring promises.
    """
    group = [response, GOOD], [vectors(E1)] * 2, [[1]] * 2
    found = score_group(*group, "red wall", verdicts=[None, False])
    first = {name: values[0] for name, values in found.items()}
    assert first["accuracy"] is first["total"] is None
    assert first["correct"] is False and first["unjudged"] is True
    assert first["contrastive"] == 0 and found["accuracy"][1] == 1


@pytest.mark.parametrize(
    "response, options, ask",
    [
        *[(f"<answer>{x}</answer>", None, True) for x in ("the wall in red", "blue wall")],
        # the rule says yes
        *[(f"<answer>{x}</answer>", None, False) for x in ("red wall", "Red wall.")],
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


def test_needs_judge_refuses_a_gold_that_is_no_option():
    """Breaks if a faulty row goes to the judge instead of being named."""
    with pytest.raises(ValueError, match="none of the options"):
        needs_judge("<answer>the wall in red</answer>", "purple wall", OPTIONS)
