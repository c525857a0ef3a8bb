"""Exact resumption, proven on real runs: killed twenty times, moved to other world sizes and ZeRO stages, stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.training import resume_worker
from tests.training.resume_worker import BATCH, LR, Ranks, clips, network, train_run
from tests.training.runs import write_recipe
from video_swinv2.distributed.signals import EXIT_RESTART, RESTART_MARKER
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.training.metrics import read_metrics
from video_swinv2.weights.store import read_tensors

KILLS = 20
STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Twelve clips to train and three to validate, in two classes."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        lines = []
        for number in range(count):
            frames = rng.integers(0, 255, (6, 32, 32, 3), dtype=np.uint8)
            write_video(folder / split / f"{number}.mp4", frames)
            lines.append(f"{split}/{number}.mp4 {number % 2}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (folder / "classes.txt").write_text("a\nb\n")
    return folder


@pytest.fixture
def recipe(videos: Path, tmp_path: Path) -> Callable[..., Path]:
    """Everything random and everything with a state is on: EMA, drop path, erasing, layer decay, checkpointing."""

    def write(name: str, **changes: dict[str, Any]) -> Path:
        values: dict[str, Any] = {
            "out": str(tmp_path / name),
            "init": "scratch",
            "model": {"name": "swinv2_nano", "window": [2, 4, 4], "drop_path": 0.2, "checkpoint_blocks": 2},
            "data": {"source": str(videos), "frames": 4, "image_size": 32, "workers": 0},
            "augment": {"crop_area": [0.6, 1.0], "erasing": 0.25},
            "optim": {"epochs": 16, "lr": 1e-3, "warmup_epochs": 1, "batch": 4, "micro_batch": 1, "clip_norm": 5,
                      "layer_decay": 0.9, "ema": 0.9},
            "engine": {"zero_stage": 1, "precision": "fp32", "device": "cpu"},
            "log_every": 1,
            "val_epochs": 4,
            "checkpoint_minutes": 0,
        }  # fmt: skip
        return write_recipe(tmp_path, values, changes, name)

    return write


def start(config: Path, size: int = 2) -> Ranks:
    return Ranks(size, train_run, config, log=config.with_suffix(".log"))


def finish(config: Path, size: int = 2) -> Path:
    """Run to the end; returns the run folder."""
    codes = start(config, size).wait()
    assert codes == [0] * size, config.with_suffix(".log").read_text()[-3000:]
    return config.with_suffix("")


def newest(config: Path) -> int:
    folder = config.with_suffix("") / "checkpoints"
    return max((int(path.name[5:]) for path in folder.glob("step-??????")), default=0)


def run_until(config: Path, step: int, ranks: Ranks) -> None:
    """Wait until a checkpoint of this step or a later one is complete."""
    deadline = time.monotonic() + 600
    while newest(config) < step:
        assert ranks.running, config.with_suffix(".log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def curve(folder: Path) -> list[tuple[int, float, float]]:
    lines = [line for line in read_metrics(folder) if "train/loss" in line]
    return [(line["step"], line["train/loss"], line["train/grad_norm"]) for line in lines]


def kill_twenty_times(config: Path, rng: random.Random) -> int:
    """Kill while the run starts, and shortly after or in the middle of a checkpoint; returns the number of kills."""
    before_first, between = 1.0, 0.1
    for kills in range(KILLS):
        begin, at = time.monotonic(), newest(config)
        ranks = start(config)
        if rng.random() < 0.25:
            time.sleep(rng.uniform(0, before_first))
        else:
            run_until(config, at + 1, ranks)
            before_first = time.monotonic() - begin
            time.sleep(rng.uniform(0, 2 * between))
        if not ranks.running:
            return kills
        ranks.kill(rng.choice([(0, 1), (1, 0)]))
    return KILLS


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_twenty_kills_change_no_bit(recipe: Callable[..., Path], stage: int) -> None:
    """Every step's loss and gradient norm, the checkpoint (weights, moments, average) and both model files."""
    engine = {"zero_stage": stage}
    data = {"workers": int(stage == 1)}  # a decoding process too, at one of the stages
    straight = finish(recipe("straight", engine=engine))
    config = recipe("killed", engine=engine, data=data)
    assert kill_twenty_times(config, random.Random(stage)) == KILLS, "the run finished first: give it more epochs"
    killed = finish(config)
    assert curve(killed) == curve(straight)
    assert len(curve(straight)) == 48
    records = [json.loads((run / "checkpoints/step-000048/state.json").read_text()) for run in (killed, straight)]
    assert records[0]["files"] == records[1]["files"]
    assert records[0]["state"]["best"] == records[1]["state"]["best"]
    for name in ("last.safetensors", "model.safetensors"):
        ours, theirs = (read_tensors(run / name)[0] for run in (killed, straight))
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-3)])
def test_other_world_sizes_and_stages_continue_alike(
    recipe: Callable[..., Path], precision: str, tolerance: float
) -> None:
    """2 processes at ZeRO-3, killed; 1 at ZeRO-3, killed; 3 at ZeRO-1: the losses of 2 at ZeRO-1 throughout.

    The tolerance is absolute; losses are below 1. Drop path is off because it depends on the rank. With three processes
    one gets a partition of nothing but padding (of the head's two biases), which crashes DeepSpeed's own universal
    checkpoint.
    """
    same: dict[str, Any] = {
        "model": {"drop_path": 0.0},
        "optim": {"batch": 6, "epochs": 9, "micro_batch": 2},
    }
    engine = {"precision": precision}
    straight = finish(recipe("straight", engine=engine, **same))
    for size, stage, until in ((2, 3, 6), (1, 3, 12)):
        config = recipe("moved", engine=engine | {"zero_stage": stage}, **same)
        ranks = start(config, size)
        run_until(config, until, ranks)
        ranks.kill(range(size))
        assert newest(config) < 18, "the run must not have finished"
    moved = finish(recipe("moved", engine=engine | {"zero_stage": 1}, **same), 3)
    assert [step for step, *_ in curve(moved)] == list(range(1, 19))
    np.testing.assert_allclose(
        [row[1] for row in curve(moved)], [row[1] for row in curve(straight)], rtol=0, atol=tolerance
    )


