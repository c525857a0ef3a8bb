"""Pages are filled completely, and their plots have round tick marks."""

from __future__ import annotations

import re

import pytest
from jinja2 import UndefinedError

from video_swinv2.pages import render, tick_marks


def test_a_value_the_template_needs_and_does_not_get_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="tests"):
        render("video_swinv2.report", "compare.html.j2", {})


def test_tick_marks_are_round_and_inside_the_axis() -> None:
    assert [mark.text for mark in tick_marks(0, 100, " %")] == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
    assert [mark.text for mark in tick_marks(0.7, 2.07)] == ["1", "1.5", "2"]
    assert [mark.text for mark in tick_marks(0.0003, 0.00151)] == ["0.0005", "0.001", "0.0015"]
    assert tick_marks(0, 100)[1].position == pytest.approx(0.2)
    assert [mark.text for mark in tick_marks(3, 3)] == ["3"]
    assert all(0 <= mark.position <= 1 for low in (-7.3, 0, 12.1) for mark in tick_marks(low, low + 31.7))


@pytest.mark.parametrize("high", [0.003, 1, 7, 10, 246_534])
def test_tick_marks_are_round_and_few(high: float) -> None:
    marks = tick_marks(0, high)
    assert 2 <= len(marks) <= 6
    assert marks[0].position == 0
    assert marks[-1].position <= 1
    assert all(re.fullmatch(r"0|0?\.?0*[1-9]\d?0*|\d*\.\d", mark.text) for mark in marks), marks
