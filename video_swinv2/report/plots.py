"""Layout of line plots: where lines, dots and tick marks go in a box of 100 x 100, which a template draws as SVG.

The origin of the box is its top left corner, as usual in SVG, so y grows downwards.

Letters: P points of a series.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from video_swinv2.pages import TickMark, tick_marks

COLOURS = 6  # the CSS classes c1 to c6 of page.html.j2
MAX_COLUMNS = 240  # in which a curve is drawn; more cannot be told apart in a plot a few hundred pixels wide
MIN_SHARE = 1 / 3  # of the y axis that belongs to the series themselves


@dataclass(frozen=True)
class Series:
    """Data to draw: x and y (P,) and, optionally, low and high (P,), the interval of each y.

    dots: whether each point is marked with a dot, which suits series of few points. colour: 1 to COLOURS, or 0 for one
    by the place of the series. reference: whether it is something to compare with, such as chance, and so dashed.
    """

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    dots: bool = False
    colour: int = 0
    reference: bool = False


@dataclass(frozen=True)
class Dot:
    """A marked point in the box of 100 x 100, and the text of its tooltip."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series in the box of 100 x 100.

    colour: 1 to COLOURS. points, band: the line, and the polygon that its intervals cover, as "x,y x,y ..." for SVG's
    `points`; the band is empty if there are no intervals. dashed: whether it is a reference.
    """

    name: str
    colour: int
    points: str
    band: str
    dots: tuple[Dot, ...]
    dashed: bool


@dataclass(frozen=True)
class Plot:
    """Lines over two labelled axes, ready to draw."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[TickMark, ...]
    y_ticks: tuple[TickMark, ...]
    lines: tuple[Line, ...] = ()

    @property
    def longest_y_text(self) -> str:
        """The longest text of the left axis. Drawn invisibly, it makes the column of the axis wide enough for all."""
        return max((tick.text for tick in self.y_ticks), key=len, default="")


def plot(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str = "",
    percent: bool = False,
    mark_every_count: bool = False,
    y_range: tuple[float, float] | None = None,
) -> Plot | None:
    """Lay out series over common axes; None if no series has two or more points, references aside.

    The colour of a series depends on its place in `series`, so that it is the same if another series is empty.
    percent: y are fractions and are shown in percent. mark_every_count: x are counts, and each gets a tick mark.
    y_range: the ends of the y axis in the units of y; by default they follow the data.
    """
    # A line needs two points. Colours are given out before the shorter series are dropped.
    coloured = [(one, one.colour or place % COLOURS + 1) for place, one in enumerate(series) if len(one.y) > 1]
    series = [one for one, _ in coloured if not one.reference]
    if not series:
        return None
    # The axes span all series; the y axis also makes room for their intervals.
    x_low, x_high = min(one.x.min() for one in series), max(one.x.max() for one in series)
    y_low = min((one.y if one.low is None else one.low).min() for one in series)
    y_high = max((one.y if one.high is None else one.high).max() for one in series)
    if y_range is None:
        coloured, y_low, y_high = _with_references(coloured, y_low, y_high)
    scale = 100.0 if percent else 1.0
    bottom, top = (scale * end for end in y_range) if y_range else _axis_ends(scale * y_low, scale * y_high, percent)
    if mark_every_count:
        # `tick_marks` would put marks at round numbers only, and between counts.
        counts = range(round(x_low), round(x_high) + 1)
        x_ticks = tuple(TickMark(f"{count}", _position(count, x_low, x_high)) for count in counts)
    else:
        x_ticks = tick_marks(x_low, x_high)
    lines = tuple(_line(one, colour, (x_low, x_high), (bottom, top), scale) for one, colour in coloured)
    return Plot(title, x_label, y_label, x_ticks, tick_marks(bottom, top, " %" if percent else ""), lines)


def chance_series(name: str, chance: float, series: Sequence[Series], colour: int = COLOURS) -> Series:
    """A level reference line at `chance`, from the first to the last x of all of `series`."""
    x = np.concatenate([one.x for one in series])
    ends = np.array([x.min(), x.max()] if x.size else [])
    return Series(name, ends, np.full_like(ends, chance), colour=colour, reference=True)


