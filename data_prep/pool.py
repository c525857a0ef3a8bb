"""Processes that can be killed one by one: a job that hangs, crashes or eats all memory costs that job alone."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import queue
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")
Allow = Callable[[float], None]

START_SECONDS = 60.0  # for a fresh process to import its libraries on a busy machine
PR_SET_PDEATHSIG = 1
# Handed out beyond the jobs at work, so that no process waits while the parent writes down what another one did.
AHEAD = 2


@dataclass(frozen=True)
class Lost:
    """A job that failed, or whose process died or had to be killed: `reason` is timeout or crashed."""

    reason: str
    detail: str


@dataclass(frozen=True)
class _More:
    """From a process: its job may take so many seconds from now on."""

    seconds: float


class Crew(Protocol):
    """What runs jobs: an executor of concurrent.futures that says how many it does at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start work on one job."""

    def workers(self) -> int:
        """How many jobs it does at once; may change as machines come and go."""


def each(crew: Crew, work: Callable[[Job, Allow], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result | Lost]]:
    """Each job with what `work` made of it, in the order they end; jobs are drawn only when there is room for them."""
    waiting = iter(jobs)
    running: dict[Future[Any], Job] = {}
    while True:
        workers = crew.workers()
        for job in islice(waiting, max(0, workers + workers // 4 + AHEAD - len(running))):
            running[crew.submit(work, job)] = job
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(future), future.result()


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
    with Pool(workers, seconds_for, memory_gib) as pool:
        yield from each(pool, work, jobs)


class Pool(Executor, Generic[Job]):
    """Threads that each drive one killable process; see `run_jobs`. A context manager, as every executor.

    Leaving it after an exception kills what still runs.
    """

    def __init__(self, workers: int, seconds_for: Callable[[Job], float], memory_gib: float | None = None) -> None:
        self._workers = workers
        self._seconds_for = seconds_for
        self._starting = threading.RLock()
        self._children = [_Child(self._starting, memory_gib) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        for child in self._children:
            self._idle.put(child)
        # The threads live until the shutdown, as they must: the kernel ties a process to the thread that started it.
        self._threads = ThreadPoolExecutor(workers, "pool")

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool | None:
        self.shutdown(cancel_futures=kind is not None)
        return None

    def workers(self) -> int:
        """One job a process."""
        return self._workers

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(job, allow)` in one of the processes; the future gives its result or Lost."""
        return self._threads.submit(self._run, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: at once, whatever they do, with `cancel_futures`, else when all jobs are done."""
        if cancel_futures:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for child in self._children:
                child.kill()
        self._threads.shutdown(wait=wait)
        for child in self._children:
            child.dismiss()

    def _run(self, work: Callable[[Job, Allow], Result], job: Job) -> Result | Lost:
        child = self._idle.get()
        try:
            return child.run(work, job, self._seconds_for(job))
        finally:
            self._idle.put(child)


class _Child:
    """One process for one job at a time: started when first needed and again after it was lost."""

    def __init__(self, starting: threading.RLock, memory_gib: float | None) -> None:
        self._lock = starting
        self._memory_gib = memory_gib
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._closed = False

    def run(self, work: Callable[[Job, Allow], Result], job: Job, seconds: float) -> Result | Lost:
        """What `work` made of the job, or Lost."""
        pipe = self._ready()
        if pipe is None:
            return Lost("crashed", "the pool was closed")
        deadline = time.monotonic() + seconds + START_SECONDS
        try:
            pipe.send((work, job))
            while pipe.poll(max(0.0, deadline - time.monotonic())):
                answer: Result | Lost | _More = pipe.recv()
                if isinstance(answer, _More):
                    deadline = time.monotonic() + answer.seconds
                    continue
                if isinstance(answer, Lost):  # an exception nobody expected: who knows what it left behind
                    self._end()
                return answer
        except (EOFError, OSError):
            return Lost("crashed", _death(self._end(wait_seconds=5.0)))
        self._end()
        return Lost("timeout", "killed past its time limit")

    def kill(self) -> None:
        """Kill the process, whatever it does, and never start another; for any thread."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def dismiss(self) -> None:
        """End a process that has no job."""
        self._end()

    def _ready(self) -> Connection | None:
        with self._lock:
            if self._closed:
                return None
            if self._process is not None and not self._process.is_alive():  # it died idle: no job is to blame
                self._end()
            if self._pipe is None:
                self._process, self._pipe = _start(self._memory_gib)
            return self._pipe

    def _end(self, wait_seconds: float = 0.0) -> int | None:
        """Reap the process, killed if it does not end by itself; its exit code."""
        process, pipe = self._process, self._pipe
        if process is None or pipe is None:
            return None
        with self._lock:  # multiprocessing's table of children is not for several threads at once
            process.join(wait_seconds)
            process.kill()
            process.join()
            self._process = self._pipe = None
        pipe.close()
        return process.exitcode


def _start(memory_gib: float | None) -> tuple[BaseProcess, Connection]:
    # Spawned, not forked: a forked child inherits locks that FFmpeg's or NumPy's threads may hold at that moment.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, memory_gib), daemon=True)
    # Ctrl-C is the parent's to handle, and a child takes over what is blocked: none may come while it still imports.
    # The tracker, which the first start would bring up, unblocks it on the way.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return process, ours


def _serve(pipe: Connection, memory_gib: float | None) -> None:
    if sys.platform == "linux":
        # A parent killed outright cannot stop its children; the kernel does.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if memory_gib is not None:
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with contextlib.suppress(EOFError):
        while True:
            work, job = pipe.recv()
            try:
                result = work(job, lambda seconds: pipe.send(_More(seconds)))
            except Exception as fault:
                result = Lost("crashed", f"{type(fault).__name__}: {fault}")
            pipe.send(result)


def _death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"its process died of {signal.Signals(-exit_code).name}"
    return f"its process ended with exit code {exit_code}"
