"""Launchers (torchrun, deepspeed, srun): reads the ranks they assign and finds the launcher process above this one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from video_swinv2.errors import UsageError


@dataclass(frozen=True)
class LaunchInfo:
    """What the launcher assigned to this process: its ranks and how the processes find each other."""

    rank: int
    world_size: int
    local_rank: int
    """Rank among the processes of this machine."""
    init_method: str | None
    """URL for `torch.distributed.init_process_group`; None for a single process."""
    from_slurm: bool = False
    """Whether srun started this process; it can show each process only one of the machine's GPUs."""


def launch_info_from_environment(environment: Mapping[str, str]) -> LaunchInfo:
    """Read ranks and rendezvous address from a launcher's environment variables.

    Without such variables, this process is the only one. Raises UsageError naming a variable that is missing or not a
    number.
    """
    # First torchrun and deepspeed, which set the same variables. In a SLURM job srun may have started them, and then
    # their ranks are the ones that count.
    if "RANK" in environment and "WORLD_SIZE" in environment:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise UsageError(f"{name} is not set although RANK is: start with torchrun, deepspeed or srun")
        rank = _number(environment, "RANK")
        local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
        return LaunchInfo(rank, _number(environment, "WORLD_SIZE"), local_rank, "env://")
    # srun is recognised by SLURM_STEP_NUM_TASKS. SLURM_NTASKS is also set in the batch script itself, which is a single
    # process, no matter how many tasks the job may start.
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        world_size = _number(environment, "SLURM_STEP_NUM_TASKS")
        init_method = f"tcp://{_slurm_address(environment)}" if world_size > 1 else None
        rank, local_rank = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
        return LaunchInfo(rank, world_size, local_rank, init_method, from_slurm=True)
    return LaunchInfo(0, 1, 0, None)


def is_rank_zero() -> bool:
    """Whether this is the only or the first process of a run: the one that prints."""
    return launch_info_from_environment(os.environ).rank == 0


def _number(environment: Mapping[str, str], name: str) -> int:
    """An environment variable as an integer; raises UsageError if it is missing or not a number."""
    value = environment.get(name)
    if value is None or not value.isdigit():
        found = f"{name} is not set" if value is None else f"{name}={value!r} is not a number"
        raise UsageError(f"{found}: start with torchrun, deepspeed or srun")
    return int(value)


def _slurm_address(environment: Mapping[str, str]) -> str:
    """Address of rank 0 as host:port.

    MASTER_ADDR and MASTER_PORT if set; otherwise the first node of the step and a port computed from the job id.
    """
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UsageError("SLURM_STEP_NODELIST is empty: set MASTER_ADDR to the name of the first node")
    if "MASTER_PORT" in environment:
        return f"{host}:{_number(environment, 'MASTER_PORT')}"
    # All tasks must compute the same port without communicating, and two jobs on one node should get different ones,
    # hence the job id. The range 15000 to 29999 is below 32768, where Linux starts to assign ephemeral ports.
    return f"{host}:{15000 + _number(environment, 'SLURM_JOB_ID') % 15000}"


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: ``gpu007`` for ``gpu[007-010,12],cpu1``."""
    # Split at commas outside brackets (no "]" follows before the next "["), take the first part, and replace each
    # bracket in it by its first number.
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def launcher_pids() -> tuple[int, ...]:
    """Process ids of the launchers above this process, nearest first; empty if there is none or no /proc.

    With torchrun that is one process, with deepspeed two.
    """
    found: list[int] = []
    # Walk up from parent to parent as long as each of them is a launcher. In a container, a launcher may be process 1.
    parent = os.getppid()
    while parent > 0:
        try:
            command = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
            status = Path(f"/proc/{parent}/stat").read_text()
        except OSError:
            break
        if not is_launcher(command):
            break
        found.append(parent)
        # In /proc/PID/stat the parent's id is the fourth field. The second, the command name in parentheses, may itself
        # contain spaces and parentheses, so fields are counted from the last ")" on.
        parent = int(status.rpartition(")")[2].split()[1])
    return tuple(found)


def lost_launcher(before: Sequence[int]) -> bool:
    """Whether the launcher of this process has ended. before: the `launcher_pids` at an earlier time, if known.

    It may have ended while this process was still importing. torchrun marks the processes that it starts, and one that
    has no launcher above it but process 1 has been orphaned.
    """
    now = launcher_pids()
    orphaned = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() == 1 and not now
    return orphaned or (bool(before) and now != tuple(before))


def is_launcher(command: Sequence[str]) -> bool:
    """Whether this is the command line of torchrun or deepspeed itself, not of a shell that runs one of them."""
    # Either a script ("python .../torchrun ...") or a module ("python -m torch.distributed.run ..."): drop Python and
    # its options, and look at the first word that remains.
    if Path(command[0]).name.startswith("python"):
        command = [word for word in command[1:] if not word.startswith("-")] or [""]
    starts = ("torch.distributed.", "deepspeed.launcher.")
    return Path(command[0]).name in ("torchrun", "deepspeed") or command[0].startswith(starts)
