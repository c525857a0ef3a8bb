"""The metrics of a run: means over finite losses, and files that are JSON whatever the losses are."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from video_swinv2.data.datasets import Batch
from video_swinv2.report.training_run import read_training_run
from video_swinv2.training.metrics import LogInterval, MetricLog, read_metrics

NAN, INFINITY = math.nan, math.inf


def strict(text: str) -> Any:
    """Parse JSON; NaN and Infinity, which Python's parser otherwise accepts, are errors."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def interval_of(*losses: float) -> LogInterval:
    interval = LogInterval()
    batch = Batch(torch.zeros(1), torch.zeros(1), None, (), (0,), (0.0,))
    for loss in losses:
        interval.add(batch, torch.tensor(loss))
    return interval


@pytest.mark.parametrize(
    ("losses", "total", "count"),
    [((1.0, 2.5), 3.5, 2), ((1.0, NAN, 2.5, INFINITY), 3.5, 2), ((NAN, -INFINITY), 0.0, 0)],
)
def test_a_dropped_step_leaves_the_mean_of_the_others(losses: tuple[float, ...], total: float, count: int) -> None:
    interval = interval_of(*losses)
    assert interval.finite_losses() == (total, count)
    assert interval.micro_batches == len(losses)


def test_no_number_in_a_file_of_metrics_is_not_finite(tmp_path: Path) -> None:
    """What is not finite is left out of the line and of the curve, and everything that reads the file goes on."""
    log = MetricLog(tmp_path, 0)
    log.write(1, {"train/loss": 2.0, "train/grad_norm": 1.0})
    log.write(2, {"train/loss": NAN, "train/grad_norm": INFINITY, "train/skipped_steps": 1})
    log.close()
    lines = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(tmp_path)
    assert lines[1] == {"step": 2, "train/skipped_steps": 1}
    (tmp_path / "run.json").write_text("{}")
    steps, values = read_training_run(tmp_path).series("train/loss")
    assert (steps.tolist(), values.tolist()) == ([1], [2.0])
    MetricLog(tmp_path, 2).close()  # a resumed run keeps both lines
    assert len(read_metrics(tmp_path)) == 2