@pytest.mark.slow
def test_every_stage_has_the_losses_of_a_plain_loop_over_the_whole_batch(tmp_path: Path) -> None:
    """A loop in plain PyTorch against two processes with accumulation, activation checkpointing and layer decay."""
    steps = 5
    ranks = Ranks(2, resume_worker.curves, tmp_path, steps, log=tmp_path / "log")
    module = network().train()
    groups = parameter_groups(module, module.depths, weight_decay=0.05, layer_decay=0.75)  # type: ignore[arg-type]  # a SwinV2
    adam = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999), eps=1e-6)
    expected = []
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = LR * (1 - step / steps) * group["lr_scale"]
        images, labels = clips(step)
        loss = nn.functional.cross_entropy(module(images), labels)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        expected.append((loss.item(), float(norm)))
    assert len(images) == BATCH
    assert max(norm for _, norm in expected) > 1, "clipping must bite"
    assert ranks.wait() == [0, 0], (tmp_path / "log").read_text()[-3000:]
    for stage in STAGES:
        found, weights = torch.load(tmp_path / f"stage-{stage}.pt", weights_only=True)
        np.testing.assert_allclose(found, expected, rtol=2e-5, err_msg=f"ZeRO-{stage}")
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=f"ZeRO-{stage}: {name}")


def test_stopping_asks_for_a_restart_and_a_damaged_checkpoint_is_skipped(recipe: Callable[..., Path]) -> None:
    """SIGTERM to one process stops both with code 75 and a marker; a cut-off checkpoint is skipped."""
    config = recipe("told", optim={"epochs": 4})
    ranks = start(config)
    run_until(config, 3, ranks)
    os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
    assert ranks.wait() == [EXIT_RESTART, EXIT_RESTART]
    folder, stopped = config.with_suffix(""), newest(config)
    assert (folder / RESTART_MARKER).exists()
    weights = folder / "checkpoints" / f"step-{stopped:06d}" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    finish(config)
    said = config.with_suffix(".log").read_text()
    assert f"skipped a damaged checkpoint: {weights}" in said
    assert f"own checkpoint, step {stopped - 1} of 12" in said
    assert [step for step, *_ in curve(folder)] == list(range(1, 13))
    assert not (folder / RESTART_MARKER).exists()
