"""How the processes of a run find each other, within a limit of time.

Torch alone waits half an hour for processes that never come, and for a launcher that is gone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from video_swinv2.distributed.launchers import LaunchInfo, launcher_pids, lost_launcher
from video_swinv2.errors import UserError

# Beyond the limit of the meeting itself, for a call into a library that does not keep its own limit.
MARGIN_SECONDS = 10.0
POLL_SECONDS = 0.2


def meet(launch: LaunchInfo, seconds: float) -> dist.Store:
    """Wait until all processes have arrived, and return the key-value store that they share.

    Raises UserError that names the missing ranks if they have not arrived after `seconds`.
    """
    deadline = time.monotonic() + seconds
    missing: Sequence[int] = range(launch.world_size)
    try:
        # Waits until the process that hosts the store has started; rank 0, if that is the host, waits for all others.
        limit = timedelta(seconds=seconds)
        store, _, _ = next(dist.rendezvous(str(launch.init_method), launch.rank, launch.world_size, timeout=limit))
        store.set(_key(launch.rank), "")
        while missing and time.monotonic() < deadline:
            missing = [rank for rank in missing if not store.check([_key(rank)])]
            time.sleep(POLL_SECONDS if missing else 0.0)
    except dist.DistError as error:
        raise _not_met(launch, seconds, str(error).splitlines()[0]) from error
    if missing:
        raise _not_met(launch, seconds, f"rank {', '.join(map(str, missing[:8]))} missing")
    return store


def _key(rank: int) -> str:
    return f"video-swinv2/arrived/{rank}"


def _not_met(launch: LaunchInfo, seconds: float, found: str) -> UserError:
    return UserError(
        f"the {launch.world_size} processes of this run have not found each other within {seconds:g} seconds "
        f"({found}); check that all were started, that MASTER_ADDR and MASTER_PORT can be reached from every machine, "
        "and raise engine.meeting_seconds for machines that start slowly"
    )


@contextmanager
def time_limit(seconds: float, doing: str) -> Iterator[None]:
    """End this process if the block takes longer than `seconds` plus a margin, or as soon as the launcher has ended.

    A thread does that, because libraries in which the main thread may hang can neither be interrupted nor trusted to
    keep a limit. doing: what did not happen in time, for the message.
    """
    done = threading.Event()
    launchers = launcher_pids()
    deadline = time.monotonic() + seconds + MARGIN_SECONDS

    def watch() -> None:
        while not done.wait(POLL_SECONDS):
            if lost_launcher(launchers):
                _end("the launcher has ended while the processes were starting; start the run again")
            if time.monotonic() > deadline:
                _end(doing)

    threading.Thread(target=watch, name="time-limit", daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _end(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(1)
