"""What small tests of a model share: classes, moving pictures, settings, and a model whose answers differ."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from video_swinv2.evaluation.overrides import TestOverrides

CLASSES = ("left", "right", "up")
MOTION = {"left": (0, -2), "right": (0, 2), "up": (-2, 0)}
N_VIDEOS = 7


def picture(seed: int, size: tuple[int, int] = (40, 56)) -> np.ndarray:
    """Coarse noise, uint8 (H, W, 3), in blocks of 4 x 4 pixels that survive compression and resizing."""
    small = np.random.default_rng(seed).integers(0, 256, (size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
    return small.repeat(4, 0).repeat(4, 1)


def moving(n: int, step: tuple[int, int], seed: int) -> np.ndarray:
    """Frames (n, 40, 56, 3) of a picture that moves by `step` pixels per frame."""
    still = picture(seed)
    return np.stack([np.roll(still, (i * step[0], i * step[1]), axis=(0, 1)) for i in range(n)])


def quick(**changes: object) -> TestOverrides:
    """Settings without reading processes, on the CPU."""
    return TestOverrides(**{"workers": 0, "device": "cpu", **changes})  # type: ignore[arg-type]  # keys are the fields


def make_answers_differ(model: nn.Module) -> nn.Module:
    """Scale up what is zero or tiny in fresh weights: a fresh model gives every input nearly the same answer."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm1.weight", "norm2.weight")):
                parameter.fill_(1.0)
        model.head.weight.mul_(40)
    return model
