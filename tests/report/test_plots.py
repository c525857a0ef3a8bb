"""Plots: lines and bands are where their values are, and a series keeps its colour."""

from __future__ import annotations

import numpy as np

from video_swinv2.report.plots import Series, plot


def test_lines_are_where_their_values_are() -> None:
    x, y = np.array([1.0, 2.0, 3.0]), np.array([0.0, 0.5, 1.0])
    drawn = plot("t", [Series("a", x, y, y - 0.1, y + 0.1, dots=True)], x_label="x", percent=True, y_range=(0, 1))
    assert drawn is not None
    assert drawn.lines[0].points == "0.00,100.00 50.00,50.00 100.00,0.00"
    assert drawn.lines[0].band.startswith("0.00,100.00 50.00,60.00 100.00,10.00 100.00,0.00"), (
        "clipped at the end of the axis"
    )
    assert drawn.lines[0].dots[1].text == "2, a: 50 (40 to 60)"
    assert [tick.text for tick in drawn.y_ticks][-1] == drawn.longest_y_text == "100 %"
    whole = plot("t", [Series("a", x, y)], x_label="x", mark_every_count=True)
    assert whole is not None
    assert [(tick.text, tick.position) for tick in whole.x_ticks] == [("1", 0), ("2", 0.5), ("3", 1)]


def test_a_series_keeps_its_colour_where_another_has_nothing_to_show() -> None:
    x = np.arange(4.0)
    none = np.empty(0)
    drawn = plot("t", [Series("a", x, x), Series("b", none, none), Series("c", x, -x)], x_label="x")
    assert drawn is not None
    assert [(line.name, line.colour) for line in drawn.lines] == [("a", 1), ("c", 3)]
    assert plot("t", [Series("b", none, none), Series("one", x[:1], x[:1])], x_label="x") is None
    flat = plot("t", [Series("flat", x, 0 * x + 2)], x_label="x")
    assert flat is not None
    assert flat.lines[0].points == "0.00,50.00 33.33,50.00 66.67,50.00 100.00,50.00"
