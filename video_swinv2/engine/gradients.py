"""What stands between gradients and weights: nothing that is not finite may pass, and norms are cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from video_swinv2.engine.loss_scale import LossScale


@dataclass(frozen=True)
class StepOutcome:
    """What an optimizer step did: whether the weights moved, and the global L2 gradient norm before clipping.

    ``rescaled``: it was dropped since the loss scale of fp16 was too large, and has been lowered; no fault of the data.
    """

    applied: bool
    grad_norm: float
    rescaled: bool = False


def poisoned(loss: Tensor) -> Tensor:
    """The loss itself if finite, else one whose every gradient is NaN, so that the engines' guards cannot miss it.

    An infinite loss may have finite gradients. Multiplying costs no synchronisation, and by 1 no bit either.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


def guard_and_clip(module: nn.Module, clip_norm: float | None, scale: LossScale | None = None) -> StepOutcome:
    """Divide the gradients by the loss scale, take their norm, clip them; all are dropped if it is not finite.

    AdamW skips a parameter without gradient wholly: weight, moments and decay stay as they are.
    """
    trained = [parameter for parameter in module.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if scale:
        torch._foreach_mul_(gradients, 1.0 / scale.scale)
    norm = get_total_norm(gradients)
    applied = bool(torch.isfinite(norm))
    if not applied:
        module.zero_grad(set_to_none=True)
    elif clip_norm is not None:
        clip_grads_with_norm_(trained, clip_norm, norm)
    rescaled = scale.update(applied) if scale else False
    return StepOutcome(applied=applied, grad_norm=float(norm), rescaled=rescaled)
