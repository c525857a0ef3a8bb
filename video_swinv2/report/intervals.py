"""Uncertainty of the figures: intervals that allow for shared sources, and the paired comparison of two models.

Letters: N videos, S sources.

A *source* is the recording that videos were cut from. Videos of one source resemble each other, so the source is the
unit of evidence: ten videos cut from one recording are closer to one observation than to ten. If every video is its own
source, the intervals are the ordinary ones.

Everything here takes and returns plain arrays and numbers. Fractions are in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t  # type: ignore[import-untyped]  # SciPy has no type hints

Interval = tuple[float, float]

LEVEL = 0.95  # of every interval
MIN_SOURCES = 30
"""With fewer sources, the spread between them is poorly known: reports say so beside their intervals."""


@dataclass(frozen=True)
class PairedDifference:
    """Two models on the same n videos: the accuracy of the second minus the accuracy of the first, with its interval.

    sources: the number of recordings that the videos were cut from. only_first, only_second: how many videos only that
    one of the two answers correctly. p_value: of `swap_test`.
    """

    n: int
    sources: int
    difference: float
    interval: Interval
    only_first: int
    only_second: int
    p_value: float


def number_sources(origins: Sequence[str]) -> NDArray[np.int64]:
    """(N,) the number 0..S-1 of each video's source; a video of unknown origin ("") is a source of its own."""
    # The first element of a key keeps a video of unknown origin, known by its row, apart from a source whose name
    # happens to be that number.
    keys = [("source", origin) if origin else ("video", str(row)) for row, origin in enumerate(origins)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def share_interval(
    values: NDArray[np.float64],
    sources: NDArray[np.int64],
    *,
    weights: NDArray[np.float64] | None = None,
    expected: NDArray[np.float64] | None = None,
) -> Interval:
    """Wilson's interval of the mean of N >= 1 values in 0..1, on the effective number of videos.

    values: (N,), such as 1.0 where an answer is correct. sources: (N,) the number of each video's source. weights: (N,)
    of a weighted mean, summing to 1. expected: (N,) what the residual of each value is taken from; by default the mean.

    n videos of few sources are worth fewer independent ones: n divided by the design effect, which is the variance of
    the mean with sources as units over its variance with videos as units (Kish 1965). The spread between S sources is
    itself an estimate, so the number is reduced by the ratio of the quantiles of Student's t with N - 1 and S - 1
    degrees of freedom, squared (Korn and Graubard 1998). Dean and Pagano 2015 find Wilson's interval on that number to
    keep its level best. A design effect below 1 counts as 1, so no interval is narrower than Wilson's for independent
    videos.
    """
    n, n_sources = len(values), len(np.unique(sources))
    weights = np.full(n, 1 / n) if weights is None else weights
    share = min(1.0, float(weights @ values))
    # Kish's effective sample size: N for equal weights.
    independent = 1 / float(weights @ weights)
    effect = design_effect(weights * (values - (share if expected is None else expected)), sources)
    if effect is None:
        # Nothing varies, as with a perfect score, or there is a single source: nothing is known about the spread
        # between sources, so each counts as one observation.
        return wilson_interval(share, independent * n_sources / n)
    upper = (1 + LEVEL) / 2
    return wilson_interval(share, independent / effect * (t.ppf(upper, n - 1) / t.ppf(upper, n_sources - 1)) ** 2)


def design_effect(influence: NDArray[np.float64], sources: NDArray[np.int64]) -> float | None:
    """How many times larger the variance of a figure is because videos share sources, at least 1.

    influence: (N,) the share of each video in the figure's deviation from its mean; sums to 0. Returns None if there is
    a single source or if no video deviates.
    """
    totals = _sums_by_source(influence, sources)
    n, n_sources = len(influence), len(totals)
    single = float(influence @ influence)
    if n_sources < 2 or single < 1e-24:  # rounding errors of N residuals that should be 0
        return None
    # n / (n - 1) makes the variances unbiased for n videos, and likewise for S sources.
    return max(1.0, n_sources / (n_sources - 1) * float(totals @ totals) / (n / (n - 1) * single))


def _sums_by_source(values: NDArray[np.float64], sources: NDArray[np.int64]) -> NDArray[np.float64]:
    """(S,) the sum over the videos of each source that occurs. values, sources: (N,)."""
    return np.asarray(np.bincount(np.unique(sources, return_inverse=True)[1], weights=values), dtype=np.float64)


def wilson_interval(share: float, n: float) -> Interval:
    """Wilson's score interval of a share observed in `n` trials (Wilson 1927), valid for small n and shares of 0 or 1.

    Written out because scipy.stats.binomtest only takes whole numbers. An effective number of trials is seldom whole.
    """
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), where z = 1.96 at the 95 % level.
    z = float(norm.ppf((1 + LEVEL) / 2))
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def compare_paired(first: NDArray[np.bool_], second: NDArray[np.bool_], sources: NDArray[np.int64]) -> PairedDifference:
    """Compare two models on the same videos. first, second: (N,) whether each model answers each video correctly.

    Two models agree on most videos, so their difference is known far more precisely than either accuracy. The interval
    is that of Agresti and Min 2005, which adds half a video to each of the four combinations of right and wrong: it has
    a width even if the models never differ. Its variance is multiplied by the design effect of the sources, and its
    quantile is Student's t with S - 1 degrees of freedom.
    """
    gained = second.astype(np.float64) - first  # (N,) 1 where only the second is correct, -1 where only the first is
    n, n_sources, difference = len(first), len(np.unique(sources)), float(gained.mean())
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    centre = (only_second - only_first) / (n + 2)
    variance = ((only_first + only_second + 1) / (n + 2) - centre**2) / (n + 2)
    interval = (-1.0, 1.0)  # a single source says nothing about others
    if n_sources > 1:
        # Where the models never differ, or always in the same way, each source counts as one observation.
        effect = design_effect((gained - difference) / n, sources) or n / n_sources
        half_width = float(t.ppf((1 + LEVEL) / 2, n_sources - 1)) * math.sqrt(effect * variance)
        interval = max(-1.0, centre - half_width), min(1.0, centre + half_width)
    totals = _sums_by_source(gained, sources).astype(np.int64)
    return PairedDifference(n, n_sources, difference, interval, only_first, only_second, swap_test(totals))


