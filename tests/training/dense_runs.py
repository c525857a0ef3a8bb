"""Shared by the tests of dense tasks: whole runs in processes of their own, one of them killed and resumed."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from tests.training.resume_worker import Ranks, train_run
from video_swinv2.training.metrics import read_metrics
from video_swinv2.weights.store import read_tensors


def losses(folder: Path) -> list[float]:
    """The training loss of each logged step of a run."""
    return [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]


def start(config: Path, size: int) -> Ranks:
    """Train in `size` processes; their output is beside the recipe."""
    return Ranks(size, train_run, config, log=config.with_suffix(".log"))


def finish(config: Path, size: int) -> Path:
    """Train in `size` processes to the end -> the run folder."""
    codes = start(config, size).wait()
    assert codes == [0] * size, config.with_suffix(".log").read_text()[-3000:]
    return config.with_suffix("")


def check_resumed_equals_whole(whole: Path, killed: Path) -> None:
    """Train two equal recipes in two processes, kill the second after its second step and resume it: the same bits."""
    finish(whole, 2)
    ranks, deadline = start(killed, 2), time.monotonic() + 600
    checkpoints = killed.with_suffix("") / "checkpoints"
    while not any(int(path.name[5:]) >= 2 for path in checkpoints.glob("step-??????")):
        assert ranks.running, killed.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    ranks.kill([1, 0])
    finish(killed, 2)
    assert "step 0/" not in killed.with_suffix(".log").read_text().split("weights: own checkpoint")[-1]
    assert losses(killed.with_suffix("")) == losses(whole.with_suffix(""))
    weights = [
        read_tensors(folder / "last.safetensors")[0] for folder in (whole.with_suffix(""), killed.with_suffix(""))
    ]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
