"""A decoded frame -> the picture to encode: resized, upright, 8-bit 4:2:0 in limited-range BT.601.

BT.601 is what readers take a file for that says nothing. Most sources are 8-bit 4:2:0 in limited range already; these
are resized plane by plane, and BT.709 becomes BT.601 by arithmetic on the small picture. swscale would go through RGB
for that, which costs more than decoding.

H W are pixels of the picture.
"""

from __future__ import annotations

from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

from video_swinv2.data.display import Orientation

# Without the accurate flags a change of colour matrix darkens the picture by two to three grey levels.
ACCURATE = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
UNKNOWN, BT709, BT601 = 2, 1, (5, 6)  # H.264 table E-5
BT709_WEIGHTS, BT601_WEIGHTS = (0.2126, 0.0722), (0.299, 0.114)  # of red and blue in luma
Plane = NDArray[Any]


class Fitter:
    """Makes pictures of `size` (height, width), both even, of the frames of a video, which are shown as `turn` says."""

    def __init__(self, size: tuple[int, int], turn: Orientation) -> None:
        self._size = (size[1], size[0]) if turn.transpose else size
        self._turn = turn
        self._resize = VideoReformatter()
        height, width = self._size
        # Kept from frame to frame: getting so much memory afresh takes longer than the arithmetic in it.
        self._luma = np.empty((height // 2, 2, width), np.int16)
        self._colours = np.empty((3, height // 2, width // 2), np.int16)

    def fit(self, frame: av.VideoFrame) -> av.VideoFrame:
        """The picture of one frame, which itself stays as it is."""
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
            if picture is frame:  # nothing to resize; the decoder still needs the frame
                picture = _picture(_planes(frame))
            self._to_bt601(*_planes(picture))
        if any(self._turn):
            picture = _picture([self._turn.apply(plane[..., None])[..., 0] for plane in _planes(picture)])
        picture.pict_type = PictureType.NONE  # else x264 repeats the source's key frames and B-frames
        return picture

    def _to_bt601(self, luma: Plane, blue: Plane, red: Plane) -> None:
        """Give planes other weights, in place, to the nearest grey level; luma moves with its 2 x 2 pixels' colour.

        In 16 bits, which hold the largest of the sums, 128 * (0.0993 + 0.1917) * 512.
        """
        moved, *colours = self._colours
        for plane, colour in zip((blue, red), colours, strict=True):
            np.subtract(plane, 128, out=colour, dtype=np.int16)
        self._move(moved, colours, 0)
        # Each move twice in its row: a byte becomes both bytes of a 16-bit number, ten times as quick as np.repeat.
        pairs = (moved.astype(np.uint8).astype(np.uint16) * 257).view(np.int8)
        pixels = luma.reshape(self._luma.shape)
        np.add(pixels, pairs[:, None], out=self._luma, dtype=np.int16)
        pixels[...] = np.clip(self._luma, 0, 255, out=self._luma)
        for place, plane in ((1, blue), (2, red)):
            self._move(moved, colours, place)
            moved += colours[place - 1]
            moved += 128
            plane[...] = np.clip(moved, 0, 255, out=moved)

    def _move(self, moved: Plane, colours: list[Plane], place: int) -> None:
        """Into `moved`: by how much a plane (0 luma, 1 blue, 2 red) moves."""
        by_blue, by_red = _MOVES[place]
        np.multiply(colours[0], by_blue, out=moved)
        moved += by_red * colours[1]
        moved += 2 ** (_MOVE_BITS - 1)
        moved >>= _MOVE_BITS


def _planes(picture: av.VideoFrame) -> list[Plane]:
    """Views of luma (H, W) and both differences of colour (H/2, W/2), uint8, without the padding of their lines."""
    lines = [
        np.frombuffer(memoryview(plane), np.uint8)[: plane.line_size * plane.height].reshape(plane.height, -1)
        for plane in picture.planes
    ]
    return [line[:, : plane.width] for line, plane in zip(lines, picture.planes, strict=True)]


def _picture(planes: list[Plane]) -> av.VideoFrame:
    height, width = planes[0].shape
    flat = np.concatenate([plane.reshape(-1) for plane in planes])
    return av.VideoFrame.from_ndarray(flat.reshape(height * 3 // 2, width), format="yuv420p")


def _from_rgb(red: float, blue: float) -> NDArray[np.float64]:
    """RGB of 0..1 -> limited-range 8-bit codes (less their offsets), by the weights of red and blue in luma."""
    luma = np.array([red, 1 - red - blue, blue])
    r, _, b = np.eye(3)
    return np.stack([219 * luma, 224 * (b - luma) / (2 - 2 * blue), 224 * (r - luma) / (2 - 2 * red)])


# By how much luma and both differences of colour move, per unit of either difference, in 1/512.
_MOVE_BITS = 9
_CHANGE = _from_rgb(*BT601_WEIGHTS) @ np.linalg.inv(_from_rgb(*BT709_WEIGHTS)) - np.eye(3)
_MOVES = np.rint(_CHANGE[:, 1:] * 2**_MOVE_BITS).astype(np.int16)
