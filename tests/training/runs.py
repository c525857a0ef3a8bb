"""Shared by tests of whole runs: data sets of noise, recipes with changes, and a small disk."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from video_swinv2.config import Config, validate_config


def write_recipe(folder: Path, values: Mapping[str, Any], changes: Mapping[str, Any], name: str | None = None) -> Path:
    """Write `values` with `changes`, sections merged key by key, to a new YAML file in `folder`."""
    merged = dict(values)
    for key, value in changes.items():
        merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    path = folder / f"{name or len(list(folder.glob('*.yaml')))}.yaml"
    path.write_text(yaml.safe_dump(merged))
    return path


def write_noise_clips(
    folder: Path, write_video: Callable[..., Path], labels: Sequence[int], classes: Sequence[str]
) -> Path:
    """Write a clip of six noisy 32 x 32 frames for each label; the same clips are for training and validation."""
    rng = np.random.default_rng(0)
    for number in range(len(labels)):
        write_video(folder / f"{number}.mp4", rng.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8))
    lines = "".join(f"{number}.mp4 {label}\n" for number, label in enumerate(labels))
    for name, text in (("train", lines), ("val", lines), ("classes", "".join(f"{each}\n" for each in classes))):
        (folder / f"{name}.txt").write_text(text)
    return folder


def small_config(workers: int = 0, optim: Mapping[str, Any] | None = None, **changes: Any) -> Config:
    """A valid config without any files behind it."""
    values = {
        "out": "x",
        "init": "scratch",
        "model": {"name": "swinv2_nano"},
        "data": {"source": "x", "image_size": 64, "workers": workers},
        "optim": {"epochs": 1, "lr": 1e-3, "batch": 2, "micro_batch": 2, **(optim or {})},
        **changes,
    }
    return validate_config(values, "x.yaml")


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], object]]:
    """A file system in memory with room for one checkpoint of three; yields a function that makes room."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.decode().strip()}")
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