def swap_test(gained: NDArray[np.int64]) -> float:
    """The p value of an exact randomisation test (Fisher 1935) of two equally good models.

    gained: (S,) how many more videos of each source the second model answers correctly. If the models are equally good,
    which of them was called the second is a fair coin flip for each source. p is the probability that such flips make
    the sum as far from 0 as it is. If every video is its own source, this is McNemar's exact test.
    """
    sizes = np.abs(gained[gained != 0])
    # chances[i]: the probability that the sizes of the sources that fall to the first model sum to i.
    chances = np.zeros(int(sizes.sum()) + 1)
    chances[0] = 1.0
    for size in sizes.tolist():
        chances[size:] += chances[:-size].copy()  # flipped or not: the sum of both, halved
        chances *= 0.5
    # The sum of all gains is far from 0 if the first model's share is at most `tail`, or the second model's is.
    tail = (int(sizes.sum()) - abs(int(gained.sum()))) // 2
    return min(1.0, 2 * float(chances[: tail + 1].sum()))


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for multiple comparisons by Holm's method (Holm 1979), in the given order.

    If all pairs with an adjusted value below 0.05 are called different, the probability of one or more false calls is
    at most 5 %.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    # The smallest of m p values is multiplied by m, the next by m - 1, and so on, up to 1. `largest` keeps the order:
    # the adjusted value of a larger p value is never smaller. Example: 0.01, 0.04, 0.03 become 0.03, 0.06, 0.06.
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted
