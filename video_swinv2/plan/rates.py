"""How fast this machine computes and reads, measured in a few seconds, for the estimates of `plan`."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from video_swinv2.bench.measuring import product_speed, wall
from video_swinv2.bench.sample_clip import write_clip
from video_swinv2.config import Config
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.index import Member
from video_swinv2.data.manifest import Entry
from video_swinv2.data.mixture import Mixture
from video_swinv2.distributed.devices import product_dtype

SAMPLES = 8  # read at most
SECONDS = 4.0  # in which no new one is begun
# Of the speed of a large product, what training reaches: half on CPUs (docs/model.md, 59 % on one thread); for GPUs an
# assumption of ours that `bench train` replaces by a measurement.
REACHED = {"cpu": 0.5, "cuda": 0.35}


@dataclass(frozen=True)
class ReadRate:
    """Samples that one core reads per second, decoded and augmented, and what was read."""

    per_second: float
    read: str


def read_rate(config: Config, entries: Sequence[Entry | Member] | Mixture | None) -> ReadRate | None:
    """Of the run's own samples or, where they are not here, of a clip made for it; None for absent images."""
    if entries is not None:
        dataset = SampleDataset(entries, config.data, config.augment, config.seed, None)  # type: ignore[arg-type]
        return ReadRate(_measure(dataset), "of the run's own samples")
    if config.data.frames is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_clip(Path(folder) / "clip.mp4")
        clip = Entry("clip.mp4", Path(folder) / "clip.mp4", 0)
        dataset = SampleDataset([clip], config.data, config.augment, config.seed, None)
        return ReadRate(_measure(dataset), "of a clip made for it, 10 s of 256x340")


def _measure(dataset: SampleDataset) -> float:
    """Samples per second, by the median; the first, which loads libraries, does not count."""
    seconds = []
    began = time.perf_counter()
    places = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))[:SAMPLES].tolist()
    for epoch in range(1 + SAMPLES // max(len(places), 1)):
        for place in places:
            started = time.perf_counter()
            dataset[(epoch, place)]
            seconds.append(time.perf_counter() - started)
            if time.perf_counter() - began > SECONDS or len(seconds) > SAMPLES:
                break
    return 1 / statistics.median(seconds[1:] or seconds)


def device_speed(device: str, precision: str, processes: int) -> float | None:
    """FLOP/s that training is expected to reach on one device here; None where there is no such device.

    On CPUs the processes share the machine.
    """
    if device == "cuda" and not torch.cuda.is_available():
        return None
    where = torch.device(device)
    speed = product_speed(where, lambda: wall(where), product_dtype(precision, where))
    return speed * REACHED[device] / (processes if device == "cpu" else 1)
