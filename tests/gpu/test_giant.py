"""The paper's giant, 3.0 B parameters, trains at 16 x 256 x 256 on one GPU of 80 GB. By itself: it needs all of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import video_swinv2 as vs
from video_swinv2.bench.measuring import peak_bytes, reset_peak_bytes, wall_seconds
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups

pytestmark = pytest.mark.gpu


def test_a_step_of_the_giant(device: torch.device, record_property: Callable[..., None]) -> None:
    """Two steps on one clip in bf16, all 50 blocks recomputed, by the plain engine: 48 GB of states in fp32."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
        if memory < 75 * 2**30:
            pytest.skip(f"needs 80 GB, and this GPU has {memory / 2**30:.0f} GiB")
        name, frames, pixels, window, precision = "swinv2_giant", 16, 256, (8, 16, 16), "bf16"
    else:
        name, frames, pixels, window, precision = "swinv2_nano", 4, 32, (2, 4, 4), "fp32"
    before = reset_peak_bytes(device)
    # Weights are drawn on the device, because on a CPU 3.0 B take a minute.
    with torch.device("meta"):
        model = vs.create_model(
            name, num_classes=400, frames=frames, image_size=pixels, window=window, checkpoint_blocks=50
        )
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    engine = make_engine(
        model.train(),
        parameter_groups(model, model.depths, weight_decay=0.05),
        EngineConfig(engine="plain", precision=precision),
        StepSettings(clip_norm=5.0),
        World(rank=0, size=1, local_rank=0, device=device),
        lr=1e-4,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    clip = torch.randn(1, 3, frames, pixels, pixels).to(device)
    for _ in range(2):
        started = time.perf_counter()
        engine.backward(F.cross_entropy(engine.forward(clip).float(), torch.tensor([7], device=device)))
        outcome = engine.step()
        seconds = wall_seconds(device) - started
        assert outcome is not None
        assert outcome.applied
    record_property("step_seconds", seconds)
    record_property("measured_bytes", peak_bytes(device) - before)
