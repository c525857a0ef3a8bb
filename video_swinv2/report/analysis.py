"""Every figure of a test in one object, computed from its scores; reports and comparisons are made of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.report.curves import TwoClassCurves, two_class_curves
from video_swinv2.report.diagnosis import (
    Calibration,
    ClassOrderHint,
    ViewPoint,
    class_order_hint,
    clips_and_crops,
    measure_calibration,
    views_curve,
)
from video_swinv2.report.intervals import Interval, share_interval
from video_swinv2.report.metrics import (
    Metrics,
    metrics_of_scores,
    ranking,
    sources_of_scored,
    video_probabilities,
)
from video_swinv2.report.mistakes import Mistake, surest_mistakes
from video_swinv2.report.scores import Scores

OTHER_AVERAGE = {"prob": "logit", "logit": "prob"}


@dataclass(frozen=True)
class Analysis:
    """Every figure of a test.

    answers, right: (scored videos,) the class that each was answered, and whether that is its label. other_average: the
    way of averaging views that the protocol does not use ("prob" or "logit"), and top-1 and its interval with views
    averaged that way. curves: None unless there are two classes and both occur.
    """

    scores: Scores
    metrics: Metrics
    answers: NDArray[np.int64]
    right: NDArray[np.bool_]
    calibration: Calibration
    views: tuple[ViewPoint, ...]
    other_average: tuple[str, float, Interval]
    hint: ClassOrderHint | None
    mistakes: tuple[Mistake, ...]
    curves: TwoClassCurves | None


def analyse(scores: Scores) -> Analysis:
    """Compute every figure of a test from its scores. Raises UserError if no video was scored."""
    record = scores.metadata
    average, seed = record.get("average", "prob"), record.get("seed", 0)
    probabilities = video_probabilities(scores, average)
    metrics = metrics_of_scores(scores, probabilities)
    labels, sources = scores.labels[scores.scored], sources_of_scored(scores)
    answers = ranking(probabilities, 1)[:, 0]
    # (scored videos, K) -> (scored videos,): the probability of the answer. A mean of softmax values may exceed 1 by a
    # rounding error, which scikit-learn's calibration_curve would refuse.
    confidences = np.minimum(np.take_along_axis(probabilities, answers[:, None], axis=1)[:, 0], 1.0)
    other = ranking(video_probabilities(scores, OTHER_AVERAGE[average]), 1)[:, 0] == labels
    # The views curve needs to know which views are clips and which are crops; the shape of the logits has only V.
    view_counts = clips_and_crops(record, scores.logits.shape[1])
    return Analysis(
        scores=scores,
        metrics=metrics,
        answers=answers,
        right=answers == labels,
        calibration=measure_calibration(confidences, answers == labels),
        views=views_curve(scores.logits[scores.scored], labels, sources, view_counts, average=average, seed=seed),
        other_average=(OTHER_AVERAGE[average], float(other.mean()), share_interval(other.astype(np.float64), sources)),
        hint=class_order_hint(labels, answers, scores.classes, seed),
        mistakes=surest_mistakes(scores, probabilities),
        curves=two_class_curves(labels, probabilities) if metrics.two_classes else None,
    )
