"""The plain engine: PyTorch alone, in one process. Every ZeRO stage is tested against it; one GPU needs no more."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from video_swinv2.distributed.devices import AUTOCAST_DTYPES
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import StepOutcome, StepSettings, fp32_cpu_copy, named_tensors, without_autocast_cache
from video_swinv2.engine.checkpoint import TrainingState
from video_swinv2.engine.ema import WeightAverage
from video_swinv2.engine.gradients import LossScale, poison_if_not_finite, unscale_check_and_clip
from video_swinv2.engine.optimizer import write_hyperparameters
from video_swinv2.engine.zero_layout import (
    WholeParameter,
    applied_steps,
    check_state_fits,
    optimized_parameters,
    read_moments,
    write_moments,
)


class PlainEngine:
    """PyTorch alone, in one process; :class:`base.Engine` documents the methods.

    With one process every method that is collective in DeepSpeed is a local operation, and this process is rank 0.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.AdamW, step: StepSettings, world: World, *, precision: str
    ) -> None:
        self.module = module
        self._optimizer = optimizer
        self._step = step
        self._device = world.device
        # The type of matrix products; None for fp32, which runs without autocast.
        self._dtype = AUTOCAST_DTYPES.get(precision)
        self._scale = LossScale() if precision == "fp16" else None
        self._micro_batches = 0  # since the engine was built
        self._partitions = [WholeParameter(parameter) for parameter in optimized_parameters(optimizer)]
        self._average = WeightAverage(self._partitions, step.ema) if step.ema else None

    def forward(self, *inputs: Any) -> Any:
        """See :class:`base.Engine`."""
        # The order matters: torch.autocast reads the cache setting when it is constructed.
        with without_autocast_cache(), torch.autocast(self._device.type, self._dtype) if self._dtype else nullcontext():
            return self.module(*inputs)

    def backward(self, loss: Tensor) -> None:
        """See :class:`base.Engine`."""
        # One factor for both: the loss scale, and the division that makes the sum over micro-batches their mean.
        scale = self._scale.scale if self._scale else 1.0
        torch.autograd.backward(poison_if_not_finite(loss) * (scale / self._step.accumulation))

    def step(self) -> StepOutcome | None:
        """See :class:`base.Engine`."""
        self._micro_batches += 1
        if self._micro_batches % self._step.accumulation:
            return None
        # If a gradient is not finite this removes all of them, and the optimizer's step then changes nothing.
        outcome = unscale_check_and_clip(self.module, self._step.clip_norm, self._scale)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._average and outcome.applied:
            self._average.update()
        return outcome

    def set_lr(self, lr: float) -> None:
        """See :class:`base.Engine`."""
        write_hyperparameters(self._optimizer, lr)

    def weights(self) -> dict[str, Tensor] | None:
        """See :class:`base.Engine`."""
        return {name: fp32_cpu_copy(tensor) for name, tensor in named_tensors(self.module).items()}

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """See :class:`base.Engine`."""
        # The averages replace the trained parameters; frozen ones and buffers stay as they are.
        return (self.weights() or {}) | (self._average.read(self.module) if self._average else {})

    @torch.no_grad()
    def write_weights(self, weights: Mapping[str, Tensor] | None) -> None:
        """See :class:`base.Engine`."""
        for name, tensor in named_tensors(self.module).items():
            tensor.copy_((weights or {})[name])

    def training_state(self) -> TrainingState | None:
        """See :class:`base.Engine`."""
        moments = read_moments(self.module, self._optimizer, self._partitions)
        average = self._average.read(self.module) if self._average else {}
        scale = self._scale.state() if self._scale else None
        return TrainingState(self.weights() or {}, *moments, applied_steps(self._optimizer), average, scale)

    @torch.no_grad()
    def load(self, state: TrainingState) -> None:
        """See :class:`base.Engine`."""
        check_state_fits(self.module, state)
        self.write_weights(state.weights)
        write_moments(self.module, self._optimizer, self._partitions, state)
        if self._average:
            self._average.write(self.module, state.ema)
        if self._scale:
            self._scale.restore(state.loss_scale)
