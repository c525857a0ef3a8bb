"""Training and validation samples, addressed by (epoch, index): what an address gives never depends on who asks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from video_swinv2.config import AugmentConfig, DataConfig, MaskConfig, WeightedSource
from video_swinv2.data.collection import EVERYTHING, Collection
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.images import IMAGE_SUFFIXES, image_tree, read_image, read_member
from video_swinv2.data.index import Indexed, Listed, Member
from video_swinv2.data.manifest import Entry, Manifest, find_splits, read_manifest
from video_swinv2.data.mixture import Mixture, Part, Place
from video_swinv2.data.sampling import centre_clip, frame_indices, random_clip, seeded
from video_swinv2.data.shards import shard_collection
from video_swinv2.data.transforms import training_transform, validation_transform
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.simmim import mask_cells, random_mask

LISTS = ("dataset.json", "train.csv", "train.txt")  # a folder with one of them is what it says, whatever else it holds
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
    A file that cannot be read is named in the sample and replaced by the next one; a labelled validation sample
    is not replaced but gets the label BROKEN, which counts as a wrong answer.
    """

    def __init__(
        self,
        entries: Sequence[Entry] | Mixture,
        data: DataConfig,
        augment: AugmentConfig | None,
        seed: int,
        mask: MaskConfig | None,
    ) -> None:
        size = (data.image_size,) * 2 if isinstance(data.image_size, int) else data.image_size
        if len(size) != 2:
            raise UsageError(f"data.image_size: {list(size)} is not a number or [H, W]")
        self.mixture = entries if isinstance(entries, Mixture) else Mixture([Part(compact(entries))])
        self.decoded: tuple[tuple[int, int], Tensor | DecodeError] | None = None
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
        return len(self.mixture)

    def __getitem__(self, address: Address) -> Sample:
        """The sample at (epoch, number); UserError if no file at all can be read."""
        epoch, number = address
        broken: list[str] = []
        for step in range(self.mixture.total):
            place = self.mixture[number + step]
            label = place.entry.label
            with seeded(self.seed, epoch, number) as generator:
                try:
                    pixels = self.transform(self._read(place, epoch))
                except DecodeError as error:
                    broken.append(str(error))
                    if self.random or label < 0:
                        continue
                    label, pixels = BROKEN, torch.zeros((self.data.frames or 1, 3, *self.size), dtype=torch.uint8)
                mask = random_mask(self.cells, self.mask_ratio, generator) if self.cells else None
            pixels = pixels[0] if self.data.frames is None else pixels.transpose(0, 1)
            return Sample(pixels.contiguous(), label, mask, tuple(dict.fromkeys(broken)))
        raise UserError(f"{broken[0]}; nor can any other of the {len(broken)} files be read: check the data set")

    def _read(self, place: Place, epoch: int) -> Tensor:
        """(T, 3, H, W) uint8: a clip, or T = 1 for an image model."""
        if isinstance(place.entry, Member):
            return read_member(place.entry)[None]
        if place.entry.path.suffix.lower() in IMAGE_SUFFIXES:
            return read_image(place.entry.path)[None]
        # All samples of a video are neighbours in the order, so its last decoding is mostly theirs.
        key = (epoch, place.first)
        if self.decoded is None or self.decoded[0] != key:
            self.decoded = key, self._decode(place, key)
        clips = self.decoded[1]
        if isinstance(clips, DecodeError):
            raise clips
        return clips[place.nth]

    def _decode(self, place: Place, key: Address) -> Tensor | DecodeError:
        """All clips of a video in this epoch, (clips, T, 3, H, W) uint8, in one pass; or what is wrong with it."""
        frames, stride = self.data.frames or 1, self.data.frame_stride
        try:
            with VideoReader(place.entry.path, time_limit_seconds=self.data.decode_seconds) as video:
                clips = [centre_clip(len(video), frames, stride)] * place.of
                if self.random:
                    with seeded(self.seed, *key):
                        clips = [spread_clip(len(video), frames, stride, nth, place.of) for nth in range(place.of)]
                pixels = video.frames([frame for clip in clips for frame in clip], self.data.short_side)
        except DecodeError as error:
            return error
        return pixels.unflatten(0, (place.of, frames))


