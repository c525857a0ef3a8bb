"""Axes of plots have round numbers."""

from __future__ import annotations

import re

import pytest

from video_swinv2.axes import ticks


def test_ticks_are_round_and_inside() -> None:
    assert [tick.text for tick in ticks(0, 100, " %")] == ["0 %", "20 %", "40 %", "60 %", "80 %", "100 %"]
    assert [tick.text for tick in ticks(0.7, 2.07)] == ["1", "1.5", "2"]
    assert [tick.text for tick in ticks(0.0003, 0.00151)] == ["0.0005", "0.001", "0.0015"]
    assert ticks(0, 100)[1].place == pytest.approx(0.2)
    assert [tick.text for tick in ticks(3, 3)] == ["3"]
    assert all(0 <= tick.place <= 1 for low in (-7.3, 0, 12.1) for tick in ticks(low, low + 31.7))


@pytest.mark.parametrize("high", [0.003, 1, 7, 10, 246_534])
def test_ticks_are_round_and_few(high: float) -> None:
    found = ticks(0, high)
    assert 2 <= len(found) <= 6
    assert found[0].place == 0
    assert found[-1].place <= 1
    assert all(re.fullmatch(r"0|0?\.?0*[1-9]\d?0*|\d*\.\d", tick.text) for tick in found), found
