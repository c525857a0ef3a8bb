"""Construction and loading of models that are partitioned by ZeRO-3 from the start, so that no process holds one whole.

A parameter of such a model is an empty tensor. DeepSpeed stores this rank's slice (`ds_tensor`) and the number of
elements (`ds_numel`) and the shape (`ds_shape`) of the whole parameter as attributes of it. To read or write the
parameter, the ranks have to gather it first.

Loading a checkpoint needs whole shapes, for example to inflate a kernel. It therefore goes through a copy of the model
on the meta device:

1. `meta_copy` builds the copy, which has shapes but no memory.
2. `capture_loaded_values` collects the tensors that are loaded into the copy.
3. `write_whole_weights` distributes them to the partitioned model, one parameter at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from video_swinv2.config import EngineConfig
from video_swinv2.distributed.world import World
from video_swinv2.engine.deepspeed import import_deepspeed
from video_swinv2.engine.deepspeed_config import offload_section
from video_swinv2.models.swinv2 import SwinV2


@contextmanager
def partitioned_construction(config: EngineConfig, world: World) -> Iterator[None]:
    """Under ZeRO-3, each module constructed inside is partitioned as soon as it is complete; otherwise a no-op.

    The initial values are those of rank 0, the same as without this context and with the same seed. Construct nothing
    but the model inside: any other module would be partitioned too. Afterwards, also after an exception, everything
    that DeepSpeed replaces in torch is torch's own again.
    """
    if config.engine != "deepspeed" or config.zero_stage != 3:
        yield
        return
    deepspeed = import_deepspeed(world)
    # The key of `build_deepspeed_config`: Init ignores its argument `mem_efficient_linear` if it has a configuration.
    zero: dict[str, object] = {"stage": 3, "memory_efficient_linear": False}
    if config.offload_parameters != "none":
        zero["offload_param"] = offload_section(config.offload_parameters, pin_memory=world.device.type == "cuda")
    # Init takes the type of the weights from this dictionary: fp32 if there is no precision section. Its `dtype`
    # argument cannot be used instead, because on CPUs it is ignored and the weights become bf16. The batch size is
    # required but not used.
    section = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    # By default, torch.tensor, zeros, arange and others would create everything inside on the GPU. Without these
    # overrides each module is built on the CPU, as at the other stages and with the same random numbers, and DeepSpeed
    # moves its parameters to the GPU when it partitions them.
    with deepspeed.zero.Init(config_dict_or_path=section, tensor_overrides=()):
        yield


def is_partitioned(module: nn.Module) -> bool:
    """Whether the module was built inside `partitioned_construction` under ZeRO-3."""
    return any(hasattr(parameter, "ds_numel") for parameter in module.parameters())


def whole_numel(parameter: Tensor) -> int:
    """Number of elements of the whole parameter, whether it is partitioned or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def meta_copy(encoder: SwinV2) -> SwinV2:
    """The same model on the meta device: whole shapes, but no memory."""
    with torch.device("meta"):
        copy = SwinV2(**encoder.architecture())  # type: ignore[arg-type]  # plain data, the constructor's own
        # SimMIM adds this parameter to an encoder that has already been built, so the constructor does not create it.
        if hasattr(encoder, "mask_token"):
            copy.mask_token = nn.Parameter(torch.empty(1, 1, encoder.embed_dim))
    return copy


def capture_loaded_values(copy: nn.Module) -> dict[str, Tensor]:
    """Return a dictionary that collects, by name, every tensor that is later loaded into the meta model `copy`."""
    values: dict[str, Tensor] = {}

    def keep_and_strip(module: nn.Module, state: dict[str, Tensor], *rest: object) -> None:
        for name, tensor in state.items():
            if not tensor.is_meta:
                values[name] = tensor
                # load_state_dict then copies a meta tensor to a meta tensor, which checks the shape and nothing else.
                state[name] = tensor.to("meta")

    # The hook is called with the whole state dict before any tensor is copied.
    copy.register_load_state_dict_pre_hook(keep_and_strip)
    return values


@torch.no_grad()
def write_whole_weights(module: nn.Module, values: Mapping[str, Tensor], world: World) -> None:
    """Write rank 0's whole values by name into a partitioned module, one parameter at a time. Collective.

    Parameters that are not in ``values`` keep their initial values.
    """
    deepspeed = import_deepspeed(world)
    for name, parameter in module.named_parameters():
        if name in values:
            partitioned = hasattr(parameter, "ds_numel")
            # Inside the context the parameter is whole on every rank. Leaving it broadcasts rank 0's values and
            # partitions them again.
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=partitioned):
                if world.rank == 0 or not partitioned:
                    parameter.copy_(values[name])
