"""The data sets that our training loader is compared with, each as the users of a library write it.

Letters: T frames, H W pixels, C channels.

All of them read the same videos with one decoding thread: clips at random positions, of which random crops of 8 % to
all of the area are resized and flipped. Where a library is used in another way than ours, the class says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from video_swinv2.data.transforms import normalise
from video_swinv2.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

LoaderPeer = Literal["plain", "torchcodec", "decord", "videomae", "pytorchvideo"]
# Fine-tuning on Kinetics-400 in VideoMAE: timm's RandAugment, 4 operations of magnitude 7.
VIDEOMAE_OPERATIONS, VIDEOMAE_MAGNITUDE = 4, 7


@dataclass(frozen=True)
class Reading:
    """What is read: `clips` clips of `frames` frames, which are `stride` frames apart and cropped to `pixels` squared.

    Before cropping, the short side of the frames is resized to `short_side` pixels, unless it is None. `batch` is the
    number of clips in a batch.
    """

    frames: int
    stride: int
    pixels: int
    short_side: int | None
    batch: int
    clips: int


def augmentation(reading: Reading) -> nn.Module:
    """Random crops and flips by torchvision's v2 transforms, as they are usually written: (T, 3, H, W) -> the same."""
    steps: list[nn.Module] = [v2.RandomResizedCrop(reading.pixels, scale=(0.08, 1.0)), v2.RandomHorizontalFlip()]
    return v2.Compose([v2.Resize(reading.short_side), *steps] if reading.short_side else steps)


class Clips(Dataset[Tensor]):
    """A Dataset that opens the video for each clip. Items are (3, T, H, W)."""

    def __init__(self, paths: Sequence[Path], reading: Reading) -> None:
        self.paths, self.reading = list(map(str, paths)), reading
        self.transform = augmentation(reading)

    def __len__(self) -> int:
        return self.reading.clips

    def __getitem__(self, index: int) -> Tensor:
        """A random clip of video `index`; past the end of the list, counting starts at the first video again."""
        # Positions come from a generator seeded by the index, so each round reads the same clips.
        return self.read(self.paths[index % len(self.paths)], np.random.default_rng(index))

    def read(self, path: str, draw: np.random.Generator) -> Tensor:
        """A random clip of a video, (3, T, H, W)."""
        raise NotImplementedError

    def indices(self, n: int, draw: np.random.Generator) -> list[int]:
        """The frames of a clip at a random position in a video of `n` frames; a short video is looped."""
        frames, stride = self.reading.frames, self.reading.stride
        start = int(draw.integers(max(n - frames * stride, 0) + 1))
        return [(start + stride * step) % n for step in range(frames)]


class PlainClips(Clips):
    """What a first script would do: decode from the start of the file; items are normalised floats."""

    def read(self, path: str, draw: np.random.Generator) -> Tensor:
        """Every frame from the start of the file to the last one wanted is decoded, without seeking."""
        with av.open(path) as container:
            stream = container.streams.video[0]
            wanted = self.indices(stream.frames, draw)
            decoded: dict[int, Tensor] = {}  # frames by number: a short video is looped, so numbers may repeat
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    decoded[number] = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if number >= max(wanted):
                    break
        clip = torch.stack([decoded[number] for number in wanted]).permute(0, 3, 1, 2)  # (T, 3, H, W)
        # (T, 3, H, W) -> (1, 3, T, H, W), as `normalise` takes batches, -> (3, T, H, W)
        return normalise(self.transform(clip).transpose(0, 1)[None], IMAGENET_MEAN, IMAGENET_STD)[0]


class TorchcodecClips(Clips):
    """Bare torchcodec and torchvision's v2 transforms; items are uint8."""

    def read(self, path: str, draw: np.random.Generator) -> Tensor:
        """Only the wanted frames, from the key frame before them."""
        from torchcodec.decoders import VideoDecoder

        video = VideoDecoder(path, num_ffmpeg_threads=1)
        clip: Tensor = self.transform(video.get_frames_at(self.indices(len(video), draw)).data)
        return clip.transpose(0, 1)


