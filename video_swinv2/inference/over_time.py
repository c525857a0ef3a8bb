"""Classification over time: segment after segment of a video or stream, and the mean over all of them. K classes."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.views import clip_frames_and_stride
from video_swinv2.inference.classifier import Answer, Classifier
from video_swinv2.inference.segments import Segment
from video_swinv2.inference.watching import StreamSummary, Watcher, WatchRequest
from video_swinv2.weights.store import ModelCard


@dataclass(frozen=True)
class SegmentPrediction:
    """The most likely classes of the segment whose frames lie between `start_seconds` and `end_seconds`."""

    start_seconds: float
    end_seconds: float
    answers: tuple[Answer, ...]


OnSegment = Callable[[Segment, NDArray[np.float64], SegmentPrediction], None]
"""Called with each segment, its probabilities (K,), and its most likely classes."""


def request_for(
    card: ModelCard, source: str, *, ahead: int, every_seconds: float | None = None, seconds: float = math.inf
) -> WatchRequest:
    """Which segments to cut from `source` for this model: its frames, stride and size.

    every_seconds: from the start of a segment to the start of the next; by default they follow without overlap.
    seconds: how much of the stream to watch. ahead: how many segments may wait for the model. Raises UsageError unless
    the times are positive.
    """
    for option, value in (("--every", every_seconds), ("--seconds", seconds)):
        if value is not None and not value > 0:
            raise UsageError(f"{option} {value:g}: must be greater than 0 seconds")
    frames, stride = clip_frames_and_stride(card.preprocessing)
    size = card.preprocessing.image_size
    return WatchRequest(source, frames, stride, size, every_seconds=every_seconds, seconds=seconds, ahead=ahead)


def classify_segments(
    classifier: Classifier, watcher: Watcher, batch: int, on_segment: OnSegment
) -> tuple[NDArray[np.float64], StreamSummary]:
    """Classify every segment, `batch` at a time. Returns the mean of their probabilities (K,), and the stream's totals.

    The mean weighs every segment equally: those of a live stream that were skipped do not count. Raises UserError if
    the source cannot be read or ends without a single frame.
    """
    takes_video = classifier.card.preprocessing.frames is not None
    sum_of_probabilities, count = np.zeros(len(classifier.card.classes)), 0
    for segments in _batches(watcher, batch):
        pixels = np.stack([segment.pixels for segment in segments])  # (V, T, H, W, 3)
        views = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3)  # (V, 3, T, H, W)
        # An image model sees segments of a single frame: (V, 3, 1, H, W) -> (V, 3, H, W).
        rows = classifier.probabilities(views if takes_video else views.squeeze(2))
        for segment, row in zip(segments, rows, strict=True):
            # Looping over a short stream or damaged clocks may leave times out of order, hence not first and last.
            prediction = SegmentPrediction(min(segment.seconds), max(segment.seconds), classifier.top_classes(row))
            # The answer lets the decoder go on, and is what it writes on the annotated video.
            watcher.answer([(answer.name, answer.probability) for answer in prediction.answers])
            on_segment(segment, row, prediction)
            sum_of_probabilities, count = sum_of_probabilities + row, count + 1
    if watcher.summary is None or not count:
        raise UserError("the source ended before the first frame")
    watcher.finish()
    return sum_of_probabilities / count, watcher.summary


@contextmanager
def stop_at_interrupt(watcher: Watcher) -> Iterator[None]:
    """Inside the context, the first Ctrl-C ends the stream, so that what was seen until then is still answered.

    The second Ctrl-C interrupts the program as usual. A no-op outside the main thread, which alone receives signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, previous)
        watcher.stop()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _batches(watcher: Watcher, size: int) -> Iterator[Sequence[Segment]]:
    """Groups of `size` segments; the last may be smaller."""
    segments: list[Segment] = []
    for segment in watcher:
        segments.append(segment)
        if len(segments) == size:
            yield segments
            segments = []
    if segments:
        yield segments
