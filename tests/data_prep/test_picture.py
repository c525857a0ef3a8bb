"""Pictures to encode: the same colours as the slow, exact path of swscale, and upright."""

from __future__ import annotations

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from data_prep.picture import ACCURATE, Fitter
from tests.data.test_display import filtered, moving_bars
from video_swinv2.data.display import Orientation


def frame_of(kind: str, colours: int, spread: int, seed: int = 0) -> av.VideoFrame:
    """A frame of 96 x 128 with smooth colours, as in photographs, tagged with its colour matrix."""
    coarse = np.random.default_rng(seed).normal(128, spread, (6, 8, 3)).clip(0, 255).astype(np.uint8)
    rgb = av.VideoFrame.from_ndarray(coarse, format="rgb24")
    return VideoReformatter().reformat(
        rgb, 128, 96, kind, dst_colorspace=colours, interpolation=ACCURATE, dst_color_range=ColorRange.MPEG
    )


@pytest.mark.parametrize("size", [(96, 128), (48, 64), (24, 32)])
def test_bt709_becomes_bt601(size: tuple[int, int]) -> None:
    frame = frame_of("yuv420p", Colorspace.ITU709, spread=40)
    frame.colorspace, frame.color_range = 1, ColorRange.MPEG
    exact = VideoReformatter().reformat(
        frame, size[1], size[0], "yuv420p", dst_colorspace=Colorspace.ITU601, interpolation=ACCURATE
    )
    relabelled = VideoReformatter().reformat(frame, size[1], size[0], "yuv420p", interpolation=ACCURATE)
    kept = frame.to_ndarray().copy()
    found = Fitter(size, Orientation()).fit(frame)
    assert np.array_equal(frame.to_ndarray(), kept)  # the decoder still refers to it
    wanted, before = exact.to_ndarray().astype(int), relabelled.to_ndarray().astype(int)
    error = np.abs(found.to_ndarray() - wanted)
    assert error.mean() < 1
    assert abs((found.to_ndarray() - wanted).mean()) < 0.2
    assert np.abs(before - wanted).mean() > 3 * error.mean()


@pytest.mark.parametrize("kind", ["yuv420p", "yuv444p", "yuvj420p", "rgb24"])
@pytest.mark.parametrize("turn", [Orientation(transpose=True, flip_y=True), Orientation(flip_x=True, flip_y=True)])
def test_rotated_pictures_are_upright(kind: str, turn: Orientation) -> None:
    rgb = np.zeros((96, 128, 3), np.uint8)
    rgb[:48, :64, 0], rgb[48:, 64:, 2] = 250, 250
    frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format=kind)
    size = (64, 48) if turn.transpose else (48, 64)
    found = Fitter(size, turn).fit(frame).to_ndarray(format="rgb24")
    wanted = turn.apply(rgb)[::2, ::2]
    assert found.shape == wanted.shape
    inner = np.abs(found.astype(int) - wanted).mean(axis=2)
    assert np.median(inner) < 8
    assert (inner < 40).mean() > 0.9


@pytest.mark.parametrize("size", [(96, 128), (48, 64), (24, 32)])
def test_frames_marked_as_interlaced_are_scaled_as_ffmpeg_does(size: tuple[int, int]) -> None:
    fitter = Fitter(size, Orientation())
    for frame in moving_bars(interlaced=True):
        marked = filtered(frame, ("setfield", "tff"))
        assert marked.interlaced_frame
        wanted = filtered(marked, ("scale", f"{size[1]}:{size[0]}:flags=bicubic")).to_ndarray().astype(int)
        assert np.abs(fitter.fit(marked).to_ndarray() - wanted).max() <= 1
