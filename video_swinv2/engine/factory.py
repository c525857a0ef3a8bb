"""Builds an engine: moves the model to the device, creates AdamW over its parameter groups and wraps both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from video_swinv2.config import EngineConfig
from video_swinv2.distributed.collectives import print_on_rank_zero
from video_swinv2.distributed.devices import computing_precision
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import Engine, StepSettings
from video_swinv2.engine.deepspeed import DeepSpeedEngine
from video_swinv2.engine.optimizer import build_optimizer, write_hyperparameters
from video_swinv2.engine.plain import PlainEngine
from video_swinv2.errors import UsageError
from video_swinv2.models.attention import allow_many_graphs
from video_swinv2.models.swinv2 import Block


def make_engine(
    module: nn.Module,
    groups: Sequence[dict[str, Any]],
    config: EngineConfig,
    step: StepSettings,
    world: World,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Engine:
    """Move the module to the device, build AdamW over the groups and wrap both in the configured engine.

    ``groups`` come from :func:`optimizer.parameter_groups`. Afterwards all ranks have rank 0's weights. Raises
    UsageError if the plain engine is configured and there are several processes.
    """
    if config.engine == "plain" and world.size > 1:
        raise UsageError(
            f"engine.engine: plain runs in one process, and there are {world.size}; use engine.engine=deepspeed"
        )
    precision = computing_precision(config.precision, world.device)
    # bf16 on a GPU that would only emulate it. The run continues in fp32, and the user is told.
    if config.precision not in ("auto", precision):
        print_on_rank_zero(
            world, f"engine.precision: this GPU has no {config.precision}, so {precision} is used; fp16 is faster here"
        )
    module.to(world.device)
    if config.compile:
        compile_blocks(module)
    # The groups hold references to the parameters; `module.to` has changed those in place, so they still match.
    optimizer = build_optimizer(groups, betas=betas, eps=eps, device=world.device)
    write_hyperparameters(optimizer, lr)
    if config.engine == "plain":
        return PlainEngine(module, optimizer, step, world, precision=precision)
    return DeepSpeedEngine(module, optimizer, config, step, world, precision=precision)


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Apply torch.compile to each transformer block in place, which changes neither parameter names nor checkpoints.

    Compiling block by block lets the blocks of a stage share one compilation and keeps activation checkpointing
    outside the compiled region.
    """
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    if any(block.attn.attention == "flex" for block in blocks) and not compiles_flex():
        raise UsageError(
            f"engine.compile: PyTorch {torch.__version__} fails to compile flex attention within a block; use "
            "model.attention=auto, or PyTorch 2.15"
        )
    allow_many_graphs()
    for block in blocks:
        block.compile(backend=backend)


def compiles_flex() -> bool:
    """Whether this PyTorch can compile flex attention as a part of a block.

    2.11 stops with "convert FlexibleLayout to FixedLayout first", because the bias and the codes of the tokens are
    computed in the same graph (pytorch/pytorch#163300, #139836); 2.15 gives them a fixed layout.
    """
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return (major, minor) >= (2, 15)
