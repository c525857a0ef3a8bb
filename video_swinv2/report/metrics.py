"""The metrics of a test, computed from its scores: accuracies with intervals and bounds, per class, and confusion.

Letters: N videos, V views, K classes. A *scored* video is one that could be read; failed videos have no scores.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax  # type: ignore[import-untyped]  # SciPy has no type hints
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    precision_recall_fscore_support,
    roc_auc_score,
)

from video_swinv2.errors import UserError
from video_swinv2.report.confusion import ConfusedPair, confusion_counts, most_confused
from video_swinv2.report.intervals import Interval, number_sources, share_interval
from video_swinv2.report.scores import Scores

TOP = 5  # of top-5
_CHUNK_VIDEOS = 1024  # averaged at a time, to bound the memory of (chunk, V, K) float64


@dataclass(frozen=True)
class ClassAccuracy:
    """The accuracy, or recall, in one class over its `n` scored videos; None with its interval if there are none."""

    name: str
    n: int
    accuracy: float | None
    interval: Interval | None = None


@dataclass(frozen=True)
class DetectedClass:
    """One of two classes as the one to be found: `n` scored videos of it, and how well they are told from the others.

    pr_auc: the area under the curve of precision over recall, as average precision. A model that guesses has the share
    of the class.
    """

    name: str
    n: int
    precision: float
    recall: float
    f1: float
    pr_auc: float


@dataclass(frozen=True)
class TwoClasses:
    """The usual figures of two classes. roc_auc: the area under the ROC curve, the same for both, 0.5 by chance."""

    roc_auc: float
    classes: tuple[DetectedClass, ...]


@dataclass(frozen=True)
class Metrics:
    """All metrics of a test, as fractions in 0..1. Intervals are at the 95 % level and allow for shared sources.

    Accuracies are over the videos that were scored. top5 is None with up to five classes, where it is 1 whatever the
    model answers. chance: top-1 of a random answer, 1 / K. majority: the most frequent class, and top-1 of always
    answering it. two_classes: None unless there are two classes and both occur. `top1_bounds` are over all videos that
    were listed: what top-1 would be if the model were wrong, or right, on every video that failed. confusion: (K, K),
    rows are labels, columns answers. sources: the number of recordings that the scored videos were cut from.
    """

    top1: float
    top5: float | None
    mean_class_accuracy: float
    top1_interval: Interval
    top5_interval: Interval | None
    mean_class_accuracy_interval: Interval
    top1_bounds: Interval
    chance: float
    majority: tuple[str, float]
    two_classes: TwoClasses | None
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
            "top5_interval": self.top5_interval and list(self.top5_interval),
            "mean_class_accuracy_interval": list(self.mean_class_accuracy_interval),
            "top1_bounds": list(self.top1_bounds),
            "chance": self.chance,
            "majority": {"class": self.majority[0], "share": self.majority[1]},
            "two_classes": asdict(self.two_classes) if self.two_classes else None,
            "sources": self.sources,
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


def credits(labels: NDArray[np.int64], probabilities: NDArray[np.float64], top: int) -> NDArray[np.float64]:
    """(N,) the chance that the label is among the `top` answers, which is 0 or 1 unless the label is tied.

    labels: (N,). probabilities: (N, K). The first answer is that of `ranking`. After it, tied classes share the places
    that are left, as if they were drawn at random: a k-NN probe gives most classes a probability of exactly 0, and any
    fixed order would make some of them right or wrong by their position in the list.
    """
    raised = probabilities.copy()
    np.put_along_axis(raised, ranking(probabilities, 1), np.inf, axis=1)
    own = np.take_along_axis(raised, labels[:, None], axis=1)  # (N, 1)
    better, tied = (raised > own).sum(axis=1), (raised == own).sum(axis=1)
    return np.clip((top - better) / tied, 0.0, 1.0)


def metrics_of_scores(scores: Scores, probabilities: NDArray[np.float64]) -> Metrics:
    """All metrics of a test. probabilities: (scored videos, K) from `video_probabilities`.

    Raises UserError if no video was scored.
    """
    # Videos that failed in preparation have no row in the scores, but they count as listed: without them the bounds
    # would be too narrow.
    listed, labels = len(scores.paths) + scores.metadata.get("lost_in_preparation", 0), scores.labels[scores.scored]
    if labels.size == 0:
        first = f"; the first: {scores.paths[0]}: {scores.reasons[0]}" if scores.paths else ""
        raise UserError(f"no accuracy: none of the {listed} listed videos could be scored{first}")
    return metrics_of_probabilities(
        labels, probabilities, scores.classes, listed=listed, sources=sources_of_scored(scores)
    )


def sources_of_scored(scores: Scores) -> NDArray[np.int64]:
    """(scored videos,) the number of each video's source; each is its own source if the scores record no origins."""
    origins = scores.metadata.get("origins") or [""] * len(scores.paths)
    return number_sources([origin for origin, scored in zip(origins, scores.scored, strict=True) if scored])


