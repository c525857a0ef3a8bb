"""Joining and leaving the process group, and what this process is in it: its rank and its device."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from video_swinv2.distributed.devices import check_device_name, choose_device
from video_swinv2.distributed.launchers import LaunchInfo, launch_info_from_environment
from video_swinv2.distributed.meeting import meet, time_limit

# After this time a waiting collective fails. Rank 0 may have to build an index or write a report while the others wait.
# Processes that die or do not answer are noticed much earlier, by the lifeline.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
MEETING_SECONDS = 120.0


@dataclass(frozen=True)
class World:
    """The position of this process among all processes of the run, and the device it computes on."""

    rank: int
    size: int
    """Number of processes in the run."""
    local_rank: int
    """Rank among the processes of this machine."""
    device: torch.device


def alone(device: str = "auto") -> World:
    """A world of this process only, whatever others there are: for work that is not shared. Joins nothing."""
    return World(0, 1, 0, choose_device(device))


def join_world(device: str = "auto", meeting_seconds: float = MEETING_SECONDS) -> World:
    """Join the other processes of this run and choose the device. ``device`` is ``auto``, ``cpu`` or ``cuda``.

    torchrun, the deepspeed launcher and srun are recognised by their environment variables; a process started by hand
    is a world of size one. If a process group exists already, it is used. Raises UsageError for an unknown or missing
    device and for an incomplete launcher environment, and UserError if the processes do not find each other within
    ``meeting_seconds``.
    """
    check_device_name(device)
    launch = _existing_group() if dist.is_initialized() else launch_info_from_environment(os.environ)
    # From here on, also over a GPU's driver: it may hang.
    with time_limit(2 * meeting_seconds, f"the process group was not formed within {2 * meeting_seconds:g} seconds"):
        chosen = choose_device(device, launch)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        else:
            # DeepSpeed chooses its accelerator when it is first imported. Without this variable it would use a GPU if
            # there is one, even if the user asked for the CPU.
            os.environ["DS_ACCELERATOR"] = "cpu"
        # DeepSpeed reads its device index from this variable and refuses to start without it.
        os.environ["LOCAL_RANK"] = str(launch.local_rank if chosen.index is None else chosen.index)
        if not dist.is_initialized():
            _init_process_group("nccl" if chosen.type == "cuda" else "gloo", launch, meeting_seconds)
    return World(launch.rank, launch.world_size, launch.local_rank, chosen)


def _init_process_group(backend: str, launch: LaunchInfo, meeting_seconds: float) -> None:
    if launch.init_method is None:
        # A single process needs a group too, because DeepSpeed always issues collectives. A HashStore lives inside the
        # process: no port that may be taken, no file to clean up, no search for MPI.
        store = cast(Any, dist).HashStore()  # torch's stubs do not export it
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        # The store keeps the limit of the meeting, so that a process that dies while the connections are made does not
        # keep the others waiting.
        store = dist.PrefixStore("default_pg", meet(launch, meeting_seconds))
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=COLLECTIVE_TIMEOUT
        )


def _existing_group() -> LaunchInfo:
    """The ranks in a process group that was created before, by a test or a program that uses this package."""
    rank = dist.get_rank()
    return LaunchInfo(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)), None)


def leave_world() -> None:
    """Destroy the process group; never raises. If it stayed open, gloo's threads could abort the process at exit.

    Under NCCL this waits for the other processes, so a process that has failed must not call it.
    """
    with suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()
