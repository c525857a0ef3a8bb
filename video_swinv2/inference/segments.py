"""Sliding windows: the clips that are cut from pictures as they come. T frames, H W pixels."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.data.sampling import frame_indices
from video_swinv2.inference.streams import Frame


@dataclass(frozen=True)
class Segment:
    """One clip: which frames of the source it shows, at what seconds, and `pixels` uint8 (T, H, W, 3)."""

    indices: tuple[int, ...]
    seconds: tuple[float, ...]
    pixels: NDArray[np.uint8]


class SegmentCutter:
    """Cuts a clip of `frames` pictures, `stride` apart, and the next one `hop` pictures later, from an endless row.

    Where the row ends so does its last window, and a row shorter than a window is looped, as in a test.
    """

    def __init__(self, frames: int, stride: int, hop: int) -> None:
        self._frames, self._stride, self._hop = frames, stride, hop
        self._span = (frames - 1) * stride + 1
        self._kept: deque[Frame] = deque(maxlen=self._span)
        self._count = 0
        self._cut_at = 0  # pictures there were when the last window was cut

    def add(self, picture: Frame) -> Segment | None:
        """Take one picture; the window that is complete with it, if one is."""
        self._kept.append(picture)
        self._count += 1
        if self._count < self._span or (self._count - self._span) % self._hop:
            return None
        return self._cut()

    def finish(self) -> Segment | None:
        """The window of what no window has shown yet; None where there is nothing."""
        return self._cut() if self._count > self._cut_at else None

    def _cut(self) -> Segment:
        self._cut_at = self._count
        chosen = [self._kept[i] for i in frame_indices(0, self._frames, self._stride, len(self._kept))]
        return Segment(
            tuple(picture.index for picture in chosen),
            tuple(picture.seconds for picture in chosen),
            np.stack([picture.image for picture in chosen]),
        )
