"""How sure a figure is: resampled videos, Wilson's interval, and two runs on the same videos; plain arrays in and out.

N videos, R resamples, M figures, K classes. Videos cut from one source are drawn together, because they are alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest  # type: ignore[import-untyped]  # SciPy comes without types

Interval = tuple[float, float]
Figure = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""How often each video is in each resample (R, N) -> figures of the resamples (R, M)."""

LEVEL = 0.95
BOOTSTRAP_DRAWS = 2000
_CHUNK_CELLS = 1 << 21


@dataclass(frozen=True)
class Paired:
    """Two runs on the same n videos: accuracy of the second less that of the first, and which videos decide it."""

    n: int
    difference: float
    interval: Interval
    only_first: int
    only_second: int
    p_value: float


def source_numbers(origins: Sequence[str]) -> NDArray[np.int64]:
    """(N,) number of the source of each video; one whose source is not known ("") is a source of its own."""
    names = [("of", origin) if origin else ("own", str(place)) for place, origin in enumerate(origins)]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def bootstrap(figure: Figure, sources: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Percentile intervals (M, 2) of figures over resamples of the sources, BOOTSTRAP_DRAWS of them.

    Each resample draws as many sources as there are, with replacement, and takes all videos of each.
    """
    drawn = np.concatenate([figure(times) for times in _resamples(sources, seed)])
    return np.asarray(np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0).T)


def of_shares(figure: Figure, sources: NDArray[np.int64], seed: int) -> list[Interval]:
    """`bootstrap` of M figures between 0 and 1, Wilson's interval over the sources where all resamples are all 0 or 1.

    Resamples of nothing but right answers know no doubt, however few they are.
    """
    found = [(float(low), float(high)) for low, high in bootstrap(figure, sources, seed)]
    n = len(np.unique(sources))
    return [wilson(low, n) if low == high and low in (0.0, 1.0) else (low, high) for low, high in found]


def shares(correct: NDArray[np.float64]) -> Figure:
    """correct: (N, M), 0 to 1 for each video; their means over a resample."""
    return lambda times: np.asarray((times @ correct) / times.sum(axis=1, keepdims=True))


def class_mean(labels: NDArray[np.int64], correct: NDArray[np.float64]) -> Figure:
    """correct: (N,). The mean over classes of the share answered rightly, over the classes that were drawn."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))

    def figure(times: NDArray[np.float64]) -> NDArray[np.float64]:
        right = np.add.reduceat((times * correct)[:, order], starts, axis=1)
        drawn = np.add.reduceat(times[:, order], starts, axis=1)
        recall = np.divide(right, drawn, out=np.zeros_like(right), where=drawn > 0)
        return np.asarray(recall.sum(axis=1, keepdims=True) / (drawn > 0).sum(axis=1, keepdims=True))

    return figure


def together(*figures: Figure) -> Figure:
    """Several figures of the same resamples, side by side."""
    return lambda times: np.concatenate([figure(times) for figure in figures], axis=1)


def wilson(share: float, n: float) -> Interval:
    """Wilson's interval of a share of `n`: right for small n too, where a resample of 5 right of 5 knows no doubt."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def compare_pairs(first: NDArray[np.bool_], second: NDArray[np.bool_], sources: NDArray[np.int64], seed: int) -> Paired:
    """Two runs' right answers (N,) to the same videos: paired difference, and McNemar's test in its exact form."""
    gained = second.astype(np.float64) - first
    low, high = bootstrap(shares(gained[:, None]), sources, seed)[0].tolist()
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    differing = only_first + only_second
    p_value = float(binomtest(only_first, differing).pvalue) if differing else 1.0
    return Paired(len(first), float(gained.mean()), (low, high), only_first, only_second, p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values of several tests, each raised so that one below 0.05 is as rare as for a single test (Holm 1979)."""
    raised = [0.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        raised[place] = highest
    return raised


def _resamples(sources: NDArray[np.int64], seed: int) -> Iterator[NDArray[np.float64]]:
    """(R, N) how often each video is in each resample; in chunks, since all at once would not fit in memory."""
    rng = np.random.default_rng(seed)
    n = int(sources.max()) + 1
    most = max(1, _CHUNK_CELLS // max(n, len(sources)))
    for first in range(0, BOOTSTRAP_DRAWS, most):
        rows = min(most, BOOTSTRAP_DRAWS - first)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
        yield times[:, sources].astype(np.float64)
