"""A stream decoded in a process of its own, which can be killed: segments come out, the model's answers go back in.

Whatever a decoder does to a file (hang, crash, eat memory), it costs that process alone. The answers serve three
purposes: they limit how far the process runs ahead of the model, they decide which segments of a live stream are
skipped, and they are the captions that the process writes on the annotated video.

    this process                             the process of the stream
    ------------                             -------------------------
                       <-- None              alive, nothing to say (at least once a second)
                       <-- Segment           one clip of frames, to be answered
    caption or None    -->                   the answer; None: stop as if the stream ended here
                       <-- StreamSummary     no further segment will come
                       <-- _Done or _Failed  the last message
"""

from __future__ import annotations

import contextlib
import functools
import math
import resource
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from video_swinv2.errors import UserError
from video_swinv2.files import commit_file, partial_path
from video_swinv2.inference.annotated_video import MAX_SHORT_SIDE, AnnotatedVideoWriter, Caption
from video_swinv2.inference.segments import Segment, SegmentCutter
from video_swinv2.inference.streams import Frame, FrameStream, centre_crop
from video_swinv2.killable import KillableProcess, NoAnswerError, ProcessDiedError, prepare_forkserver

START_SECONDS = 60.0  # for the first process to import its libraries on a busy machine
_ALIVE_SECONDS = 1.0


@dataclass(frozen=True)
class WatchRequest:
    """Which stream to watch, and the segments to cut from it: `frames` frames, `stride` apart, of `size` (H, W) pixels.

    A segment starts `every_seconds` after the last, or such that there are about `max_segments` in all; with neither,
    segments do not overlap. `seconds`: stop after that much of the stream. `ahead`: how many segments may wait for an
    answer; once that many do, a `live` stream skips the next one, any other stream pauses. `video`: write the captioned
    frames there, under `files.partial_path` until it is complete. `memory_bytes` limits the data of the process.
    `wait_seconds`: how long the stream may stay silent.
    """

    source: str
    frames: int
    stride: int
    size: tuple[int, int]
    every_seconds: float | None = None
    max_segments: int | None = None
    seconds: float = math.inf
    live: bool = False
    ahead: int = 2
    video: Path | None = None
    memory_bytes: int | None = None
    wait_seconds: float = 60.0


@dataclass(frozen=True)
class StreamSummary:
    """Totals of a stream: frames and seconds decoded, and the segments `skipped` because the model was too slow."""

    pictures: int
    seconds: float
    skipped: int


@dataclass(frozen=True)
class _Failed:
    message: str


@dataclass(frozen=True)
class _Done:
    """All segments are answered and the video, if one was asked for, is written."""


_Message = Segment | StreamSummary | _Failed | _Done | None  # None: alive, nothing to say


class Watcher:
    """The segments of a stream, one after the other; a context manager that kills the process when it is left.

    Every segment has to be answered with `answer`, in order. Raises UserError, beginning with the name of the source,
    if the source cannot be read, if no frame came for `wait_seconds`, and past `limit_seconds` in all. `summary` is set
    once the segments have ended; `finish`, called after the last answer, waits for the video.
    """

    def __init__(
        self, request: WatchRequest, *, descriptor: int | None = None, limit_seconds: float = math.inf
    ) -> None:
        """descriptor: an open file to read in place of the source that the request names."""
        self._request = request
        self._deadline = time.monotonic() + limit_seconds
        self._limit_seconds = limit_seconds
        self.summary: StreamSummary | None = None
        self._finished = False
        start_forkserver()
        handed = None if descriptor is None else reduction.DupFd(descriptor)
        limits = {} if request.memory_bytes is None else {resource.RLIMIT_DATA: request.memory_bytes}
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
        patience = self._request.wait_seconds + START_SECONDS
        while True:
            message = self._receive(patience)
            patience = self._request.wait_seconds
            if isinstance(message, Segment):
                yield message
            elif isinstance(message, StreamSummary):
                self.summary = message
                return

    def answer(self, caption: Caption) -> None:
        """Send the model's answer for the oldest unanswered segment."""
        with contextlib.suppress(ProcessDiedError):  # the next `_receive` reports it
            self._process.send(tuple(caption))

    def finish(self) -> None:
        """Wait until the video is complete and give it its name; every segment must have been answered."""
        while not isinstance(self._receive(self._request.wait_seconds), _Done):
            pass
        if self._request.video is not None:
            commit_file(partial_path(self._request.video), self._request.video)
        self._finished = True

    def stop(self) -> None:
        """End the stream here as if it had ended by itself; what the process still sends has to be read."""
        with contextlib.suppress(ProcessDiedError):
            self._process.send(None)

    def _receive(self, patience: float) -> _Message:
        left = self._deadline - time.monotonic()
        try:
            message: _Message = self._process.receive(min(patience, left))
        except NoAnswerError:
            if left <= patience:
                raise UserError(
                    f"{self._request.source}: took longer than {self._limit_seconds:g} seconds; send a shorter one"
                ) from None
            raise UserError(f"{self._request.source}: not one picture within {patience:g} seconds; given up") from None
        except ProcessDiedError as death:
            raise UserError(f"{self._request.source}: the decoder crashed ({death})") from None
        if isinstance(message, _Failed):
            raise UserError(message.message)
        return message


