"""Writes a copy of a video with the time and the model's answers in a panel below its frames.

Letters: H W pixels of the frame as shown.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from video_swinv2.escaping import for_terminal

MAX_SHORT_SIDE = 480  # pixels; frames are kept small because they wait in memory for their captions
# The number of frames that may wait, about 370 MB at 854 x 480 pixels. If segments are so far apart that more would
# wait, the oldest frame is written with the previous caption instead of its own.
MAX_WAITING_FRAMES = 300
_CLOCK_HZ = 90_000  # time stamp units per second, as in MPEG; fine enough for any frame rate
_MAX_LINES = 3
_MIN_FONT, _FONTS_PER_SIDE = 9, 22  # pixels; a larger frame has a larger font
# Colours in RGB, 0 to 255: the panel, the empty part of a bar, its filled part, and the text of the most likely class
# and of the others.
_PANEL, _TRACK, _FILL, _FIRST, _INK = (16, 20, 24), (58, 64, 70), (95, 179, 207), (255, 255, 255), (176, 184, 190)

Caption = Sequence[tuple[str, float]]
"""Class names and their probabilities, most likely first."""


def draw_caption(
    image: NDArray[np.uint8], rows: Sequence[tuple[str, float] | None], seconds: float
) -> NDArray[np.uint8]:
    """Add a panel below the image, with the time and, for each class in `rows`, its probability as a bar.

    Takes uint8 (H, W, 3) with an even H and returns (H + panel, W, 3), whose height is even, too, and depends on
    nothing but H and W. The image itself stays as it is. A row without a class (None) stays empty.
    """
    height, width = image.shape[:2]
    font_size = max(_MIN_FONT, min(height, width) // _FONTS_PER_SIDE)
    font, line_height, margin = ImageFont.load_default(font_size), round(1.5 * font_size), font_size // 2
    panel_height = (line_height * (_MAX_LINES + 1) + 2 * margin + 1) // 2 * 2
    picture = Image.new("RGB", (width, height + panel_height), _PANEL)
    picture.paste(Image.fromarray(image))
    draw = ImageDraw.Draw(picture)
    draw.text((margin, height + margin), format_timecode(seconds), font=font, fill=_INK)
    bar_width = max(1, (width - 2 * margin) // 3)
    text_left = 2 * margin + bar_width
    best = max((row[1] for row in rows if row is not None), default=0.0)
    for number, row in enumerate(rows, start=1):
        if row is None:
            continue
        name, probability = row
        y = height + margin + number * line_height
        for share, colour in ((1.0, _TRACK), (probability, _FILL)):
            draw.rectangle((margin, y + font_size // 3, margin + round(bar_width * share), y + font_size), fill=colour)
        text = _shorten(f"{100 * probability:.0f} %  {for_terminal(name)}", width - margin - text_left, font)
        draw.text((text_left, y), text, font=font, fill=_FIRST if probability == best else _INK)
    return np.asarray(picture)


def format_timecode(seconds: float) -> str:
    """Minutes, seconds and tenths, such as 01:02.3; hours as well from one hour on."""
    tenths = math.floor(10 * seconds + 1e-6)  # of 0.3 seconds, as a float, 10 are 2.9999999999999996
    minutes, tenths = divmod(tenths, 600)
    clock = f"{minutes % 60:02d}:{tenths // 10:02d}.{tenths % 10}"
    return f"{minutes // 60}:{clock}" if minutes >= 60 else clock


def keep_places(rows: Sequence[tuple[str, float] | None], caption: Caption) -> list[tuple[str, float] | None]:
    """The rows for the next caption: a class that was shown before keeps its row, and new ones take what is free.

    Otherwise, two classes of nearly equal probability would swap places again and again.
    """
    shares = dict(caption[:_MAX_LINES])
    shown = [row[0] for row in rows if row is not None and row[0] in shares]
    newcomers = iter([name for name in shares if name not in shown])
    names = [row[0] if row is not None and row[0] in shares else next(newcomers, None) for row in rows]
    return [None if name is None else (name, shares[name]) for name in names]


def _shorten(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """The text, cut and ended with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


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
        self._rows: list[tuple[str, float] | None] = [None] * _MAX_LINES  # of the current caption
        self._last_pts = -1

    def add(self, index: int, seconds: float, image: NDArray[np.uint8]) -> None:
        """Take the next frame, uint8 (H, W, 3). All frames must have the same size, with even sides."""
        self._waiting.append((index, seconds, image))
        if len(self._waiting) > MAX_WAITING_FRAMES:
            self._write(*self._waiting.popleft())

    def caption_until(self, last_index: int, caption: Caption) -> None:
        """Write the waiting frames up to `last_index`, the last frame of a segment, with the caption of the segment."""
        self._rows = keep_places(self._rows, caption)
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
        picture = draw_caption(image, self._rows, seconds)
        # The size is known only now. The first frame that is encoded opens the encoder and fixes it.
        if self._last_pts < 0:
            self._stream.height, self._stream.width = picture.shape[:2]
        frame = av.VideoFrame.from_ndarray(picture, "rgb24")
        # The muxer rejects time stamps that do not increase, and two frames may round to the same one.
        self._last_pts = frame.pts = max(self._last_pts + 1, round(seconds * _CLOCK_HZ))
        frame.time_base = Fraction(1, _CLOCK_HZ)
        self._container.mux(self._stream.encode(frame))