def spread_clip(n: int, frames: int, stride: int, nth: int, of: int) -> tuple[int, ...]:
    """The `nth` of `of` random clips of one video: its start is drawn from the `nth` of equal parts of all starts.

    So the clips of a video never begin alike if it has frames enough. One clip alone is `random_clip`.
    """
    starts = max(n - frames * stride, 0) + 1
    low = starts * nth // of
    high = max(starts * (nth + 1) // of, low + 1)
    start = low + random_clip(high - low + frames * stride - 1, frames, stride)[0]
    return frame_indices(start, frames, stride, n)


def labelled(data: DataConfig, split: str, classes: Sequence[str] | None = None) -> Manifest:
    """The one data set of a supervised run; UsageError if there are several sources or a sample without a label.

    Images of a tree or of tar shards have a split `val` even where only train is there (one in twenty of each class is
    held out), and a split `all`.
    """
    source = _only(data)
    if images := images_of(source):
        return images.manifest(split, classes)
    manifest = read_manifest(Path(source), split, classes)
    unlabelled = next((entry for entry in manifest.entries if entry.label < 0), None)
    if unlabelled:
        raise UsageError(
            f"{unlabelled.path}: has no label in split {split}; add one, or leave the file out of the list"
        )
    check_present(manifest.entries)
    return manifest


def labelled_splits(data: DataConfig) -> tuple[str, ...]:
    """The splits that `labelled` can give."""
    source = _only(data)
    images = images_of(source)
    return images.split_names if images else find_splits(Path(source))


def unlabelled(data: DataConfig, validation: bool) -> Mixture:
    """All samples of a self-supervised run: images, frames or clips of all sources, never of a test split.

    In training each source has its weight, and a video gives `frames_per_video` samples; in validation everything held
    out comes once.
    """
    split = data.val_split if validation else data.train_split
    refusal = "data.train_split, data.val_split: test samples are neither for training nor for choosing"
    if split == "test":
        raise UsageError(refusal)
    parts = []
    for source in data.source:
        path = os.fspath(source)
        if images := images_of(path):
            if data.frames is not None:
                raise UsageError(f"{path}: holds images, and data.frames asks for clips; leave one of them away")
            if split == EVERYTHING and "test" in images.filled:
                raise UsageError(refusal)
            entries: Sequence[Entry | Member] = images.entries(split)
            repeats = 1
        else:
            videos = read_manifest(Path(path), split).entries if split in find_splits(Path(path)) else ()
            check_present(videos)
            entries, repeats = compact(videos), 1 if validation else data.frames_per_video
        weight = source.weight if isinstance(source, WeightedSource) and not validation else None
        if len(entries):
            parts.append(Part(entries, repeats, weight))
        elif weight is not None:
            raise UserError(f"{path}: nothing to train on, but it has a weight; take it out of data.source")
    if not parts:
        asked = ", ".join(map(str, data.source))
        raise UserError(f"{asked}: nothing to {'validate' if validation else 'train'} on")
    return Mixture(parts)


def compact(entries: Sequence[Entry]) -> Sequence[Entry | Member]:
    """The same entries in a form that loader workers share; their own objects would be copied into each."""
    return entries if isinstance(entries, (Indexed, Listed)) else Listed(entries)


def _only(data: DataConfig) -> str:
    if len(data.source) != 1:
        raise UsageError(f"data.source: training with labels takes one data set, not {len(data.source)}")
    return os.fspath(data.source[0])


def images_of(source: str) -> Collection | None:
    """The images of a tree or of tar shards; None for a data set of videos (has lists, or holds videos only)."""
    path = Path(source)
    if any((path / name).is_file() for name in LISTS) or (path.is_file() and path.suffix != ".tar"):
        return None
    if path.is_dir():
        return image_tree(path.absolute()) or shard_collection(source)
    shards = shard_collection(source)
    if shards is None:
        raise UserError(f"{source}: no such data set or folder (data.source)")
    return shards


def check_present(entries: Sequence[Entry]) -> None:
    """UserError naming the first listed file that does not exist: known now, not at the end of the first epoch."""
    missing = [entry.path for entry in entries if not entry.path.is_file()]
    if missing:
        raise UserError(
            f"{missing[0]}: listed but not there, one of {len(missing)} of {len(entries)} files; "
            "prepare the data set again or take them out of the list"
        )
