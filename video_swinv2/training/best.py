"""The best validation of a run so far: by which metric, at which step, and whether the last one is really worse."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from video_swinv2.errors import UsageError
from video_swinv2.report.intervals import wilson_interval
from video_swinv2.report.training_run import ACCURACIES, metric_text


def choose_metric(wanted: str | None, higher_is_better: Mapping[str, bool]) -> str:
    """The metric of `best_metric`, or the task's first one without that key.

    higher_is_better: `Task.metrics`. Raises UsageError if the task does not measure the wanted one.
    """
    if wanted is None:
        return next(iter(higher_is_better))
    if wanted not in higher_is_better:
        raise UsageError(f"best_metric: {wanted} is not measured in this run; use {' or '.join(higher_is_better)}")
    return wanted


@dataclass
class Best:
    """The best validation so far. Its weights are those of `model.safetensors`."""

    metric: str
    higher_is_better: bool
    value: float | None = None
    """None before the first validation, and without a validation split."""
    step: int = 0
    """The latest step with this value."""
    improved_step: int = 0
    """The first step with this value. A run ends early if that is too long ago; equal values are no improvement."""

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the weights of this step are the best so far. Of equal ones the later are: they are trained longer.

        Without a validation split the newest weights always count as the best. The initial weights are no candidate.
        """
        if step == 0:
            return False
        if self.metric not in metrics:
            return True
        value = metrics[self.metric]
        if not math.isfinite(value):  # the model has diverged
            return False
        if self.value is not None and value != self.value and (value > self.value) != self.higher_is_better:
            return False
        if value != self.value:
            self.improved_step = step
        self.value, self.step = value, step
        return True

    def noise_note(self, step: int, metrics: Mapping[str, float], samples: int) -> str:
        """One line if the last validation is worse than the best one, but within the noise of so few samples; or "".

        Only for accuracies, whose noise follows from the number of samples: it is the 95 % interval of the best one
        (Wilson 1927). That is too narrow if several clips were cut from one recording, so even more may be noise.
        """
        if self.metric not in ACCURACIES or self.value is None or self.step == step or self.metric not in metrics:
            return ""
        last = metrics[self.metric]
        low, high = wilson_interval(self.value, samples)
        if not low <= last <= high:
            return ""
        return (
            f"last.safetensors may be as good: {metric_text(self.metric, last)} at step {step} is within the noise of "
            f"{samples} samples around {100 * self.value:.2f} % at step {self.step} "
            f"(95 % Wilson interval {100 * low:.1f} to {100 * high:.1f} %)"
        )


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Validation metrics on one line: `val/top1 72.50 %, val/loss 0.8314`."""
    return ", ".join(metric_text(key, value) for key, value in metrics.items()) or "no validation split"
