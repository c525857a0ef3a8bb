"""The metrics of a run: collected between log lines, written to metrics.jsonl, TensorBoard and Weights & Biases."""

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
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import atomic_write, json_text
from video_swinv2.records import parse_json, read_bytes
from video_swinv2.report.training_run import MAX_METRICS_BYTES


class MetricLog:
    """Appends to the metrics.jsonl and the TensorBoard events of a run folder; only rank 0 has one.

    step: the step from which the run continues. Lines after it, left by an interrupted run, are removed.
    wandb: the name of a Weights & Biases project that also gets the numbers; each run folder is one run there.
    """

    def __init__(self, folder: Path, step: int, wandb: str | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            # The steps after the checkpoint are taken again, and so are their measurements. A run that starts from step
            # 0 also validates its initial weights again, so nothing is kept. If the process was killed while it wrote,
            # the last line lacks its closing brace and is dropped.
            kept = [line for line in read_metrics(folder) if step and line["step"] <= step]
            self.path.write_text("".join(f"{json_text(line)}\n" for line in kept), encoding="utf-8")
        # TensorBoard hides the events that an interrupted run wrote for purge_step and later steps.
        self._board = SummaryWriter(str(folder), purge_step=step + 1)
        self._wandb: Any = open_wandb(wandb, folder) if wandb else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step, under keys such as `train/loss`: one line, and one point of each curve.

        A value that is not finite, such as the gradient norm of a skipped step, is left out: JSON has no number for it,
        and a curve no place.
        """
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        # Opened and closed for each line, so that a killed process loses at most the line that it was writing.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def write_picture(self, step: int, pixels: torch.Tensor) -> None:
        """Write a picture, (3, H, W) uint8, as a PNG in the run folder's `pictures` and as a TensorBoard image."""
        path = self.path.parent / "pictures" / f"step-{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as part:
            # (3, H, W) -> (H, W, 3). PIL cannot infer the format, because the partial file ends in .part.
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(part, format="PNG")
        self._board.add_image("val/picture", pixels, step)

    def close(self) -> None:
        """Flush the TensorBoard events and finish the Weights & Biases run."""
        if self._wandb is not None:
            self._wandb.finish()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All lines of a run folder's metrics.jsonl, oldest first: `step` and the finite values measured then.

    The last line is left out if it is incomplete, because the process was killed while it wrote. Raises UserError,
    naming the line, for any other fault.
    """
    path = folder / "metrics.jsonl"
    lines = read_bytes(path, MAX_METRICS_BYTES).splitlines()
    if lines and not lines[-1].endswith(b"}"):
        lines.pop()
    return [_parse_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse_line(text: bytes, where: str) -> dict[str, float]:
    fix = "remove the line"
    values = parse_json(text, where, fix)
    if not isinstance(values, dict) or "step" not in values:
        raise UserError(f"{where}: no measurement of a step; {fix}")
    # Older versions wrote values that are not finite.
    values = {key: value for key, value in values.items() if value is not None or key == "step"}
    wrong = next((key for key, value in values.items() if type(value) not in (int, float)), None)
    if wrong is not None:
        raise UserError(f"{where}: {wrong}: not a number; {fix}")
    return values


def check_wandb(project: str | None) -> None:
    """Raise UsageError if a Weights & Biases project is configured but its package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise UsageError(f"wandb: {project!r} needs the package wandb; install it, or omit the key")


def open_wandb(project: str, folder: Path) -> Any:
    """Open the Weights & Biases run of a run folder.

    Its id is derived from the folder's absolute path, so a resumed run continues the same curves.
    """
    # Imported by name, because the package is optional and its import takes time.
    wandb = importlib.import_module("wandb")
    identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
    return wandb.init(project=project, name=folder.name, id=identity, dir=str(folder), resume="allow")


class LogInterval:
    """The losses of this process and the time since the last log line.

    Losses stay on the device as tensors until they are needed, because reading one waits for the GPU.
    """

    def __init__(self, waited_seconds: float = 0.0) -> None:
        self.started = time.perf_counter()  # moved forward by the loop after a validation, to leave its time out
        self.waited_seconds = waited_seconds
        """The run's total wait for samples, by its WaitTimer, when the interval began."""
        self.losses: list[torch.Tensor] = []
        self.step_inputs: list[tuple[tuple[int, ...], torch.Tensor]] = []
        """Sample numbers and loss of each micro-batch of the current step, in case the step is skipped."""
        self.grad_norm = math.nan
        """Gradient norm of the latest step."""

    def begin_step(self) -> None:
        """Forget the inputs of the previous step."""
        self.step_inputs.clear()

    def add(self, batch: Batch, loss: torch.Tensor) -> None:
        """Record the loss and the sample numbers of a micro-batch."""
        self.losses.append(loss)
        self.step_inputs.append((batch.numbers, loss))

    @property
    def micro_batches(self) -> int:
        """How many micro-batches this process has taken in this interval."""
        return len(self.losses)

    @property
    def last_loss(self) -> float:
        """The loss of the latest micro-batch; NaN before the first one. Waits for the GPU."""
        return float(self.losses[-1]) if self.losses else math.nan

    def finite_losses(self) -> tuple[float, int]:
        """The sum of the finite losses, in float64, and their number: one read from the GPU for the whole interval.

        A micro-batch whose loss is not finite belongs to a skipped step, which `skipped.jsonl` describes.
        """
        losses = torch.stack(self.losses).double()
        finite = losses.isfinite()
        total, count = torch.stack([losses.where(finite, 0.0).sum(), finite.sum()]).tolist()
        return total, int(count)
