"""The data set for training loops of the user's own: what it gives, what it draws from, what it refuses."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

import video_swinv2 as vs
from video_swinv2.data.decode import DecodeError
from video_swinv2.errors import UsageError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """Six videos of two classes and three groups. Frame n of a video has the brightness 8 n in all its pixels."""
    root = tmp_path_factory.mktemp("clips")
    frames = np.repeat(np.arange(24, dtype=np.uint8) * 8, 40 * 56 * 3).reshape(24, 40, 56, 3)
    rows = ["path,label,group"]
    for number in range(6):
        write_video(root / f"{number}.mp4", frames, lossless=True)
        rows.append(f"{number}.mp4,{'run' if number % 2 else 'jump'},recording {number // 2}")
    for split in ("train", "val"):
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


def brightness(clip: Tensor, shown: vs.Preprocessing) -> list[int]:
    """The frame numbers of a clip, from the brightness of its pixels."""
    pixels = (clip[0, :, 8, 8] * shown.std[0] + shown.mean[0]) * 255
    return (pixels / 8).round().int().tolist()


def test_items_are_normalised_clips_with_labels_classes_and_groups(root: Path) -> None:
    shown = vs.Preprocessing(4, 3, (32, 24), MEAN, STD)
    data = vs.VideoDataset(root, "val", preprocessing=shown)
    assert (len(data), data.classes, data.preprocessing) == (6, ("jump", "run"), shown)
    assert data.labels == [0, 1, 0, 1, 0, 1]
    assert data.groups == [f"recording {number // 2}" for number in range(6)]
    assert data.paths[3] == root / "3.mp4"
    clip, label = data[3]
    assert (clip.shape, clip.dtype, label) == ((3, 4, 32, 24), torch.float32, 1)
    # The middle clip of 24 frames: 12 of them from frame 6 on. All three channels are the same grey.
    assert brightness(clip, shown) == [6, 9, 12, 15]
    grey = clip * torch.tensor(STD).view(3, 1, 1, 1) + torch.tensor(MEAN).view(3, 1, 1, 1)
    torch.testing.assert_close(grey[0], grey[2], atol=1.5 / 255, rtol=0)
    other = vs.VideoDataset(root, "val", preprocessing=shown, frames=2, frame_stride=1, image_size=16)
    assert other.preprocessing == vs.Preprocessing(2, 1, (16, 16), MEAN, STD)
    assert other[0][0].shape == (3, 2, 16, 16)
    assert vs.VideoDataset(root, "val", image_size=16)[0][0].shape == (3, 16, 16), "a frame for an image model"
    assert vs.VideoDataset(root, "val", classes=("run", "jump")).labels == [1, 0, 1, 0, 1, 0]


def test_clips_are_random_in_training_and_follow_torchs_seed(root: Path) -> None:
    data = vs.VideoDataset(root, "train", frames=2, image_size=16)

    def starts(seed: int) -> list[int]:
        torch.manual_seed(seed)
        random.seed()  # no other generator has a part in it
        return [brightness(data[0][0], data.preprocessing)[0] for _ in range(12)]

    first = starts(1)
    assert len(set(first)) > 4
    assert first == starts(1) != starts(2)
    still = vs.VideoDataset(root, "train", frames=2, image_size=16, random_clips=False)
    assert {brightness(still[0][0], still.preprocessing)[0] for _ in range(4)} == {11}


def test_a_transform_is_given_the_frames_as_decoded(root: Path) -> None:
    seen = []

    def transform(pixels: Tensor) -> Tensor:
        seen.append((pixels.shape, pixels.dtype))
        return pixels[..., :16, :16]

    data = vs.VideoDataset(root, "val", frames=4, image_size=16, transform=transform)
    assert data[0][0].shape == (3, 4, 16, 16)
    assert seen == [((4, 3, 40, 56), torch.uint8)]
    training = vs.transforms.training_transform(vs.AugmentConfig(rand_augment=2, erasing=0.5), (16, 16))
    assert vs.VideoDataset(root, "val", frames=4, image_size=16, transform=training)[0][0].shape == (3, 4, 16, 16)
    wrong = vs.VideoDataset(root, "val", frames=4, image_size=20, transform=transform)
    with pytest.raises(UsageError, match=r"transform: returns \(4, 3, 16, 16\) instead of \(4, 3, 20, 20\)"):
        wrong[0]


def test_workers_of_a_loader_draw_other_clips(root: Path) -> None:
    data = vs.VideoDataset(root, "train", frames=2, image_size=16)
    torch.manual_seed(3)
    loader = DataLoader(data, batch_size=3, num_workers=2, sampler=[0] * 12)
    starts = [brightness(clip, data.preprocessing)[0] for clips, _ in loader for clip in clips]
    assert len(set(starts)) > 4, "all videos are the same, so only the draws differ"


def test_images(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (40, 30), "red").save(tmp_path / "train" / name / "a.png")
    data = vs.VideoDataset(tmp_path, "train", image_size=16)
    assert (data.classes, data.groups, data[1][1]) == (("cat", "dog"), ["", ""], 1)
    red = (torch.tensor([1.0, 0.0, 0.0]) - torch.tensor(data.preprocessing.mean)) / torch.tensor(data.preprocessing.std)
    torch.testing.assert_close(data[1][0], red.view(3, 1, 1).expand(3, 16, 16))
    with pytest.raises(DecodeError, match="is an image"):
        vs.VideoDataset(tmp_path, "train", frames=4, image_size=16)[0]


def test_what_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no split 'tset'; available: train, val"):
        vs.VideoDataset(root, "tset")
    with pytest.raises(UsageError, match="frames: 0"):
        vs.VideoDataset(root, "val", frames=0)
    with pytest.raises(ValueError, match="image_size"):
        vs.VideoDataset(root, "val", image_size=(1, 2, 3))
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "train.csv").write_text("path,label\na.mp4,x\n")
    with pytest.raises(DecodeError, match=r"a\.mp4"):
        vs.VideoDataset(tmp_path, "train")[0]
