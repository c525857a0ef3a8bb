"""Videos that fail alone, and which groups are read again after a worker died.

What the death of a worker leads to is tested in test_processes.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.data.test_decode import write_thin_video
from tests.data.test_media import write_disguised
from tests.evaluation.small import moving
from video_swinv2.data.manifest import Entry, Manifest
from video_swinv2.data.media import IMAGE
from video_swinv2.data.workers import AbandonedFile
from video_swinv2.evaluation.protocols import find_protocol
from video_swinv2.evaluation.reading import Group, VideoGroups, VideoRecord, _suspect_groups, deliver_groups
from video_swinv2.evaluation.splits import protocol_for_split
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
        [Entry(path.name, str(path), 0) for path in (thin, whole, unknown, image)],
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
        "a picture of 2097152 x 256 pixels exceeds max_pixels = 67108864; remove it or raise the limit",
        "",
        "its video codec is unknown to FFmpeg",
        "is an image, but the model takes clips",
    ]


@pytest.mark.parametrize("frames", [4, None])
def test_files_are_read_as_what_they_are_whatever_the_first_one_is(
    write_video: Callable[..., Path], tmp_path: Path, frames: int | None
) -> None:
    """Images first and videos first, with several clips: no file decides how the others are read."""
    kinds = write_disguised(tmp_path, write_video)
    preprocessing = Preprocessing(frames=frames, frame_stride=2, image_size=(32, 32))
    for names in (list(kinds), sorted(kinds, key=kinds.get)):  # type: ignore[arg-type]  # images first
        entries = [Entry(name, f"{tmp_path}/{name}", 0) for name in names]
        protocol = protocol_for_split(
            Manifest(tmp_path, "test", ("one",), entries, ""), find_protocol("videoswin-4x3"), preprocessing
        )
        assert protocol.views == 12
        groups = VideoGroups(
            entries,
            protocol,
            preprocessing,
            group_videos=5,
            frame_order="in-order",
            seed=0,
            time_limit_seconds=60.0,
        )
        reasons = {names[record.position]: record.reason for record in groups[0].videos}
        refused = "is an image, but the model takes clips" if frames else ""
        assert reasons == {name: refused if kind == IMAGE else "" for name, kind in kinds.items()}
        # Of an image, every clip is the same; of a video, they are of different pictures.
        means = groups[0].pixels.float().flatten(1).mean(1).reshape(5, 12)
        spread = dict(zip(names, (means.amax(1) - means.amin(1)).tolist(), strict=True))
        assert {name for name, value in spread.items() if value > 10} == {
            name for name, kind in kinds.items() if kind != IMAGE
        }


def test_a_group_holds_its_videos_in_order_and_one_video_is_not_copied() -> None:
    preprocessing = Preprocessing(frames=2, frame_stride=1, image_size=(8, 8))
    groups = VideoGroups(
        [],
        find_protocol("videoswin-4x3"),
        preprocessing,
        group_videos=3,
        frame_order="in-order",
        seed=0,
        time_limit_seconds=60.0,
    )
    first, last = torch.randint(0, 256, (2, 12, 3, 2, 8, 8), dtype=torch.uint8)
    records = [VideoRecord(0), VideoRecord(1, reason="is empty"), VideoRecord(2)]
    group = groups.assemble(4, list(zip(records, (first, None, last), strict=True)))
    assert (group.number, group.videos) == (4, tuple(records))
    assert torch.equal(group.pixels, torch.cat([first, torch.zeros_like(first), last]))
    assert groups.assemble(0, [(records[0], first)]).pixels.data_ptr() == first.data_ptr()
    assert torch.equal(groups.assemble(0, [(records[1], None)]).pixels, torch.zeros_like(first))
