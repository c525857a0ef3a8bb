"""Where ZeRO keeps what AdamW updates: whole tensors by parameter name out of, and into, the partitions of each rank.

An engine hands AdamW one tensor per *partition*, and AdamW keeps its two moments under that tensor, in its shape. So
everything about moments and averages reduces to one question per stage: which elements of which parameters does this
rank's tensor hold? For R = 3 ranks and a parameter group of a (7 elements) and b (10 elements):

    plain, ZeRO-0   WholeParameter        one tensor per parameter, the parameter itself, the same on every rank:

                        every rank: a a a a a a a    b b b b b b b b b b

    ZeRO-1, -2      GroupPartition        the group's parameters end to end in one buffer, padded and cut in R slices:

                        rank 0: a a a a a a
                        rank 1: a b b b b b
                        rank 2: b b b b b 0

    ZeRO-3          ParameterPartitions   each parameter padded and cut in R slices; a rank's slices end to end:

                        rank 0: a a a b b b b
                        rank 1: a a a b b b b
                        rank 2: a 0 0 b b 0 0

Why not DeepSpeed's ``safe_get/set_full_optimizer_state``: in ZeRO-1/2 they fail for every group but the first, in
ZeRO-3 setting fails unless the world size divides the parameter, and neither works before the first step. The state of
AdamW itself is torch's own and looks the same at every stage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from video_swinv2.distributed.world import World
from video_swinv2.engine.checkpoint import TrainingState
from video_swinv2.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")

# Elements per gather, over all ranks together: the most that rank 0's device receives at a time (256 MB of fp32).
GATHER_ELEMENTS = 1 << 26


class Partition(Protocol):
    """A tensor that AdamW updates on this rank, and how it relates to whole parameters."""

    local: Tensor
    """What AdamW updates here: the key of its state."""
    parameters: Sequence[nn.Parameter]
    """The parameters, in order, that `local` holds elements of."""

    def slice_of(self, wholes: Sequence[Tensor]) -> Tensor:
        """This rank's elements of whole CPU tensors, one per parameter; in the layout of `local`."""

    def gather(self, local: Tensor) -> list[Tensor]:
        """The whole CPU tensors, one per parameter, of every rank's `local`; on rank 0, else empty. Collective."""


class WholeParameter:
    """One parameter that every rank updates in full (plain engine and ZeRO-0)."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.local: Tensor = parameter
        self.parameters: Sequence[nn.Parameter] = (parameter,)

    def slice_of(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Partition`."""
        return wholes[0]

    def gather(self, local: Tensor) -> list[Tensor]:
        """See :class:`Partition`; all ranks hold the same, so there is nothing to communicate."""
        return [local.detach().to("cpu", copy=True)]


