"""Launchers: the ranks that torchrun, deepspeed or srun assigned, and the launcher processes above this one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from video_swinv2.errors import UsageError


@dataclass(frozen=True)
class LaunchInfo:
    """What the launcher assigned to this process: its ranks, and how the processes find each other."""

    rank: int
    world_size: int
    local_rank: int
    init_method: str | None
    """URL for `torch.distributed.init_process_group`; None for a single process."""
    from_slurm: bool = False


def launch_info_from_environment(environment: Mapping[str, str]) -> LaunchInfo:
    """Read ranks and rendezvous address from a launcher's environment variables.

    srun is recognised by SLURM_STEP_NUM_TASKS: SLURM_NTASKS alone is also set in the batch script itself, where no
    other task has been started. Raises UsageError naming a variable that is missing or not a number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise UsageError(f"{name} is not set although RANK is: start with torchrun, deepspeed or srun")
        rank = _number(environment, "RANK")
        local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
        return LaunchInfo(rank, _number(environment, "WORLD_SIZE"), local_rank, "env://")
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
        init_method = f"tcp://{_slurm_address(environment)}" if world_size > 1 else None
        rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
        return LaunchInfo(rank, world_size, local_rank, init_method, from_slurm=True)
    return LaunchInfo(0, 1, 0, None)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise UsageError(f"{name}={value!r} is not a number: start with torchrun, deepspeed or srun")
    return int(value)


def _slurm_address(environment: Mapping[str, str]) -> str:
    """host:port of the first task: MASTER_ADDR and MASTER_PORT if set, else the first node and a port from the job."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UsageError("SLURM_STEP_NODELIST is empty: set MASTER_ADDR to the name of the first node")
    if "MASTER_PORT" in environment:
        return f"{host}:{_number(environment, 'MASTER_PORT')}"
    # All tasks must derive the same port, and two jobs on one node must derive different ones, hence the job id. The
    # range 15000-29999 lies below 32768, where Linux starts assigning ephemeral ports.
    return f"{host}:{15000 + _number(environment, 'SLURM_JOB_ID') % 15000}"


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: ``gpu[007-010,12],cpu1`` gives ``gpu007``."""
    # Split at the first comma outside brackets, then replace each bracket by the first number in it.
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def launcher_pids() -> tuple[int, ...]:
    """Process ids of the torchrun process, or of deepspeed's two, above this one; empty without them or /proc."""
    found: list[int] = []
    parent = os.getppid()
    while parent > 1:
        try:
            command = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
            status = Path(f"/proc/{parent}/stat").read_text()
        except OSError:
            break
        if not is_launcher(command):
            break
        found.append(parent)
        # The parent's id is the fourth field; the second, the command name in parentheses, may contain anything.
        parent = int(status.rpartition(")")[2].split()[1])
    return tuple(found)


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is torchrun's or deepspeed's own; a shell that was asked to run one is not."""
    if Path(command[0]).name.startswith("python"):
        command = [word for word in command[1:] if not word.startswith("-")] or [""]
    starts = ("torch.distributed.", "deepspeed.launcher.")
    return Path(command[0]).name in ("torchrun", "deepspeed") or command[0].startswith(starts)
