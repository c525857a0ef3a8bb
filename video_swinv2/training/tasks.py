"""What is learned: classification or SimMIM. The loop is one; a task brings data, model, loss and measures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from video_swinv2.config import Config, DataConfig, MaskConfig
from video_swinv2.data.datasets import Batch, SampleDataset, labelled, labelled_splits, unlabelled
from video_swinv2.data.manifest import Manifest, class_list_hash
from video_swinv2.data.transforms import denormalise, mix, normalise
from video_swinv2.distributed.world import World
from video_swinv2.engine.optimizer import freeze
from video_swinv2.engine.zero3 import is_sharded, values_loaded, whole_twin, write_shards
from video_swinv2.errors import UsageError
from video_swinv2.files import sha256
from video_swinv2.models.simmim import (
    SimMIM,
    grow,
    hidden_cells,
    mask_cells,
    masked_l1,
    masked_mean,
    normalise_target,
    restore_target,
    tube_unit,
)
from video_swinv2.models.swinv2 import SwinV2, per_axis
from video_swinv2.models.variants import create_model
from video_swinv2.training.ancestry import ancestors_of
from video_swinv2.training.pictures import chosen_samples, draw
from video_swinv2.weights.formats import read_checkpoint
from video_swinv2.weights.inflate import fill
from video_swinv2.weights.store import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, save_model

Forward = Callable[..., Tensor]


class Task(Protocol):
    """What the loop asks of a task."""

    name: str
    """What the run is for, as ancestors of later models are told."""
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

    def picture(self, forward: Forward, device: torch.device) -> Tensor | None:
        """What the model makes of a few validation samples, (3, H, W) uint8; None where there is nothing to see."""

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write a model file."""


class Classification:
    """Cross-entropy on labelled clips or images, with mixup, CutMix and label smoothing."""

    best_metric = "val/top1"
    higher_is_better = True

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = f"classification of {_kind(config)}"
        train = labelled(config.data, config.data.train_split)
        self.classes = train.classes
        has_val = config.data.val_split in labelled_splits(config.data)
        val = labelled(config.data, config.data.val_split, self.classes) if has_val else None
        self.train_samples = SampleDataset(train.entries, config.data, config.augment, config.seed, None)
        self.class_weights = class_weights(config.optim.class_weights, train)
        self.val_samples: SampleDataset | None = None
        if val is not None:
            self.val_samples = SampleDataset(val.entries, config.data, None, config.seed, None)
        self.facts: dict[str, object] = {
            "source": _sources(config),
            "data_fingerprint": train.fingerprint,
            "val_fingerprint": val.fingerprint if val else None,
            "classes": len(self.classes),
            "classes_sha256": class_list_hash(self.classes),
        }
        self.encoder = build_model(config, len(self.classes))
        freeze(self.encoder, config.optim.frozen_stages)
        self.module: nn.Module = self.encoder

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Cross-entropy of a micro-batch, mixed first if the configuration says so."""
        inputs, targets = mix(_normalised(batch), batch.labels, len(self.classes), self.config.augment)
        weights = None if self.class_weights is None else self.class_weights.to(inputs.device)
        # Targets are shares of classes, so the mean is over samples and not over their weights: it is the same
        # whatever the micro-batches and processes are.
        smoothing = self.config.optim.label_smoothing
        return F.cross_entropy(forward(inputs).float(), targets, weight=weights, label_smoothing=smoothing)

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

    def picture(self, forward: Forward, device: torch.device) -> None:
        """Nothing to see."""

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write the classifier with its class list."""
        _save(self.module, path, self.classes, self.config, weights, provenance)


