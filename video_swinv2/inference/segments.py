"""Overlapping segments of a stream: the clips that a model sees, cut while the frames arrive. T frames, H W pixels."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.data.sampling import frame_indices
from video_swinv2.inference.streams import Frame


@dataclass(frozen=True)
class Segment:
    """One clip: the indices of its frames in the stream, their times, and `pixels`, uint8 (T, H, W, 3)."""

    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    pixels: NDArray[np.uint8]


class SegmentCutter:
    """Cuts a segment of `frames` frames, `stride` apart, every `hop` frames, from frames that arrive one by one.

    With frames=3, stride=2, hop=3 and a stream of 10 frames, 0 to 9 (each segment spans 5):

        0 . 2 . 4            when frame 4 arrives
              3 . 5 . 7      when frame 7 arrives
                  5 . 7 . 9  at the end: the last segment ends with the last frame, whatever the hop

    Only the frames of one span are kept, so the stream may be endless. A stream shorter than one span is repeated from
    its start, as in a test (`frame_indices`).
    """

    def __init__(self, frames: int, stride: int, hop: int) -> None:
        self._frames, self._stride, self._hop = frames, stride, hop
        self._span = (frames - 1) * stride + 1
        self._recent: deque[Frame] = deque(maxlen=self._span)
        self._count = 0
        self._count_at_cut = 0  # frames that had arrived when the last segment was cut

    def add(self, frame: Frame) -> Segment | None:
        """Take the next frame; return the segment that it completes, if any."""
        self._recent.append(frame)
        self._count += 1
        # The first segment is complete with frame number `span`, each further one `hop` frames later.
        if self._count < self._span or (self._count - self._span) % self._hop:
            return None
        return self._cut()

    def finish(self) -> Segment | None:
        """The last segment, if the stream ended with frames that no segment covers."""
        return self._cut() if self._count > self._count_at_cut else None

    def _cut(self) -> Segment:
        self._count_at_cut = self._count
        chosen = [self._recent[i] for i in frame_indices(0, self._frames, self._stride, len(self._recent))]
        return Segment(
            tuple(frame.index for frame in chosen),
            tuple(frame.seconds for frame in chosen),
            np.stack([frame.image for frame in chosen]),
        )
