"""Between backward pass and optimizer: the fp16 loss scale, skipping non-finite gradients, and clipping by global norm.

The loss scale keeps small gradients from underflowing to zero in fp16: the loss is multiplied by it before the backward
pass, and the gradients are divided by it afterwards. It depends only on which steps were applied, which is the same on
all ranks, so all ranks hold the same scale without communicating.

DeepSpeed's own loss scale, torch's GradScaler inside its ``torch_autocast``, is switched off: at ZeRO 1-3 it is not
updated when a step overflows, so the first overflow repeats for ever, and norm and clipping use the scaled gradients.
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
    """The factor on the loss: halved when a step overflows, doubled after 2000 applied steps in a row."""

    def __init__(self) -> None:
        self.scale = INITIAL_SCALE
        self.steady_steps = 0

    def update(self, applied: bool) -> bool:
        """Adjust the scale after a step; returns whether the scale may be why the step was skipped, and was lowered.

        At a scale of 1 there is nothing left to lower: a skipped step is then as much a fault as in fp32.
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
        """Scale and steady steps, for a checkpoint."""
        return self.scale, self.steady_steps

    def restore(self, state: tuple[float, int] | None) -> None:
        """Continue from a checkpoint; start over from one without a scale, which was written in another precision."""
        self.scale, self.steady_steps = state or (INITIAL_SCALE, 0)


def poison_if_not_finite(loss: Tensor) -> Tensor:
    """The loss itself if it is finite, otherwise a loss whose every gradient is NaN, which no check can miss.

    Needed because an infinite loss may have finite gradients. Multiplying needs no synchronisation with the GPU, and
    multiplying by 1 changes no bit.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def unscale_check_and_clip(module: nn.Module, clip_norm: float | None, scale: LossScale | None = None) -> StepOutcome:
    """Divide the gradients by the loss scale and clip them by global norm; remove them all if one is not finite.

    Without gradients AdamW skips a parameter entirely: weight, moments and step count stay, and nothing decays.
    """
    trained = [parameter for parameter in module.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if scale:
        torch._foreach_mul_(gradients, 1.0 / scale.scale)
    # One non-finite element makes the norm non-finite, so this single number is the check of all gradients.
    norm = get_total_norm(gradients)
    applied = bool(torch.isfinite(norm))
    if not applied:
        module.zero_grad(set_to_none=True)
    elif clip_norm is not None:
        clip_grads_with_norm_(trained, clip_norm, norm)
    rescaled = scale.update(applied) if scale else False
    return StepOutcome(applied=applied, grad_norm=float(norm), rescaled=rescaled)
