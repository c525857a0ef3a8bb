"""The status page of a preparation, in HTML.

It shows the progress over time, the reasons of failures, the losses by class, and the distributions of the durations,
sizes and processing times of the videos. This file computes what is shown; the template is status.html.j2.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.outcomes import EXCLUDED, REASONS, VideoCounts, add_counts, count_lost, outcome_counts
from data_prep.state import PreparationState
from data_prep.status import QUIET_SECONDS, PreparationStatus, format_duration, progress_line
from video_swinv2.files import atomic_write
from video_swinv2.pages import TickMark, render, tick_marks

CURVE_POINTS = 240  # more could not be distinguished on a screen
BINS = 24  # of a histogram
MAX_CLASSES_SHOWN = 20  # the other classes are folded away
# The histograms: columns of prep.sqlite with the units in which they are shown.
UNITS = {"duration_seconds": "s", "source_size": "MB", "seconds": "s"}
TITLES = {
    "duration_seconds": "Duration of the videos",
    "source_size": "Size of the sources",
    "seconds": "Time taken on one worker",
}


@dataclass(frozen=True)
class Curve:
    """The number of outcomes over the hours of work, as two areas.

    `ok` (videos prepared) and `done` (prepared or failed) are the corners of SVG polygons in a box of 100 x 100 whose y
    axis points down. `ok` is drawn over `done`, so the part of `done` that stays visible shows the failures. Long
    pauses, in which no run was active, are cut out, and `breaks` are the x positions (0 to 100) of the cuts. `hours`
    and `videos` are the marks of the two axes.
    """

    ok: str
    done: str
    breaks: tuple[float, ...]
    hours: tuple[TickMark, ...]
    videos: tuple[TickMark, ...]


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram: its edges and count as text, and its height relative to the highest, 0 to 1."""

    text: str
    height: float


@dataclass(frozen=True)
class Histogram:
    """The distribution of a quantity. The last bin includes all larger values. `summary` gives median and extremes."""

    title: str
    bars: tuple[Bar, ...]
    ticks: tuple[TickMark, ...]
    summary: str


@dataclass(frozen=True)
class ClassYield:
    """How many of the finished videos of a class were prepared. `share` is None if none is finished yet."""

    label: str
    ok: int
    finished: int
    share: float | None


def write_page(path: Path, out: Path, status: PreparationStatus, states: Sequence[PreparationState]) -> None:
    """Write the page to `path`. `out` is the data set. Raises UserError if the page cannot be written."""
    total = add_counts(status.splits.values())
    classes = class_yields(status.classes)
    values = {
        "out": str(out),
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "status": status,
        "progress": progress_line(status),
        "totals": outcome_counts(total),
        "lost": count_lost(total),
        "splits": {split: outcome_counts(count) for split, count in status.splits.items()},
        "left": format_duration(status.seconds_left) if status.pending and status.seconds_left is not None else "",
        "curve": _curve_of(states, total.listed),
        "reasons": reason_rows(total),
        "classes_shown": classes[:MAX_CLASSES_SHOWN],
        "classes_rest": classes[MAX_CLASSES_SHOWN:],
        "histograms": _histograms_of(states),
    }
    with atomic_write(path) as part:
        part.write_bytes(render("data_prep", "status.html.j2", values))


def class_yields(classes: dict[str, VideoCounts]) -> list[ClassYield]:
    """All classes, the largest share of losses first. Classes of which nothing is finished come last."""
    found = []
    for label, counts in classes.items():
        finished = counts.ok + count_lost(counts)
        share = counts.ok / finished if finished else None
        found.append(ClassYield(label or "no label", counts.ok, finished, share))
    return sorted(found, key=lambda row: (row.share is None, row.share or 0.0, -row.finished, row.label))


def reason_rows(counts: VideoCounts) -> list[tuple[str, str, int, float]]:
    """(reason, its meaning, number of videos, length of its bar), the most common first.

    The length is the number relative to that of the most common reason, 0 to 1.
    """
    known = counts.failed | counts.excluded
    most = max(known.values(), default=1)
    meaning = REASONS | EXCLUDED
    ordered = sorted(known.items(), key=lambda item: (-item[1], item[0]))
    return [(reason, meaning.get(reason, ""), n, n / most) for reason, n in ordered]


