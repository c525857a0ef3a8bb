"""Every figure of a test, computed from its scores alone: accuracy, interval, bounds, per class, confusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from video_swinv2.errors import UserError
from video_swinv2.report.intervals import (
    Interval,
    class_mean,
    of_shares,
    shares,
    source_numbers,
    together,
    wilson,
)
from video_swinv2.report.scores import Scores

_CHUNK_VIDEOS = 1024


@dataclass(frozen=True)
class ClassAccuracy:
    """One class: its scored videos and the share of them answered rightly, None where there are none.

    The interval is Wilson's with the sources of the class, not their videos, as independent trials: rather too wide.
    """

    name: str
    n: int
    accuracy: float | None
    interval: Interval | None = None


@dataclass(frozen=True)
class ConfusedPair:
    """`count` videos of class `label` were answered `answer`; `share` is of the scored videos of `label`."""

    label: str
    answer: str
    count: int
    share: float


@dataclass(frozen=True)
class Metrics:
    """Figures of one test; fractions in 0..1. Accuracies are over scored videos, bounds over all that were listed.

    Intervals are of 95 %, from resamples of the `sources` that the scored videos were cut from.
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
        """The accuracies as every result file names them."""
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
    """(scored videos, K) class probabilities; "prob" is the mean over views of softmax, "logit" softmax of the mean."""
    logits = scores.logits[scores.scored]
    # In chunks: float64 copies of all views of a large test would not fit in memory.
    chunks = [logits[first : first + _CHUNK_VIDEOS] for first in range(0, len(logits), _CHUNK_VIDEOS)]
    parts = [average_views(chunk.astype(np.float64), average) for chunk in chunks]
    return np.concatenate([np.empty((0, logits.shape[2])), *parts])


def average_views(logits: NDArray[np.float64], average: str) -> NDArray[np.float64]:
    """(N, V, K) logits -> (N, K) probabilities, views averaged by "prob" or "logit"; ValueError for anything else."""
    if average == "prob":
        return np.asarray(softmax(logits).mean(axis=1))
    if average == "logit":
        return softmax(logits.mean(axis=1))
    raise ValueError(f"views are averaged as 'prob' or 'logit', not {average!r}")


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def ranking(probabilities: NDArray[np.float64], top: int) -> NDArray[np.int64]:
    """(N, min(top, K)) classes, most probable first; of equals the lower index first, so that every figure agrees."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :top]


def most_confused(confusion: NDArray[np.int64], classes: tuple[str, ...], most: int = 12) -> tuple[ConfusedPair, ...]:
    """The `most` commonest wrong answers, by count, then by share of the class. confusion: (K, K), rows are labels."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    counts = wrong[rows, columns]
    shares = counts / confusion.sum(axis=1)[rows]
    order = np.lexsort((-shares, -counts))[:most]
    return tuple(ConfusedPair(classes[rows[i]], classes[columns[i]], int(counts[i]), float(shares[i])) for i in order)


def measure_scores(scores: Scores, probabilities: NDArray[np.float64], *, seed: int) -> Metrics:
    """All figures of a test from probabilities (scored videos, K), those of `video_probabilities`.

    `seed` is the bootstrap's. Raises UserError where not one video was scored.
    """
    # Videos that failed in preparation are no entries any more, but they were listed: leaving them out would flatter.
    listed, labels = len(scores.paths) + scores.metadata.get("lost_in_preparation", 0), scores.labels[scores.scored]
    if labels.size == 0:
        first = f"; the first: {scores.paths[0]}: {scores.reasons[0]}" if scores.paths else ""
        raise UserError(f"no accuracy: none of the {listed} listed videos could be scored{first}")
    sources = sources_of(scores)
    return measure(labels, ranking(probabilities, 5), scores.classes, listed=listed, seed=seed, sources=sources)


def sources_of(scores: Scores) -> NDArray[np.int64]:
    """(scored videos,) number of the source each was cut from; each its own where the scores do not tell."""
    origins = scores.metadata.get("origins") or [""] * len(scores.paths)
    return source_numbers([origin for origin, scored in zip(origins, scores.scored, strict=True) if scored])


def measure(
    labels: NDArray[np.int64],
    ranked: NDArray[np.int64],
    names: tuple[str, ...],
    *,
    listed: int,
    seed: int,
    sources: NDArray[np.int64] | None = None,
) -> Metrics:
    """The same from answers: labels (N,) of N >= 1 samples, ranked (N, up to 5) classes, the best first, -1 for none.

    `listed` counts the samples that were meant to be scored, N of which were. sources: (N,) number of the source of
    each; by default each is its own.
    """
    sources = np.arange(labels.size) if sources is None else sources
    answers, hits = ranked[:, 0], (ranked == labels[:, None]).any(axis=1)
    right = answers == labels
    confusion = confusion_matrix(labels, answers, labels=np.arange(len(names)))
    per_class = _per_class(labels, answers, names, sources)
    drawn = together(shares(np.stack([right, hits], axis=1).astype(np.float64)), class_mean(labels, right))
    intervals = of_shares(drawn, sources, seed)
    correct = int(accuracy_score(labels, answers, normalize=False))
    failed = listed - labels.size
    return Metrics(
        top1=correct / labels.size,
        top5=float(hits.mean()),
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
    classes = np.arange(len(names))
    recall = recall_score(labels, answers, labels=classes, average=None, zero_division=0.0)
    counts = np.bincount(labels, minlength=classes.size)
    trials = np.bincount(np.unique(np.stack([labels, sources]), axis=1)[0], minlength=classes.size)
    return tuple(
        ClassAccuracy(name, int(n), float(share), wilson(float(share), int(of))) if n else ClassAccuracy(name, 0, None)
        for name, n, share, of in zip(names, counts, recall, trials, strict=True)
    )
