"""Converts a decoded frame to the picture that a player shows: rotated, with square pixels, and resized.

Letters: H W pixels as shown, C channels.

A decoded frame differs from what a player shows in two ways. Phones store frames as the sensor reads them and attach a
display matrix that rotates or mirrors them. And pixels need not be square: with a sample aspect ratio (SAR) of 4:3, a
frame of 480 x 540 stored pixels (H x W) is shown as 480 x 720. The ratio applies to the stored width, before rotation.

The work is done by swscale, FFmpeg's scaler. By default it rounds down and gives neighbouring pixels the same chroma,
and it resizes frames that are marked as interlaced field by field. The `ffmpeg` command has it do none of this, and
neither do we: see ACCURATE and WholeFrames.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideDataType
from av.video.reformatter import Interpolation, VideoReformatter

if TYPE_CHECKING:
    from av.video.stream import VideoStream
    from numpy.typing import NDArray

# Without the three flags after BILINEAR, pixels of real videos are 1 to 2 grey levels off on average, most of them too
# dark. With the flags, resizing to planar RGB (gbrp) takes as long as resizing to rgb24 without them, thanks to vector
# instructions that swscale has for it, while rgb24 takes 1.2 to 1.7 times as long. Only frames that keep their size can
# take longer, if their width is a multiple of 8, since there is a fast way for these without the flags: clips of 16
# frames of 320 x 240 pixels took a tenth longer to read, others no longer.
ACCURATE = (
    Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
# The largest picture that is read, of a video or an image, unless the caller says otherwise: 8192 x 8192 pixels. Videos
# of 8K have half of them, and so have the largest that H.264, HEVC and AV1 define below their highest levels.
MAX_PIXELS = 2**26
# swscale interpolates chroma from one sample on either side. With this many more pixels on each side, and edges at even
# pixels, a crop has the same pixels as the whole picture.
CROP_MARGIN = 2
# Width / height of a pixel. A ratio outside this range is taken for a damaged header, and pixels for square.
PLAUSIBLE_PIXEL_ASPECT = (Fraction(1, 8), Fraction(8))


Box = tuple[int, int, int, int]
"""(top, left, height, width) of a part of a picture, in pixels."""


class PictureSizeError(ValueError):
    """A picture has more pixels than are allowed. The message gives both numbers."""


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Raise PictureSizeError if a picture has more than `max_pixels` pixels."""
    if height * width > max_pixels:
        raise PictureSizeError(
            f"a picture of {width} x {height} pixels exceeds max_pixels = {max_pixels}; remove it or raise the limit"
        )


class Orientation(NamedTuple):
    """How to turn decoded pixels into the picture as shown: first swap the axes, then mirror."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W) or (H, W, C) as decoded -> the same as shown."""
        # Views only: nothing is copied.
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


