"""One process of a test of the engine's modes: fp16, gradients exchanged in bf16, offloading, memory held.

Run as ``python engine_modes_worker.py CASES RANK SIZE FOLDER DEVICE``; writes what happened as `engine_worker` does.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.engine.engine_worker import LR, build, keep, run_cases, through_checkpoint, train
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import Engine, StepSettings
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.models.variants import create_model
from video_swinv2.plan.activation_memory import Allocations

OFFLOADED: dict[str, dict[str, Any]] = {
    "1-cpu": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "2-nvme": {"zero_stage": 2, "offload_optimizer": "nvme"},
    "3-cpu": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "3-nvme": {"zero_stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
}


def until_applied(engine: Engine, world: World, accumulation: int, first: int, last: int) -> list[Any]:
    """Repeat steps whose loss scale was too large (training would not), so that they can be compared with fp32."""
    records = []
    for step in range(first, last):
        for _ in range(20):
            record = train(engine, world, accumulation, step, step + 1)[0]
            records.append(record)
            if record["applied"]:
                break
        else:
            raise RuntimeError("the loss scale did not fall")
    return records


def fp16(world: World, folder: Path) -> None:
    """Four steps at every stage; a checkpoint after two of them, continued by a fresh engine."""
    for stage in range(4):
        engine = build(world, zero_stage=stage, precision="fp16", accumulation=2)
        first = until_applied(engine, world, 2, 0, 2)
        state = through_checkpoint(engine, folder / f"fp16-{stage}")
        later = until_applied(engine, world, 2, 2, 4)
        keep(folder, f"fp16-{stage}", engine.training_state(), first + later)
        other = build(world, seed=7, zero_stage=stage, precision="fp16", accumulation=2)
        other.load(state)
        again = train(other, world, 2, 2, 4)
        keep(folder, f"fp16-resumed-{stage}", other.training_state(), again)


def rounded(world: World, folder: Path) -> None:
    """Gradients exchanged in bf16, under fp32 and under autocast; an fp32 engine built later must not be affected."""
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            engine = build(world, zero_stage=stage, precision=precision, communication="bf16", clip_norm=None)
            records = train(engine, world, 1, 0, 4)
            keep(folder, f"rounded-{precision}-{stage}", engine.training_state(), records)
        engine = build(world, zero_stage=stage, precision="fp32")
        records = train(engine, world, 1, 0, 4)
        keep(folder, f"afterwards-{stage}", engine.training_state(), records)


def offloaded(world: World, folder: Path) -> None:
    """Two steps, a non-finite step on the last rank, then two more, both from a checkpoint and without one."""

    def spoil(step: int, micro: int, loss: Tensor) -> Tensor:
        return loss * math.nan if world.rank == world.size - 1 and micro == 0 else loss

    for name, settings in OFFLOADED.items():
        if "nvme" in name:
            settings = settings | {"offload_folder": str(folder / name)}
        engine = build(world, precision="fp32", accumulation=2, ema=0.6, **settings)
        local = [partition.local for partition in engine._partitions]  # type: ignore[attr-defined]  # DeepSpeedEngine's own
        if any(tensor.device.type != "cpu" for tensor in local):
            raise RuntimeError("a partition is on the device")
        if not all(group["fused"] for group in engine._adamw.param_groups):  # type: ignore[attr-defined]  # the same
            raise RuntimeError("offloaded weights are updated one operation at a time")
        first = train(engine, world, 2, 0, 2)
        skipped = train(engine, world, 2, 2, 3, spoil)
        state = through_checkpoint(engine, folder / f"offloaded-{name}")
        records = first + skipped + train(engine, world, 2, 2, 4)
        keep(folder, f"offloaded-{name}", engine.training_state(), records)
        other = build(world, seed=7, precision="fp32", accumulation=2, ema=0.6, **settings)
        other.load(state)
        train(other, world, 2, 2, 4)
        keep(folder, f"offloaded-resumed-{name}", other.training_state(), [])


def held_at_the_head(world: World, **engine: Any) -> float:
    """Bytes alive per weight when a bf16 forward pass reaches the head, with activation checkpointing in all blocks."""
    # eager: torch's fused bf16 attention fails on CPUs with AMX if ATEN_CPU_CAPABILITY asks for less than they have.
    module = create_model("swinv2_nano", num_classes=2, image_size=32, window=8, checkpoint_blocks=8, attention="eager")
    numbers = sum(parameter.numel() for parameter in module.parameters())
    groups = parameter_groups(module, module.depths, weight_decay=0.1)
    config = EngineConfig(precision="bf16", **engine)
    made = make_engine(module, groups, config, StepSettings(), world, lr=LR, betas=(0.9, 0.95), eps=1e-6)
    seen = []
    with Allocations(module.parameters()) as allocations:
        module.head.register_forward_pre_hook(lambda *_: seen.append(allocations.now))
        made.forward(torch.zeros(1, 3, 32, 32, device=world.device))
    return seen[0] / numbers


def held(world: World, folder: Path) -> None:
    """Measure every stage."""
    for stage in range(4):
        found = held_at_the_head(world, zero_stage=stage)
        if world.rank == 0:
            (folder / f"held-{stage}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_cases({"fp16": fp16, "rounded": rounded, "offloaded": offloaded, "held": held})
