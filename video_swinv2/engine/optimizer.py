"""AdamW and its settings: parameter groups by depth, weight decay by parameter name, learning rate by step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from video_swinv2.config import OptimConfig
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.parameters import decays, layer_id, stage_id
from video_swinv2.models.swinv2 import DropPath, SwinV2


def parameter_groups(
    module: nn.Module, depths: Sequence[int], *, weight_decay: float, layer_decay: float = 1.0, backbone_lr: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters as optimizer groups, from shallow to deep.

    Each group has ``name params parameter_names lr_scale weight_decay``. ``lr_scale`` is ``layer_decay ** (sum(depths)
    + 1 - layer_id)`` (BEiT, SimMIM), times ``backbone_lr`` for everything but the head (Video Swin), which in a dense
    model is everything outside the encoder. If both are 1, there are at most two groups, with and without weight decay.
    Raises UserError if there is nothing to train,
    ValueError for a parameter name that does not fit ``depths``, and UsageError for a layer decay outside (0, 1].
    """
    if not 0.0 < layer_decay <= 1.0:
        raise UsageError(f"optim.layer_decay: {layer_decay} is not in (0, 1]; use 1 to disable it")
    last = sum(depths) + 1  # layer ids: 0 patch embedding, 1 to sum(depths) the blocks, then norm and head
    # Parameters by (layer, whether at the full learning rate, whether decayed). Without layer decay all count as the
    # last layer, which keeps the number of groups small: each group costs a collective per step.
    members: dict[tuple[int, bool, bool], list[tuple[str, nn.Parameter]]] = {}
    wrapped = any("encoder." in name for name, _ in module.named_parameters())
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            layer = layer_id(name, depths)  # always called, because it refuses names that do not fit
            in_head = "encoder." not in name if wrapped else name.startswith("head.")
            at_full_rate = backbone_lr == 1.0 or in_head
            key = (layer if layer_decay < 1.0 else last, at_full_rate, decays(name, parameter))
            members.setdefault(key, []).append((name, parameter))
    if not members:
        raise UserError("optim.frozen_stages: no parameter is left to train; freeze fewer stages")
    groups = []
    # Shallow to deep; within a layer the backbone before the head, then the decayed group before the other.
    for (layer, full, decayed), named in sorted(members.items(), key=lambda item: (*item[0][:2], not item[0][2])):
        # For example "layer_07_backbone_no_decay", or "all_layers_decay" if neither factor is used.
        label = f"layer_{layer:02d}" if layer_decay < 1.0 else "all_layers"
        label += "" if backbone_lr == 1.0 else "_head" if full else "_backbone"
        group_decay = weight_decay if decayed else 0.0
        groups.append(
            {
                "name": f"{label}_{'decay' if decayed else 'no_decay'}",
                "params": [parameter for _, parameter in named],
                "parameter_names": [name for name, _ in named],
                "lr_scale": layer_decay ** (last - layer) * (1.0 if full else backbone_lr),
                "weight_decay": group_decay,
                # `write_hyperparameters` copies this to weight_decay before every step, because an optimizer may write
                # to weight_decay, for example when it restores a state.
                "configured_weight_decay": group_decay,
            }
        )
    _check_complete(module, groups)
    return groups


def freeze_stages(encoder: SwinV2, stages: int) -> None:
    """Freeze the patch embedding and the first `stages` stages, and switch off drop path in those stages.

    With 0 stages the patch embedding stays trainable too. Raises UsageError if the model has fewer stages.
    """
    if stages > len(encoder.depths):
        raise UsageError(
            f"optim.frozen_stages: {stages} is more than the model's {len(encoder.depths)} stages; use fewer"
        )
    if not stages:
        return
    for name, parameter in encoder.named_parameters():
        if stage_id(name, encoder.depths) <= stages:  # 0 is the patch embedding, i + 1 is stage i
            parameter.requires_grad_(False)
    # Drop path is the only randomness in a stage. Without it, frozen stages compute the same as in eval mode.
    for stage in encoder.stages()[:stages]:
        for part in stage.modules():
            if isinstance(part, DropPath):
                part.rate = 0.0


def linear_scaling(optim: OptimConfig) -> float:
    """Factor on learning rates by the linear scaling rule, batch / lr_batch (Goyal et al. 2017); 1 without lr_batch."""
    return optim.batch / optim.lr_batch if optim.lr_batch else 1.0


