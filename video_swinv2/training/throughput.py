"""How fast a run is and what holds it up: samples per second, share of the device's peak, memory, waiting for data."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch

from video_swinv2.config import Config
from video_swinv2.distributed.world import World
from video_swinv2.memory import peak_memory_bytes

Item = TypeVar("Item")

# Dense bf16 (V100: fp16) matrix products without sparsity, TFLOP/s, from NVIDIA's data sheets. The first name that
# occurs in the device's name wins, so the special case stands before the general one.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "RTX 4090": 165.0,
}
STARVED_SHARE = 0.2  # share of the time spent waiting for samples above which the loader is the bottleneck
ADVISE_EVERY_SECONDS = 600.0


class WaitTimer:
    """Adds up the seconds that the consumer of an iterable waits for its items."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def iterate(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield every item of `items`, timing each wait."""
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
    """Speed of the steps since this process was started, per log interval and overall.

    flops_per_sample: operations of a sample's forward and backward pass, see `flops.training_flops`.
    """

    def __init__(self, flops_per_sample: float, config: Config, world: World) -> None:
        self._config, self._world = config, world
        # Samples are counted over all processes, but TFLOP/s are reported per device.
        self._tflop_per_sample_and_device = flops_per_sample / 1e12 / world.size
        self._peak_tflops = peak_tflops(world, config.engine.precision)
        self._samples = self._seconds = self._waited_seconds = 0.0
        self._last: dict[str, float] = {}
        self._intervals = 0
        self._advised_at = -ADVISE_EVERY_SECONDS

    def add_interval(self, samples: float, seconds: float, waited_seconds: float) -> dict[str, float]:
        """Count a log interval in which all processes together took `samples`; returns its figures."""
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
        """`loader_advice` on the last interval, at most once in ten minutes; `slowest` is (seconds, file).

        Never on the first interval, in which the loader's workers start.
        """
        if self._intervals < 2 or self._seconds - self._advised_at < ADVISE_EVERY_SECONDS:
            return None
        text = loader_advice(self._config, self._last["data_wait"], slowest)
        if text:
            self._advised_at = self._seconds
        return text

    def _figures(self, samples: float, seconds: float, waited_seconds: float) -> dict[str, float]:
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
    """The device's peak for bf16 or fp16 products, TFLOP/s; None if unknown, on CPUs and in fp32."""
    if world.device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory_gb(world: World) -> float:
    """The most memory this process has held so far, GB: of tensors on its GPU, or else in host memory altogether."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    return peak_memory_bytes() / 1e9


def usable_cores() -> int:
    """CPU cores that this process may use; cluster schedulers often allow fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_advice(config: Config, waiting: float, slowest: tuple[float, str]) -> str | None:
    """What to do if the loader starves the device, in one line; None if it keeps up.

    waiting: the share of the time spent waiting for samples. slowest: seconds and name of the slowest file so far.
    """
    if waiting < STARVED_SHARE:
        return None
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine; torchrun sets it
    workers = config.data.workers
    fix = f"raise data.workers from {workers} ({usable_cores()} cores here)"
    if workers * processes_here >= usable_cores():
        fix = (
            f"{workers * processes_here} workers keep all {usable_cores()} cores busy, so prepare the clips smaller "
            "(python -m data_prep prepare --short-side), or set augment.repeats=2"
        )
    seconds, name = slowest
    return f"data: {waiting:.0%} of the time is spent waiting for samples; {fix}; slowest file: {seconds:.2f} s {name}"
