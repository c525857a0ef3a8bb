"""The benchmark of the loader on small clips: every figure is there. No test depends on a time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from video_swinv2.bench.clip_readers import PEERS, LoaderPeer, Reading
from video_swinv2.bench.loader import bench_loader, loader_table
from video_swinv2.cli import main
from video_swinv2.cli.bench import LOADER_PEERS
from video_swinv2.data.decoders import OTHER_DECODERS, why_missing
from video_swinv2.errors import UsageError

READING = Reading(frames=4, stride=2, pixels=32, short_side=40, batch=2, clips=4)
MISSING = {name: why_missing(name) for name in OTHER_DECODERS} | {"plain": "", "pytorchvideo": ""}
MISSING["videomae"] = MISSING["decord"]


def prepared(folder: Path, write_video: Any) -> Path:
    """A data set of two videos."""
    noise = np.random.default_rng(0)
    for name in "ab":
        write_video(folder / "videos" / f"{name}.mp4", noise.integers(0, 255, (20, 48, 64, 3), np.uint8))
    (folder / "train.csv").write_text("path,label\nvideos/a.mp4,x\nvideos/b.mp4,y\n")
    return folder


def test_both_loaders_are_timed(tmp_path: Path, write_video: Any) -> None:
    result = bench_loader(prepared(tmp_path, write_video), READING, (0, 1), rounds=1, rows=30)
    assert [row["workers"] for row in result["rows"]] == [0, 1]
    assert all(row["ours"] > 0 and row["peer"] > 0 for row in result["rows"])
    assert all(row["ratio"] == row["ours"] / row["peer"] for row in result["rows"])
    assert set(result["parts_ms"]) == {"open", "decode", "augment"}
    assert min(result["memory_bytes"].values()) > 50 * 2**20, "of two processes with torch"
    assert result["start"]["rows"] == 30
    assert min(result["start"][side]["seconds"] for side in ("ours", "peer")) > 0
    text = loader_table(result)
    assert "clips of 4x32x32, frame stride 2, short side 40" in text
    assert "from a list of 30 rows to the first batch" in text
    row = next(line for line in text.splitlines() if line.startswith("| 1 "))
    assert f" {result['rows'][1]['ours']:.2f} |" in row
    json.dumps(result)


@pytest.mark.parametrize("peer", list(PEERS))
def test_a_peer_reads_clips_from_where_it_should(tmp_path: Path, write_video: Any, peer: LoaderPeer) -> None:
    """Of the requested shape, and with the colours of the video: frame i is i of 20 on the way from black to white."""
    if MISSING[peer]:
        pytest.skip(f"{peer}: {MISSING[peer]}")
    frames = np.broadcast_to((12 * np.arange(20, dtype=np.uint8))[:, None, None, None], (20, 48, 64, 3))
    path = write_video(tmp_path / "a.mp4", frames)
    reading = dataclasses.replace(READING, short_side=None)
    torch.manual_seed(0)
    batches = list(DataLoader(PEERS[peer]([path], reading), batch_size=2))
    assert len(batches) == 2
    for batch in batches:
        assert batch.shape == (2, 3, 4, 32, 32)
        if peer == "videomae":
            continue  # RandAugment changes the brightness
        grey = batch.float().mean((1, 3, 4))  # (2, 4)
        if peer in ("plain", "pytorchvideo"):
            grey = 255 * (0.226 * grey + 0.449)  # about the mean and standard deviation of both
        steps = (grey.diff(dim=1) / 24).round()
        # The next frame but one, or on from the start of the video.
        assert set(steps.flatten().tolist()) <= ({1.0} if peer != "pytorchvideo" else {1.0, 2.0})


def test_the_command_compares_with_each_peer(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(PEERS) == LOADER_PEERS
    for what, against in (("loader", "timm"), ("model", "decord")):
        assert main(["bench", what, "--against", against]) == 2
        assert f"--against {against}: is for" in capsys.readouterr().err


def test_too_few_clips_are_refused() -> None:
    with pytest.raises(UsageError, match="--clips 3"):
        bench_loader(None, Reading(4, 2, 32, None, 2, 3), (0,))


def test_peers_with_an_augmentation_of_their_own_are_not_asked_to_resize() -> None:
    for peer in ("videomae", "pytorchvideo"):
        with pytest.raises(UsageError, match=f"--short-side: {peer} has its own augmentation"):
            bench_loader(None, READING, (0,), against=peer)  # type: ignore[arg-type]  # a str is no Literal
