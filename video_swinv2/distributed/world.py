"""The processes of a run: this process's rank and device, and joining and leaving the process group."""

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

# Long enough for rank 0 to build an index or write a report while the other ranks wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among all processes of the run: its rank, the world size, its rank on this machine, its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


def join_world(device: str = "auto") -> World:
    """Join the other processes of this run and choose the device; a process started by hand is a world of size one.

    torchrun, the deepspeed launcher and srun are recognised by their environment variables. ``device`` is ``auto``,
    ``cpu`` or ``cuda``. A process group that already exists is used as it is. Raises UsageError for an unknown or
    missing device and for an incomplete launcher environment.
    """
    check_device_name(device)
    launch = _existing_group() if dist.is_initialized() else launch_info_from_environment(os.environ)
    chosen = choose_device(device, launch)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        # DeepSpeed picks its accelerator when it is first imported. Without this variable it would take any GPU it
        # finds, including one that the user told us not to use.
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed reads its device index from this variable and refuses to start without it.
    os.environ["LOCAL_RANK"] = str(launch.local_rank if chosen.index is None else chosen.index)
    if not dist.is_initialized():
        _init_process_group("nccl" if chosen.type == "cuda" else "gloo", launch)
    return World(launch.rank, launch.world_size, launch.local_rank, chosen)


def _init_process_group(backend: str, launch: LaunchInfo) -> None:
    if launch.init_method is None:
        # A store inside this process: no port to collide on, no file to clean up, no MPI to discover. A single
        # process needs a group too, because DeepSpeed always issues collectives.
        store = cast(Any, dist).HashStore()  # torch's stubs do not export it
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
    else:
        dist.init_process_group(
            backend,
            init_method=launch.init_method,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=COLLECTIVE_TIMEOUT,
        )


def _existing_group() -> LaunchInfo:
    rank = dist.get_rank()
    return LaunchInfo(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)), None)


def leave_world() -> None:
    """Destroy the process group; never raises. If it were left open, gloo's threads could abort the process at exit."""
    with suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()
