"""A first configuration for a data set: sizes from its videos, and a model that suits the machine."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_swinv2.config import DataConfig
from video_swinv2.config.plain_yaml import dump_yaml
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.images import is_image
from video_swinv2.data.index import AnyEntry
from video_swinv2.data.sources import labelled_manifest, labelled_splits
from video_swinv2.distributed.devices import choose_device
from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.training.tasks.classification import mirrored_classes
from video_swinv2.training.throughput import usable_cores

LOOKED_AT = 16  # videos, spread over the split
WINDOW_PIXELS = 56  # a window of 7 patches of 8 pixels, or two of 4 pixels
CLIP_SECONDS = 64 / 30  # 32 frames, every second one, of Kinetics: the clip of Video Swin's recipes
# What is known to train in hours: on a GPU the smallest model of the paper, on a CPU the demo's.
SIZES: dict[str, dict[str, Any]] = {
    "cuda": {"name": "swinv2_tiny", "frames": 16, "image_size": 224, "epochs": 30, "batch": 64},
    "cpu": {"name": "swinv2_nano", "frames": 8, "image_size": 112, "epochs": 10, "batch": 16, "patch": 8},
}


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
    none of its videos can be read.
    """
    data = DataConfig((os.fspath(source),), image_size=1)  # only the source is used
    splits, train = labelled_splits(data), labelled_manifest(data, "train")
    images = is_image(train.entries[0])
    videos = None if images else look_at(train.entries)
    device = choose_device("auto").type
    values = _values(source, train.classes, videos, device, len(train.entries))
    header = [
        f"{source}: {len(train.entries)} {'images' if images else 'videos'} of {len(train.classes)} classes in train; "
        f"splits: {', '.join(splits)}"
    ]
    if videos is not None:
        seconds = values["data"]["frames"] * values["data"]["frame_stride"] / videos.fps
        header.append(f"median video: {videos}; a clip spans {seconds:.3g} s")
    header.append(
        f"sizes are for {'a GPU' if device == 'cuda' else 'the CPU'}; optim.micro_batch is planned when training starts"
    )
    if values["augment"]["flip"] == 0:
        header.append("no flips, because names of classes tell left from right, or the like")
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
    """The values of the configuration."""
    sizes = SIZES[device]
    batch = sizes["batch"]
    while batch > 1 and batch > samples // 4:  # at least four steps in an epoch
        batch //= 2
    data: dict[str, Any] = {"source": os.fspath(source), "image_size": sizes["image_size"]}
    data["workers"] = max(1, min(8, usable_cores() - 1))
    if videos is not None:
        # Not larger than the videos, and whole windows: others are padded, and 64 pixels would take the time of 112.
        data["image_size"] = min(
            sizes["image_size"], max(WINDOW_PIXELS, videos.short_side // WINDOW_PIXELS * WINDOW_PIXELS)
        )
        frames = sizes["frames"]
        wanted = min(videos.frames, CLIP_SECONDS * videos.fps)
        data |= {"frames": frames, "frame_stride": max(1, round(wanted / frames))}
    model: dict[str, Any] = {"name": sizes["name"], "drop_path": 0.1}
    if "patch" in sizes:
        model["patch_size"] = [2] * (videos is not None) + [sizes["patch"]] * 2
    return {
        "out": f"runs/{source.resolve().name}",
        "init": "scratch",
        "model": model,
        "data": data,
        "augment": {"flip": 0.0 if mirrored_classes(classes) else 0.5},
        "optim": {
            "epochs": sizes["epochs"],
            "batch": batch,
            "lr": 1e-3 * batch / 64,  # Video Swin's rate of 1e-3 for 64 clips, by the linear rule
            "warmup_epochs": sizes["epochs"] / 10,
            "weight_decay": 0.05,
            "clip_norm": 5.0,
        },
        "engine": {"engine": "plain", "precision": "auto"},
    }
