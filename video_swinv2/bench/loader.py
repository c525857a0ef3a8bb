"""Benchmark of the training loader: clips per second for several numbers of workers, against a plain DataLoader.

The plain loader does what a first script would do: its Dataset opens the video for each clip, decodes it from the start
and returns normalised floats. Both loaders read the same videos, with random crops and flips. A second measurement
shows how the time of one clip divides into opening, decoding and augmenting.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from video_swinv2.bench.measuring import table_text, take_turns
from video_swinv2.bench.sample_clip import SECONDS, SIZE, write_clip
from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.loading import plan_batch, training_loader
from video_swinv2.data.manifest import Entry
from video_swinv2.data.sampling import random_clip, seeded
from video_swinv2.data.sources import labelled_manifest
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

GENERATED_VIDEOS = 16  # copies of one generated clip, so that different files are opened, as in a real run
TIMED_CLIPS = 8  # how many clips are timed step by step


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is read: `clips` clips of `frames` frames, which are `stride` frames apart and cropped to `pixels` squared.

    Before cropping, the short side of the frames is resized to `short_side` pixels, unless it is None. `batch` is the
    number of clips in a batch.
    """

    frames: int
    stride: int
    pixels: int
    short_side: int | None
    batch: int
    clips: int


class PlainClips(Dataset[Tensor]):
    """The plain Dataset: opens the video for each clip. Items are normalised floats, (3, T, H, W)."""

    def __init__(self, entries: Sequence[Entry], reading: Reading) -> None:
        self.entries, self.reading = entries, reading
        self.transform = v2.Compose(
            [v2.RandomResizedCrop(reading.pixels, scale=(0.08, 1.0), antialias=True), v2.RandomHorizontalFlip()]
        )

    def __len__(self) -> int:
        return self.reading.clips

    def __getitem__(self, index: int) -> Tensor:
        """A random clip of video `index`; past the end of the list, counting starts at the first video again."""
        reading = self.reading
        with av.open(str(self.entries[index % len(self.entries)].path)) as container:
            stream = container.streams.video[0]
            # Positions come from a generator seeded by the index, so each round reads the same clips.
            with seeded(0, index):
                wanted = random_clip(stream.frames, reading.frames, reading.stride)
            decoded: dict[int, Tensor] = {}  # frames by number: a short video is looped, so numbers may repeat
            # Without seeking: every frame from the start of the file to the last one wanted is decoded.
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    decoded[number] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if number >= max(wanted):
                    break
        clip = torch.stack([decoded[number] for number in wanted]).permute(0, 3, 1, 2)  # (T, 3, H, W)
        if reading.short_side is not None:
            clip = v2.functional.resize(clip, [reading.short_side], antialias=True)
        # (T, 3, H, W) -> (1, 3, T, H, W), as `normalise` takes batches, -> (3, T, H, W)
        return normalise(self.transform(clip).transpose(0, 1)[None], IMAGENET_MEAN, IMAGENET_STD)[0]


def bench_loader(data: Path | None, reading: Reading, workers: Sequence[int], *, rounds: int = 3) -> dict[str, Any]:
    """Clips per second of our loader and of the plain one for each number of workers; the two take turns.

    data: a prepared data set, or None to read copies of a generated clip. The first batch of each turn is not timed,
    because the workers start during it. Raises UsageError for fewer than two batches of clips.
    """
    if reading.clips < 2 * reading.batch:
        raise UsageError(f"--clips {reading.clips}: need at least two batches of {reading.batch}")
    with tempfile.TemporaryDirectory() as folder:
        entries = (
            _generate_videos(Path(folder))
            if data is None
            else labelled_manifest(_config(str(data), reading, 0), "train").entries
        )
        rows = []
        for count in workers:
            loaders = {
                "ours": partial(_our_rate, entries, reading, count),
                "plain": partial(_plain_rate, entries, reading, count),
            }
            # No warm-up round, because each rate already leaves out its first batch.
            rates = take_turns(loaders, rounds, warm_up_rounds=0)
            rows.append(
                {"workers": count, **{name: statistics.median(found) for name, found in rates.items()}, "all": rates}
            )
        return {
            "reading": dataclasses.asdict(reading),
            "data": f"a generated clip of {SECONDS} s, {SIZE[0]}x{SIZE[1]}" if data is None else str(data),
            "rounds": rounds,
            "rows": rows,
            "parts_ms": _milliseconds_per_step(entries, reading),
        }


