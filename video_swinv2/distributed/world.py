"""Processes, seeds and signals: who this process is, what all processes agree on, and when to stop."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from video_swinv2.errors import UsageError

T = TypeVar("T")
# Long enough for rank 0 to build an index or write a report while the others wait in a collective.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)

# sysexits.h's EX_TEMPFAIL: the run was told to stop, has saved itself, and the same command goes on.
START_AGAIN = 75
# The same in a file of the run folder: torchrun exits with 1 whatever its processes say.
AGAIN_FILE = "start-again"


@dataclass(frozen=True)
class World:
    """This process among all: its rank, their number, its rank on this machine, and the device it computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device


@dataclass(frozen=True)
class Place:
    """What the launcher said: ranks, and the address where the processes meet (None for a process alone)."""

    rank: int
    size: int
    local_rank: int
    meeting: str | None
    by_slurm: bool = False


def start(device: str = "auto") -> World:
    """Join the other processes of this run and choose the device; a process started by hand is a world of one.

    Understands torchrun, the deepspeed launcher and srun by their environment variables. ``device`` is ``auto``,
    ``cpu`` or ``cuda``. A process group that already exists is used as it is. Raises UsageError.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device: {device!r} is not known; use auto, cpu or cuda")
    place = _existing_group() if dist.is_initialized() else place_of(os.environ)
    chosen = _choose_device(device, place)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    else:
        # DeepSpeed reads it when first imported; unset, it would take a GPU that we were told to leave alone.
        os.environ["DS_ACCELERATOR"] = "cpu"
    # DeepSpeed takes its device from this variable and refuses to start without it.
    os.environ["LOCAL_RANK"] = str(place.local_rank if chosen.index is None else chosen.index)
    if not dist.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        if place.meeting is None:
            # A store inside the process: no port to collide on, no file to clean up, no MPI to discover.
            store = cast(Any, dist).HashStore()  # torch's stubs do not export it
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
        else:
            where = place.meeting
            dist.init_process_group(
                backend, init_method=where, rank=place.rank, world_size=place.size, timeout=COLLECTIVE_TIMEOUT
            )
    return World(place.rank, place.size, place.local_rank, chosen)


def stop() -> None:
    """Leave the process group; never raises. Without it gloo's threads may abort the process at exit."""
    with suppress(Exception):
        if dist.is_initialized():
            dist.destroy_process_group()


