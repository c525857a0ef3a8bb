"""Uncertainty of the figures: the cluster bootstrap, Wilson's interval, and paired tests of two models.

N videos, S sources, R resamples, M figures, K classes. A *source* is the recording that videos were cut from. Videos of
one source resemble each other, so a source is the unit that is resampled: ten clips of one recording are one piece of
evidence, not ten. Where every video is its own source this is the ordinary bootstrap.

Everything here takes and returns plain arrays; fractions are in 0..1.
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
"""(R, N) how many times each resample contains each video -> (R, M) the figures of each resample."""

LEVEL = 0.95
BOOTSTRAP_RESAMPLES = 2000
_CHUNK_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class PairedDifference:
    """Two models on the same n videos: the accuracy of the second minus that of the first, and what it rests on.

    only_first, only_second: videos that only one of the two answers correctly. p_value: McNemar's exact test.
    """

    n: int
    difference: float
    interval: Interval
    only_first: int
    only_second: int
    p_value: float


def number_sources(origins: Sequence[str]) -> NDArray[np.int64]:
    """(N,) numbers 0..S-1 of the source of each video; a video of unknown origin ("") is a source of its own."""
    # The first element keeps an unnamed video apart from a source whose name happens to be the same number.
    keys = [("source", origin) if origin else ("video", str(row)) for row, origin in enumerate(origins)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys], dtype=np.int64)


def bootstrap_intervals(statistic: Statistic, sources: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """(M, 2) percentile bootstrap intervals of M figures (Efron and Tibshirani 1993, chapter 13).

    Each of BOOTSTRAP_RESAMPLES resamples draws S of the S sources with replacement and takes all videos of each, so
    resamples differ in their number of videos. sources: (N,) numbers 0..S-1. The result depends on `seed` alone.
    """
    figures = np.concatenate([statistic(times) for times in _resamples(sources, seed)])  # (R, M)
    return np.asarray(np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T)  # (2, M) -> (M, 2)


def share_intervals(statistic: Statistic, sources: NDArray[np.int64], seed: int) -> list[Interval]:
    """Bootstrap intervals of M figures that are shares, with Wilson's interval for those that are exactly 0 or 1.

    The bootstrap cannot judge a perfect score: every resample of 5 correct answers out of 5 has 5 correct answers, so
    its interval is [1, 1] however few there are. Wilson's interval for 5 of 5 starts at 0.57. Its number of trials is
    the number of sources, which are the independent observations.
    """
    intervals = [(float(low), float(high)) for low, high in bootstrap_intervals(statistic, sources, seed)]
    n = len(np.unique(sources))
    return [wilson_interval(low, n) if low == high and low in (0.0, 1.0) else (low, high) for low, high in intervals]


def mean_statistic(values: NDArray[np.float64]) -> Statistic:
    """The mean over the videos of a resample. values: (N, M), for instance 1.0 where a video is answered correctly."""
    # (R, N) @ (N, M) sums over the videos of each resample; dividing by their number (R, 1) gives means.
    return lambda times: np.asarray((times @ values) / times.sum(axis=1, keepdims=True))


def class_mean_statistic(labels: NDArray[np.int64], correct: NDArray[np.float64]) -> Statistic:
    """Mean class accuracy: the mean, over the classes a resample contains, of the accuracy in each. correct: (N,).

    A rare class is missing from some resamples. It is left out of their mean: it has no accuracy there.
    """
    # Sort the videos by class once; np.add.reduceat then sums each run of equal labels, starting at `starts`.
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))

    def statistic(times: NDArray[np.float64]) -> NDArray[np.float64]:
        n_correct = np.add.reduceat((times * correct)[:, order], starts, axis=1)  # (R, N) -> (R, classes with videos)
        n_drawn = np.add.reduceat(times[:, order], starts, axis=1)
        recall = np.divide(n_correct, n_drawn, out=np.zeros_like(n_correct), where=n_drawn > 0)
        return np.asarray(recall.sum(axis=1, keepdims=True) / (n_drawn > 0).sum(axis=1, keepdims=True))  # (R, 1)

    return statistic


def stack_statistics(*statistics: Statistic) -> Statistic:
    """Several statistics of the same resamples, side by side: (R, M1), (R, M2), ... -> (R, M1 + M2 + ...)."""
    return lambda times: np.concatenate([statistic(times) for statistic in statistics], axis=1)


def wilson_interval(share: float, n: float) -> Interval:
    """Wilson's score interval of a share observed in `n` trials (Wilson 1927); it holds for small n and shares of 0, 1.

    Written out because scipy.stats.binomtest takes whole counts only: the share of a class counts its videos and `n`
    its sources, so that share * n, the number of correct sources, is seldom whole.
    """
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half_width) / scale), min(1.0, (centre + half_width) / scale)


def compare_paired(
    first: NDArray[np.bool_], second: NDArray[np.bool_], sources: NDArray[np.int64], seed: int
) -> PairedDifference:
    """Compare two models on the same videos. first, second: (N,) whether each answers the video correctly.

    Two models agree on most videos, so their difference is known far better than either accuracy: resampling the
    per-video difference keeps the pairing, where comparing the two separate intervals would ignore it.
    """
    gained = second.astype(np.float64) - first  # (N,) 1 where only the second is correct, -1 where only the first is
    low, high = bootstrap_intervals(mean_statistic(gained[:, None]), sources, seed)[0].tolist()
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    # McNemar's exact test: if the models are equally good, each video that only one of them answers correctly is a
    # fair coin flip. Videos on which they agree say nothing about the difference.
    discordant = only_first + only_second
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return PairedDifference(len(first), float(gained.mean()), (low, high), only_first, only_second, p_value)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for multiple tests by Holm's method (Holm 1979), in the given order.

    Rejecting those below 0.05 makes even one false rejection among all of them no likelier than 5 %.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    # The smallest of m p values is multiplied by m, the next by m - 1, ...; no value may fall below a smaller one's.
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _resamples(sources: NDArray[np.int64], seed: int) -> Iterator[NDArray[np.float64]]:
    """Yield (rows, N) arrays: how many times each resample contains each video; all together they have R rows.

    In chunks, because R x N numbers at once would not fit in memory for a large test.
    """
    rng = np.random.default_rng(seed)
    n_sources = int(sources.max()) + 1
    chunk_rows = max(1, _CHUNK_ELEMENTS // max(n_sources, len(sources)))
    for first in range(0, BOOTSTRAP_RESAMPLES, chunk_rows):
        rows = min(chunk_rows, BOOTSTRAP_RESAMPLES - first)
        # (rows, S) source numbers. Adding S * row gives every resample a range of its own, so that one bincount over
        # the flat array counts all of them: (rows * S,) -> (rows, S) how often each source was drawn.
        drawn = rng.integers(0, n_sources, size=(rows, n_sources)) + n_sources * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n_sources).reshape(rows, n_sources)
        # A video is in a resample as often as its source: (rows, S) -> (rows, N).
        yield times[:, sources].astype(np.float64)
