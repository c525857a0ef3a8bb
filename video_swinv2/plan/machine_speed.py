"""How fast this machine reads samples and computes, measured in a few seconds, for the estimates of `plan`."""

from __future__ import annotations

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

MAX_SAMPLES = 8  # samples to read
MAX_SECONDS = 4.0  # after which no further sample is begun
# The share of a large matrix product's speed that training reaches. On CPUs half: docs/results/model-speed.md measures
# 59 % on one thread. On GPUs this is an assumption of ours, which a measurement by `bench train` should replace.
TRAINING_SHARE = {"cpu": 0.5, "cuda": 0.35}


@dataclass(frozen=True)
class ReadingSpeed:
    """How many samples one core decodes and augments per second, and what was read to find out."""

    per_second: float
    read: str


def measure_reading(config: Config, entries: Sequence[AnyEntry] | Mixture | None) -> ReadingSpeed | None:
    """Read some of the run's own samples, or a generated clip if the data is not here; None for images that are not."""
    if entries is not None:
        dataset = SampleDataset(entries, config.data, config.augment, config.seed, None)  # type: ignore[arg-type]
        return ReadingSpeed(_samples_per_second(dataset), "of the run's own samples")
    if config.data.frames is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_clip(Path(folder) / "clip.mp4")
        clip = Entry("clip.mp4", Path(folder) / "clip.mp4", 0)
        dataset = SampleDataset([clip], config.data, config.augment, config.seed, None)
        return ReadingSpeed(_samples_per_second(dataset), "of a generated clip, 10 s of 256x340")


def _samples_per_second(dataset: SampleDataset) -> float:
    """By the median; the first sample, during which libraries are loaded, is not counted."""
    seconds = []
    began = time.perf_counter()
    indices = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:MAX_SAMPLES].tolist()
    # A small data set is read again under another epoch: other clips and crops of the same files.
    for epoch in range(1 + MAX_SAMPLES // max(len(indices), 1)):
        for index in indices:
            started = time.perf_counter()
            dataset[(epoch, index)]
            seconds.append(time.perf_counter() - started)
            if time.perf_counter() - began > MAX_SECONDS or len(seconds) > MAX_SAMPLES:
                break
    return 1 / statistics.median(seconds[1:] or seconds)


def training_flops_per_second(device: str, precision: str, processes: int) -> float | None:
    """FLOP/s that training is expected to reach on one device of this machine; None if it has no such device.

    On CPUs the processes share the machine.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return None
    where = torch.device(device)
    speed = matmul_flops_per_second(where, lambda: wall_seconds(where), product_dtype(precision, where))
    return speed * TRAINING_SHARE[device] / (processes if device == "cpu" else 1)
