"""The paper's giant, 3.0 B parameters, trains at 16 x 256 x 256 on one GPU of 80 GB. By itself: it needs all of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from video_swinv2.bench.train import TrainingSetup, Workload, run_setup

pytestmark = pytest.mark.gpu


def test_a_step_of_the_giant(device: torch.device, record_property: Callable[..., None]) -> None:
    """Three steps on one clip in bf16, all 50 blocks recomputed, by the plain engine: 48 GB of states in fp32."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        if memory < 75 * 2**30:
            pytest.skip(f"needs 80 GB, and this GPU has {memory / 2**30:.0f} GiB")
        work = Workload("swinv2_giant", 16, 256, (8, 16, 16), 1, 1, "cuda", "bf16", 1, 1, checkpoint_blocks=50)
    else:
        work = Workload("swinv2_nano", 4, 32, (2, 4, 4), 1, 1, "cpu", "fp32", 1, 1, checkpoint_blocks=50)
    measured = run_setup(work, TrainingSetup("plain"))
    assert "not_run" not in measured, measured["not_run"]
    record_property("step_seconds", measured["seconds"][0])
    record_property("measured_bytes", measured["peak_bytes"])
