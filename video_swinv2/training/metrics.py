"""What a run measures and where it writes it: metrics.jsonl, TensorBoard, versions, the record of the run."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from video_swinv2.data.datasets import Batch
from video_swinv2.errors import UsageError
from video_swinv2.files import atomic_write

Item = TypeVar("Item")
PACKAGES = ("video-swinv2", "torch", "torchvision", "deepspeed", "av", "pytorchvideo", "numpy", "scikit-learn")


class MetricLog:
    """metrics.jsonl and TensorBoard events of a run, continued from `step`: what was written past it is taken back.

    With `wandb`, a project's name, Weights & Biases gets the numbers too: one run there for each run folder.
    """

    def __init__(self, folder: Path, step: int, wandb: str | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            # A run that starts anew measures its start again.
            kept = [line for line in lines if step and line.endswith("}") and json.loads(line)["step"] <= step]
            self.path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board = SummaryWriter(str(folder), purge_step=step + 1)
        self._wandb: Any = open_wandb(wandb, folder) if wandb else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line and one point per value; keys are `train/loss`, `val/top1` and the like."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def picture(self, step: int, pixels: torch.Tensor) -> None:
        """A picture (3, H, W) uint8, as PNG in the run's folder `pictures` and in TensorBoard."""
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


def check_wandb(project: str | None) -> None:
    """UsageError if a project is named and the package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UsageError(f"wandb: {project!r} needs the package wandb; install it, or leave the key away")


def open_wandb(project: str, folder: Path) -> Any:
    """The run of Weights & Biases that belongs to a run folder, the same at every resumption."""
    wandb = importlib.import_module("wandb")
    identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, id=identity, dir=str(folder), resume="allow")


class Waiting:
    """Passes items of an iterable on and adds up the seconds it made the caller wait."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Iterate over `items`, measured."""
        iterator = iter(items)
        while True:
            started = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.seconds += time.perf_counter() - started
            yield item


class Window:
    """Losses and time between two log lines; losses stay on the device until they are needed.

    `inputs` are the sample numbers and the loss of each micro-batch of the step at hand.
    """

    def __init__(self, waited: float = 0.0) -> None:
        self.started = time.perf_counter()
        self.waited = waited
        self.losses: list[torch.Tensor] = []
        self.inputs: list[tuple[tuple[int, ...], torch.Tensor]] = []
        self.grad_norm = math.nan

    def add(self, batch: Batch, loss: torch.Tensor) -> None:
        """Keep the loss of one micro-batch."""
        self.losses.append(loss)
        self.inputs.append((batch.numbers, loss))

    @property
    def count(self) -> int:
        """Micro-batches so far."""
        return len(self.losses)

    @property
    def last_loss(self) -> float:
        """The newest loss; NaN before the first."""
        return float(self.losses[-1]) if self.losses else math.nan

    def loss_sum(self) -> float:
        """Sum of the losses."""
        return float(torch.stack(self.losses).double().sum())


def versions() -> dict[str, str]:
    """Python and the packages whose version can change a result."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def git_state() -> str:
    """Commit of the code that runs, `-dirty` if it was changed since; "" outside a checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
        here = Path(__file__).parent
        return subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