@functools.cache
def start_forkserver() -> None:
    """Start the server that the processes are forked from, which takes a second or two; the first Watcher does it too.

    It has imported the libraries and done nothing else, so forking it is quick and inherits no locks.
    """
    prepare_forkserver(__name__)


def _watch(pipe: Connection, request: WatchRequest, handed: Any) -> None:
    """The process: every failure known of becomes a message. handed: made by reduction.DupFd, or None."""
    try:
        pipe.send(None)
        _Watch(pipe, request).run(None if handed is None else handed.detach())
    except (BrokenPipeError, EOFError):
        return  # the parent has stopped listening
    except UserError as error:
        pipe.send(_Failed(str(error)))
    except MemoryError:
        pipe.send(_Failed(f"{request.source}: takes too much memory to decode"))
    except Exception as error:  # whatever a decoder throws
        pipe.send(_Failed(f"{request.source}: {type(error).__name__}: {error}"))


class _Watch:
    """The state of the process while it decodes one stream."""

    def __init__(self, pipe: Connection, request: WatchRequest) -> None:
        self._pipe, self._request = pipe, request
        self._unanswered: deque[int] = deque()  # the last frame of each segment that was sent
        self._writer: AnnotatedVideoWriter | None = None
        self._skipped = 0
        self._stopped = False
        self._last_sent = time.monotonic()

    def run(self, descriptor: int | None) -> None:
        """Decode the stream to its end, send its segments and write its video."""
        request = self._request
        count, seconds = 0, 0.0
        with FrameStream(request.source, descriptor=descriptor, wait_seconds=request.wait_seconds) as stream:
            cutter = SegmentCutter(request.frames, request.stride, _frames_between_segments(request, stream))
            if request.video is not None:
                self._writer = AnnotatedVideoWriter(partial_path(request.video), stream.fps)
            for seconds, frame in stream:
                if self._stopped or seconds >= request.seconds:
                    break
                side, crop = centre_crop(stream.shown_size, request.size)
                image = np.ascontiguousarray(stream.image(frame, side)[crop])
                if self._writer is not None:
                    height, width = stream.shown_size
                    # The encoder's 4:2:0 pixels need even sides.
                    shown = stream.image(frame, min(height, width, MAX_SHORT_SIDE) // 2 * 2)
                    self._writer.add(count, seconds, shown[: shown.shape[0] // 2 * 2, : shown.shape[1] // 2 * 2])
                self._offer(cutter.add(Frame(count, seconds, image)), may_skip=True)
                count += 1
                self._take_waiting_answers()
            stream.shown_size  # noqa: B018 - raises if there was not a single frame
            self._offer(cutter.finish(), may_skip=False)
        # Sent before the answers are in: whoever collects segments into a batch must know that no other will come.
        self._pipe.send(StreamSummary(count, seconds, self._skipped))
        while self._unanswered:
            self._wait_for_answer()
        if self._writer is not None:
            self._writer.close()
        self._pipe.send(_Done())

    def _offer(self, segment: Segment | None, may_skip: bool) -> None:
        """Send a segment once fewer than `ahead` are unanswered; a live stream cannot wait and skips it."""
        if segment is None:
            return
        if self._request.live and may_skip and len(self._unanswered) >= self._request.ahead:
            self._skipped += 1
            return
        while len(self._unanswered) >= self._request.ahead:
            self._wait_for_answer()
        self._send(segment)
        self._unanswered.append(max(segment.indices))

    def _take_waiting_answers(self) -> None:
        """Take the answers that have arrived, and let the parent know that the stream is alive."""
        while self._pipe.poll():
            self._wait_for_answer()
        if time.monotonic() - self._last_sent > _ALIVE_SECONDS:
            self._send(None)

    def _wait_for_answer(self) -> None:
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


def _frames_between_segments(request: WatchRequest, stream: FrameStream) -> int:
    """Frames from the start of one segment to the start of the next."""
    span = (request.frames - 1) * request.stride + 1
    if request.every_seconds is not None:
        return max(1, round(request.every_seconds * stream.fps))
    if request.max_segments is not None and stream.duration_seconds is not None:
        # n segments have n - 1 gaps between their starts, which share what the last segment leaves of the stream.
        spare = stream.duration_seconds * stream.fps - span
        return max(1, math.ceil(spare / max(1, request.max_segments - 1)))
    return span
