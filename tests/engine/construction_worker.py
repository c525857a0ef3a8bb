"""One process of a test of ZeRO-3's construction: what DeepSpeed replaces in torch meanwhile, and afterwards.

Run as `engine_worker` is; writes what it found to JSON files. The meta device stands in for the GPU: it is the one that
DeepSpeed's accelerator names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.engine_worker import LR, run_cases
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.deepspeed import import_deepspeed
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.engine.zero3 import partitioned_construction
from video_swinv2.models.variants import create_model

ZERO3 = EngineConfig(zero_stage=3, precision="fp32")


def replaceable() -> dict[str, Any]:
    """What DeepSpeed can replace in torch: functions that create tensors, the linear, and methods of modules."""
    creators = ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn")
    methods = {
        f"{cls.__name__}.{name}": getattr(cls, name) for cls in (nn.Linear, nn.Module) for name in ("__init__", "apply")
    }
    return {name: getattr(torch, name) for name in creators} | {"linear": F.linear} | methods


def created() -> dict[str, str]:
    """The devices of tensors that are created without naming one."""
    tensors = {
        "tensor": torch.tensor([1]),
        "empty": torch.empty(1),
        "zeros": torch.zeros(1),
        "ones": torch.ones(1),
        "full": torch.full((1,), 2),
        "arange": torch.arange(1),
        "new": torch.Tensor(1),
    }
    return {name: tensor.device.type for name, tensor in tensors.items()}


BEFORE = replaceable()


def replaced() -> list[str]:
    """The names of what is not torch's own now."""
    return [name for name, value in replaceable().items() if value is not BEFORE[name]]


def train(model: nn.Module, depths: Sequence[int], world: World) -> None:
    """One step."""
    groups = parameter_groups(model, depths, weight_decay=0.1)
    engine = make_engine(model, groups, ZERO3, StepSettings(), world, lr=LR, betas=(0.9, 0.95), eps=1e-6)
    engine.backward(engine.forward(torch.ones(1, 3, 32, 32)).sum())
    engine.step()


def construction(world: World, folder: Path) -> None:
    """Create tensors inside, with the stand-in; then build a real model, and train it; then build one that fails."""
    deepspeed, found = import_deepspeed(world), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed.accelerator.get_accelerator(), "device_name", lambda index=None: "meta")
        with partitioned_construction(ZERO3, world):
            found["devices"] = created()
    with partitioned_construction(ZERO3, world):
        model = create_model("swinv2_nano", num_classes=3, image_size=32, window=4)
    found["replaced"] = replaced()
    train(model, model.depths, world)
    found["replaced_by_training"] = replaced()
    with suppress(ValueError), partitioned_construction(ZERO3, world):
        create_model("swinv2_nano", num_classes=3, image_size=32, window=4, cpb_norm=[[4, 4]])
    found["replaced_by_an_error"] = replaced()
    (folder / "construction.json").write_text(json.dumps(found))


def whole(world: World, folder: Path) -> None:
    """Train a model that was built whole, and is partitioned by the engine."""
    model = create_model("swinv2_nano", num_classes=3, image_size=32, window=4)
    train(model, model.depths, world)
    (folder / "whole.json").write_text(json.dumps({"replaced": replaced()}))


if __name__ == "__main__":
    run_cases({"construction": construction, "whole": whole})
