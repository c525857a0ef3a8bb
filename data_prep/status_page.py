"""The status page of a preparation, in HTML.

It shows the progress over time, the reasons of failures, the losses by class, a few prepared videos, the distributions
of their frame rates, picture sizes, durations, file sizes and processing times, and how they were prepared. This file
computes what is shown; the template is status.html.j2.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from data_prep.outcomes import EXCLUDED, REASONS, VideoCounts, add_counts, count_lost, outcome_counts
from data_prep.state import RESTORE, PreparationState
from data_prep.status import QUIET_SECONDS, PreparationStatus, format_duration, progress_line
from data_prep.thumbnails import make_thumbnails
from video_swinv2.data.manifest import SplitRecord
from video_swinv2.errors import UserError
from video_swinv2.files import atomic_write, path_under
from video_swinv2.pages import TickMark, render, tick_marks
from video_swinv2.records import Record, parse_json, parse_record, read_record

CURVE_POINTS = 240  # more could not be distinguished on a screen
TIME_UNITS = {"h": 1, "min": 60, "s": 3600}  # units per hour, of the time axis
MIN_UNITS = 2.0  # the axis has the largest unit of which it is longer than this
BINS = 24  # of a histogram
MAX_CLASSES_SHOWN = 20  # the other classes are folded away
# The histograms: columns of prep.sqlite with the units in which they are shown.
UNITS = {"duration_seconds": "s", "source_size": "MB", "seconds": "s"}
TITLES = {
    "duration_seconds": "Duration of the videos",
    "source_size": "Size of the sources",
    "seconds": "Time taken on one worker",
}
MAX_VALUES_SHOWN = 8  # of frame rates and picture sizes; the others are counted together
# What the settings in prep.sqlite are called on the page, and their units, in the order in which they are shown.
SETTINGS = {
    "short_side": ("short side at most", "px"),
    "fps": ("frame rate", "frames/s"),
    "min_seconds": ("shortest video kept", "s"),
    "copy": ("copies sources of the prepared form", ""),
    "gop": ("a key frame every", "frames"),
    "crf": ("x264 quality (crf; lower is better)", ""),
    "preset": ("x264 preset", ""),
    "b_frames": ("B-frames in a row", ""),
    "form": ("version of the prepared form", ""),
}
MAX_TEXT = 100  # characters of a value that is shown


class WrittenDataset(Record, extra="ignore"):
    """What the page shows of dataset.json: the fingerprints of the whole and of each split."""

    fingerprint: str | None = None
    splits: dict[str, SplitRecord] = Field(default_factory=dict)


class RecordedSettings(Record, extra="allow"):
    """The settings in prep.sqlite. Another version may have had others, so any keys are accepted."""


@dataclass(frozen=True)
class Curve:
    """The number of outcomes over the time of work, as two areas.

    `ok` (videos prepared) and `done` (prepared or failed) are the corners of SVG polygons in a box of 100 x 100 whose y
    axis points down. `ok` is drawn over `done`, so the part of `done` that stays visible shows the failures. Long
    pauses, in which no run was active, are cut out, and `breaks` are the x positions (0 to 100) of the cuts. `times`
    and `videos` are the marks of the two axes; `unit` is that of the times, a key of TIME_UNITS.
    """

    ok: str
    done: str
    breaks: tuple[float, ...]
    times: tuple[TickMark, ...]
    unit: str
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
    prepared = sorted(label for label, counts in status.classes.items() if counts.ok)
    fingerprints, fault = read_fingerprints(out)
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
        "thumbnails": make_thumbnails(out.absolute(), states, tuple(status.splits), prepared),
        "histograms": _histograms_of(states),
        "common": _common_of(states),
        "settings": setting_rows(_settings_of(states)),
        "fingerprints": fingerprints,
        "fingerprint_fault": fault,
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


def common_values(values: Iterable[str], other: str) -> list[tuple[str, int, float]]:
    """(value, number of videos, length of its bar, 0 to 1), the most common first; the rest together as `other`."""
    counts = Counter(values)
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_VALUES_SHOWN]
    rest = counts.total() - sum(count for _, count in rows)
    if rest:
        rows.append((f"{len(counts) - len(rows)} {other}", rest))
    most = max((count for _, count in rows), default=1)
    return [(value, count, count / most) for value, count in rows]


def setting_rows(settings: Mapping[str, object]) -> list[tuple[str, str]]:
    """(name, value) of each setting as text: the known ones in the order of SETTINGS."""
    rows = []
    for key, (words, unit) in SETTINGS.items():
        if key in settings:
            rows.append((words, _setting_text(settings[key], unit)))
    return rows


def _setting_text(value: object, unit: str) -> str:
    if value is None:
        return "as in the source"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g} {unit}".strip() if isinstance(value, int | float) else str(value)[:MAX_TEXT]


def read_fingerprints(out: Path) -> tuple[dict[str, str], str]:
    """The fingerprints in dataset.json by what they are of, and what is wrong if it cannot be read. Both may be ''."""
    path = path_under(out, "dataset.json")
    if not path.exists():
        return {}, ""
    try:
        written = read_record(path, WrittenDataset, "prepare the data set again")
    except UserError as error:
        return {}, str(error)
    found = {"data set": written.fingerprint} | {split: known.fingerprint for split, known in written.splits.items()}
    return {name: text[:MAX_TEXT] for name, text in found.items() if text}, ""


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
    unit = next((name for name, number in TIME_UNITS.items() if end * number > MIN_UNITS), "s")
    return Curve(
        ok=_shape(x, ok_by / listed),
        done=_shape(x, done_by / listed),
        breaks=tuple((100 * hours[1:][stopped] / end).round(2).tolist()),
        times=tick_marks(0, end * TIME_UNITS[unit]),
        unit=unit,
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
    words = f"median {median} {unit}, {least} to {most} {unit}, {len(values)} video{'s' * (len(values) != 1)}"
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


def _common_of(states: Sequence[PreparationState]) -> list[tuple[str, str, list[tuple[str, int, float]]]]:
    """(title, hint, rows of `common_values`) of the frame rates and the picture sizes; none if nothing is known."""
    rows = [row for state in states for row in state.measurements(("fps", "width", "height"))]
    # Rates are averages over a video, so 29.97 may be 29.9698 in one of them.
    rates = (f"{fps:.2f}".rstrip("0").rstrip(".") for fps, _, _ in rows if fps is not None)
    sizes = (f"{width:.0f} x {height:.0f}" for _, width, height in rows if width is not None and height is not None)
    shown = [
        ("Frame rate", "Frames per second of the prepared videos.", common_values(rates, "other rates")),
        ("Picture size", "Width x height of the prepared videos, in pixels.", common_values(sizes, "other sizes")),
    ]
    return [drawing for drawing in shown if drawing[2]]


def _settings_of(states: Sequence[PreparationState]) -> dict[str, object]:
    """The settings of the latest run, which are the same in all shards; empty if no run has begun its work."""
    for state in states:
        if text := state.get_fact("settings"):
            where = f"{state.path}: facts: settings"
            return parse_record(parse_json(text, where, RESTORE), RecordedSettings, where, RESTORE).model_extra or {}
    return {}


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