# By angle in degrees, counter-clockwise as PyAV reports it. A quarter turn is a transposition and then one mirroring.
_BY_ROTATION = {
    90: Orientation(transpose=True, flip_y=True),
    180: Orientation(flip_x=True, flip_y=True),
    270: Orientation(transpose=True, flip_x=True),
}


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """The orientation in the display matrix of a frame, rounded to quarter turns and mirrorings.

    The matrix maps a decoded pixel (x, y) to x' = a x + c y, y' = b x + d y (QuickTime file format, "matrices"). If |b|
    is larger than |a|, x mostly determines y': the axes are swapped, and the signs of c and b tell whether x' and y'
    are mirrored. Otherwise the signs of a and d do. PyAV's `frame.rotation` cannot be used, since it reports a mirrored
    picture as a half turn.
    """
    try:
        attached: Any = frame.side_data  # PyAV's stubs declare a TypedDict, but it is a Mapping with SideDataType keys
    except ValueError:
        # PyAV fails on side data of a type that it has no name for, such as EXIF in the JPEG frames of cameras. Fall
        # back on its rotation, which is right for everything but mirrored pictures.
        return _BY_ROTATION.get(frame.rotation % 360, Orientation())
    if SideDataType.DISPLAYMATRIX not in attached:
        return Orientation()
    data = attached[SideDataType.DISPLAYMATRIX]
    # The matrix is nine fixed-point int32, row by row: a b u, c d v, x y w. Only signs and relative sizes matter here.
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return Orientation(transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Orientation(flip_x=a < 0, flip_y=d < 0)


def size_for(shown: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(height, width) after resizing `shown` to a given short side; keeps the aspect ratio, with an even long side."""
    if short_side is None:
        return shown
    scale = short_side / min(shown)
    long_side = max(short_side, 2 * round(max(shown) * scale / 2))
    return (short_side, long_side) if shown[0] <= shown[1] else (long_side, short_side)


class FrameFilter:
    """Passes frames through one of FFmpeg's filters, of those that share the pixels (in 2 to 5 microseconds)."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._graph: av.filter.Graph | None = None
        # What the graph is made for: pixel format, width, height and the arguments of the filter.
        self._kind: tuple[str, int, int, str] | None = None

    def __call__(self, frame: av.VideoFrame, arguments: str) -> av.VideoFrame:
        """The frame after the filter with these arguments."""
        kind = (frame.format.name, frame.width, frame.height, arguments)
        if self._graph is None or kind != self._kind:
            self._graph, self._kind = av.filter.Graph(), kind
            self._graph.threads = 1
            # The filter passes time stamps on as they are, so any time base will do.
            source = self._graph.add_buffer(
                format=frame.format, width=frame.width, height=frame.height, time_base=Fraction(1, 90000)
            )
            self._graph.link_nodes(source, self._graph.add(self._name, arguments), self._graph.add("buffersink"))
            self._graph.configure()
        self._graph.vpush(frame)
        return self._graph.vpull()


class WholeFrames:
    """Takes the mark "interlaced" off frames, so that swscale resizes them whole, as the `ffmpeg` command does.

    The rows of an interlaced frame belong to two moments, even rows to one and odd rows to the other. swscale resizes
    the two sets of rows, called fields, separately and interleaves the results, so that a small picture has combs at
    moving edges that are as strong as before. Resizing all rows together averages them away. Besides, many videos that
    are not interlaced carry the mark.
    """

    def __init__(self) -> None:
        # PyAV can read the mark but not change it; FFmpeg's filter `setfield` can.
        self._filter = FrameFilter("setfield")

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The frame itself if it has no such mark, otherwise one that shares its pixels."""
        return self._filter(frame, "prog") if frame.interlaced_frame else frame


class Display:
    """How the frames of one stream are shown, at most `max_pixels` large. Size and orientation are of its first frame.

    Attributes:
        size: (height, width) as shown; None before the first frame.
        orientation: how frames are rotated and mirrored.
    """

    def __init__(self, stream: VideoStream, max_pixels: int = MAX_PIXELS) -> None:
        self.size: tuple[int, int] | None = None
        self.orientation = Orientation()
        self._stream = stream
        self._max_pixels = max_pixels
        self._whole = WholeFrames()
        self._cut = FrameFilter("crop")
        self._reformatter = VideoReformatter()

    def note(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Take size and orientation from the first frame; a no-op for later ones. Returns `size`."""
        if self.size is None:
            aspect = self._stream.sample_aspect_ratio or Fraction(1)
            if not PLAUSIBLE_PIXEL_ASPECT[0] <= aspect <= PLAUSIBLE_PIXEL_ASPECT[1]:
                aspect = Fraction(1)
            self.orientation = orientation_of(frame)
            height, width = frame.height, max(1, round(frame.width * aspect))
            self.size = (width, height) if self.orientation.transpose else (height, width)
        return self.size

    def picture(self, frame: av.VideoFrame, short_side: int | None = None) -> NDArray[np.uint8]:
        """The frame as shown, uint8 (H, W, 3), RGB, its short side resized, up or down, to `short_side`.

        Each colour is contiguous in memory. Raises PictureSizeError, as for a thin picture whose short side becomes
        many times larger.
        """
        return np.stack(self.planes(frame, short_side)).transpose(1, 2, 0)  # (3, H, W) -> (H, W, 3)

    def planes(
        self, frame: av.VideoFrame, short_side: int | None = None, crop: Box | None = None
    ) -> list[NDArray[np.uint8]]:
        """Red, green and blue of `picture`, or of a crop of it: uint8 (H, W) each. They need not be contiguous.

        A crop has the pixels of the whole picture, but where neither resizing nor rotation comes in between, only the
        crop is converted to RGB. Converting whole frames takes two fifths of the time of decoding them.
        """
        height, width = size_for(self.note(frame), short_side)
        check_pixels(height, width, self._max_pixels)
        top, left, rows, columns = crop or (0, 0, height, width)
        # Resize in the orientation as decoded and rotate afterwards: rotating an array is a view of it and costs
        # nothing. This step also makes pixels square, since `size` includes the pixel aspect ratio.
        if self.orientation.transpose:
            height, width = width, height
        frame = self._whole(frame)
        # Only for yuv420p, as nearly all videos are: the margin depends on how many pixels share a chroma sample.
        as_decoded = (height, width) == (frame.height, frame.width) and self.orientation == Orientation()
        if crop and as_decoded and frame.format.name == "yuv420p":
            y, x = (max(0, start - CROP_MARGIN) // 2 * 2 for start in (top, left))
            height = min(height, (top + rows + CROP_MARGIN + 1) // 2 * 2) - y
            width = min(width, (left + columns + CROP_MARGIN + 1) // 2 * 2) - x
            frame = self._cut(frame, f"{width}:{height}:{x}:{y}:exact=1")
            top, left = top - y, left - x
        # One thread, because for small pictures starting the scaler's threads costs five times the scaling itself.
        # Only for YUV is planar RGB faster (see ACCURATE); from packed 15 and 16-bit RGB, swscale gets it wrong.
        kind = "rgb24" if frame.format.is_rgb else "gbrp"
        picture = self._reformatter.reformat(frame, width, height, kind, interpolation=ACCURATE, threads=1)
        shown = [self.orientation.apply(plane) for plane in colour_planes(picture)]
        return [plane[top : top + rows, left : left + columns] for plane in shown]


def colour_planes(picture: av.VideoFrame) -> list[NDArray[np.uint8]]:
    """Red, green and blue of a frame in the format gbrp or rgb24, (H, W) each: views of the memory of gbrp."""
    if picture.format.name == "rgb24":
        return list(picture.to_ndarray().transpose(2, 0, 1))
    # `to_ndarray` would interleave the colours, which takes as long as the conversion to RGB.
    green, blue, red = (
        # A plane is a buffer, which PyAV's stubs cannot say below Python 3.12.
        np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]  # type: ignore[call-overload]
        for plane in picture.planes
    )
    return [red, green, blue]
