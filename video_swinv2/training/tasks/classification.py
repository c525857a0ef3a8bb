"""The classification task: cross-entropy on labelled images or clips, with mixup, CutMix and class weights.

Letters: B batch, K classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.config import Config
from video_swinv2.data.datasets import Batch, SampleDataset
from video_swinv2.data.manifest import class_list_hash
from video_swinv2.data.sources import labelled_manifest, labelled_splits
from video_swinv2.data.transforms import mix
from video_swinv2.engine.optimizer import freeze_stages
from video_swinv2.training.class_weights import class_weights
from video_swinv2.training.flops import training_flops
from video_swinv2.training.tasks.base import (
    Construction,
    Forward,
    Tally,
    averages,
    build_model,
    command_to_test,
    in_one_process,
    normalised_pixels,
    sample_kind,
    save_task_model,
    source_facts,
)

TOP = 5  # of top-5 accuracy
# Words that a horizontal flip turns into each other.
MIRRORED = (("left", "right"), ("clockwise", "counterclockwise"), ("clockwise", "anticlockwise"))


class Classification:
    """Trains the encoder and its linear head on labelled images or clips; see `base.Task` for the members."""

    def __init__(self, config: Config, construction: Construction = in_one_process) -> None:
        self.config = config
        self.name = f"classification of {sample_kind(config)}"
        train = labelled_manifest(config.data, config.data.train_split)
        self.classes = train.classes
        splits = labelled_splits(config.data)
        has_val = config.data.val_split in splits
        # Where nothing was set aside for the test, the command that comes next tests on the validation split.
        self._test_split = config.data.val_split if has_val and "test" not in splits else "test"
        # The classes of the training split define the outputs of the head, so the validation split is labelled by them.
        val = labelled_manifest(config.data, config.data.val_split, self.classes) if has_val else None
        self.train_samples = SampleDataset(train.entries, config.data, config.augment, config.seed, None)
        self.notes = (*train.notes, *flip_notes(config.augment.flip, self.classes))
        self.class_weights = class_weights(
            config.optim.class_weights,
            self.classes,
            lambda: torch.bincount(torch.tensor([entry.label for entry in train.entries]), minlength=len(self.classes)),
            "sample",
        )
        # Of five classes or fewer, any answer is among the first five.
        self.has_top5 = len(self.classes) > TOP
        self.metrics: Mapping[str, bool] = {"val/top1": True, "val/loss": False} | (
            {"val/top5": True} if self.has_top5 else {}
        )
        self.val_samples: SampleDataset | None = None
        if val is not None:
            # Without augmentation: the centre clip and crop of each video.
            self.val_samples = SampleDataset(val.entries, config.data, None, config.seed, None)
        self.data_facts: dict[str, object] = {
            "source": source_facts(config),
            "samples": len(self.train_samples),
            "val_samples": len(val.entries) if val else 0,
            "data_fingerprint": train.fingerprint,
            "val_fingerprint": val.fingerprint if val else None,
            "classes": len(self.classes),
            "classes_sha256": class_list_hash(self.classes),
        }
        with construction(self.data_facts):
            self.encoder = build_model(config, len(self.classes))
        freeze_stages(self.encoder, config.optim.frozen_stages)
        self.module: nn.Module = self.encoder

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The mean cross-entropy of a micro-batch, after mixup or CutMix if the config sets them."""
        # `mix` draws from the global generators, which the loop has seeded from (seed, step, micro-batch, rank).
        inputs, targets = mix(normalised_pixels(batch), batch.labels, len(self.classes), self.config.augment)
        weights = None if self.class_weights is None else self.class_weights.to(inputs.device, non_blocking=True)
        # The targets (B, K) are class probabilities, even without mixing. For probabilities cross_entropy divides the
        # weighted sum by B; for integer labels it would divide by the sum of the class weights in the micro-batch. Only
        # the former makes the mean over micro-batches and processes equal to the mean over the global batch.
        smoothing = self.config.optim.label_smoothing
        return F.cross_entropy(forward(inputs).float(), targets, weight=weights, label_smoothing=smoothing)

    def tally(self, forward: Forward, batch: Batch) -> Tally:
        """The summed loss and the numbers of correct answers, on the centre clip and crop of each sample."""
        # A sample that could not be read has the label UNREADABLE_LABEL (-100): cross_entropy ignores it and no answer
        # equals it, but it is part of `samples`. So it counts as a wrong answer and adds nothing to the loss.
        logits = forward(normalised_pixels(batch)).float()
        # (B, 5), or (B, K) for fewer classes: column r is True where the model's answer number r is the label. At most
        # one column of a row is True, so the sum over all columns counts the samples with the label among the first 5.
        correct = logits.topk(min(TOP, len(self.classes)), dim=1).indices == batch.labels[:, None]
        sums = {
            "samples": float(len(batch.labels)),
            "loss": float(F.cross_entropy(logits, batch.labels, reduction="sum")),
            "top1": float(correct[:, 0].sum()),
        }
        return sums | ({"top5": float(correct.sum())} if self.has_top5 else {})

    def figures(self, tally: Tally) -> dict[str, float]:
        """The means over all samples."""
        return averages(tally)

    def picture(self, forward: Forward, device: torch.device) -> None:
        """Classification has no picture to draw."""

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write a model file that also contains the class names."""
        save_task_model(self.module, path, self.classes, self.config, weights, provenance)

    def training_flops(self) -> float:
        """Floating-point operations of one sample's forward and backward pass."""
        return training_flops(self.encoder, frozen_stages=self.config.optim.frozen_stages)

    def next_command(self, folder: Path) -> str:
        """The command that tests the best weights with the usual protocol for images or clips."""
        protocol = "center-1x1" if self.config.data.frames is None else "videoswin-4x3"
        return command_to_test(self.config, folder, self._test_split, f"--protocol {protocol}")


def mirrored_classes(classes: Sequence[str]) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """A pair of MIRRORED of which both words occur in class names, and a class with each; None if there is none."""
    first: dict[str, str] = {}  # the first class with each word
    for name in classes:
        # "SwipeLeft" -> "swipe left", "turn_counter-clockwise" -> "turn counterclockwise"
        spaced = re.sub(r"[\W_]+", " ", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)).lower()
        for word in re.sub(r"\b(counter|anti) clockwise\b", r"\1clockwise", spaced).split():
            first.setdefault(re.sub(r"wards?$", "", word), name)
    pair = next((pair for pair in MIRRORED if all(word in first for word in pair)), None)
    return None if pair is None else (pair, (first[pair[0]], first[pair[1]]))


def flip_notes(flip: float, classes: Sequence[str]) -> tuple[str, ...]:
    """A line to print if flips are on, and a flip turns what one class name says into what another does."""
    if not flip or (mirrored := mirrored_classes(classes)) is None:
        return ()
    pair, names = mirrored
    found = " and ".join(dict.fromkeys(map(repr, names)))
    return (
        f"augment.flip: {flip:g} of the samples are mirrored and keep their label, though class names tell {pair[0]} "
        f"from {pair[1]} ({found}); set augment.flip=0 unless a mirrored sample still belongs to its class",
    )
