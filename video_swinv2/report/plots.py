"""Layout of line plots: where lines, dots and tick marks go in a box of 100 x 100, which a template draws as SVG.

The origin of the box is its top left corner, as usual in SVG, so y grows downwards.

Letters: P points of a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.pages import TickMark, tick_marks

COLOURS = 6  # the CSS classes c1 to c6 of page.html.j2


@dataclass(frozen=True)
class Series:
    """Data to draw: x and y (P,) and, optionally, low and high (P,), the interval of each y.

    dots: whether each point is marked with a dot, which suits series of few points.
    """

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    dots: bool = False


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
    `points`; the band is empty if there are no intervals.
    """

    name: str
    colour: int
    points: str
    band: str
    dots: tuple[Dot, ...]


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
    """Lay out series over common axes; None if no series has two or more points.

    The colour of a series depends on its place in `series`, so that it is the same if another series is empty.
    percent: y are fractions and are shown in percent. mark_every_count: x are counts, and each gets a tick mark.
    y_range: the ends of the y axis in the units of y; by default they follow the data.
    """
    # A line needs two points. Colours are given out before the shorter series are dropped.
    coloured = [(one, place % COLOURS + 1) for place, one in enumerate(series) if len(one.y) > 1]
    series = [one for one, _ in coloured]
    if not series:
        return None
    # The axes span all series; the y axis also makes room for their intervals.
    x_low, x_high = min(one.x.min() for one in series), max(one.x.max() for one in series)
    y_low = min((one.y if one.low is None else one.low).min() for one in series)
    y_high = max((one.y if one.high is None else one.high).max() for one in series)
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
    return Line(series.name, colour, _svg_points(x, y), band, dots)


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
