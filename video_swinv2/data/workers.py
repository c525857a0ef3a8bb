"""Loader workers that may crash or hang: starts and limits them, records what each reads, detects deaths.

A decoder can crash its process (segmentation fault, out-of-memory killer) or hang inside a library call that no Python
exception can interrupt. Training (`loading.py`) and testing (`evaluation/reading.py`) therefore both read files in
worker processes that are started and watched here. They decide for themselves what to do about the file that was being
read.
"""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from video_swinv2.killable import MAX_WAIT_SECONDS, end_with_parent
from video_swinv2.memory import READING_BYTES, growth_limit

Sample = TypeVar("Sample")
Batch = TypeVar("Batch")
Address = TypeVar("Address")

# PyTorch's two messages for a dead worker: one from waiting for a batch, the other from its signal handler.
WORKER_DEATH_MESSAGE = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")
# With pinned memory, a thread fetches the batches. What it raises while it fetches from a dead worker ends the thread
# and does not get any further, so that this is all that is left of it.
PIN_THREAD_MESSAGE = "Pin memory thread exited unexpectedly"
RESULT_PIPE_BYTES = 2**20  # the most that Linux allows everybody; all finished batches together are announced in less
DEATH_SHOWS_SECONDS = 2.0  # how long a death may take to become visible after a batch could not be fetched
# `VideoReader` restarts its time limit for opening a video, for its size and for each pass over its frames, of which
# there is rarely more than one. A worker that takes longer than three of them hangs in a library, where the reader's
# own checks do not run.
CLOCKS_PER_VIDEO = 3


def patience_seconds(time_limit_seconds: float, grace_seconds: float) -> float:
    """How many seconds reading one file may take before its process counts as hung, given the reader's time limit."""
    return CLOCKS_PER_VIDEO * time_limit_seconds + grace_seconds


@contextmanager
def killing_alarm(seconds: float) -> Iterator[None]:
    """Kill this process with SIGALRM unless the context ends within `seconds`."""
    # The signal's default action is carried out by the kernel. A Python handler would run only after the hung call had
    # returned to the interpreter.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, MAX_WAIT_SECONDS))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def bounded_reading(seconds: float) -> Iterator[None]:
    """Inside the context, this process is killed after `seconds`, and may grow by READING_BYTES (`growth_limit`)."""
    with killing_alarm(seconds), growth_limit(READING_BYTES):
        yield


@dataclass(frozen=True)
class AbandonedFile:
    """A file that a worker was reading when it died: its number, and the seconds since the worker had begun it."""

    number: int
    seconds: float


class FilesInHand:
    """A table of the file that each worker is reading.

    It lies in memory that the workers share with the process that started them, which can therefore still read the row
    of a worker that was killed.
    """

    def __init__(self, workers: int) -> None:
        # One row per worker: pid, number of the file (-1 for none), and the time at which it was begun, in seconds of
        # the monotonic clock, which all processes of a machine share. float64 represents the integers exactly.
        self._rows = torch.full((workers, 3), -1.0, dtype=torch.float64).share_memory_()

    @contextmanager
    def reading(self, number: int, seconds: float) -> Iterator[None]:
        """For use in a worker: record that it is reading file `number`, within the limits of `bounded_reading`."""
        worker = get_worker_info()
        if worker is None:
            raise RuntimeError("FilesInHand.reading is for loader workers")
        row = self._rows[worker.id]
        row.copy_(torch.tensor([os.getpid(), number, time.monotonic()], dtype=torch.float64))
        try:
            with bounded_reading(seconds):
                yield
        finally:
            row[1] = -1  # not reached by a worker that dies, so the number of its file stays in the table

    def any_worker_dead(self) -> bool:
        """Whether any worker that had begun a file is dead."""
        multiprocessing.active_children()  # reaps ended children; until then, a zombie still has its pid
        return any(pid >= 0 and not _is_alive(int(pid)) for pid in self._rows[:, 0].tolist())

    def abandoned(self) -> list[AbandonedFile]:
        """The files that dead workers were reading.

        Call this before the loader is deleted. That stops the other workers, which would then count as dead too.
        """
        multiprocessing.active_children()  # reaps ended children, as in `any_worker_dead`
        now = time.monotonic()
        return [
            AbandonedFile(int(number), now - since)
            for pid, number, since in self._rows.tolist()
            if number >= 0 and not _is_alive(int(pid))
        ]


