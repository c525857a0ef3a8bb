"""A test small enough for every test: its classes, its videos, its settings."""

from __future__ import annotations

import numpy as np

from video_swinv2.evaluation.overrides import TestOverrides

CLASSES = ("left", "right", "up")
MOTION = {"left": (0, -2), "right": (0, 2), "up": (-2, 0)}
N_VIDEOS = 7


def shift(n: int, step: tuple[int, int], seed: int) -> np.ndarray:
    """Frames (n, 40, 56, 3) of noise that moves by `step` each frame."""
    picture = np.random.default_rng(seed).integers(0, 256, (10, 14, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(picture, (i * step[0], i * step[1]), axis=(0, 1)) for i in range(n)])


def quick(**changes: object) -> TestOverrides:
    return TestOverrides(**{"workers": 0, "device": "cpu", **changes})  # type: ignore[arg-type]  # keys are the fields
