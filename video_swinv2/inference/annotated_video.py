"""A video with the model's answers written on it. H W pixels."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MAX_SHORT_SIDE = 480  # pictures wait for their answers in memory
MAX_WAITING_FRAMES = 300  # of them, about 370 MB; of windows farther apart the answer comes later than it might
_CLOCK = 90_000  # ticks per second, as in MPEG
_LINES = 3
_PANEL, _TRACK, _FILL, _INK = (16, 20, 24, 176), (255, 255, 255, 48), (95, 179, 207, 255), (255, 255, 255, 255)

Caption = Sequence[tuple[str, float]]
"""Names of classes and their probabilities, the likeliest first."""


def draw_caption(image: NDArray[np.uint8], caption: Caption) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 -> the same with the first answers on a dark panel at the bottom."""
    picture = Image.fromarray(image)
    height, width = image.shape[:2]
    size = max(9, min(height, width) // 22)
    font, row = ImageFont.load_default(size), round(1.5 * size)
    lines = caption[: min(_LINES, max(1, height // 3 // row))]
    draw = ImageDraw.Draw(picture, "RGBA")
    top = height - row * len(lines) - size // 2
    draw.rectangle((0, top - size // 2, width, height), fill=_PANEL)
    left, right = size // 2, width - size // 2
    track = max(1, (right - left) // 3)
    for place, (name, probability) in enumerate(lines):
        y = top + place * row
        draw.rectangle((left, y + size // 3, left + track, y + size), fill=_TRACK)
        draw.rectangle((left, y + size // 3, left + round(track * probability), y + size), fill=_FILL)
        draw.text((left + track + size // 2, y), f"{100 * probability:.0f} %  {name}", font=font, fill=_INK)
    return np.asarray(picture)


class AnnotatedVideoWriter:
    """Writes pictures to an H.264 file at the times they were shown; each waits for the answer about its time.

    A picture is given the caption of the first window that ends with it or after it.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._container = av.open(str(path.absolute()), "w", format="mp4")
        rate = Fraction(fps).limit_denominator(1001)
        options = {"crf": "23", "preset": "veryfast"}
        # Declared wide, for `add_stream` gives other kinds of stream for other codecs.
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = Fraction(1, _CLOCK)
        self._waiting: deque[tuple[int, float, NDArray[np.uint8]]] = deque()
        self._caption: Caption = ()
        self._last = -1

    def add(self, index: int, seconds: float, image: NDArray[np.uint8]) -> None:
        """Take the next picture, (H, W, 3) uint8 of even sides, the same for all."""
        self._waiting.append((index, seconds, image))
        if len(self._waiting) > MAX_WAITING_FRAMES:
            self._write(*self._waiting.popleft())

    def caption_until(self, until: int, caption: Caption) -> None:
        """What the model says of a window that ends with picture `until`."""
        self._caption = caption
        while self._waiting and self._waiting[0][0] <= until:
            self._write(*self._waiting.popleft())

    def close(self) -> None:
        """Write what still waits, with the last answer, and the end of the file."""
        while self._waiting:
            self._write(*self._waiting.popleft())
        if self._last >= 0:
            self._container.mux(self._stream.encode())
        self._container.close()

    def _write(self, index: int, seconds: float, image: NDArray[np.uint8]) -> None:
        if self._last < 0:
            self._stream.height, self._stream.width = image.shape[:2]
        frame = av.VideoFrame.from_ndarray(draw_caption(image, self._caption) if self._caption else image, "rgb24")
        self._last = frame.pts = max(self._last + 1, round(seconds * _CLOCK))
        frame.time_base = Fraction(1, _CLOCK)
        self._container.mux(self._stream.encode(frame))
