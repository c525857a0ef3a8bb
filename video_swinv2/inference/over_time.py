"""What a model says of a video as it goes on, window after window. K classes."""

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
from video_swinv2.inference.watching import StreamSummary, WatchRequest, Watcher
from video_swinv2.inference.segments import Segment
from video_swinv2.weights.store import ModelCard


@dataclass(frozen=True)
class SegmentPrediction:
    """The likeliest classes of one window of a video, which shows it from `start_seconds` to `end_seconds`."""

    start_seconds: float
    end_seconds: float
    answers: tuple[Answer, ...]


Tell = Callable[[Segment, NDArray[np.float64], SegmentPrediction], None]


def task_for(
    card: ModelCard, source: str, *, ahead: int, every_seconds: float | None = None, seconds: float = math.inf
) -> WatchRequest:
    """What has to be cut from a source for this model. Raises UsageError for times that cannot be."""
    for name, value in (("--every", every_seconds), ("--seconds", seconds)):
        if value is not None and not value > 0:
            raise UsageError(f"{name} {value:g}: give seconds, more than 0")
    frames, stride = clip_frames_and_stride(card.preprocessing)
    size = card.preprocessing.image_size
    return WatchRequest(source, frames, stride, size, every_seconds=every_seconds, seconds=seconds, ahead=ahead)


def classify_segments(classifier: Classifier, watcher: Watcher, batch: int, tell: Tell) -> tuple[NDArray[np.float64], StreamSummary]:
    """Answer all windows of a source, `batch` at once -> the mean of their probabilities (K,), and what there was.

    tell: is given each window, its probabilities (K,), and them in words.
    """
    total, count = np.zeros(len(classifier.card.classes)), 0
    for windows in _batches(watcher, batch):
        pixels = torch.from_numpy(np.stack([window.pixels for window in windows])).permute(0, 4, 1, 2, 3)
        rows = classifier.probabilities(pixels if classifier.card.preprocessing.frames is not None else pixels.squeeze(2))
        for window, row in zip(windows, rows, strict=True):
            moment = SegmentPrediction(min(window.seconds), max(window.seconds), classifier.best(row))
            watcher.answer([(answer.name, answer.probability) for answer in moment.answers])
            tell(window, row, moment)
            total, count = total + row, count + 1
    if watcher.summary is None or not count:
        raise UserError("the source ended before a picture came")
    watcher.finish()
    return total / count, watcher.summary


@contextmanager
def interrupt_ends(watcher: Watcher) -> Iterator[None]:
    """Inside, the first Ctrl-C ends the source, not the work. Threads get no signals: nothing changes in them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        watcher.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _batches(watcher: Watcher, size: int) -> Iterator[Sequence[Segment]]:
    windows: list[Segment] = []
    for window in watcher:
        windows.append(window)
        if len(windows) == size:
            yield windows
            windows = []
    if windows:
        yield windows
