"""One process of a test of the engine's modes: fp16, gradients that travel in bf16, and what is offloaded.

Run as ``python engine_modes_worker.py CASES RANK SIZE FOLDER``; writes what happened as `engine_worker` does.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.training.engine_worker import build, keep, train
from video_swinv2.training import runtime
from video_swinv2.training.checkpoint import Checkpoints
from video_swinv2.training.engine import Engine

OFFLOADED: dict[str, dict[str, Any]] = {
    "1-cpu": {"zero_stage": 1, "offload_optimizer": "cpu"},
    "2-nvme": {"zero_stage": 2, "offload_optimizer": "nvme"},
    "3-cpu": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    "3-nvme": {"zero_stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"},
}


def until_applied(engine: Engine, world: runtime.World, accumulation: int, first: int, last: int) -> list[Any]:
    """Steps whose scale was too large are taken again, as no training would, to be compared with fp32's."""
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


def fp16(world: runtime.World, folder: Path) -> None:
    """Four steps at every stage; a checkpoint after two of them, continued by a fresh engine."""
    for stage in range(4):
        engine = build(world, zero_stage=stage, precision="fp16", accumulation=2)
        first = until_applied(engine, world, 2, 0, 2)
        checkpoints = Checkpoints(folder / f"fp16-{stage}")
        portable = engine.states()
        if portable is not None:
            checkpoints.save(portable, {}, step=2)
            checkpoints.wait()
        dist.barrier()
        later = until_applied(engine, world, 2, 2, 4)
        keep(folder, f"fp16-{stage}", engine.states(), first + later)
        found = checkpoints.newest()
        if found is None:
            raise RuntimeError("no checkpoint")
        other = build(world, seed=7, zero_stage=stage, precision="fp16", accumulation=2)
        other.load(found[1])
        again = train(other, world, 2, 2, 4)
        keep(folder, f"fp16-resumed-{stage}", other.states(), again)


def rounded(world: runtime.World, folder: Path) -> None:
    """Gradients in bf16 on their way, in fp32 and in autocast; an fp32 engine after them must know nothing of it."""
    for stage in range(4):
        for precision in ("fp32", "bf16"):
            engine = build(world, zero_stage=stage, precision=precision, communication="bf16", clip_norm=None)
            records = train(engine, world, 1, 0, 4)
            keep(folder, f"rounded-{precision}-{stage}", engine.states(), records)
        engine = build(world, zero_stage=stage, precision="fp32")
        records = train(engine, world, 1, 0, 4)
        keep(folder, f"afterwards-{stage}", engine.states(), records)


def offloaded(world: runtime.World, folder: Path) -> None:
    """Two steps, a step that is not finite on the last rank, two more from a checkpoint and without one."""

    def spoil(step: int, micro: int, loss: Tensor) -> Tensor:
        return loss * math.nan if world.rank == world.size - 1 and micro == 0 else loss

    for name, settings in OFFLOADED.items():
        if "nvme" in name:
            settings = settings | {"offload_folder": str(folder / name)}
        engine = build(world, precision="fp32", accumulation=2, ema=0.6, **settings)
        pieces = [shard.piece for shard in engine._shards]  # type: ignore[attr-defined]  # DeepSpeedEngine's own
        if any(piece.device.type != "cpu" for piece in pieces):
            raise RuntimeError("a piece is on the device")
        first = train(engine, world, 2, 0, 2)
        skipped = train(engine, world, 2, 2, 3, spoil)
        checkpoints = Checkpoints(folder / f"offloaded-{name}")
        portable = engine.states()
        if portable is not None:
            checkpoints.save(portable, {}, step=2)
            checkpoints.wait()
        dist.barrier()
        records = first + skipped + train(engine, world, 2, 2, 4)
        keep(folder, f"offloaded-{name}", engine.states(), records)
        found = checkpoints.newest()
        if found is None:
            raise RuntimeError("no checkpoint")
        other = build(world, seed=7, precision="fp32", accumulation=2, ema=0.6, **settings)
        other.load(found[1])
        train(other, world, 2, 2, 4)
        keep(folder, f"offloaded-resumed-{name}", other.states(), [])


CASES = {"fp16": fp16, "rounded": rounded, "offloaded": offloaded}


def main(cases: str, rank: str, size: str, folder: str) -> None:
    """Run the cases of one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=int(size))
    world = runtime.start("cpu")
    try:
        for case in cases.split(","):
            CASES[case](world, Path(folder))
    finally:
        runtime.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
