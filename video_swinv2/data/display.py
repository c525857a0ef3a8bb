"""From a decoded frame to the picture as shown: turned, with square pixels, resized.

Letters: H W pixels as shown, C channels.

Two things separate a decoded frame from what a player shows. Phones store frames as the sensor reads them and attach a
display matrix that turns or mirrors them. And pixels need not be square: with a sample aspect ratio (SAR) of 4:3, a
frame of 480 x 540 stored pixels (H x W) is shown as 480 x 720. The ratio applies to the stored width, before turning.
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

PLAUSIBLE_PIXEL_ASPECT = (Fraction(1, 8), Fraction(8))  # outside, a header is taken to be wrong and pixels square


class Orientation(NamedTuple):
    """How decoded pixels become the picture as shown: swap the axes first, then mirror."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, C) as decoded -> (H, W, C) as shown."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


# Of a counter-clockwise rotation, as PyAV counts it. A quarter turn is a transposition and one mirroring.
_BY_ROTATION = {
    90: Orientation(transpose=True, flip_y=True),
    180: Orientation(flip_x=True, flip_y=True),
    270: Orientation(transpose=True, flip_x=True),
}


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """The display matrix of a frame, rounded to quarter turns and mirrorings.

    The matrix maps a decoded pixel (x, y) to x' = a x + c y, y' = b x + d y (QuickTime file format, "matrices"). If |b|
    is larger than |a|, x' depends mostly on y: the axes are swapped, and the signs of c and b say whether x' and y' are
    mirrored; otherwise those of a and d do. PyAV's `frame.rotation` is not enough: it reports a mirrored picture as a
    half turn.
    """
    try:
        attached: Any = frame.side_data  # declared a TypedDict, is a Mapping by kind
    except ValueError:
        # PyAV cannot list side data of a kind it has no name for, such as EXIF in the JPEG frames of cameras.
        return _BY_ROTATION.get(frame.rotation % 360, Orientation())
    if SideDataType.DISPLAYMATRIX not in attached:
        return Orientation()
    data = attached[SideDataType.DISPLAYMATRIX]
    # Nine fixed-point numbers, row by row: a b u, c d v, x y w. Only signs and relative sizes matter here.
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return Orientation(transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Orientation(flip_x=a < 0, flip_y=d < 0)


def size_for(shown: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(height, width) with the short side as asked, the aspect ratio kept, the long side rounded to even."""
    if short_side is None:
        return shown
    scale = short_side / min(shown)
    long_side = max(short_side, 2 * round(max(shown) * scale / 2))
    return (short_side, long_side) if shown[0] <= shown[1] else (long_side, short_side)


class Display:
    """How the frames of one stream are shown; decided by its first frame.

    `size`: (height, width) as shown, None before the first frame. `orientation`: how frames are turned.
    """

    def __init__(self, stream: VideoStream) -> None:
        self.size: tuple[int, int] | None = None
        self.orientation = Orientation()
        self._stream = stream
        self._reformatter = VideoReformatter()

    def note(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Take note of a frame, of which only the first matters; returns `size`."""
        if self.size is None:
            aspect = self._stream.sample_aspect_ratio or Fraction(1)
            if not PLAUSIBLE_PIXEL_ASPECT[0] <= aspect <= PLAUSIBLE_PIXEL_ASPECT[1]:
                aspect = Fraction(1)
            self.orientation = orientation_of(frame)
            height, width = frame.height, max(1, round(frame.width * aspect))
            self.size = (width, height) if self.orientation.transpose else (height, width)
        return self.size

    def picture(self, frame: av.VideoFrame, short_side: int | None = None) -> NDArray[np.uint8]:
        """The frame as shown, uint8 (H, W, 3), its short side resized to `short_side`, up as well as down."""
        height, width = size_for(self.note(frame), short_side)
        # Resized as decoded and turned afterwards: a turn of the small picture is a view of it and costs nothing.
        if self.orientation.transpose:
            height, width = width, height
        # One thread: on small pictures the scaler's own threads cost five times the work itself.
        picture = self._reformatter.reformat(
            frame, width, height, "rgb24", interpolation=Interpolation.BILINEAR, threads=1
        )
        return self.orientation.apply(np.asarray(picture.to_ndarray(), dtype=np.uint8))
