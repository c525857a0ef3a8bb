"""Benchmark of the training loader: clips per second and core for several numbers of workers, against another loader.

Both read the same videos, from the file to the augmented batch: `clip_readers.py` has the others. Further measurements
show how the time of one clip of ours divides into opening, decoding and augmenting, how much memory a loader and its
workers take, and what starting on a long list costs.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import multiprocessing
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from video_swinv2.bench.clip_readers import PEERS, VIDEOMAE_MAGNITUDE, VIDEOMAE_OPERATIONS, LoaderPeer, Reading
from video_swinv2.bench.measuring import (
    median_ratio,
    peak_bytes,
    reset_peak_bytes,
    run_in_fresh_process,
    table_text,
    take_turns,
)
from video_swinv2.bench.sample_clip import SECONDS, SIZE, write_clip
from video_swinv2.config import AugmentConfig, DataConfig
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.loading import plan_batch, training_loader
from video_swinv2.data.manifest import Entry
from video_swinv2.data.sampling import random_clip, seeded
from video_swinv2.data.sources import labelled_manifest
from video_swinv2.data.transforms import training_transform
from video_swinv2.errors import UsageError

GENERATED_VIDEOS = 16  # copies of one generated clip, so that different files are opened, as in a real run
TIMED_CLIPS = 8  # how many clips are timed step by step
LINKS_PER_FOLDER = 1000  # in the list of links to the videos on which starting is measured
CPU = torch.device("cpu")


def bench_loader(
    data: Path | None,
    reading: Reading,
    workers: Sequence[int],
    *,
    against: LoaderPeer = "plain",
    rounds: int = 3,
    rows: int = 0,
) -> dict[str, Any]:
    """Clips per CPU second of our loader and of another for each number of workers; the two take turns.

    data: a prepared data set, or None to read copies of a generated clip. rows: also measure starting on a list of so
    many videos; 0 does not. Raises UsageError for fewer than two batches of clips, and for what the peer does not do.
    """
    if against in ("videomae", "pytorchvideo") and reading.short_side is not None:
        raise UsageError(f"--short-side: {against} has its own augmentation; leave it out")
    if reading.clips < 2 * reading.batch:
        raise UsageError(f"--clips {reading.clips}: need at least two batches of {reading.batch}")
    with tempfile.TemporaryDirectory() as folder:
        if data is None:
            paths = _generate_videos(Path(folder))
        else:
            paths = [entry.path for entry in labelled_manifest(_config(str(data), reading, 0), "train").entries]
        measured = []
        for count in workers:
            # In each turn, the workers start anew. There is a warm-up round, in which libraries are loaded.
            contenders = {
                "ours": partial(_clips_per_second, _our_loader(paths, reading, count, against), reading.batch),
                "peer": partial(_clips_per_second, _peer_loader(paths, reading, count, against), reading.batch),
            }
            rates = take_turns(contenders, rounds)
            ratio = median_ratio(rates["ours"], rates["peer"])
            medians = {name: statistics.median(found) for name, found in rates.items()}
            measured.append({"workers": count, **medians, "ratio": ratio, "all": rates})
        result = {
            "reading": dataclasses.asdict(reading),
            "data": f"a generated clip of {SECONDS} s, {SIZE[0]}x{SIZE[1]}" if data is None else str(data),
            "against": against,
            "peer_version": None if against == "plain" else importlib.metadata.version(_distribution(against)),
            "rounds": rounds,
            "rows": measured,
            "memory_bytes": {
                side: run_in_fresh_process(_peak_memory, side, paths, reading, max(workers), against, device="cpu")
                for side in ("ours", "peer")
            },
            "parts_ms": _milliseconds_per_step(paths, reading),
        }
        if rows:
            listed = _write_list(Path(folder) / "list", paths, rows)
            result["start"] = {"rows": rows} | {
                side: run_in_fresh_process(_start, side, listed, paths, reading, against, device="cpu")
                for side in ("ours", "peer")
            }
        return result


def _distribution(against: LoaderPeer) -> str:
    return "decord" if against == "videomae" else against


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


def _augment(against: LoaderPeer) -> AugmentConfig:
    """Our augmentation beside a peer's: crops and flips, and RandAugment beside VideoMAE's."""
    if against == "videomae":
        return AugmentConfig(rand_augment=VIDEOMAE_OPERATIONS, rand_magnitude=VIDEOMAE_MAGNITUDE)
    return AugmentConfig()


def _generate_videos(folder: Path) -> list[Path]:
    """GENERATED_VIDEOS copies of one generated video in `folder`, which is encoded once only."""
    first = folder / "0.mp4"
    write_clip(first)
    paths = [folder / f"{number}.mp4" for number in range(GENERATED_VIDEOS)]
    for path in paths[1:]:
        shutil.copyfile(first, path)
    return paths


def _samples(paths: Sequence[Path], reading: Reading, workers: int, against: LoaderPeer) -> SampleDataset:
    """The samples that `train` would read."""
    entries = [Entry(str(number), str(path), 0) for number, path in enumerate(paths)]
    return SampleDataset(entries, _config(str(paths[0]), reading, workers), _augment(against), 0, None)


Loader = Callable[[], Iterable[object]]
"""Makes a loader that has not started yet."""


def _our_loader(paths: Sequence[Path], reading: Reading, workers: int, against: LoaderPeer) -> Loader:
    """The loader that `train` uses."""
    return partial(_loader_of, _samples(paths, reading, workers, against), reading)


def _loader_of(samples: SampleDataset, reading: Reading) -> Iterable[object]:
    # One process, and one micro-batch per step: the entries are read in an endless stream of permutations.
    plan = plan_batch(reading.batch, reading.batch, 1)
    return training_loader(samples, plan, seed=0, rank=0, first=0, last=reading.clips // reading.batch, pin=False)


def _peer_loader(paths: Sequence[Path], reading: Reading, workers: int, against: LoaderPeer) -> Loader:
    """PyTorch's DataLoader of the data set of a peer."""
    return lambda: DataLoader(
        PEERS[against](paths, reading),
        batch_size=reading.batch,
        num_workers=workers,
        drop_last=True,
        # As for our workers. In a fresh process, the default would be to start a new interpreter for each.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )


def _clips_per_second(make: Loader, batch: int) -> float:
    """Clips per second that a core reads: all clips by the CPU time that this process and its workers take for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in workers
    torch.manual_seed(0)
    try:
        before = _cpu_seconds()
        batches = iter(make())
        clips = batch * sum(1 for _ in batches)
        del batches  # ends the workers, whose time counts once they have ended
        return clips / (_cpu_seconds() - before)
    finally:
        torch.set_num_threads(threads)


def _cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak_memory(side: str, paths: Sequence[Path], reading: Reading, workers: int, against: LoaderPeer) -> int:
    """The most bytes that a loader, this process and its workers take together after any batch, in a fresh process."""
    make = _our_loader if side == "ours" else _peer_loader
    most = 0
    for _ in make(paths, reading, workers, against)():
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        most = max(most, sum(_proportional_bytes(pid) for pid in pids if pid is not None))
    return most


def _proportional_bytes(pid: int) -> int:
    """The memory of a process, with what it shares divided by the number of processes that share it; 0 if it ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return 1024 * int(next(line for line in lines if line.startswith("Pss:")).split()[1])


def _write_list(folder: Path, paths: Sequence[Path], rows: int) -> Path:
    """A list `path label` of so many links to the videos, as VideoMAE and pytorchvideo read it too."""
    lines = []
    for number, path in zip(range(rows), itertools.cycle(paths), strict=False):
        link = folder / str(number // LINKS_PER_FOLDER) / f"{number}{path.suffix}"
        if number % LINKS_PER_FOLDER == 0:
            link.parent.mkdir(parents=True)
        link.symlink_to(path)
        lines.append(f"{link} {number % 400}")
    (folder / "train.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "train.txt"


def _start(side: str, listed: Path, paths: Sequence[Path], reading: Reading, against: LoaderPeer) -> dict[str, float]:
    """CPU seconds and bytes from a list to the first batch, read in this process, which has to be a fresh one."""
    for _ in (_our_loader if side == "ours" else _peer_loader)(paths, reading, 0, against)():
        break  # libraries are loaded
    before, seconds = reset_peak_bytes(CPU), time.process_time()
    if side == "ours":
        config = _config(str(listed), reading, 0)
        entries = labelled_manifest(config, "train").entries
        batches = _loader_of(SampleDataset(entries, config, _augment(against), 0, None), reading)
    else:
        with listed.open(encoding="utf-8") as lines:
            labelled = [(path, int(label)) for path, label in (line.rsplit(" ", 1) for line in lines)]
        batches = _peer_loader([Path(path) for path, _ in labelled], reading, 0, against)()
    for _ in batches:
        break
    return {"seconds": time.process_time() - seconds, "bytes": peak_bytes(CPU) - before}


def _milliseconds_per_step(paths: Sequence[Path], reading: Reading) -> dict[str, float]:
    """Median milliseconds of CPU time that each step of reading a clip takes in this process.

    `open` opens and indexes the video, `decode` decodes it and converts the crop of the frames, `augment` is the rest.
    """
    # The transform that the loader applies, and the reader that it uses, called one after the other.
    transform = training_transform(AugmentConfig(), (reading.pixels, reading.pixels))
    seconds: dict[str, list[float]] = {"open": [], "decode": [], "augment": []}
    for number in range(TIMED_CLIPS):
        # Four readings of the clock delimit the three steps.
        times = [time.process_time()]
        with VideoReader(paths[number % len(paths)]) as video, seeded(0, number):
            times.append(time.process_time())
            indices = random_clip(len(video), reading.frames, reading.stride)
            crop = video.frames(indices, reading.short_side, transform.draw_crop)
            times.append(time.process_time())
            transform.finish(crop)
            times.append(time.process_time())
        for name, taken in zip(seconds, np.diff(times).tolist(), strict=True):
            seconds[name].append(taken)
    return {name: 1000 * statistics.median(found) for name, found in seconds.items()}


def loader_table(result: dict[str, Any]) -> str:
    """The result of `bench_loader` as text."""
    reading, peer = result["reading"], " ".join(filter(None, (result["against"], result["peer_version"])))
    size = f"{reading['frames']}x{reading['pixels']}x{reading['pixels']}, frame stride {reading['stride']}"
    if reading["short_side"]:
        size += f", short side {reading['short_side']}"
    heading = f"clips of {size}, batches of {reading['batch']}, from {result['data']}; medians of {result['rounds']}"
    rows = [
        [str(row["workers"]), f"{row['ours']:.2f}", f"{row['peer']:.2f}", f"{row['ratio']:.2f}"]
        for row in result["rows"]
    ]
    table = table_text(["workers", "clips/s per core", peer, "ours / theirs"], rows)
    steps = result["parts_ms"]
    total = sum(steps.values())
    shares = ", ".join(f"{name} {value:.0f} ms ({value / total:.0%})" for name, value in steps.items())
    ours, theirs = (result["memory_bytes"][side] / 2**20 for side in ("ours", "peer"))
    lines = [heading, table, f"one clip on one core: {shares}", f"memory: ours {ours:.0f} MiB, {peer} {theirs:.0f} MiB"]
    if start := result.get("start"):
        ours, theirs = (
            f"{start[side]['seconds']:.1f} s and {start[side]['bytes'] / 2**20:.0f} MiB" for side in ("ours", "peer")
        )
        lines.append(f"from a list of {start['rows']} rows to the first batch: ours {ours}, {peer} {theirs}")
    return "\n\n".join(lines)
