"""Segments of a stream: the clips that a model is given, cut while the frames arrive.

Letters: T frames of a segment, S crops of each, H W pixels.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.data.sampling import frame_indices
from video_swinv2.inference.streams import Frame

# A frame may come this much before the start of a segment and still be its first one: times are rounded, in Matroska to
# milliseconds.
_TOLERANCE_SECONDS = 0.002


@dataclass(frozen=True)
class Segment:
    """One clip: the indices of its frames in the stream, their times in seconds, and `pixels` of their crops.

    Pixels are uint8 (T, S, H, W, 3).
    """

    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    pixels: NDArray[np.uint8]


class SegmentCutter:
    """Cuts segments out of frames that arrive one by one: `frames` frames, `stride` apart.

    A segment starts with the first frame at or after each multiple of `every_seconds`, whatever the frame rate; two of
    these moments between the same two frames start one segment. By default segments follow each other without overlap.

    An example with frames=3, stride=2, every_seconds=0.3 and a stream of the 10 frames 0 to 9, 0.1 seconds apart. Each
    segment spans 5 frames:

        0 . 2 . 4            when frame 4 arrives
              3 . 5 . 7      when frame 7 arrives
                  5 . 7 . 9  when the stream ends: the last segment always ends with the last frame

    Only the frames of one span are kept, so the stream may be endless. A stream that is shorter than one span is
    repeated from its start, as in a test (`frame_indices`).
    """

    def __init__(self, frames: int, stride: int, every_seconds: float | None = None) -> None:
        self._frames, self._stride = frames, stride
        # More often than the tolerance makes no difference.
        self._every = None if every_seconds is None else max(every_seconds, _TOLERANCE_SECONDS)
        self._due = 0.0  # seconds; when the next segment starts
        self._starts: deque[int] = deque()  # of the segments that are not cut yet: the first frame, by its place
        self._span = (frames - 1) * stride + 1
        self._recent: deque[Frame] = deque(maxlen=self._span)
        self._count = 0  # frames that have arrived
        self._count_at_cut = 0  # the value of `_count` when the last segment was cut

    def add(self, frame: Frame) -> Segment | None:
        """Take the next frame; return the segment that it completes, if any."""
        if self._starts_segment(frame.seconds):
            self._starts.append(self._count)
        self._recent.append(frame)
        self._count += 1
        if not self._starts or self._count < self._starts[0] + self._span:
            return None
        self._starts.popleft()
        return self._cut()

    def finish(self) -> Segment | None:
        """Return the last segment if the stream ended with frames that are in no segment yet, otherwise None."""
        return self._cut() if self._count > self._count_at_cut else None

    def _starts_segment(self, seconds: float) -> bool:
        """Whether a segment starts with the frame that has just arrived."""
        if self._every is None:
            return self._count % self._span == 0
        seconds += _TOLERANCE_SECONDS
        if seconds < self._due:
            return False
        self._due = (math.floor(seconds / self._every) + 1) * self._every
        return True

    def _cut(self) -> Segment:
        self._count_at_cut = self._count
        # The oldest kept frame is the start of the segment. If there are fewer than `span`, the indices wrap around.
        chosen = [self._recent[i] for i in frame_indices(0, self._frames, self._stride, len(self._recent))]
        return Segment(
            tuple(frame.index for frame in chosen),
            tuple(frame.seconds for frame in chosen),
            np.stack([frame.crops for frame in chosen]),
        )
