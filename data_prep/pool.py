"""Processes that can be killed one by one: a job that hangs, crashes or eats all memory costs that job alone."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Allow = Callable[[float], None]

START_SECONDS = 60.0  # for a fresh process to import its libraries on a busy machine
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Lost:
    """A job that failed, or whose process died or had to be killed: `reason` is timeout or crashed."""

    reason: str
    detail: str


@dataclass
class _Worker(Generic[Job]):
    process: BaseProcess
    pipe: Connection
    job: Job | None = None
    deadline: float = float("inf")


@dataclass(frozen=True)
class _More:
    """From a process: its job may take so many seconds from now on."""

    seconds: float


def run_jobs(
    work: Callable[[Job, Allow], Result],
    jobs: Iterable[Job],
    *,
    workers: int,
    seconds_for: Callable[[Job], float],
    memory_gib: float | None = None,
) -> Iterator[tuple[Job, Result | Lost]]:
    """Each job with what `work` made of it, in the order they end. `work` must be importable.

    A job past `seconds_for(job)`, or past what it set anew by the function it gets as second argument, has its process
    killed; a process that dies is replaced; both give Lost. `memory_gib` bounds the address space of each process.
    Leaving the iteration early kills what still runs.
    """
    waiting = iter(jobs)
    crew: list[_Worker[Job]] = []
    try:
        for _ in range(workers):
            job = next(waiting, None)
            if job is None:
                break
            crew.append(_start(work, memory_gib))
            _give(crew[-1], job, seconds_for)
        while crew:
            yield from _collect(crew, work, memory_gib)
            for worker in list(crew):
                if worker.job is None:
                    job = next(waiting, None)
                    if job is None:
                        _dismiss(worker)
                        crew.remove(worker)
                    else:
                        _give(worker, job, seconds_for)
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()


def _collect(
    crew: list[_Worker[Job]], work: Callable[[Job, Allow], Result], memory_gib: float | None
) -> Iterator[tuple[Job, Result | Lost]]:
    """Wait until something happened; yield every job that ended and put fresh processes in the place of dead ones."""
    pause = max(0.0, min(worker.deadline for worker in crew) - time.monotonic())
    ready = wait([worker.pipe for worker in crew], timeout=pause)
    for place, worker in enumerate(crew):
        job = worker.job
        if job is None:
            continue
        if worker.pipe in ready:
            try:
                outcome: Result | Lost | _More = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                outcome = Lost("crashed", _death(worker.process.exitcode))
        elif time.monotonic() >= worker.deadline:
            outcome = Lost("timeout", "killed past its time limit")
        else:
            continue
        if isinstance(outcome, _More):
            worker.deadline = time.monotonic() + outcome.seconds
            continue
        worker.job, worker.deadline = None, float("inf")
        if isinstance(outcome, Lost):
            worker.process.kill()
            worker.process.join()
            crew[place] = _start(work, memory_gib)
        yield job, outcome


def _start(work: Callable[[Job, Allow], Result], memory_gib: float | None) -> _Worker[Job]:
    # Spawned, not forked: a forked child inherits locks that FFmpeg's or NumPy's threads may hold at that moment.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work, memory_gib), daemon=True)
    # Ctrl-C is the parent's to handle, and a child takes over what is blocked: none may come while it still imports.
    # The tracker, which the first start would bring up, unblocks it on the way.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker[Job], job: Job, seconds_for: Callable[[Job], float]) -> None:
    worker.job = job
    worker.deadline = time.monotonic() + seconds_for(job) + START_SECONDS
    with contextlib.suppress(OSError):  # a process already dead shows as the end of its pipe
        worker.pipe.send(job)


def _dismiss(worker: _Worker[Job]) -> None:
    worker.pipe.close()
    worker.process.join(timeout=5)
    worker.process.kill()


def _serve(pipe: Connection, work: Callable[[Job, Allow], Result], memory_gib: float | None) -> None:
    if sys.platform == "linux":
        # A parent killed outright cannot stop its children; the kernel does.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if memory_gib is not None:
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result: Result | Lost = work(job, lambda seconds: pipe.send(_More(seconds)))
        except Exception as fault:
            result = Lost("crashed", f"{type(fault).__name__}: {fault}")
        pipe.send(result)


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"its process died of {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"
