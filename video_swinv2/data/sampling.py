"""Which frames of a video make a training clip, and the random state that decides it.

pytorchvideo's `RandomClipSampler` draws the start. Its other samplers are not used: `ConstantClipsPerVideoSampler` puts
a single clip at the start of the video and never reaches the end with several, and `UniformClipSampler` gives as many
clips as fit, so neither gives the views of a published protocol.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import torch


def random_clip(n: int, frames: int, stride: int) -> tuple[int, ...]:
    """Indices of a clip at a random place among `n` frames, every start equally likely; short videos are looped.

    Draws from Python's global generator, because pytorchvideo does; wrap it in `seeded`.
    """
    from pytorchvideo.data.clip_sampling import RandomClipSampler  # here, since it imports its whole package: seconds

    span = frames * stride
    # Its unit is the second, but only ratios matter: in frames, and with one more of them, the whole part of its
    # uniform draw from [0, n + 1 - span] is a uniform start from 0 to n - span. In seconds the last could never come.
    clip = RandomClipSampler(Fraction(span))(0.0, Fraction(n + 1), {})
    start = min(int(clip.clip_start_sec), max(n - span, 0))
    return frame_indices(start, frames, stride, n)


def centre_clip(n: int, frames: int, stride: int) -> tuple[int, ...]:
    """Indices of the clip in the middle of `n` frames; short videos are looped."""
    return frame_indices(max(n - frames * stride + 1, 0) // 2, frames, stride, n)


def frame_indices(start: int, frames: int, stride: int, n: int) -> tuple[int, ...]:
    """`frames` indices, `stride` apart; past the end they go on from the first frame (Video Swin's rule)."""
    return tuple((start + stride * step) % n for step in range(frames))


@contextmanager
def seeded(*key: int) -> Iterator[torch.Generator]:
    """Inside, Python's and torch's CPU generators are functions of `key` alone; outside, they are as they were.

    Gives a torch generator of the same key for code that takes one.
    """
    words = np.random.SeedSequence(key).generate_state(3)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(int(words[0]))
    torch.manual_seed(int(words[1]))
    try:
        yield torch.Generator().manual_seed(int(words[2]))
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