class DecordClips(Clips):
    """decord's `get_batch` and torchvision's v2 transforms; items are uint8."""

    def read(self, path: str, draw: np.random.Generator) -> Tensor:
        """Only the wanted frames, from the key frame before them."""
        clip: Tensor = self.transform(torch.from_numpy(self.decode(path, draw)).permute(0, 3, 1, 2))
        return clip.transpose(0, 1)

    def decode(self, path: str, draw: np.random.Generator) -> NDArray[np.uint8]:
        """A clip by decord, (T, H, W, 3)."""
        import decord

        video = decord.VideoReader(path, num_threads=1)
        frames: NDArray[np.uint8] = video.get_batch(self.indices(len(video), draw)).asnumpy()
        return frames


class VideomaeClips(DecordClips):
    """The steps of VideoMAE's fine-tuning: RandAugment on whole frames as PIL images, then floats, cropped and resized.

    Items are normalised floats. RandAugment is timm's, from which VideoMAE's is derived. Random erasing is left out.
    Frames are cropped as they are, whatever `short_side` is.
    """

    def __init__(self, paths: Sequence[Path], reading: Reading) -> None:
        from timm.data.auto_augment import rand_augment_transform

        super().__init__(paths, reading)
        recipe = f"rand-m{VIDEOMAE_MAGNITUDE}-n{VIDEOMAE_OPERATIONS}-mstd0.5-inc1"
        grey = tuple(round(255 * mean) for mean in IMAGENET_MEAN)
        self.augment = rand_augment_transform(recipe, {"translate_const": int(reading.pixels * 0.45), "img_mean": grey})

    def read(self, path: str, draw: np.random.Generator) -> Tensor:
        """All frames of a clip get the same draw of RandAugment."""
        from PIL import Image

        frames = [Image.fromarray(frame) for frame in self.decode(path, draw)]
        seed = int(draw.integers(2**31))
        for place, frame in enumerate(frames):
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  # timm draws from both of these generators
            frames[place] = self.augment(frame)
        clip = torch.stack([F.to_dtype(F.pil_to_tensor(frame), torch.float32, scale=True) for frame in frames])
        clip = F.normalize(clip, list(IMAGENET_MEAN), list(IMAGENET_STD))  # (T, 3, H, W)
        # Cropped to 8 % to all of the area, resized bilinearly without antialiasing, and flipped.
        crop = v2.RandomResizedCrop(self.reading.pixels, scale=(0.08, 1.0), antialias=False)
        flipped: Tensor = v2.RandomHorizontalFlip()(crop(clip))
        return flipped.transpose(0, 1)


class PytorchvideoClips(IterableDataset[Tensor]):
    """pytorchvideo's LabeledVideoDataset, which decodes a stretch of seconds, with the augmentation of its tutorial.

    Items are normalised floats, (3, T, H, W), of whole frames that are scaled to a random short side and cropped there,
    whatever `short_side` is. The steps are torchvision's, since `pytorchvideo.transforms` needs one below 0.17.
    """

    def __init__(self, paths: Sequence[Path], reading: Reading) -> None:
        from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler

        with av.open(str(paths[0])) as container:
            fps = float(container.streams.video[0].average_rate or 25)
        self.reading = reading
        # For 224 pixels, short sides from 256 to 320.
        sides = range(round(reading.pixels * 256 / 224), round(reading.pixels * 320 / 224) + 1)
        self.transform = v2.Compose(
            [
                v2.Normalize([0.45] * 3, [0.225] * 3),
                v2.RandomShortestSize(list(sides), antialias=False),
                v2.RandomCrop(reading.pixels),
                v2.RandomHorizontalFlip(),
            ]
        )
        self.videos = LabeledVideoDataset(
            [(str(path), {"label": 0}) for path in islice(cycle(paths), reading.clips)],
            make_clip_sampler("random", reading.frames * reading.stride / fps),
            transform=self.augment,
            decode_audio=False,
        )

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.videos)

    def augment(self, sample: dict[str, Any]) -> Tensor:
        """The transform of the data set: its sample, with the video float (3, frames, H, W), -> (3, T, H, W)."""
        video: Tensor = sample["video"]
        chosen = torch.linspace(0, video.shape[1] - 1, self.reading.frames).long()
        clip: Tensor = self.transform(video[:, chosen].transpose(0, 1) / 255)
        return clip.transpose(0, 1)


PEERS: dict[LoaderPeer, type[Clips] | type[PytorchvideoClips]] = {
    "plain": PlainClips,
    "torchcodec": TorchcodecClips,
    "decord": DecordClips,
    "videomae": VideomaeClips,
    "pytorchvideo": PytorchvideoClips,
}
