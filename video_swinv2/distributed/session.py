"""A distributed session: everything from joining the other processes to leaving them, successfully or not.

What ends a session, and how:

* Success: all processes leave together, and the process group is destroyed.
* An error in any process: the lifeline ends all processes with one report of it, through `os._exit`. Nothing waits for
  the others, which may be stuck in a collective: not the destruction of the process group, not the interpreter's exit.
* A process that dies or does not answer: as for an error.

In a world of one process there is nobody to wait for, and errors are raised as usual.
"""

from __future__ import annotations

import re
import signal
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType

import torch.distributed as dist

from video_swinv2.distributed.collectives import all_gather_objects
from video_swinv2.distributed.lifeline import Cause, Failure, Lifeline
from video_swinv2.distributed.meeting import time_limit
from video_swinv2.distributed.world import MEETING_SECONDS, World, join_world, leave_world
from video_swinv2.errors import UserError, error_line, shows_tracebacks

SILENCE_SECONDS = 300.0
TERMINATED = 128 + signal.SIGTERM  # the exit code that shells give a process that SIGTERM has ended
# What the libraries below torch's collectives call themselves in their errors.
COLLECTIVE_LIBRARIES = re.compile(r"gloo|NCCL", re.IGNORECASE)


@contextmanager
def distributed_session(
    device: str,
    advice: str,
    *,
    meeting_seconds: float = MEETING_SECONDS,
    silence_seconds: float = SILENCE_SECONDS,
    end_with_launcher: bool,
) -> Iterator[World]:
    """Join the world inside the context. See the top of this file for how it ends.

    With several processes, an exception does not leave the context: it ends this process and all others.

    Args:
        device: `auto`, `cpu` or `cuda`.
        advice: what to do after a process has failed or died; the end of the line that says so.
        meeting_seconds: how long the processes may take to find each other.
        silence_seconds: the session ends if a process does not answer for this long, because it was stopped or its
            machine hangs.
        end_with_launcher: whether the session ends at SIGTERM and when the launcher ends. Training does not: it saves a
            checkpoint first, see `StopSignal`.
    """
    # A process group that the caller has set up is used and left open; one that is joined here is closed again.
    joins_group = not dist.is_initialized()
    world = join_world(device, meeting_seconds)
    if world.size == 1:
        try:
            yield world
        finally:
            if joins_group:
                leave_world()
        return
    lifeline = Lifeline(world, advice, silence_seconds=silence_seconds, end_with_launcher=end_with_launcher)
    try:
        with time_limit(meeting_seconds, _no_collective(meeting_seconds)):
            all_gather_objects(world, world.rank)
        with _orderly_termination() if end_with_launcher else nullcontext():
            yield world
        if joins_group:
            leave_world()
    except BaseException as error:  # also KeyboardInterrupt and SystemExit: nobody leaves alone
        lifeline.fail(describe_failure(error, world, advice))
    lifeline.leave()


def describe_failure(error: BaseException, world: World, advice: str) -> Failure:
    """What an exception means for the run: one line for a UserError, otherwise the traceback and a line below it."""
    code = getattr(error, "exit_code", 1)
    if isinstance(error, UserError) and not shows_tracebacks():
        return Failure(world.rank, Cause.ERROR, f"error: {error_line(error)}", code)
    if isinstance(error, SystemExit):
        # Launchers send SIGTERM to all processes when one has died, which is what there is to report then.
        return Failure(world.rank, Cause.BROKEN_COLLECTIVE, f"error: stopped by SIGTERM; {advice}", TERMINATED)
    if isinstance(error, KeyboardInterrupt):
        return Failure(world.rank, Cause.ERROR, f"error: interrupted; {advice}", code)
    who = f"process {world.rank} of {world.size} on {socket.gethostname()}"
    lines = traceback.format_exception(error)
    text = f"{''.join(lines)}error: {who} failed with {lines[-1].strip()}; {advice}"
    return Failure(world.rank, Cause.BROKEN_COLLECTIVE if is_broken_collective(error) else Cause.ERROR, text, code)


@contextmanager
def _orderly_termination() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit in the main thread instead of ending this process before it can say why."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise SystemExit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def is_broken_collective(error: BaseException) -> bool:
    """Whether an error comes from a collective, and so may only be the consequence of another process's failure."""
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    in_torch = bool(frames) and "torch/distributed/" in frames[-1].filename
    return isinstance(error, dist.DistError) or in_torch or bool(COLLECTIVE_LIBRARIES.search(str(error)))


def _no_collective(seconds: float) -> str:
    return (
        f"the processes met, but their first collective did not finish within {seconds:g} seconds; "
        "`video-swinv2 doctor` tests the connections between the GPUs, and NCCL_DEBUG=INFO shows where NCCL waits"
    )
