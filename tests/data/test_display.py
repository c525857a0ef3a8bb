"""Pictures as shown: the colours of exact arithmetic, and the pixels of FFmpeg's own scale filter."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from video_swinv2.data import display
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.display import WholeFrames

COLOURS = np.random.default_rng(0).integers((40, 90, 90), (200, 166, 166), (24, 3))  # Y, Cb, Cr


def filtered(frame: av.VideoFrame, *filters: tuple[str, str]) -> av.VideoFrame:
    """A frame that has passed FFmpeg's filters, given as (name, arguments)."""
    graph = av.filter.Graph()
    first = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1, 25))
    graph.link_nodes(first, *(graph.add(*one) for one in filters), graph.add("buffersink")).configure()
    graph.vpush(frame)
    return graph.vpull()


def frame_of(luma: NDArray[np.uint8], blue: NDArray[np.uint8], red: NDArray[np.uint8]) -> av.VideoFrame:
    """A yuv420p frame from its planes (H, W) and twice (H/2, W/2)."""
    flat = np.concatenate([plane.reshape(-1) for plane in (luma, blue, red)])
    return av.VideoFrame.from_ndarray(flat.reshape(-1, luma.shape[1]), format="yuv420p")


def write_lossless(path: Path, frames: list[av.VideoFrame], **options: str) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"qp": "0", **options})
        stream.height, stream.width, stream.pix_fmt = frames[0].height, frames[0].width, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def one_colour_each(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip of 48 x 64 pixels whose frame i has the colour COLOURS[i] all over."""
    frames = [
        frame_of(
            *(
                np.full(size, level, np.uint8)
                for size, level in zip(((48, 64), (24, 32), (24, 32)), colour, strict=True)
            )
        )
        for colour in COLOURS.tolist()
    ]
    return write_lossless(tmp_path_factory.mktemp("colours") / "v.mp4", frames)


@pytest.mark.parametrize("short_side", [None, 24, 96])
def test_colours_are_those_of_exact_arithmetic(one_colour_each: Path, short_side: int | None) -> None:
    luma, blue, red = ((COLOURS - (16, 128, 128)) / (219, 224, 224)).T
    # BT.601 with K_R = 0.299 and K_B = 0.114, the inverse of Cb = (B - Y) / (2 - 2 K_B) and Cr = (R - Y) / (2 - 2 K_R).
    r, b = luma + 1.402 * red, luma + 1.772 * blue
    g = (luma - 0.299 * r - 0.114 * b) / 0.587
    wanted = (255 * np.stack([r, g, b], axis=1)).clip(0, 255)[:, :, None, None]  # (n, 3, 1, 1)
    with VideoReader(one_colour_each) as reader:
        error = reader.frames(range(len(COLOURS)), short_side).numpy() - wanted
    assert np.abs(error).max() < 1.1
    assert abs(error.mean()) < 0.2


def moving_bars(interlaced: bool) -> list[av.VideoFrame]:
    """8 frames of 96 x 128 with soft bars that move fast; if interlaced, odd rows are half a frame later."""
    frames = []
    for number in range(8):
        when = number + 0.5 * (np.arange(96)[:, None] % 2) * interlaced
        phase = (np.arange(128)[None] + np.arange(96)[:, None] / 2 - 24 * when) / 12
        luma = (126 + 80 * np.sin(phase)).astype(np.uint8)
        frames.append(frame_of(luma, luma[::2, ::2], 255 - luma[::2, ::2]))
    return frames


@pytest.mark.parametrize("interlaced", [True, False])
@pytest.mark.parametrize("size", [(48, 64), (24, 32), (120, 160)])
def test_frames_marked_as_interlaced_are_scaled_as_ffmpeg_does(
    tmp_path: Path, interlaced: bool, size: tuple[int, int]
) -> None:
    """Both those that are interlaced and those that are not."""
    path = write_lossless(tmp_path / "v.mp4", moving_bars(interlaced), **{"x264-params": "interlaced=1"})
    # As H.264 says of these frames, each chroma sample lies halfway between two rows, in the left of two columns.
    how = "flags=bilinear+accurate_rnd+full_chroma_int+full_chroma_inp:in_chroma_loc=left"
    with VideoReader(path) as reader:
        for index, frame in reader.sequence():
            assert frame.interlaced_frame
            scaled = filtered(frame, ("scale", f"{size[1]}:{size[0]}:{how}"), ("format", "rgb24"))
            ours = reader.picture(frame, size[0]).astype(int)
            assert np.abs(ours - scaled.to_ndarray()).max() <= 1, index


def test_the_mark_is_taken_off_without_touching_pixels() -> None:
    whole = WholeFrames()
    plain = moving_bars(True)[0]
    assert whole(plain) is plain
    for kind in ("yuv420p", "yuv422p", "yuv420p"):
        marked = filtered(plain.reformat(format=kind), ("setfield", "tff"))
        marked.pts = 7
        assert marked.interlaced_frame
        found = whole(marked)
        assert not found.interlaced_frame
        assert found.pts == 7
        assert np.array_equal(found.to_ndarray(), marked.to_ndarray())


def noisy_frames(height: int, width: int) -> list[av.VideoFrame]:
    """3 frames of noise in luma and chroma."""
    noise = np.random.default_rng(0)
    sizes = ((height, width), (height // 2, width // 2), (height // 2, width // 2))
    return [frame_of(*(noise.integers(16, 236, size, np.uint8) for size in sizes)) for _ in range(3)]


@pytest.mark.parametrize("tags", ["", "colormatrix=bt709:fullrange=on", "interlaced=1"])
@pytest.mark.parametrize("size", [(96, 128), (92, 142)])
def test_a_crop_has_the_pixels_of_the_whole_picture(tmp_path: Path, size: tuple[int, int], tags: str) -> None:
    path = write_lossless(tmp_path / "v.mp4", noisy_frames(*size), **{"x264-params": tags})
    draw = np.random.default_rng(1)
    with VideoReader(path) as reader:
        for short_side in (None, 64):
            whole = reader.frames([0, 2, 1], short_side)
            height, width = whole.shape[-2:]
            for _ in range(40):
                rows, columns = int(draw.integers(1, height + 1)), int(draw.integers(1, width + 1))
                box = int(draw.integers(height - rows + 1)), int(draw.integers(width - columns + 1)), rows, columns
                asked: list[tuple[int, int]] = []
                crop = reader.frames(
                    [0, 2, 1], short_side, lambda *size, box=box, asked=asked: asked.append(size) or box
                )
                assert asked == [(height, width)]
                assert np.array_equal(crop, whole[..., box[0] : box[0] + rows, box[1] : box[1] + columns]), box


def test_nothing_is_converted_outside_a_crop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lossless(tmp_path / "v.mp4", noisy_frames(96, 128))
    converted: list[tuple[int, int]] = []
    inner = display.colour_planes

    def noting(picture: av.VideoFrame) -> list[NDArray[np.uint8]]:
        converted.append((picture.height, picture.width))
        return inner(picture)

    monkeypatch.setattr(display, "colour_planes", noting)
    with VideoReader(path) as reader:
        reader.frames([1], None, lambda height, width: (31, 40, 20, 30))
    assert converted == [(26, 34)], "at most three pixels more on each side"
