"""How costs grow: each quantity is varied alone, over small sizes, and the exponent of its growth is fitted.

A cost that grows as size^e is a straight line of slope e in logarithmic scales. The exponent is therefore that of a
least-squares line through the logarithms. It says nothing about sizes outside those measured.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from video_swinv2.bench.measuring import (
    elapsed,
    peak_bytes_of,
    run_in_fresh_process,
    table_text,
    take_turns,
)
from video_swinv2.bench.preparation import measure_start
from video_swinv2.bench.sample_clip import write_clip
from video_swinv2.bench.train import TrainingSetup, Workload, run_setup
from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.index import Entry
from video_swinv2.data.loading import plan_batch, training_loader
from video_swinv2.data.manifest import read_manifest
from video_swinv2.data.mixture import Mixture, MixtureSource
from video_swinv2.models.variants import create_model

MODEL = "swinv2_tiny"
CLIP_SECONDS = 3.0
CLASSES = 400  # of the lists
PARTS = ("model", "reading", "processes", "lists")


@dataclass(frozen=True)
class Growth:
    """The costs of one piece of work at several sizes of one quantity, both in ascending order of size.

    `unit` is that of the costs: CPU seconds, seconds (wall time, where several processes work) or MiB. `expected` is
    the exponent that the method should have; None if there is no reason for any. `exponent` is None if a size is 0.
    """

    work: str
    quantity: str
    unit: str
    sizes: tuple[int, ...]
    costs: tuple[float, ...]
    expected: float | None = None

    @property
    def exponent(self) -> float | None:
        """The fitted exponent."""
        return fitted_exponent(self.sizes, self.costs) if min(self.sizes) > 0 else None


def fitted_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The e of the least-squares fit of costs = c * sizes^e in logarithms. Sizes and costs are positive."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


def bench_scale(rows: Sequence[int], *, rounds: int, parts: Sequence[str] = ()) -> dict[str, Any]:
    """The growths of `parts`, or of all PARTS, with one thread; plain JSON.

    rows: lengths of the lists that are read, each in a fresh process. Within a growth the sizes take turns, and costs
    are medians of `rounds`. Lists are read once.
    """
    torch.set_num_threads(1)
    measures: dict[str, Callable[[], list[Growth]]] = {
        "model": partial(_model_growths, rounds),
        "reading": partial(_reading_growths, rounds),
        "processes": lambda: [_process_growth(rounds)],
        "lists": partial(list_growths, rows),
    }
    growths = [growth for part in parts or PARTS for growth in measures[part]()]
    return {
        "model": MODEL,
        "rounds": rounds,
        "torch": torch.__version__,
        "growths": [
            {
                "work": one.work,
                "quantity": one.quantity,
                "unit": one.unit,
                "sizes": one.sizes,
                "costs": one.costs,
                "exponent": one.exponent,
                "expected": one.expected,
            }
            for one in growths
        ],
    }


def _medians(work: Mapping[int, Callable[[], float]], rounds: int) -> tuple[float, ...]:
    """The median cost of each size."""
    return tuple(
        statistics.median(costs) for costs in take_turns({str(n): run for n, run in work.items()}, rounds).values()
    )


def _model_growths(rounds: int) -> list[Growth]:
    """A forward and backward pass, of 1 clip of 8 x 112 x 112 with windows of 4 x 7 x 7 unless a size is varied."""
    work = "forward and backward pass"

    def grow(
        quantity: str, sizes: Sequence[int], expected: float | None, step: Callable[[int], Callable[[], None]]
    ) -> Growth:
        runs = {size: partial(elapsed, step(size), time.process_time) for size in sizes}
        return Growth(work, quantity, "CPU s", tuple(sizes), _medians(runs, rounds), expected)

    return [
        grow("clips in a batch", (1, 2, 4), 1, lambda n: _step(clips=n)),
        grow("frames", (8, 16, 32), 1, lambda n: _step(frames=n)),
        grow("height and width, pixels", (112, 224, 336), 2, lambda n: _step(pixels=n)),
        # Only the scores of attention grow with the window; they are a part of the work.
        grow("tokens in a window", (49, 98, 196), None, lambda n: _step(window=(n // 49, 7, 7))),
        grow("classes", (10, 100, 1000, 10_000), None, lambda n: _step(classes=n)),
    ]


def _step(
    *,
    clips: int = 1,
    frames: int = 8,
    pixels: int = 112,
    window: tuple[int, int, int] = (4, 7, 7),
    classes: int = CLASSES,
) -> Callable[[], None]:
    """A function that takes one forward and backward pass."""
    torch.manual_seed(0)
    model = create_model(MODEL, num_classes=classes, frames=frames, image_size=pixels, window=window)
    batch = torch.randn(clips, 3, frames, pixels, pixels)
    labels = torch.zeros(clips, dtype=torch.int64)

    def step() -> None:
        model.zero_grad()
        functional.cross_entropy(model(batch), labels).backward()

    return step


def _reading_growths(rounds: int) -> list[Growth]:
    """Reading clips of a generated video: by their frames, by the size of the video, and by workers."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        heights = (128, 256, 512)
        paths = {height: folder / f"{height}.mp4" for height in heights}
        for height, path in paths.items():
            write_clip(path, size=(height, height * 3 // 2), seconds=CLIP_SECONDS)
        frames = {n: partial(_read_seconds, paths[256], n) for n in (8, 16, 32, 64)}
        sizes = {height: partial(_read_seconds, path, 32) for height, path in paths.items()}
        workers = {n: partial(_load_seconds, paths[256], n) for n in (0, 1, 2)}
        return [
            Growth("reading a clip", "frames", "CPU s", tuple(frames), _medians(frames, rounds), 1),
            Growth("reading a clip", "short side of the video", "CPU s", heights, _medians(sizes, rounds), 2),
            Growth("loading 32 clips", "workers", "CPU s", tuple(workers), _medians(workers, rounds), 0),
        ]


def _read_seconds(path: Path, frames: int) -> float:
    """CPU seconds of opening a video and reading its first frames, resized to a short side of 128 pixels."""

    def read() -> None:
        with VideoReader(path) as reader:
            reader.frames(range(frames), short_side=128)

    return elapsed(read, time.process_time)


def _load_seconds(path: Path, workers: int) -> float:
    """CPU seconds, workers included, of 8 batches of 4 clips from the training loader."""
    config = DataConfig(source=(str(path),), image_size=112, frames=8, frame_stride=2, short_side=128, workers=workers)
    entries = [Entry(str(number), str(path), 0) for number in range(32)]
    dataset = SampleDataset(entries, config, AugmentConfig(), 0, None)
    before = os.times()
    loader = training_loader(dataset, plan_batch(4, 4, 1), seed=0, rank=0, first=0, last=8, pin=False)
    for _ in loader:
        pass
    del loader  # ends the workers, whose time counts once they have ended
    after = os.times()
    return sum(after[:4]) - sum(before[:4])


def _process_growth(rounds: int) -> Growth:
    """A whole training step, of the same number of clips per process, in 1 and 2 processes under ZeRO-1."""
    costs = []
    for processes in (1, 2):
        work = Workload(
            model=MODEL,
            frames=8,
            pixels=112,
            window=(4, 7, 7),
            clips=1,
            processes=processes,
            device="cpu",
            precision="fp32",
            rounds=rounds,
            threads=1,
        )
        measured = run_setup(work, TrainingSetup("ZeRO-1", zero_stage=1))
        costs.append(statistics.median(measured.get("seconds", [float("nan")])))
    return Growth("training step, 1 clip a process", "processes", "s", (1, 2), tuple(costs), 0)


def list_growths(rows: Sequence[int]) -> list[Growth]:
    """What is done with a list before the first video, by its length."""
    sizes = tuple(sorted(rows))
    found = [run_in_fresh_process(_use_list, n, device="cpu") | measure_start(n) for n in sizes]
    # (what is done, key of the figures, unit, how many of the figure's unit it is)
    parts = (
        ("reading a list", "read_seconds", "CPU s", 1),
        ("order of an epoch", "order_seconds", "CPU s", 1),
        ("planning a preparation", "plan_seconds", "CPU s", 1),
        ("writing its state", "state_seconds", "CPU s", 1),
        ("reading a list", "read_bytes", "MiB", 2**20),
        ("planning a preparation", "peak_bytes", "MiB", 2**20),
    )
    return [
        Growth(work, "rows", unit, sizes, tuple(figures[key] / per_unit for figures in found), 1)
        for work, key, unit, per_unit in parts
    ]


def _use_list(rows: int) -> dict[str, float]:
    """CPU seconds and peak bytes, in this process, of reading a list of `rows` missing files and shuffling it once."""
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "train.csv"
        with path.open("w", encoding="utf-8") as file:
            file.write("path,label\n")
            file.writelines(f"c{n % CLASSES}/{n}.mp4,class {n % CLASSES}\n" for n in range(rows))

        def read() -> None:
            figures["read_seconds"] = elapsed(lambda: read_manifest(path, "train"), time.process_time)

        figures["read_bytes"] = peak_bytes_of(read, torch.device("cpu"))
    mixture = Mixture([MixtureSource([Entry("", "", 0)] * rows)])
    figures["order_seconds"] = elapsed(lambda: mixture.order(0, 0), time.process_time)
    return figures


def scale_table(result: dict[str, Any]) -> str:
    """The result of `bench_scale` as text."""
    about = f"{result['model']}, torch {result['torch']}, medians of {result['rounds']} rounds taking turns"
    if all(one["quantity"] == "rows" for one in result["growths"]):
        about = "lists of videos, each length measured once"
    heading = f"one thread; {about}"
    rows = [
        [
            one["work"],
            one["quantity"],
            " ".join(f"{size:,}" for size in one["sizes"]),
            " ".join(f"{cost:.3g}" for cost in one["costs"]),
            one["unit"],
            "" if one["exponent"] is None else f"{one['exponent']:.2f}",
            "" if one["expected"] is None else f"{one['expected']:g}",
        ]
        for one in result["growths"]
    ]
    columns = ["what", "grows with", "sizes", "costs", "", "exponent", "expected"]
    return f"{heading}\n\n{table_text(columns, rows)}"
