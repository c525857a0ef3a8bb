"""One process of a test: builds a model partitioned or whole, loads weights into it, records the memory it held.

Run by torchrun as ``zero3_worker.py FOLDER MODEL STAGE [offloaded]``. FOLDER may hold `init.safetensors`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import video_swinv2 as vs
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World, join_world, leave_world
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.deepspeed import import_deepspeed
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.engine.zero3 import (
    capture_loaded_values,
    meta_copy,
    partitioned_construction,
    whole_numel,
    write_whole_weights,
)
from video_swinv2.memory import peak_memory_bytes
from video_swinv2.models.swinv2 import SwinV2

DECAY: dict[str, Any] = {"weight_decay": 0.05, "layer_decay": 0.9}
STEP = StepSettings(clip_norm=1.0)
# A large eps: Adam's first steps are the signs of gradients, and rounding decides the sign of those that are zero.
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-3}


def sample(step: int, rank: int) -> Tensor:
    """(1, 3, 32, 32), different for every step and process."""
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(10 * step + rank))


def whole_weights(model: SwinV2, world: World) -> dict[str, Tensor]:
    """Every parameter, gathered."""
    gathered = import_deepspeed(world).zero.GatheredParameters
    found = {}
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            found[name] = parameter.detach().clone()
    return found


def train(model: SwinV2, folder: Path, keys: dict[str, Any], world: World) -> None:
    """Load the file, take two steps, and write the weights as built, as loaded and at the end."""
    built = whole_weights(model, world)
    twin = meta_copy(model)
    values = capture_loaded_values(twin)
    vs.load_weights(twin, folder / "init.safetensors")
    write_whole_weights(model, values, world)
    groups = parameter_groups(model, model.depths, **DECAY)
    engine = make_engine(model.train(), groups, EngineConfig(precision="fp32", **keys), STEP, world, **ADAM)
    loaded = engine.weights()
    for step in range(2):
        engine.set_lr(1e-3)
        engine.backward(engine.forward(sample(step, world.rank)).square().mean())
        engine.step()
    last = engine.weights()
    if world.rank == 0:
        torch.save((built, loaded, last), folder / "weights.pt")


def main() -> None:
    """Build, measure, and train if there is a file to start from."""
    folder, name, stage = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    keys: dict[str, Any] = {"zero_stage": stage}
    if sys.argv[4:]:
        keys |= {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
    world = join_world("cpu")
    try:
        import_deepspeed(world)
        before = peak_memory_bytes()
        torch.manual_seed(0)
        with partitioned_construction(EngineConfig(**keys), world):
            model = vs.create_model(name, num_classes=10, image_size=32, window=4)
        held = sum(getattr(p, "ds_tensor", p).numel() for p in model.parameters())
        measures = {
            "held": held,
            "whole": sum(map(whole_numel, model.parameters())),
            "grown": peak_memory_bytes() - before,
        }
        if (folder / "init.safetensors").exists():
            train(model, folder, keys, world)
        (folder / f"stage-{stage}-rank-{world.rank}.json").write_text(json.dumps(measures))
        dist.barrier()
    finally:
        leave_world()


if __name__ == "__main__":
    main()
