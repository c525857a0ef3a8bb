"""Diagnosis of a test from its scores: calibration, accuracy with fewer views, and classes in the wrong order.

Letters: N videos, V views (clips outside, crops inside), K classes, P points of the views curve.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]  # SciPy has no type hints
from scipy.special import softmax  # type: ignore[import-untyped]  # as above
from sklearn.calibration import calibration_curve

from video_swinv2.report.confusion import confusion_counts
from video_swinv2.report.intervals import Interval, share_interval, wilson_interval

RELIABILITY_BINS = 15  # as in Guo et al. 2017, "On Calibration of Modern Neural Networks"
MAX_VIEW_SUBSETS = 96  # of the whole views curve, which bounds its cost
MAX_COMBINATIONS = 10_000  # that are listed: 15 of 30 clips can be chosen in 155 million ways
_CHUNK_VIDEOS = 64  # averaged at a time, to bound the memory of (chunk, subsets, K) float64


@dataclass(frozen=True)
class ReliabilityBin:
    """The n videos whose confidence is in (low, high]: their mean confidence and their accuracy.

    The confidence in an answer is its probability, the highest of all classes.
    """

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error (ece), the mean confidence of all videos, and the bins that are not empty."""

    ece: float
    confidence: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class ViewPoint:
    """Top-1 with only `clips` x `crops` of the views: the mean over `subsets` ways of choosing them.

    The interval is over videos, as for any accuracy. It does not include the spread between choices.
    """

    clips: int
    crops: int
    subsets: int
    top1: float
    interval: Interval


@dataclass(frozen=True)
class RenamedClass:
    """A class that the model calls by the name of another: `share` of its `n` videos are answered `answer`."""

    label: str
    answer: str
    n: int
    share: float


@dataclass(frozen=True)
class ClassOrderHint:
    """Labels and answers agree once classes are renamed: the model's class list is probably in the wrong order.

    accuracy: with the classes renamed, on videos that the renaming was not fitted to. moved: the classes that get
    another name. rule: the common mistake that explains the order, in words, or "" if none does.
    """

    accuracy: float
    interval: Interval
    moved: tuple[RenamedClass, ...]
    rule: str


def measure_calibration(confidences: NDArray[np.float64], right: NDArray[np.bool_]) -> Calibration:
    """Expected calibration error over RELIABILITY_BINS equal-width bins (Guo et al. 2017, eq. 3).

    confidences: (N,) probability of the predicted class. right: (N,) whether that class was the label.
    """
    # scikit-learn returns the accuracy and the mean confidence of each non-empty bin, but not how many videos it holds.
    # Its bins include their upper edge, and so do the bins counted below: searchsorted puts a value that equals an
    # inner edge before it.
    accuracies, means = calibration_curve(right, confidences, n_bins=RELIABILITY_BINS)
    edges = np.linspace(0, 1, RELIABILITY_BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidences), minlength=RELIABILITY_BINS)
    filled = np.flatnonzero(counts)
    bins = tuple(
        ReliabilityBin(float(edges[i]), float(edges[i + 1]), int(counts[i]), float(mean), float(accuracy))
        for i, mean, accuracy in zip(filled, means, accuracies, strict=True)
    )
    # ECE = sum over bins of n_bin / N * |accuracy - confidence|.
    ece = sum(item.n * abs(item.accuracy - item.confidence) for item in bins) / len(right)
    return Calibration(ece, float(confidences.mean()), bins)


def clips_and_crops(metadata: dict[str, Any], views: int) -> tuple[int, int]:
    """(clips, crops) of a test with `views` views per video: as recorded, else as in the name of the protocol.

    If clips times crops is not `views`, there is a fallback. When the crops alone match, the views are crops of one
    clip: a clip protocol run on still images. Otherwise each view counts as a clip with one crop.
    """
    # Names of published protocols end in the numbers: "videoswin-4x3".
    named = re.search(r"(\d{1,6})x(\d{1,6})$", str(metadata.get("protocol", "")))
    clips, crops = (int(part) for part in named.groups()) if named else (views, 1)
    recorded = metadata.get("protocol_numbers") or {}
    clips, crops = recorded.get("clips") or clips, recorded.get("crops") or crops
    if clips * crops == views:
        return clips, crops
    return (1, views) if crops == views else (views, 1)


