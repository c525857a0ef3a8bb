"""Every figure of a test, computed from its scores alone: accuracy, interval, bounds, per class, confusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from video_swinv2.errors import UserError
from video_swinv2.evaluation.scores import Scores

BOOTSTRAP_DRAWS = 10_000
_CHUNK_VIDEOS = 1024


@dataclass(frozen=True)
class ClassAccuracy:
    """One class: its scored videos and the share of them answered rightly, None where there are none."""

    name: str
    n: int
    accuracy: float | None


@dataclass(frozen=True)
class ConfusedPair:
    """`count` videos of class `label` were answered `answer`; `share` is of the scored videos of `label`."""

    label: str
    answer: str
    count: int
    share: float


@dataclass(frozen=True)
class Metrics:
    """Figures of one test; fractions in 0..1. Accuracies are over scored videos, bounds over all that were listed."""

    top1: float
    top5: float
    mean_class_accuracy: float
    top1_interval: tuple[float, float]
    top1_bounds: tuple[float, float]
    per_class: tuple[ClassAccuracy, ...]
    confusion: NDArray[np.int64]
    confused_pairs: tuple[ConfusedPair, ...]
    listed: int
    scored: int
    failed: int

    def figures(self) -> dict[str, Any]:
        """The accuracies as every result file names them."""
        return {
            "top1": self.top1,
            "top5": self.top5,
            "mean_class_accuracy": self.mean_class_accuracy,
            "top1_interval": list(self.top1_interval),
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


def bootstrap_interval(correct: int, n: int, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of an accuracy over `n` videos.

    Drawing n videos with replacement and counting the right ones is drawing from Binomial(n, correct / n), so all
    resamples are one call and no resample is ever built.
    """
    draws = np.random.default_rng(seed).binomial(n, correct / n, BOOTSTRAP_DRAWS) / n
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def most_confused(confusion: NDArray[np.int64], classes: tuple[str, ...], most: int = 12) -> tuple[ConfusedPair, ...]:
    """The `most` commonest wrong answers, by count, then by share of the class. confusion: (K, K), rows are labels."""
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    counts = wrong[rows, columns]
    shares = counts / confusion.sum(axis=1)[rows]
    order = np.lexsort((-shares, -counts))[:most]
    return tuple(ConfusedPair(classes[rows[i]], classes[columns[i]], int(counts[i]), float(shares[i])) for i in order)


def compute_metrics(scores: Scores, *, average: str = "prob", seed: int = 0) -> Metrics:
    """All figures of a test; `seed` is the bootstrap's. Raises UserError where not one video was scored."""
    # Videos that failed in preparation are no entries any more, but they were listed: leaving them out would flatter.
    listed, labels = len(scores.paths) + scores.metadata.get("lost_in_preparation", 0), scores.labels[scores.scored]
    if labels.size == 0:
        first = f"; the first: {scores.paths[0]}: {scores.reasons[0]}" if scores.paths else ""
        raise UserError(f"no accuracy: none of the {listed} listed videos could be scored{first}")
    return measure(labels, ranking(video_probabilities(scores, average), 5), scores.classes, listed=listed, seed=seed)


def measure(
    labels: NDArray[np.int64], ranked: NDArray[np.int64], names: tuple[str, ...], *, listed: int, seed: int
) -> Metrics:
    """The same from answers: labels (N,) of N >= 1 samples, ranked (N, up to 5) classes, the best first, -1 for none.

    `listed` counts the samples that were meant to be scored, N of which were.
    """
    classes = np.arange(len(names))
    answers, hits = ranked[:, 0], (ranked == labels[:, None]).any(axis=1)
    correct = int(accuracy_score(labels, answers, normalize=False))
    counts = np.bincount(labels, minlength=classes.size)
    recall = recall_score(labels, answers, labels=classes, average=None, zero_division=0.0)
    confusion = confusion_matrix(labels, answers, labels=classes)
    failed = listed - labels.size
    return Metrics(
        top1=correct / labels.size,
        top5=float(hits.mean()),
        mean_class_accuracy=float(recall[counts > 0].mean()),
        top1_interval=bootstrap_interval(correct, labels.size, seed),
        top1_bounds=(correct / listed, (correct + failed) / listed),
        per_class=tuple(
            ClassAccuracy(name, int(n), float(share) if n else None)
            for name, n, share in zip(names, counts, recall, strict=True)
        ),
        confusion=confusion,
        confused_pairs=most_confused(confusion, names),
        listed=listed,
        scored=int(labels.size),
        failed=failed,
    )
