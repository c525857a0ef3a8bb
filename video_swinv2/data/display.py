"""From a decoded frame to the picture that is shown: turned, pixels square, resized. H W are pixels as shown."""

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

LIKELY_PIXEL_SHAPE = (Fraction(1, 8), Fraction(8))


class Orientation(NamedTuple):
    """How decoded pixels become the picture shown: swap the axes first, then mirror."""

    transpose: bool = False
    flip_x: bool = False
    flip_y: bool = False

    def apply(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, C) as decoded -> (H, W, C) as shown."""
        if self.transpose:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]


_BY_ROTATION = {
    90: Orientation(transpose=True, flip_y=True),
    180: Orientation(flip_x=True, flip_y=True),
    270: Orientation(transpose=True, flip_x=True),
}


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """The display matrix of a frame, rounded to quarter turns and mirrors.

    The matrix maps x' = a x + c y, y' = b x + d y (QuickTime file format, "matrices"). PyAV's `frame.rotation` is not
    enough: it reports a mirrored picture as a half turn.
    """
    try:
        attached: Any = frame.side_data  # declared a TypedDict, is a Mapping by kind
    except ValueError:
        # PyAV cannot list side data of a kind it has no name for, as that of cameras' JPEG frames (EXIF).
        return _BY_ROTATION.get(frame.rotation % 360, Orientation())
    if SideDataType.DISPLAYMATRIX not in attached:
        return Orientation()
    data = attached[SideDataType.DISPLAYMATRIX]
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    if abs(b) > abs(a):
        return Orientation(transpose=True, flip_x=c < 0, flip_y=b < 0)
    return Orientation(flip_x=a < 0, flip_y=d < 0)


def size_for(shown: tuple[int, int], short_side: int | None) -> tuple[int, int]:
    """(height, width) with the short side as asked, the aspect ratio kept and the long side rounded to even."""
    if short_side is None:
        return shown
    scale = short_side / min(shown)
    long_side = max(short_side, 2 * round(max(shown) * scale / 2))
    return (short_side, long_side) if shown[0] <= shown[1] else (long_side, short_side)


class Display:
    """How the frames of one stream are shown, which its first frame tells.

    `size`: (height, width), `orientation`: how pixels are turned; None and no turn before the first frame.
    """

    def __init__(self, stream: VideoStream) -> None:
        self.size: tuple[int, int] | None = None
        self.orientation = Orientation()
        self._stream = stream
        self._reformatter = VideoReformatter()

    def note(self, frame: av.VideoFrame) -> tuple[int, int]:
        """See a frame, of which the first decides; the size."""
        if self.size is None:
            shape = self._stream.sample_aspect_ratio or Fraction(1)
            if not LIKELY_PIXEL_SHAPE[0] <= shape <= LIKELY_PIXEL_SHAPE[1]:
                shape = Fraction(1)
            self.orientation = orientation_of(frame)
            height, width = frame.height, max(1, round(frame.width * shape))
            self.size = (width, height) if self.orientation.transpose else (height, width)
        return self.size

    def picture(self, frame: av.VideoFrame, short_side: int | None = None) -> NDArray[np.uint8]:
        """The frame as shown -> uint8 (H, W, 3), its short side resized to `short_side`, up as well as down."""
        height, width = size_for(self.note(frame), short_side)
        if self.orientation.transpose:
            height, width = width, height
        # One thread: on a small picture the scaler's own threads cost five times the work.
        picture = self._reformatter.reformat(
            frame, width, height, "rgb24", interpolation=Interpolation.BILINEAR, threads=1
        )
        return self.orientation.apply(np.asarray(picture.to_ndarray(), dtype=np.uint8))
