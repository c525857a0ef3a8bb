"""How fast this machine reads samples and computes: measured in a few seconds, for the time estimates of `plan`."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from video_swinv2.bench.measuring import matmul_flops_per_second, wall_seconds
from video_swinv2.bench.sample_clip import write_clip
from video_swinv2.config import Config
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.index import AnyEntry
from video_swinv2.data.manifest import Entry
from video_swinv2.data.mixture import Mixture
from video_swinv2.distributed.devices import product_dtype

MAX_SAMPLES = 8  # samples to read, after a first one that is not counted
MAX_SECONDS = 4.0  # after this time the pass over the samples ends early
# Which share of the speed of a large matrix product training reaches, by device and whether products are fp32: measured
# on a CPU with AMX (docs/performance.md) and on an H200 (docs/gpu.md). That of a GPU in fp32 is our assumption. For
# another device, measure with `bench train` and pass --tflops.
TRAINING_SHARE = {("cpu", True): 0.5, ("cpu", False): 0.13, ("cuda", False): 0.09, ("cuda", True): 0.35}


@dataclass(frozen=True)
class ReadingSpeed:
    """How fast one core reads samples, and which samples were measured."""

    per_second: float
    """Samples decoded and augmented per second."""
    read: str


def measure_reading(config: Config, entries: Sequence[AnyEntry] | Mixture | None) -> ReadingSpeed | None:
    """Measure how fast one core reads samples.

    entries: the run's own data. If it is None, because the data is not on this machine, a generated clip is read
    instead. For an image model there is no such substitute, and the result is None.
    """
    if entries is not None:
        dataset = SampleDataset(entries, config.data, config.augment, config.seed, None)  # type: ignore[arg-type]
        return ReadingSpeed(_samples_per_second(dataset), "of the run's own samples")
    if config.data.frames is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_clip(Path(folder) / "clip.mp4")
        clip = Entry("clip.mp4", f"{folder}/clip.mp4", 0)
        dataset = SampleDataset([clip], config.data, config.augment, config.seed, None)
        return ReadingSpeed(_samples_per_second(dataset), "of a generated clip, 10 s of 256x340")


def _samples_per_second(dataset: SampleDataset) -> float:
    """The median rate; the first sample is not counted, because libraries are loaded while it is read."""
    seconds = []
    began = time.perf_counter()
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:MAX_SAMPLES].tolist()
    # A data set with fewer samples is read several times, each time as another epoch with other clips and crops.
    for address in itertools.product(range(1 + MAX_SAMPLES // max(len(indices), 1)), indices):
        started = time.perf_counter()
        dataset[address]
        seconds.append(time.perf_counter() - started)
        if time.perf_counter() - began > MAX_SECONDS or len(seconds) > MAX_SAMPLES:
            break
    return 1 / statistics.median(seconds[1:] or seconds)


def training_flops_per_second(device: str, precision: str, processes: int) -> float | None:
    """The FLOP/s that training can be expected to reach on one device of this machine; None if there is no such device.

    It is a share of the measured speed of a large matrix product. On CPUs the processes divide the machine among them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return None
    where = torch.device(device)
    dtype = product_dtype(precision, where)
    speed = matmul_flops_per_second(where, lambda: wall_seconds(where), dtype)
    return speed * TRAINING_SHARE[device, dtype == torch.float32] / (processes if device == "cpu" else 1)
