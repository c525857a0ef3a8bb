"""Turns decoded frames into pictures to encode: resized, upright, 8-bit 4:2:0 in limited-range BT.601.

BT.601 is what readers assume when a file does not specify its colours. Most sources are already 8-bit 4:2:0 in limited
range. They are resized plane by plane, and BT.709 is converted to BT.601 by integer arithmetic on the small picture.
FFmpeg's swscale would convert through RGB instead, which costs more than decoding. Other sources (full range, more
bits, other chroma formats or matrices) are left to swscale.

Terms: luma is Y, the brightness; chroma are Cb ("blue") and Cr ("red"), the colour. In 4:2:0 each block of 2 x 2 luma
pixels shares one value of Cb and one of Cr. Limited range means Y in 16..235 and Cb, Cr in 16..240 around 128.

Letters: H and W are the height and width of the picture in pixels, both even.
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from video_swinv2.data.display import Orientation, WholeFrames

# Without the three flags after BICUBIC, swscale darkens the picture by two to three grey levels when it changes the
# colour matrix.
ACCURATE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
UNKNOWN, BT709, BT601 = 2, 1, (5, 6)  # matrix_coefficients of H.264, table E-5
# The weights of red and blue in luma (K_R and K_B of the same table); green has the rest.
BT709_WEIGHTS, BT601_WEIGHTS = (0.2126, 0.0722), (0.299, 0.114)
Plane = NDArray[Any]


class Fitter:
    """Turns the frames of one video into pictures of `size` (height, width) as shown, both even.

    `turn` is the orientation of the video: how its decoded frames have to be turned for display.
    """

    def __init__(self, size: tuple[int, int], turn: Orientation) -> None:
        # Frames are resized as decoded and turned afterwards, when they are small, so height and width may be swapped.
        self._size = (size[1], size[0]) if turn.transpose else size
        self._turn = turn
        self._whole = WholeFrames()
        self._resize = VideoReformatter()
        height, width = self._size
        # Buffers for the conversion to BT.601, used again for every frame: allocating them takes longer than the
        # arithmetic. `_luma` is (H/2, 2, W), the rows in pairs; `_chroma` is (3, H/2, W/2).
        self._luma = np.empty((height // 2, 2, width), np.int16)
        self._chroma = np.empty((3, height // 2, width // 2), np.int16)

    def fit(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The picture to encode for one frame.

        The pixels of the frame are not changed. If there is nothing to do, the frame itself is returned.
        """
        height, width = self._size
        frame = self._whole(frame)
        # Plain frames need no change of format or range, only of size, and of matrix if that is BT.709. Telling swscale
        # nothing about colours makes it resize plane by plane.
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
            # A frame that already has the right size comes back itself. The decoder may still predict later frames from
            # it, so the conversion, which is in place, needs a copy.
            if picture is frame:
                picture = _picture(_planes(frame))
            self._to_bt601(*_planes(picture))
        if any(self._turn):
            picture = _picture([self._turn.apply(plane[..., None])[..., 0] for plane in _planes(picture)])
        picture.pict_type = PictureType.NONE  # otherwise x264 makes every frame of the type it had in the source
        return picture

    def _to_bt601(self, luma: Plane, blue: Plane, red: Plane) -> None:
        """Convert planes from BT.709 to BT.601 in place, rounded to the nearest level.

        luma: (H, W); blue and red: (H/2, W/2); all uint8. How much a pixel changes, in all three planes, depends on its
        two chroma values alone: `change = M @ (blue - 128, red - 128)` with the (3, 2) matrix M of _SHIFTS. Luma is
        shifted by the chroma of its 2 x 2 block. int16 is enough for M in units of 1/512: the largest sum is
        128 * (51 + 98) + 256 for rounding = 19,328.
        """
        # Both chroma planes are centred around 0 and kept, since each plane below is computed from the old values of
        # both. `shift` (H/2, W/2) is how much one plane changes.
        shift, *chroma = self._chroma
        for plane, centred in zip((blue, red), chroma, strict=True):
            np.subtract(plane, 128, out=centred, dtype=np.int16)
        self._shift(shift, chroma, 0)
        # (H/2, W/2) -> (H/2, W), each value twice. Luma changes by less than 128, so a signed byte holds the shift, and
        # n * 257 puts the byte n into both halves of a 16-bit number, which are then viewed as two bytes. This is ten
        # times as fast as np.repeat.
        pairs = (shift.astype(np.uint8).astype(np.uint16) * 257).view(np.int8)
        # luma (H, W) -> (H/2, 2, W), pairs (H/2, W) -> (H/2, 1, W): both rows of a block get the same shift by
        # broadcasting. The sum is made in int16 and clipped, since it may leave 0..255.
        pixels = luma.reshape(self._luma.shape)
        np.add(pixels, pairs[:, None], out=self._luma, dtype=np.int16)
        pixels[...] = np.clip(self._luma, 0, 255, out=self._luma)
        # New chroma: the shift, plus the old value, which is centred, plus 128 to undo that.
        for index, plane in ((1, blue), (2, red)):
            self._shift(shift, chroma, index)
            shift += chroma[index - 1]
            shift += 128
            plane[...] = np.clip(shift, 0, 255, out=shift)

    def _shift(self, shift: Plane, chroma: list[Plane], index: int) -> None:
        """Write into `shift` (H/2, W/2) by how many levels plane `index` (0 luma, 1 blue, 2 red) changes.

        `chroma` are the two centred chroma planes, int16 (H/2, W/2) each.
        """
        per_blue, per_red = _SHIFTS[index]
        np.multiply(chroma[0], per_blue, out=shift)
        shift += per_red * chroma[1]
        shift += 2 ** (_SHIFT_BITS - 1)  # a half, so that shifting right rounds to nearest and not down
        shift >>= _SHIFT_BITS


