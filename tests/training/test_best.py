"""The best validation: by any metric, with ties, and with the noise of few samples."""

from __future__ import annotations

import math

import pytest

from video_swinv2.errors import UsageError
from video_swinv2.training.best import Best, choose_metric, metrics_text


def steps_that_are_best(best: Best, values: list[float]) -> list[int]:
    """The steps, counted from 0, at which the weights are the best so far."""
    return [step for step, value in enumerate(values) if best.update(step, {best.metric: value})]


def test_the_best_is_the_highest_or_the_lowest_and_ties_go_to_the_later() -> None:
    values = [0.9, 0.5, math.nan, 0.7, 0.6, 0.7, 0.4]  # the first is that of the initial weights
    accuracy, loss = Best("val/top1", True), Best("val/loss", False)
    assert steps_that_are_best(accuracy, values) == [1, 3, 5]
    assert (accuracy.value, accuracy.step, accuracy.improved_step) == (0.7, 5, 3)
    assert steps_that_are_best(loss, values) == [1, 6]
    assert (loss.value, loss.step, loss.improved_step) == (0.4, 6, 6)


def test_without_a_validation_split_the_newest_weights_are_the_best() -> None:
    best = Best("val/top1", True)
    assert [best.update(step, {}) for step in (0, 2, 4)] == [False, True, True]
    assert best.value is None
    assert best.noise_note(4, {}, 40) == ""


def test_a_difference_within_the_noise_of_few_samples_is_told() -> None:
    """29 and 26 of 40: the 95 % Wilson interval of 29 of 40 is 57.2 to 83.9 % (R: prop.test(29, 40, correct=FALSE))."""
    best = Best("val/top1", True, 29 / 40, step=80, improved_step=80)
    note = best.noise_note(100, {"val/top1": 26 / 40}, 40)
    assert note == (
        "last.safetensors may be as good: val/top1 65.00 % at step 100 is within the noise of 40 samples around "
        "72.50 % at step 80 (95 % Wilson interval 57.2 to 83.9 %)"
    )
    assert best.noise_note(100, {"val/top1": 22 / 40}, 40) == "", "below the interval"
    assert best.noise_note(100, {"val/top1": 26 / 40}, 4000) == "", "of so many, the difference is no noise"
    assert best.noise_note(80, {"val/top1": 29 / 40}, 40) == "", "the last is the best"
    assert Best("val/loss", False, 0.5, step=80).noise_note(100, {"val/loss": 0.5001}, 40) == "", "noise not known"


def test_the_metric_is_one_that_the_run_measures() -> None:
    measured = {"val/top1": True, "val/loss": False}
    assert choose_metric(None, measured) == "val/top1"
    assert choose_metric("val/loss", measured) == "val/loss"
    with pytest.raises(UsageError, match="best_metric: val/top5 is not measured in this run; use val/top1 or val/loss"):
        choose_metric("val/top5", measured)


def test_accuracies_are_shown_in_per_cent() -> None:
    assert metrics_text({"val/loss": 0.83141, "val/top1": 0.725}) == "val/loss 0.8314, val/top1 72.50 %"
    assert metrics_text({}) == "no validation split"