class Pretraining:
    """SimMIM on images, on frames of videos, or on clips."""

    best_metric = "val/loss"
    higher_is_better = False

    def __init__(self, config: Config) -> None:
        self.config = config
        self.name = f"SimMIM on {_kind(config)}"
        for key, wanted in (("frozen_stages", 0), ("class_weights", None), ("backbone_lr", 1.0)):
            if getattr(config.optim, key) != wanted:
                raise UsageError(f"optim.{key}: is for `train`; leave it away in `pretrain`")
        self.encoder = build_model(config, 0)
        mask = resolved_mask(config, self.encoder)
        self.mask_unit = per_axis("mask_unit", mask.unit, len(self.encoder.patch_size))
        self.module: nn.Module = SimMIM(self.encoder, self.mask_unit)
        train = unlabelled(config.data, validation=False, repeats=config.augment.repeats)
        val = unlabelled(config.data, validation=True)
        self.train_samples = SampleDataset(train, config.data, config.augment, config.seed, mask)
        # Without augmentation a sample and its mask depend on the seed and its place in the list alone.
        self.val_samples: SampleDataset | None = SampleDataset(val, config.data, None, config.seed, mask)
        self.facts: dict[str, object] = {
            "source": _sources(config),
            "samples": len(train),
            "val_samples": len(val),
        }

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Masked L1 of a micro-batch."""
        inputs, masks, target = self._inputs(batch)
        return masked_l1(forward(inputs, masks), target, masks, self.mask_unit)

    def tally(self, forward: Forward, batch: Batch) -> dict[str, float]:
        """Summed loss of each sample, and that of `masked_mean`, under masks that are the same at every validation."""
        inputs, masks, target = self._inputs(batch)
        predictions = {"loss": forward(inputs, masks), "mean_loss": masked_mean(target, masks, self.mask_unit)}
        sums = {"samples": float(len(inputs))}
        for key, prediction in predictions.items():
            # One by one: where cells are cut by the border, samples do not hide the same number of pixels.
            samples = zip(prediction.split(1), target.split(1), masks.split(1), strict=True)
            sums[key] = sum(float(masked_l1(p, t, m, self.mask_unit)) for p, t, m in samples)
        return sums

    def picture(self, forward: Forward, device: torch.device) -> Tensor | None:
        """The same few validation samples each time, `training.pictures.draw`n. All processes forward alike."""
        if self.val_samples is None:
            return None
        inputs, masks, _ = self._inputs(chosen_samples(self.val_samples).to(device))
        prediction = forward(inputs, masks).float()
        if self.config.mask.normalise_target:
            # By the statistics of the original, which the model does not know: contrast and colour are the original's.
            prediction = restore_target(prediction, inputs, self.config.mask.normalise_target)
        hidden = grow(masks, self.mask_unit, inputs.shape[2:])
        original, reconstructed = (denormalise(x, IMAGENET_MEAN, IMAGENET_STD) for x in (inputs, prediction))
        return draw(original, reconstructed, hidden).cpu()

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised pixels, masks and the target of a micro-batch."""
        if batch.masks is None:
            raise TypeError("SimMIM needs samples with masks")
        inputs, patch = _normalised(batch), self.config.mask.normalise_target
        return inputs, batch.masks, normalise_target(inputs, patch) if patch else inputs

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write encoder, mask token and decoder."""
        _save(self.module, path, (), self.config, weights, provenance)


def class_weights(wanted: str | tuple[float, ...] | None, train: Manifest) -> Tensor | None:
    """(K,) weights of the classes as `optim.class_weights` says; UsageError if they do not fit the training split.

    `balanced` weighs a class by samples / (classes x samples of it), so that the mean over all samples is 1.
    """
    if wanted is None:
        return None
    if isinstance(wanted, str):
        counts = torch.bincount(torch.tensor([entry.label for entry in train.entries]), minlength=len(train.classes))
        if not counts.all():
            empty = train.classes[int(counts.argmin())]
            raise UsageError(f"optim.class_weights: class {empty!r} has no training sample; give numbers")
        return len(train.entries) / (len(counts) * counts.float())
    if len(wanted) != len(train.classes):
        raise UsageError(f"optim.class_weights: {len(wanted)} weights for {len(train.classes)} classes; give each one")
    return torch.tensor(wanted)


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


def resolved_mask(config: Config, encoder: SwinV2) -> MaskConfig:
    """The mask settings with a cell that fits the model, a tube's as long as the clip; UsageError naming the key."""
    mask, data, patch = config.mask, config.data, encoder.patch_size
    if mask.normalise_target == 1 or (mask.normalise_target and mask.normalise_target % 2 == 0):
        raise UsageError(f"mask.normalise_target: {mask.normalise_target} has no middle; take an odd number from 3 on")
    if mask.shape == "tube" and data.frames is None:
        raise UsageError("mask.shape: a tube is for clips; set data.frames, or leave shape away")
    try:
        unit = per_axis("mask.unit", mask.unit, len(patch))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if mask.shape == "tube" and data.frames is not None:
        unit = tube_unit(unit, data.frames, patch[0])
    if any(cell % side for cell, side in zip(unit, patch, strict=True)):
        raise UsageError(f"mask.unit: {list(unit)} is not a multiple of the model's patch {list(patch)}")
    pixels = encoder.image_size if data.frames is None else (data.frames, *encoder.image_size)
    cells = mask_cells(pixels, unit, len(patch))
    if hidden_cells(cells, mask.ratio) == math.prod(cells):
        raise UsageError(f"mask.unit: all {math.prod(cells)} cells would be hidden; take a smaller unit, or ratio")
    return dataclasses.replace(mask, unit=unit)


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
    checkpoint = read_checkpoint(config.init)
    account = fill(
        target,
        checkpoint,
        classes=classes,
        cpb_norm=config.init_cpb_norm,
        time_noise=config.init_time_noise,
        seed=config.seed,
    )
    if sharded:
        write_shards(task.encoder, values, world)
        task.encoder.cpb_norm = target.cpb_norm
    # Large files: only the first process, which writes the record, reads them once more.
    digests = {file.name: sha256(file) for file in checkpoint.source.files} if world.rank == 0 else {}
    return str(account), {
        "init": config.init,
        "layout": account.layout,
        "init_time_noise": config.init_time_noise,
        "ancestors": ancestors_of(config.init, digests, account.provenance),
    }


def preprocessing_of(config: Config) -> Preprocessing:
    """What a model file says of its input."""
    size = config.data.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return Preprocessing(config.data.frames, config.data.frame_stride, (height, width))


def _kind(config: Config) -> str:
    return "images" if config.data.frames is None else "clips"


def _sources(config: Config) -> object:
    """`data.source` as plain data."""
    return TypeAdapter(DataConfig).dump_python(config.data, mode="json")["source"]


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