def views_curve(
    logits: NDArray[np.float16],
    labels: NDArray[np.int64],
    sources: NDArray[np.int64],
    view_counts: tuple[int, int],
    *,
    average: str,
    seed: int,
) -> tuple[ViewPoint, ...]:
    """Top-1 with every smaller number of clips and crops, from the scores of one test: (1, 1) to `view_counts`.

    logits: (N, V, K), finite. labels, sources: (N,). view_counts: (clips, crops). Each of the P points is the mean over
    subsets with its numbers of clips and crops. It takes all such subsets or, if there are too many, a sample drawn
    with `seed`, so that the whole curve takes at most about MAX_VIEW_SUBSETS subsets.
    """
    points = [(clips, crops) for crops in range(1, view_counts[1] + 1) for clips in range(1, view_counts[0] + 1)]
    subsets = [_view_subsets(view_counts, point, max(1, MAX_VIEW_SUBSETS // len(points)), seed) for point in points]
    weights = np.concatenate(subsets)  # (subsets of all points, V)
    point_ends = np.cumsum([len(rows) for rows in subsets])[:-1]  # where the subsets of the next point begin
    right = np.empty((len(labels), len(points)))  # (N, P) share of a point's subsets with which a video is right
    for first in range(0, len(labels), _CHUNK_VIDEOS):
        rows = slice(first, first + _CHUNK_VIDEOS)
        views = logits[rows].astype(np.float64)
        # Averaging a subset of views is a weighted sum over all of them: (subsets, V) @ (chunk, V, K) -> (chunk,
        # subsets, K). For "logit", the softmax of the mean is left out: it does not change which class is largest.
        averages = weights @ (softmax(views, axis=-1) if average == "prob" else views)
        hits = averages.argmax(axis=2) == labels[rows, None]  # (chunk, subsets)
        # Split along the subsets into P pieces, whose means are the columns: P times (chunk,) -> (chunk, P).
        right[rows] = np.stack([part.mean(axis=1) for part in np.split(hits, point_ends, axis=1)], axis=1)
    return tuple(
        ViewPoint(*point, len(rows), float(share.mean()), share_interval(share, sources))
        for point, rows, share in zip(points, subsets, right.T, strict=True)
    )


def _view_subsets(
    view_counts: tuple[int, int], point: tuple[int, int], max_subsets: int, seed: int
) -> NDArray[np.float64]:
    """(subsets, V) weights: 1 / (number of views taken) for the views that a subset takes, 0 for the others.

    Example: one of 2 clips and 2 of 3 crops makes 2 x 3 subsets of 2 views; a row is 0.5, 0.5, 0, 0, 0, 0 for instance.
    """
    # Every choice of clips is combined with every choice of crops. Subset i is the pair (i // number of crop choices,
    # i % number of crop choices), so that a sample can be drawn from the numbers without listing all pairs.
    clips, crops = (_combinations(n, k, seed) for n, k in zip(view_counts, point, strict=True))
    numbers = range(len(clips) * len(crops))
    drawn = numbers if len(numbers) <= max_subsets else sorted(random.Random(seed).sample(numbers, max_subsets))
    weights = np.zeros((len(drawn), *view_counts))  # (subsets, clips, crops)
    for row, number in zip(weights, drawn, strict=True):
        # np.ix_ addresses the block of the chosen clips (rows) and crops (columns).
        row[np.ix_(clips[number // len(crops)], crops[number % len(crops)])] = 1 / (point[0] * point[1])
    return weights.reshape(len(drawn), -1)  # views are stored clips outside, crops inside


def _combinations(n: int, k: int, seed: int) -> list[tuple[int, ...]]:
    """The ways of choosing k of n; of more than MAX_COMBINATIONS, MAX_VIEW_SUBSETS that are drawn with `seed`."""
    if math.comb(n, k) <= MAX_COMBINATIONS:
        return list(itertools.combinations(range(n), k))
    draw = random.Random(seed)
    return [tuple(sorted(draw.sample(range(n), k))) for _ in range(MAX_VIEW_SUBSETS)]


def class_order_hint(
    labels: NDArray[np.int64], answers: NDArray[np.int64], classes: Sequence[str], seed: int
) -> ClassOrderHint | None:
    """Check whether the answers are right except for the names of the classes; None if they are not.

    labels, answers: (N,). With K! renamings to choose from, one can be found that fits almost any answers. So one is
    fitted to one half of the videos and judged on the other half, and vice versa. It counts if it at least doubles the
    accuracy, and if the lower end of its interval is above both the upper end of the plain accuracy's interval and the
    accuracy of always answering the most frequent class.
    """
    n, k = len(labels), len(classes)
    if n < 2 or k < 2:
        return None
    # (N,) bool, a random half of the videos.
    half = np.random.default_rng(seed).permutation(n) % 2 == 0
    # How many videos of the half that was not fitted are answered as the renaming predicts: renaming[label] == answer.
    explained = sum(
        int((_best_renaming(labels[fitted], answers[fitted], k)[labels[~fitted]] == answers[~fitted]).sum())
        for fitted in (half, ~half)
    )
    share, interval = explained / n, wilson_interval(explained / n, n)
    top1, commonest = float((labels == answers).mean()), np.bincount(labels).max() / n
    if share < 2 * top1 or interval[0] <= max(commonest, wilson_interval(top1, n)[1]):
        return None
    # There is a wrong order. It is reported as fitted to all videos; classes without videos are left out, because for
    # them any name fits.
    renamed = _best_renaming(labels, answers, k).tolist()
    present = np.flatnonzero(np.bincount(labels, minlength=k)).tolist()
    moved = [
        RenamedClass(
            classes[i],
            classes[renamed[i]],
            int((labels == i).sum()),
            float((answers[labels == i] == renamed[i]).mean()),
        )
        for i in present
        if renamed[i] != i
    ]
    return ClassOrderHint(share, interval, tuple(moved), _ordering_rule({i: renamed[i] for i in present}, classes))


def _best_renaming(labels: NDArray[np.int64], answers: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """(K,) the one-to-one renaming of labels to answers that explains the most videos.

    This is the assignment problem: choose one cell in each row and column of the confusion matrix with the largest sum.
    """
    table = confusion_counts(labels, answers, k)
    return np.asarray(linear_sum_assignment(table, maximize=True)[1], dtype=np.int64)


def _ordering_rule(renamed: dict[int, int], classes: Sequence[str]) -> str:
    """The common mistake that moves class i to index renamed[i], in words; "" if none explains nine in ten classes."""
    k = len(classes)
    # For each mistake, the class at each position of the list that it produces.
    rules = {
        "in alphabetical order": sorted(range(k), key=lambda i: classes[i]),
        "in alphabetical order, ignoring case": sorted(range(k), key=lambda i: classes[i].lower()),
        "by their numbers sorted as text (0, 1, 10, 11, ...)": sorted(range(k), key=str),
        "one place later (numbers counted from 1)": [k - 1, *range(k - 1)],
        "one place earlier (numbers counted from 0)": [*range(1, k), 0],
    }
    for words, order in rules.items():
        # The inverse: the position at which each class ends up.
        index = {label: position for position, label in enumerate(order)}
        agreeing = sum(index[label] == answer for label, answer in renamed.items())
        # A rule that leaves the classes where they are, such as sorting a sorted list, explains nothing.
        if agreeing >= 0.9 * len(renamed) and order != list(range(k)):
            return words
    return ""
