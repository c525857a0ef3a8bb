"""The interface between the training loop and its tasks, and what tasks share: models, pixels and model files.

The loop is responsible for steps, processes, checkpoints and schedules; a task for the data, the model, the loss and
the metrics. To add a task, write a class with the methods of `Task` in a new file beside the others, and add it to
`choosing.py`, which finds the class for the key `task` of a configuration.

A dense task (boxes, masks of pixels) gives its `SampleDataset` the annotations of its images. Its batches then have
targets, and may be padded (`data.datasets`). In validation each of its images is a batch of its own, because padding
would change what the model sees. What it measures need not be a mean over samples: `tally` may return counts as a
tensor, or a list of what was found, and `figures` makes metrics of them.

Letters: B batch, T frames, H W pixels.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import Tensor, nn

from video_swinv2.config import Config, DataConfig
from video_swinv2.data.datasets import Batch, SampleDataset
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.variants import create_model
from video_swinv2.weights.store import save_model

Forward = Callable[..., Any]
"""`Engine.forward`, which tasks call instead of their module: it adds autocast and what ZeRO needs."""
Tally = dict[str, Any]
"""What is counted during a validation, by name. A number or a tensor on the CPU is summed over all samples; a list is
joined. Plain data, because processes send it to each other."""


class Task(Protocol):
    """What a run learns, as the training loop sees it.

    A task is constructed from the config, after the random seed has been set, and builds `module` inside the context
    that it is given. Under ZeRO-3 the parameters of `module` are therefore empty outside a gather.
    """

    name: str
    """What is trained on what, such as `SimMIM on clips`. Model files record it as part of their ancestry."""
    module: nn.Module
    """What the engine trains: the encoder and whatever else the loss needs, such as a decoder."""
    encoder: SwinV2
    """The backbone: a part of `module`, or `module` itself. `init` loads it, and layer decay counts its blocks."""
    train_samples: SampleDataset
    val_samples: SampleDataset | None
    """None if the data has no validation split."""
    metrics: Mapping[str, bool]
    """The validation metrics by which the weights for `model.safetensors` can be chosen, and whether a higher value is
    better. The first is the default."""
    data_facts: dict[str, object]
    """What run.json and model files record about the data: sources, fingerprints and sizes, as plain JSON values."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Class names in the order of the head's outputs; None for a task without classes."""

    @property
    def notes(self) -> Sequence[str]:
        """Lines to print at the start of a run: what in the config looks wrong for these data."""

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """The mean training loss of a micro-batch, a scalar. The batch is already on the device."""

    def tally(self, forward: Forward, batch: Batch) -> Tally:
        """Sums over the samples of a validation micro-batch, which the loop adds up over micro-batches and processes.

        They are sums because a mean of means would depend on how the samples are split into micro-batches.
        """

    def figures(self, tally: Tally) -> dict[str, float]:
        """The metrics of a whole validation, without the `val/` of their names, from what `tally` has counted."""

    def picture(self, forward: Forward, device: torch.device) -> Tensor | None:
        """A picture that shows the model's output on a few validation samples, (3, H, W) uint8; None for none.

        Called on every process, because under ZeRO-3 each forward pass is a collective.
        """

    def save(self, path: Path, weights: Mapping[str, Tensor], provenance: Mapping[str, object]) -> None:
        """Write a model file with the given weights, which replace those of the module."""

    def training_flops(self) -> float:
        """Floating-point operations of one sample's forward and backward pass."""

    def next_command(self, folder: Path) -> str:
        """The command that a user will most likely run next, for the given run folder."""


Construction = Callable[[Mapping[str, object]], AbstractContextManager[None]]
"""Opens the context in which a task has to build its module, and nothing else: ZeRO-3 partitions every new module
(`partitioned_construction`). Called with `Task.data_facts`, in which all processes have to agree before."""

MakeTask = Callable[[Config, Construction], Task]
"""Constructs a task; the class of a task is one."""

GAP = 2  # white pixels between the tiles of a picture


def in_one_process(data_facts: Mapping[str, object]) -> AbstractContextManager[None]:
    """The construction of a task outside a run: nothing is partitioned, and nobody has to agree."""
    return nullcontext()


def averages(tally: Tally) -> dict[str, float]:
    """The sums of a tally divided by its key `samples`: the `figures` of tasks that measure nothing but means."""
    return {key: value / tally["samples"] for key, value in sorted(tally.items()) if key != "samples"}


def build_model(config: Config, num_classes: int, features_only: bool = False) -> SwinV2:
    """A model with random weights, built from the config. Raises UsageError naming the key that is wrong.

    features_only: for the backbone of a dense task, which gives feature maps and has no head.
    """
    # The keys of the model section are constructor arguments; the sizes of the input come from the data section.
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
            features_only=features_only,
        )
    except ValueError as error:
        raise UsageError(f"model: {error}") from error


def sample_kind(config: Config) -> str:
    """What the model takes: `images` or `clips`."""
    return "images" if config.data.frames is None else "clips"


def source_facts(config: Config) -> object:
    """`data.source` as plain JSON values: paths become strings, and mixtures keep their weights."""
    return TypeAdapter(DataConfig).dump_python(config.data, mode="json")["source"]


def normalised_pixels(batch: Batch) -> Tensor:
    """The uint8 pixels of a batch, normalised with ImageNet's mean and deviation: float, (B, 3, [T,] H, W) as before.

    Done on the device and not in the loader workers, because uint8 is a quarter of the bytes to move to the GPU.
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
    """Write a model file that also records how its input must be prepared, so that a test needs no config."""
    # frames is None for image models; a single number stands for square images.
    size = config.data.image_size
    height, width = (size, size) if isinstance(size, int) else size
    preprocessing = Preprocessing(config.data.frames, config.data.frame_stride, (height, width))
    save_model(module, path, classes=classes, preprocessing=preprocessing, provenance=provenance, weights=weights)


def contact_sheet(rows: Sequence[Tensor]) -> Tensor:
    """Join R rows: clips (B, 3, T, H, W) -> (3, B R H, T W), images (B, 3, H, W) -> (3, R H, B W), plus the gaps."""
    # Images are laid out as the frames of a single clip: (B, 3, H, W) -> (1, 3, T = B, H, W).
    clips = [row.transpose(0, 1)[None] if row.ndim == 4 else row for row in rows]
    # R times (B, 3, T, H, W) -> (B, R, 3, T, H, W); each tile gets a white gap at its right and bottom.
    tiles = F.pad(torch.stack(clips, dim=1), (0, GAP, 0, GAP), value=255)
    samples, count, channels, frames, height, width = tiles.shape
    # -> (3, B, R, H, T, W): samples, their rows and pixel rows run down the sheet, frames and pixel columns across.
    sheet = tiles.permute(2, 0, 1, 4, 3, 5)
    # -> (3, B R H, T W), without the gaps at the right and bottom edge of the sheet.
    return sheet.reshape(channels, samples * count * height, frames * width)[:, :-GAP, :-GAP]


def command_to_test(config: Config, folder: Path, split: str, *options: str) -> str:
    """The command that tests the best weights of a run in `folder` on a split of its data set."""
    model, data, out = (
        shlex.quote(os.fspath(path)) for path in (folder / "model.safetensors", config.data.source[0], folder / "test")
    )
    chosen = () if split == "test" else (f"--split {shlex.quote(split)}",)
    return " ".join(("video-swinv2 test", model, data, *options, *chosen, f"--out {out}"))
