"""The ROC curve and the precision-recall curves of a test of two classes.

Letters: N videos, P points of a curve.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from video_swinv2.report.metrics import TwoClasses
from video_swinv2.report.plots import COLOURS, Plot, Series, chance_series, plot

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and y, both (P,), from 0 to 1, x ascending."""


@dataclass(frozen=True)
class TwoClassCurves:
    """roc: true over false positive rate of the second class. precision: precision over recall of each class."""

    roc: Curve
    precision: tuple[Curve, Curve]


def two_class_curves(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> TwoClassCurves:
    """The curves of labels (N,), of which both occur, and probabilities (N, 2)."""
    false_positives, true_positives, _ = roc_curve(labels, probabilities[:, 1])
    first, second = (_precision_steps(labels == index, probabilities[:, index]) for index in (0, 1))
    return TwoClassCurves((false_positives, true_positives), (first, second))


def _precision_steps(positive: NDArray[np.bool_], probabilities: NDArray[np.float64]) -> Curve:
    """Recall and precision as steps, the area under which is the average precision. positive, probabilities: (N,)."""
    precision, recall, _ = precision_recall_curve(positive, probabilities)
    # From threshold to threshold recall rises and precision goes up and down. scikit-learn begins at the lowest
    # threshold and ends with a recall of 0. Average precision is the sum of  (recall_i - recall_(i-1)) * precision_i,
    # so that precision is constant between two recalls. A straight line between them would promise too much (Davis and
    # Goadrich, "The Relationship Between Precision-Recall and ROC Curves", ICML 2006).
    recall, precision = recall[::-1], precision[::-1]
    return recall.repeat(2)[1:-1], precision[1:].repeat(2)


def two_class_plots(curves: TwoClassCurves, figures: TwoClasses) -> tuple[Plot, ...]:
    """The curves with what a model that guesses would have: the diagonal, and the share of each class."""
    first, second = figures.classes
    both, diagonal = (first.name, second.name), np.array([0.0, 1.0])
    roc = plot(
        f"ROC, area {figures.roc_auc:.3f}",
        [
            Series(second.name, *curves.roc),
            Series("chance", diagonal, diagonal, colour=COLOURS, reference=True),
        ],
        x_label=f"false positive rate: share of {first.name} taken for {second.name}",
        y_label=f"true positive rate: share of {second.name} found",
        y_range=(0, 1),
    )
    drawn = [Series(name, *curve) for name, curve in zip(both, curves.precision, strict=True)]
    shares = [one.n / (first.n + second.n) for one in figures.classes]
    chance = [
        chance_series(f"{name} by chance, {share:.3f}", share, drawn, colour=number)
        for number, (name, share) in enumerate(zip(both, shares, strict=True), 1)
    ]
    precision = plot(
        f"Precision and recall, area {first.pr_auc:.3f} ({first.name}) and {second.pr_auc:.3f} ({second.name})",
        [*drawn, *chance],
        x_label="recall: share of the class that is found",
        y_label="precision: share of the answers that are right",
        y_range=(0, 1),
    )
    return tuple(one for one in (roc, precision) if one)
