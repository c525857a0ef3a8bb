"""Classification over time: each segment of a video or stream in turn, and the mean over all of them.

Letters: V segments in a batch, T frames, H W pixels, K classes.
"""

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
    """The most likely classes of one segment, with the times of its first and last frame."""

    start_seconds: float
    end_seconds: float
    answers: tuple[Answer, ...]


OnSegment = Callable[[Segment, NDArray[np.float64], SegmentPrediction], None]
"""Called for each segment, with its probabilities (K,) and its most likely classes."""


def request_for(
    card: ModelCard, source: str, *, ahead: int, every_seconds: float | None = None, seconds: float = math.inf
) -> WatchRequest:
    """The request that cuts `source` into segments for this model, with its frames, stride and size.

    every_seconds: the time from the start of one segment to the start of the next; by default segments follow each
    other without overlap. seconds: how much of the stream to watch. ahead: how many segments may wait for the model.
    Raises UsageError unless both times are greater than 0.
    """
    # `not value > 0` also refuses NaN.
    for option, value in (("--every", every_seconds), ("--seconds", seconds)):
        if value is not None and not value > 0:
            raise UsageError(f"{option} {value:g}: must be greater than 0 seconds")
    frames, stride = clip_frames_and_stride(card.preprocessing)
    size = card.preprocessing.image_size
    return WatchRequest(source, frames, stride, size, every_seconds=every_seconds, seconds=seconds, ahead=ahead)


def classify_segments(
    classifier: Classifier, watcher: Watcher, batch: int, on_segment: OnSegment
) -> tuple[NDArray[np.float64], StreamSummary]:
    """Classify all segments, `batch` at a time. Returns the mean of their probabilities (K,) and the stream's totals.

    All segments have equal weight in the mean, and segments of a live stream that were skipped have none. `on_segment`
    is called for each segment in order. Raises UserError if the source cannot be read or ends without a single frame.
    """
    takes_video = classifier.card.preprocessing.frames is not None
    sum_of_probabilities, count = np.zeros(len(classifier.card.classes)), 0
    for segments in _batches(watcher, batch):
        pixels = np.stack([segment.pixels for segment in segments])  # (V, T, H, W, 3)
        views = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3)  # (V, 3, T, H, W)
        # Segments for an image model have a single frame: (V, 3, 1, H, W) -> (V, 3, H, W).
        rows = classifier.probabilities(views if takes_video else views.squeeze(2))
        for segment, row in zip(segments, rows, strict=True):
            # The extremes and not the first and last frame, because a short stream is repeated from its start.
            prediction = SegmentPrediction(min(segment.seconds), max(segment.seconds), classifier.top_classes(row))
            # The answer allows the decoding process to continue, which also writes it on the annotated video.
            watcher.answer([(answer.name, answer.probability) for answer in prediction.answers])
            on_segment(segment, row, prediction)
            sum_of_probabilities, count = sum_of_probabilities + row, count + 1
    if watcher.summary is None or not count:
        raise UserError("the source ended before the first frame")
    # The annotated video gets its final name only now, after the last answer.
    watcher.finish()
    return sum_of_probabilities / count, watcher.summary


@contextmanager
def stop_at_interrupt(watcher: Watcher) -> Iterator[None]:
    """Inside the context, the first Ctrl-C ends the stream; the segments until then are still classified.

    The second Ctrl-C interrupts the program as usual. The context is a no-op outside the main thread, because Python
    allows signal handlers to be set only there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        # The handler removes itself, so that the next Ctrl-C has its usual effect.
        signal.signal(signal.SIGINT, previous)
        watcher.stop()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _batches(watcher: Watcher, size: int) -> Iterator[Sequence[Segment]]:
    """Group segments into lists of `size`; the last may be shorter."""
    segments: list[Segment] = []
    for segment in watcher:
        segments.append(segment)
        if len(segments) == size:
            yield segments
            segments = []
    if segments:
        yield segments
