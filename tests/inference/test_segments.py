"""Segments against indices counted by hand, and the frames of a stream against those of the reader of a test."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from tests.data.test_decode import numbered_frames, write_thin_video, write_timed
from video_swinv2.data.decode import DecodeError, VideoReader, presentation_times
from video_swinv2.data.display import size_for
from video_swinv2.evaluation.protocols import PROTOCOLS, plan_views
from video_swinv2.inference.media_types import read_file_views
from video_swinv2.inference.segments import SegmentCutter
from video_swinv2.inference.streams import Frame, FrameStream, frame_crops, is_live, is_stream, middle_crop
from video_swinv2.weights.store import Preprocessing

CENTRE = PROTOCOLS["center-1x1"]


def segment_indices(times: list[float], frames: int, stride: int, every_seconds: float | None) -> list[tuple[int, ...]]:
    cutter = SegmentCutter(frames, stride, every_seconds)
    crops = np.zeros((1, 1, 1, 3), np.uint8)
    found = [cutter.add(Frame(i, seconds, crops)) for i, seconds in enumerate(times)]
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
        (9, 2, 2, None, [(0, 2), (3, 5), (6, 8)]),  # one after the other
        (8, 2, 2, None, [(0, 2), (3, 5), (5, 7)]),
    ],
)
def test_indices_counted_by_hand(
    n: int, frames: int, stride: int, hop: int | None, expected: list[tuple[int, ...]]
) -> None:
    """Of a stream with 10 frames per second; `hop` is the number of frames from segment to segment."""
    times = [i / 10 for i in range(n)]
    assert segment_indices(times, frames, stride, None if hop is None else hop / 10) == expected


THIRTY_THEN_TWO = [*(i / 30 for i in range(60)), *(2 + i / 2 for i in range(8))]  # frames per second; 2 s, then 4 s


@pytest.mark.parametrize(
    ("times", "every_seconds", "starts"),
    [
        (THIRTY_THEN_TWO, 1.0, [0, 1, 2, 3, 4, 5, 5.5]),  # the last one is the end of the stream
        (THIRTY_THEN_TWO, 0.75, [0, 23 / 30, 1.5, 2.5, 3, 4, 4.5, 5.5]),  # the first frame at 0.75 s or later, ...
        (THIRTY_THEN_TWO, 0.1, [*(i / 10 for i in range(20)), *(2 + i / 2 for i in range(8))]),  # no frame twice
        (THIRTY_THEN_TWO, 1e-300, THIRTY_THEN_TWO),
        (THIRTY_THEN_TWO, float("inf"), [0, 5.5]),  # the first, and the end of the stream
        ([i * 1001 / 30000 for i in range(100)], 1.0, [0, 1.001, 2.002, 3.003, 3.303]),
        (
            [round(i / 30, 3) for i in range(50)],
            0.1,
            [*(i / 10 for i in range(17)), 49 / 30],
        ),  # Matroska's milliseconds
        ([i / 10 for i in range(12)] + [60.0, 60.1], 0.5, [0, 0.5, 1, 60, 60.1]),  # a pause
    ],
)
def test_segments_start_by_time_and_not_by_count(times: list[float], every_seconds: float, starts: list[float]) -> None:
    found = [times[first] for (first,) in segment_indices(times, 1, 1, every_seconds)]
    assert found == pytest.approx(starts, abs=0.001)


@pytest.mark.parametrize("options", [{"bf": "0"}, {"bf": "2"}, {"bf": "16", "b-pyramid": "none"}, {"bf": "7"}])
def test_frames_of_avi_have_the_times_of_the_reader(tmp_path: Path, options: dict[str, str]) -> None:
    """AVI stores decoding times, whose order is another one if there are B-frames; up to 16 come in a row."""
    frames, when = numbered_frames(60), list(range(60))
    path = write_timed(tmp_path / "v.avi", frames, when, base=Fraction(1, 25), b_strategy="0", **options)
    with VideoReader(path) as reader, FrameStream(str(path)) as source:
        times = [seconds for seconds, _ in source]
        assert times == pytest.approx(reader.times - reader.times[0], abs=1e-6)
    assert times == pytest.approx(np.arange(60) / 25, abs=1e-6)


def test_frames_of_real_avi_files_have_the_times_of_the_reader(outside_data: Path) -> None:
    for path in (
        outside_data / "ut_interaction" / "kicking" / "set1_seq01_001.avi",  # packed B-frames
        outside_data / "odd_clips" / "ft__fixture.avi",
        outside_data / "odd_clips" / "mma2__test.avi",
    ):
        with VideoReader(path) as reader, FrameStream(str(path)) as source:
            assert [seconds for seconds, _ in source] == pytest.approx(reader.times - reader.times[0], abs=1e-6)


def test_frames_without_a_time_stamp_get_none_of_the_others() -> None:
    frames = [av.VideoFrame(16, 16, "yuv420p") for _ in range(40)]
    for number, frame in enumerate(frames):
        frame.pts = None if number == 3 else number ^ 1  # neighbours are exchanged
    found = list(presentation_times(frames))
    assert [frame for _, frame in found] == frames
    assert [pts for pts, _ in found] == [0, 1, *range(3, 40), None]


def test_frames_are_those_of_a_test(changing: Path, outside_data: Path) -> None:
    """Times and pixels equal VideoReader's, also in a rotated video."""
    for path in (changing, outside_data / "odd_clips" / "decord__video_90.mov"):
        with VideoReader(path) as reader, FrameStream(str(path)) as source:
            for i, (seconds, frame) in enumerate(source):
                assert source.shown_size == reader.size
                assert seconds == pytest.approx(reader.times[i] - reader.times[0], abs=1e-6)
                side, ((top, left, height, width),) = frame_crops(CENTRE, source.shown_size, (32, 48))
                rows, columns = slice(top, top + height), slice(left, left + width)
                ours = torch.from_numpy(source.image(frame, side)[rows, columns].copy()).permute(2, 0, 1)
                assert ours.shape == (3, 32, 48)
                if i > 12:
                    continue
                assert torch.equal(ours, reader.frames([i], short_side=side)[0][:, rows, columns])
            assert i + 1 == len(reader)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_crops_are_those_of_a_test(changing: Path, name: str) -> None:
    """Every crop of a segment equals that of the view of a test which begins with the same frame."""
    protocol = PROTOCOLS[name]
    views = read_file_views(changing, protocol, Preprocessing(4, 2, (32, 32)))  # (V, 3, T, H, W)
    with VideoReader(changing) as reader, FrameStream(str(changing)) as source:
        side, boxes = frame_crops(protocol, reader.size, (32, 32))
        plan = plan_views(protocol, len(reader), *size_for(reader.size, side), 4, 2, (32, 32), reader.fps)
        pictures = [source.image(frame, side) for _, frame in source]
    assert len(boxes) == protocol.crops
    for number, view in enumerate(plan):
        top, left, height, width = boxes[number % protocol.crops]
        ours = pictures[view.start][top : top + height, left : left + width]
        assert np.array_equal(ours.transpose(2, 0, 1), views[number, :, 0].numpy())
    # The middle one has as much to its left as to its right, and lies in the middle of the list only in some protocols.
    _, left, _, width = frame_crops(protocol, (48, 64), (32, 32))[1][middle_crop(protocol)]
    assert abs(2 * left + width - size_for((48, 64), side)[1]) <= 2


def test_what_a_damaged_file_makes_libraries_raise_names_it(changing: Path, tmp_path: Path) -> None:
    unknown = tmp_path / "unknown.mp4"
    unknown.write_bytes(changing.read_bytes().replace(b"avc1", b"none"))
    with pytest.raises(DecodeError, match=r"unknown\.mp4: its video codec is unknown"):
        FrameStream(str(unknown))
    with FrameStream(str(write_thin_video(tmp_path / "thin.mkv"))) as source:
        for _, frame in source:
            with pytest.raises(DecodeError, match=r"thin\.mkv: a picture of 1835008 x 224 pixels exceeds max_pix"):
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
