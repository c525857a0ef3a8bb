"""ZeRO-3 from the first parameter on: models that are never whole in one process, and weights put into them.

A parameter of such a model is an empty tensor; DeepSpeed keeps this process's piece and the whole shape (`ds_numel`,
`ds_shape`) beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World
from video_swinv2.engine.deepspeed import import_deepspeed
from video_swinv2.models.swinv2 import SwinV2


@contextmanager
def sharded_construction(engine: EngineConfig, world: World) -> Iterator[None]:
    """With ZeRO-3, modules built inside give up all but this process's piece as soon as each is built; else nothing.

    The values are those of an ordinary construction with the same seed, rank 0's.
    """
    if engine.engine != "deepspeed" or engine.zero_stage != 3:
        yield
        return
    deepspeed = import_deepspeed(world)
    # The precision comes from this section (fp32): DeepSpeed's argument for it is ignored on CPUs in favour of bf16.
    # Its own Linear, made for memory, knows nothing of autocast.
    zero: dict[str, object] = {"stage": 3}
    if engine.offload_parameters != "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    with deepspeed.zero.Init(config_dict_or_path=settings, mem_efficient_linear=False):
        yield


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter was built by pieces."""
    return any(hasattr(parameter, "ds_numel") for parameter in module.parameters())


def whole_numel(parameter: Tensor) -> int:
    """Elements of the parameter over all processes."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def whole_twin(encoder: SwinV2) -> SwinV2:
    """The same model with whole shapes and no memory, for checks against a checkpoint."""
    with torch.device("meta"):
        twin = SwinV2(**encoder.architecture())  # type: ignore[arg-type]  # plain data, the constructor's own
        if hasattr(encoder, "mask_token"):
            twin.mask_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
    return twin


def values_loaded(twin: nn.Module) -> dict[str, Tensor]:
    """Will hold, by name, what is loaded into `twin`, which cannot keep it itself."""
    values: dict[str, Tensor] = {}

    def note(module: nn.Module, state: dict[str, Tensor], *rest: object) -> None:
        for name, tensor in state.items():
            if not tensor.is_meta:
                values[name] = tensor
                state[name] = tensor.to("meta")

    twin.register_load_state_dict_pre_hook(note)
    return values


@torch.no_grad()
def write_shards(module: nn.Module, values: Mapping[str, Tensor], world: World) -> None:
    """Put whole values, by name, into a sharded module, one parameter at a time; rank 0's count. Collective."""
    deepspeed = import_deepspeed(world)
    for name, parameter in module.named_parameters():
        if name in values:
            sharded = hasattr(parameter, "ds_numel")
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=sharded):
                if world.rank == 0 or not sharded:
                    parameter.copy_(values[name])
