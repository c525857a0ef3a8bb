"""Whole runs on GPUs: killed, stopped by a signal and failed on the way, they end as an undisturbed run does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.closeness import assert_same
from tests.distributed.launching import LAUNCHERS, clean_environment
from tests.gpu import run_worker
from tests.training.runs import write_noise_clips, write_recipe
from video_swinv2.distributed.signals import EXIT_RESTART, RESTART_MARKER
from video_swinv2.training.metrics import read_metrics
from video_swinv2.weights.store import read_tensors

pytestmark = pytest.mark.gpu

SECONDS = 240  # within which a run must start, and end; a GPU needs half a minute, and a busy CPU this
STEPS = {"cpu": 15, "cuda": 60}  # a run must not end before it is disturbed


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    return write_noise_clips(tmp_path_factory.mktemp("clips"), write_video, [0, 1] * 6, ("even", "odd"))


def write_run(folder: Path, clips: Path, name: str, device: torch.device, **changes: Any) -> Path:
    """A recipe in which everything random and everything with a state is on."""
    values: dict[str, Any] = {
        "out": str(folder / name),
        "init": "scratch",
        "model": {"name": "swinv2_nano", "window": [2, 4, 4], "drop_path": 0.2, "checkpoint_blocks": 2},
        "data": {"source": str(clips), "frames": 4, "image_size": 32, "workers": 1},
        "augment": {"crop_area": [0.6, 1.0], "erasing": 0.25},
        "optim": {"epochs": STEPS[device.type] // 3, "lr": 1e-3, "warmup_epochs": 1, "batch": 4, "micro_batch": 2,
                  "clip_norm": 5, "layer_decay": 0.9, "ema": 0.9},
        "engine": {"precision": "bf16" if device.type == "cuda" else "fp32", "device": device.type},
        "log_every": 1,
        "val_epochs": 4,
        "checkpoint_minutes": 0,
    }  # fmt: skip
    return write_recipe(folder, values, changes, name)


class Started:
    """A run that has been started: in one process by hand, in two by torchrun."""

    def __init__(self, config: Path, processes: int, *arguments: str) -> None:
        self.folder, self.log = config.with_suffix(""), config.with_suffix(".log")
        launcher = LAUNCHERS["torchrun"] if processes > 1 else []
        command = [sys.executable, *launcher, run_worker.__file__, str(config), *arguments]
        with self.log.open("a") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env=clean_environment(), start_new_session=True
            )
        self.launched = processes > 1

    @property
    def worker(self) -> int:
        """The id of a process that trains."""
        pid = self.process.pid
        if not self.launched:
            return pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])

    def until_step(self, step: int) -> None:
        """Wait until a checkpoint of this step or a later one is complete."""
        until = time.monotonic() + SECONDS
        while max((int(path.name[5:]) for path in self.folder.glob("checkpoints/step-??????")), default=0) < step:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.005)

    def end(self) -> int:
        """Wait for the end; returns the exit code. What is left after SECONDS is killed, and the test fails."""
        try:
            return self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"still there after {SECONDS} s\n{self.log.read_text()[-3000:]}") from None


@pytest.mark.parametrize(("attention", "zero_stage"), [("eager", 1), ("auto", 3)])
def test_a_disturbed_run_ends_with_the_same_bits(
    attention: str, zero_stage: int, processes: int, device: torch.device, clips: Path, tmp_path: Path
) -> None:
    """SIGKILL, then SIGUSR1, then an exception, each after some steps, and the same command again."""
    changes: dict[str, Any] = {"model": {"attention": attention}, "engine": {"zero_stage": zero_stage}}
    undisturbed = Started(write_run(tmp_path, clips, "undisturbed", device, **changes), processes)
    config = write_run(tmp_path, clips, "disturbed", device, **changes)

    killed = Started(config, processes)
    killed.until_step(2)
    os.kill(killed.worker, signal.SIGKILL)
    assert killed.end() != 0

    stopped = Started(config, processes)
    stopped.until_step(5)
    os.kill(stopped.worker, signal.SIGUSR1)
    assert stopped.end() == (1 if stopped.launched else EXIT_RESTART)  # torchrun itself always exits with 1
    assert (stopped.folder / RESTART_MARKER).exists(), stopped.log.read_text()[-3000:]

    failed = Started(config, processes, "5")
    assert failed.end() != 0
    assert run_worker.FAILURE in failed.log.read_text(), "the exception that ended the run is not shown"

    resumed = Started(config, processes)
    for run in (resumed, undisturbed):
        assert run.end() == 0, run.log.read_text()[-3000:]
    curves = [
        [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in read_metrics(run.folder)
         if "train/loss" in line]
        for run in (resumed, undisturbed)
    ]  # fmt: skip
    assert [step for step, *_ in curves[1]] == list(range(1, STEPS[device.type] + 1))
    assert curves[0] == curves[1]
    for name in ("last.safetensors", "model.safetensors"):
        assert_same(*(read_tensors(run.folder / name)[0] for run in (resumed, undisturbed)))