def _check_complete(module: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    """Raise UserError unless the groups contain every trainable parameter exactly once."""
    # Compared by identity, because tensors compare element by element. Equal lengths exclude duplicates.
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    wanted = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
    if len(grouped) != len(wanted) or set(grouped) != wanted:
        raise UserError(
            f"optimizer groups: {len(wanted)} parameters are trainable but the groups contain {len(grouped)}"
        )


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the optimizer step: linear warm-up, then cosine, linear or multi-step decay.

    A function of the step alone: nothing has to be saved for a run to resume. Raises UsageError for invalid values.
    """

    lr: float
    """The peak, reached at the end of the warm-up."""
    steps: int
    """Number of steps of the whole run, warm-up included."""
    warmup_steps: int
    min_lr: float = 0.0
    warmup_lr: float = 0.0
    kind: str = "cosine"
    milestones: tuple[int, ...] = ()
    """For multistep: steps from which on the learning rate is multiplied by `factor` once more."""
    factor: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in ("cosine", "linear", "multistep"):
            raise UsageError(f"optim.schedule: unknown schedule {self.kind!r}; use cosine, linear or multistep")
        if self.steps < 1 or not 0 <= self.warmup_steps <= self.steps:
            raise UsageError(
                f"optim.warmup_epochs: {self.warmup_steps} warm-up steps do not fit into {self.steps} steps; use fewer"
            )
        if min(self.lr, self.min_lr, self.warmup_lr) < 0:
            raise UsageError("optim: lr, min_lr and warmup_lr must not be negative")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise UsageError(f"optim.milestones: {list(self.milestones)} must be increasing steps")
        if self.milestones and self.kind != "multistep":
            raise UsageError(
                "optim.milestones: only used by a multistep schedule; remove them or use optim.schedule=multistep"
            )

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0.

        With a warm-up, step 0 has ``warmup_lr`` (by default 0, so that it changes no weight) and step ``warmup_steps``
        the peak. The cosine and the linear schedule arrive at ``min_lr`` after the last step, so the rate of that step,
        ``steps`` - 1, is a little higher. These are the rules of timm's CosineLRScheduler (with ``warmup_prefix``) and
        of torch's LinearLR and CosineAnnealingLR. Linear is the "poly" of segmentation recipes with a power of 1.
        multistep never falls below ``min_lr``.
        """
        if step < self.warmup_steps:
            return self.warmup_lr + (self.lr - self.warmup_lr) * step / self.warmup_steps
        if self.kind == "multistep":
            # bisect_right counts the milestones <= step: the step of a milestone already has the lower rate.
            return max(self.min_lr, self.lr * self.factor ** bisect_right(self.milestones, step))
        # The check also excludes a division by 0, if all steps are warm-up.
        if step >= self.steps:
            return self.min_lr
        progress = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        # Half a cosine period over the steps after the warm-up, or a straight line.
        share = 1.0 - progress if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        return self.min_lr + (self.lr - self.min_lr) * share


def make_schedule(optim: OptimConfig, steps: int, samples: int) -> Schedule:
    """The schedule of a run of `steps` steps. The configuration's epochs, of `samples` samples, become steps."""

    def to_steps(epochs: float) -> int:
        return round(epochs * samples / optim.batch)

    scaling = linear_scaling(optim)
    return Schedule(
        lr=optim.lr * scaling,
        steps=steps,
        warmup_steps=min(to_steps(optim.warmup_epochs), steps),
        min_lr=optim.min_lr * scaling,
        warmup_lr=optim.warmup_lr * scaling,
        kind=optim.schedule,
        milestones=tuple(to_steps(epoch) for epoch in optim.milestones),
    )


def write_hyperparameters(optimizer: Any, lr: float) -> None:
    """Write learning rate and weight decay into every group of a torch or DeepSpeed optimizer, before every step.

    Both always come from the configuration and never from a checkpoint, so a run resumed with other values uses them.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = group["configured_weight_decay"]


def build_optimizer(
    groups: Sequence[dict[str, Any]], *, betas: tuple[float, float], eps: float, device: torch.device
) -> torch.optim.AdamW:
    """AdamW over the groups, fused on CUDA. Its learning rate is 0 until `write_hyperparameters` sets it."""
    return torch.optim.AdamW(list(groups), lr=0.0, betas=betas, eps=eps, fused=device.type == "cuda")
