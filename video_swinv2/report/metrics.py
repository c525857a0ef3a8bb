"""The metrics of a test, computed from its scores: accuracies with intervals and bounds, per class, and confusion.

Letters: N videos, V views, K classes. A *scored* video is one that could be read; failed videos have no scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax  # type: ignore[import-untyped]  # SciPy has no type hints
from sklearn.metrics import accuracy_score, recall_score

from video_swinv2.errors import UserError
from video_swinv2.report.confusion import ConfusedPair, confusion_counts, most_confused
from video_swinv2.report.intervals import (
    Interval,
    class_mean_statistic,
    mean_statistic,
    number_sources,
    share_intervals,
    stack_statistics,
    wilson_interval,
)
from video_swinv2.report.scores import Scores

_CHUNK_VIDEOS = 1024  # averaged at a time, to bound the memory of (chunk, V, K) float64


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy in one class over its `n` scored videos; accuracy and interval are None if there are none.

    The interval is Wilson's, with the sources of the class as independent trials instead of its videos. Videos of one
    source agree, but seldom completely, so the interval errs on the wide side.
    """

    name: str
    n: int
    accuracy: float | None
    interval: Interval | None = None


@dataclass(frozen=True)
class Metrics:
    """All metrics of a test, as fractions in 0..1. Intervals are at the 95 % level; the bootstrap resamples sources.

    Accuracies are over the videos that were scored. `top1_bounds` are over all videos that were listed: what top-1
    would be if the model were wrong, or right, on every video that failed. confusion: (K, K), rows are labels, columns
    answers. sources: the number of recordings that the scored videos were cut from.
    """

    top1: float
    top5: float
    mean_class_accuracy: float
    top1_interval: Interval
    top5_interval: Interval
    mean_class_accuracy_interval: Interval
    top1_bounds: Interval
    per_class: tuple[ClassAccuracy, ...]
    confusion: NDArray[np.int64]
    confused_pairs: tuple[ConfusedPair, ...]
    listed: int
    scored: int
    failed: int
    sources: int

    def figures(self) -> dict[str, Any]:
        """The accuracies as plain JSON, under the keys that they have in every result file."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean_class_accuracy": self.mean_class_accuracy,
            "top1_interval": list(self.top1_interval),
            "top5_interval": list(self.top5_interval),
            "mean_class_accuracy_interval": list(self.mean_class_accuracy_interval),
            "top1_bounds": list(self.top1_bounds),
        }


def video_probabilities(scores: Scores, average: str = "prob") -> NDArray[np.float64]:
    """(scored videos, K) class probabilities of each scored video, its views averaged by `average_views`."""
    logits = scores.logits[scores.scored]
    # In chunks, because a float64 copy of all views of a large test would not fit in memory.
    chunks = [logits[first : first + _CHUNK_VIDEOS] for first in range(0, len(logits), _CHUNK_VIDEOS)]
    parts = [average_views(chunk.astype(np.float64), average) for chunk in chunks]
    # The empty array in front gives the shape (0, K) if no video was scored; concatenating nothing would raise.
    return np.concatenate([np.empty((0, logits.shape[2])), *parts])


def average_views(logits: NDArray[np.float64], average: str) -> NDArray[np.float64]:
    """(N, V, K) logits -> (N, K) probabilities: "prob" takes the mean of the softmax, "logit" the softmax of the mean.

    Raises ValueError for any other `average`.
    """
    if average == "prob":
        return np.asarray(softmax(logits, axis=-1).mean(axis=1))
    if average == "logit":
        return np.asarray(softmax(logits.mean(axis=1), axis=-1))
    raise ValueError(f"average: invalid value {average!r}; use 'prob' or 'logit'")


def ranking(probabilities: NDArray[np.float64], top: int) -> NDArray[np.int64]:
    """(N, min(top, K)) class indices, most probable first.

    Ties go to the lower index, so that every figure of a report takes the same class for the answer.
    """
    # A stable sort keeps tied classes in the order of their indices.
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :top]


def metrics_of_scores(scores: Scores, probabilities: NDArray[np.float64], *, seed: int) -> Metrics:
    """All metrics of a test. probabilities: (scored videos, K) from `video_probabilities`. seed: of the bootstrap.

    Raises UserError if no video was scored.
    """
    # Videos that failed in preparation have no row in the scores, but they count as listed: without them the bounds
    # would be too narrow.
    listed, labels = len(scores.paths) + scores.metadata.get("lost_in_preparation", 0), scores.labels[scores.scored]
    if labels.size == 0:
        first = f"; the first: {scores.paths[0]}: {scores.reasons[0]}" if scores.paths else ""
        raise UserError(f"no accuracy: none of the {listed} listed videos could be scored{first}")
    return metrics_of_ranking(
        labels,
        ranking(probabilities, 5),
        scores.classes,
        listed=listed,
        seed=seed,
        sources=sources_of_scored(scores),
    )


def sources_of_scored(scores: Scores) -> NDArray[np.int64]:
    """(scored videos,) the number of each video's source; each is its own source if the scores record no origins."""
    origins = scores.metadata.get("origins") or [""] * len(scores.paths)
    return number_sources([origin for origin, scored in zip(origins, scores.scored, strict=True) if scored])


