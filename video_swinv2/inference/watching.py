"""Decodes a stream in a separate process that can be killed. It sends segments and receives the model's answers.

A decoder that hangs, crashes or takes too much memory costs only that process. The answers serve three purposes. They
limit how far the process runs ahead of the model, they decide which segments of a live stream are skipped, and they are
the captions that the process draws on the annotated video.

    this process                             the process of the stream
    ------------                             -------------------------
                       <-- FileViews         the views of the whole file, first of all, if they were asked for
                       <-- None              a sign of life, about once a second while frames arrive
                       <-- Segment           one clip of frames, to be answered
    caption or None    -->                   the answer; None: stop as if the stream had ended here
                       <-- StreamSummary     no further segment will come
                       <-- _Done or _Failed  the last message

An annotated video is written under `files.partial_path` and gets its name only when it is complete. After an error, or
if the `Watcher` is left early, the partial file is deleted.
"""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import torch
from numpy.typing import NDArray

from video_swinv2.data.decode import DecodeError, named_errors, one_line
from video_swinv2.data.workers import patience_seconds
from video_swinv2.errors import UserError
from video_swinv2.evaluation.protocols import PROTOCOLS, Protocol
from video_swinv2.files import commit_file, partial_path
from video_swinv2.inference.annotated_video import MAX_SHORT_SIDE, AnnotatedVideoWriter, Caption
from video_swinv2.inference.media_types import read_file_views
from video_swinv2.inference.segments import Segment, SegmentCutter
from video_swinv2.inference.streams import Frame, FrameStream, frame_crops
from video_swinv2.killable import KillableProcess, NoAnswerError, ProcessDiedError, prepare_forkserver
from video_swinv2.memory import READING_BYTES
from video_swinv2.weights.store import Preprocessing

START_SECONDS = 60.0  # extra time for the first message: importing the libraries can be slow on a busy machine
_ALIVE_SECONDS = 1.0  # the longest silence between two messages while frames arrive


@dataclass(frozen=True)
class WatchRequest:
    """A stream to watch, and the segments to cut from it: `frames` frames, `stride` apart, of `size` (H, W) pixels.

    protocol: gives the crops of each frame. whole_file: for a file, which can be read twice, read the views of the
    protocol as well, and first.
    every_seconds: the time from the start of one segment to the start of the next. max_segments: if given instead, for
    a file that can be read twice, segments are spaced such that there are about this many, and never more than one
    above. With neither, segments follow each other without overlap.
    seconds: stop after this much of the stream. ahead: how many segments may be unanswered; once that many are, a
    `live` stream skips the next segment, and any other stream pauses. video: where to write the captioned frames.
    memory_bytes: limit on the data segment of the process. wait_seconds: how long the stream may stay silent.
    """

    source: str
    frames: int
    stride: int
    size: tuple[int, int]
    protocol: Protocol = PROTOCOLS["center-1x1"]
    whole_file: bool = False
    every_seconds: float | None = None
    max_segments: int | None = None
    seconds: float = math.inf
    live: bool = False
    ahead: int = 2
    video: Path | None = None
    memory_bytes: int = READING_BYTES
    wait_seconds: float = 60.0


@dataclass(frozen=True)
class FileViews:
    """The views of the whole file: uint8 (V, 3, T, H, W)."""

    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class StreamSummary:
    """Totals of a stream: decoded frames (`pictures`) and seconds, and segments skipped because the model was busy."""

    pictures: int
    seconds: float
    skipped: int


@dataclass(frozen=True)
class _Failed:
    """The stream cannot be read further. The message begins with the name of the source.

    unexpected: as in UnexpectedFailureError.
    """

    message: str
    unexpected: bool


@dataclass(frozen=True)
class _Done:
    """All segments are answered, and the video, if one was asked for, is written."""


_Message = FileViews | Segment | StreamSummary | _Failed | _Done | None  # None: a sign of life


class UnexpectedFailureError(UserError):
    """The decoding process failed with an exception whose text, which is in the message, is of use to developers only.

    It may be a defect of this program or of a library, and may contain names from inside of them.
    """


