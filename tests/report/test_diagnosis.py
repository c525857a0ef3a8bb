"""Calibration, accuracy with fewer views, and the hint that the classes are in the wrong order."""

from __future__ import annotations

import numpy as np
import pytest

from video_swinv2.report.diagnosis import (
    MAX_VIEW_SUBSETS,
    class_order_hint,
    clips_and_crops,
    measure_calibration,
    views_curve,
)
from video_swinv2.report.metrics import average_views

NAMES = tuple(sorted(f"class {i}" for i in range(20)))


def answers_of(labels: np.ndarray, skill: float, k: int, seed: int = 0) -> np.ndarray:
    """Answers that are right with probability `skill` and otherwise drawn from all classes."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(len(labels)) < skill, labels, rng.integers(0, k, len(labels)))


def test_calibration_of_a_calibrated_model() -> None:
    rng = np.random.default_rng(0)
    sure = rng.random(20_000)
    right = rng.random(20_000) < sure
    found = measure_calibration(sure, right)
    assert found.ece < 0.02
    assert sum(item.n for item in found.bins) == 20_000
    assert measure_calibration(sure, np.zeros(20_000, bool)).ece == pytest.approx(sure.mean())
    assert measure_calibration(np.array([0.9, 0.9]), np.array([True, True])).ece == pytest.approx(0.1)
    assert measure_calibration(np.array([1.0]), np.array([True])).bins[0].low == pytest.approx(14 / 15)


def test_clips_and_crops() -> None:
    assert clips_and_crops({"protocol": "mine", "protocol_numbers": {"clips": 4, "crops": 3}}, 12) == (4, 3)
    assert clips_and_crops({"protocol": "videoswin-4x3"}, 12) == (4, 3)
    assert clips_and_crops({"protocol": "videoswin-4x3"}, 3) == (1, 3), "a still image has only the crops"
    assert clips_and_crops({"protocol": "no numbers"}, 5) == (5, 1)


def test_views_curve_ends_at_the_accuracy_of_the_test() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 300)
    logits = rng.normal(size=(300, 12, 5)).astype(np.float16)
    logits[np.arange(300), :, labels] += 1
    for average in ("prob", "logit"):
        points = views_curve(logits, labels, np.arange(300), (4, 3), average=average, seed=0)
        assert [(point.crops, point.clips) for point in points] == [(s, c) for s in (1, 2, 3) for c in (1, 2, 3, 4)]
        whole = average_views(logits.astype(float), average).argmax(axis=1) == labels
        assert points[-1].top1 == whole.mean()
        single = (logits.argmax(axis=2) == labels[:, None]).mean(axis=0)
        assert points[0].subsets == 8
        assert single.min() <= points[0].top1 <= single.max()
        assert points[0].top1 < points[-1].top1
        assert all(point.interval[0] <= point.top1 <= point.interval[1] for point in points)
    assert sum(point.subsets for point in points) <= MAX_VIEW_SUBSETS


def test_one_of_three_crops_is_the_mean_over_the_three() -> None:
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 4, 50), rng.normal(size=(50, 3, 4)).astype(np.float16)
    points = views_curve(logits, labels, np.arange(50), (1, 3), average="prob", seed=0)
    assert points[0].subsets == 3
    assert points[0].top1 == pytest.approx((logits.argmax(axis=2) == labels[:, None]).mean())


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (sorted(range(20), key=str), "sorted as text"),
        ([19, *range(19)], "one place later"),
        ([*range(1, 20), 0], "one place earlier"),
        ([7, 3, 12, 0, 18, 1, 9, 15, 2, 11, 4, 19, 6, 10, 17, 5, 8, 14, 13, 16], ""),
    ],
)
def test_classes_in_the_wrong_order_are_noticed(order: list[int], words: str) -> None:
    """The model's class j is the data's class order[j]."""
    labels = np.repeat(np.arange(20), 30)
    place = np.argsort(order)
    hint = class_order_hint(labels, answers_of(place[labels], 0.8, 20), NAMES, seed=0)
    assert hint is not None
    assert hint.interval[0] < 0.81 < hint.interval[1]
    assert (words in hint.rule) if words else hint.rule == ""
    assert {(row.label, row.answer) for row in hint.moved} == {
        (NAMES[i], NAMES[place[i]]) for i in range(20) if place[i] != i
    }
    assert all(row.n == 30 and row.share > 0.5 for row in hint.moved)


def test_class_names_sorted_for_the_model_only() -> None:
    names = ("wave", "run", "Jump", "clap", "sit", "bow")
    labels = np.repeat(np.arange(6), 40)
    place = np.argsort(sorted(range(6), key=lambda i: names[i]))
    hint = class_order_hint(labels, answers_of(place[labels], 0.7, 6), names, seed=0)
    assert hint is not None
    assert hint.rule == "in alphabetical order"


def test_no_hint_where_there_is_no_structure_or_no_mistake() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 600)
    assert class_order_hint(labels, rng.integers(0, 20, 600), NAMES, seed=0) is None, "chance"
    assert class_order_hint(labels, answers_of(labels, 0.3, 20), NAMES, seed=0) is None, "a weak model"
    assert class_order_hint(labels, labels, NAMES, seed=0) is None, "a perfect model"
    uneven = rng.choice(20, 600, p=[0.5, *[0.5 / 19] * 19])
    assert class_order_hint(uneven, np.full(600, 3), NAMES, seed=0) is None, "always the same answer"
    few = rng.integers(0, 20, 12)
    assert class_order_hint(few, rng.integers(0, 20, 12), NAMES, seed=0) is None, "too few to tell"
    assert class_order_hint(labels[:1], labels[:1] + 1, NAMES, seed=0) is None
    for seed in range(30):
        answers = np.random.default_rng(seed).integers(0, 20, 100)
        assert class_order_hint(labels[:100], answers, NAMES, seed=seed) is None
