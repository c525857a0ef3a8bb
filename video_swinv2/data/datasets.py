"""The data set of training and validation samples, addressed by (epoch, number).

Letters: B batch, C channels, T frames, H W pixels.

A sample is a function of (seed, epoch, number) alone. It does not depend on the worker that reads it, on what was read
before or on the number of processes, so a resumed run sees exactly the samples of an uninterrupted one.

A sample of classification has a label, one of SimMIM a mask of cells, and one of a dense task (boxes, masks of pixels)
a target: named tensors of any size. `Annotations` is what a dense task has to implement: it gives the target of an
image, and augments the two together. The label of an entry is then its number among the annotations. Samples of dense
tasks may differ in size. A batch pads their pixels with zeros at the bottom and right, and `Batch.images` returns them
without the padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from video_swinv2.config import AugmentConfig, DataConfig, MaskConfig
from video_swinv2.data.decode import DecodeError, named_errors
from video_swinv2.data.decoders import choose_decoder, open_video
from video_swinv2.data.display import Box
from video_swinv2.data.images import is_image, read_entry
from video_swinv2.data.index import TarMember, compact_entries
from video_swinv2.data.manifest import Entry
from video_swinv2.data.mixture import Mixture, MixtureSource, SampleOrigin
from video_swinv2.data.sampling import centre_clip, seeded, spread_clip
from video_swinv2.data.transforms import TrainingTransform, training_transform, validation_transform
from video_swinv2.data.workers import FilesInHand, patience_seconds
from video_swinv2.errors import UsageError, UserError
from video_swinv2.models.simmim import mask_cells, random_mask

# The label of a validation sample that could not be read. It is the default `ignore_index` of torch's cross_entropy, so
# the sample adds nothing to the loss, and no prediction equals it, so the sample counts as wrong.
UNREADABLE_LABEL = -100
Address = tuple[int, int]
"""(epoch, sample number)."""
Target = Mapping[str, Tensor]
"""What a dense task has to find in an image, by name: a mask of classes, for example, or boxes and their labels."""
GRACE_SECONDS = 5.0  # on top of the decoder's own time limits, before a worker counts as hung


class Annotations(Protocol):
    """The targets of a dense task, and the augmentation of an image together with its target."""

    def read(self, label: int) -> Target:
        """The target of the image whose entry has this label. Raises DecodeError if it cannot be read."""

    def transform(self, image: Tensor, target: Target, generator: torch.Generator) -> tuple[Tensor, Target]:
        """An image, uint8 (3, H, W), and its target -> both as the model takes them, of any size.

        All random numbers come from the generator, which is seeded from (seed, epoch, number).
        """


@dataclass(frozen=True)
class Sample:
    """One training or validation sample."""

    pixels: Tensor
    """uint8 (3, T, H, W), or (3, H, W) for an image model."""
    label: int
    mask: Tensor | None
    """bool, True = hidden, one value per mask cell; None unless the task is SimMIM."""
    broken: tuple[str, ...]
    """One line for each unreadable file that was met on the way to this sample."""
    number: int
    """The sample number that was requested, even if another file was read in its place."""
    seconds: float
    """Time spent on reading and augmenting the sample."""
    target: Target | None = None
    """None unless the task is a dense one."""


@dataclass(frozen=True)
class Batch:
    """Stacked samples: pixels (B, 3, ...), labels (B,), masks (B, *cells) or None; one number and duration for each.

    In a dense task, each sample has a target too, and `sizes` are the height and width of each before it was padded to
    the largest of the batch.
    """

    pixels: Tensor
    labels: Tensor
    masks: Tensor | None
    broken: tuple[str, ...]
    numbers: tuple[int, ...]
    seconds: tuple[float, ...]
    targets: tuple[Target, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`. Copies from pinned memory are asynchronous."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory. The DataLoader calls a method of this name if `pin_memory` is set."""
        return self._with_each(Tensor.pin_memory)

    def images(self, pixels: Tensor) -> list[Tensor]:
        """Each of (B, C, H, W), such as the normalised pixels or the logits, without its padding: (C, H_i, W_i)."""
        return [image[..., :height, :width] for image, (height, width) in zip(pixels, self.sizes, strict=True)]

    def _with_each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed."""
        return replace(
            self,
            pixels=change(self.pixels),
            labels=change(self.labels),
            masks=None if self.masks is None else change(self.masks),
            targets=tuple({name: change(tensor) for name, tensor in target.items()} for target in self.targets),
        )


def collate(samples: Sequence[Sample], repeats: int = 1) -> Batch:
    """Stack samples into a batch, and move the `repeats` samples of each clip apart.

    Only samples of a dense task may differ in size: they are padded with zeros at the bottom and right.

    The repeats of a clip arrive as neighbours. Mixup and CutMix pair neighbours in the batch, and a clip must not be
    mixed with itself, so with two repeats a a b b c c becomes a b c a b c.
    """
    samples = [samples[place] for nth in range(repeats) for place in range(nth, len(samples), repeats)]
    masks = [sample.mask for sample in samples if sample.mask is not None]
    targets = tuple(sample.target for sample in samples if sample.target is not None)
    pixels = [sample.pixels for sample in samples]
    sizes = tuple((image.shape[1], image.shape[2]) for image in pixels) if targets else ()
    if sizes:
        height, width = (max(side) for side in zip(*sizes, strict=True))
        pixels = [F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in pixels]
    return Batch(
        torch.stack(pixels),
        torch.tensor([sample.label for sample in samples]),
        torch.stack(masks) if masks else None,
        tuple(line for sample in samples for line in sample.broken),
        tuple(sample.number for sample in samples),
        tuple(sample.seconds for sample in samples),
        targets,
        sizes,
    )


class SampleDataset(Dataset[Sample]):
    """Samples cut out of video and image files: clips for a clip model, single frames or images for an image model.

    With `augment`, samples are random, as a function of (seed, epoch, number). Without it, each sample is the centre
    crop of the centre clip.

    With `annotations`, each sample also has a target, and their `transform` replaces the crop and its augmentation.

    A file that cannot be read is named in the sample and replaced by the next one in the list. A labelled validation
    sample is not replaced: it gets the label UNREADABLE_LABEL and so counts as a wrong answer. In a dense task, it is a
    black picture of `data.image_size`, with the target as annotated.

    With `augment.repeats` above 1, that many consecutive samples are the same clip, decoded once and augmented
    independently.
    """

    def __init__(
        self,
        entries: Sequence[Entry] | Mixture,
        data: DataConfig,
        augment: AugmentConfig | None,
        seed: int,
        mask: MaskConfig | None,
        annotations: Annotations | None = None,
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
        """Files that killed their worker and are not opened again: first sample number of the file -> reason."""
        self.in_hand: FilesInHand | None = None
        """The table in which each worker records the file that it is reading, by its first sample number. The loader
        sets it before it starts workers."""
        self.data = data
        self.decoder = choose_decoder(data)
        """The decoder that reads the videos; PyAV whatever the header of a file shows to be of another form."""
        self.size = size
        self.seed = seed
        self.random = augment is not None
        self.mask_ratio = mask.ratio if mask else 0.0
        axes = 2 if data.frames is None else 3
        pixels = size if data.frames is None else (data.frames, *size)
        self.cells = mask_cells(pixels, mask.unit, axes) if mask else None
        self.transform: Callable[[Tensor], Tensor]
        if annotations is not None:
            self.transform = _unchanged
        else:
            self.transform = validation_transform(size) if augment is None else training_transform(augment, size)
        self.annotations = annotations

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, address: Address) -> Sample:
        """The sample at (epoch, number). Raises UserError if no file at all can be read."""
        started = time.perf_counter()
        epoch, number = address
        broken: list[str] = []
        # The first attempt is the sample asked for, the following ones are its substitutes. Further samples of a file
        # that has just failed fail at once, since `_read` remembers the error.
        for step in range(self.mixture.distinct_samples):
            origin = self.mixture[number + step]
            label = origin.entry.label
            # Always seeded with the number asked for, even when another file is substituted, and seeded again for each
            # attempt, so that random draws made before a file failed do not shift those of its substitute.
            with seeded(self.seed, epoch, number) as generator:
                try:
                    with named_errors(origin.entry.path):  # a thin picture may be resized to more than memory holds
                        pixels, target = self._read(origin, epoch), None
                        if self.annotations is not None:
                            target = self.annotations.read(label)
                            image, target = self.annotations.transform(pixels[0], target, generator)
                            pixels = image[None]  # (3, H, W) -> (1, 3, H, W)
                except DecodeError as error:
                    broken.append(str(error))
                    if self.random or label < 0:
                        continue
                    # Labelled validation: a substitute would count twice, so keep a black clip that scores as wrong.
                    target = None if self.annotations is None else self.annotations.read(label)
                    label = UNREADABLE_LABEL
                    pixels = torch.zeros((self.data.frames or 1, 3, *self.size), dtype=torch.uint8)
                mask = random_mask(self.cells, self.mask_ratio, generator) if self.cells else None
            # (T, 3, H, W) -> (3, T, H, W), or (1, 3, H, W) -> (3, H, W) for an image model.
            pixels = pixels[0] if self.data.frames is None else pixels.transpose(0, 1)
            seconds = time.perf_counter() - started
            return Sample(pixels.contiguous(), label, mask, tuple(dict.fromkeys(broken)), number, seconds, target)
        raise UserError(f"{broken[0]}; nor can any other of the {len(set(broken))} files be read; check the data set")

    def name(self, number: int) -> str:
        """The path of the file that a sample number refers to; for an image in a tar, tar/member."""
        entry = self.mixture[number].entry
        return f"{entry.path}/{entry.name}" if isinstance(entry, TarMember) else str(entry.path)

    @property
    def patience_seconds(self) -> float:
        """How long reading one file may take before its worker counts as hung."""
        return patience_seconds(self.data.decode_seconds, GRACE_SECONDS)

    @property
    def one_size(self) -> bool:
        """Whether all samples have the size of the model's input. Those of a dense task may differ."""
        return self.annotations is None

    def _read(self, origin: SampleOrigin, epoch: int) -> Tensor:
        """The pixels of one sample after `transform`, uint8 (T, 3, H, W); T is 1 for an image model."""
        # All samples of a file are neighbours in the order of an epoch, so nearly every further one hits this cache of
        # one decoded file. An error is kept too, so that a broken file is not opened for each of its samples.
        key = (epoch, origin.first)
        if self.last_decoded is not None and self.last_decoded[0] == key:
            clips = self.last_decoded[1]
        elif origin.count == 1 and isinstance(self.transform, TrainingTransform) and not is_image(origin.entry):
            # The only sample of a video: its crop is drawn while the video is open, and only the crop is converted.
            # It is not kept, since the same video, read in place of another, has another crop.
            clips = self._decode(origin, key, self.transform.draw_crop)
            if isinstance(clips, Tensor):
                return self.transform.finish(clips[0])
            self.last_decoded = key, clips
        else:
            clips = self._decode(origin, key)
            self.last_decoded = key, clips
        if isinstance(clips, DecodeError):
            raise clips
        return self.transform(clips[origin.nth // self.repeats])

    def _decode(
        self, origin: SampleOrigin, key: Address, crop: Callable[[int, int], Box] | None = None
    ) -> Tensor | DecodeError:
        """All clips of a file in this epoch, uint8 (clips, T, 3, H, W), decoded in one pass; or the error.

        `crop` is for `VideoReader.frames`, which reads videos only.
        """
        entry = origin.entry
        file = origin.first % self.mixture.distinct_samples
        if file in self.given_up:
            return DecodeError(f"{entry.path}: {self.given_up[file]}", "timeout")
        # Only a loader worker may be killed for hanging. In the main process there is no alarm, so a hang stays one.
        in_worker = self.in_hand is not None and get_worker_info() is not None
        watched = self.in_hand.reading(file, self.patience_seconds) if self.in_hand and in_worker else nullcontext()
        try:
            with watched:
                if not is_image(entry):
                    return self._decode_video(origin, key, crop)
                if self.data.frames is not None:  # a list can name images among its videos
                    return DecodeError(f"{entry.path}: is an image, but data.frames asks for clips", "not_video")
                # (3, H, W) -> (1, 1, 3, H, W): an image is one clip of one frame.
                return read_entry(entry, self.data.max_pixels)[None, None]
        except DecodeError as error:
            return error

    def _decode_video(self, origin: SampleOrigin, key: Address, crop: Callable[[int, int], Box] | None) -> Tensor:
        frames, stride = self.data.frames or 1, self.data.frame_stride
        count = max(origin.count // self.repeats, 1)  # clips of this video in an epoch, each repeated
        limit_seconds, max_pixels = self.data.decode_seconds, self.data.max_pixels
        with open_video(
            origin.entry.path, self.decoder, time_limit_seconds=limit_seconds, max_pixels=max_pixels
        ) as video:
            clips = [centre_clip(len(video), frames, stride)] * count
            if self.random:
                # Seeded with the file's first sample: the clips do not depend on which sample of it is read first.
                with seeded(self.seed, *key):
                    clips = [spread_clip(len(video), frames, stride, nth, count) for nth in range(count)]
            # One request for all clips: the reader decodes forward only once, and each distinct frame only once.
            pixels = video.frames([frame for clip in clips for frame in clip], self.data.short_side, crop)
        return pixels.unflatten(0, (count, frames))  # (count * T, 3, H, W) -> (count, T, 3, H, W)


def _unchanged(clip: Tensor) -> Tensor:
    """The transform of a dense task, whose annotations change an image together with its target."""
    return clip
