"""Gradient handling between backward pass and optimizer: fp16 loss scale, skipping of non-finite steps, clipping.

The loss scale keeps small gradients from underflowing to zero in fp16: the loss is multiplied by it before the backward
pass, and the gradients are divided by it afterwards. The scale depends only on which steps were applied. That is the
same on all ranks, so their scales stay equal without communication.

DeepSpeed's own loss scale, a torch GradScaler in its ``torch_autocast`` mode, is switched off. At ZeRO 1-3 it is not
updated when a step overflows, so once a step has overflowed every later one does too, and both the norm and clipping
use the gradients before they are divided by the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from video_swinv2.engine.base import StepOutcome

# The defaults of torch.amp.GradScaler.
INITIAL_SCALE = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
GROWTH_INTERVAL = 2000  # steps


class LossScale:
    """The factor on the loss in fp16: halved when a step overflows, doubled after 2000 applied steps in a row."""

    def __init__(self) -> None:
        self.scale = INITIAL_SCALE
        self.steady_steps = 0  # applied steps since the scale last changed

    def update(self, applied: bool) -> bool:
        """Adjust the scale after a step. Returns True if the step was skipped and the scale could still be lowered.

        Too large a scale is then the likely cause, not the data. At a scale of 1 nothing is left to lower, and a
        skipped step counts as a fault of the data or the model, as it does in fp32.
        """
        if applied:
            self.steady_steps += 1
            if self.steady_steps == GROWTH_INTERVAL:
                self.scale, self.steady_steps = self.scale * GROWTH, 0
            return False
        lowered = self.scale > 1.0
        self.scale, self.steady_steps = max(1.0, self.scale * BACKOFF), 0
        return lowered

    def state(self) -> tuple[float, int]:
        """The scale and the number of steady steps, for a checkpoint."""
        return self.scale, self.steady_steps

    def restore(self, state: tuple[float, int] | None) -> None:
        """Restore from a checkpoint. One written in another precision has no scale; start with the initial one then."""
        self.scale, self.steady_steps = state or (INITIAL_SCALE, 0)


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """Return a finite loss unchanged, and any other one as NaN, so that all of its gradients become NaN.

    An infinite loss may have finite gradients, which the check of the gradients would let pass. Multiplying by 1 or NaN
    decides this on the device: an `if` would wait for the GPU. Multiplying by 1 changes no bit.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def unscale_check_and_clip(module: nn.Module, clip_norm: float | None, scale: LossScale | None = None) -> StepOutcome:
    """Divide the gradients by the loss scale, then clip them by global norm or, if any is not finite, remove them all.

    AdamW skips a parameter that has no gradient: its weight, moments and step count do not change, and it does not
    decay. The optimizer may therefore be called in either case.
    """
    trained = [parameter for parameter in module.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if scale:
        # Before the norm is taken, so that the reported norm and the clipping threshold mean the same as in fp32.
        torch._foreach_mul_(gradients, 1.0 / scale.scale)
    # A single non-finite element makes the norm non-finite, so checking this one number checks all gradients.
    norm = get_total_norm(gradients)
    applied = bool(torch.isfinite(norm))  # waits for the GPU, once per step
    if not applied:
        module.zero_grad(set_to_none=True)
    elif clip_norm is not None:
        clip_grads_with_norm_(trained, clip_norm, norm)
    rescaled = scale.update(applied) if scale else False
    return StepOutcome(applied=applied, grad_norm=float(norm), rescaled=rescaled)
