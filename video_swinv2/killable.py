"""Work in a process of its own that can be killed: if it hangs, crashes or eats all memory, only that work is lost.

`KillableProcess` runs one function at the far end of a pipe. The three users differ only in what travels through it:
the pool of `data_prep` (jobs and results), a watched stream (segments and answers) and the second reading of a video in
a test (one record).

`pebble`, whose pool also kills workers, is not used: its deadlines are fixed when a job is submitted and cannot be
extended by the job, its `map` submits all jobs at once, and a worker cannot converse with its parent.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import DefaultContext
from typing import Any, Literal

StartMethod = Literal["fork", "spawn", "forkserver"]
PR_SET_PDEATHSIG = 1  # linux/prctl.h
REAP_SECONDS = 5.0  # for a process whose pipe has closed to end by itself, so that its own exit code is seen


class ProcessDiedError(Exception):
    """The process ended before it answered; `str()` names the signal or the exit code."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(describe_exit(exit_code))
        self.exit_code = exit_code


class NoAnswerError(Exception):
    """Nothing came from the process in time. It is still running: kill it, or go on waiting."""


class KillableProcess:
    """Runs `work(pipe, *args)` in a process of its own; `work` must be importable. Starts at once.

    method: "spawn" starts a fresh interpreter, "forkserver" forks from a server that was started clean; neither
    inherits locks that threads of this process (FFmpeg's, NumPy's) hold at the moment. "fork" is immediate but inherits
    them. limits: the resource limits of the process, {resource.RLIMIT_AS: bytes} for example. lock: held while a
    process starts and while it is reaped; threads that run processes side by side share a re-entrant one, since
    multiprocessing's table of children is not thread-safe.

    The process ignores Ctrl-C, which is the parent's to handle, and ends with the parent even where that is killed.
    """

    def __init__(
        self,
        work: Callable[..., None],
        *args: Any,
        method: StartMethod,
        limits: Mapping[int, int] | None = None,
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        context: DefaultContext = multiprocessing.get_context(method)  # type: ignore[assignment]  # all have Process
        self._lock = lock or nullcontext()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(work, theirs, args, method, dict(limits or {})), daemon=True)
        # A child inherits the blocked signals. With Ctrl-C blocked here it cannot hit a child that is still importing
        # and does not ignore it yet. Python's resource tracker, which the first start would bring up, unblocks SIGINT
        # on the way, so it has to be up before.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with self._lock:
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid or 0

    def is_alive(self) -> bool:
        """Whether the process is still running."""
        return self._process.is_alive()

    def send(self, message: Any) -> None:
        """Send a message to the process; ProcessDiedError if it no longer listens."""
        try:
            self._pipe.send(message)
        except OSError:
            raise ProcessDiedError(self.end(REAP_SECONDS)) from None

    def receive(self, seconds: float | None = None) -> Any:
        """The next message, waiting at most `seconds` (None: without limit).

        Raises NoAnswerError if none came in time, and ProcessDiedError, with the process reaped, if it ended.
        """
        try:
            if not self._pipe.poll(None if seconds is None else max(0.0, seconds)):
                raise NoAnswerError
            return self._pipe.recv()
        except (EOFError, OSError):
            raise ProcessDiedError(self.end(REAP_SECONDS)) from None

    def kill(self) -> None:
        """Kill the process without waiting for its end; callable from any thread."""
        self._process.kill()

    def end(self, wait_seconds: float = 0.0) -> int | None:
        """Reap the process, killing it if it does not end by itself within `wait_seconds`; the exit code."""
        with self._lock:
            self._process.join(wait_seconds)
            self._process.kill()
            self._process.join()
        self._pipe.close()
        return self._process.exitcode


def prepare_forkserver(*modules: str) -> None:
    """Start the server that "forkserver" processes are forked from, with `modules` imported: takes a second or two."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


def describe_exit(exit_code: int | None) -> str:
    """How a process ended: "SIGSEGV", or "exit code 1"."""
    if exit_code is not None and exit_code < 0:
        with suppress(ValueError):  # a real-time signal has no name
            return signal.Signals(-exit_code).name
        return f"signal {-exit_code}"
    return f"exit code {exit_code}"


def _run(
    work: Callable[..., None], pipe: Connection, args: tuple[Any, ...], method: StartMethod, limits: Mapping[int, int]
) -> None:
    """The process itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent(method)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    work(pipe, *args)


def _end_with_parent(method: StartMethod) -> None:
    """A parent that is killed outright can stop nobody, so its end has to be noticed from here."""
    if sys.platform == "linux" and method != "forkserver":
        # By the kernel, even while a library hangs with the interpreter's lock held. The kernel watches the *thread*
        # that started this process, so that thread must outlive it.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    # A forked server is the kernel's parent of this process and lives as long as any of its children, so there a thread
    # waits for the real parent, whose sentinel multiprocessing hands down.
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
