"""Training clips: every start is reached, short videos loop, random state is a function of its key."""

import random
from collections import Counter

import pytest
import torch

from video_swinv2.data.sampling import centre_clip, frame_indices, random_clip, seeded


def test_every_start_is_equally_likely():
    with seeded(0):
        starts = Counter(random_clip(20, 8, 2)[0] for _ in range(5000))
    assert sorted(starts) == [0, 1, 2, 3, 4]  # the last start is 20 - 16 = 4
    assert min(starts.values()) > 850
    assert max(starts.values()) < 1150


@pytest.mark.parametrize("n", [1, 5, 15, 16])
def test_short_videos_loop(n):
    with seeded(1):
        indices = random_clip(n, 8, 2)
    assert indices == tuple(2 * step % n for step in range(8))
    assert centre_clip(n, 8, 2) == indices


def test_centre_clip_is_in_the_middle():
    assert centre_clip(300, 32, 2)[0] == 118  # int(237 / 2): Video Swin's rule for one clip
    assert frame_indices(3, 4, 5, 100) == (3, 8, 13, 18)


def test_seeded_is_a_function_of_its_key_and_leaves_no_trace():
    random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), torch.rand(1).item()
    random.seed(5)
    torch.manual_seed(5)
    draws = []
    for key in [(0, 1, 2), (0, 1, 3), (0, 1, 2)]:
        with seeded(*key) as generator:
            draws.append((random.random(), torch.rand(1).item(), torch.rand(1, generator=generator).item()))
    assert draws[0] == draws[2]
    assert not set(draws[0]) & set(draws[1])
    assert (random.random(), torch.rand(1).item()) == expected
