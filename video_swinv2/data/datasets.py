"""Training and validation samples, addressed by (epoch, index): what an address gives never depends on who asks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from video_swinv2.config import AugmentConfig, DataConfig, MaskConfig
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.manifest import VIDEO_SUFFIXES, Entry, Manifest, find_splits, read_manifest
from video_swinv2.data.sampling import centre_clip, random_clip, seeded
from video_swinv2.data.transforms import training_transform, validation_transform
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.simmim import mask_cells, random_mask

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
HELD_OUT = 20  # one image in this many validates, where a folder of images has no val folder
BROKEN = -100  # the label of a validation sample that could not be read: cross_entropy ignores it, no answer equals it
Address = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One training or validation sample."""

    pixels: Tensor
    """uint8 (3, T, H, W), or (3, H, W) for an image model."""
    label: int
    mask: Tensor | None
    """bool, True = hidden, per mask cell; only for SimMIM."""
    broken: tuple[str, ...]
    """One line for each file that could not be read and was replaced by the next one of the list."""


@dataclass(frozen=True)
class Batch:
    """Samples stacked: pixels (B, 3, ...), labels (B,), masks (B, *cells) or None."""

    pixels: Tensor
    labels: Tensor
    masks: Tensor | None
    broken: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        pixels, labels = self.pixels.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return Batch(pixels, labels, masks, self.broken)

    def pin_memory(self) -> Batch:
        """Page-locked copies, called by the DataLoader."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return Batch(self.pixels.pin_memory(), self.labels.pin_memory(), masks, self.broken)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size."""
    masks = [sample.mask for sample in samples if sample.mask is not None]
    return Batch(
        torch.stack([sample.pixels for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
        torch.stack(masks) if masks else None,
        tuple(line for sample in samples for line in sample.broken),
    )


class SampleDataset(Dataset[Sample]):
    """Clips or images cut out of videos and image files.

    With `augment`, samples are random: a function of (seed, epoch, index). Without, they are the centre clip and crop.
    A file that cannot be read is named in the sample and replaced by the next of the list; a labelled validation sample
    is not replaced but gets the label BROKEN, which counts as a wrong answer.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        data: DataConfig,
        augment: AugmentConfig | None,
        seed: int,
        mask: MaskConfig | None,
    ) -> None:
        size = (data.image_size,) * 2 if isinstance(data.image_size, int) else data.image_size
        if len(size) != 2:
            raise UsageError(f"data.image_size: {list(size)} is not a number or [H, W]")
        self.entries = entries
        self.data = data
        self.size = size
        self.seed = seed
        self.random = augment is not None
        self.mask_ratio = mask.ratio if mask else 0.0
        axes = 2 if data.frames is None else 3
        pixels = size if data.frames is None else (data.frames, *size)
        self.cells = mask_cells(pixels, mask.unit, axes) if mask else None
        self.transform = validation_transform(size) if augment is None else training_transform(augment, size)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, address: Address) -> Sample:
        """The sample at (epoch, index); UserError if no file at all can be read."""
        epoch, index = address
        broken: list[str] = []
        for step in range(len(self)):
            entry = self.entries[(index + step) % len(self)]
            with seeded(self.seed, epoch, index) as generator:
                try:
                    pixels = self.transform(self._read(entry))
                except DecodeError as error:
                    broken.append(str(error))
                    if self.random or entry.label < 0:
                        continue
                    shape = (self.data.frames or 1, 3, *self.size)
                    entry, pixels = replace(entry, label=BROKEN), torch.zeros(shape, dtype=torch.uint8)
                mask = random_mask(self.cells, self.mask_ratio, generator) if self.cells else None
            pixels = pixels[0] if self.data.frames is None else pixels.transpose(0, 1)
            return Sample(pixels.contiguous(), entry.label, mask, tuple(broken))
        raise UserError(f"{broken[0]}; nor can any other of the {len(broken)} files be read: check the data set")

    def _read(self, entry: Entry) -> Tensor:
        """(T, 3, H, W) uint8: a clip, or T = 1 for an image model."""
        if entry.path.suffix.lower() in IMAGE_SUFFIXES:
            return read_image(entry.path)[None]
        frames = self.data.frames or 1
        choose = random_clip if self.random else centre_clip
        with VideoReader(entry.path, time_limit_seconds=self.data.decode_seconds) as video:
            return video.frames(choose(len(video), frames, self.data.frame_stride), self.data.short_side)


def read_image(path: Path) -> Tensor:
    """An image file as shown, (3, H, W) uint8 RGB; DecodeError if it is missing, cut off or no image."""
    try:
        with Image.open(path) as image:
            shown = ImageOps.exif_transpose(image).convert("RGB")
            return torch.from_numpy(np.array(shown)).permute(2, 0, 1)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, ValueError, SyntaxError) as error:
        raise DecodeError(f"{path}: not a readable image ({str(error).splitlines()[0]})") from error


def labelled(data: DataConfig, split: str, classes: Sequence[str] | None = None) -> Manifest:
    """The one data set of a supervised run; UsageError if there are several sources or a video without a label."""
    if len(data.source) != 1:
        raise UsageError(f"data.source: training with labels takes one data set, not {len(data.source)}")
    manifest = read_manifest(Path(data.source[0]), split, classes)
    unlabelled = next((entry for entry in manifest.entries if entry.label < 0), None)
    if unlabelled:
        raise UsageError(
            f"{unlabelled.path}: has no label in split {split}; add one, or leave the file out of the list"
        )
    check_present(manifest.entries)
    return manifest


def unlabelled(data: DataConfig, validation: bool) -> list[Entry]:
    """All samples of a self-supervised run: frames of data sets (never of a test split) and files of image folders."""
    entries: list[Entry] = []
    for source in map(Path, data.source):
        if not source.exists():
            raise UserError(f"{source}: no such data set or folder (data.source)")
        images = image_files(source) if source.is_dir() else []
        if images:
            entries += [Entry(str(p.relative_to(source)), p, -1) for p in _held_out(source, images, validation)]
            continue
        split = data.val_split if validation else data.train_split
        if split in find_splits(source):
            videos = read_manifest(source, split).entries
            check_present(videos)
            entries += list(videos) * (1 if validation else data.frames_per_video)
    if not entries:
        raise UserError(f"{', '.join(data.source)}: nothing to {'validate' if validation else 'train'} on")
    return entries


def image_files(folder: Path) -> list[Path]:
    """The image files below a folder, sorted; none if it is a data set of videos (has lists, or holds videos only).

    UsageError for a folder of both without lists: what is meant cannot be known.
    """
    if any((folder / name).is_file() for name in ("dataset.json", "train.csv", "train.txt")):
        return []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    video = next((path for path in files if path.suffix.lower() in VIDEO_SUFFIXES), None)
    if images and video:
        raise UsageError(
            f"{folder}: holds both images and videos ({video.name}); move one kind away, or add a train.txt"
        )
    return images


def _held_out(folder: Path, images: list[Path], validation: bool) -> list[Path]:
    """Those that validate, or those that do not: the folder `val` if there is one, else one in twenty by name."""
    inside = [p.relative_to(folder) for p in images]
    if any(p.parts[0] == "val" for p in inside):
        chosen = [p.parts[0] == "val" for p in inside]
    else:
        chosen = [hashlib.sha256(p.as_posix().encode()).digest()[0] % HELD_OUT == 0 for p in inside]
    return [image for image, held in zip(images, chosen, strict=True) if held == validation]


def check_present(entries: Sequence[Entry]) -> None:
    """UserError naming the first listed file that does not exist: known now, not at the end of the first epoch."""
    missing = [entry.path for entry in entries if not entry.path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: listed but not there, one of {len(missing)} of {len(entries)} files; "
            "prepare the data set again or take them out of the list"
        )
