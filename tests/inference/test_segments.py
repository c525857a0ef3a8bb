"""Segments against indices counted by hand, and the frames of a stream against those of the reader of a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.test_decode import write_thin_video
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.inference.segments import SegmentCutter
from video_swinv2.inference.streams import Frame, FrameStream, centre_crop, is_live, is_stream


def segment_indices(n: int, frames: int, stride: int, hop: int) -> list[tuple[int, ...]]:
    cutter = SegmentCutter(frames, stride, hop)
    image = np.zeros((1, 1, 3), np.uint8)
    found = [cutter.add(Frame(i, i / 10, image)) for i in range(n)]
    return [segment.indices for segment in [*found, cutter.finish()] if segment is not None]


@pytest.mark.parametrize(
    ("n", "frames", "stride", "hop", "expected"),
    [
        (10, 3, 2, 2, [(0, 2, 4), (2, 4, 6), (4, 6, 8), (5, 7, 9)]),  # the last segment ends with the last frame
        (9, 3, 2, 2, [(0, 2, 4), (2, 4, 6), (4, 6, 8)]),
        (5, 3, 2, 1, [(0, 2, 4)]),
        (3, 3, 2, 1, [(0, 2, 1)]),  # shorter than a segment: looped
        (1, 2, 4, 9, [(0, 0)]),
        (8, 2, 1, 5, [(0, 1), (5, 6), (6, 7)]),  # the hop leaves frames out
        (4, 1, 7, 2, [(0,), (2,), (3,)]),  # an image model
        (0, 2, 1, 1, []),
    ],
)
def test_indices_counted_by_hand(n: int, frames: int, stride: int, hop: int, expected: list[tuple[int, ...]]) -> None:
    assert segment_indices(n, frames, stride, hop) == expected


def test_frames_are_those_of_a_test(changing: Path, outside_data: Path) -> None:
    """Times and pixels equal VideoReader's, also in a rotated video."""
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


def test_what_a_damaged_file_makes_libraries_raise_names_it(changing: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.mp4"
    unknown.write_bytes(changing.read_bytes().replace(b"avc1", b"none"))
    with pytest.raises(DecodeError, match=r"unknown\.mp4: its video codec is unknown"):
        FrameStream(str(unknown))
    with FrameStream(str(write_thin_video(tmp_path / "thin.mkv"))) as source:
        for _, frame in source:
            with pytest.raises(DecodeError, match=r"thin\.mkv: cannot be decoded"):
                source.image(frame, 224)


def test_streams_and_live_streams_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "file.mp4").write_bytes(b"x")
    assert not is_stream(str(tmp_path / "file.mp4"))
    assert not is_stream(str(tmp_path / "gone.mp4"))
    assert not is_stream("file:///etc/passwd")
    for name in ("http://h/x", "https://h/x", "-", "tcp://h:1"):
        assert is_stream(name)
        assert not is_live(name)
    for name in ("rtsp://h/x", "udp://h:1", "/dev/null"):  # a character device, as a camera is
        assert is_stream(name)
        assert is_live(name)
