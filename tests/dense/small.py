"""Small dense models and images for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import video_swinv2 as vs
from video_swinv2.models.preprocessing import Preprocessing


def save_small_detector(path: Path, classes: Sequence[str]) -> Path:
    """A fresh Mask R-CNN for images of 48 x 80 pixels, all of whose classes are answers."""
    made = vs.create_detector(
        "swinv2_nano", num_classes=len(classes), kind="mask_rcnn", window=4, fpn_channels=16, head_channels=32,
        mask_channels=8, anchor_sizes=(8, 16, 32, 64, 128), proposals=30, short_side=48, max_side=80,
    )  # fmt: skip
    torch.nn.init.normal_(made.roi_heads.stages[0].box_predictor.cls_score.weight)
    vs.save_model(made, path, classes=classes, preprocessing=Preprocessing(None, 1, (48, 80)))
    return path


def write_two_images(folder: Path, size: tuple[int, int]) -> Path:
    """0.png and 1.png of noise, of so many (height, width) pixels, in a new folder."""
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
