"""Intervals against known deviations and by hand."""

import numpy as np
import pytest
from scripted import line

import evaluate
from common.formats import Clip, Frame, Row
from common.intervals import paired_bootstrap
from evaluate import bootstrap, summarise


def test_bootstrap():
    """Breaks if the draws are not seeded, or the interval is not that of the mean of the groups'
    means.
    """
    values = [0, 1] * 50
    low, high = bootstrap([values])
    few = np.arange(50) ** 2
    assert bootstrap([few]) == bootstrap([few]) != bootstrap([few], seed=1)
    half = 1.96 * 0.05  # sqrt(.25 / 100) = .05
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.02)
    assert bootstrap([[1, 1, 1], [0, 0]]) == [0.5, 0.5] and bootstrap([[2.5]]) == [2.5, 2.5]
    low, high = bootstrap([values, [1] * 7])  # half of the spread, around .75
    assert (low, high) == pytest.approx((0.75 - 0.049, 0.75 + 0.049), abs=0.012)
    assert bootstrap([[]], top=5) == [0, 5]


def test_the_bootstrap_draws_clips():
    """Breaks if two questions on one clip count as two draws: their interval must not be narrower.

    100 clips with two equal values each: the spread is that of 100 values, not of 200.
    """
    values, clips = [0, 1] * 50, [str(i) for i in range(100)]
    once = bootstrap([values], [clips])
    assert bootstrap([values * 2], [clips * 2]) == once == bootstrap([values])
    assert np.diff(bootstrap([values * 2])) < 0.8 * np.diff(once)
    lines = [dict(line("a", "A", "AB"[v], "A"), clip=c) for v, c in zip(values * 2, clips * 2)]
    assert np.diff(summarise(lines)["all"]["bootstrap"]) == pytest.approx(np.diff(once))
    rows = [[Clip("/v.mp4"), "?"], [Frame("/p.png", 3), "?"], [Frame(b"png"), "?"]]
    shown = [evaluate.clip_of(Row("f:0", "id", prompt, [], "A")) for prompt in rows]
    assert shown == ["/v.mp4", "/p.png", "id"]


def test_equal_runs_do_not_differ():
    """Breaks if the two runs are drawn apart: the interval of a run and itself is a point."""
    a = np.random.default_rng(0).integers(2, size=200)
    assert paired_bootstrap(a, a) == (0.0, [0.0, 0.0])
    assert paired_bootstrap(a, a, clips=np.arange(200) // 3, groups=np.arange(200) % 4)[1] == [0, 0]
    assert paired_bootstrap(a, a + 0.25) == (0.25, [0.25, 0.25])  # a shift that is everywhere


def test_a_paired_interval_is_that_of_the_differences():
    """Breaks if the interval is not 1.96 standard errors of the differences, or b - a is a - b.

    400 questions, 80 won and 20 lost: mean .15, variance .25 - .15^2. Drawn apart, the runs' own
    variances would add up to about .5.
    """
    a = np.array([0] * 80 + [1] * 20 + [0, 1] * 150)
    b = np.array([1] * 80 + [0] * 20 + [0, 1] * 150)
    gain, (low, high) = paired_bootstrap(a, b)
    half = 1.96 * np.sqrt((0.25 - 0.15**2) / 400)
    assert gain == 0.15 and (low, high) == pytest.approx((0.15 - half, 0.15 + half), abs=0.006)
    back, (other_low, other_high) = paired_bootstrap(b, a)
    assert (back, other_low, other_high) == pytest.approx((-gain, -high, -low), abs=1e-6)
    assert paired_bootstrap(a, b) == (gain, [low, high]) != paired_bootstrap(a, b, seed=1)


def test_a_paired_interval_draws_clips():
    """Breaks if questions of one clip are drawn apart: three alike on each clip are one draw."""
    rng = np.random.default_rng(1)
    a, b = rng.integers(2, size=(2, 100))
    alone = paired_bootstrap(a, b, [f"{i:02}" for i in range(100)])
    clips = np.repeat([f"{i:02}" for i in range(100)], 3)
    assert paired_bootstrap(np.repeat(a, 3), np.repeat(b, 3), clips) == alone
    _, apart = paired_bootstrap(np.repeat(a, 3), np.repeat(b, 3))
    assert np.diff(apart) < 0.7 * np.diff(alone[1])


def test_a_paired_interval_of_groups_weighs_them_alike():
    """Breaks if a macro difference is not the mean of the groups' differences: (1 + 0) / 2."""
    a, b, groups = [0, 0, 0, 1, 0], [1, 1, 1, 1, 0], ["x", "x", "x", "y", "y"]
    assert paired_bootstrap(a, b, groups=groups) == (0.5, [0.5, 0.5])
    assert paired_bootstrap(a, b)[0] == 0.6
    for wrong in (([], []), (a, b, ["v"])):
        with pytest.raises(ValueError, match="pairs, . clips, . groups"):
            paired_bootstrap(*wrong)
