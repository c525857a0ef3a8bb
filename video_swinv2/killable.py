"""A killable process: runs a function in a process of its own, so that a hang, a crash or a lack of memory stays there.

`KillableProcess` runs one function at the other end of a pipe. It has three users, which differ only in the messages
that they send through the pipe: the pool of `data_prep` (jobs and results), a watched stream (segments and answers),
and the second reading of a video in a test (one record).

`pebble`, whose pool can also kill workers, is not used: its deadlines are fixed when a job is submitted and cannot be
extended by the job, its `map` submits all jobs at once, and its workers cannot exchange messages with their parent.
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
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
# How long a process whose pipe has closed may take to end by itself. If it were killed at once, its exit code would be
# SIGKILL instead of the signal or code that tells what happened.
REAP_SECONDS = 5.0
# poll and the timers of the kernel refuse longer waits: poll counts milliseconds in 32 bits, which overflow after 24.8
# days. Whoever asks for more, infinity included, gets this.
MAX_WAIT_SECONDS = 24 * 24 * 3600.0


class ProcessDiedError(Exception):
    """The process ended before it answered. The message names the signal or the exit code."""

    def __init__(self, exit_code: int | None) -> None:
        super().__init__(describe_exit(exit_code))
        self.exit_code = exit_code


class NoAnswerError(Exception):
    """The process sent nothing in time. It is still running: kill it, or continue to wait."""


class KillableProcess:
    """Starts a process that runs `work(pipe, *args)`; `work` must be importable.

    The process ignores Ctrl-C, which is left to the parent, and ends when the parent ends, even if that is killed.

    Args:
        method: "spawn" starts a fresh interpreter, and "forkserver" forks from a server that was started clean. Neither
            inherits the locks that threads of this process (FFmpeg's, NumPy's) hold at the moment of the start. "fork"
            starts immediately, but inherits them locked.
        limits: resource limits of the process, such as {resource.RLIMIT_AS: bytes}.
        lock: held while the process is started and while it is reaped. Threads that run processes side by side have to
            share a re-entrant one, because multiprocessing's table of children is not thread-safe.
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
        # A child inherits the set of blocked signals. Block SIGINT during the start, so that Ctrl-C cannot kill a child
        # that is still importing modules and has not set it to be ignored yet. Starting Python's resource tracker
        # unblocks SIGINT, and the first start of a process would do that, so start the tracker beforehand.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with self._lock:
                self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Close the parent's copy of the child's end. Otherwise the pipe would stay open after the child's death, and
        # `receive` would wait for ever instead of raising.
        theirs.close()

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid or 0

    def is_alive(self) -> bool:
        """Whether the process is still running."""
        return self._process.is_alive()

    def send(self, message: Any) -> None:
        """Send a message to the process. Raises ProcessDiedError, with the process reaped, if it no longer listens."""
        try:
            self._pipe.send(message)
        except OSError:
            raise ProcessDiedError(self.end(REAP_SECONDS)) from None

    def receive(self, seconds: float | None = None) -> Any:
        """Wait at most `seconds` for the next message (None: without limit; any more than MAX_WAIT_SECONDS are that).

        Raises NoAnswerError if no message came in time, and ProcessDiedError, with the process reaped, if it ended.
        """
        try:
            if not self._pipe.poll(None if seconds is None else min(max(0.0, seconds), MAX_WAIT_SECONDS)):
                raise NoAnswerError
            return self._pipe.recv()  # EOFError if the process has closed its end, which it does by dying
        except (EOFError, OSError):
            raise ProcessDiedError(self.end(REAP_SECONDS)) from None

    def kill(self) -> None:
        """Kill the process without waiting for it to end. May be called from any thread."""
        self._process.kill()

    def end(self, wait_seconds: float = 0.0) -> int | None:
        """Wait `wait_seconds` for the process to end by itself, then kill it, and reap it. Returns its exit code."""
        with self._lock:
            self._process.join(wait_seconds)
            self._process.kill()
            self._process.join()
        self._pipe.close()
        return self._process.exitcode


def prepare_forkserver(*modules: str) -> None:
    """Start the server that "forkserver" processes are forked from, with `modules` imported. Takes a second or two."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    forkserver.ensure_running()


def describe_exit(exit_code: int | None) -> str:
    """Describe how a process ended, as "SIGSEGV" or "exit code 1"; multiprocessing negates the number of a signal."""
    if exit_code is not None and exit_code < 0:
        with suppress(ValueError):  # a real-time signal has no name
            return signal.Signals(-exit_code).name
        return f"signal {-exit_code}"
    return f"exit code {exit_code}"


def _run(
    work: Callable[..., None], pipe: Connection, args: tuple[Any, ...], method: StartMethod, limits: Mapping[int, int]
) -> None:
    """The main function of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent(method)
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    work(pipe, *args)


def end_with_parent(method: StartMethod) -> None:
    """Make this process end with its parent, which cannot stop its children if it is killed itself."""
    if sys.platform == "linux" and method != "forkserver":
        # Have the kernel kill this process, which works even while a library hangs and holds the interpreter lock. The
        # kernel watches the *thread* that started this process, not its process, so that thread has to live longer.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    # With "forkserver", the kernel's parent of this process is the server, which lives as long as any of its children.
    # So a thread waits for the real parent, for whose end multiprocessing passes a sentinel to its children. The same
    # is done on systems without prctl.
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
