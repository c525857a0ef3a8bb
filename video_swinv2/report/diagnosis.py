"""What a score file says beyond its accuracy: calibration, fewer views, and classes in another order than the labels'.

N videos, V views (clips outside, crops inside), K classes, P points of the views curve.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # SciPy comes without types
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from video_swinv2.report.intervals import Interval, of_shares, shares, wilson
from video_swinv2.report.metrics import softmax

RELIABILITY_BINS = 15  # the number of Guo et al. 2017, "On Calibration of Modern Neural Networks"
MOST_SUBSETS = 96
_CHUNK_VIDEOS = 64


@dataclass(frozen=True)
class ReliabilityBin:
    """Videos whose highest probability is in (low, high]: how sure the answers were on average, how often right."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """`ece` is the mean distance of confidence and accuracy over the bins, weighted by videos. Only filled bins."""

    ece: float
    confidence: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class ViewPoint:
    """Top-1 with `clips` x `crops` of the views: the mean over `subsets` choices of them, the interval over videos."""

    clips: int
    crops: int
    subsets: int
    top1: float
    interval: Interval


@dataclass(frozen=True)
class Moved:
    """A class whose videos the model mostly calls by another: `share` of its `n` videos."""

    label: str
    answer: str
    n: int
    share: float


@dataclass(frozen=True)
class OrderHint:
    """The labels agree with the answers once classes are renamed: `accuracy` on videos the renaming was not found on.

    rule: the mistake that makes such an order, in words, or "" where none is known.
    """

    accuracy: float
    interval: Interval
    moved: tuple[Moved, ...]
    rule: str


def calibrate(confidences: NDArray[np.float64], right: NDArray[np.bool_]) -> Calibration:
    """confidences: (N,) probability of the class answered; right: (N,) whether it was the label."""
    accuracies, means = calibration_curve(right, confidences, n_bins=RELIABILITY_BINS)
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidences), minlength=RELIABILITY_BINS)
    filled = np.flatnonzero(counts)
    bins = tuple(
        ReliabilityBin(float(edges[place]), float(edges[place + 1]), int(counts[place]), float(mean), float(accuracy))
        for place, mean, accuracy in zip(filled, means, accuracies, strict=True)
    )
    ece = sum(item.n * abs(item.accuracy - item.confidence) for item in bins) / len(right)
    return Calibration(ece, float(confidences.mean()), bins)


def view_grid(metadata: dict[str, Any], views: int) -> tuple[int, int]:
    """(clips, crops) of a test of so many views: as recorded, else as the protocol's name says, else clips alone."""
    named = re.search(r"(\d+)x(\d+)$", str(metadata.get("protocol", "")))
    clips, crops = (int(part) for part in named.groups()) if named else (views, 1)
    numbers = metadata.get("protocol_numbers", {})
    clips, crops = numbers.get("clips", clips), numbers.get("crops", crops)
    if clips * crops == views:
        return clips, crops
    return (1, views) if crops == views else (views, 1)


