"""Which groups are read again after a worker died. What that leads to is tested in test_processes.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from video_swinv2.data.workers import AbandonedFile
from video_swinv2.evaluation.reading import _suspect_groups


@pytest.mark.parametrize(
    ("in_hand", "expected"),
    [
        ([7], [3]),  # videos 6 and 7 are group 3
        ([7, 4], [2, 3]),  # two workers died at once
        ([], [2, 3, 5, 6, 8]),  # no trace of what it was: all that two workers may hold, and one more
        ([0], [2, 3, 5, 6, 8]),  # group 0 is already delivered, so it was not that one
    ],
)
def test_every_restart_makes_progress(in_hand: list[int], expected: list[int]) -> None:
    abandoned = [AbandonedFile(position, 1.0) for position in in_hand]
    groups = SimpleNamespace(in_hand=SimpleNamespace(abandoned=lambda: abandoned), group_videos=2)
    assert _suspect_groups(groups, [2, 3, 5, 6, 8, 9], workers=2) == expected  # type: ignore[arg-type]  # all it looks at