def _with_references(
    coloured: Sequence[tuple[Series, int]], low: float, high: float
) -> tuple[list[tuple[Series, int]], float, float]:
    """The series with references that fit on the y axis, and its range: `low` to `high`, widened for them.

    References far from the series would squeeze their lines until nothing can be read from them. If less than MIN_SHARE
    of the axis were left, the references are not drawn, and their names say so in the key.
    """
    drawn = [one for one, _ in coloured if one.reference]
    wide_low, wide_high = (pick([end, *(pick(one.y) for one in drawn)]) for pick, end in ((min, low), (max, high)))
    if high == low or high - low >= MIN_SHARE * (wide_high - wide_low):
        return list(coloured), wide_low, wide_high
    none = np.empty(0)
    hidden = [
        (replace(one, name=f"{one.name}, off the axis", x=none, y=none) if one.reference else one, colour)
        for one, colour in coloured
    ]
    return hidden, low, high


def _axis_ends(low: float, high: float, percent: bool) -> tuple[float, float]:
    """The range of the data with a margin, but never below 0 for non-negative data or above 100 for percentages."""
    # 6 % of the range; for constant data 5 % of the value; for data that are all 0, 1.
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = max(0.0, low - margin) if low >= 0 else low - margin
    return bottom, min(100.0, high + margin) if percent and high <= 100 else high + margin


def _position(value: float, low: float, high: float) -> float:
    """Where `value` lies on an axis from `low` (0) to `high` (1); in the middle if the axis has no length."""
    return (value - low) / (high - low) if high > low else 0.5


def _line(
    series: Series, colour: int, x_range: tuple[float, float], y_range: tuple[float, float], scale: float
) -> Line:
    """A series in the coordinates of the box. scale: what y is multiplied by, as the ends of `y_range` already are."""
    if series.low is None and len(series.x) > MAX_COLUMNS:
        drawn = extremes(series.x, series.y)
        series = replace(series, x=series.x[drawn], y=series.y[drawn])
    # x from 0 (left) to 100 (right); y is turned over by `_box_heights`.
    x = [100 * _position(value, *x_range) for value in series.x.tolist()]
    y = _box_heights(series.y, y_range, scale)
    band = ""
    if series.low is not None and series.high is not None:
        low, high = _box_heights(series.low, y_range, scale), _box_heights(series.high, y_range, scale)
        # A closed polygon: to the right along the lower ends, and back to the left along the upper ends.
        band = _svg_points([*x, *reversed(x)], [*low, *reversed(high)])
    dots: tuple[Dot, ...] = ()
    if series.dots:
        dots = tuple(Dot(round(x[i], 2), round(y[i], 2), _tooltip(series, i, scale)) for i in range(len(x)))
    return Line(series.name, colour, _svg_points(x, y), band, dots, series.reference)


def extremes(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """The points, by number, that draw the same curve: of MAX_COLUMNS columns, each one's ends, lowest and highest.

    x, y: (P,), x ascending. So no spike is lost, and there are at most 4 MAX_COLUMNS points, however many were given.
    """
    columns = ((x - x[0]) / ((x[-1] - x[0]) or 1.0) * MAX_COLUMNS).astype(np.int64)
    # The points from starts[i] to starts[i + 1] are in one column.
    starts = np.flatnonzero(np.diff(columns, prepend=-1, append=columns[-1] + 1))
    chosen = [
        {first, end - 1, first + int(y[first:end].argmin()), first + int(y[first:end].argmax())}
        for first, end in itertools.pairwise(starts.tolist())
    ]
    return np.array([point for points in chosen for point in sorted(points)], dtype=np.int64)


def _box_heights(values: NDArray[np.float64], y_range: tuple[float, float], scale: float) -> list[float]:
    """The y coordinate of each value in the box, where 0 is the top; values beyond the axis are drawn at its end."""
    return [100 - 100 * min(1.0, max(0.0, _position(scale * value, *y_range))) for value in values.tolist()]


def _tooltip(series: Series, point: int, scale: float) -> str:
    """Such as "4, top-1: 62.5 (58.1 to 66.7)": x, the name of the series, y, and its interval if there is one."""
    text = f"{series.x[point]:.6g}, {series.name}: {scale * series.y[point]:.4g}"
    if series.low is None or series.high is None:
        return text
    return f"{text} ({scale * series.low[point]:.4g} to {scale * series.high[point]:.4g})"


def _svg_points(x: Sequence[float], y: Sequence[float]) -> str:
    """The points attribute of an SVG polyline or polygon."""
    return " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))
