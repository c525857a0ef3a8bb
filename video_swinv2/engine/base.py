"""The surface of an engine."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Set torch's, numpy's and random's global state from these four numbers alone, for drop path and mixing.

    None of this state needs to be saved: a resumed run draws what the uninterrupted one would have drawn.
    """
    words = np.random.SeedSequence((seed, step, micro, rank)).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(int(words[2]))  # noqa: NPY002 - torchvision and other libraries draw from the old generator
    random.seed(int(words[3]))
