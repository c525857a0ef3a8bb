"""Classification over time: each segment of a video or stream in turn, and an answer for the whole.

The answer for a file comes from the views of the protocol, as in `predict FILE` and in tests. A stream can be read only
once and has no known length, so its answer is the mean over its segments. A segment is one clip, of which the model
sees the protocol's crops.

Letters: N segments in a batch, V views of a file, S crops, T frames, H W pixels, K classes.
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
from torch import Tensor

from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.forward import ScoredViews
from video_swinv2.evaluation.views import clip_frames_and_stride
from video_swinv2.inference.classifier import Answer, Classifier
from video_swinv2.inference.segments import Segment
from video_swinv2.inference.watching import StreamSummary, Watcher, WatchRequest


@dataclass(frozen=True)
class SegmentPrediction:
    """The most likely classes of one segment, with the times of its first and last frame.

    views: what the answers are averaged over, as in `Classifier.views_of`.
    """

    start_seconds: float
    end_seconds: float
    answers: tuple[Answer, ...]
    views: str


@dataclass(frozen=True)
class WholeAnswer:
    """The probabilities (K,) of a whole file or stream, what they are averaged over, and the totals of its frames.

    file_views: the views of a file, uint8 (V, 3, [T,] H, W), and their scores; None for a stream.
    """

    probabilities: NDArray[np.float64]
    views: str
    summary: StreamSummary
    file_views: tuple[Tensor, ScoredViews] | None = None


OnSegment = Callable[[Segment, NDArray[np.float64], SegmentPrediction], None]
"""Called for each segment, with its probabilities (K,) and its most likely classes."""


def request_for(
    classifier: Classifier, source: str, *, ahead: int, every_seconds: float | None = None, seconds: float = math.inf
) -> WatchRequest:
    """The request that cuts `source` into segments for this model and protocol.

    every_seconds: the time from the start of one segment to the start of the next; by default segments follow each
    other without overlap. seconds: how much of the stream to watch. ahead: how many segments may wait for the model.
    Raises UsageError unless both times are greater than 0.
    """
    # `not value > 0` also refuses NaN.
    for option, value in (("--every", every_seconds), ("--seconds", seconds)):
        if value is not None and not value > 0:
            raise UsageError(f"{option} {value:g}: must be greater than 0 seconds")
    preprocessing, protocol = classifier.card.preprocessing, classifier.protocol
    frames, stride = clip_frames_and_stride(preprocessing)
    return WatchRequest(
        source,
        frames,
        protocol.stride or stride,
        preprocessing.image_size,
        protocol=protocol,
        every_seconds=every_seconds,
        seconds=seconds,
        ahead=ahead,
    )


def segments_per_batch(classifier: Classifier) -> int:
    """How many segments fill a batch of the model with their crops."""
    return max(1, classifier.batch_views // classifier.protocol.crops)


def classify_over_time(classifier: Classifier, watcher: Watcher, batch: int, on_segment: OnSegment) -> WholeAnswer:
    """Classify all segments, `batch` at a time, and the whole: from the views of the file, if the watcher reads them.

    Otherwise the answer is the mean over all segments, with equal weight; segments of a live stream that were skipped
    have none. `on_segment` is called for each segment in order. Raises UserError if the source cannot be read or ends
    without a single frame.
    """
    sum_of_probabilities, count = np.zeros(len(classifier.card.classes)), 0
    for segments in _batches(watcher, batch):
        pixels = np.stack([segment.pixels for segment in segments])  # (N, T, S, H, W, 3)
        views = torch.from_numpy(pixels).permute(0, 2, 5, 1, 3, 4)  # (N, S, 3, T, H, W)
        rows = classifier.probabilities(_as_input(classifier, views))
        for segment, row in zip(segments, rows, strict=True):
            # The extremes and not the first and last frame, because a short stream is repeated from its start.
            start, end = min(segment.seconds), max(segment.seconds)
            prediction = SegmentPrediction(start, end, classifier.top_classes(row), classifier.views_of("segment", 1))
            # The answer allows the decoding process to continue, which also writes it on the annotated video.
            watcher.answer([(answer.name, answer.probability) for answer in prediction.answers])
            on_segment(segment, row, prediction)
            sum_of_probabilities, count = sum_of_probabilities + row, count + 1
    if watcher.summary is None or not count:
        raise UserError("the source ended before the first frame")
    # The annotated video gets its final name only now, after the last answer.
    watcher.finish()
    if watcher.file_views is None:
        return WholeAnswer(sum_of_probabilities / count, classifier.views_of("segment", count), watcher.summary)
    whole = _as_input(classifier, torch.from_numpy(watcher.file_views.pixels))
    scored = classifier.score(whole)
    (probabilities,) = classifier.average(scored.logits[None])
    clips = len(whole) // classifier.protocol.crops
    return WholeAnswer(probabilities, classifier.views_of("clip", clips), watcher.summary, (whole, scored))


def _as_input(classifier: Classifier, views: Tensor) -> Tensor:
    """(..., 3, T, H, W) as the model takes it: without T, which is 1, for an image model."""
    return views.squeeze(-3) if classifier.card.preprocessing.frames is None else views


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
