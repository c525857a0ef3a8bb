"""Which frames of a video make a training clip, and the random state that decides it.

Letters: n frames of the video; a clip is `frames` frames, `stride` apart.

pytorchvideo's `RandomClipSampler` draws the start. Its other samplers are not used: `ConstantClipsPerVideoSampler`
places a single clip at the start of the video and never reaches the end with several, and `UniformClipSampler` gives as
many clips as fit, so neither gives the views of a published protocol.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import torch


def random_clip(n: int, frames: int, stride: int) -> tuple[int, ...]:
    """Indices of a clip at a random position among `n` frames, every start equally likely; short videos are looped.

    Draws from Python's global generator, because pytorchvideo does; wrap it in `seeded`.
    """
    from pytorchvideo.data.clip_sampling import RandomClipSampler  # not at the top: its package takes seconds to import

    span = frames * stride
    # The sampler counts in seconds, but only ratios matter. In units of frames, and given one frame more than there
    # are, it draws uniformly from [0, n + 1 - span], whose integer part is a uniform start from 0 to n - span. In
    # seconds the last start could never be drawn.
    clip = RandomClipSampler(Fraction(span))(0.0, Fraction(n + 1), {})
    start = min(int(clip.clip_start_sec), max(n - span, 0))
    return frame_indices(start, frames, stride, n)


def centre_clip(n: int, frames: int, stride: int) -> tuple[int, ...]:
    """Indices of the clip in the middle of `n` frames; short videos are looped."""
    return frame_indices(max(n - frames * stride + 1, 0) // 2, frames, stride, n)


def frame_indices(start: int, frames: int, stride: int, n: int) -> tuple[int, ...]:
    """`frames` indices, `stride` apart; past the end they continue from the first frame (Video Swin's rule)."""
    return tuple((start + stride * step) % n for step in range(frames))


def spread_clip(n: int, frames: int, stride: int, nth: int, count: int) -> tuple[int, ...]:
    """The `nth` of `count` random clips of one video, whose start is drawn from the `nth` of `count` equal ranges.

    So the clips of a video never start alike if it has frames enough. A single clip is that of `random_clip`.
    """
    starts = max(n - frames * stride, 0) + 1
    low = starts * nth // count
    high = max(starts * (nth + 1) // count, low + 1)  # exclusive; a range is never empty, however short the video
    # A video of high - low - 1 + span frames has exactly high - low starts: `random_clip` draws one of them.
    start = low + random_clip(high - low + frames * stride - 1, frames, stride)[0]
    return frame_indices(start, frames, stride, n)


@contextmanager
def seeded(*key: int) -> Iterator[torch.Generator]:
    """Inside, Python's and torch's CPU generators are functions of `key` alone; afterwards they are what they were.

    Yields a torch generator of the same key, for code that takes one.
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