class Watcher:
    """Iterates over the segments of a stream. It is a context manager that kills the decoding process on exit.

    Every segment must be answered with `answer`, in order. Before the first segment, `file_views` is set if the request
    asks for the whole file. After the last segment, `summary` is set, and `finish` waits for the video once all answers
    are given. Raises UserError, with a message that begins with the name of the source,
    if the source cannot be read, if no frame arrives for `wait_seconds`, or after `limit_seconds` in total.
    """

    def __init__(
        self, request: WatchRequest, *, descriptor: int | None = None, limit_seconds: float = math.inf
    ) -> None:
        """Start the process. descriptor: an open file to read in place of the source that the request names."""
        self._request = request
        self._deadline = time.monotonic() + limit_seconds
        self._limit_seconds = limit_seconds
        self.file_views: FileViews | None = None
        self.summary: StreamSummary | None = None
        self._finished = False
        start_forkserver()
        handed = None if descriptor is None else _HandedFile(descriptor)
        limits = {resource.RLIMIT_DATA: request.memory_bytes}
        self._process = KillableProcess(_watch, request, handed, method="forkserver", limits=limits)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.end()
        if self._request.video is not None and not self._finished:
            partial_path(self._request.video).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Segment]:
        # The first message takes longer, since the process has to start.
        wait_seconds = self._request.wait_seconds
        self._receive(wait_seconds + START_SECONDS)
        if self._request.whole_file:
            # Reading them gives no sign of life. The reader has limits of its own, which should be met first.
            views = self._receive(patience_seconds(wait_seconds, START_SECONDS))
            self.file_views = views if isinstance(views, FileViews) else None
        while True:
            message = self._receive(wait_seconds)
            if isinstance(message, Segment):
                yield message
            elif isinstance(message, StreamSummary):
                self.summary = message
                return

    def answer(self, caption: Caption) -> None:
        """Send the model's answer for the oldest unanswered segment."""
        with contextlib.suppress(ProcessDiedError):  # the next `_receive` raises the error
            self._process.send(tuple(caption))

    def finish(self) -> None:
        """Wait until the video is complete, and rename it to its final path. All segments must have been answered."""
        # Signs of life are skipped; a failure raises.
        while not isinstance(self._receive(self._request.wait_seconds), _Done):
            pass
        if self._request.video is not None:
            commit_file(partial_path(self._request.video), self._request.video)
        self._finished = True

    def stop(self) -> None:
        """End the stream as if it had ended by itself. Messages that the process still sends must be read."""
        with contextlib.suppress(ProcessDiedError):
            self._process.send(None)

    def _receive(self, patience: float) -> _Message:
        """The next message, within `patience` seconds and the deadline. Raises UserError for every kind of failure."""
        left = self._deadline - time.monotonic()
        try:
            if left <= 0:  # although the next message may be there, if it is the model that takes so long
                raise NoAnswerError
            message: _Message = self._process.receive(min(patience, left))
        except NoAnswerError:
            # The shorter of the two limits is the one that was exceeded.
            if left <= patience:
                raise UserError(
                    f"{self._request.source}: took longer than {self._limit_seconds:g} seconds; send a shorter one"
                ) from None
            raise UserError(
                f"{self._request.source}: no frame arrived within {patience:g} seconds; check the source"
            ) from None
        except ProcessDiedError as death:
            raise UserError(f"{self._request.source}: the decoder crashed ({death})") from None
        if isinstance(message, _Failed):
            raise (UnexpectedFailureError if message.unexpected else UserError)(message.message)
        return message


@functools.cache
def start_forkserver() -> None:
    """Start the server that decoding processes are forked from. A Watcher does so, too, unless it is already running.

    Starting takes a second or two. The server has imported the libraries and done nothing else, so forking from it is
    quick and inherits no locks.
    """
    prepare_forkserver(__name__)


