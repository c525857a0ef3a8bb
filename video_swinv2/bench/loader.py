"""Clips per second of the loader by number of workers, next to a plain DataLoader, and what a clip's time goes into.

The plain one is what a first script does: a Dataset that opens a video for each clip, decodes from its start, and gives
normalised floats. Both get the same videos, crops and flips.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from video_swinv2.bench.sample_clip import SECONDS, SIZE, write_clip
from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data.datasets import SampleDataset, labelled
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.loading import plan_batch, training_loader
from video_swinv2.data.manifest import Entry
from video_swinv2.data.sampling import random_clip, seeded
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError
from video_swinv2.weights.store import IMAGENET_MEAN, IMAGENET_STD

VIDEOS = 16  # copies of the made clip, so that files are opened as in earnest
TIMED = 8  # clips whose reading is taken apart


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read: `clips` of `frames`, `stride` apart, cut to `pixels` square from videos scaled to `short_side`."""

    frames: int
    stride: int
    pixels: int
    short_side: int | None
    batch: int
    clips: int


class PlainClips(Dataset[Tensor]):
    """The plain way: one video opened for each clip; (3, T, H, W) float, normalised."""

    def __init__(self, entries: Sequence[Entry], reading: Reading) -> None:
        self.entries, self.reading = entries, reading
        self.transform = v2.Compose(
            [v2.RandomResizedCrop(reading.pixels, scale=(0.08, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return self.reading.clips

    def __getitem__(self, index: int) -> Tensor:
        """A random clip of video `index`."""
        reading = self.reading
        with av.open(str(self.entries[index % len(self.entries)].path)) as container:
            stream = container.streams.video[0]
            with seeded(0, index):
                wanted = random_clip(stream.frames, reading.frames, reading.stride)
            kept: dict[int, Tensor] = {}
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    kept[number] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if number >= max(wanted):
                    break
        clip = torch.stack([kept[number] for number in wanted]).permute(0, 3, 1, 2)
        if reading.short_side is not None:
            clip = v2.functional.resize(clip, [reading.short_side], antialias=True)
        return normalise(self.transform(clip).transpose(0, 1)[None], IMAGENET_MEAN, IMAGENET_STD)[0]


def bench_loader(data: Path | None, reading: Reading, workers: Sequence[int], *, rounds: int = 3) -> dict[str, Any]:
    """Clips per second for each number of workers, ours and the plain way in turns; UsageError for too few clips.

    `data` is a prepared data set; without one, copies of a clip made for it are read. The first batch, which starts the
    workers, does not count.
    """
    if reading.clips < 2 * reading.batch:
        raise UsageError(f"--clips {reading.clips}: give at least two batches of {reading.batch}")
    with tempfile.TemporaryDirectory() as folder:
        entries = _made(Path(folder)) if data is None else labelled(_config(str(data), reading, 0), "train").entries
        rows = []
        for count in workers:
            rates: dict[str, list[float]] = {"ours": [], "plain": []}
            for _ in range(rounds):
                rates["ours"].append(_ours(entries, reading, count))
                rates["plain"].append(_plain(entries, reading, count))
            rows.append(
                {"workers": count, **{name: statistics.median(found) for name, found in rates.items()}, "all": rates}
            )
        return {
            "reading": dataclasses.asdict(reading),
            "data": f"a made clip of {SECONDS} s, {SIZE[0]}x{SIZE[1]}" if data is None else str(data),
            "rounds": rounds,
            "rows": rows,
            "parts_ms": _parts(entries, reading),
        }


def _config(source: str, reading: Reading, workers: int) -> DataConfig:
    return DataConfig(
        source=(source,),
        image_size=reading.pixels,
        frames=reading.frames,
        frame_stride=reading.stride,
        short_side=reading.short_side,
        workers=workers,
    )


def _made(folder: Path) -> list[Entry]:
    first = folder / "0.mp4"
    write_clip(first)
    paths = [folder / f"{number}.mp4" for number in range(VIDEOS)]
    for path in paths[1:]:
        shutil.copyfile(first, path)
    return [Entry(path.name, path, 0) for path in paths]


def _ours(entries: Sequence[Entry], reading: Reading, workers: int) -> float:
    dataset = SampleDataset(entries, _config("", reading, workers), AugmentConfig(), 0, None)
    plan = plan_batch(reading.batch, reading.batch, 1)
    steps = reading.clips // reading.batch
    return _rate(training_loader(dataset, plan, seed=0, rank=0, first=0, last=steps, pin=False), reading.batch)


def _plain(entries: Sequence[Entry], reading: Reading, workers: int) -> float:
    dataset = PlainClips(entries, reading)
    return _rate(DataLoader(dataset, batch_size=reading.batch, num_workers=workers, drop_last=True), reading.batch)


def _rate(loader: Iterable[object], batch: int) -> float:
    """Clips per second after the first batch."""
    iterator = iter(loader)
    next(iterator)
    started = time.perf_counter()
    batches = sum(1 for _ in iterator)
    return batches * batch / (time.perf_counter() - started)


def _parts(entries: Sequence[Entry], reading: Reading) -> dict[str, float]:
    """Milliseconds of a clip on one core: opening and indexing the video, decoding, cropping and flipping."""
    transform = SampleDataset(entries, _config("", reading, 0), AugmentConfig(), 0, None).transform
    seconds: dict[str, list[float]] = {"open": [], "decode": [], "augment": []}
    for number in range(TIMED):
        times = [time.perf_counter()]
        with VideoReader(entries[number % len(entries)].path) as video, seeded(0, number):
            times.append(time.perf_counter())
            pixels = video.frames(random_clip(len(video), reading.frames, reading.stride), reading.short_side)
            times.append(time.perf_counter())
            transform(pixels)
            times.append(time.perf_counter())
        for name, taken in zip(seconds, np.diff(times).tolist(), strict=True):
            seconds[name].append(taken)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def show_loader(result: dict[str, Any]) -> str:
    """The result of `bench_loader` for people, as a Markdown table."""
    reading = result["reading"]
    size = f"{reading['frames']}x{reading['pixels']}x{reading['pixels']}, every {reading['stride']}. frame"
    lines = [
        f"clips of {size}, batches of {reading['batch']}, from {result['data']}; medians of {result['rounds']}",
        "",
        "| workers | clips/s | a plain DataLoader | ours / plain |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['workers']} | {row['ours']:.2f} | {row['plain']:.2f} | {row['ours'] / row['plain']:.2f} |"
        )
    parts = result["parts_ms"]
    whole = sum(parts.values())
    shares = ", ".join(f"{name} {value:.0f} ms ({value / whole:.0%})" for name, value in parts.items())
    return "\n".join([*lines, "", f"one clip on one core: {shares}"])
