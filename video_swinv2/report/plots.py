"""Layout of line plots: where lines, dots and tick marks go; a template draws them in a box of 100 x 100, y down.

P points of a series.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.pages import TickMark, tick_marks

COLOURS = 6  # the classes c1 to c6 of page.html.j2


@dataclass(frozen=True)
class Series:
    """Data to draw: x and y (P,), and optionally the interval of each y, low and high (P,).

    dots: whether each point is marked, for series of few points.
    """

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    dots: bool = False


@dataclass(frozen=True)
class Dot:
    """A marked point in the box of 100 x 100, and the tooltip it shows."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series in the box of 100 x 100: SVG points of its line and of the band of its intervals, and its dots.

    colour: 1 to COLOURS.
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
        """The longest text of the left axis; drawn invisibly, it makes the column wide enough for all of them."""
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
    """Lay out series over common axes; None if no series has two points.

    A series takes the colour of its place in `series`, so that it keeps its colour when another one is empty.
    percent: y are fractions and are shown in percent. mark_every_count: x are counts and each gets a tick mark.
    """
    coloured = [(one, place % COLOURS + 1) for place, one in enumerate(series) if len(one.y) > 1]
    series = [one for one, _ in coloured]
    if not series:
        return None
    x_low, x_high = min(one.x.min() for one in series), max(one.x.max() for one in series)
    y_low = min((one.y if one.low is None else one.low).min() for one in series)
    y_high = max((one.y if one.high is None else one.high).max() for one in series)
    scale = 100.0 if percent else 1.0
    bottom, top = (scale * end for end in y_range) if y_range else _axis_ends(scale * y_low, scale * y_high, percent)
    if mark_every_count:
        counts = range(round(x_low), round(x_high) + 1)
        x_ticks = tuple(TickMark(f"{count}", _position(count, x_low, x_high)) for count in counts)
    else:
        x_ticks = tick_marks(x_low, x_high)
    lines = tuple(_line(one, colour, (x_low, x_high), (bottom, top), scale) for one, colour in coloured)
    return Plot(title, x_label, y_label, x_ticks, tick_marks(bottom, top, " %" if percent else ""), lines)


def _axis_ends(low: float, high: float, percent: bool) -> tuple[float, float]:
    """The data range with a margin; it stays above 0 for non-negative data and below 100 for percentages."""
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = max(0.0, low - margin) if low >= 0 else low - margin
    return bottom, min(100.0, high + margin) if percent and high <= 100 else high + margin


def _position(value: float, low: float, high: float) -> float:
    """Where `value` lies from `low` (0) to `high` (1); the middle of an axis of no length."""
    return (value - low) / (high - low) if high > low else 0.5


def _line(
    series: Series, colour: int, x_range: tuple[float, float], y_range: tuple[float, float], scale: float
) -> Line:
    x = [100 * _position(value, *x_range) for value in series.x.tolist()]
    y = _box_heights(series.y, y_range, scale)
    band = ""
    if series.low is not None and series.high is not None:
        low, high = _box_heights(series.low, y_range, scale), _box_heights(series.high, y_range, scale)
        # A closed polygon: along the lower ends to the right, back along the upper ends to the left.
        band = _svg_points([*x, *reversed(x)], [*low, *reversed(high)])
    dots: tuple[Dot, ...] = ()
    if series.dots:
        dots = tuple(Dot(round(x[i], 2), round(y[i], 2), _tooltip(series, i, scale)) for i in range(len(x)))
    return Line(series.name, colour, _svg_points(x, y), band, dots)


def _box_heights(values: NDArray[np.float64], y_range: tuple[float, float], scale: float) -> list[float]:
    """y in the box, where 0 is the top; values beyond the axis are drawn at its end."""
    return [100 - 100 * min(1.0, max(0.0, _position(scale * value, *y_range))) for value in values.tolist()]


def _tooltip(series: Series, point: int, scale: float) -> str:
    text = f"{series.x[point]:.6g}, {series.name}: {scale * series.y[point]:.4g}"
    if series.low is None or series.high is None:
        return text
    return f"{text} ({scale * series.low[point]:.4g} to {scale * series.high[point]:.4g})"


def _svg_points(x: Sequence[float], y: Sequence[float]) -> str:
    return " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))
