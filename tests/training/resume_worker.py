"""Processes for the tests of resumption, forked from a server that has imported everything, so that they start at once.

Each is a real process in a gloo group and runs what the command line runs.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed  # noqa: F401 - importing it takes longer than a run here, so the server does it once for all
import torch
from torch import Tensor, nn

import video_swinv2 as vs
from video_swinv2.cli import main
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.collectives import all_reduce_sum
from video_swinv2.distributed.world import join_world, leave_world
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.training.resume_worker"])

BATCH = 4
LR = 1e-3


class Ranks:
    """The processes of one start of a run, one per rank."""

    def __init__(
        self, size: int, target: Callable[..., None], *arguments: Any, log: Path, absent: Sequence[int] = ()
    ) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.processes = [
            SERVER.Process(target=_as_rank, args=(rank, size, port, log, target, arguments))
            for rank in range(size)
            if rank not in absent
        ]
        for process in self.processes:
            process.start()

    def kill(self, order: Sequence[int]) -> None:
        """Send SIGKILL to each of these ranks, in this order."""
        for rank in order:
            self.processes[rank].kill()
        self.wait()

    def wait(self, seconds: float = 600) -> list[int | None]:
        """Wait for all; returns their exit codes."""
        for process in self.processes:
            process.join(seconds)
        return [process.exitcode for process in self.processes]

    @property
    def running(self) -> bool:
        """Whether all processes are alive."""
        return all(process.is_alive() for process in self.processes)


def _as_rank(rank: int, size: int, port: int, log: Path, target: Callable[..., None], arguments: tuple[Any]) -> None:
    """Set up what torchrun would have set up, then run the target."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    target(*arguments)


def train_run(config: Path) -> None:
    """Run `video-swinv2 train CONFIG` and exit with its code."""
    sys.exit(main(["train", str(config)]))


def network() -> nn.Module:
    """A small SwinV2 for clips, every block under activation checkpointing; no drop path, which depends on the rank."""
    torch.manual_seed(0)
    return vs.create_model(
        "swinv2_nano", num_classes=5, frames=4, image_size=32, window=(2, 4, 4), checkpoint_blocks=100, drop_path=0.0
    )


def clips(step: int) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: clips (4, 3, 4, 32, 32) and labels."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, 4, 32, 32, generator=generator), torch.randint(0, 5, (BATCH,), generator=generator)


def curves(folder: Path, steps: int) -> None:
    """Save loss and gradient norm of each step at every ZeRO stage: two processes, two micro-batches of one clip."""
    world = join_world("cpu")
    try:
        for stage in range(4):
            module = network().train()
            groups = parameter_groups(module, module.depths, weight_decay=0.05, layer_decay=0.75)  # type: ignore[arg-type]  # a SwinV2
            config = EngineConfig(zero_stage=stage, precision="fp32")
            step_settings = StepSettings(accumulation=2, clip_norm=1.0)
            engine = make_engine(module, groups, config, step_settings, world, lr=LR, betas=(0.9, 0.999), eps=1e-6)
            found = []
            for step in range(steps):
                engine.set_lr(LR * (1 - step / steps))
                images, labels = clips(step)
                total, outcome = 0.0, None
                for part in (world.rank, world.rank + 2):
                    loss = nn.functional.cross_entropy(engine.forward(images[part : part + 1]), labels[part : part + 1])
                    engine.backward(loss)
                    outcome = engine.step()
                    total += loss.item() / BATCH
                found.append((all_reduce_sum(world, [total])[0], outcome.grad_norm if outcome else 0.0))
            weights = engine.weights()
            if weights is not None:
                torch.save((found, weights), folder / f"stage-{stage}.pt")
    finally:
        leave_world()
