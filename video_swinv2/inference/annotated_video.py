"""Writes a copy of a video with the model's answers drawn on its frames.

Letters: H W pixels of the frame as shown.
"""

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

MAX_SHORT_SIDE = 480  # pixels; frames are kept small because they wait in memory for their captions
# The number of frames that may wait, about 370 MB at 854 x 480 pixels. If segments are so far apart that more would
# wait, the oldest frame is written with the previous caption instead of its own.
MAX_WAITING_FRAMES = 300
_CLOCK_HZ = 90_000  # time stamp units per second, as in MPEG; fine enough for any frame rate
_MAX_LINES = 3
# Colours in RGBA, 0 to 255: the panel, the empty part of a bar, its filled part, and the text.
_PANEL, _TRACK, _FILL, _INK = (16, 20, 24, 176), (255, 255, 255, 48), (95, 179, 207, 255), (255, 255, 255, 255)

Caption = Sequence[tuple[str, float]]
"""Class names and their probabilities, most likely first."""


def draw_caption(image: NDArray[np.uint8], caption: Caption) -> NDArray[np.uint8]:
    """Draw the first classes, with probability bars, on a dark panel at the bottom of the image.

    Takes uint8 (H, W, 3) and returns a copy of the same shape and dtype.
    """
    picture = Image.fromarray(image)
    height, width = image.shape[:2]
    font_size = max(9, min(height, width) // 22)
    font, line_height = ImageFont.load_default(font_size), round(1.5 * font_size)
    # The panel covers about a third of the frame at most, but always has room for one class.
    lines = caption[: min(_MAX_LINES, max(1, height // 3 // line_height))]
    # In RGBA mode, translucent colours are blended with the RGB picture below.
    draw = ImageDraw.Draw(picture, "RGBA")
    top = height - line_height * len(lines) - font_size // 2
    draw.rectangle((0, top - font_size // 2, width, height), fill=_PANEL)
    left, right = font_size // 2, width - font_size // 2
    bar_width = max(1, (right - left) // 3)
    for number, (name, probability) in enumerate(lines):
        y = top + number * line_height
        draw.rectangle((left, y + font_size // 3, left + bar_width, y + font_size), fill=_TRACK)
        draw.rectangle((left, y + font_size // 3, left + round(bar_width * probability), y + font_size), fill=_FILL)
        draw.text((left + bar_width + font_size // 2, y), f"{100 * probability:.0f} %  {name}", font=font, fill=_INK)
    return np.asarray(picture)


class AnnotatedVideoWriter:
    """Writes captioned frames to an H.264 file, with the times that they had in the source.

    The caption of a segment is known only after its last frame, so frames wait in memory. Each one gets the caption of
    the first segment that ends with this frame or a later one.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self._container = av.open(str(path.absolute()), "w", format="mp4")
        rate = Fraction(fps).limit_denominator(1001)  # 29.97 becomes 30000/1001, the exact rate
        options = {"crf": "23", "preset": "veryfast"}
        # Typed as Any, because the type that `add_stream` returns depends on the codec.
        self._stream: Any = self._container.add_stream("libx264", rate=rate, options=options)
        self._stream.pix_fmt = "yuv420p"  # the only H.264 pixel format that every player supports
        # Frames keep the times of the source, in units of this clock, so a variable frame rate is preserved.
        self._stream.codec_context.time_base = Fraction(1, _CLOCK_HZ)
        # Frames without a caption yet: index in the stream, seconds, uint8 (H, W, 3).
        self._waiting: deque[tuple[int, float, NDArray[np.uint8]]] = deque()
        self._caption: Caption = ()
        self._last_pts = -1

    def add(self, index: int, seconds: float, image: NDArray[np.uint8]) -> None:
        """Take the next frame, uint8 (H, W, 3). All frames must have the same size, with even sides."""
        self._waiting.append((index, seconds, image))
        if len(self._waiting) > MAX_WAITING_FRAMES:
            self._write(*self._waiting.popleft())

    def caption_until(self, last_index: int, caption: Caption) -> None:
        """Write the waiting frames up to `last_index`, the last frame of a segment, with the caption of the segment."""
        self._caption = caption
        while self._waiting and self._waiting[0][0] <= last_index:
            self._write(*self._waiting.popleft())

    def close(self) -> None:
        """Write the frames that are still waiting, with the last caption, and finalise the file."""
        while self._waiting:
            self._write(*self._waiting.popleft())
        if self._last_pts >= 0:
            # Flush the frames that the encoder still holds for reordering.
            self._container.mux(self._stream.encode())
        self._container.close()

    def _write(self, index: int, seconds: float, image: NDArray[np.uint8]) -> None:
        # The size is known only now. The first frame that is encoded opens the encoder and fixes it.
        if self._last_pts < 0:
            self._stream.height, self._stream.width = image.shape[:2]
        frame = av.VideoFrame.from_ndarray(draw_caption(image, self._caption) if self._caption else image, "rgb24")
        # The muxer rejects time stamps that do not increase, and two frames may round to the same one.
        self._last_pts = frame.pts = max(self._last_pts + 1, round(seconds * _CLOCK_HZ))
        frame.time_base = Fraction(1, _CLOCK_HZ)
        self._container.mux(self._stream.encode(frame))
