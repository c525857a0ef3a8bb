"""Loader workers that may die: what each of them is reading, the alarm that ends a hung one, and how a death shows.

A decoder can take its process down with it (a segmentation fault, the kernel's out-of-memory killer) or hang inside a
library call that no Python exception can interrupt. Training (`loading.py`) and testing (`evaluation/reading.py`) both
read in worker processes that are started, watched and diagnosed here; what happens to the file that was being read is
theirs to decide.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

Sample = TypeVar("Sample")
Batch = TypeVar("Batch")
Address = TypeVar("Address")

# PyTorch's two messages for the same event, from its signal handler and from waiting for a batch.
WORKER_DEATH_MESSAGE = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")
DEATH_SHOWS_SECONDS = 2.0  # after a batch could not be fetched from a worker's memory
# Opening a video, its size and its frames each run against the reader's own clock; longer means hung in a library.
CLOCKS_PER_VIDEO = 3


def patience_seconds(time_limit_seconds: float, grace_seconds: float) -> float:
    """How long reading one file may take before its process counts as hung, given the reader's own time limit."""
    return CLOCKS_PER_VIDEO * time_limit_seconds + grace_seconds


@contextmanager
def killing_alarm(seconds: float) -> Iterator[None]:
    """Inside, the process is killed by SIGALRM unless the block ends within `seconds`."""
    # The default action, by the kernel: a handler in Python would wait for the hung call to return.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@dataclass(frozen=True)
class AbandonedFile:
    """The number of a file that a dead worker was reading, and for how long it had been reading it."""

    number: int
    seconds: float


class FilesInHand:
    """Which file each worker is reading, in memory that the workers share with the process that started them."""

    def __init__(self, workers: int) -> None:
        # One row per worker: pid, number of the file (-1: none), since when in monotonic seconds, a clock that all
        # processes of a machine share. float64 holds each exactly.
        self._rows = torch.full((workers, 3), -1.0, dtype=torch.float64).share_memory_()

    @contextmanager
    def reading(self, number: int, seconds: float) -> Iterator[None]:
        """In a worker: record that it reads file `number`, and have it killed if that takes more than `seconds`."""
        worker = get_worker_info()
        if worker is None:
            raise RuntimeError("FilesInHand.reading is for loader workers")
        row = self._rows[worker.id]
        row.copy_(torch.tensor([os.getpid(), number, time.monotonic()], dtype=torch.float64))
        try:
            with killing_alarm(seconds):
                yield
        finally:
            row[1] = -1  # not reached by a worker that dies, which is the point

    def any_worker_dead(self) -> bool:
        """Whether a worker that has read a file has ended."""
        multiprocessing.active_children()  # reaps those that ended; a zombie still answers to its pid
        return any(pid >= 0 and not _is_alive(int(pid)) for pid in self._rows[:, 0].tolist())

    def abandoned(self) -> list[AbandonedFile]:
        """The files that dead workers were reading.

        Ask before the loader is deleted: that ends the other workers, which then count as dead too.
        """
        multiprocessing.active_children()  # reaps those that ended; see `any_worker_dead`
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
    """Iterate over `batches` of addresses, read by `workers` processes (0: by this one) and collated.

    The workers live as long as the iterator. When one dies the iterator raises what `is_worker_death` recognises.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=prefetch if workers else None,
        # Linux's default before Python 3.14: a forked worker starts at once, any other takes seconds.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    if not workers or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    # PyTorch installs a signal handler by which a dying worker raises inside whatever the main thread is doing at that
    # moment, a collective operation for example. Without it the death is noticed when the next batch is waited for.
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def is_worker_death(error: Exception, in_hand: FilesInHand | None) -> bool:
    """Whether a loader raised `error` because a worker died, not because of what it read."""
    if isinstance(error, RuntimeError):
        return WORKER_DEATH_MESSAGE.search(str(error)) is not None
    if in_hand is None or not isinstance(error, (EOFError, OSError)):
        return False
    # The pixels of a finished batch stay in the memory of its worker until they are fetched. If the worker dies before,
    # fetching fails with one of these errors, which may come before the death itself is visible.
    until = time.monotonic() + DEATH_SHOWS_SECONDS
    while time.monotonic() < until:
        if in_hand.any_worker_dead():
            return True
        time.sleep(0.05)
    return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
