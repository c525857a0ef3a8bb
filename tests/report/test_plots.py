"""Plots: lines and bands are where their values are, and a series keeps its colour."""

from __future__ import annotations

import numpy as np

from video_swinv2.report.plots import MAX_COLUMNS, Series, chance_series, extremes, plot


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


def test_references_are_dashed_and_squeeze_nothing() -> None:
    x = np.array([1.0, 2.0])
    near, far = (Series("top-1", x, np.array(y)) for y in ([0.3, 0.5], [0.76, 0.77]))
    drawn = plot("t", [near, chance_series("chance", 0.1, [near])], x_label="x", percent=True)
    assert drawn is not None
    line, chance = drawn.lines
    assert (line.dashed, chance.dashed, chance.colour, chance.name) == (False, True, 6, "chance")
    # From 10 % to 50 %, with a margin of 6 % of that: 7.6 % to 52.4 %.
    height = 100 - 100 * (10 - 7.6) / (52.4 - 7.6)
    assert chance.points == f"0.00,{height:.2f} 100.00,{height:.2f}"
    drawn = plot("t", [far, chance_series("chance", 0.1, [far])], x_label="x", percent=True)
    assert drawn is not None
    shown = [(line.name, bool(line.points)) for line in drawn.lines]
    assert shown == [("top-1", True), ("chance, off the axis", False)]
    assert float(drawn.y_ticks[0].text.split()[0]) > 75, "the two points can be told apart"
    none = Series("top-1", np.empty(0), np.empty(0))
    assert plot("t", [none, chance_series("chance", 0.1, [none])], x_label="x") is None
    assert plot("t", [none, Series("chance", x, x, reference=True)], x_label="x") is None


def test_long_curves_keep_their_spikes_and_few_points() -> None:
    x = np.linspace(0.0, 1.0, 100_000)
    y = np.sin(6 * x)
    y[54_321], y[70_000] = 9.0, -9.0
    kept = extremes(x, y)
    assert np.all(np.diff(kept) > 0)
    assert {0, 54_321, 70_000, 99_999} <= set(kept.tolist())
    assert len(kept) <= 4 * (MAX_COLUMNS + 1)
    drawn = plot("t", [Series("a", x, y)], x_label="x")
    assert drawn is not None
    assert len(drawn.lines[0].points.split()) == len(kept)
    standing = extremes(np.zeros(1000), np.arange(1000.0))
    assert standing.tolist() == [0, 999]
