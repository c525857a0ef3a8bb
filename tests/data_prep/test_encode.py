"""The prepared form: key frames where requested, B-frames that can be skipped, no sound, times exact to the tick."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.video.frame import PictureType

from data_prep.encode import (
    TIME_BASE,
    H264Settings,
    difference_from_prepared_form,
    pictures_sha256,
    to_ticks,
    write_video,
)
from video_swinv2.data.decode import VideoReader
from video_swinv2.files import commit_file, partial_path


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([5.0, 5.04, 5.08], [0, 3600, 7200]),
        ([0.0, 1e-9, 2e-9], [0, 1, 2]),
        ([1.0], [0]),
        ([0, 1001 / 30000], [0, 3003]),
    ],
)
def test_ticks(times: list[float], expected: list[int]) -> None:
    assert to_ticks(times) == expected


@pytest.mark.parametrize("b_frames", [0, 3])
def test_the_form_of_a_prepared_video(tmp_path: Path, b_frames: int) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (40, 32, 48, 3), dtype=np.uint8)
    frames[20:] = 255 - frames[20:]  # a scene cut, which must not cause a key frame
    moments = [0, *np.cumsum(np.random.default_rng(1).integers(1000, 9000, 39)).tolist()]
    pictures = ((tick, av.VideoFrame.from_ndarray(image)) for tick, image in zip(moments, frames, strict=True))
    part = partial_path(tmp_path / "v.mp4")
    assert part.name.startswith(".")
    settings = H264Settings(gop=16, b_frames=b_frames)
    encoded = write_video(part, pictures, size=(32, 48), fps=18.0, settings=settings)
    assert encoded == pictures_sha256(part)
    commit_file(part, tmp_path / "v.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        assert [place for place, packet in enumerate(packets) if packet.is_keyframe] == [0, 16, 32]
        assert packets[0].pts == 0
        assert b_frames or all(packet.pts == packet.dts for packet in packets)
        assert not any(packet.is_discard for packet in packets), "no edit list"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert "encoder" not in container.metadata
        kinds = [frame.pict_type for packet in [*packets, None] for frame in stream.codec_context.decode(packet)]
        plain, skipped = PictureType.P, PictureType.B if b_frames else PictureType.P
        # Groups are closed: the frame before a key frame refers to no frame after it.
        group = [PictureType.I, *[skipped, skipped, skipped, plain] * 3, skipped, skipped, plain]
        last = [PictureType.I, skipped, skipped, skipped, plain, skipped, skipped, plain]
        assert kinds == group + group + last
    with VideoReader(tmp_path / "v.mp4") as reader:
        np.testing.assert_allclose(reader.times / float(TIME_BASE), moments, atol=1)
    assert difference_from_prepared_form(tmp_path / "v.mp4", short_side=32, gop=16) == ""
    head = (tmp_path / "v.mp4").read_bytes()
    assert head.index(b"moov") < head.index(b"mdat")  # readable before it has arrived completely


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """Whatever lies in memory: with x264's macroblock tree, several of these encodings differ."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (60, 48, 42), dtype=np.uint8)  # yuv420p, 42 x 32
    encodings = set()
    for _ in range(120):
        scraps = [np.full(size, 7, np.uint8) for size in rng.integers(1, 400_000, rng.integers(0, 6))]
        pictures = (
            (3600 * number, av.VideoFrame.from_ndarray(planes, format="yuv420p")) for number, planes in enumerate(noise)
        )
        write_video(tmp_path / "v.mp4", pictures, size=(32, 42), fps=25.0, settings=H264Settings())
        encodings.add((tmp_path / "v.mp4").read_bytes())
        del scraps
    assert len(encodings) == 1
