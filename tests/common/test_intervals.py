"""Intervals against known deviations and by hand."""

import numpy as np
import pytest
from scripted import line

import evaluate
from common.formats import Clip, Frame, Row
from evaluate import bootstrap, summarise


def test_bootstrap():
    """Breaks if the draws are not seeded, or the interval is not that of the mean of the groups'
    means.
    """
    values = [0, 1] * 50
    low, high = bootstrap([values])
    few = np.arange(50) ** 2
    assert bootstrap([few]) == bootstrap([few]) != bootstrap([few], seed=1)
    assert (low, high) == pytest.approx(
        (0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.02
    )  # sqrt(.25 / 100) = .05
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