def views_curve(
    logits: NDArray[np.float16],
    labels: NDArray[np.int64],
    sources: NDArray[np.int64],
    grid: tuple[int, int],
    *,
    average: str,
    seed: int,
) -> tuple[ViewPoint, ...]:
    """Accuracy with fewer clips and crops of the same test. logits: (N, V, K) finite; labels, sources: (N,).

    A point is the mean over choices of its clips and crops: all of them, or as many as keep the whole curve within
    MOST_SUBSETS, drawn by the seed.
    """
    points = [(clips, crops) for crops in range(1, grid[1] + 1) for clips in range(1, grid[0] + 1)]
    chosen = [_subsets(grid, point, max(1, MOST_SUBSETS // len(points)), seed) for point in points]
    weights = np.concatenate(chosen)
    ends = np.cumsum([len(rows) for rows in chosen])[:-1]
    right = np.empty((len(labels), len(points)))
    for first in range(0, len(labels), _CHUNK_VIDEOS):
        rows = slice(first, first + _CHUNK_VIDEOS)
        views = logits[rows].astype(np.float64)
        answers = (weights @ (softmax(views) if average == "prob" else views)).argmax(axis=2)
        hits = answers == labels[rows, None]
        right[rows] = np.stack([part.mean(axis=1) for part in np.split(hits, ends, axis=1)], axis=1)
    intervals = of_shares(shares(right), sources, seed)
    return tuple(
        ViewPoint(*point, len(rows), float(share), interval)
        for point, rows, share, interval in zip(points, chosen, right.mean(axis=0), intervals, strict=True)
    )


def _subsets(grid: tuple[int, int], point: tuple[int, int], most: int, seed: int) -> NDArray[np.float64]:
    """(choices, V): 1 / views in the columns of the views that a choice takes."""
    clips, crops = (list(itertools.combinations(range(n), k)) for n, k in zip(grid, point, strict=True))
    places = range(len(clips) * len(crops))
    drawn = places if len(places) <= most else sorted(random.Random(seed).sample(places, most))
    weights = np.zeros((len(drawn), *grid))
    for row, place in zip(weights, drawn, strict=True):
        row[np.ix_(clips[place // len(crops)], crops[place % len(crops)])] = 1 / (point[0] * point[1])
    return weights.reshape(len(drawn), -1)


def order_hint(
    labels: NDArray[np.int64], answers: NDArray[np.int64], classes: Sequence[str], seed: int
) -> OrderHint | None:
    """Whether the answers (N,) look right but for the names of the classes; None where they do not.

    The renaming that explains most is found on one half of the videos and judged on the other, or any answers could be
    explained. It has to at least double the accuracy, and to beat answering the commonest class throughout.
    """
    n, k = len(labels), len(classes)
    if n < 2 or k < 2:
        return None
    half = np.random.default_rng(seed).permutation(n) % 2 == 0
    explained = sum(
        int((_renaming(labels[fit], answers[fit], k)[labels[~fit]] == answers[~fit]).sum()) for fit in (half, ~half)
    )
    share, interval = explained / n, wilson(explained / n, n)
    top1, commonest = float((labels == answers).mean()), np.bincount(labels).max() / n
    if share < 2 * top1 or interval[0] <= max(commonest, wilson(top1, n)[1]):
        return None
    renamed = _renaming(labels, answers, k).tolist()
    present = np.flatnonzero(np.bincount(labels, minlength=k)).tolist()
    moved = [
        Moved(
            classes[i],
            classes[renamed[i]],
            int((labels == i).sum()),
            float((answers[labels == i] == renamed[i]).mean()),
        )
        for i in present
        if renamed[i] != i
    ]
    return OrderHint(share, interval, tuple(moved), _rule({i: renamed[i] for i in present}, classes))


def _renaming(labels: NDArray[np.int64], answers: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """(K,) the answer to expect for each label, one to one, so that as many videos as can be are as expected."""
    table = confusion_matrix(labels, answers, labels=np.arange(k))
    return np.asarray(linear_sum_assignment(table, maximize=True)[1], dtype=np.int64)


def _rule(renamed: dict[int, int], classes: Sequence[str]) -> str:
    """The usual mistake that puts classes[i] at place renamed[i], if nine in ten of the classes follow it."""
    k = len(classes)
    rules = {
        "in alphabetical order": sorted(range(k), key=lambda i: classes[i]),
        "in alphabetical order, capitals and small letters alike": sorted(range(k), key=lambda i: classes[i].lower()),
        "by their numbers sorted as text (0, 1, 10, 11, ...)": sorted(range(k), key=str),
        "one place later (numbers counted from 1)": [k - 1, *range(k - 1)],
        "one place earlier (numbers counted from 0)": [*range(1, k), 0],
    }
    for words, order in rules.items():
        place = {label: position for position, label in enumerate(order)}
        agreeing = sum(place[label] == answer for label, answer in renamed.items())
        if agreeing >= 0.9 * len(renamed) and order != list(range(k)):
            return words
    return ""
