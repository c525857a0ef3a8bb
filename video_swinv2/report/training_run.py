"""The training run that a tested model came from, if its folder still exists: its record and its curves.

Also the series that the run may be one of (`train --seeds`, `train --folds`), and how validation metrics are shown.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from video_swinv2.config import changed_settings
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import json_text
from video_swinv2.records import Record, parse_json, parse_record, read_bytes, read_json, read_record

MAX_METRICS_BYTES = 2**29  # of metrics.jsonl: two million lines
ACCURACIES = ("val/top1", "val/top5")  # shares of samples, whose noise follows from their number
SHARES = (*ACCURACIES, "val/miou", "val/mean_accuracy", "val/pixel_accuracy")  # shown in per cent
SERIES_FILE = "series.json"
MAX_CURVE_POINTS = 240  # more cannot be told apart in a plot a few hundred pixels wide


@dataclass(frozen=True)
class TrainingRun:
    """A run folder: `record` is the content of its run.json, `lines` are the lines of its metrics.jsonl.

    Instead of every configuration (`configs`), the record has what has changed since the first step, if anything has:
    `changes`, by the step since which it held. A run of a series has the series' figures, as text, in `series`.
    """

    folder: Path
    record: dict[str, Any]
    lines: tuple[dict[str, Any], ...]

    def series(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(steps, values) of a metric, both (P,); empty if it was not logged.

        Long curves are thinned to MAX_CURVE_POINTS points, each the mean of neighbouring steps and of their values.
        """
        # Metrics are logged at different steps: a line has only those of its step. A value that is not finite, such as
        # a diverged loss, cannot be drawn.
        logged = [(line["step"], line[key]) for line in self.lines if _is_finite_number(line.get(key))]
        # (P, 2), step and value; reshape makes it (0, 2) if nothing was logged, so that the columns exist.
        table = np.array(logged, dtype=np.float64).reshape(-1, 2)
        parts = np.array_split(table, min(len(table), MAX_CURVE_POINTS)) if len(table) else []
        means = np.array([part.mean(axis=0) for part in parts]).reshape(-1, 2)
        return means[:, 0], means[:, 1]


class SeriesRun(Record):
    """One run of a series: the name of its folder, and the metric of its best and of its last validation."""

    name: str
    best: float
    best_step: int
    last: float


class Series(Record):
    """The content of series.json: the runs of a series that have finished, and the metric they are compared by."""

    metric: str
    runs: Annotated[list[SeriesRun], Field(min_length=1)]

    def summary(self) -> str:
        """One line: mean and standard deviation (of a sample, n - 1) over the runs, of the best and last validation."""
        figures = []
        for title, values in (
            ("best", [run.best for run in self.runs]),
            ("last", [run.last for run in self.runs]),
        ):
            mean = _value_text(self.metric, statistics.fmean(values))
            if len(values) > 1:
                mean += f" (standard deviation {_value_text(self.metric, statistics.stdev(values))})"
            figures.append(f"{title} {mean}")
        return f"{self.metric}, mean of {len(self.runs)} runs: {', '.join(figures)}"


def metric_text(key: str, value: float) -> str:
    """A validation metric as text, accuracies in per cent: `val/top1 72.50 %`, `val/loss 0.8314`."""
    return f"{key} {_value_text(key, value)}"


def _value_text(key: str, value: float) -> str:
    return f"{100 * value:.2f} %" if key in SHARES else f"{value:.4f}"


class _Configuration(Record):
    since_step: int
    config: dict[str, Any]


class _RunRecord(Record, extra="allow"):
    """What a report needs of run.json, as far as it is recorded."""

    configs: list[_Configuration] = Field(default_factory=list)

    hours: Annotated[float, Field(ge=0)] | None = None
    device_hours: Annotated[float, Field(ge=0)] | None = None
    processes: int | None = None
    device: str | None = None
    parameters: int | None = None
    data: dict[str, Any] = Field(default_factory=dict)


def find_training_run(folder: Path) -> TrainingRun | None:
    """The training run in `folder`, or None if there is none or it cannot be read."""
    try:
        return read_training_run(folder)
    except UserError:
        return None


def read_training_run(folder: Path) -> TrainingRun:
    """The training run in a folder that the user named. Raises UsageError if there is none that can be read."""
    try:
        record = read_json(folder / "run.json")
        known = parse_record(record, _RunRecord, str(folder / "run.json"))
        series = read_record(file, Series).summary() if (file := folder.parent / SERIES_FILE).is_file() else None
        text = read_bytes(folder / "metrics.jsonl", MAX_METRICS_BYTES).decode("utf-8", "replace")
    except UserError as error:
        raise UsageError(
            f"{folder}: not a training run: no readable run.json and metrics.jsonl ({error}); name its run folder"
        ) from error
    # As in the file, without the keys that are null.
    kept = {key: value for key, value in record.items() if value is not None or key not in type(known).model_fields}
    kept.pop("configs", None)
    kept |= ({"changes": changes} if (changes := _changes(known.configs)) else {}) | (
        {"series": series} if series else {}
    )
    return TrainingRun(folder, kept, tuple(_metric_lines(text.splitlines())))


def _changes(configs: Sequence[_Configuration]) -> dict[str, list[str]]:
    """What changed in the course of a run: `key: old -> new` of each setting, by the step since which it held."""
    pairs = itertools.pairwise(configs)
    return {
        f"since step {new.since_step}": [str(change) for change in changed_settings(old.config, new.config)]
        for old, new in pairs
    }


def folder_of_model(record: Mapping[str, Any]) -> Path:
    """The folder of the model file in a test's record: the run folder it was trained in, unless the file was moved."""
    return Path(str(record.get("model", {}).get("path", ""))).parent


def flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value as text) for nested JSON data, in its order: {"a": {"b": 1}} gives ("a.b", "1")."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json_text(value)


def _metric_lines(texts: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the parsed lines of metrics.jsonl that belong to a step."""
    # The last line is incomplete if the run is writing it right now or was killed while it did. It is skipped.
    for text in texts:
        try:
            line = parse_json(text, "metrics.jsonl")
        except UserError:
            continue
        if isinstance(line, dict) and _is_finite_number(line.get("step")):
            yield line


def _is_finite_number(value: object) -> bool:
    """Whether a JSON value is a finite number. True and False are not numbers here, although bool is a kind of int."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
