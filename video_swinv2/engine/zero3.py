"""ZeRO-3 from the first parameter on: building models that no process ever holds whole, and loading weights into them.

A parameter of such a model is an empty tensor. DeepSpeed keeps this rank's slice (`ds_tensor`), the whole's number of
elements (`ds_numel`) and its shape (`ds_shape`) as attributes. Reading or writing it means gathering it first.

Loading a checkpoint needs whole shapes, for example to inflate a kernel, so it goes through a copy of the model on the
meta device: `meta_copy` has the shapes and no memory, `capture_loaded_values` keeps what is loaded into it, and
`write_whole_weights` distributes the values, one parameter at a time.
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
def partitioned_construction(config: EngineConfig, world: World) -> Iterator[None]:
    """With ZeRO-3, each module built inside is partitioned as soon as it is complete; otherwise a no-op.

    The values are rank 0's, and equal those of an ordinary construction with the same seed. Build nothing but the model
    inside: meanwhile DeepSpeed redirects every `torch.tensor` to the GPU.
    """
    if config.engine != "deepspeed" or config.zero_stage != 3:
        yield
        return
    deepspeed = import_deepspeed(world)
    zero: dict[str, object] = {"stage": 3}
    if config.offload_parameters != "none":
        zero["offload_param"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    # DeepSpeed takes the precision from this dictionary; without a precision section it is fp32. Its `dtype` argument
    # would be ignored on CPUs in favour of bf16.
    section = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    # mem_efficient_linear would replace nn.Linear's function by one that does not know autocast.
    with deepspeed.zero.Init(config_dict_or_path=section, mem_efficient_linear=False):
        yield


def is_partitioned(module: nn.Module) -> bool:
    """Whether any parameter was built partitioned."""
    return any(hasattr(parameter, "ds_numel") for parameter in module.parameters())


def whole_numel(parameter: Tensor) -> int:
    """Number of elements of a parameter over all ranks, partitioned or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def meta_copy(encoder: SwinV2) -> SwinV2:
    """The same model on the meta device: whole shapes without memory, to check a checkpoint against."""
    with torch.device("meta"):
        copy = SwinV2(**encoder.architecture())  # type: ignore[arg-type]  # plain data, the constructor's own
        if hasattr(encoder, "mask_token"):
            copy.mask_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
    return copy


def capture_loaded_values(copy: nn.Module) -> dict[str, Tensor]:
    """A dict that fills, by name, with the tensors that are loaded into `copy`, which has no memory for them itself."""
    values: dict[str, Tensor] = {}

    def keep_and_strip(module: nn.Module, state: dict[str, Tensor], *rest: object) -> None:
        for name, tensor in state.items():
            if not tensor.is_meta:
                values[name] = tensor
                # load_state_dict copies meta onto meta, which checks the shape and does nothing else.
                state[name] = tensor.to("meta")

    # Runs with the whole state dict, before any tensor is copied.
    copy.register_load_state_dict_pre_hook(keep_and_strip)
    return values


@torch.no_grad()
def write_whole_weights(module: nn.Module, values: Mapping[str, Tensor], world: World) -> None:
    """Write rank 0's whole values, by name, into a partitioned module, one parameter at a time. Collective."""
    deepspeed = import_deepspeed(world)
    for name, parameter in module.named_parameters():
        if name in values:
            partitioned = hasattr(parameter, "ds_numel")
            # Inside, the parameter is whole on every rank; on leaving, rank 0's values are broadcast and partitioned.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
                if world.rank == 0 or not partitioned:
                    parameter.copy_(values[name])
