"""What every benchmark measures with: clocks, contenders taking turns, peak memory, the machine's limit, and tables."""

from __future__ import annotations

import io
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from video_swinv2.memory import free_memory_bytes, peak_memory_bytes

T = TypeVar("T")


def clock_for(device: torch.device) -> Callable[[], float]:
    """A clock in seconds: CPU time of this process on a CPU, wall time after the queued work on a GPU.

    CPU time hardly depends on what else the machine does. With a GPU the process mostly waits, so wall time it is.
    """
    return time.process_time if device.type == "cpu" else lambda: wall_seconds(device)


def wall_seconds(device: torch.device) -> float:
    """Wall time in seconds, read after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def elapsed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """The seconds by `clock` that `work` takes."""
    started = clock()
    work()
    return clock() - started


def take_turns(
    contenders: Mapping[str, Callable[[], T]], rounds: int, *, warm_up_rounds: int = 1
) -> dict[str, list[T]]:
    """Run the contenders one after the other, `rounds` times over; what each returned, by round.

    A machine slows down and speeds up over minutes (heat, other programs). Taking turns exposes all contenders to the
    same conditions, so the ratio within a round is fair even where the times themselves drift. The results of the first
    `warm_up_rounds` are dropped: caches are cold and libraries load then.
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(warm_up_rounds + rounds):
        for name, run in contenders.items():
            result = run()
            if number >= warm_up_rounds:
                results[name].append(result)
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over the rounds of one contender's figure divided by another's in the same round."""
    return statistics.median(top / bottom for top, bottom in zip(numerators, denominators, strict=True))


def matmul_flops_per_second(
    device: torch.device, clock: Callable[[], float], dtype: torch.dtype = torch.float32
) -> float:
    """The best rate of five large matrix products, in FLOP/s: a limit that no model of matrix products exceeds here.

    A model's FLOPs divided by this rate are its *floor*, the least time it can take on this machine.
    """
    # On a GPU, small products would measure the launch.
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best_seconds = min(elapsed(lambda: a @ b, clock) for _ in range(5))
    return 2 * side**3 / best_seconds


def peak_bytes_of(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes that `work` holds at any time, beyond those held before it."""
    before = reset_peak_bytes(device)
    work()
    return peak_bytes(device) - before


def reset_peak_bytes(device: torch.device) -> int:
    """Reset the high-water mark of memory; returns the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Writing 5 resets VmHWM of this process (man 5 proc).
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_memory_bytes()


def peak_bytes(device: torch.device) -> int:
    """The most bytes held since `reset_peak_bytes`: allocated on a GPU, resident in this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def run_in_fresh_process(work: Callable[..., Any], *arguments: object, device: str) -> Any:
    """The result of `work(*arguments)` in a process of its own, whose memory peak is therefore that of `work` alone.

    On a CPU the process gets at most 80 % of the memory that is free now, so that a case that needs more raises an
    error there instead of making the system kill programs.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run_limited, work, arguments, device).result()


def _run_limited(work: Callable[..., Any], arguments: tuple[object, ...], device: str) -> Any:
    free = free_memory_bytes()
    if device == "cpu" and free is not None:
        # The limit is on address space; the first field of statm is this process's, in pages.
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(0.8 * free), resource.RLIM_INFINITY))
    return work(*arguments)


def table_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as text, laid out by rich as Markdown, so that it reads well on a terminal and pastes into a page.

    The first column is left-aligned, the others, which hold figures, right-aligned.
    """
    table = Table(box=box.MARKDOWN)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Rich fits a table to the width of its console; a wide one keeps rows whole, even on a narrow terminal.
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None, markup=False).print(table)
    return "\n".join(line.strip() for line in text.getvalue().splitlines() if line.strip())
