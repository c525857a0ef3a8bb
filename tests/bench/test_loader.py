"""The benchmark of the loader on small clips: every figure is there. No test depends on a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from video_swinv2.bench.loader import PlainClips, Reading, bench_loader, loader_table
from video_swinv2.data.manifest import Entry
from video_swinv2.errors import UsageError

READING = Reading(frames=4, stride=2, pixels=32, short_side=40, batch=2, clips=4)


def prepared(folder: Path, write_video: Any) -> Path:
    """A data set of two videos."""
    noise = np.random.default_rng(0)
    for name in "ab":
        write_video(folder / "videos" / f"{name}.mp4", noise.integers(0, 255, (20, 48, 64, 3), np.uint8))
    (folder / "train.csv").write_text("path,label\nvideos/a.mp4,x\nvideos/b.mp4,y\n")
    return folder


def test_both_loaders_are_timed(tmp_path: Path, write_video: Any) -> None:
    result = bench_loader(prepared(tmp_path, write_video), READING, (0, 1), rounds=1)
    assert [row["workers"] for row in result["rows"]] == [0, 1]
    assert all(row["ours"] > 0 and row["plain"] > 0 for row in result["rows"])
    assert set(result["parts_ms"]) == {"open", "decode", "augment"}
    text = loader_table(result)
    assert "clips of 4x32x32" in text
    row = next(line for line in text.splitlines() if line.startswith("| 1 "))
    assert f" {result['rows'][1]['ours']:.2f} |" in row
    json.dumps(result)


def test_the_plain_dataset_reads_clips(tmp_path: Path, write_video: Any) -> None:
    """Normalised, and of the requested shape."""
    folder = prepared(tmp_path, write_video)
    plain = PlainClips([Entry("a", folder / "videos" / "a.mp4", 0)], READING)
    clip = plain[0]
    assert clip.shape == (3, 4, 32, 32)
    assert clip.dtype == torch.float32
    assert -3 < float(clip.mean()) < 3
    assert len(plain) == 4


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(UsageError, match="--clips 3"):
        bench_loader(None, Reading(4, 2, 32, None, 2, 3), (0,))
