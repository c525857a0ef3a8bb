"""`video-swinv2 train` with kernels that give the same bits every time, and if asked an exception on the way.

Run as ``python run_worker.py CONFIG [MICRO_BATCH]``; the exception is raised in the micro-batch with that number.
"""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import patch

os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # before the first product: cuBLAS is deterministic only with it

import torch
from torch import Tensor

from video_swinv2.cli import main
from video_swinv2.training.tasks.classification import Classification

FAILURE = "planned failure of the test"


def fail_at(number: int) -> None:
    """Make the micro-batch `number` of this process raise."""
    loss, calls = Classification.loss, [0]

    def failing(self: Classification, *arguments: Any) -> Tensor:
        calls[0] += 1
        if calls[0] == number:
            raise ZeroDivisionError(FAILURE)
        return loss(self, *arguments)

    patch.object(Classification, "loss", failing).start()


if __name__ == "__main__":
    # warn_only: whatever has no deterministic kernel shows as a difference, which the test reports better.
    torch.use_deterministic_algorithms(True, warn_only=True)
    if sys.argv[2:]:
        fail_at(int(sys.argv[2]))
    sys.exit(main(["train", sys.argv[1]]))
