"""A decoded frame -> the picture to encode: resized, upright, 8-bit 4:2:0 in limited-range BT.601.

BT.601 is what readers assume when a file does not specify its colours. Most sources are already 8-bit 4:2:0 in limited
range. These are resized plane by plane, and BT.709 is converted to BT.601 by integer arithmetic on the small picture.
FFmpeg's swscale would go through RGB for that, which costs more than decoding.

H W are the height and width of the picture in pixels.
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from video_swinv2.data.display import Orientation

# Without the accurate flags, swscale darkens the picture by two to three grey levels when the colour matrix changes.
ACCURATE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
UNKNOWN, BT709, BT601 = 2, 1, (5, 6)  # H.264 table E-5
BT709_WEIGHTS, BT601_WEIGHTS = (0.2126, 0.0722), (0.299, 0.114)  # weights of red and blue in luma
Plane = NDArray[Any]


class Fitter:
    """Turns the frames of one video, displayed as `turn` says, into pictures of `size` (height, width), both even."""

    def __init__(self, size: tuple[int, int], turn: Orientation) -> None:
        self._size = (size[1], size[0]) if turn.transpose else size
        self._turn = turn
        self._resize = VideoReformatter()
        height, width = self._size
        # Buffers are reused from frame to frame: allocating them takes longer than the arithmetic.
        self._luma = np.empty((height // 2, 2, width), np.int16)
        self._chroma = np.empty((3, height // 2, width // 2), np.int16)

    def fit(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The picture to encode for one frame. The frame itself is not changed."""
        height, width = self._size
        plain = frame.format.name == "yuv420p" and frame.color_range != ColorRange.JPEG
        if plain and frame.colorspace in (UNKNOWN, BT709, *BT601):
            picture = self._resize.reformat(
                frame, width, height, "yuv420p", interpolation=Interpolation.BICUBIC, threads=1
            )
        else:
            picture = self._resize.reformat(
                frame,
                width,
                height,
                "yuv420p",
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.MPEG,
                interpolation=ACCURATE,
                threads=1,
            )
        if plain and frame.colorspace == BT709:
            if picture is frame:  # already the right size; but the decoder may still refer to this frame
                picture = _picture(_planes(frame))
            self._to_bt601(*_planes(picture))
        if any(self._turn):
            picture = _picture([self._turn.apply(plane[..., None])[..., 0] for plane in _planes(picture)])
        picture.pict_type = PictureType.NONE  # otherwise x264 copies the frame types of the source
        return picture

    def _to_bt601(self, luma: Plane, blue: Plane, red: Plane) -> None:
        """Convert planes from BT.709 to BT.601 in place, rounded to the nearest level.

        luma (H, W), blue and red (H/2, W/2), uint8. The change of all three depends on the two chroma values alone:
        `change = M @ (blue - 128, red - 128)`, see _SHIFTS. Luma is shifted by the chroma of its 2 x 2 block.
        int16 is enough: the largest sum is 128 * (0.0993 + 0.1917) * 512 = 19,071.
        """
        shift, *chroma = self._chroma
        for plane, centred in zip((blue, red), chroma, strict=True):
            np.subtract(plane, 128, out=centred, dtype=np.int16)
        self._shift(shift, chroma, 0)
        # (H/2, W/2) -> (H/2, W), each value twice: n * 257 puts the byte n into both bytes of a 16-bit number. Ten
        # times as fast as np.repeat.
        pairs = (shift.astype(np.uint8).astype(np.uint16) * 257).view(np.int8)
        # luma as (H/2, 2, W): both rows of a block get the same shift, by broadcasting.
        pixels = luma.reshape(self._luma.shape)
        np.add(pixels, pairs[:, None], out=self._luma, dtype=np.int16)
        pixels[...] = np.clip(self._luma, 0, 255, out=self._luma)
        for index, plane in ((1, blue), (2, red)):
            self._shift(shift, chroma, index)
            shift += chroma[index - 1]
            shift += 128
            plane[...] = np.clip(shift, 0, 255, out=shift)

    def _shift(self, shift: Plane, chroma: list[Plane], index: int) -> None:
        """Write into `shift` (H/2, W/2) how much plane `index` (0 luma, 1 blue, 2 red) changes."""
        per_blue, per_red = _SHIFTS[index]
        np.multiply(chroma[0], per_blue, out=shift)
        shift += per_red * chroma[1]
        shift += 2 ** (_SHIFT_BITS - 1)  # round to nearest, not down
        shift >>= _SHIFT_BITS


def _planes(picture: av.VideoFrame) -> list[Plane]:
    """Views of luma (H, W) and both chroma planes (H/2, W/2), uint8, without the padding at the end of their rows."""
    lines = [
        np.frombuffer(memoryview(plane), np.uint8)[: plane.line_size * plane.height].reshape(plane.height, -1)
        for plane in picture.planes
    ]
    return [line[:, : plane.width] for line, plane in zip(lines, picture.planes, strict=True)]


def _picture(planes: list[Plane]) -> av.VideoFrame:
    """Planes as from _planes -> a yuv420p frame. PyAV takes the three planes as one array (H * 3 / 2, W)."""
    height, width = planes[0].shape
    flat = np.concatenate([plane.reshape(-1) for plane in planes])
    return av.VideoFrame.from_ndarray(flat.reshape(height * 3 // 2, width), format="yuv420p")


def _from_rgb(red: float, blue: float) -> NDArray[np.float64]:
    """(3, 3): RGB in 0..1 -> limited-range 8-bit Y, Cb, Cr without their offsets; `red`, `blue` are weights in luma."""
    luma = np.array([red, 1 - red - blue, blue])
    r, _, b = np.eye(3)
    return np.stack([219 * luma, 224 * (b - luma) / (2 - 2 * blue), 224 * (r - luma) / (2 - 2 * red)])


# (3, 2): how much Y, Cb and Cr change per unit of Cb and of Cr, in units of 1/512. Y has no influence of its own: both
# matrices map greys alike.
_SHIFT_BITS = 9
_CHANGE = _from_rgb(*BT601_WEIGHTS) @ np.linalg.inv(_from_rgb(*BT709_WEIGHTS)) - np.eye(3)
_SHIFTS = np.rint(_CHANGE[:, 1:] * 2**_SHIFT_BITS).astype(np.int16)
