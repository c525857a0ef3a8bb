"""Intervals have their stated coverage, sources count as units of evidence, and paired tests match the binomial."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import binomtest, t  # type: ignore[import-untyped]  # SciPy has no type hints

from tests.report import independent
from video_swinv2.report.intervals import (
    compare_paired,
    holm_adjusted,
    number_sources,
    share_interval,
    swap_test,
    wilson_interval,
)


def interval(correct: np.ndarray, sources: np.ndarray) -> tuple[float, float]:
    return share_interval(correct.astype(float), sources)


def simulated(
    rng: np.random.Generator, share: float, correlation: float, sources: int, each: int
) -> tuple[np.ndarray, np.ndarray]:
    """(correct, sources): the accuracy in a source is beta-binomial, with this correlation within a source."""
    scale = (1 - correlation) / correlation
    of_source = rng.beta(share * scale, (1 - share) * scale, sources)
    where = np.repeat(np.arange(sources), each)
    return rng.random(len(where)) < of_source[where], where


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (3, 9), (320, 400)])
def test_independent_videos_have_the_interval_of_the_binomial(right: int, n: int) -> None:
    correct = np.arange(n) < right
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert interval(correct, np.arange(n)) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_videos_of_one_answer_per_source_count_as_their_sources() -> None:
    """Every source is all right or all wrong: 12 sources of 20 are 12 videos, and t has 11 degrees of freedom."""
    sources = np.repeat(np.arange(12), 20)
    low, high = interval(np.arange(12)[sources] < 9, sources)
    # The design effect is 20, but for the corrections of the two variances.
    effective = 240 / (20 * (12 / 11) / (240 / 239)) * (t.ppf(0.975, 239) / t.ppf(0.975, 11)) ** 2
    assert (low, high) == pytest.approx(independent.wilson(0.75, effective))


def test_no_interval_is_narrower_than_that_of_independent_videos() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        n = int(rng.integers(2, 60))
        correct, sources = rng.random(n) < rng.random(), rng.integers(0, rng.integers(1, 15), n)
        low, high = interval(correct, sources)
        expected = independent.wilson(correct.mean(), n)
        assert low <= expected[0] + 1e-12
        assert high >= expected[1] - 1e-12
    # Sources that are more alike than chance would make them: one right and one wrong in each.
    assert interval(np.arange(40) % 2 == 0, np.arange(40) // 2)[0] <= independent.wilson(0.5, 40)[0]


def test_a_perfect_score_of_few_sources_is_uncertain() -> None:
    """Nothing varies, so nothing is known about the spread between sources: each counts as one observation."""
    assert interval(np.ones(7, bool), np.arange(7)) == pytest.approx(independent.wilson(1.0, 7))
    assert interval(np.ones(40, bool), np.arange(40) % 2) == pytest.approx(independent.wilson(1.0, 2))
    assert interval(np.zeros(40, bool), np.zeros(40, int)) == pytest.approx(independent.wilson(0.0, 1))


@pytest.mark.parametrize(("share", "correlation"), [(0.6, 0.1), (0.6, 0.3), (0.6, 0.6), (0.8, 0.3)])
def test_coverage_with_twelve_sources(share: float, correlation: float) -> None:
    """The interval that resamples sources, or takes videos for independent, contains the true accuracy too seldom."""
    rng, hits, hits_of_single = np.random.default_rng(0), 0, 0
    for _ in range(600):
        correct, sources = simulated(rng, share, correlation, 12, 10)
        low, high = interval(correct, sources)
        hits += low <= share <= high
        low, high = interval(correct, np.arange(120))
        hits_of_single += low <= share <= high
    assert 0.93 <= hits / 600 <= 0.99
    assert hits_of_single < hits - 30


def test_mean_class_accuracy_weighs_a_rare_class_as_much_as_a_common_one() -> None:
    """Of two classes with 10 and 1000 videos, the interval is about that of 20 videos twice as sure."""
    labels = np.repeat([0, 1], [10, 1000])
    correct = np.concatenate([np.arange(10) < 5, np.arange(1000) < 500]).astype(float)
    weights, recall = 1 / (2 * np.where(labels == 0, 10, 1000)), np.full(1010, 0.5)
    found = share_interval(correct, np.arange(1010), weights=weights, expected=recall)
    assert found == pytest.approx(independent.wilson(0.5, 4 / (1 / 10 + 1 / 1000)), abs=1e-9)
    assert found[1] - found[0] > 5 * (interval(correct, np.arange(1010))[1] - 0.5)


def test_videos_of_unknown_origin_are_their_own_source() -> None:
    assert number_sources(["a", "", "b", "a", "", "0"]).tolist() == [0, 1, 2, 0, 3, 4]
    assert number_sources([]).tolist() == []


@pytest.mark.parametrize(("share", "n"), [(0.0, 1), (0.5, 4), (1.0, 5), (0.8, 1000), (1 / 3, 7)])
def test_wilson_interval_solves_its_equation(share: float, n: int) -> None:
    assert wilson_interval(share, n) == pytest.approx(independent.wilson(share, n), abs=1e-9)


@pytest.mark.parametrize(
    ("only_first", "only_second", "both"), [(8, 4, 10), (0, 0, 5), (0, 6, 0), (30, 31, 3), (1, 0, 0)]
)
def test_pairs(only_first: int, only_second: int, both: int) -> None:
    first = np.array([True] * (only_first + both) + [False] * only_second)
    second = np.array([False] * only_first + [True] * (both + only_second))
    paired = compare_paired(first, second, np.arange(len(first)))
    assert (paired.n, paired.only_first, paired.only_second) == (len(first), only_first, only_second)
    assert paired.difference == pytest.approx((only_second - only_first) / len(first))
    assert paired.p_value == pytest.approx(independent.mcnemar(only_first, only_second))
    assert paired.interval[0] <= paired.difference <= paired.interval[1]
    turned = compare_paired(second, first, np.arange(len(first)))
    assert turned.difference == pytest.approx(-paired.difference)
    assert turned.interval == pytest.approx((-paired.interval[1], -paired.interval[0]))


@pytest.mark.parametrize("seed", range(5))
def test_the_p_value_swaps_whole_sources(seed: int) -> None:
    """Against all ways of swapping the two models in some of ten sources."""
    gained = np.random.default_rng(seed).integers(-4, 6, 10)
    swapped = [
        abs(sum(a * b for a, b in zip(signs, gained, strict=True))) for signs in itertools.product((1, -1), repeat=10)
    ]
    assert swap_test(gained) == pytest.approx(np.mean([s >= abs(gained.sum()) for s in swapped]))


def test_a_gain_in_few_sources_is_weak_evidence() -> None:
    """The second model is right on 20 more videos, all of two sources: as videos p is 2e-6, as sources it is 0.5."""
    sources = np.repeat(np.arange(12), 10)
    first = np.zeros(120, bool)
    second = sources < 2
    single, grouped = compare_paired(first, second, np.arange(120)), compare_paired(first, second, sources)
    assert single.p_value == pytest.approx(independent.mcnemar(0, 20))
    assert grouped.p_value == pytest.approx(0.5)
    assert single.interval[0] > 0 > grouped.interval[0]
    assert (grouped.sources, grouped.n, grouped.difference) == (12, 120, pytest.approx(1 / 6))


def test_coverage_of_a_paired_difference_with_twelve_sources() -> None:
    rng, hits, hits_of_single = np.random.default_rng(0), 0, 0
    for _ in range(600):
        first, sources = simulated(rng, 0.6, 0.3, 12, 10)
        second, _ = simulated(rng, 0.7, 0.3, 12, 10)
        low, high = compare_paired(first, second, sources).interval
        hits += low <= 0.1 <= high
        low, high = compare_paired(first, second, np.arange(120)).interval
        hits_of_single += low <= 0.1 <= high
    assert 0.93 <= hits / 600 <= 0.99
    assert hits_of_single < hits - 60


def test_models_that_never_differ_may_still_differ_elsewhere() -> None:
    """Agresti and Min for 9 videos: 0 give or take t times the root of 1 / 11 ** 2."""
    same = np.ones(9, bool)
    wide = t.ppf(0.975, 8) / 11
    paired = compare_paired(same, same, np.arange(9))
    assert (paired.interval, paired.p_value) == (pytest.approx((-wide, wide)), 1.0)


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    """Two tests that agree on most videos: their intervals overlap, yet that of the paired difference excludes 0."""
    first = np.arange(500) < 300
    second = first | (np.arange(500) >= 485)
    own = np.arange(500)
    assert interval(first, own)[1] > interval(second, own)[0]
    assert compare_paired(first, second, own).interval[0] > 0


def test_holm() -> None:
    assert holm_adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjusted([0.6, 0.9]) == [1.0, 1.0]
    assert holm_adjusted([0.04]) == [0.04]
    assert holm_adjusted([]) == []