def place_of(environment: Mapping[str, str]) -> Place:
    """Rank, size, local rank and meeting address from a launcher's environment variables.

    srun is recognised by SLURM_STEP_NUM_TASKS: SLURM_NTASKS alone is also set in the batch script itself, where
    nobody started the other tasks. Raises UsageError naming a variable that is missing or not a number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if name not in environment:
                raise UsageError(f"{name} is not set although RANK is: start with torchrun, deepspeed or srun")
        rank = _number(environment, "RANK")
        local_rank = _number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else rank
        return Place(rank, _number(environment, "WORLD_SIZE"), local_rank, "env://")
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        size = _number(environment, "SLURM_STEP_NUM_TASKS")
        meeting = f"tcp://{_slurm_address(environment)}" if size > 1 else None
        rank = _number(environment, "SLURM_PROCID")
        return Place(rank, size, _number(environment, "SLURM_LOCALID"), meeting, by_slurm=True)
    return Place(0, 1, 0, None)


def _existing_group() -> Place:
    rank = dist.get_rank()
    return Place(rank, dist.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)), None)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise UsageError(f"{name}={value!r} is not a number: start with torchrun, deepspeed or srun")
    return int(value)


def _slurm_address(environment: Mapping[str, str]) -> str:
    """host:port of the first task; MASTER_ADDR and MASTER_PORT win, else the first node and a port from the job id."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    host = environment.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UsageError("SLURM_STEP_NODELIST is empty: set MASTER_ADDR to the name of the first node")
    if "MASTER_PORT" in environment:
        return f"{host}:{_number(environment, 'MASTER_PORT')}"
    # Two jobs on one node must not meet at one port; the range lies below the one Linux hands out by itself.
    return f"{host}:{15000 + _number(environment, 'SLURM_JOB_ID') % 15000}"


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: ``gpu[007-010,12],cpu1`` gives ``gpu007``."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def _choose_device(device: str, place: Place) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("device: cuda was asked for but PyTorch sees no GPU here; use device=cpu or mend the driver")
    count = torch.cuda.device_count()
    if place.local_rank < count:
        return torch.device("cuda", place.local_rank)
    if count == 1 and place.by_slurm:
        return torch.device("cuda", 0)  # srun --gpus-per-task=1 shows each task its own GPU, as number 0
    raise UsageError(f"local rank {place.local_rank} has no GPU: this machine shows {count}; start fewer processes")


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Set torch's, numpy's and random's global state from these four numbers alone, for drop path and mixing.

    Nothing of it needs to be saved: a resumed run draws what the uninterrupted one would have drawn.
    """
    words = np.random.SeedSequence((seed, step, micro, rank)).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002 - torchvision's and others' code draws from the old generator
    random.seed(int(words[3]))


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and the first SIGINT into a flag to be read at a step's end; a context manager.

    The handlers do nothing else: a collective or a save inside a handler could interleave with the step's own.
    A second SIGINT raises KeyboardInterrupt. Must be entered in the main thread (a rule of Python's). The end of the
    launcher counts as a signal too: SIGTERM to ``deepspeed`` ends only itself and leaves its processes running.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self._received = ""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._launchers = launchers()

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived, or the launcher is gone."""
        if not self._received and self._launchers and launchers() != self._launchers:
            self._received = "the launcher's end"
        return bool(self._received)

    @property
    def name(self) -> str:
        """Name of the first signal that arrived, such as ``SIGTERM``; empty while there is none."""
        return self._received

    def __enter__(self) -> StopSignal:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt


def launchers() -> tuple[int, ...]:
    """Process ids of torchrun, or of deepspeed's two, above this process; empty without them, or without /proc."""
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
        parent = int(status.rpartition(")")[2].split()[1])  # the fourth field; the second may hold anything
    return tuple(found)


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is torchrun's or deepspeed's own; a shell that was told to run one is not."""
    if Path(command[0]).name.startswith("python"):
        command = [word for word in command[1:] if not word.startswith("-")] or [""]
    starts = ("torch.distributed.", "deepspeed.launcher.")
    return Path(command[0]).name in ("torchrun", "deepspeed") or command[0].startswith(starts)


def mark_again(folder: Path) -> None:
    """Leave word in the run folder that the run was stopped and is to be started again."""
    (folder / AGAIN_FILE).write_text("stopped and saved; the same command goes on\n", encoding="utf-8")


def unmark_again(folder: Path) -> None:
    """Take the word back: the run is on again, or done."""
    (folder / AGAIN_FILE).unlink(missing_ok=True)


def agree(world: World, *values: float) -> tuple[float, ...]:
    """The largest of each value over all processes, by one collective: flags that must be acted on together.

    Values must be finite (a comparison with NaN is no agreement): pass ``float(not isfinite(loss))``, not the loss.
    """
    if world.size == 1:
        return tuple(float(value) for value in values)
    return tuple(_reduced(world, values, dist.ReduceOp.MAX))


def total(world: World, values: Sequence[float]) -> list[float]:
    """The sum of each value over all processes, in float64 by one collective."""
    if world.size == 1:
        return [float(value) for value in values]
    return _reduced(world, values, dist.ReduceOp.SUM)


def _reduced(world: World, values: Sequence[float], operation: Any) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, operation)
    return [float(value) for value in tensor.tolist()]


def gather(world: World, value: T) -> list[T]:
    """Every process's value, in the order of the ranks, on all of them; plain data only. Collective."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def say(world: World, text: str) -> None:
    """Print on rank 0 only, at once."""
    if world.rank == 0:
        print(text, flush=True)
