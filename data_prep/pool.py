"""A pool of processes that can be killed one by one, so that a job that hangs, crashes or eats all memory fails alone.

FFmpeg may hang or crash on a damaged file, and a thread, or a process of concurrent.futures, cannot be stopped then. So
each thread of the pool drives one process of its own:

    parent    each(...) --submit--> ThreadPoolExecutor: thread --job----------------> process
                        <--future--                            <--limits, result-----

A thread waits for its process until the deadline of the job. If there is no answer by then, it kills the process. After
that, or if the process has died by itself, the result of the job is `Lost`, and the next job gets a new process. Other
jobs are not affected.
"""

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

from video_swinv2.data.decode import one_line
from video_swinv2.killable import KillableProcess, NoAnswerError, ProcessDiedError

Job = TypeVar("Job")
Result = TypeVar("Result")
Allow = Callable[[float], None]
"""Passed to a job, which calls it with the seconds it may still take from now on, in place of its former time limit."""

# A process has to start, and to import what its job needs, within this time. It does not count towards the time limit
# of the job: on a busy machine, or with an environment on a slow network disk, starting takes minutes.
START_SECONDS = 600.0
# Jobs submitted beyond those running (and a quarter of those, see `each`), so that no process is idle while the parent
# records the result of another.
AHEAD = 2


@dataclass(frozen=True)
class Lost:
    """The result of a job that raised an exception or whose process died or was killed.

    `reason` is 'timeout' if its time limit was exceeded, otherwise 'crashed'.
    """

    reason: str
    detail: str


@dataclass(frozen=True)
class _Allowed:
    """Sent by a process when it begins a job, and when its job calls `allow`: it may take `seconds` from now on."""

    seconds: float


class Crew(Protocol):
    """An executor of concurrent.futures that also knows how many jobs it runs at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Start a job."""

    def workers(self) -> int:
        """How many jobs run at once. On a cluster this changes as machines come and go, and may be 0 for a while."""


def each(crew: Crew, work: Callable[[Job, Allow], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result | Lost]]:
    """Yield each job with its result, in the order in which they finish.

    `jobs` may be a long or lazy iterable: only as many are taken from it as the crew can soon run. An exception of a
    future is raised here.
    """
    waiting = iter(jobs)
    running: dict[Future[Any], Job] = {}
    while True:
        # Fill up to the number of workers and some more. It is asked for in every round, since it may change.
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
    """Yield each job with the result of `work(job, allow)`, in the order in which they finish.

    `work` is sent to the processes by name, so it must be importable. A job may take `seconds_for(job)` seconds, or as
    long as it last asked for with `allow(seconds)`; after that its process is killed, and its result is Lost. The same
    holds if its process dies. `memory_gib` limits the address space of each process. Closing the iterator early kills
    the jobs that are still running.
    """
    with Pool(workers, seconds_for, memory_gib) as pool:
        yield from each(pool, work, jobs)


