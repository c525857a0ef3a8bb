"""Intervals have their stated coverage, sources are resampled as a whole, and paired tests match the binomial."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest  # type: ignore[import-untyped]  # SciPy has no type hints

from tests.report import independent
from video_swinv2.report.intervals import (
    bootstrap_intervals,
    class_mean_statistic,
    compare_paired,
    holm_adjusted,
    mean_statistic,
    number_sources,
    share_intervals,
    wilson_interval,
)


def interval(correct: np.ndarray, sources: np.ndarray, seed: int = 0) -> tuple[float, float]:
    return share_intervals(mean_statistic(correct[:, None].astype(float)), sources, seed)[0]


def test_interval_is_that_of_independent_resamples() -> None:
    """Against resamples built one by one from other random numbers."""
    rng = np.random.default_rng(3)
    correct = np.zeros(400, bool)
    correct[:320] = True
    drawn = correct[rng.integers(0, 400, size=(4000, 400))].mean(axis=1)
    own = np.arange(400)
    assert interval(correct, own) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)
    assert interval(correct, own) == interval(correct, own)
    assert interval(correct, own, seed=1) != interval(correct, own, seed=2)


def test_a_perfect_score_of_few_videos_is_uncertain() -> None:
    """7 of 7 correct: resamples would give 100 to 100. Many clips of two sources count as two observations."""
    assert bootstrap_intervals(mean_statistic(np.ones((7, 1))), np.arange(7), 0).tolist() == [[1.0, 1.0]]
    assert interval(np.ones(7, bool), np.arange(7)) == pytest.approx(independent.wilson(1.0, 7))
    assert interval(np.zeros(7, bool), np.arange(7)) == pytest.approx(independent.wilson(0.0, 7))
    assert interval(np.ones(40, bool), np.arange(40) % 2)[0] == pytest.approx(independent.wilson(1.0, 2)[0])
    same = np.ones(9, bool)
    assert compare_paired(same, same, np.arange(9), 0).interval == (0.0, 0.0), "a difference is not a share"


def test_coverage_is_as_stated_for_videos_that_share_sources() -> None:
    """Sources of 5 videos that are all right or all wrong: resampling single videos is far too narrow."""
    rng = np.random.default_rng(0)
    sources = np.repeat(np.arange(80), 5)
    grouped = single = 0
    for trial in range(100):
        correct = (rng.random(80) < 0.7)[sources]
        low, high = interval(correct, sources, trial)
        grouped += low <= 0.7 <= high
        low, high = interval(correct, np.arange(400), trial)
        single += low <= 0.7 <= high
    assert 0.88 <= grouped / 100 <= 1
    assert single / 100 < 0.75


def test_many_videos_are_resampled_in_chunks() -> None:
    """More videos than fit into one chunk: the interval is still that of the binomial."""
    n = 5_000
    correct = np.arange(n) < 0.4 * n
    low, high = interval(correct, np.arange(n))
    wide = 1.96 * (0.24 / n) ** 0.5
    assert (0.4 - low, high - 0.4) == pytest.approx((wide, wide), rel=0.12)


def test_class_mean_weights_classes_equally() -> None:
    labels, correct = np.array([0, 0, 0, 0, 2]), np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    figure = class_mean_statistic(labels, correct)
    times = np.array([[1.0, 1.0, 1.0, 1.0, 1.0], [2, 0, 0, 2, 1], [0, 0, 0, 0, 5], [1, 1, 1, 2, 0]])
    assert figure(times)[:, 0].tolist() == pytest.approx([0.375, 0.25, 0.0, 0.6])


def test_videos_of_unknown_origin_are_their_own_source() -> None:
    assert number_sources(["a", "", "b", "a", "", "0"]).tolist() == [0, 1, 2, 0, 3, 4]
    assert number_sources([]).tolist() == []


@pytest.mark.parametrize(("share", "n"), [(0.0, 1), (0.5, 4), (1.0, 5), (0.8, 1000), (1 / 3, 7)])
def test_wilson_interval_solves_its_equation(share: float, n: int) -> None:
    assert wilson_interval(share, n) == pytest.approx(independent.wilson(share, n), abs=1e-9)


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (3, 9), (320, 400)])
def test_wilson_interval_of_whole_counts_is_scipys(right: int, n: int) -> None:
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson_interval(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(
    ("only_first", "only_second", "both"), [(8, 4, 10), (0, 0, 5), (0, 6, 0), (30, 31, 3), (1, 0, 0)]
)
def test_pairs(only_first: int, only_second: int, both: int) -> None:
    first = np.array([True] * (only_first + both) + [False] * only_second)
    second = np.array([False] * only_first + [True] * (both + only_second))
    paired = compare_paired(first, second, np.arange(len(first)), seed=0)
    assert (paired.n, paired.only_first, paired.only_second) == (len(first), only_first, only_second)
    assert paired.difference == pytest.approx((only_second - only_first) / len(first))
    assert paired.p_value == pytest.approx(independent.mcnemar(only_first, only_second))
    assert paired.interval[0] <= paired.difference <= paired.interval[1]
    turned = compare_paired(second, first, np.arange(len(first)), seed=0)
    assert turned.difference == pytest.approx(-paired.difference)
    assert turned.interval == pytest.approx((-paired.interval[1], -paired.interval[0]))


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    """Two tests that agree on most videos: their intervals overlap, yet that of the paired difference excludes 0."""
    first = np.arange(500) < 300
    second = first | (np.arange(500) >= 485)
    own = np.arange(500)
    assert interval(first, own)[1] > interval(second, own)[0]
    assert compare_paired(first, second, own, seed=0).interval[0] > 0


def test_holm() -> None:
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.6, 0.9]) == [1.0, 1.0]
    assert holm_adjusted([0.04]) == [0.04]
    assert holm_adjusted([]) == []
