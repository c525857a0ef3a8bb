"""The surface of an engine: what the training loop calls, what a step is given and returns, and its random state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from video_swinv2.engine.checkpoint import TrainingState
from video_swinv2.errors import UsageError


@dataclass(frozen=True)
class StepSettings:
    """What makes up an optimizer step, beside the engine section. Raises UsageError naming a value that cannot work."""

    accumulation: int = 1
    """Micro-batches per step."""
    micro_batch: int = 1
    """Samples per process and micro-batch."""
    clip_norm: float | None = None
    """Maximum global L2 norm of the gradients; None disables clipping."""
    ema: float = 0.0
    """Decay per step of the averaged weights; 0 keeps none."""

    def __post_init__(self) -> None:
        for key in ("accumulation", "micro_batch"):
            if getattr(self, key) < 1:
                raise UsageError(f"{key}: {getattr(self, key)} is too small; use 1 or more")
        if self.clip_norm is not None and not self.clip_norm > 0:  # "not >" also catches NaN
            raise UsageError(
                f"clip_norm: {self.clip_norm} would stop all learning; use a positive norm, or null to disable clipping"
            )


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did."""

    applied: bool
    """Whether the weights were updated; False if a loss or gradient was not finite."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping."""
    rescaled: bool = False
    """The step was skipped because the fp16 loss scale was too large, and the scale has been lowered; not a fault of
    the data."""


class Engine(Protocol):
    """What the loop may ask of an engine.

    For each micro-batch: forward, backward, step. All ranks make the same calls in the same order.
    """

    module: nn.Module

    def forward(self, *inputs: Any) -> Any:
        """The module's own forward, in autocast if the precision is bf16 or fp16."""

    def backward(self, loss: Tensor) -> None:
        """Add this micro-batch's gradients; ``loss`` is its mean, not divided by the accumulation."""

    def step(self) -> StepOutcome | None:
        """Count a micro-batch; after the last of a step update the weights and return the outcome, otherwise None.

        If a loss or gradient is not finite on any rank, no weight and no moment changes on any rank.
        """

    def set_lr(self, lr: float) -> None:
        """Set the learning rate, scaled per group, and the weight decay for the next step."""

    def weights(self) -> dict[str, Tensor] | None:
        """Parameters and buffers by name: fp32 copies on the CPU of rank 0, None elsewhere. Collective."""

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """As `weights`, with averages in place of the trained parameters if averages are kept. Collective."""

    def write_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """Copy rank 0's weights into the module on every rank, for validation. Collective; between steps only.

        The optimizer's own copies are not updated: write the module's own weights back before the next step.
        """

    def training_state(self) -> TrainingState | None:
        """Everything that a checkpoint needs, on rank 0; None elsewhere. Collective; between steps only."""

    def load(self, state: TrainingState) -> None:
        """Continue from a checkpoint; every rank passes the same whole tensors. Collective; between steps only.

        Raises UserError naming the tensor that does not fit the module.
        """


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Set the global random state of torch, numpy and `random` from these four numbers alone.

    Drop path, mixup and the like draw from it. None of it needs to be saved: a resumed run draws the same numbers as
    the uninterrupted one.
    """
    words = np.random.SeedSequence((seed, step, micro, rank)).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002 - torchvision and other libraries draw from the old generator
    random.seed(int(words[3]))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's own parameter and buffer objects, under their state-dict names."""
    return module.state_dict(keep_vars=True)


def fp32_cpu_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, fp32 for floating-point tensors; always a copy, because training continues meanwhile."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Inside, autocast frees the half-precision copy of a weight right after its use instead of caching it.

    The cache pays off only where a weight is used several times in a pass, and ours are used once. Autograd still
    keeps the copies that the backward pass needs; for blocks under activation checkpointing there are none.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