class GroupPartition:
    """ZeRO-1/2: a group's parameters lie end to end in one buffer, and each rank updates one equal slice of it."""

    def __init__(self, local: Tensor, parameters: Sequence[nn.Parameter], buffer: Tensor, world: World) -> None:
        self.local = local  # (n,) with n = buffer.numel() / world.size
        self.parameters = parameters
        self._world = world
        # DeepSpeed chooses order and padding. We need not know how: the parameters are views of the buffer, so their
        # storage offsets say where each one starts.
        self._offsets = [parameter.storage_offset() - buffer.storage_offset() for parameter in parameters]

    def slice_of(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Partition`."""
        # Rebuild the whole buffer (R * n,), zeros in the padding, and take row `rank` of it as (R, n).
        flat = torch.zeros(self.local.numel() * self._world.size)
        for offset, whole in zip(self._offsets, wholes, strict=True):
            flat[offset : offset + whole.numel()] = whole.flatten()
        return flat.view(self._world.size, -1)[self._world.rank]

    def gather(self, local: Tensor) -> list[Tensor]:
        """See :class:`Partition`."""
        # (n,) per rank -> rows (R, n) on rank 0 -> the whole buffer (R * n,): equal slices, so rows follow each other.
        flat = _gather_rows(local, self._world).flatten()
        if not flat.numel():  # not rank 0
            return []
        # Cloned, because safetensors refuses tensors that share memory.
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape).clone()
            for offset, parameter in zip(self._offsets, self.parameters, strict=True)
        ]


class ParameterPartitions:
    """ZeRO-3: each parameter is cut into equal slices, the last one padded, and a rank's slices lie end to end.

    The parameters themselves are empty tensors; DeepSpeed keeps their number of elements and shape beside them
    (`ds_numel`, `ds_shape`), and the length of a slice as `partition_numel()`.
    """

    def __init__(self, local: Tensor, parameters: Sequence[Any], world: World) -> None:
        self.local = local  # (sum of lengths,)
        self.parameters = parameters
        self._world = world
        self._lengths = [int(parameter.partition_numel()) for parameter in parameters]

    def slice_of(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Partition`."""
        slices = []
        for length, whole in zip(self._lengths, wholes, strict=True):
            # Any shape -> (R * length,), zeros at the end -> row `rank` of (R, length).
            padded = torch.zeros(length * self._world.size)
            padded[: whole.numel()] = whole.flatten()
            slices.append(padded.view(self._world.size, length)[self._world.rank])
        return torch.cat(slices)

    def gather(self, local: Tensor) -> list[Tensor]:
        """See :class:`Partition`."""
        rows = _gather_rows(local, self._world)  # (R, sum of lengths)
        if not rows.numel():  # not rank 0
            return []
        # A parameter is a block of columns (R, length), one slice per row. Row-major flattening puts the slices in rank
        # order, (R * length,); dropping the padding leaves (ds_numel,), which has the parameter's shape.
        columns = torch.split(rows, self._lengths, dim=1)
        return [
            column.flatten()[: parameter.ds_numel].view(parameter.ds_shape).clone()
            for column, parameter in zip(columns, self.parameters, strict=True)
        ]


def _gather_rows(local: Tensor, world: World) -> Tensor:
    """Every rank's (n,) as rows (world.size, n) on the CPU of rank 0, an empty tensor elsewhere. Collective.

    Gathered in chunks, so that the device of rank 0 never holds the moments of all ranks at once.
    """
    rows = torch.empty(world.size, local.numel()) if world.rank == 0 else torch.empty(0)
    length = max(1, GATHER_ELEMENTS // world.size)
    for start in range(0, local.numel(), length):
        # Offloaded tensors are on the CPU, where NCCL cannot send from.
        chunk = local.detach()[start : start + length].to(world.device)
        received = [torch.empty_like(chunk) for _ in range(world.size)] if world.rank == 0 else None
        dist.gather(chunk, received)
        for rank, theirs in enumerate(received or ()):
            rows[rank, start : start + length] = theirs
    return rows


def optimized_parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters that an optimizer was given, group by group."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def names_by_id(module: nn.Module) -> dict[int, str]:
    """Parameter names by the parameter's `id`: tensors compare by element, so they cannot be looked up themselves."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def read_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, partitions: Sequence[Partition]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both moments by parameter name on rank 0, empty elsewhere; zeros for what was never updated. Collective."""
    names = names_by_id(module)
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for moment, into in zip(MOMENTS, found, strict=True):
        for partition in partitions:
            # optimizer.state is a defaultdict: do not create an entry by looking for one.
            held = optimizer.state[partition.local].get(moment) if partition.local in optimizer.state else None
            wholes = partition.gather(torch.zeros_like(partition.local) if held is None else held)
            into.update({names[id(p)]: whole for p, whole in zip(partition.parameters, wholes, strict=False)})
    return found


def write_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, partitions: Sequence[Partition], state: TrainingState
) -> None:
    """Restore AdamW's moments and step count; in place if there are any already, as DeepSpeed keeps links to them."""
    names = names_by_id(module)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for partition in partitions:
        held = optimizer.state[partition.local]
        # AdamW keeps its step count on the device when fused and on the CPU otherwise.
        count_device = partition.local.device if fused else torch.device("cpu")
        held["step"] = torch.tensor(float(state.optimizer_step), device=count_device)
        for moment in MOMENTS:
            wholes = getattr(state, moment)
            values = partition.slice_of([wholes[names[id(parameter)]] for parameter in partition.parameters])
            if moment not in held:
                held[moment] = torch.zeros_like(partition.local, memory_format=torch.preserve_format)
            held[moment].copy_(values)


def applied_steps(optimizer: torch.optim.Optimizer) -> int:
    """Adam's count of applied steps; 0 before the first."""
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def check_state_fits(module: nn.Module, state: TrainingState) -> None:
    """Raise UserError for the first tensor that is missing, left over, or of another shape."""
    named = module.state_dict(keep_vars=True)
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    expected: tuple[tuple[str, Mapping[str, Tensor], Mapping[str, Tensor]], ...] = (
        ("weights", named, state.weights),
        ("exp_avg", trained, state.exp_avg),
        ("exp_avg_sq", trained, state.exp_avg_sq),
    )
    if state.ema:
        expected = (*expected, ("ema", trained, state.ema))
    fix = "it was written by another model or with other frozen layers; resume with the configuration that wrote it"
    for kind, ours, theirs in expected:
        if different := sorted(ours.keys() ^ theirs.keys()):
            absent_from = "checkpoint" if different[0] in ours else "model"
            raise UserError(f"checkpoint {kind}: {different[0]} is not in the {absent_from}; {fix}")
        for name, tensor in ours.items():
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # a ZeRO-3 parameter itself is empty
            if tuple(theirs[name].shape) != shape:
                raise UserError(f"checkpoint {kind}: {name} has shape {tuple(theirs[name].shape)}, not {shape}; {fix}")
