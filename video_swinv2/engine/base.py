"""The interface that every engine implements, the settings and the outcome of a step, and its random state."""

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
    """The settings of an optimizer step that are not in the `engine` section.

    Raises UsageError naming the first value that cannot work.
    """

    accumulation: int = 1
    """Number of micro-batches whose gradients are averaged in one step."""
    micro_batch: int = 1
    """Number of samples that each process computes in one micro-batch."""
    clip_norm: float | None = None
    """Maximum global L2 norm of the gradients; None disables clipping."""
    ema: float = 0.0
    """Decay per step of the exponential moving average of the weights; 0 keeps no average."""

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
    """Whether the weights were updated; False if a loss or a gradient was not finite on any rank."""
    grad_norm: float
    """Global L2 norm of the gradients before clipping, over all ranks; not finite if the step was skipped."""
    rescaled: bool = False
    """Whether the step was skipped although the data may be fine: the fp16 loss scale may have been too large and has
    been lowered."""


class Engine(Protocol):
    """The methods that the training loop calls.

    For each micro-batch the loop calls forward, backward and step, on all ranks in the same order. Methods described as
    collective communicate: every rank must call them, or the others wait forever. "Between steps" means after a `step`
    that returned an outcome, when no gradients are pending.
    """

    module: nn.Module
    """The model being trained. Under ZeRO-3 its parameters may be empty tensors outside the two passes."""

    def forward(self, *inputs: Any) -> Any:
        """Call the module, inside torch autocast if the precision is bf16 or fp16."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. ``loss`` is the mean of this micro-batch; the engine divides it by the accumulation."""

    def step(self) -> StepOutcome | None:
        """Count a micro-batch. The last one of a step updates the weights and returns the outcome, the others None.

        If a loss or a gradient is not finite on any rank, no weight and no moment changes on any rank.
        """

    def set_lr(self, lr: float) -> None:
        """Set learning rate and weight decay for the next step; ``lr`` is multiplied by each group's ``lr_scale``."""

    def weights(self) -> dict[str, Tensor] | None:
        """Parameters and buffers by name: fp32 copies on the CPU of rank 0, None elsewhere. Collective."""

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """Like `weights`, but with the moving averages of the trained parameters if they are kept. Collective."""

    def write_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """Copy rank 0's weights into the module on every rank, for validation. Collective; between steps only.

        The optimizer's own copies of the weights are not updated: write the trained weights back before the next step.
        """

    def training_state(self) -> TrainingState | None:
        """Everything that a checkpoint needs, copied, on rank 0; None elsewhere. Collective; between steps only."""

    def load(self, state: TrainingState) -> None:
        """Restore a checkpoint; every rank passes the same whole tensors. Collective; between steps only.

        Raises UserError naming the first tensor that does not fit the module.
        """


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed the global generators of torch, numpy and `random` from these four numbers and nothing else.

    Called before every micro-batch, because drop path and mixup draw from the global generators. No random state has to
    be saved in checkpoints: a resumed run draws the same numbers as one that was never interrupted.
    """
    # SeedSequence hashes the numbers, so neighbouring steps and ranks get unrelated streams. It returns 32-bit words:
    # torch takes a 64-bit seed, numpy's old generator and `random` are given one word each.
    words = np.random.SeedSequence((seed, step, micro, rank)).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002 - torchvision and other libraries draw from the old generator
    random.seed(int(words[3]))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The module's parameters and persistent buffers by state-dict name: the objects themselves, not copies."""
    return module.state_dict(keep_vars=True)


def fp32_cpu_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU, in fp32 if floating-point; never a view, because training goes on while it is saved."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)


@contextmanager
def without_autocast_cache() -> Iterator[None]:
    """Inside the context, autocast frees the half-precision copy of a weight after its use instead of caching it.

    The cache only pays off if a weight is used several times in one pass, and ours are used once. Autograd still keeps
    the copies that the backward pass needs, except in blocks under activation checkpointing, which it recomputes.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