def metrics_of_ranking(
    labels: NDArray[np.int64],
    ranked: NDArray[np.int64],
    names: tuple[str, ...],
    *,
    listed: int,
    seed: int,
    sources: NDArray[np.int64] | None = None,
) -> Metrics:
    """All metrics from the labels and answers of N >= 1 videos.

    labels: (N,). ranked: (N, up to 5) class indices, most probable first, -1 for no answer. names: of the K classes.
    listed: how many videos should have been scored, of which N were. sources: (N,) the number of each video's source;
    by default each is its own.
    """
    sources = np.arange(labels.size) if sources is None else sources
    answers, in_top5 = ranked[:, 0], (ranked == labels[:, None]).any(axis=1)
    right = answers == labels
    confusion = confusion_counts(labels, answers, len(names))
    per_class = _per_class(labels, answers, names, sources)
    # The bootstrap draws one set of resamples for all three accuracies: top-1, top-5, mean class accuracy.
    accuracies = stack_statistics(
        mean_statistic(np.stack([right, in_top5], axis=1).astype(np.float64)), class_mean_statistic(labels, right)
    )
    intervals = share_intervals(accuracies, sources, seed)
    correct = int(accuracy_score(labels, answers, normalize=False))
    failed = listed - labels.size
    return Metrics(
        top1=correct / labels.size,
        top5=float(in_top5.mean()),
        mean_class_accuracy=float(np.mean([row.accuracy for row in per_class if row.accuracy is not None])),
        top1_interval=intervals[0],
        top5_interval=intervals[1],
        mean_class_accuracy_interval=intervals[2],
        top1_bounds=(correct / listed, (correct + failed) / listed),
        per_class=per_class,
        confusion=confusion,
        confused_pairs=most_confused(confusion, names),
        listed=listed,
        scored=int(labels.size),
        failed=failed,
        sources=len(np.unique(sources)),
    )


def _per_class(
    labels: NDArray[np.int64], answers: NDArray[np.int64], names: tuple[str, ...], sources: NDArray[np.int64]
) -> tuple[ClassAccuracy, ...]:
    """The accuracy, also called recall, in each of the K classes."""
    classes = np.arange(len(names))
    recall = recall_score(labels, answers, labels=classes, average=None, zero_division=0.0)
    counts = np.bincount(labels, minlength=classes.size)
    # (2, N) -> (2, distinct pairs of label and source); counted by label: (K,) how many sources each class has.
    pairs = np.unique(np.stack([labels, sources]), axis=1)
    n_sources = np.bincount(pairs[0], minlength=classes.size)
    return tuple(
        ClassAccuracy(name, int(n), float(share), wilson_interval(float(share), int(trials)))
        if n
        else ClassAccuracy(name, 0, None)
        for name, n, share, trials in zip(names, counts, recall, n_sources, strict=True)
    )