def _planes(picture: av.VideoFrame) -> list[Plane]:
    """Views of luma (H, W) and both chroma planes (H/2, W/2), uint8. Writing to them changes the picture.

    FFmpeg pads the rows of a plane: `line_size` bytes are stored per row, of which the first `width` are pixels.
    """
    lines = [
        np.frombuffer(memoryview(plane), np.uint8)[: plane.line_size * plane.height].reshape(plane.height, -1)
        for plane in picture.planes
    ]
    return [line[:, : plane.width] for line, plane in zip(lines, picture.planes, strict=True)]


def _picture(planes: list[Plane]) -> av.VideoFrame:
    """A new yuv420p frame from planes shaped as those of _planes."""
    # PyAV takes the three planes one after the other as a single array, H * W + 2 * (H/2 * W/2) = (H * 3/2) * W.
    height, width = planes[0].shape
    flat = np.concatenate([plane.reshape(-1) for plane in planes])
    return av.VideoFrame.from_ndarray(flat.reshape(height * 3 // 2, width), format="yuv420p")


def _from_rgb(red: float, blue: float) -> NDArray[np.float64]:
    """The (3, 3) matrix from RGB in 0..1 to limited-range 8-bit Y, Cb, Cr without their offsets of 16, 128, 128.

    `red` and `blue` are the weights K_R and K_B in luma. As in H.264, section E.2.1: Y = K_R R + K_G G + K_B B, which
    spans 219 levels, and Cb = (B - Y) / (2 - 2 K_B), Cr = (R - Y) / (2 - 2 K_R), which span 224.
    """
    luma = np.array([red, 1 - red - blue, blue])
    r, _, b = np.eye(3)
    return np.stack([219 * luma, 224 * (b - luma) / (2 - 2 * blue), 224 * (r - luma) / (2 - 2 * red)])


# _CHANGE, (3, 3), is the matrix from BT.709 back to RGB and on to BT.601, minus the identity. Its first column, the
# influence of Y, is zero, since both matrices map greys alike. _SHIFTS, (3, 2), has the other two columns: how much Y,
# Cb and Cr change per unit of Cb and of Cr, in units of 1/512.
_SHIFT_BITS = 9
_CHANGE = _from_rgb(*BT601_WEIGHTS) @ np.linalg.inv(_from_rgb(*BT709_WEIGHTS)) - np.eye(3)
_SHIFTS = np.rint(_CHANGE[:, 1:] * 2**_SHIFT_BITS).astype(np.int16)
