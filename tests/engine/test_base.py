"""The random state of a step."""

from __future__ import annotations

import random

import numpy as np
import torch

from video_swinv2.engine.base import seed_step


def _draws(*arguments: int) -> tuple[float, float, float]:
    seed_step(*arguments)
    return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002 - what seed_step sets


def test_the_random_state_depends_on_each_argument_and_on_nothing_else() -> None:
    first = _draws(1, 2, 3, 4)
    torch.rand(5)
    assert _draws(1, 2, 3, 4) == first
    others = [
        _draws(*arguments) for arguments in ((2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4))
    ]
    assert len({first, *others}) == 6
    assert all(len({draw[source] for draw in (first, *others)}) == 6 for source in range(3))
