"""What is learned: classification or SimMIM. The loop is one; a task brings data, model, loss and measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.config import Config
from video_swinv2.data.datasets import Batch, SampleDataset, labelled, unlabelled
from video_swinv2.data.manifest import class_list_hash, find_splits
from video_swinv2.data.transforms import mix, normalise
from video_swinv2.errors import UsageError
from video_swinv2.models.simmim import SimMIM, masked_l1, normalise_target
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.variants import create_model
from video_swinv2.training.runtime import World
from video_swinv2.training.sharding import is_sharded, values_loaded, whole_twin, write_shards
from video_swinv2.weights.inflate import load_weights
from video_swinv2.weights.store import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, save_model

Forward = Callable[..., Tensor]


class Task(Protocol):
    """What the loop asks of a task."""

    module: nn.Module
    encoder: SwinV2
    train_samples: SampleDataset
    val_samples: SampleDataset | None
    best_metric: str
    """The validation measure that decides which weights are the best."""
    higher_is_better: bool
    facts: dict[str, object]
    """What of the data belongs into the record of the run."""

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Mean training loss of a micro-batch on the device."""

    def tally(self, forward: Forward, batch: Batch) -> dict[str, float]:
        """Sums over a validation micro-batch; `samples` is among them."""

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write a model file."""


class Classification:
    """Cross-entropy on labelled clips or images, with mixup, CutMix and label smoothing."""

    best_metric = "val/top1"
    higher_is_better = True

    def __init__(self, config: Config) -> None:
        self.config = config
        train = labelled(config.data, config.data.train_split)
        self.classes = train.classes
        source = Path(config.data.source[0])
        has_val = config.data.val_split in find_splits(source)
        val = labelled(config.data, config.data.val_split, self.classes) if has_val else None
        self.train_samples = SampleDataset(train.entries, config.data, config.augment, config.seed, None)
        self.val_samples: SampleDataset | None = None
        if val is not None:
            self.val_samples = SampleDataset(val.entries, config.data, None, config.seed, None)
        self.facts: dict[str, object] = {
            "data_fingerprint": train.fingerprint,
            "val_fingerprint": val.fingerprint if val else None,
            "classes": len(self.classes),
            "classes_sha256": class_list_hash(self.classes),
        }
        self.encoder = build_model(config, len(self.classes))
        self.module: nn.Module = self.encoder

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Cross-entropy of a micro-batch, mixed first if the configuration says so."""
        inputs, targets = mix(_normalised(batch), batch.labels, len(self.classes), self.config.augment)
        return F.cross_entropy(forward(inputs).float(), targets, label_smoothing=self.config.optim.label_smoothing)

    def tally(self, forward: Forward, batch: Batch) -> dict[str, float]:
        """Summed loss and correct answers of one centre view per sample."""
        logits = forward(_normalised(batch)).float()
        ranked = logits.topk(min(5, len(self.classes)), dim=1).indices == batch.labels[:, None]
        return {
            "samples": float(len(batch.labels)),
            "loss": float(F.cross_entropy(logits, batch.labels, reduction="sum")),
            "top1": float(ranked[:, 0].sum()),
            "top5": float(ranked.sum()),
        }

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write the classifier with its class list."""
        _save(self.module, path, self.classes, self.config, weights, provenance)


class Pretraining:
    """SimMIM on images, on frames of videos, or on clips."""

    best_metric = "val/loss"
    higher_is_better = False

    def __init__(self, config: Config) -> None:
        self.config = config
        train, val = unlabelled(config.data, validation=False), unlabelled(config.data, validation=True)
        self.train_samples = SampleDataset(train, config.data, config.augment, config.seed, config.mask)
        self.val_samples: SampleDataset | None = SampleDataset(val, config.data, None, config.seed, config.mask)
        self.facts: dict[str, object] = {"samples": len(train), "val_samples": len(val)}
        self.encoder = build_model(config, 0)
        try:
            simmim = SimMIM(self.encoder, config.mask.unit)
        except ValueError as error:
            raise UsageError(f"mask.unit: {error}") from error
        self.mask_unit = simmim.mask_unit
        self.module: nn.Module = simmim

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Masked L1 of a micro-batch."""
        if batch.masks is None:
            raise TypeError("SimMIM needs samples with masks")
        inputs = _normalised(batch)
        target = inputs
        if self.config.mask.normalise_target:
            target = normalise_target(inputs, self.config.mask.normalise_target)
        return masked_l1(forward(inputs, batch.masks), target, batch.masks, self.mask_unit)

    def tally(self, forward: Forward, batch: Batch) -> dict[str, float]:
        """Summed loss under masks that are the same at every validation."""
        samples = float(len(batch.pixels))
        return {"samples": samples, "loss": samples * float(self.loss(forward, batch))}

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write encoder, mask token and decoder."""
        _save(self.module, path, (), self.config, weights, provenance)


def build_model(config: Config, num_classes: int) -> SwinV2:
    """A fresh model of the configuration; UsageError naming the key that is wrong."""
    model, data = config.model, config.data
    try:
        return create_model(
            model.name,
            num_classes=num_classes,
            frames=data.frames,
            image_size=data.image_size,
            patch_size=model.patch_size,
            window=model.window,
            cpb_norm=model.cpb_norm,
            drop_path=model.drop_path,
            head_dropout=model.head_dropout,
            attention=model.attention,
            checkpoint_blocks=model.checkpoint_blocks,
        )
    except ValueError as error:
        raise UsageError(f"model: {error}") from error


def initialise(task: Task, config: Config, world: World) -> tuple[str, dict[str, object]]:
    """Fill the model from `init`; what happened, in words, and where the weights come from. Collective in ZeRO-3."""
    if config.init == "scratch" and config.init_time_noise:
        raise UsageError("init_time_noise: is for inflated weights, and init is scratch; leave it away")
    if config.init == "scratch":
        return "weights: from scratch", {"init": "scratch"}
    classes = task.classes if isinstance(task, Classification) else None
    sharded = is_sharded(task.encoder)
    target = whole_twin(task.encoder) if sharded else task.encoder
    values = values_loaded(target) if sharded else {}
    account = load_weights(
        target,
        config.init,
        classes=classes,
        cpb_norm=config.init_cpb_norm,
        time_noise=config.init_time_noise,
        seed=config.seed,
    )
    if sharded:
        write_shards(task.encoder, values, world)
        task.encoder.cpb_norm = target.cpb_norm
    origin = {"init": config.init, "layout": account.layout, "init_time_noise": config.init_time_noise}
    return str(account), origin | {"provenance": account.provenance}


def preprocessing_of(config: Config) -> Preprocessing:
    """What a model file says of its input."""
    size = config.data.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing(config.data.frames, config.data.frame_stride, (height, width))


def _normalised(batch: Batch) -> Tensor:
    return normalise(batch.pixels, IMAGENET_MEAN, IMAGENET_STD)


def _save(
    module: nn.Module,
    path: Path,
    classes: tuple[str, ...],
    config: Config,
    weights: Mapping[str, Tensor],
    provenance: Mapping[str, object],
) -> None:
    save_model(
        module, path, classes=classes, preprocessing=preprocessing_of(config), provenance=provenance, weights=weights
    )
