"""Where the lines, dots and numbers of a plot go; a template draws them in a box of 100 x 100, y down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.axes import Tick, ticks

COLOURS = 6


@dataclass(frozen=True)
class Series:
    """Values over places: x, y (P,), and where known the interval of each y. `dots`: few points, each to be seen."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    dots: bool = False


@dataclass(frozen=True)
class Dot:
    """A point, 0 to 100 each way, and what it says when pointed at."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """One series: its colour (1 to COLOURS), corners of its line and of the band of its intervals, its dots."""

    name: str
    colour: int
    points: str
    band: str
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Plot:
    """A drawing: lines over two axes. `across` and `up` name the axes."""

    title: str
    across: str
    up: str
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    lines: tuple[Line, ...] = ()

    @property
    def widest(self) -> str:
        """The longest number on the left, which makes room for all of them."""
        return max((tick.text for tick in self.y), key=len, default="")


def plot(
    title: str,
    series: Sequence[Series],
    *,
    across: str,
    up: str = "",
    percent: bool = False,
    whole: bool = False,
    y_range: tuple[float, float] | None = None,
) -> Plot | None:
    """Lay out series over common axes; None where no series has two points. A series has the colour of its place.

    percent: y are fractions and shown as percent. whole: x are counts, all marked.
    """
    coloured = [(one, place % COLOURS + 1) for place, one in enumerate(series) if len(one.y) > 1]
    series = [one for one, _ in coloured]
    if not series:
        return None
    x_low, x_high = min(one.x.min() for one in series), max(one.x.max() for one in series)
    low = min((one.y if one.low is None else one.low).min() for one in series)
    high = max((one.y if one.high is None else one.high).max() for one in series)
    scale = 100.0 if percent else 1.0
    bottom, top = (scale * end for end in y_range) if y_range else _room(scale * low, scale * high, percent)
    if whole:
        x = tuple(Tick(f"{n}", _share(n, x_low, x_high)) for n in range(round(x_low), round(x_high) + 1))
    else:
        x = ticks(x_low, x_high)
    lines = tuple(_line(one, colour, (x_low, x_high), (bottom, top), scale) for one, colour in coloured)
    return Plot(title, across, up, x, ticks(bottom, top, " %" if percent else ""), lines)


def _room(low: float, high: float, percent: bool) -> tuple[float, float]:
    """The ends of an axis: a little beyond the data, never beyond 0 and 100 % of shares nor below 0 of positives."""
    spare = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = max(0.0, low - spare) if low >= 0 else low - spare
    return bottom, min(100.0, high + spare) if percent and high <= 100 else high + spare


def _share(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _line(one: Series, colour: int, across: tuple[float, float], up: tuple[float, float], scale: float) -> Line:
    x = [100 * _share(value, *across) for value in one.x.tolist()]
    y = _heights(one.y, up, scale)
    band = ""
    if one.low is not None and one.high is not None:
        low, high = _heights(one.low, up, scale), _heights(one.high, up, scale)
        band = _corners([*x, *reversed(x)], [*low, *reversed(high)])
    dots = [Dot(round(x[i], 2), round(y[i], 2), _words(one, i, scale)) for i in range(len(x))] if one.dots else []
    return Line(one.name, colour, _corners(x, y), band, tuple(dots))


def _heights(values: NDArray[np.float64], up: tuple[float, float], scale: float) -> list[float]:
    return [100 - 100 * min(1.0, max(0.0, _share(scale * value, *up))) for value in values.tolist()]


def _words(one: Series, place: int, scale: float) -> str:
    text = f"{one.x[place]:.6g}, {one.name}: {scale * one.y[place]:.4g}"
    if one.low is None or one.high is None:
        return text
    return f"{text} ({scale * one.low[place]:.4g} to {scale * one.high[place]:.4g})"


def _corners(x: Sequence[float], y: Sequence[float]) -> str:
    return " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))
