"""Samples training clips: the indices of the frames that make up a clip, and seeded random state.

Letters: n frames of the video. A clip is `frames` frames that are `stride` apart.

pytorchvideo's `RandomClipSampler` draws the start of a clip. The library's other samplers are not used for testing:
`ConstantClipsPerVideoSampler` places a single clip at the start of the video and, with several clips, never reaches the
end, and `UniformClipSampler` gives as many clips as fit, so neither produces the views of a published protocol.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import torch


def random_clip(n: int, frames: int, stride: int) -> tuple[int, ...]:
    """Indices of a clip at a random position in a video of `n` frames; short videos are looped.

    Every start is equally likely. Draws from Python's global generator, because pytorchvideo does, so call it inside
    `seeded`.
    """
    from pytorchvideo.data.clip_sampling import RandomClipSampler  # not at the top: its package takes seconds to import

    span = frames * stride
    # The sampler expects seconds, but nothing depends on the unit, so it is given frames. For a video of n + 1 frames
    # it draws uniformly from [0, n + 1 - span], and the integer part of that is a uniform start from 0 to n - span.
    # With n it would draw from [0, n - span], and the last start could never come up.
    clip = RandomClipSampler(Fraction(span))(0.0, Fraction(n + 1), {})
    start = min(int(clip.clip_start_sec), max(n - span, 0))  # the interval is closed: n + 1 - span itself is too far
    return frame_indices(start, frames, stride, n)


def centre_clip(n: int, frames: int, stride: int) -> tuple[int, ...]:
    """Indices of the clip in the middle of a video of `n` frames; short videos are looped."""
    return frame_indices(max(n - frames * stride + 1, 0) // 2, frames, stride, n)


def frame_indices(start: int, frames: int, stride: int, n: int) -> tuple[int, ...]:
    """`frames` indices, `stride` apart. Past the last frame they continue from the first one, as in Video Swin."""
    return tuple((start + stride * step) % n for step in range(frames))


def spread_clip(n: int, frames: int, stride: int, nth: int, count: int) -> tuple[int, ...]:
    """The `nth` (from 0) of `count` random clips of one video, with its start in the `nth` of `count` equal ranges.

    No two clips of a video start at the same frame if it is long enough. With `count` 1, this is `random_clip`.
    """
    starts = max(n - frames * stride, 0) + 1  # the number of possible starts, 0 to n - span
    low = starts * nth // count
    high = max(starts * (nth + 1) // count, low + 1)  # exclusive; a range is never empty, however short the video
    # A video of (high - low) + span - 1 frames has exactly high - low possible starts. Let `random_clip` draw one of
    # them, as the first of its indices, and shift it by `low`.
    start = low + random_clip(high - low + frames * stride - 1, frames, stride)[0]
    return frame_indices(start, frames, stride, n)


@contextmanager
def seeded(*key: int) -> Iterator[torch.Generator]:
    """Seed Python's and torch's global CPU generators from `key` inside the context, and restore them afterwards.

    Yields a separate torch generator, seeded from the same key, for code that takes one as an argument.
    """
    # SeedSequence mixes the key well, so that neighbouring keys (epoch, number) give independent seeds. Each of the
    # three generators gets its own 32-bit word.
    words = np.random.SeedSequence(key).generate_state(3)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    random.seed(int(words[0]))
    torch.manual_seed(int(words[1]))
    try:
        yield torch.Generator().manual_seed(int(words[2]))
    finally:
        random.setstate(python_state)
        torch.set_rng_state(torch_state)
