"""The executors that run jobs: processes on this machine, or the workers of a Dask cluster.

A Dask worker does not run jobs itself. It has a `Pool` of killable processes as well, because Dask cannot stop a job
that hangs, and a job that crashes would take the worker and its other jobs with it.
"""

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
# Workers of a cluster come and go, so they are counted repeatedly, but each count is a round trip to the scheduler.
COUNT_WORKERS_EVERY_SECONDS = 5.0


@contextlib.contextmanager
def start_crew(where: str, workers: int, seconds_for: SecondsFor, memory_gib: float) -> Iterator[Crew]:
    """Start the crew for `pool.each` that `where` names; it is shut down when the context ends.

    `local` is a pool on this machine, `dask` a new Dask cluster of `workers` processes on this machine, `dask:ADDRESS`
    a cluster that is already running. In each case a job has a killable process to itself, with the limits described
    in `pool.run_jobs`. Raises UsageError for any other name or if Dask is not installed, UserError if the cluster does
    not answer.
    """
    name, _, address = where.partition(":")
    if where == "local":
        with Pool(workers, seconds_for, memory_gib) as pool:
            yield pool
    elif name == "dask" and (address or where == "dask"):
        with _dask_client(address, workers) as client:
            yield DaskCrew(client, seconds_for, memory_gib)
    else:
        raise UsageError(f"--executor {where}: must be local, dask or dask:tcp://HOST:PORT")


@contextlib.contextmanager
def _dask_client(address: str, workers: int) -> Iterator[Client]:
    """A client of the scheduler at `address`, or of a new local cluster if `address` is ''."""
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise UsageError("--executor dask: Dask is not installed; pip install 'video-swinv2[cluster]'") from error
    with contextlib.ExitStack() as stack:
        # One job per Dask worker. Dask's own memory limit is turned off, since each killable process has one. The
        # dashboard gets any free port: the usual one may be taken.
        if not address:
            cluster = LocalCluster(n_workers=workers, threads_per_worker=1, memory_limit=None, dashboard_address=":0")
            address = stack.enter_context(cluster).scheduler_address
        try:
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--executor dask:{address}: no Dask scheduler answers ({error}); check the address, or start one"
            ) from error
        yield stack.enter_context(client)


class DaskCrew(Executor):
    """The executor of a Dask client, for the same kind of jobs as a `Pool`."""

    def __init__(self, client: Client, seconds_for: SecondsFor, memory_gib: float) -> None:
        self._client = client
        # With Dask's default, pure=True, a call with the same arguments as an earlier one returns the earlier result.
        # A video that is tried again must really be prepared again.
        self._executor = client.get_executor(pure=False)
        self._limits = (seconds_for, memory_gib)
        self._threads, self._counted_at = 0, float("-inf")  # time.monotonic() of the last count

    def workers(self) -> int:
        """The number of threads in the cluster, at most a few seconds old."""
        if time.monotonic() > self._counted_at + COUNT_WORKERS_EVERY_SECONDS:
            self._threads, self._counted_at = sum(self._client.nthreads().values()), time.monotonic()
        return self._threads

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run `fn(job, allow)` in a killable process of some worker. If that worker dies, another one takes the job."""
        # A future of our own, because that of Dask raises KilledWorker where the result should be Lost (see _pass_on).
        result: Future[Any] = Future()
        dask_future = self._executor.submit(_run_on_worker, fn, *args, *self._limits, **kwargs)
        dask_future.add_done_callback(functools.partial(_pass_on, result))
        return result


def _pass_on(result: Future[Any], dask_future: Future[Any]) -> None:
    """Copy the result of a Dask future that is done to `result`.

    Dask raises KilledWorker for a job on which several workers died; its result is Lost. Any other error means that the
    cluster cannot do the work, and becomes a UserError, which ends the run.
    """
    from distributed import KilledWorker

    try:
        result.set_result(dask_future.result())
    except KilledWorker:
        result.set_result(Lost("crashed", "every Dask worker that took it died"))
    except (Exception, CancelledError) as error:
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        result.set_exception(UserError(f"the Dask cluster gave up on a video ({message}); run again to resume"))


def _run_on_worker(work: Callable[..., Any], job: Any, seconds_for: SecondsFor, memory_gib: float) -> Any:
    """Executed on a Dask worker: run the job in one of its killable processes and wait for the result."""
    from distributed import get_worker

    pool = _pool_of_worker(get_worker().state.nthreads, seconds_for, memory_gib)
    return pool.submit(work, job).result()


@functools.cache
def _pool_of_worker(threads: int, seconds_for: SecondsFor, memory_gib: float) -> Pool[Any]:
    """The killable processes of this Dask worker: created by its first job and kept for the following ones.

    They are kept in the cache of this function because Dask offers no other place. Every job finds the same ones, since
    `seconds_for` is a module-level function, which is pickled by name and so stays the same object.
    """
    # Dask's nanny starts its worker as a daemonic process, and multiprocessing does not allow those to have children,
    # because children might outlive them. Ours cannot: the kernel kills them with their parent (see killable.py).
    multiprocessing.current_process().daemon = False
    return Pool(threads, seconds_for, memory_gib)
