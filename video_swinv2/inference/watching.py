"""A source watched by a process of its own, which can be killed: windows come out, answers about them go back in.

Whatever a decoder does with a file, hanging, crashing or eating memory, costs that process alone. The answers let the
process run ahead only so far, tell it which windows of a live stream to leave out, and are what it writes on a video.
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from video_swinv2.errors import UserError
from video_swinv2.files import commit_file, partial_path
from video_swinv2.inference.annotated_video import MAX_SHORT_SIDE, Caption, AnnotatedVideoWriter
from video_swinv2.inference.streams import Frame, FrameStream, centre_crop
from video_swinv2.inference.segments import SegmentCutter, Segment

START_SECONDS = 60.0  # for the first process to import its libraries on a busy machine
_ALIVE_SECONDS = 1.0


@dataclass(frozen=True)
class Task:
    """What to watch, and the clips to cut from it: `frames` pictures, `stride` apart, of `size` (H, W).

    A window follows the last after `every_seconds`, or so that there are about `most_windows` of them in all; with
    neither they follow without overlap. `seconds`: watch no longer than that. `ahead`: windows that may wait for an
    answer; where so many do, a source that is `live` goes on without the next one, any other waits. `video`: write the
    pictures with their answers there, under the hidden name of `files.partial_path`.
    """

    source: str
    frames: int
    stride: int
    size: tuple[int, int]
    every_seconds: float | None = None
    most_windows: int | None = None
    seconds: float = math.inf
    live: bool = False
    ahead: int = 2
    video: Path | None = None
    memory_bytes: int | None = None
    wait_seconds: float = 60.0


@dataclass(frozen=True)
class Seen:
    """What there was of a source in all: `skipped` windows of a live one came too fast for the model."""

    pictures: int
    seconds: float
    skipped: int


@dataclass(frozen=True)
class _Failed:
    message: str


@dataclass(frozen=True)
class _Done:
    """All answers came, and the video, if there is one, is written."""


_Message = Segment | Seen | _Failed | _Done | None  # None: alive, nothing to say


class Watcher:
    """Windows of a source, one after the other; a context manager, whose end kills the process.

    Every window has to be answered with `answer`, in their order. Raises UserError, beginning with the name of the
    source, where it cannot be read, where no picture came for `task.wait_seconds`, and past `limit_seconds` in all.
    `seen` is there when the windows have ended; `finish`, when the last is answered, waits for the video.
    """

    def __init__(self, task: Task, *, descriptor: int | None = None, limit_seconds: float = math.inf) -> None:
        """descriptor: an open file to read in place of the source named by the task."""
        self._task = task
        self._deadline = time.monotonic() + limit_seconds
        self._limit = limit_seconds
        self.seen: Seen | None = None
        self._finished = False
        self._pipe, theirs = _context().Pipe()
        handed = None if descriptor is None else reduction.DupFd(descriptor)
        self._process = _context().Process(target=_watch, args=(theirs, task, handed), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        if self._task.video is not None and not self._finished:
            partial_path(self._task.video).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Segment]:
        patience = self._task.wait_seconds + START_SECONDS
        while True:
            message = self._receive(patience)
            patience = self._task.wait_seconds
            if isinstance(message, Segment):
                yield message
            elif isinstance(message, Seen):
                self.seen = message
                return

    def answer(self, caption: Caption) -> None:
        """What the model says of the oldest window not yet answered."""
        with contextlib.suppress(OSError):  # it died: the next window will tell
            self._pipe.send(tuple(caption))

    def finish(self) -> None:
        """Wait until the video is written and give it its name; every window must have been answered."""
        while not isinstance(self._receive(self._task.wait_seconds), _Done):
            pass
        if self._task.video is not None:
            commit_file(partial_path(self._task.video), self._task.video)
        self._finished = True

    def stop(self) -> None:
        """Let the process end as if the source did; what it still has to say is to be read."""
        with contextlib.suppress(OSError):
            self._pipe.send(None)

    def _receive(self, patience: float) -> _Message:
        left = self._deadline - time.monotonic()
        if not self._pipe.poll(max(0.0, min(patience, left))):
            if left <= patience:
                raise UserError(f"{self._task.source}: took longer than {self._limit:g} seconds; send a shorter one")
            raise UserError(f"{self._task.source}: not one picture within {patience:g} seconds; given up")
        try:
            message: _Message = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5.0)
            raise UserError(f"{self._task.source}: the decoder crashed ({_death(self._process.exitcode)})") from None
        if isinstance(message, _Failed):
            raise UserError(message.message)
        return message


def start_early() -> None:
    """Bring up the process that the others are forked from, which takes a second or two."""
    from multiprocessing import forkserver

    _context()
    forkserver.ensure_running()


@functools.cache
def _context() -> ForkServerContext:
    # Forked from a process that has imported the libraries and done nothing else: quick, and free of locks that threads
    # of this one may hold at the moment.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _watch(pipe: Connection, task: Task, handed: Any) -> None:
    """The process: whatever is known to go wrong becomes a message. handed: what reduction.DupFd made, or None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if task.memory_bytes is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (task.memory_bytes, task.memory_bytes))
    try:
        pipe.send(None)
        _Watch(pipe, task).run(None if handed is None else handed.detach())
    except (BrokenPipeError, EOFError):
        return  # nobody listens any more
    except UserError as error:
        pipe.send(_Failed(str(error)))
    except MemoryError:
        pipe.send(_Failed(f"{task.source}: takes too much memory to decode"))
    except Exception as error:  # whatever a decoder throws
        pipe.send(_Failed(f"{task.source}: {type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """A parent killed outright cannot stop this process. The kernel's PR_SET_PDEATHSIG would not either: it follows the
    process this one is forked from, which lives as long as any of its children."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


class _Watch:
    """The state of one watch, in its process."""

    def __init__(self, pipe: Connection, task: Task) -> None:
        self._pipe, self._task = pipe, task
        self._unanswered: deque[int] = deque()  # the last picture of each window that was sent
        self._recorder: AnnotatedVideoWriter | None = None
        self._skipped = 0
        self._stopped = False
        self._spoke = time.monotonic()

    def run(self, descriptor: int | None) -> None:
        task = self._task
        count, seconds = 0, 0.0
        with FrameStream(task.source, descriptor=descriptor, wait_seconds=task.wait_seconds) as source:
            slider = SegmentCutter(task.frames, task.stride, _hop(task, source))
            if task.video is not None:
                self._recorder = AnnotatedVideoWriter(partial_path(task.video), source.fps)
            for seconds, frame in source:
                if self._stopped or seconds >= task.seconds:
                    break
                side, cut = centre_crop(source.shown_size, task.size)
                image = np.ascontiguousarray(source.image(frame, side)[cut])
                if self._recorder is not None:
                    height, width = source.shown_size
                    shown = source.image(frame, min(height, width, MAX_SHORT_SIDE) // 2 * 2)
                    self._recorder.add(count, seconds, shown[: shown.shape[0] // 2 * 2, : shown.shape[1] // 2 * 2])
                self._offer(slider.add(Frame(count, seconds, image)), must=False)
                count += 1
                self._breathe()
            source.shown_size  # noqa: B018 - raises where there was not one picture
            self._offer(slider.finish(), must=True)
        # Before the answers: who collects windows for a batch must know that no other comes.
        self._pipe.send(Seen(count, seconds, self._skipped))
        while self._unanswered:
            self._take()
        if self._recorder is not None:
            self._recorder.close()
        self._pipe.send(_Done())

    def _offer(self, window: Segment | None, must: bool) -> None:
        if window is None:
            return
        if self._task.live and not must and len(self._unanswered) >= self._task.ahead:
            self._skipped += 1
            return
        while len(self._unanswered) >= self._task.ahead:
            self._take()
        self._send(window)
        self._unanswered.append(max(window.indices))

    def _breathe(self) -> None:
        """Take the answers that are there, and show that the source is alive."""
        while self._pipe.poll():
            self._take()
        if time.monotonic() - self._spoke > _ALIVE_SECONDS:
            self._send(None)

    def _take(self) -> None:
        """Wait for an answer."""
        caption = self._pipe.recv()
        if caption is None:
            self._stopped = True
            return
        until = self._unanswered.popleft()
        if self._recorder is not None:
            self._recorder.caption_until(until, caption)

    def _send(self, message: Segment | None) -> None:
        self._pipe.send(message)
        self._spoke = time.monotonic()


def _hop(task: Task, source: FrameStream) -> int:
    """Pictures from one window to the next."""
    span = (task.frames - 1) * task.stride + 1
    if task.every_seconds is not None:
        return max(1, round(task.every_seconds * source.fps))
    if task.most_windows is not None and source.seconds is not None:
        spare = source.seconds * source.fps - span
        return max(1, math.ceil(spare / max(1, task.most_windows - 1)))
    return span


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"
