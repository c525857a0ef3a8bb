"""What the benchmarks measure with: clocks, peak memory, and the speed no product of matrices exceeds here."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from video_swinv2.memory import peak_memory_bytes


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds: of this process on a CPU, which others hardly change; of the wall on a GPU, when its work is done."""
    return time.process_time if device.type == "cpu" else lambda: wall(device)


def wall(device: torch.device) -> float:
    """Seconds of the wall, when the work given to the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def product_speed(device: torch.device, clock: Callable[[], float], dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of a large matrix product: what no model of products can exceed here."""
    # On GPUs small ones would measure the launch.
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        started = clock()
        a @ b
        best = min(best, clock() - started)
    return 2 * side**3 / best


def peak_of(work: Callable[[], None], device: torch.device) -> int:
    """Bytes that `work` takes at most beyond what is held before it."""
    before = start_peak(device)
    work()
    return read_peak(device) - before


def start_peak(device: torch.device) -> int:
    """Set the high-water mark of memory back; the bytes held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return peak_memory_bytes()


def read_peak(device: torch.device) -> int:
    """The most bytes held since `start_peak`: allocated on a GPU, resident in this process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory_bytes()
