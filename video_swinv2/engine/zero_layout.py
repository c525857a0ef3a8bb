"""Adam's moments, whole and by parameter name, out of and into whatever pieces of them an engine keeps on this rank.

DeepSpeed's own ``safe_get/set_full_optimizer_state`` are not used: in ZeRO-1/2 they fail for every group but the first,
in ZeRO-3 setting fails unless the world size divides the parameter, and neither works before the first step. The state
of AdamW, keyed by the tensors it was given to update, is torch's own and looks the same at every stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from video_swinv2.distributed.world import World
from video_swinv2.engine.checkpoint import Portable
from video_swinv2.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")

# Elements per gather: rank 0's device holds this much of everybody's moments at a time (256 MB of fp32).
GATHER = 1 << 26


class Shard(Protocol):
    """A tensor AdamW updates on this rank, and how it relates to whole parameters."""

    piece: Tensor
    parameters: Sequence[nn.Parameter]

    def cut(self, wholes: Sequence[Tensor]) -> Tensor:
        """This rank's piece of the parameters' whole CPU tensors."""

    def join(self, piece: Tensor) -> list[Tensor]:
        """The whole CPU tensors on rank 0, an empty list elsewhere. Collective."""


class Whole:
    """One parameter, updated in full by every rank (plain, ZeRO-0)."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.piece: Tensor = parameter
        self.parameters: Sequence[nn.Parameter] = (parameter,)

    def cut(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Shard`."""
        return wholes[0]

    def join(self, piece: Tensor) -> list[Tensor]:
        """See :class:`Shard`."""
        return [piece.detach().to("cpu", copy=True)]


class GroupShard:
    """ZeRO-1/2: a group's parameters end to end in one buffer, which is cut into one piece per rank."""

    def __init__(self, piece: Tensor, parameters: Sequence[nn.Parameter], buffer: Tensor, world: World) -> None:
        self.piece = piece
        self.parameters = parameters
        self._world = world
        # The parameters are views of the group's buffer, so their storage offsets tell their places in it, whatever
        # order and padding DeepSpeed chose.
        self._offsets = [parameter.storage_offset() - buffer.storage_offset() for parameter in parameters]

    def cut(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Shard`."""
        flat = torch.zeros(self.piece.numel() * self._world.size)
        for offset, whole in zip(self._offsets, wholes, strict=True):
            flat[offset : offset + whole.numel()] = whole.flatten()
        return flat.view(self._world.size, -1)[self._world.rank]

    def join(self, piece: Tensor) -> list[Tensor]:
        """See :class:`Shard`."""
        flat = _gather(piece, self._world).flatten()
        if not flat.numel():
            return []
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape).clone()
            for offset, parameter in zip(self._offsets, self.parameters, strict=True)
        ]


class ParameterShards:
    """ZeRO-3: each parameter cut into one equal piece per rank, the last padded; a rank's pieces end to end."""

    def __init__(self, piece: Tensor, parameters: Sequence[Any], world: World) -> None:
        self.piece = piece
        self.parameters = parameters
        self._world = world
        self._lengths = [int(parameter.partition_numel()) for parameter in parameters]

    def cut(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Shard`."""
        pieces = []
        for length, whole in zip(self._lengths, wholes, strict=True):
            padded = torch.zeros(length * self._world.size)
            padded[: whole.numel()] = whole.flatten()
            pieces.append(padded.view(self._world.size, length)[self._world.rank])
        return torch.cat(pieces)

    def join(self, piece: Tensor) -> list[Tensor]:
        """See :class:`Shard`."""
        everybody = _gather(piece, self._world)
        if not everybody.numel():
            return []
        columns = torch.split(everybody, self._lengths, dim=1)
        return [
            column.flatten()[: parameter.ds_numel].view(parameter.ds_shape).clone()
            for column, parameter in zip(columns, self.parameters, strict=True)
        ]


def _gather(piece: Tensor, world: World) -> Tensor:
    """All ranks' equal pieces as CPU rows (world, n) on rank 0, an empty tensor elsewhere; a few MB at a time."""
    rows = torch.empty(world.size, piece.numel()) if world.rank == 0 else torch.empty(0)
    length = max(1, GATHER // world.size)
    for start in range(0, piece.numel(), length):
        part = piece.detach()[start : start + length].to(world.device)  # NCCL knows nothing of what was offloaded
        parts = [torch.empty_like(part) for _ in range(world.size)] if world.rank == 0 else None
        dist.gather(part, parts)
        for row, received in enumerate(parts or ()):
            rows[row, start : start + length] = received
    return rows


def optimized(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters an optimizer was given, group by group."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def read_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, shards: Sequence[Shard]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both moments by parameter name on rank 0; zeros for what has not been updated yet. Collective."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for moment, into in zip(MOMENTS, found, strict=True):
        for shard in shards:
            held = optimizer.state[shard.piece].get(moment) if shard.piece in optimizer.state else None
            wholes = shard.join(torch.zeros_like(shard.piece) if held is None else held)
            into.update({names[id(p)]: whole for p, whole in zip(shard.parameters, wholes, strict=False)})
    return found


def write_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, shards: Sequence[Shard], portable: Portable
) -> None:
    """Give AdamW the state it had, in place where it has one already, since DeepSpeed keeps links to that."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for shard in shards:
        state = optimizer.state[shard.piece]
        # AdamW counts on the device when fused and on the CPU otherwise.
        count_device = shard.piece.device if fused else torch.device("cpu")
        state["step"] = torch.tensor(float(portable.optimizer_step), device=count_device)
        for moment in MOMENTS:
            wholes = getattr(portable, moment)
            cut = shard.cut([wholes[names[id(parameter)]] for parameter in shard.parameters])
            if moment not in state:
                state[moment] = torch.zeros_like(shard.piece, memory_format=torch.preserve_format)
            state[moment].copy_(cut)


def applied_steps(optimizer: torch.optim.Optimizer) -> int:
    """Adam's count of applied steps; 0 before the first."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def check_fit(module: nn.Module, portable: Portable) -> None:
    """Raise UserError for the first tensor that is missing, left over, or of another shape."""
    named = module.state_dict(keep_vars=True)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    wanted: tuple[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]], ...] = (
        ("weights", named, portable.weights),
        ("exp_avg", trained, portable.exp_avg),
        ("exp_avg_sq", trained, portable.exp_avg_sq),
    )
    if portable.ema:
        wanted = (*wanted, ("ema", trained, portable.ema))
    mend = "it was made by another model or with other frozen layers; resume with the configuration it was made with"
    for kind, ours, theirs in wanted:
        if odd := sorted(ours.keys() ^ theirs.keys()):
            where = "checkpoint" if odd[0] in ours else "model"
            raise UserError(f"checkpoint {kind}: {odd[0]} is not in the {where}; {mend}")
        for name, tensor in ours.items():
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # ZeRO-3 leaves an empty tensor in its place
            if tuple(theirs[name].shape) != shape:
                raise UserError(f"checkpoint {kind}: {name} has shape {tuple(theirs[name].shape)}, not {shape}; {mend}")
