"""How sure a score is: intervals of shares and means."""

import math

import numpy as np


def wilson(right, n, z=1.96):
    """95% interval of a share: Wilson's (low, high). n = 0: (0, 1). Source: Wilson 1927."""
    if n == 0:
        return 0.0, 1.0
    p, zz = right / n, z * z / n
    middle, half = (p + zz / 2) / (1 + zz), z / (1 + zz) * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(groups, clips=None, seed=0, draws=1000, top=1.0):
    """95% interval of the mean of group means: [low, high]. Source: Efron 1979, percentiles.

    groups: lists of values, each resampled on its own; one list = a micro average. clips: the same
    lists of the values' clips: questions on one clip are no independent draws, so clips are drawn,
    with all their values; None = each value has its own. No value at all: [0, top].
    """
    rng, means = np.random.default_rng(seed), []
    for k, values in enumerate(groups):
        if not len(values):
            continue
        labels = clips[k] if clips else range(len(values))
        _, clip = np.unique(labels, return_inverse=True)
        total, n = np.bincount(clip, np.asarray(values, float)), np.bincount(clip)
        picks = [rng.integers(len(n), size=len(n)) for _ in range(draws)]
        means.append([total[pick].sum() / n[pick].sum() for pick in picks])  # (draws,)
    if not means:
        return [0.0, top]
    return [round(float(v), 6) for v in np.percentile(np.mean(means, 0), (2.5, 97.5))]


def paired_bootstrap(a, b, clips=None, seed=0, draws=1000, groups=None):
    """Two runs on the same questions -> (mean of b - a, its 95% interval [low, high]).

    a, b: a value a question, in the same order. clips: the questions' clips; a clip is drawn with
    all its questions and for both runs at once. None = each question has its own. groups: the
    questions' groups, whose means then weigh alike (a macro average). None = micro.
    Raises ValueError for no question, or lists of different lengths. Source: Efron 1979.
    """
    gains = np.asarray(b, float) - np.asarray(a, float)
    clips = np.arange(len(gains)) if clips is None else np.asarray(clips)
    labels = np.zeros(len(gains)) if groups is None else np.asarray(groups)
    if not 0 < len(gains) == len(clips) == len(labels):
        raise ValueError(f"{len(gains)} pairs, {len(clips)} clips, {len(labels)} groups")

    parts = [labels == label for label in np.unique(labels)]
    values = [gains[part] for part in parts]
    interval = bootstrap(values, [clips[part] for part in parts], seed, draws)
    return float(np.mean([part.mean() for part in values])), interval