class Pool(Executor, Generic[Job]):
    """An executor whose threads each drive one killable process; its arguments are those of `run_jobs`.

    Like every executor it is a context manager. Leaving it waits for all jobs, or after an exception kills those that
    are running and cancels the others.
    """

    def __init__(self, workers: int, seconds_for: Callable[[Job], float], memory_gib: float | None = None) -> None:
        self._size = workers
        self._seconds_for = seconds_for
        # Re-entrant: a worker that holds it starts a KillableProcess, which takes it again.
        lock = threading.RLock()
        self._workers = [_Worker(lock, memory_gib) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        # As many threads as workers, so an idle worker is always found. The threads must outlive the processes they
        # start, because the kernel kills a process together with the thread that started it (see killable.py). Threads
        # of a ThreadPoolExecutor live until its shutdown.
        self._threads = ThreadPoolExecutor(workers, "pool")

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool | None:
        self.shutdown(cancel_futures=kind is not None)
        return None

    def workers(self) -> int:
        """The number of processes, each of which runs one job at a time."""
        return self._size

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(job, allow)` in one of the processes. The result of the future is that of `fn`, or Lost."""
        return self._threads.submit(self._run, fn, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes: once all jobs are done, or with `cancel_futures` at once, whatever they are doing."""
        # First no further job may start, then the processes are killed. The threads that wait for them notice, return
        # Lost and end, so that the second shutdown does not wait long.
        if cancel_futures:
            self._threads.shutdown(wait=False, cancel_futures=True)
            for worker in self._workers:
                worker.kill()
        self._threads.shutdown(wait=wait)
        for worker in self._workers:
            worker.end()

    def _run(self, work: Callable[[Job, Allow], Result], job: Job) -> Result | Lost:
        """Executed by a thread of the pool: run a job on an idle worker."""
        try:
            seconds = self._seconds_for(job)
        except Exception as fault:  # whatever the file of this job causes, the others go on
            return Lost("crashed", one_line(fault))
        worker = self._idle.get()
        try:
            return worker.run(work, job, seconds)
        finally:
            self._idle.put(worker)


class _Worker:
    """A process that runs one job at a time. It is started when first needed, and again after it was lost.

    Its pool calls `run` from one thread at a time, and `kill` from the thread that shuts the pool down.
    """

    def __init__(self, lock: threading.RLock, memory_gib: float | None) -> None:
        self._lock = lock  # shared by the workers of the pool: multiprocessing's table of children is not thread-safe
        self._limits = {} if memory_gib is None else {resource.RLIMIT_AS: int(memory_gib * 2**30)}
        self._process: KillableProcess | None = None
        self._closed = False

    def run(self, work: Callable[[Job, Allow], Result], job: Job, seconds: float) -> Result | Lost:
        """The result of `work` for the job, or Lost if it took longer than `seconds` and what it was allowed."""
        process = self._running_process()
        if process is None:
            return Lost("crashed", "the pool was closed")
        deadline = time.monotonic() + START_SECONDS
        try:
            process.send((work, job, seconds))
            # Any number of time limits, then the result.
            while True:
                answer: Result | Lost | _Allowed = process.receive(deadline - time.monotonic())
                if isinstance(answer, _Allowed):
                    deadline = time.monotonic() + answer.seconds
                    continue
                if isinstance(answer, Lost):  # an unexpected exception: the state of the process is unknown
                    self.end()
                return answer
        except NoAnswerError:
            self.end()
            return Lost("timeout", "killed after exceeding its time limit")
        except ProcessDiedError as death:
            self.end()
            return Lost("crashed", f"its process died ({death})")

    def kill(self) -> None:
        """Kill the process, whatever it is doing, and never start another. May be called from any thread."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def end(self) -> None:
        """Kill the process and reap it. The next job starts a new one."""
        with self._lock:
            if self._process is not None:
                self._process.end()
            self._process = None

    def _running_process(self) -> KillableProcess | None:
        """The process, started if there is none; None after `kill`."""
        with self._lock:
            if self._closed:
                return None
            # A process that died between two jobs is replaced, so that its death is not blamed on the next job.
            if self._process is not None and not self._process.is_alive():
                self.end()
            if self._process is None:
                # Spawned, not forked: a fork would inherit locks that other threads hold (see KillableProcess).
                self._process = KillableProcess(_serve, method="spawn", limits=self._limits, lock=self._lock)
            return self._process


def _serve(pipe: Connection) -> None:
    """The main loop of a worker process: run the jobs that arrive through the pipe until the pool closes it."""

    def allow(seconds: float) -> None:
        pipe.send(_Allowed(seconds))

    with contextlib.suppress(EOFError):
        while True:
            work, job, seconds = pipe.recv()  # imports the module of `work`
            allow(seconds)
            try:
                result = work(job, allow)
            except Exception as fault:
                result = Lost("crashed", one_line(fault))
            pipe.send(result)
