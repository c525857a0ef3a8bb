"""Sliding windows against indices counted by hand, and their pixels against those of a test's reader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from video_swinv2.data.decode import VideoReader
from video_swinv2.inference.streams import Frame, FrameStream, centre_crop, is_live, is_stream
from video_swinv2.inference.segments import SegmentCutter


def windows_of(n: int, frames: int, stride: int, hop: int) -> list[tuple[int, ...]]:
    slider = SegmentCutter(frames, stride, hop)
    image = np.zeros((1, 1, 3), np.uint8)
    found = [slider.add(Frame(i, i / 10, image)) for i in range(n)]
    return [window.indices for window in [*found, slider.finish()] if window is not None]


@pytest.mark.parametrize(
    ("n", "frames", "stride", "hop", "expected"),
    [
        (10, 3, 2, 2, [(0, 2, 4), (2, 4, 6), (4, 6, 8), (5, 7, 9)]),  # the last ends with the last picture
        (9, 3, 2, 2, [(0, 2, 4), (2, 4, 6), (4, 6, 8)]),
        (5, 3, 2, 1, [(0, 2, 4)]),
        (3, 3, 2, 1, [(0, 2, 1)]),  # shorter than a window: looped
        (1, 2, 4, 9, [(0, 0)]),
        (8, 2, 1, 5, [(0, 1), (5, 6), (6, 7)]),  # a hop over pictures that are not looked at
        (4, 1, 7, 2, [(0,), (2,), (3,)]),  # an image model
        (0, 2, 1, 1, []),
    ],
)
def test_windows(n: int, frames: int, stride: int, hop: int, expected: list[tuple[int, ...]]) -> None:
    assert windows_of(n, frames, stride, hop) == expected


def test_pictures_are_those_of_a_test(changing: Path, outside_data: Path) -> None:
    """Times and pixels as VideoReader has them, also where the picture is turned."""
    for path in (changing, outside_data / "odd_clips" / "decord__video_90.mov"):
        with VideoReader(path) as reader, FrameStream(str(path)) as source:
            for i, (seconds, frame) in enumerate(source):
                assert source.shown_size == reader.size
                assert seconds == pytest.approx(reader.times[i] - reader.times[0], abs=1e-6)
                side, (rows, columns) = centre_crop(source.shown_size, (32, 48))
                ours = torch.from_numpy(source.image(frame, side)[rows, columns].copy()).permute(2, 0, 1)
                assert ours.shape == (3, 32, 48)
                if i > 12:
                    continue
                assert torch.equal(ours, reader.frames([i], short_side=side)[0][:, rows, columns])
            assert i + 1 == len(reader)


def test_what_is_a_stream(tmp_path: Path) -> None:
    (tmp_path / "file.mp4").write_bytes(b"x")
    assert not is_stream(str(tmp_path / "file.mp4"))
    assert not is_stream(str(tmp_path / "gone.mp4"))
    assert not is_stream("file:///etc/passwd")
    for name in ("http://h/x", "https://h/x", "-", "tcp://h:1"):
        assert is_stream(name)
        assert not is_live(name)
    for name in ("rtsp://h/x", "udp://h:1", "/dev/null"):  # a device is what a camera is
        assert is_stream(name)
        assert is_live(name)
