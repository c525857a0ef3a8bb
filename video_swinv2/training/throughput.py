"""How fast a run is and what holds it up: work of a sample, memory, utilisation, and a verdict on the loader."""

from __future__ import annotations

import math
import os

import torch

from video_swinv2.config import Config
from video_swinv2.distributed.world import World
from video_swinv2.memory import peak_memory_bytes
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import shrink

# Dense bf16 (V100: fp16) products without sparsity, TFLOP/s, from NVIDIA's data sheets; the first name that fits.
PEAKS = {
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L4": 121.0,
    "V100": 125.0,
    "RTX 4090": 165.0,
}
STARVED = 0.2  # share of the time spent waiting for samples from which on the loader is to blame


def training_flops(encoder: SwinV2, *, frozen_stages: int = 0, pretraining: bool = False) -> float:
    """Operations of one sample's forward and backward pass: two for each multiply-accumulate of the products.

    Backward takes twice as many as forward, and none in frozen stages. What activation checkpointing computes again
    does not count, nor do the log-CPB networks, which run once a batch.
    """
    forward = forward_macs(encoder, pretraining)
    frozen = sum(forward[: frozen_stages + 1]) if frozen_stages else 0.0
    return 2 * (3 * sum(forward) - 2 * frozen)


def forward_macs(encoder: SwinV2, pretraining: bool = False) -> list[float]:
    """Multiply-accumulates of one sample: patch embedding, each stage with its merging, head or decoder of SimMIM."""
    pixels = encoder.image_size if encoder.frames is None else (encoder.frames, *encoder.image_size)
    patch = encoder.patch_size
    grid = tuple(math.ceil(size / side) for size, side in zip(pixels, patch, strict=True))
    found = [math.prod(grid) * 3.0 * math.prod(patch) * encoder.embed_dim]
    for stage, depth in enumerate(encoder.depths):
        dim, window = encoder.embed_dim * 2**stage, shrink(encoder.window, grid)[0]
        tokens, inside = math.prod(grid), math.prod(window)
        padded = math.prod(math.ceil(size / side) * side for size, side in zip(grid, window, strict=True))
        macs = depth * (4.0 * padded * dim**2 + 2.0 * padded * inside * dim + 8.0 * tokens * dim**2)
        if stage < len(encoder.depths) - 1:
            grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))
            macs += math.prod(grid) * 8.0 * dim**2
        found.append(macs)
    outputs = 3 * math.prod(patch) * 4 ** (len(encoder.depths) - 1) * math.prod(grid)
    return [*found, float(encoder.num_features * (outputs if pretraining else encoder.num_classes))]


def peak_tflops(world: World, precision: str) -> float | None:
    """What the device can do at most in bf16 or fp16, TFLOP/s; None where it is not known."""
    if world.device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(world.device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory(world: World) -> float:
    """The most memory this process has held, GB: tensors on its GPU, else all of it on the host."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    return peak_memory_bytes() / 1e9


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def verdict(config: Config, waiting: float, slowest: tuple[float, str]) -> str | None:
    """What to do about a loader that starves the device; None where it does not. `waiting` is a share of the time."""
    if waiting < STARVED:
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on this machine, as torchrun says
    workers = config.data.workers
    mend = f"raise data.workers from {workers} ({cores()} cores here)"
    if workers * here >= cores():
        mend = (
            f"{workers * here} workers keep all {cores()} cores busy, so prepare the clips smaller "
            "(python -m data_prep prepare --short-side), or set augment.repeats=2"
        )
    seconds, name = slowest
    return f"data: {waiting:.0%} of the time goes into waiting; {mend}; slowest file: {seconds:.2f} s {name}"