def metrics_of_probabilities(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.float64],
    names: tuple[str, ...],
    *,
    listed: int,
    sources: NDArray[np.int64] | None = None,
) -> Metrics:
    """All metrics from the labels and class probabilities of N >= 1 videos.

    labels: (N,). probabilities: (N, K). names: of the K classes. listed: how many videos should have been scored, of
    which N were. sources: (N,) the number of each video's source; by default each is its own.
    """
    sources = np.arange(labels.size) if sources is None else sources
    answers = ranking(probabilities, 1)[:, 0]
    right = (answers == labels).astype(np.float64)
    # With five classes or fewer, every label is among the first five.
    in_top5 = credits(labels, probabilities, TOP) if len(names) > TOP else None
    confusion = confusion_counts(labels, answers, len(names))
    per_class = _per_class(labels, right, names, sources)
    counts = np.bincount(labels, minlength=len(names))
    # (N,) the weight of each video in mean class accuracy, 1 / (classes with videos * videos of its class), and the
    # accuracy of its class, about which it varies: which classes there are is not a matter of chance.
    weights = 1 / (np.count_nonzero(counts) * counts[labels])
    recall = np.array([row.accuracy or 0.0 for row in per_class])[labels]
    correct = int(accuracy_score(labels, answers, normalize=False))
    failed, commonest = listed - labels.size, int(counts.argmax())
    return Metrics(
        top1=correct / labels.size,
        top5=None if in_top5 is None else float(in_top5.mean()),
        mean_class_accuracy=float(np.mean([row.accuracy for row in per_class if row.accuracy is not None])),
        top1_interval=share_interval(right, sources),
        top5_interval=None if in_top5 is None else share_interval(in_top5, sources),
        mean_class_accuracy_interval=share_interval(right, sources, weights=weights, expected=recall),
        top1_bounds=(correct / listed, (correct + failed) / listed),
        chance=1 / len(names),
        majority=(names[commonest], counts[commonest] / labels.size),
        two_classes=_two_classes(labels, probabilities, answers, names),
        per_class=per_class,
        confusion=confusion,
        confused_pairs=most_confused(confusion, names),
        listed=listed,
        scored=int(labels.size),
        failed=failed,
        sources=len(np.unique(sources)),
    )


def _two_classes(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], answers: NDArray[np.int64], names: tuple[str, ...]
) -> TwoClasses | None:
    """The figures of two classes that both occur, else None."""
    if len(names) != 2 or len(np.unique(labels)) != 2:
        return None
    # Four arrays (2,). A class that is never answered has a precision of 0.
    rows = precision_recall_fscore_support(labels, answers, labels=[0, 1], zero_division=0.0)
    return TwoClasses(
        float(roc_auc_score(labels, probabilities[:, 1])),
        tuple(
            DetectedClass(
                name,
                int(n),
                float(precision),
                float(recall),
                float(f1),
                float(average_precision_score(labels == index, probabilities[:, index])),
            )
            for index, (name, precision, recall, f1, n) in enumerate(zip(names, *rows, strict=True))
        ),
    )


def _per_class(
    labels: NDArray[np.int64], right: NDArray[np.float64], names: tuple[str, ...], sources: NDArray[np.int64]
) -> tuple[ClassAccuracy, ...]:
    """The accuracy in each of the K classes."""
    rows = []
    for index, name in enumerate(names):
        of = labels == index
        n = int(of.sum())
        interval = share_interval(right[of], sources[of]) if n else None
        rows.append(ClassAccuracy(name, n, float(right[of].mean()) if n else None, interval))
    return tuple(rows)
