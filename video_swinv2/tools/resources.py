"""Checks of `doctor` for disk, shared memory, open files and memory, sized from the run that is planned."""

from __future__ import annotations

import math
import resource
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from video_swinv2.config import Config
from video_swinv2.data.loading import PREFETCH
from video_swinv2.memory import free_memory_bytes
from video_swinv2.plan.loader_memory import LOADERS, loader_bytes, micro_batch_bytes, process_bytes, process_files
from video_swinv2.tools.findings import Finding, State
from video_swinv2.training.throughput import usable_cores

# A fault if there is less than the first, a note if there is less than the second. A checkpoint of the base model takes
# 1 GB. By default a run keeps two, and has a third while that is written.
DISK_FAULT_BYTES, DISK_NOTE_BYTES = 2e9, 50e9


@dataclass(frozen=True)
class PlannedRun:
    """The run for which the machine is checked."""

    config: Config
    processes: int
    """On this machine."""
    origin: str
    """Where the configuration comes from, in words."""

    @property
    def micro_batch(self) -> int:
        """The most samples of a micro-batch.

        There may be fewer if the batch has to be divided among more machines, or if it is planned when the run starts.
        """
        share = math.ceil(self.config.optim.batch / self.processes)
        return min(self.config.optim.micro_batch or share, share)

    def __str__(self) -> str:
        data = self.config.data
        clip = f"{data.frames or 1} frames of {data.image_size}"
        return (
            f"{self.processes} process(es) x {data.workers} workers x {PREFETCH} batches of {self.micro_batch} x "
            f"{clip} pixels ({self.origin})"
        )


def check_disk(folder: Path) -> Finding:
    """Whether `folder`, or the nearest existing folder above it, is writable and has enough free space."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    # Writing a file is the only reliable test: permissions say nothing about read-only mounts.
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding(
            "disk", "fault", f"{existing} is not writable ({error.strerror})", "choose another folder with out="
        )
    free = shutil.disk_usage(existing).free
    text = f"{free / 1e9:.0f} GB free in {existing}" if free >= 1e9 else f"{free / 1e6:.0f} MB free in {existing}"
    state: State = "fault" if free < DISK_FAULT_BYTES else "note" if free < DISK_NOTE_BYTES else "ok"
    return Finding("disk", state, text, "" if state == "ok" else "free some space, or choose another folder with out=")


def check_shared_memory(folder: Path, run: PlannedRun) -> Finding:
    """Whether there is enough shared memory, through which loader workers pass their batches.

    A fault if the loaders for training alone may not fit, a note if those for validation may not fit beside them.
    """
    if not folder.is_dir():
        return Finding("shared memory", "note", f"no {folder}", "if loader workers fail, use data.workers=0")
    data, micro_batch = run.config.data, run.micro_batch
    needed = run.processes * loader_bytes(data, micro_batch)
    free = shutil.disk_usage(folder).free
    state: State = "fault" if free < needed else "note" if free < LOADERS * needed else "ok"
    sizes = f"{needed / 1e9:.2f} GB needed, {LOADERS} times that while validating"
    text = f"{free / 1e9:.2f} GB free in {folder}; {sizes}: {run}"
    # The most workers of each process whose batches fit, from (workers * PREFETCH + 1) * bytes * processes <= free.
    batches = free / LOADERS / run.processes / micro_batch_bytes(data, micro_batch)
    fitting = max(0, math.floor((batches - 1) / PREFETCH))
    size = math.ceil(LOADERS * needed / 2**30)
    fix = f"start the container with --shm-size={size}g, or use data.workers={fitting}, or a smaller optim.micro_batch"
    return Finding("shared memory", state, text, "" if state == "ok" else fix)


def check_open_files(run: PlannedRun) -> Finding:
    """Whether enough files may be open at once: loader workers use pipes, shared batches and videos."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = process_files(run.config.data, run.processes)
    if soft == resource.RLIM_INFINITY:
        return Finding("open files", "ok", f"no limit; {needed} needed")
    text = f"at most {soft}; {needed} needed by a process with {run.config.data.workers} workers"
    if soft >= needed:
        return Finding("open files", "ok", text)
    # A user may raise the soft limit up to the hard one, which only an administrator can raise.
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return Finding("open files", "fault", text, f"ulimit -n {needed}")
    return Finding(
        "open files",
        "fault",
        text,
        f"{hard} is the hard limit: ask the administrator for {needed}, or use fewer data.workers",
    )


def check_memory(run: PlannedRun) -> Finding:
    """Whether the host has enough free memory; also reports the number of usable cores."""
    needed = run.processes * process_bytes(run.config.data, run.micro_batch)
    free = free_memory_bytes()
    if free is None:
        return Finding("memory", "ok", f"unknown, {usable_cores()} cores; {needed / 1e9:.1f} GB needed")
    text = (
        f"{free / 1e9:.1f} GB free, {usable_cores()} cores; {run.processes} process(es) with {run.config.data.workers} "
        f"workers each need {needed / 1e9:.1f} GB"
    )
    fix = "end other programs, or use fewer data.workers or a smaller optim.micro_batch"
    return Finding("memory", "ok", text) if free >= needed else Finding("memory", "fault", text, fix)
