"""The metrics of a run and where they go: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from video_swinv2.data.datasets import Batch
from video_swinv2.errors import UsageError
from video_swinv2.files import atomic_write


class MetricLog:
    """metrics.jsonl and TensorBoard events of a run, continued from `step`; later lines are removed first.

    With `wandb`, the name of a project, the numbers also go to Weights & Biases, one run there per run folder.
    """

    def __init__(self, folder: Path, step: int, wandb: str | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            # Lines past the checkpoint that the run resumes from will be measured again. A run that starts from step 0
            # validates its start again, so not even the lines of step 0 stay. A kill may have cut off the last line.
            lines = self.path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if step and line.endswith("}") and json.loads(line)["step"] <= step]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board = SummaryWriter(str(folder), purge_step=step + 1)
        self._wandb: Any = open_wandb(wandb, folder) if wandb else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line, and one point per value; keys are like `train/loss` and `val/top1`."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def write_picture(self, step: int, pixels: torch.Tensor) -> None:
        """Write a picture (3, H, W) uint8 as PNG into the run folder's `pictures`, and to TensorBoard."""
        path = self.path.parent / "pictures" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as part:
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(part, format="PNG")
        self._board.add_image("val/picture", pixels, step)

    def close(self) -> None:
        """Flush the TensorBoard events."""
        if self._wandb is not None:
            self._wandb.finish()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def check_wandb(project: str | None) -> None:
    """Raise UsageError if a project is named and the package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UsageError(f"wandb: {project!r} needs the package wandb; install it, or omit the key")


def open_wandb(project: str, folder: Path) -> Any:
    """Open the Weights & Biases run of a run folder: the same id, and so the same curves, every time it is resumed."""
    wandb = importlib.import_module("wandb")
    identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, id=identity, dir=str(folder), resume="allow")


class LogInterval:
    """Losses and time between two log lines.

    Losses stay on the device until the interval is logged: reading one waits for the GPU. `step_inputs` holds the
    sample numbers and the loss of each micro-batch of the current step, to be written down if the step is skipped.
    """

    def __init__(self, waited_seconds: float = 0.0) -> None:
        self.started = time.perf_counter()
        self.waited_seconds = waited_seconds
        """Reading of the run's WaitTimer when the interval began."""
        self.losses: list[torch.Tensor] = []
        self.step_inputs: list[tuple[tuple[int, ...], torch.Tensor]] = []
        self.grad_norm = math.nan

    def begin_step(self) -> None:
        """Forget the inputs of the step before."""
        self.step_inputs.clear()

    def add(self, batch: Batch, loss: torch.Tensor) -> None:
        """Keep the loss of one micro-batch."""
        self.losses.append(loss)
        self.step_inputs.append((batch.numbers, loss))

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches so far."""
        return len(self.losses)

    @property
    def last_loss(self) -> float:
        """The newest loss; NaN before the first."""
        return float(self.losses[-1]) if self.losses else math.nan

    def loss_sum(self) -> float:
        """Sum of the losses, in float64."""
        return float(torch.stack(self.losses).double().sum())
