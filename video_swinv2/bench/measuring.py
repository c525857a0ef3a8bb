"""The measuring tools of all benchmarks: clocks, taking turns, peak memory, the speed of matrix products, tables.

Contenders are compared within rounds in which each of them runs once, and medians over the rounds are reported, because
a machine's speed drifts while a benchmark runs.
"""

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
    """A clock in seconds for work on `device`: CPU time of this process, or wall time for a GPU.

    CPU time hardly depends on the other programs of the machine. It says nothing about a GPU, for which the process
    mostly waits, so there the clock reads wall time once the queued work is done.
    """
    return time.process_time if device.type == "cpu" else lambda: wall_seconds(device)


def wall_seconds(device: torch.device) -> float:
    """Wall time in seconds, read after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def elapsed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """How many seconds `work` takes, by `clock`."""
    started = clock()
    work()
    return clock() - started


def take_turns(
    contenders: Mapping[str, Callable[[], T]], rounds: int, *, warm_up_rounds: int = 1
) -> dict[str, list[T]]:
    """Run all contenders once in each of `rounds` rounds; returns the results of each contender, in order of rounds.

    The speed of a machine changes over minutes (heat, other programs). Within a round all contenders meet the same
    conditions, so the ratio of their times is fair even while the times themselves drift. Before that come
    `warm_up_rounds` whose results are dropped, because caches are cold and libraries are loaded then.
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(warm_up_rounds + rounds):
        for name, run in contenders.items():
            result = run()
            if number >= warm_up_rounds:
                results[name].append(result)
    return results


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Divide the figures of two contenders round by round, and return the median of these ratios."""
    return statistics.median(top / bottom for top, bottom in zip(numerators, denominators, strict=True))


def matmul_flops_per_second(
    device: torch.device, clock: Callable[[], float], dtype: torch.dtype = torch.float32
) -> float:
    """The best rate of five large matrix products, in FLOP/s: an upper limit for models that consist of such products.

    The FLOPs of a model divided by this rate are its *floor*: the shortest time that it can take on this machine.
    """
    # On a GPU, small products would measure the time of launching kernels instead.
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best_seconds = min(elapsed(lambda: a @ b, clock) for _ in range(5))
    return 2 * side**3 / best_seconds  # side^3 multiply-accumulates, two operations each


def peak_bytes_of(work: Callable[[], None], device: torch.device) -> int:
    """The peak bytes while `work` runs, beyond those that were held before."""
    before = reset_peak_bytes(device)
    work()
    return peak_bytes(device) - before


def reset_peak_bytes(device: torch.device) -> int:
    """Reset the record of the peak to the present; returns the bytes that are held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    # Writing 5 sets VmHWM of this process, its peak resident size, to its current resident size (man 5 proc).
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_memory_bytes()


def peak_bytes(device: torch.device) -> int:
    """The peak bytes since `reset_peak_bytes`: allocated by tensors on a GPU, resident in this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()


def run_in_fresh_process(work: Callable[..., Any], *arguments: object, device: str) -> Any:
    """Call `work(*arguments)` in a fresh process and return its result. Arguments and result are pickled.

    Only in a fresh process is the memory peak that of `work` alone. On a CPU the process may allocate at most 80 % of
    the memory that is free now. If the work needs more, it gets an error, so that the kernel need not kill programs.
    """
    # "spawn" and not "fork": a forked process would start with this one's memory, and cannot use CUDA.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run_limited, work, arguments, device).result()


def _run_limited(work: Callable[..., Any], arguments: tuple[object, ...], device: str) -> Any:
    free = free_memory_bytes()
    if device == "cpu" and free is not None:
        # RLIMIT_AS limits the address space, which is larger than the memory in use. So the 80 % are added to its
        # present size, the first field of statm, in pages.
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(0.8 * free), resource.RLIM_INFINITY))
    return work(*arguments)


def table_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, which reads well on a terminal and can be pasted into documentation.

    The first column is left-aligned. The others hold figures and are right-aligned.
    """
    table = Table(box=box.MARKDOWN)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Rich fits a table to the width of its console. A wide one keeps each row on one line, even on a narrow terminal.
    text = io.StringIO()
    Console(file=text, width=1000, color_system=None, markup=False).print(table)
    return "\n".join(line.strip() for line in text.getvalue().splitlines() if line.strip())
