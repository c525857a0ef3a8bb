"""Small models with random weights, and a video in which no two parts look alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import video_swinv2 as vs
from tests.models.reference import randomise

EVIL = "<script>alert(1)</script>"
CLASSES = ("walk", EVIL, 'jump & "quote"', "run", "clap", "a class with a rather long name")


def save_model(path: Path, frames: int | None) -> Path:
    """A model whose predictions depend on every block, and differ from clip to clip.

    All weights are random, because the blocks of a freshly initialised model compute nothing. The head is scaled so
    that the logits of noise have a standard deviation of 1.
    """
    torch.manual_seed(0)
    window = (4, 4) if frames is None else (2, 4, 4)
    model = vs.create_model("swinv2_nano", num_classes=len(CLASSES), frames=frames, image_size=32, window=window)
    randomise(model).eval()
    noise = torch.rand(16, 3, *([] if frames is None else [frames]), 4, 4) * 4 - 2
    with torch.no_grad():
        logits = model(noise.repeat_interleave(8, -1).repeat_interleave(8, -2))
        model.head.bias.sub_(logits.mean(0)).div_(logits.std(0))
        model.head.weight.div_(logits.std(0)[:, None])
    preprocessing = vs.Preprocessing(frames=frames, frame_stride=2, image_size=(32, 32))
    vs.save_model(model, path, classes=CLASSES, preprocessing=preprocessing)
    return path


@pytest.fixture(scope="session")
def evil_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip model with a class name that is a script."""
    return save_model(tmp_path_factory.mktemp("models") / "clip.safetensors", 4)


@pytest.fixture(scope="session")
def evil_image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image model with the same classes."""
    return save_model(tmp_path_factory.mktemp("models") / "image.safetensors", None)


@pytest.fixture(scope="session")
def changing(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    """40 frames of noise, 64 x 48 pixels, at 25 frames per second."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    return write_video(tmp_path_factory.mktemp("videos") / "changing.mp4", noise)