def _config(source: str, reading: Reading, workers: int) -> DataConfig:
    """The data section of a config that describes `reading`."""
    return DataConfig(
        source=(source,),
        image_size=reading.pixels,
        frames=reading.frames,
        frame_stride=reading.stride,
        short_side=reading.short_side,
        workers=workers,
    )


def _generate_videos(folder: Path) -> list[Entry]:
    """GENERATED_VIDEOS copies of one generated video in `folder`, which is encoded once only."""
    first = folder / "0.mp4"
    write_clip(first)
    paths = [folder / f"{number}.mp4" for number in range(GENERATED_VIDEOS)]
    for path in paths[1:]:
        shutil.copyfile(first, path)
    return [Entry(path.name, path, 0) for path in paths]


def _our_rate(entries: Sequence[Entry], reading: Reading, workers: int) -> float:
    """Clips per second of the loader that `train` uses, with its default augmentation."""
    dataset = SampleDataset(entries, _config(str(entries[0].path), reading, workers), AugmentConfig(), 0, None)
    # One process, and one micro-batch per step: the entries are read in an endless stream of permutations.
    plan = plan_batch(reading.batch, reading.batch, 1)
    steps = reading.clips // reading.batch
    return _rate(training_loader(dataset, plan, seed=0, rank=0, first=0, last=steps, pin=False), reading.batch)


def _plain_rate(entries: Sequence[Entry], reading: Reading, workers: int) -> float:
    """Clips per second of the plain DataLoader."""
    dataset = PlainClips(entries, reading)
    return _rate(DataLoader(dataset, batch_size=reading.batch, num_workers=workers, drop_last=True), reading.batch)


def _rate(loader: Iterable[object], batch: int) -> float:
    """Clips per second of a loader with batches of `batch` clips; the first batch is not counted."""
    iterator = iter(loader)
    next(iterator)  # takes as long as the workers need to start
    started = time.perf_counter()
    batches = sum(1 for _ in iterator)
    return batches * batch / (time.perf_counter() - started)


def _milliseconds_per_step(entries: Sequence[Entry], reading: Reading) -> dict[str, float]:
    """Median milliseconds that each step of reading a clip takes in this process.

    `open` opens and indexes the video, `decode` decodes and resizes the frames, `augment` crops and flips them.
    """
    # The transform that the loader applies, and the reader that it uses, called one after the other.
    transform = SampleDataset(entries, _config(str(entries[0].path), reading, 0), AugmentConfig(), 0, None).transform
    seconds: dict[str, list[float]] = {"open": [], "decode": [], "augment": []}
    for number in range(TIMED_CLIPS):
        # Four readings of the clock delimit the three steps.
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


def loader_table(result: dict[str, Any]) -> str:
    """The result of `bench_loader` as text."""
    reading = result["reading"]
    size = f"{reading['frames']}x{reading['pixels']}x{reading['pixels']}, frame stride {reading['stride']}"
    heading = f"clips of {size}, batches of {reading['batch']}, from {result['data']}; medians of {result['rounds']}"
    rows = [
        [str(row["workers"]), f"{row['ours']:.2f}", f"{row['plain']:.2f}", f"{row['ours'] / row['plain']:.2f}"]
        for row in result["rows"]
    ]
    table = table_text(["workers", "clips/s", "a plain DataLoader", "ours / plain"], rows)
    steps = result["parts_ms"]
    total = sum(steps.values())
    shares = ", ".join(f"{name} {value:.0f} ms ({value / total:.0%})" for name, value in steps.items())
    return f"{heading}\n\n{table}\n\none clip on one core: {shares}"
