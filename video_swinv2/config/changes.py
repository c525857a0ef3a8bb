"""What a change of each setting means for a run that goes on, and the changes between two configurations of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from video_swinv2.files import json_text

# Every key of a configuration, once: a new key has to be added here too (tested).
CHANGES_LEARNING: dict[str, bool] = {
    # What the model learns from here on, where its weights came from, and which of them are kept as the best ones. A
    # run goes on with another value only if the user accepts that. Some are refused even then, because the steps before
    # and after would not belong together (`TrainingRun._identity`).
    **dict.fromkeys(
        (
            "init",
            "init_cpb_norm",
            "init_time_noise",
            "resume",
            "task",
            "seed",
            "best_metric",
            "model.name",
            "model.patch_size",
            "model.window",
            "model.cpb_norm",
            "model.drop_path",
            "model.head_dropout",
            "data.image_size",
            "data.frames",
            "data.frame_stride",
            "data.frames_per_video",
            "data.short_side",
            "data.decoder",
            "data.train_split",
            "data.val_split",
            "augment.repeats",
            "augment.crop_area",
            "augment.crop_ratio",
            "augment.flip",
            "augment.rand_augment",
            "augment.rand_magnitude",
            "augment.rand_noise",
            "augment.erasing",
            "augment.mixup",
            "augment.cutmix",
            "mask.unit",
            "mask.shape",
            "mask.ratio",
            "mask.normalise_target",
            "segmentation.ignore_index",
            "segmentation.reduce_zero_label",
            "segmentation.scale",
            "segmentation.max_class_share",
            "segmentation.photometric",
            "segmentation.channels",
            "segmentation.auxiliary",
            "detection.kind",
            "detection.short_sides",
            "detection.jitter",
            "detection.drop_faulty",
            "detection.fpn_channels",
            "detection.head_channels",
            "detection.mask_channels",
            "detection.anchor_sizes",
            "detection.proposals",
            "detection.sampled_anchors",
            "detection.sampled_boxes",
            "optim.epochs",  # the learning rate schedule is as long as the run
            "optim.lr",
            "optim.batch",
            "optim.lr_batch",
            "optim.warmup_epochs",
            "optim.warmup_lr",
            "optim.min_lr",
            "optim.schedule",
            "optim.milestones",
            "optim.weight_decay",
            "optim.layer_decay",
            "optim.backbone_lr",
            "optim.frozen_stages",
            "optim.betas",
            "optim.eps",
            "optim.clip_norm",
            "optim.label_smoothing",
            "optim.class_weights",
            "optim.ema",
        ),
        True,
    ),
    # How the run is computed, observed, stored and ended. Such a change is shown and recorded.
    **dict.fromkeys(
        (
            "out",
            "log_every",
            "val_epochs",
            "pictures_epochs",
            "checkpoint_minutes",
            "keep_checkpoints",
            "early_stop_epochs",
            "max_skipped",
            "wandb",
            "model.attention",
            "model.checkpoint_blocks",
            "data.source",  # a moved data set; another one is refused by its fingerprint
            "data.workers",
            "data.decode_seconds",
            "data.max_pixels",
            "data.max_broken",
            "optim.micro_batch",
            "engine.engine",
            "engine.zero_stage",
            "engine.precision",
            "engine.device",
            "engine.communication",
            "engine.offload_optimizer",
            "engine.offload_parameters",
            "engine.offload_folder",
            "engine.compile",
            "engine.meeting_seconds",
            "engine.silence_seconds",
            "engine.deepspeed",
        ),
        False,
    ),
}


@dataclass(frozen=True)
class Change:
    """A setting with two different values, as plain JSON values."""

    key: str
    old: Any
    new: Any

    @property
    def changes_learning(self) -> bool:
        """Whether the change affects what the model learns or which weights are kept."""
        return CHANGES_LEARNING[self.key]

    def __str__(self) -> str:
        old, new = (value if isinstance(value, str) else json_text(value) for value in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The settings that differ between two configurations, in the order of CHANGES_LEARNING.

    Both are the nested plain values of `plain_values`, possibly read back from a file. A key that only one of them has,
    because another version of this program wrote it, is not compared.
    """
    found = [Change(key, _value(old, key), _value(new, key)) for key in CHANGES_LEARNING]
    return [change for change in found if _ABSENT not in (change.old, change.new) and change.old != change.new]


_ABSENT = object()


def _value(values: object, key: str) -> Any:
    """The value of a dotted key in nested values, or _ABSENT."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _ABSENT
        values = values[part]
    return values