def start_loader(
    dataset: Dataset[Sample],
    batches: Sequence[list[Address]] | Sampler[list[Address]],
    collate: Callable[[list[Sample]], Batch],
    *,
    workers: int,
    prefetch: int,
    pin: bool = False,
) -> Iterator[Batch]:
    """Start `workers` processes (0: none, this process reads) and return an iterator over the collated batches.

    The workers live as long as the iterator, and end with this process even if it is killed. If one dies, the iterator
    raises an error that `is_worker_death` recognises.

    Args:
        dataset: gives the sample at an address.
        batches: the addresses of each batch, in order.
        prefetch: how many batches each worker reads ahead.
        pin: whether to copy batches to page-locked memory.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=prefetch if workers else None,
        worker_init_fn=partial(_begin_worker, in_main_thread),
        # A forked worker starts at once, any other takes seconds. Fork was the default on Linux before Python 3.14.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    if not workers or not in_main_thread:
        return _with_large_pipe(iter(loader))
    # PyTorch installs a SIGCHLD handler through which a dying worker raises in the main thread, whatever that is doing
    # at the moment, even in the middle of a collective operation. Restore the handler from before. The death is then
    # noticed when the next batch is waited for, where the loop can deal with it.
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return _with_large_pipe(iter(loader))
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _with_large_pipe(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Enlarge the pipe through which workers announce finished batches, so that none waits while writing to it.

    A worker that is killed while it waits leaves half a message. This process would wait for the other half for ever.
    Usually the 64 KiB of a pipe are enough, but not for many workers and videos of many views.
    """
    queue = getattr(batches, "_worker_result_queue", None)
    if queue is not None and sys.platform == "linux":
        with suppress(OSError):  # the user's limit for all pipes is reached
            fcntl.fcntl(queue._writer.fileno(), fcntl.F_SETPIPE_SZ, RESULT_PIPE_BYTES)
    return batches


def _begin_worker(started_by_main_thread: bool, worker: int) -> None:
    """The first thing that a worker does."""
    if started_by_main_thread:
        # Torch's workers look every five seconds whether their parent is alive, but not while a decoder hangs. The
        # kernel watches the thread that started them, and only the main thread is sure to live as long as the process.
        end_with_parent("fork")
    # A thread of the worker sends its batches. One that it cannot send, for lack of memory or of /dev/shm, it drops
    # with a traceback, and the loop would wait for it for ever. A death is noticed, and the batch is read again.
    Queue._on_queue_feeder_error = staticmethod(_die)  # type: ignore[attr-defined]  # meant to be replaced


def _die(error: Exception, batch: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def is_worker_death(error: Exception, in_hand: FilesInHand | None) -> bool:
    """Whether a loader raised `error` because a worker died, rather than because of the data it read."""
    if isinstance(error, RuntimeError) and WORKER_DEATH_MESSAGE.search(str(error)):
        return True
    fetching_failed = isinstance(error, (EOFError, OSError)) or str(error) == PIN_THREAD_MESSAGE
    if in_hand is None or not fetching_failed:
        return False
    # The pixels of a finished batch are fetched through a connection to its worker. If the worker has died in the
    # meantime, fetching fails with one of these errors, possibly before the death itself is visible. So wait a moment.
    until = time.monotonic() + DEATH_SHOWS_SECONDS
    while time.monotonic() < until:
        if in_hand.any_worker_dead():
            return True
        time.sleep(0.05)
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # signal 0 is not delivered; it only checks that the process exists
    except ProcessLookupError:
        return False
    return True
