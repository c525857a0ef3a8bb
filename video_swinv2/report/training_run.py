"""The training run that a tested model came from, if its folder still exists: its record and its curves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import json_text
from video_swinv2.records import Record, parse_json, parse_record, read_bytes, read_json

MAX_METRICS_BYTES = 2**29  # of metrics.jsonl: two million lines
MAX_CURVE_POINTS = 240  # more cannot be told apart in a plot a few hundred pixels wide


@dataclass(frozen=True)
class TrainingRun:
    """A run folder: `record` is the content of its run.json, `lines` are the lines of its metrics.jsonl."""

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


class _RunRecord(Record, extra="allow"):
    """What a report needs of run.json, as far as it is recorded."""

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
        text = read_bytes(folder / "metrics.jsonl", MAX_METRICS_BYTES).decode("utf-8", "replace")
    except UserError as error:
        raise UsageError(
            f"{folder}: not a training run: no readable run.json and metrics.jsonl ({error}); name its run folder"
        ) from error
    # As in the file, without the keys that are null.
    kept = {key: value for key, value in record.items() if value is not None or key not in type(known).model_fields}
    return TrainingRun(folder, kept, tuple(_metric_lines(text.splitlines())))


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
