"""The status as a page with plots: progress over time, reasons, survivors of every class, lengths, sizes and costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.outcomes import EXCLUDED, REASONS, VideoCounts, outcome_counts
from data_prep.state import PreparationState
from data_prep.status import LOST, QUIET_SECONDS, PreparationStatus, format_duration, progress_line, total
from video_swinv2.files import atomic_write
from video_swinv2.pages import TickMark, render, tick_marks

POINTS = 240  # of the curve: more cannot be told apart
BINS = 24
SHOWN_CLASSES = 20
UNITS = {"duration_seconds": "s", "source_size": "MB", "seconds": "s"}
TITLES = {
    "duration_seconds": "Length of the videos",
    "source_size": "Size of their sources",
    "seconds": "Time each took on one worker",
}


@dataclass(frozen=True)
class Curve:
    """Outcomes over hours of work. `ok`, `done`: corners of filled shapes in a box of 100 x 100, y down.

    Times in which nothing was finished for long are cut out; `breaks` are the places (0 to 100) of the cuts.
    """

    ok: str
    done: str
    breaks: tuple[float, ...]
    hours: tuple[TickMark, ...]
    videos: tuple[TickMark, ...]


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram: its edges and count as text, its height 0 to 1."""

    text: str
    height: float


@dataclass(frozen=True)
class Histogram:
    """Counts of a quantity; the last bin also holds what is beyond it. `summary` says median and extremes."""

    title: str
    bars: tuple[Bar, ...]
    ticks: tuple[TickMark, ...]
    summary: str


@dataclass(frozen=True)
class Survivors:
    """What is left of a class, of the videos whose outcome is known; None where none is known yet."""

    label: str
    ok: int
    ended: int
    share: float | None


def write_page(path: Path, out: Path, now: PreparationStatus, states: Sequence[PreparationState]) -> None:
    """Write the page. Raises UserError where it cannot be written."""
    sums = total(now.splits.values())
    classes = survivors(now.classes)
    values = {
        "out": str(out),
        "when": time.strftime("%Y-%m-%d %H:%M"),
        "now": now,
        "progress": progress_line(now),
        "account": outcome_counts(sums),
        "lost": sum(outcome_counts(sums)[word] for word in LOST),
        "splits": {split: outcome_counts(count) for split, count in now.splits.items()},
        "left": format_duration(now.seconds_left) if now.pending and now.seconds_left is not None else "",
        "curve": _curve_of(states, sums.listed),
        "reasons": reason_rows(sums),
        "classes_shown": classes[:SHOWN_CLASSES],
        "classes_rest": classes[SHOWN_CLASSES:],
        "histograms": _histograms_of(states),
    }
    with atomic_write(path) as part:
        part.write_bytes(render("data_prep", "status.html.j2", values))


def survivors(classes: dict[str, VideoCounts]) -> list[Survivors]:
    """Every class, the one that lost the largest share first; those of which nothing is known last."""
    found = []
    for label, count in classes.items():
        sums = outcome_counts(count)
        ended = sums["ok"] + sum(sums[word] for word in LOST)
        found.append(Survivors(label or "no label", sums["ok"], ended, sums["ok"] / ended if ended else None))
    return sorted(found, key=lambda row: (row.share is None, row.share or 0.0, -row.ended, row.label))


def reason_rows(sums: VideoCounts) -> list[tuple[str, str, int, float]]:
    """(reason, what it means, videos, share of the commonest), the commonest first."""
    known = sums.failed | sums.excluded
    most = max(known.values(), default=1)
    meaning = REASONS | EXCLUDED
    ordered = sorted(known.items(), key=lambda item: (-item[1], item[0]))
    return [(reason, meaning.get(reason, ""), n, n / most) for reason, n in ordered]


def curve(finished_at: NDArray[np.float64], ok: NDArray[np.bool_], listed: int) -> Curve | None:
    """finished_at: (n,) seconds, ascending; ok: (n,) whether the video was prepared. None for fewer than two."""
    if len(finished_at) < 2 or finished_at[-1] <= finished_at[0]:
        return None
    pauses = np.diff(finished_at)
    stopped = pauses > QUIET_SECONDS
    hours = np.concatenate([[0.0], np.cumsum(np.where(stopped, 0.0, pauses))]) / 3600
    end = max(float(hours[-1]), 1e-6)
    moments = np.linspace(0, end, POINTS)
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
    """values: (n,). None where there are none."""
    if not len(values):
        return None
    # A few giants would squeeze all others into one bar.
    low, high = 0.0, float(np.quantile(values, 0.99)) or 1.0
    counts, edges = np.histogram(values.clip(low, high), bins=BINS, range=(low, high))
    last = len(counts) - 1
    bars = tuple(
        Bar(f"{_number(a)} to {_number(b)} {unit}{' and more' if place == last else ''}: {n}", n / counts.max())
        for place, (n, a, b) in enumerate(zip(counts.tolist(), edges[:-1], edges[1:], strict=True))
    )
    median, least, most = (_number(float(value)) for value in (np.median(values), values.min(), values.max()))
    words = f"median {median} {unit}, {least} to {most} {unit}, {len(values)} videos"
    *others, end = tick_marks(0, high)
    return Histogram(title, bars, (*others, TickMark(f"{end.text} {unit}", end.position)), words)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _shape(x: NDArray[np.float64], share: NDArray[np.float64]) -> str:
    """Corners of the area under a curve of shares (0 to 1)."""
    points = [f"{a:.2f},{100 - 100 * b:.2f}" for a, b in zip(x.tolist(), share.tolist(), strict=True)]
    return " ".join(["0,100", *points, "100,100"])


def _curve_of(states: Sequence[PreparationState], listed: int) -> Curve | None:
    found = [outcome for state in states for outcome in state.outcomes()]
    found.sort()
    moments, ok = np.array([when for when, _ in found]), np.array([good for _, good in found], dtype=bool)
    return curve(moments, ok, listed) if found else None


def _histograms_of(states: Sequence[PreparationState]) -> list[Histogram]:
    rows = [row for state in states for row in state.measurements(tuple(UNITS))]
    values = np.array(rows, dtype=np.float64).reshape(-1, len(UNITS))
    values[:, list(UNITS).index("source_size")] /= 1e6
    drawn = [
        histogram(TITLES[name], column[~np.isnan(column)], unit)
        for (name, unit), column in zip(UNITS.items(), values.T, strict=True)
    ]
    return [drawing for drawing in drawn if drawing is not None]
