"""A first configuration for a data set: sizes from its videos, and a batch that fits into the memory of the machine."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_swinv2.config import DataConfig, validate_config
from video_swinv2.config.plain_yaml import dump_yaml
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.images import is_image
from video_swinv2.data.index import AnyEntry
from video_swinv2.data.manifest import Manifest
from video_swinv2.data.sources import labelled_manifest, labelled_splits
from video_swinv2.distributed.devices import choose_device
from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.plan.plan import make_plan, memory_here
from video_swinv2.training.throughput import usable_cores

LOOKED_AT = 16  # videos, spread over the split
CLIP_SECONDS = 64 / 30  # 32 frames, every second one, of Kinetics: the clip of Video Swin's recipes
MICRO_BATCHES = (64, 32, 16, 8, 4, 2, 1)
MEMORY_SHARE = 0.8  # of the free memory; validation and fragmentation take some more
# What is known to train in hours: on a GPU the smallest model of the paper, on a CPU the demo's.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"name": "swinv2_tiny", "frames": 16, "image_size": 224, "epochs": 30, "batch": 64},
    "cpu": {"name": "swinv2_nano", "frames": 8, "image_size": 112, "epochs": 10, "batch": 16, "patch": 8},
}
MIRRORED = re.compile(r"\b(left|right|clockwise|anticlockwise|counterclockwise)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Videos:
    """What the videos of a data set are like, as medians over those that were looked at."""

    frames: int
    fps: float
    short_side: int

    def __str__(self) -> str:
        return f"{self.frames} frames at {self.fps:.3g} per second, short side {self.short_side} pixels"


def starter(source: Path) -> str:
    """The YAML text of a configuration of `train` for the data set `source` on this machine.

    Its header says how the values came about. Raises UsageError for a data set that cannot be used, and UserError if
    none of its videos can be read or not even a single sample fits into memory.
    """
    data = DataConfig((os.fspath(source),), image_size=1)  # only the source is used
    splits, train = labelled_splits(data), labelled_manifest(data, "train")
    images = is_image(train.entries[0])
    videos = None if images else look_at(train.entries)
    device = choose_device("auto").type
    values = _fitting(_values(source, train.classes, videos, device, len(train.entries)), train)
    header = [
        f"{source}: {len(train.entries)} {'images' if images else 'videos'} of {len(train.classes)} classes in train; "
        f"splits: {', '.join(splits)}"
    ]
    if videos is not None:
        seconds = values["data"]["frames"] * values["data"]["frame_stride"] / videos.fps
        header.append(f"median video: {videos}; a clip spans {seconds:.3g} s")
    header.append(f"sizes and micro_batch are for {'a GPU' if device == 'cuda' else 'the CPU'} of this machine")
    if values["augment"]["flip"] == 0:
        header.append("no flips, because names of classes contain left, right or the like")
    if "val" not in splits:
        header.append("validation needs a split val: python -m data_prep split DATA --val 0.1 --seed 0")
    header.append("not measured; `video-swinv2 config` explains every key, `video-swinv2 plan` says how long it takes")
    return "".join(f"# {for_terminal(line)}\n" for line in header) + dump_yaml(values)


def look_at(entries: Sequence[AnyEntry]) -> Videos:
    """Open up to LOOKED_AT videos, evenly spread over `entries`. Raises UserError if none of them can be read."""
    found, faults = [], []
    for entry in entries[:: max(1, len(entries) // LOOKED_AT)][:LOOKED_AT]:
        try:
            with VideoReader(entry.path) as video:
                found.append((len(video), float(video.fps), min(video.size)))
        except DecodeError as error:
            faults.append(str(error))
    if not found:
        raise UserError(f"{faults[0]}; nor can {len(faults) - 1} others be read; check the data set")
    frames, fps, sides = zip(*found, strict=True)
    return Videos(round(statistics.median(frames)), statistics.median(fps), round(statistics.median(sides)))


def _values(source: Path, classes: Sequence[str], videos: Videos | None, device: str, samples: int) -> dict[str, Any]:
    """The values of the configuration, with the micro-batch as large as the batch."""
    sizes = SIZES[device]
    batch = sizes["batch"]
    while batch > 1 and batch > samples // 4:  # at least four steps in an epoch
        batch //= 2
    data: dict[str, Any] = {"source": os.fspath(source), "image_size": sizes["image_size"]}
    data["workers"] = max(1, min(8, usable_cores() - 1))
    if videos is not None:
        # Not larger than the videos; a multiple of 32 divides into whole patches at every stage.
        data["image_size"] = min(sizes["image_size"], max(32, videos.short_side // 32 * 32))
        frames = sizes["frames"]
        wanted = min(videos.frames, CLIP_SECONDS * videos.fps)
        data |= {"frames": frames, "frame_stride": max(1, round(wanted / frames))}
    model: dict[str, Any] = {"name": sizes["name"], "drop_path": 0.1}
    if "patch" in sizes:
        model["patch_size"] = [2] * (videos is not None) + [sizes["patch"]] * 2
    mirrored = any(MIRRORED.search(name.replace("_", " ")) for name in classes)
    return {
        "out": f"runs/{source.resolve().name}",
        "init": "scratch",
        "model": model,
        "data": data,
        "augment": {"flip": 0.0 if mirrored else 0.5},
        "optim": {
            "epochs": sizes["epochs"],
            "batch": batch,
            "micro_batch": batch,
            "lr": 1e-3 * batch / 64,  # Video Swin's rate of 1e-3 for 64 clips, by the linear rule
            "warmup_epochs": sizes["epochs"] / 10,
            "weight_decay": 0.05,
            "clip_norm": 5.0,
        },
        "engine": {"engine": "plain", "precision": "auto"},
    }


def _fitting(values: dict[str, Any], train: Manifest) -> dict[str, Any]:
    """The values with the largest micro-batch that fits into the memory of this machine's device."""
    optim = values["optim"]
    for micro in (micro for micro in MICRO_BATCHES if optim["batch"] % micro == 0):
        values = values | {"optim": optim | {"micro_batch": micro}}
        plan = make_plan(validate_config(values, "config init"), train=train)
        memory = memory_here(plan)
        if memory is None or plan.peak <= MEMORY_SHARE * memory:
            return values
    raise UserError(
        f"memory: a single sample needs {plan.peak / 1e9:.1f} GB, and {(memory or 0) / 1e9:.1f} GB are free; end other "
        "programs, or write a configuration with smaller sizes"
    )
