"""The training run a tested model came from, where its folder is still there: curves, record, cost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_swinv2.errors import UsageError

POINTS = 240  # of a curve: more cannot be told apart


@dataclass(frozen=True)
class Run:
    """A run folder: its record (run.json) and the lines of metrics.jsonl."""

    folder: Path
    record: dict[str, Any]
    lines: tuple[dict[str, Any], ...]

    def series(self, key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(steps, values) of one figure, thinned to POINTS by means of neighbours; empty where there is none."""
        found = [(line["step"], line[key]) for line in self.lines if _is_number(line.get(key))]
        table = np.array(found, dtype=np.float64).reshape(-1, 2)
        parts = np.array_split(table, min(len(table), POINTS)) if len(table) else []
        means = np.array([part.mean(axis=0) for part in parts]).reshape(-1, 2)
        return means[:, 0], means[:, 1]


def find_run(folder: Path) -> Run | None:
    """The run in a folder, such as that of a tested model; None where there is none that can be read."""
    try:
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        texts = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return None
    return Run(folder, record, tuple(_lines(texts))) if isinstance(record, dict) else None


def read_run(folder: Path) -> Run:
    """The run in a folder that was asked for; raises UsageError where there is none."""
    run = find_run(folder)
    if run is None:
        raise UsageError(f"{folder}: no run.json and metrics.jsonl of a training run that can be read; give its folder")
    return run


def model_folder(record: Mapping[str, Any]) -> Path:
    """Where the model lay that a test's record is of: its run's folder, if it was not moved."""
    return Path(str(record.get("model", {}).get("path", ""))).parent


def flatten(record: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of nested plain data, in order."""
    for key, value in record.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, str) else json.dumps(value)


def _lines(texts: list[str]) -> Iterator[dict[str, Any]]:
    """The last line of a run that goes on, or was killed, may be half written."""
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and _is_number(line.get("step")):
            yield line


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