def curve(finished_at: NDArray[np.float64], ok: NDArray[np.bool_], listed: int) -> Curve | None:
    """The curve of a preparation of `listed` videos.

    finished_at: (n,), seconds, ascending; ok: (n,), whether each video was prepared. None for fewer than two outcomes,
    or if all are of the same moment.
    """
    if len(finished_at) < 2 or finished_at[-1] <= finished_at[0]:
        return None
    # From moments to hours of work (n,): the time between two outcomes counts as work, unless it is so long that no run
    # can have been active. It then counts as nothing, so both outcomes have the same place on the axis.
    pauses = np.diff(finished_at)
    stopped = pauses > QUIET_SECONDS
    hours = np.concatenate([[0.0], np.cumsum(np.where(stopped, 0.0, pauses))]) / 3600
    end = max(float(hours[-1]), 1e-6)
    # The counts at CURVE_POINTS equally spaced moments. done_by: outcomes up to each. ok_by: the prepared ones among
    # them, from the running sum of `ok`, with a 0 in front for "no outcome yet".
    moments = np.linspace(0, end, CURVE_POINTS)
    done_by = np.searchsorted(hours, moments, side="right")
    ok_by = np.concatenate([[0], np.cumsum(ok)])[done_by]
    x = 100 * moments / end
    return Curve(
        ok=_shape(x, ok_by / listed),
        done=_shape(x, done_by / listed),
        breaks=tuple((100 * hours[1:][stopped] / end).round(2).tolist()),
        hours=tick_marks(0, end),
        videos=tick_marks(0, listed),
    )


def histogram(title: str, values: NDArray[np.float64], unit: str) -> Histogram | None:
    """The histogram of values (n,) in `unit`; None if n is 0."""
    if not len(values):
        return None
    # The axis ends at the 99th percentile: otherwise a few huge values would squeeze all others into one bar. `clip`
    # puts larger values into the last bin. If the percentile is 0, any positive length will do.
    low, high = 0.0, float(np.quantile(values, 0.99)) or 1.0
    counts, edges = np.histogram(values.clip(low, high), bins=BINS, range=(low, high))
    last = len(counts) - 1
    bars = tuple(
        Bar(f"{_number(a)} to {_number(b)} {unit}{' or more' if index == last else ''}: {n}", n / counts.max())
        for index, (n, a, b) in enumerate(zip(counts.tolist(), edges[:-1], edges[1:], strict=True))
    )
    median, least, most = (_number(float(value)) for value in (np.median(values), values.min(), values.max()))
    words = f"median {median} {unit}, {least} to {most} {unit}, {len(values)} videos"
    # Only the last mark names the unit.
    *others, end = tick_marks(0, high)
    return Histogram(title, bars, (*others, TickMark(f"{end.text} {unit}", end.position)), words)


def _number(value: float) -> str:
    """Three digits; from 1000 on all before the point, where .3g would switch to exponents."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _shape(x: NDArray[np.float64], share: NDArray[np.float64]) -> str:
    """The corners of the area under a curve, as the `points` of an SVG polygon. x: (n,), 0..100; share: (n,), 0..1."""
    # From the lower left corner along the curve to the lower right one. y points down, so a share of 1 is at y = 0.
    points = [f"{a:.2f},{100 - 100 * b:.2f}" for a, b in zip(x.tolist(), share.tolist(), strict=True)]
    return " ".join(["0,100", *points, "100,100"])


def _curve_of(states: Sequence[PreparationState], listed: int) -> Curve | None:
    """The curve of all outcomes. Each state yields its own in order; those of several shards are sorted together."""
    found = [outcome for state in states for outcome in state.outcomes()]
    found.sort()
    moments, ok = np.array([when for when, _ in found]), np.array([good for _, good in found], dtype=bool)
    return curve(moments, ok, listed) if found else None


def _histograms_of(states: Sequence[PreparationState]) -> list[Histogram]:
    """A histogram of every column of UNITS for which any prepared video has a value."""
    # (videos, columns), NaN where a row has no value. Without rows, only the reshape gives the array its columns.
    rows = [row for state in states for row in state.measurements(tuple(UNITS))]
    values = np.array(rows, dtype=np.float64).reshape(-1, len(UNITS))
    values[:, list(UNITS).index("source_size")] /= 1e6  # bytes -> MB
    drawn = [
        histogram(TITLES[name], column[~np.isnan(column)], unit)
        for (name, unit), column in zip(UNITS.items(), values.T, strict=True)
    ]
    return [drawing for drawing in drawn if drawing is not None]
