"""Videos that fail alone, and which groups are read again after a worker died.

What the death of a worker leads to is tested in test_processes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.data.test_decode import write_thin_video
from tests.evaluation.small import moving
from video_swinv2.data.manifest import Entry
from video_swinv2.data.workers import AbandonedFile
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.reading import Group, VideoGroups, _suspect_groups, deliver_groups
from video_swinv2.weights.store import Preprocessing


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


@pytest.mark.parametrize("workers", [0, 1])
def test_a_video_that_cannot_be_read_fails_alone(
    write_video: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    """A picture that cannot be resized, a codec that nobody knows, and an image among the videos."""
    whole = write_video(tmp_path / "whole.mp4", moving(12, (0, 2), 0))
    thin, unknown, image = write_thin_video(tmp_path / "thin.mkv"), tmp_path / "unknown.mp4", tmp_path / "image.png"
    unknown.write_bytes(whole.read_bytes().replace(b"avc1", b"none"))
    Image.new("RGB", (64, 48)).save(image)
    groups = VideoGroups(
        [Entry(path.name, path, 0) for path in (thin, whole, unknown, image)],
        find_protocol("center-1x1"),
        Preprocessing(frames=4, frame_stride=2, image_size=(224, 224)),
        group_videos=2,
        frame_order="in-order",
        seed=0,
        time_limit_seconds=60.0,
    )
    found: list[Group] = []
    deliver_groups(groups, [0, 1], workers, lambda group, waited: found.append(group))
    assert [record.reason for group in found for record in group.videos] == [
        "cannot be decoded (Invalid argument)",
        "",
        "its video codec is unknown to FFmpeg",
        "is an image, but the model takes clips",
    ]
