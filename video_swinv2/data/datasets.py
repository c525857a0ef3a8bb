"""Training and validation samples, addressed by (epoch, number): the same address gives the same sample to anyone.

Letters: B batch, C channels, T frames, H W pixels.

A sample is a function of (seed, epoch, number). It does not depend on the worker that reads it, on what was read before
or on the number of processes, so a resumed run sees exactly what an undisturbed one would have seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from video_swinv2.config import AugmentConfig, DataConfig, MaskConfig
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.images import is_image_file, read_image, read_tar_member
from video_swinv2.data.index import TarMember, compact_entries
from video_swinv2.data.manifest import Entry
from video_swinv2.data.mixture import Mixture, MixtureSource, SampleOrigin
from video_swinv2.data.sampling import centre_clip, seeded, spread_clip
from video_swinv2.data.transforms import training_transform, validation_transform
from video_swinv2.data.workers import FilesInHand, patience_seconds
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.simmim import mask_cells, random_mask

UNREADABLE_LABEL = -100  # of a validation sample that could not be read: cross_entropy ignores it, no answer equals it
Address = tuple[int, int]
"""(epoch, sample number)."""
GRACE_SECONDS = 5.0  # added to the time that reading a file may take before its worker counts as hung


@dataclass(frozen=True)
class Sample:
    """One training or validation sample."""

    pixels: Tensor
    """uint8 (3, T, H, W), or (3, H, W) for an image model."""
    label: int
    mask: Tensor | None
    """bool, True = hidden, one value per mask cell; only for SimMIM."""
    broken: tuple[str, ...]
    """One line for each file that could not be read and was replaced by the next one of the list."""
    number: int
    """The sample number that was asked for."""
    seconds: float
    """Time spent on reading and augmenting it."""


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
        """The same batch on `device`; copies from pinned memory do not block."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        pixels, labels = self.pixels.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, labels=labels, masks=masks)

    def pin_memory(self) -> Batch:
        """Page-locked copies; the DataLoader looks for a method of this name."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), labels=self.labels.pin_memory(), masks=masks)


def collate(samples: Sequence[Sample], repeats: int = 1) -> Batch:
    """Stack samples of one size; the `repeats` samples of one clip, which arrive as neighbours, are moved apart.

    Mixup and CutMix pair neighbours in a batch, and mixing a clip with itself would be no mixing: with two repeats,
    a a b b c c becomes a b c a b c.
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

    With `augment`, samples are random: a function of (seed, epoch, number). Without, they are the centre clip and crop.
    A file that cannot be read is named in the sample and replaced by the next one. A labelled validation sample is not
    replaced but gets the label UNREADABLE_LABEL, which counts as a wrong answer.

    With `augment.repeats`, that many neighbours in the order are the same clip, decoded once and augmented differently.
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
            raise UsageError(f"data.image_size: {list(size)} is neither a number nor [H, W]")
        self.repeats = augment.repeats if augment else 1
        if isinstance(entries, Mixture):
            self.mixture = entries
        else:
            self.mixture = Mixture([MixtureSource(compact_entries(entries), self.repeats)])
        self.last_decoded: tuple[Address, Tensor | DecodeError] | None = None
        self.given_up: dict[int, str] = {}
        """Files, by their first sample number, that workers died of and that are not opened again; and the reason."""
        self.in_hand: FilesInHand | None = None
        """Set by the loader for its workers: which file, by its first sample number, each of them is reading."""
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
        for step in range(self.mixture.distinct_samples):
            origin = self.mixture[number + step]
            label = origin.entry.label
            # Seeded by the number asked for, also where the next file stands in, and again on each attempt: what a
            # broken file drew before it failed does not shift the draws of its replacement.
            with seeded(self.seed, epoch, number) as generator:
                try:
                    pixels = self.transform(self._read(origin, epoch))
                except DecodeError as error:
                    broken.append(str(error))
                    if self.random or label < 0:
                        continue
                    label = UNREADABLE_LABEL
                    pixels = torch.zeros((self.data.frames or 1, 3, *self.size), dtype=torch.uint8)
                mask = random_mask(self.cells, self.mask_ratio, generator) if self.cells else None
            # (T, 3, H, W) -> (3, T, H, W), or (1, 3, H, W) -> (3, H, W) for an image model.
            pixels = pixels[0] if self.data.frames is None else pixels.transpose(0, 1)
            seconds = time.perf_counter() - started
            return Sample(pixels.contiguous(), label, mask, tuple(dict.fromkeys(broken)), number, seconds)
        raise UserError(f"{broken[0]}; nor can any other of the {len(broken)} files be read: check the data set")

    def name(self, number: int) -> str:
        """The file that a sample number stands for."""
        entry = self.mixture[number].entry
        return f"{entry.path}/{entry.name}" if isinstance(entry, TarMember) else str(entry.path)

    @property
    def patience_seconds(self) -> float:
        """How long reading one file may take before its worker counts as hung."""
        return patience_seconds(self.data.decode_seconds, GRACE_SECONDS)

    def _read(self, origin: SampleOrigin, epoch: int) -> Tensor:
        """(T, 3, H, W) uint8: a clip, or T = 1 for an image model."""
        # The samples of one file are neighbours in the order, so remembering the last decoding serves nearly all.
        key = (epoch, origin.first)
        if self.last_decoded is None or self.last_decoded[0] != key:
            self.last_decoded = key, self._decode(origin, key)
        clips = self.last_decoded[1]
        if isinstance(clips, DecodeError):
            raise clips
        return clips[origin.nth // self.repeats]

    def _decode(self, origin: SampleOrigin, key: Address) -> Tensor | DecodeError:
        """All clips of a file in this epoch, (clips, T, 3, H, W) uint8, in one pass; or what is wrong with it."""
        entry = origin.entry
        file = origin.first % self.mixture.distinct_samples
        if file in self.given_up:
            return DecodeError(f"{entry.path}: {self.given_up[file]}", "timeout")
        in_worker = self.in_hand is not None and get_worker_info() is not None
        watched = self.in_hand.reading(file, self.patience_seconds) if self.in_hand and in_worker else nullcontext()
        try:
            with watched:
                if isinstance(entry, TarMember):
                    return read_tar_member(entry)[None, None]
                if is_image_file(entry.path):
                    return read_image(entry.path)[None, None]
                return self._decode_video(origin, key)
        except DecodeError as error:
            return error

    def _decode_video(self, origin: SampleOrigin, key: Address) -> Tensor:
        frames, stride = self.data.frames or 1, self.data.frame_stride
        count = max(origin.count // self.repeats, 1)  # clips of this video in an epoch, each repeated
        with VideoReader(origin.entry.path, time_limit_seconds=self.data.decode_seconds) as video:
            clips = [centre_clip(len(video), frames, stride)] * count
            if self.random:
                with seeded(self.seed, *key):
                    clips = [spread_clip(len(video), frames, stride, nth, count) for nth in range(count)]
            pixels = video.frames([frame for clip in clips for frame in clip], self.data.short_side)
        return pixels.unflatten(0, (count, frames))  # (count * T, 3, H, W) -> (count, T, 3, H, W)
