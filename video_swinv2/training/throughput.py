"""The speed of a run and what limits it: samples per second, TFLOP/s, memory, and the time spent waiting for data.

If the loader is the bottleneck, `loader_advice` says which setting to change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from video_swinv2.config import Config
from video_swinv2.distributed.devices import computing_precision
from video_swinv2.distributed.world import World
from video_swinv2.memory import peak_memory_bytes

Item = TypeVar("Item")

# Peak TFLOP/s of dense matrix products (no sparsity) in bf16 with fp32 accumulation, for V100 and T4 in fp16, from
# NVIDIA's data sheets. By the whole name that the driver reports, without "NVIDIA", which old drivers omit: variants of
# a product differ by up to a half, and a slice of one ("... MIG 1g.10gb") has a fraction. A device that is not listed
# has no known peak.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200 480GB": 989.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100 80GB HBM3": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100-SXM4-40GB": 312.0,
    "A100-SXM4-80GB": 312.0,
    "A100-PCIE-40GB": 312.0,
    "A100 80GB PCIe": 312.0,
    "A800-SXM4-80GB": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "Tesla V100-SXM2-16GB": 125.0,
    "Tesla V100-SXM2-32GB": 125.0,
    "Tesla V100-PCIE-16GB": 112.0,
    "Tesla V100-PCIE-32GB": 112.0,
    "Tesla T4": 65.0,
    "RTX A6000": 154.8,
    "GeForce RTX 3090": 71.0,
    "GeForce RTX 4090": 165.2,
    "GeForce RTX 5090": 209.5,
}
STARVED_SHARE = 0.2  # from this share of the time spent waiting for samples, the loader counts as the bottleneck
ADVISE_EVERY_SECONDS = 600.0


class WaitTimer:
    """Measures how long the consumer of an iterable waits for its items, in seconds altogether."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def iterate(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield every item of `items`; the time that it takes to get each of them is added to `seconds`."""
        # Not a for loop, because only the call of next() is to be timed, not what the consumer does between two items.
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item


class Throughput:
    """The speed of this process's steps, per log interval and overall; earlier parts of a resumed run are not included.

    flops_per_sample: the operations of one sample's forward and backward pass, from `flops.training_flops`.
    """

    def __init__(self, flops_per_sample: float, config: Config, world: World) -> None:
        self._config, self._world = config, world
        # Samples are counted over all processes, while TFLOP/s are reported per device: hence the division.
        self._tflop_per_sample_and_device = flops_per_sample / 1e12 / world.size
        self._peak_tflops = peak_tflops(world, computing_precision(config.engine.precision, world.device))
        self._samples = self._seconds = self._waited_seconds = 0.0
        self._last: dict[str, float] = {}
        self._intervals = 0
        # In seconds of training time; this value lets the first advice come at once.
        self._advised_at = -ADVISE_EVERY_SECONDS

    def add_interval(self, samples: float, seconds: float, waited_seconds: float) -> dict[str, float]:
        """Add a log interval and return its figures.

        samples: taken by all processes together. waited_seconds: the part of `seconds` spent waiting for samples.
        """
        self._intervals += 1
        self._samples += samples
        self._seconds += seconds
        self._waited_seconds += waited_seconds
        self._last = self._figures(samples, seconds, waited_seconds)
        return self._last

    def overall(self) -> dict[str, float]:
        """The figures of all intervals together."""
        return self._figures(self._samples, self._seconds, self._waited_seconds)

    def advice(self, slowest: tuple[float, str]) -> str | None:
        """`loader_advice` on the last interval, at most once in ten minutes of training; None if there is none.

        The first interval never gets advice, because the loader's workers start in it. slowest: (seconds, file).
        """
        if self._intervals < 2 or self._seconds - self._advised_at < ADVISE_EVERY_SECONDS:
            return None
        text = loader_advice(self._config, self._last["data_wait"], slowest)
        if text:
            self._advised_at = self._seconds
        return text

    def _figures(self, samples: float, seconds: float, waited_seconds: float) -> dict[str, float]:
        """The figures by the names that follow `speed/` in metrics.jsonl; `utilisation` only if the peak is known."""
        rate = samples / seconds if seconds else 0.0
        figures = {
            "samples_per_second": rate,
            "data_wait": min(waited_seconds / seconds, 1.0) if seconds else 0.0,
            "tflops_per_device": rate * self._tflop_per_sample_and_device,
            "memory_gb": peak_memory_gb(self._world),
        }
        if self._peak_tflops:
            figures["utilisation"] = figures["tflops_per_device"] / self._peak_tflops
        return figures


def peak_tflops(world: World, precision: str) -> float | None:
    """The device's peak in TFLOP/s for bf16 or fp16 products; None for an unknown GPU, on CPUs and in fp32."""
    if world.device.type != "cuda" or precision == "fp32":
        return None
    return PEAK_TFLOPS.get(torch.cuda.get_device_name(world.device).removeprefix("NVIDIA "))


def peak_memory_gb(world: World) -> float:
    """The peak memory of this process so far, in GB (10^9 bytes): of tensors on its GPU, or resident on a CPU."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    return peak_memory_bytes() / 1e9


def usable_cores() -> int:
    """The number of CPU cores that this process may use; cluster schedulers often allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_advice(config: Config, waiting: float, slowest: tuple[float, str]) -> str | None:
    """One line that says what to change if the device has to wait for the loader; None if the loader keeps up.

    waiting: the share of the time spent waiting for samples. slowest: seconds and name of the slowest file so far.
    """
    if waiting < STARVED_SHARE:
        return None
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine; torchrun sets it
    workers = config.data.workers
    fix = f"raise data.workers from {workers} ({usable_cores()} cores here)"
    # Each process starts its own workers. Once they occupy all cores, more of them would not read any faster.
    if workers * processes_here >= usable_cores():
        fix = (
            f"{workers * processes_here} workers keep all {usable_cores()} cores busy, so prepare the clips smaller "
            "(python -m data_prep prepare --short-side), or set augment.repeats=2"
        )
    seconds, name = slowest
    return f"data: {waiting:.0%} of the time is spent waiting for samples; {fix}; slowest file: {seconds:.2f} s {name}"
