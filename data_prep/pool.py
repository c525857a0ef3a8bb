"""Processes that can be killed one by one: a job that hangs, crashes or eats all memory costs that job alone."""

from __future__ import annotations

import contextlib
import queue
import resource
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

from video_swinv2.killable import KillableProcess, NoAnswerError, ProcessDiedError

Job = TypeVar("Job")
Result = TypeVar("Result")
Allow = Callable[[float], None]
"""Given to a job: allows it N seconds from now on, in place of what is left of its time limit."""

START_SECONDS = 60.0  # for a fresh process to import its libraries on a busy machine
# Jobs submitted beyond those running, so that no process is idle while the parent records the result of another.
AHEAD = 2


@dataclass(frozen=True)
class Lost:
    """A job that failed, or whose process died or had to be killed: `reason` is timeout or crashed."""

    reason: str
    detail: str


@dataclass(frozen=True)
class _Extension:
    """Sent by a process: its job may take N seconds from now on."""

    seconds: float


class Crew(Protocol):
    """An executor of concurrent.futures that also says how many jobs it runs at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a job."""

    def workers(self) -> int:
        """How many jobs run at once; on a cluster this changes as machines come and go."""


def each(crew: Crew, work: Callable[[Job, Allow], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result | Lost]]:
    """Each job with its result, in the order in which they finish; jobs are drawn only when there is room for them."""
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
    """Each job with the result of `work(job, allow)`, in the order in which they finish. `work` must be importable.

    A job that exceeds `seconds_for(job)`, or the time it last asked for with `allow(seconds)`, has its process killed;
    a process that dies is replaced; both give Lost. `memory_gib` limits the address space of each process. Closing the
    iterator early kills the jobs that are still running.
    """
    with Pool(workers, seconds_for, memory_gib) as pool:
        yield from each(pool, work, jobs)


class Pool(Executor, Generic[Job]):
    """Threads that each drive one killable process; see `run_jobs`. A context manager, as every executor.

    Leaving it after an exception kills the jobs that are still running.
    """

    def __init__(self, workers: int, seconds_for: Callable[[Job], float], memory_gib: float | None = None) -> None:
        self._size = workers
        self._seconds_for = seconds_for
        lock = threading.RLock()
        self._workers = [_Worker(lock, memory_gib) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # The threads live until the shutdown, as they must: the kernel ties a process to the thread that started it.
        self._threads = ThreadPoolExecutor(workers, "pool")

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool | None:
        self.shutdown(cancel_futures=kind is not None)
        return None

    def workers(self) -> int:
        """One job per process."""
        return self._size

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(job, allow)` in one of the processes; the future gives its result or Lost."""
        return self._threads.submit(self._run, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes once all jobs are done; with `cancel_futures` at once, whatever they are doing."""
        if cancel_futures:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown(wait=wait)
        for worker in self._workers:
            worker.end()

    def _run(self, work: Callable[[Job, Allow], Result], job: Job) -> Result | Lost:
        worker = self._idle.get()
        try:
            return worker.run(work, job, self._seconds_for(job))
        finally:
            self._idle.put(worker)


class _Worker:
    """A process for one job at a time, started when first needed and again after it was lost."""

    def __init__(self, lock: threading.RLock, memory_gib: float | None) -> None:
        self._lock = lock  # shared by the pool's workers
        self._limits = {} if memory_gib is None else {resource.RLIMIT_AS: int(memory_gib * 2**30)}
        self._process: KillableProcess | None = None
        self._closed = False

    def run(self, work: Callable[[Job, Allow], Result], job: Job, seconds: float) -> Result | Lost:
        """The result of `work` for the job, or Lost."""
        process = self._running_process()
        if process is None:
            return Lost("crashed", "the pool was closed")
        deadline = time.monotonic() + seconds + START_SECONDS
        try:
            process.send((work, job))
            while True:
                answer: Result | Lost | _Extension = process.receive(deadline - time.monotonic())
                if isinstance(answer, _Extension):
                    deadline = time.monotonic() + answer.seconds
                    continue
                if isinstance(answer, Lost):  # an unexpected exception: the state of the process is unknown
                    self.end()
                return answer
        except NoAnswerError:
            self.end()
            return Lost("timeout", "killed past its time limit")
        except ProcessDiedError as death:
            self.end()
            return Lost("crashed", f"its process died ({death})")

    def kill(self) -> None:
        """Kill the process, whatever it is doing, and never start another; callable from any thread."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def end(self) -> None:
        """End the process and reap it."""
        with self._lock:
            if self._process is not None:
                self._process.end()
            self._process = None

    def _running_process(self) -> KillableProcess | None:
        with self._lock:
            if self._closed:
                return None
            if self._process is not None and not self._process.is_alive():  # it died between jobs: none is to blame
                self.end()
            if self._process is None:
                # Spawned, not forked: see KillableProcess.
                self._process = KillableProcess(_serve, method="spawn", limits=self._limits, lock=self._lock)
            return self._process


def _serve(pipe: Connection) -> None:
    """The process: runs the jobs that come through the pipe until the pool closes it."""
    with contextlib.suppress(EOFError):
        while True:
            work, job = pipe.recv()
            try:
                result = work(job, lambda seconds: pipe.send(_Extension(seconds)))
            except Exception as fault:
                result = Lost("crashed", f"{type(fault).__name__}: {fault}")
            pipe.send(result)