class _HandedFile:
    """An open file of this process that is sent to a new process along with its arguments.

    A DupFd that is made here, rather than while the arguments are pickled, would wait in a thread of multiprocessing
    until the process fetches it. Where that thread cannot be started, no later process would ever get its file, and the
    file of a process that dies early would stay open for good.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _receive_file, (reduction.DupFd(self._descriptor),)


def _receive_file(handed: Any) -> int:
    """In the new process: the descriptor of a file that was handed over as a DupFd."""
    descriptor: int = handed.detach()
    return descriptor


def _watch(pipe: Connection, request: WatchRequest, descriptor: int | None) -> None:
    """The main function of the decoding process: every exception becomes a message."""
    try:
        # The first sign of life: from now on the parent waits without START_SECONDS.
        pipe.send(None)
        torch.set_num_threads(1)  # the process shares the machine with the model, and its memory is limited
        _Watch(pipe, request).run(descriptor)
    except (BrokenPipeError, EOFError):
        return  # the parent no longer listens
    except UserError as error:
        pipe.send(_Failed(str(error), error.__cause__ is not None and _is_unexpected(error.__cause__)))
    except MemoryError:
        pipe.send(_Failed(f"{request.source}: takes too much memory to decode", unexpected=False))
    except Exception as error:  # the encoder of the video may raise anything
        pipe.send(_Failed(f"{request.source}: {one_line(error)}", _is_unexpected(error)))


def _is_unexpected(error: BaseException) -> bool:
    """Whether an exception is neither one of ours nor what FFmpeg or the system says about a file."""
    return not isinstance(error, UserError | av.FFmpegError | OSError | MemoryError)


class _Watch:
    """Decodes one stream, in the decoding process."""

    def __init__(self, pipe: Connection, request: WatchRequest) -> None:
        self._pipe, self._request = pipe, request
        self._unanswered: deque[int] = deque()  # the last frame index of each segment that waits for its answer
        self._writer: AnnotatedVideoWriter | None = None
        self._skipped = 0
        self._sent = 0  # segments
        self._stopped = False
        self._last_sent = time.monotonic()  # when the last message was sent

    def run(self, descriptor: int | None) -> None:
        """Decode the stream to its end, send its segments and write its video."""
        request = self._request
        if request.whole_file:
            self._pipe.send(self._read_file_views(descriptor))
        count, seconds = 0, 0.0
        every = request.every_seconds
        if request.max_segments is not None:
            with self._open(descriptor) as stream:
                every = _spacing_seconds(request, request.max_segments, *stream.count())
        with self._open(descriptor) as stream:
            cutter = SegmentCutter(request.frames, request.stride, every)
            if request.video is not None:
                self._writer = AnnotatedVideoWriter(partial_path(request.video), stream.fps)
            for seconds, frame in stream:
                # `_stopped` is set by a None from the parent.
                if self._stopped or seconds >= request.seconds:
                    break
                # For the model: resized, then cropped to (S, H, W, 3) at its input size.
                side, boxes = frame_crops(request.protocol, stream.shown_size, request.size)
                image = stream.image(frame, side)
                crops = np.stack([image[top : top + h, left : left + w] for top, left, h, w in boxes])
                if self._writer is not None:
                    height, width = stream.shown_size
                    # For the annotated video: resized only. Both sides must be even, because the colours of the
                    # encoder's yuv420p format have half the resolution; a side of one pixel is doubled.
                    shown = stream.image(frame, max(2, min(height, width, MAX_SHORT_SIDE) // 2 * 2))
                    self._writer.add(count, seconds, shown[: shown.shape[0] // 2 * 2, : shown.shape[1] // 2 * 2])
                self._offer(cutter.add(Frame(count, seconds, crops)), may_skip=True)
                count += 1
                self._take_waiting_answers()
            stream.shown_size  # noqa: B018 - raises DecodeError if there was no frame at all
            # The last segment is never skipped, so even a short live stream has one.
            self._offer(cutter.finish(), may_skip=False)
        # Sent before all answers have arrived: a parent that collects segments into a batch waits for the next segment
        # and would never answer if it did not know that there is none.
        self._pipe.send(StreamSummary(count, seconds, self._skipped))
        while self._unanswered:
            self._wait_for_answer()
        if self._writer is not None:
            self._writer.close()
        self._pipe.send(_Done())

    def _read_file_views(self, descriptor: int | None) -> FileViews:
        """The views of the protocol, read as a test reads them. Errors name the source and not the descriptor."""
        request = self._request
        path = Path(request.source if descriptor is None else f"/dev/fd/{descriptor}")
        preprocessing = Preprocessing(request.frames, request.stride, request.size)
        try:
            with named_errors(path):
                views = read_file_views(path, request.protocol, preprocessing, time_limit_seconds=request.wait_seconds)
        except DecodeError as error:
            reason = str(error).removeprefix(f"{path}: ")
            raise DecodeError(f"{request.source}: {reason}", error.reason) from error.__cause__
        return FileViews(views.numpy())

    def _open(self, descriptor: int | None) -> FrameStream:
        return FrameStream(self._request.source, descriptor=descriptor, wait_seconds=self._request.wait_seconds)

    def _offer(self, segment: Segment | None, may_skip: bool) -> None:
        """Send a segment once fewer than `ahead` are unanswered. A live stream does not wait but skips the segment."""
        if segment is None:
            return
        # Packets may say other times than the frames that are decoded from them, so the number is a limit as well.
        if self._request.max_segments is not None and may_skip and self._sent >= self._request.max_segments:
            return
        if self._request.live and may_skip and len(self._unanswered) >= self._request.ahead:
            self._skipped += 1
            return
        while len(self._unanswered) >= self._request.ahead:
            self._wait_for_answer()
        self._send(segment)
        self._sent += 1
        self._unanswered.append(max(segment.indices))

    def _take_waiting_answers(self) -> None:
        """Take the answers that have arrived, without waiting, and send a sign of life if it is time for one."""
        while self._pipe.poll():
            self._wait_for_answer()
        if time.monotonic() - self._last_sent > _ALIVE_SECONDS:
            self._send(None)

    def _wait_for_answer(self) -> None:
        """Take one answer, waiting for it if necessary, and caption the frames that it applies to."""
        caption = self._pipe.recv()
        if caption is None:
            self._stopped = True
            return
        last_frame = self._unanswered.popleft()
        if self._writer is not None:
            self._writer.caption_until(last_frame, caption)

    def _send(self, message: Segment | None) -> None:
        self._pipe.send(message)
        self._last_sent = time.monotonic()


def _spacing_seconds(request: WatchRequest, segments: int, pictures: int, seconds: float) -> float:
    """The time between the starts of about `segments` segments, spread over so many pictures and seconds."""
    span = (request.frames - 1) * request.stride + 1
    # n segments have n - 1 distances between their starts. Together these are the stream less one segment. They are
    # rounded up to whole frames, so that segments are evenly spaced at a constant frame rate.
    apart = max(1, math.ceil((pictures - span) / max(1, segments - 1)))
    return apart * seconds / max(1, pictures)
