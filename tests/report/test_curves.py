"""The curves of two classes: a small case by hand, areas equal to the figures, and a bounded page for large tests."""

from __future__ import annotations

import numpy as np
import pytest

from tests.report.report_pages import build_scores, metrics_of
from video_swinv2.report.analysis import analyse
from video_swinv2.report.curves import two_class_curves, two_class_plots
from video_swinv2.report.metrics import TwoClasses


def test_curves_of_four_videos() -> None:
    """By falling probability of the second class: right, wrong, right, wrong."""
    labels, second = np.array([1, 0, 1, 0]), np.array([0.9, 0.7, 0.6, 0.2])
    curves = two_class_curves(labels, np.stack([1 - second, second], axis=1))
    x, y = curves.roc
    assert list(zip(x, y, strict=True)) == [(0, 0), (0, 0.5), (0.5, 0.5), (0.5, 1), (1, 1)]
    x, y = curves.precision[1]
    # Precision 1, 1/2, 2/3, 1/2 at a recall of 1/2, 1/2, 1, 1: two points for each step.
    assert x.tolist() == [0, 0.5, 0.5, 0.5, 0.5, 1, 1, 1]
    assert y == pytest.approx([1, 1, 1 / 2, 1 / 2, 2 / 3, 2 / 3, 1 / 2, 1 / 2])


def areas(figures: TwoClasses) -> list[float]:
    return [figures.roc_auc, *(one.pr_auc for one in figures.classes)]


@pytest.mark.parametrize("n", [60, 30_000])
def test_the_areas_drawn_are_the_figures(n: int) -> None:
    """One video in ten is of the second class. Of 30,000 points few are drawn, and the area below them is the same."""
    rng = np.random.default_rng(n)
    labels = (np.arange(n) % 10 == 3).astype(np.int64)
    logits = rng.normal(size=(n, 1, 2)) + 1.5 * np.eye(2)[labels][:, None]
    analysis = analyse(build_scores(labels, logits, classes=("calm", "fight"), views=1, average="prob"))
    figures, curves = analysis.metrics.two_classes, analysis.curves
    assert figures is not None
    assert curves is not None
    for (x, y), area in zip((curves.roc, *curves.precision), areas(figures), strict=True):
        assert np.trapezoid(y, x) == pytest.approx(area)
    roc, precision = two_class_plots(curves, figures)
    assert [line.name for line in roc.lines] == ["fight", "chance"]
    assert roc.lines[1].points == "0.00,100.00 100.00,0.00"
    assert roc.x_label == "false positive rate: share of calm taken for fight"
    names = [(line.name, line.colour, line.dashed) for line in precision.lines]
    chance = [("calm by chance, 0.900", 1, True), ("fight by chance, 0.100", 2, True)]
    assert names == [("calm", 1, False), ("fight", 2, False), *chance]
    assert [line.points for line in precision.lines[2:]] == ["0.00,10.00 100.00,10.00", "0.00,90.00 100.00,90.00"]
    for line, area in zip((roc.lines[0], *precision.lines[:2]), areas(figures), strict=True):
        points = np.array([point.split(",") for point in line.points.split()], dtype=float)
        assert len(points) <= 4 * 241
        assert np.trapezoid(100 - points[:, 1], points[:, 0]) / 1e4 == pytest.approx(area, abs=5e-3)


def test_other_tests_have_no_curves() -> None:
    rng = np.random.default_rng(0)
    three, one = (
        build_scores(rng.integers(0, most, 30), rng.normal(size=(30, 1, n)), views=1) for most, n in ((3, 3), (1, 2))
    )
    assert metrics_of(three).two_classes is None
    assert analyse(three).curves is None
    assert analyse(one).curves is None, "one of the two classes does not occur"
