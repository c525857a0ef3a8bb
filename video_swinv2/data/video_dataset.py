"""A data set of clips for training loops of your own: addressed by an integer index, with labels, classes and groups.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from video_swinv2.config import DataConfig
from video_swinv2.data.decode import DecodeError, VideoReader, named_errors
from video_swinv2.data.images import is_image, read_entry
from video_swinv2.data.index import AnyEntry
from video_swinv2.data.sampling import centre_clip, random_clip, seeded
from video_swinv2.data.sources import labelled_manifest
from video_swinv2.data.transforms import normalise, validation_transform
from video_swinv2.errors import UsageError
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from video_swinv2.models.swinv2 import IntOrPerAxis, per_axis


class VideoDataset(Dataset[tuple[Tensor, int]]):
    """The clips of one split of a data set, normalised for a model, with their labels.

    Item i is (clip, label): float32 (3, T, H, W) and an int. Without `frames` it is a single frame or an image, (3, H,
    W), for an image model.

    Args:
        path: a prepared folder, or any other layout that docs/data-formats.md describes.
        split: such as train, val or test.
        frames: frames per clip; omit it for an image model.
        frame_stride: distance between the frames of a clip, in frames of the video; by default 1.
        image_size: size of the model's input in pixels, an int or (H, W); by default 224.
        transform: a function from uint8 (T, 3, height, width), the frames as decoded, to uint8 (T, 3, H, W); T is 1
            without `frames`. By default `transforms.validation_transform`.
        random_clips: whether each access takes a clip at another random position. Otherwise it is the clip in the
            middle. By default only in the split train.
        classes: the names of the classes in the order of the labels, such as `model.classes`; by default the data
            set's own.
        preprocessing: that of a model, for the sizes that are not given here and for mean and standard deviation.
        time_limit_seconds: a file that takes longer than this to decode cannot be read.

    Random clips and transforms draw from torch's global generator, so that `torch.manual_seed` makes them reproducible
    and every worker of a DataLoader draws other numbers.

    Raises UsageError for a data set or sizes that cannot be used, and, on access, DecodeError for a file that cannot be
    read. `python -m data_prep prepare` finds such files beforehand.
    """

    def __init__(
        self,
        path: Path | str,
        split: str,
        *,
        frames: int | None = None,
        frame_stride: int | None = None,
        image_size: IntOrPerAxis | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        random_clips: bool | None = None,
        classes: Sequence[str] | None = None,
        preprocessing: Preprocessing | None = None,
        time_limit_seconds: float = 60.0,
    ) -> None:
        known = preprocessing or Preprocessing(None, 1, (224, 224), IMAGENET_MEAN, IMAGENET_STD)
        height, width = known.image_size if image_size is None else per_axis("image_size", image_size, 2)
        self.preprocessing = Preprocessing(
            known.frames if frames is None else frames,
            known.frame_stride if frame_stride is None else frame_stride,
            (height, width),
            known.mean,
            known.std,
        )
        """How the clips were made. Set `model.preprocessing` to it, and the files of the model will say so."""
        for key, value in (("frames", self.preprocessing.frames), ("frame_stride", self.preprocessing.frame_stride)):
            if value is not None and value < 1:
                raise UsageError(f"{key}: {value} is below 1; give a positive number, or omit it")
        self.manifest = labelled_manifest(DataConfig((os.fspath(path),), image_size=(height, width)), split, classes)
        self.transform = validation_transform((height, width)) if transform is None else transform
        self.random_clips = split == "train" if random_clips is None else random_clips
        self.time_limit_seconds = time_limit_seconds

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the labels."""
        return self.manifest.classes

    @property
    def labels(self) -> list[int]:
        """The label of every item, a number of a class. No file is opened for it."""
        return [entry.label for entry in self.manifest.entries]

    @property
    def groups(self) -> list[str]:
        """The group of every item, such as the recording that it was cut from; '' where it is unknown.

        Items of one group are not independent: keep them in one split, and pass the groups to `accuracy`.
        """
        return [entry.group for entry in self.manifest.entries]

    @property
    def paths(self) -> list[Path]:
        """The file of every item."""
        return [entry.path for entry in self.manifest.entries]

    def __len__(self) -> int:
        return len(self.manifest.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        entry = self.manifest.entries[index]
        frames, (height, width) = self.preprocessing.frames, self.preprocessing.image_size
        with named_errors(entry.path):  # a thin picture may be resized to more than memory holds
            pixels = self.transform(self._decode(entry))
        if tuple(pixels.shape) != (frames or 1, 3, height, width):
            raise UsageError(
                f"transform: returns {tuple(pixels.shape)} instead of {(frames or 1, 3, height, width)}; "
                "resize and crop to image_size"
            )
        # (T, 3, H, W) -> (1, 3, T, H, W), normalised as a batch of one -> (3, T, H, W)
        clip = normalise(pixels.transpose(0, 1)[None], self.preprocessing.mean, self.preprocessing.std)[0]
        return clip if frames is not None else clip[:, 0], entry.label

    def _decode(self, entry: AnyEntry) -> Tensor:
        """The frames of a clip, or an image as a clip of one frame: uint8 (T, 3, height, width)."""
        frames = self.preprocessing.frames
        if is_image(entry):
            if frames is not None:
                raise DecodeError(f"{entry.path}: is an image, but clips are asked for; omit frames", "not_video")
            return read_entry(entry)[None]
        with VideoReader(entry.path, time_limit_seconds=self.time_limit_seconds) as video:
            return video.frames(self._indices(len(video), frames or 1))

    def _indices(self, n: int, frames: int) -> tuple[int, ...]:
        """The frames of a clip from a video of `n` frames."""
        stride = self.preprocessing.frame_stride
        if not self.random_clips:
            return centre_clip(n, frames, stride)
        # `random_clip` draws from Python's generator. It is seeded from torch's, so that users have only one to seed.
        with seeded(int(torch.randint(2**31, ()))):
            return random_clip(n, frames, stride)
