"""Training and validation samples, addressed by (epoch, index): what an address gives never depends on who asks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

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
# Opening a video and decoding its frames each run against the reader's own clock; what takes longer hangs in a library.
CLOCKS_PER_VIDEO = 3
GRACE_SECONDS = 5.0


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
    number: int
    """The number it was asked for by."""
    seconds: float
    """Time spent reading and augmenting it."""


@dataclass(frozen=True)
class Batch:
    """Samples stacked: pixels (B, 3, ...), labels (B,), masks (B, *cells) or None; numbers and seconds of each."""

    pixels: Tensor
    labels: Tensor
    masks: Tensor | None
    broken: tuple[str, ...]
    numbers: tuple[int, ...]
    seconds: tuple[float, ...]

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        pixels, labels = self.pixels.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, labels=labels, masks=masks)

    def pin_memory(self) -> Batch:
        """Page-locked copies, called by the DataLoader."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory(), masks=masks)


def collate(samples: Sequence[Sample], repeats: int = 1) -> Batch:
    """Stack samples of one size; those of one clip, `repeats` neighbours, are moved apart.

    Mixing pairs neighbours in a batch: a clip mixed with itself would be no mixing.
    """
    samples = [samples[place] for nth in range(repeats) for place in range(nth, len(samples), repeats)]
    masks = [sample.mask for sample in samples if sample.mask is not None]
    return Batch(
        torch.stack([sample.pixels for sample in samples]),
        torch.tensor([sample.label for sample in samples]),
        torch.stack(masks) if masks else None,
        tuple(line for sample in samples for line in sample.broken),
        tuple(sample.number for sample in samples),
        tuple(sample.seconds for sample in samples),
    )


class SampleDataset(Dataset[Sample]):
    """Clips or images cut out of videos and image files.

    With `augment`, samples are random: a function of (seed, epoch, index). Without, they are the centre clip and crop.
    A file that cannot be read is named in the sample and replaced by the next one; a labelled validation sample
    is not replaced but gets the label BROKEN, which counts as a wrong answer.

    With `augment.repeats` that many neighbours in the order are the same clip, decoded once and augmented anew.
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
        self.repeats = augment.repeats if augment else 1
        self.mixture = entries if isinstance(entries, Mixture) else Mixture([Part(compact(entries), self.repeats)])
        self.decoded: tuple[Address, Tensor | DecodeError] | None = None
        self.lost: dict[int, str] = {}
        """Why files, by their first number, are not to be opened again: a worker did not live through it."""
        self.at_work: Tensor | None = None
        """(workers, 3) float64, shared: pid, first number of the file in hand or -1, since when (monotonic seconds)."""
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
        started = time.perf_counter()
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
            seconds = time.perf_counter() - started
            return Sample(pixels.contiguous(), label, mask, tuple(dict.fromkeys(broken)), number, seconds)
        raise UserError(f"{broken[0]}; nor can any other of the {len(broken)} files be read: check the data set")

    def name(self, number: int) -> str:
        """The file a sample number points to."""
        entry = self.mixture[number].entry
        return f"{entry.path}/{entry.name}" if isinstance(entry, Member) else str(entry.path)

    def _read(self, place: Place, epoch: int) -> Tensor:
        """(T, 3, H, W) uint8: a clip, or T = 1 for an image model."""
        # All samples of a file are neighbours in the order, so its last decoding is mostly theirs.
        key = (epoch, place.first)
        if self.decoded is None or self.decoded[0] != key:
            self.decoded = key, self._decode(place, key)
        clips = self.decoded[1]
        if isinstance(clips, DecodeError):
            raise clips
        return clips[place.nth // self.repeats]

    def _decode(self, place: Place, key: Address) -> Tensor | DecodeError:
        """All clips of a file in this epoch, (clips, T, 3, H, W) uint8, in one pass; or what is wrong with it."""
        first = place.first % self.mixture.total
        if first in self.lost:
            return DecodeError(f"{place.entry.path}: {self.lost[first]}", "timeout")
        try:
            with self._watched(first):
                if isinstance(place.entry, Member):
                    return read_member(place.entry)[None, None]
                if place.entry.path.suffix.lower() in IMAGE_SUFFIXES:
                    return read_image(place.entry.path)[None, None]
                return self._decode_video(place, key)
        except DecodeError as error:
            return error

    def _decode_video(self, place: Place, key: Address) -> Tensor:
        frames, stride, count = self.data.frames or 1, self.data.frame_stride, max(place.of // self.repeats, 1)
        with VideoReader(place.entry.path, time_limit_seconds=self.data.decode_seconds) as video:
            clips = [centre_clip(len(video), frames, stride)] * count
            if self.random:
                with seeded(self.seed, *key):
                    clips = [spread_clip(len(video), frames, stride, nth, count) for nth in range(count)]
            pixels = video.frames([frame for clip in clips for frame in clip], self.data.short_side)
        return pixels.unflatten(0, (count, frames))

    @property
    def patience_seconds(self) -> float:
        """How long reading one file may take before its worker is taken for hung."""
        return CLOCKS_PER_VIDEO * self.data.decode_seconds + GRACE_SECONDS

    @contextmanager
    def _watched(self, first: int) -> Iterator[None]:
        """In a loader worker: an alarm ends the process if a library does not return, and what it read is on record."""
        worker = get_worker_info()
        if worker is None or self.at_work is None:
            yield
            return
        row = self.at_work[worker.id]
        row.copy_(torch.tensor([os.getpid(), first, time.monotonic()], dtype=torch.float64))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler in Python would wait for the call to return
        signal.setitimer(signal.ITIMER_REAL, self.patience_seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            row[1] = -1


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


def unlabelled(data: DataConfig, validation: bool, repeats: int = 1) -> Mixture:
    """All samples of a self-supervised run: images, frames or clips of all sources, never of a test split.

    In training each source has its weight, a video gives `frames_per_video` samples, and each of those `repeats`
    (`augment.repeats`); in validation everything held out comes once.
    """
    repeats = 1 if validation else repeats
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
            each = repeats
        else:
            videos = read_manifest(Path(path), split).entries if split in find_splits(Path(path)) else ()
            check_present(videos)
            entries, each = compact(videos), 1 if validation else data.frames_per_video * repeats
        weight = source.weight if isinstance(source, WeightedSource) and not validation else None
        if len(entries):
            parts.append(Part(entries, each, weight))
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
