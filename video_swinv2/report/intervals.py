"""Uncertainty of the figures: the cluster bootstrap, Wilson's interval, and the paired comparison of two models.

Letters: N videos, S sources, R resamples, M figures, K classes.

A *source* is the recording that videos were cut from. Videos of one source resemble each other, so the source is the
unit that is resampled: ten videos cut from one recording are closer to one piece of evidence than to ten. If every
video is its own source, this is the ordinary bootstrap.

Everything here takes and returns plain arrays and numbers. Fractions are in 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest  # type: ignore[import-untyped]  # SciPy has no type hints

Interval = tuple[float, float]
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""(R, N) how many times each resample contains each video -> (R, M) the figures of each resample.

A resample is given as counts rather than as a list of videos, so that figures of all resamples are matrix products.
"""

LEVEL = 0.95  # of every interval
BOOTSTRAP_RESAMPLES = 2000  # R
_CHUNK_ELEMENTS = 1 << 21  # of a chunk of resamples: 16 MiB in float64


@dataclass(frozen=True)
class PairedDifference:
    """Two models on the same n videos: the accuracy of the second minus the accuracy of the first, with its interval.

    only_first, only_second: how many videos only that one of the two answers correctly. p_value: of McNemar's exact
    test.
    """

    n: int
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


def bootstrap_intervals(statistic: Statistic, sources: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """(M, 2) percentile bootstrap intervals of M figures (Efron and Tibshirani 1993, chapter 13).

    Each of BOOTSTRAP_RESAMPLES resamples draws S of the S sources with replacement and takes all videos of each, so
    resamples differ in their number of videos. sources: (N,) numbers 0..S-1. Equal arguments give equal results.
    """
    figures = np.concatenate([statistic(times) for times in _resamples(sources, seed)])  # (R, M)
    return np.asarray(np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T)  # (2, M) -> (M, 2)


def share_intervals(statistic: Statistic, sources: NDArray[np.int64], seed: int) -> list[Interval]:
    """Bootstrap intervals of M figures that are shares, but Wilson's interval for a figure that is exactly 0 or 1.

    The bootstrap cannot judge a perfect score: if 5 answers out of 5 are correct, so are all answers of every resample,
    and the interval is [1, 1] however small the sample. Wilson's interval for 5 of 5 starts at 0.57. It takes the
    sources for trials, because they are the independent observations.
    """
    intervals = [(float(low), float(high)) for low, high in bootstrap_intervals(statistic, sources, seed)]
    n = len(np.unique(sources))
    return [wilson_interval(low, n) if low == high and low in (0.0, 1.0) else (low, high) for low, high in intervals]


def mean_statistic(values: NDArray[np.float64]) -> Statistic:
    """The mean over the videos of a resample. values: (N, M), for example 1.0 where a video is answered correctly."""
    # (R, N) @ (N, M) sums over the videos of each resample; dividing by their number (R, 1) gives means.
    return lambda times: np.asarray((times @ values) / times.sum(axis=1, keepdims=True))


def class_mean_statistic(labels: NDArray[np.int64], correct: NDArray[np.float64]) -> Statistic:
    """Mean class accuracy: the accuracy in each class that a resample contains, averaged over these classes.

    labels, correct: (N,), correct is 1 where the answer is right. A rare class is missing from some resamples. It is
    left out of their mean, because it has no accuracy there.
    """
    # Sort the videos by class once. np.add.reduceat then sums over each run of equal labels; runs begin at `starts`.
    # Labels (2, 0, 2) are sorted to (0, 2, 2), whose runs start at 0 and 1.
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))

    def statistic(times: NDArray[np.float64]) -> NDArray[np.float64]:
        n_correct = np.add.reduceat((times * correct)[:, order], starts, axis=1)  # (R, N) -> (R, classes with videos)
        n_drawn = np.add.reduceat(times[:, order], starts, axis=1)
        # Where a class was not drawn, 0 / 0 is replaced by 0, which adds nothing to the sum.
        recall = np.divide(n_correct, n_drawn, out=np.zeros_like(n_correct), where=n_drawn > 0)
        return np.asarray(recall.sum(axis=1, keepdims=True) / (n_drawn > 0).sum(axis=1, keepdims=True))  # (R, 1)

    return statistic


def stack_statistics(*statistics: Statistic) -> Statistic:
    """Several statistics of the same resamples side by side: (R, M1), (R, M2), ... -> (R, M1 + M2 + ...)."""
    return lambda times: np.concatenate([statistic(times) for statistic in statistics], axis=1)


def wilson_interval(share: float, n: float) -> Interval:
    """Wilson's score interval of a share observed in `n` trials (Wilson 1927), valid for small n and shares of 0 or 1.

    Written out because scipy.stats.binomtest only takes whole numbers of successes. Here the share is over the videos
    of a class and `n` is the number of their sources, so share * n is seldom whole.
    """
    # (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), where z = 1.96 at the 95 % level.
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def compare_paired(
    first: NDArray[np.bool_], second: NDArray[np.bool_], sources: NDArray[np.int64], seed: int
) -> PairedDifference:
    """Compare two models on the same videos. first, second: (N,) whether each model answers each video correctly.

    Two models agree on most videos, so their difference is known far more precisely than either accuracy. Resampling
    the differences per video makes use of that; comparing the two intervals would not.
    """
    gained = second.astype(np.float64) - first  # (N,) 1 where only the second is correct, -1 where only the first is
    low, high = bootstrap_intervals(mean_statistic(gained[:, None]), sources, seed)[0].tolist()
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    # McNemar's exact test: if the models are equally good, which of them is right on a video that only one answers
    # correctly is a fair coin flip. Videos on which both are right or both are wrong say nothing about the difference.
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return PairedDifference(len(first), float(gained.mean()), (low, high), only_first, only_second, p_value)


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


def _resamples(sources: NDArray[np.int64], seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield arrays (rows, N), how many times each resample contains each video, with R rows in total.

    They come in chunks because R x N numbers would not fit in memory for a large test.
    """
    rng = np.random.default_rng(seed)
    n_sources = int(sources.max()) + 1
    chunk_rows = max(1, _CHUNK_ELEMENTS // max(n_sources, len(sources)))
    for first in range(0, BOOTSTRAP_RESAMPLES, chunk_rows):
        rows = min(chunk_rows, BOOTSTRAP_RESAMPLES - first)
        # Each row draws S source numbers: (rows, S). Adding S * row gives every resample a range of numbers of its own,
        # so that a single bincount over the flat array counts them all: (rows * S,) -> (rows, S), how often each source
        # was drawn. Example with S = 2: rows (0, 1) and (1, 1) become 0, 1, 3, 3, whose counts 1, 1, 0, 2 are (1, 1),
        # (0, 2).
        drawn = rng.integers(0, n_sources, size=(rows, n_sources)) + n_sources * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n_sources).reshape(rows, n_sources)
        # A video occurs in a resample as often as its source was drawn: (rows, S) -> (rows, N).
        yield times[:, sources].astype(np.float64)
