"""What the training loop asks of a task, and what tasks share: the fresh model, normalised pixels, model files.

The loop knows steps, processes, checkpoints and schedules; a task knows the data, the model, the loss and how a model
is judged. A new task is a new file beside `classification.py` and `simmim.py` with a class of this protocol, and a
command that passes the class to `training.loop.run`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from video_swinv2.config import Config, DataConfig
from video_swinv2.data.datasets import Batch, SampleDataset
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.variants import create_model
from video_swinv2.weights.store import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, save_model

Forward = Callable[..., Tensor]
"""The engine's forward pass: the task's module in autocast, and whatever ZeRO needs around it."""


class Task(Protocol):
    """What one run learns, as the training loop sees it.

    A task is constructed from the config alone, with the random seed already set, and inside ZeRO-3's partitioned
    construction where that is on: parameters of `module` may hold no values of their own afterwards.
    """

    name: str
    """What is trained on what, such as `SimMIM on clips`; written into model files and later read as their ancestry."""
    module: nn.Module
    """What the engine trains: the encoder with whatever heads the loss needs."""
    encoder: SwinV2
    """The backbone inside `module`, or `module` itself; `init` fills it, and layer decay counts its blocks."""
    train_samples: SampleDataset
    val_samples: SampleDataset | None
    """None if the data has no validation split."""
    best_metric: str
    """The validation metric that decides which weights are kept as `model.safetensors`, such as `val/top1`."""
    higher_is_better: bool
    data_facts: dict[str, object]
    """What run.json and model files record about the data: sources, fingerprints, sizes."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the head's outputs; None for a task without classes."""

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The mean training loss of a micro-batch that is on the device already."""

    def tally(self, forward: Forward, batch: Batch) -> dict[str, float]:
        """Sums over a validation micro-batch, which the loop adds up and divides by the sum called `samples`.

        Only sums over samples are exact for any split into micro-batches and processes; a mean of means is not.
        """

    def picture(self, forward: Forward, device: torch.device) -> Tensor | None:
        """What the model makes of a few validation samples, (3, H, W) uint8, or None if the task draws nothing.

        Called on every process alike, because under ZeRO-3 each forward pass is a collective.
        """

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write a model file with these weights in place of the module's own."""

    def training_flops(self) -> float:
        """Floating-point operations of one sample's forward and backward pass."""

    def next_command(self, folder: Path) -> str:
        """The command that a user most likely runs after this one, given the run folder."""


def build_model(config: Config, num_classes: int) -> SwinV2:
    """A fresh model as configured; raises UsageError naming the key that is wrong."""
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


def sample_kind(config: Config) -> str:
    """What the model is fed, in a word: `images` or `clips`."""
    return "images" if config.data.frames is None else "clips"


def source_facts(config: Config) -> object:
    """`data.source` as plain data for JSON: paths become strings, mixtures keep their shares."""
    return TypeAdapter(DataConfig).dump_python(config.data, mode="json")["source"]


def normalised_pixels(batch: Batch) -> Tensor:
    """The uint8 pixels of a batch as normalised floats, same shape.

    Normalising on the device, not in the loader workers, moves a quarter of the bytes through queues and to the GPU.
    """
    return normalise(batch.pixels, IMAGENET_MEAN, IMAGENET_STD)


def save_task_model(
    module: nn.Module,
    path: Path,
    classes: tuple[str, ...],
    config: Config,
    weights: Mapping[str, Tensor],
    provenance: Mapping[str, object],
) -> None:
    """Write a model file that records how its input has to be prepared, so that a test needs nothing but the file."""
    size = config.data.image_size
    height, width = (size, size) if isinstance(size, int) else size
    preprocessing = Preprocessing(config.data.frames, config.data.frame_stride, (height, width))
    save_model(module, path, classes=classes, preprocessing=preprocessing, provenance=provenance, weights=weights)
