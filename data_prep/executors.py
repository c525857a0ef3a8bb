"""Where the work is done: processes of this machine, or the workers of a Dask cluster that do the same there."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from typing import TYPE_CHECKING, Any

from data_prep.pool import Crew, Lost, Pool
from video_swinv2.errors import UsageError, UserError

if TYPE_CHECKING:
    from distributed import Client

SecondsFor = Callable[[Any], float]
CONNECT_SECONDS = 30
# Workers of a cluster come and go; asking for their number is a round trip to its scheduler.
COUNT_EVERY_SECONDS = 5.0


@contextlib.contextmanager
def start_crew(where: str, workers: int, seconds_for: SecondsFor, memory_gib: float) -> Iterator[Crew]:
    """A crew for `each`: `local`, `dask` (a cluster of `workers` processes here) or `dask:ADDRESS` (one that runs).

    Everywhere a job has a killable process to itself, with the limits of `pool.run_jobs`. Raises UsageError for a name
    that is none of these or a Dask that is not installed, UserError for a cluster that does not answer.
    """
    name, _, address = where.partition(":")
    if where == "local":
        with Pool(workers, seconds_for, memory_gib) as pool:
            yield pool
    elif name == "dask" and (address or where == "dask"):
        with _client(address, workers) as client:
            yield DaskCrew(client, seconds_for, memory_gib)
    else:
        raise UsageError(f"--executor {where}: is none of local, dask, dask:tcp://HOST:PORT")


@contextlib.contextmanager
def _client(address: str, workers: int) -> Iterator[Client]:
    try:
        from distributed import Client, LocalCluster
    except ImportError as fault:
        raise UsageError("--executor dask: Dask is not installed; pip install 'video-swinv2[cluster]'") from fault
    with contextlib.ExitStack() as stack:
        if not address:
            cluster = LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit=None, dashboard_address=":0")
            address = stack.enter_context(cluster).scheduler_address
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as fault:
            raise UserError(f"--executor dask:{address}: no Dask scheduler answers there ({fault})") from fault
        yield stack.enter_context(client)


class DaskCrew(Executor):
    """The executor interface of a Dask client, for jobs of `pool.run_jobs`' kind."""

    def __init__(self, client: Client, seconds_for: SecondsFor, memory_gib: float) -> None:
        self._client = client
        # pure: Dask would otherwise take a job for one it has done before and give its old result.
        self._executor = client.get_executor(pure=False)
        self._limits = (seconds_for, memory_gib)
        self._threads, self._counted = 0, float("-inf")

    def workers(self) -> int:
        """The threads of the cluster."""
        if time.monotonic() > self._counted + COUNT_EVERY_SECONDS:
            self._threads, self._counted = sum(self._client.nthreads().values()), time.monotonic()
        return self._threads

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(job, allow)` in a killable process of some worker; a worker that dies hands it on to another."""
        outcome: Future[Any] = Future()
        task = self._executor.submit(_on_worker, fn, *args, *self._limits, **kwargs)
        task.add_done_callback(functools.partial(_hand_on, outcome))
        return outcome


def _hand_on(outcome: Future[Any], task: Future[Any]) -> None:
    """What became of a task of the cluster; one that several workers died of is lost, a lost cluster ends the run."""
    from distributed import KilledWorker

    try:
        outcome.set_result(task.result())
    except KilledWorker:
        outcome.set_result(Lost("crashed", "every Dask worker that took it died"))
    except (Exception, CancelledError) as fault:
        words = f"{type(fault).__name__}: {fault}".splitlines()[0]
        outcome.set_exception(UserError(f"the Dask cluster gave a clip back ({words}); run again to go on"))


def _on_worker(work: Callable[..., Any], job: Any, seconds_for: SecondsFor, memory_gib: float) -> Any:
    from distributed import get_worker

    pool = _processes(get_worker().state.nthreads, seconds_for, memory_gib)
    return pool.submit(work, job).result()


@functools.cache
def _processes(threads: int, seconds_for: SecondsFor, memory_gib: float) -> Pool[Any]:
    """The killable processes of this Dask worker, kept between jobs: Dask gives a task no other place for them."""
    # Nannies mark their workers as daemons, which may have no children lest these outlive them; ours cannot (pool.py).
    multiprocessing.current_process().daemon = False
    return Pool(threads, seconds_for, memory_gib)
