"""ZeRO's memory layout: converts between whole tensors by parameter name and the partitions that each rank updates.

An engine gives AdamW one tensor per *partition*, and AdamW keeps two moments of the same shape for each of these
tensors. Saving and restoring moments and averages at a stage therefore comes down to one question: which elements of
which parameters does this rank's tensor contain? For R = 3 ranks and a group of parameters a (7 elements) and b (10
elements), with 0 for padding:

    plain, ZeRO-0   WholeParameter        one tensor per parameter, the parameter itself, the same on all ranks:

                        every rank: a a a a a a a    b b b b b b b b b b

    ZeRO-1, -2      GroupPartition        the group's parameters end to end, padded and cut into R equal slices:

                        rank 0: a a a a a a
                        rank 1: a b b b b b
                        rank 2: b b b b b 0

    ZeRO-3          ParameterPartitions   each parameter padded and cut into R slices; a rank's slices end to end:

                        rank 0: a a a b b b b
                        rank 1: a a a b b b b
                        rank 2: a 0 0 b b 0 0

DeepSpeed has ``safe_get_full_optimizer_state`` and ``safe_set_full_optimizer_state`` for this, but they are not usable:
at ZeRO-1 and 2 they fail for every group but the first, at ZeRO-3 setting fails unless the world size divides the
number of elements, and neither works before the first step. AdamW's own state is torch's and looks the same at every
stage, so this file reads and writes that.
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

# Keys of the moments in the state of torch's AdamW; `TrainingState` has fields of the same names.
MOMENTS = ("exp_avg", "exp_avg_sq")

# Elements per gather, summed over all ranks: as much as rank 0's device receives at a time (256 MB of fp32).
GATHER_ELEMENTS = 1 << 26


class Partition(Protocol):
    """A tensor that AdamW updates on this rank, and the conversion between its layout and whole parameters."""

    local: Tensor
    """The tensor that AdamW updates, which is also the key of its state."""
    parameters: Sequence[nn.Parameter]
    """The parameters of which `local` may contain elements, in the order in which they are stored."""

    def slice_of(self, wholes: Sequence[Tensor]) -> Tensor:
        """This rank's elements of ``wholes``, one whole CPU tensor per parameter, in the layout of `local`."""

    def gather(self, local: Tensor) -> list[Tensor]:
        """Assemble every rank's ``local``, which is laid out like `self.local`, into whole tensors. Collective.

        Returns one CPU tensor per parameter on rank 0 and an empty list elsewhere.
        """


class WholeParameter:
    """One parameter that every rank updates in full (plain engine and ZeRO-0)."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.local: Tensor = parameter
        self.parameters: Sequence[nn.Parameter] = (parameter,)

    def slice_of(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Partition`."""
        return wholes[0]

    def gather(self, local: Tensor) -> list[Tensor]:
        """See :class:`Partition`. All ranks have the same values, so each returns them and nothing is communicated."""
        return [local.detach().to("cpu", copy=True)]


class GroupPartition:
    """ZeRO-1 and 2: a group's parameters lie end to end in one buffer, of which each rank updates an equal slice."""

    def __init__(self, local: Tensor, parameters: Sequence[nn.Parameter], buffer: Tensor, world: World) -> None:
        self.local = local  # (n,) with n = buffer.numel() / world.size
        self.parameters = parameters
        self._world = world
        # DeepSpeed chooses the order of the parameters and the padding. We do not have to know its rules, because the
        # parameters are views of the buffer: their storage offsets give the element at which each one starts.
        self._offsets = [parameter.storage_offset() - buffer.storage_offset() for parameter in parameters]

    def slice_of(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Partition`."""
        # Rebuild the whole buffer, (R * n,) with zeros as padding, view it as (R, n) and take row `rank`.
        flat = torch.zeros(self.local.numel() * self._world.size)
        for offset, whole in zip(self._offsets, wholes, strict=True):
            flat[offset : offset + whole.numel()] = whole.flatten()
        return flat.view(self._world.size, -1)[self._world.rank]

    def gather(self, local: Tensor) -> list[Tensor]:
        """See :class:`Partition`."""
        # (n,) per rank -> rows (R, n) on rank 0 -> the whole buffer (R * n,), because its slices are the rows in order.
        flat = _gather_rows(local, self._world).flatten()
        if not flat.numel():  # on ranks other than 0
            return []
        # Cut the parameters out again. Cloned, because safetensors refuses tensors that share memory.
        return [
            flat[offset : offset + parameter.numel()].view(parameter.shape).clone()
            for offset, parameter in zip(self._offsets, self.parameters, strict=True)
        ]


class ParameterPartitions:
    """ZeRO-3: each parameter is cut into equal slices, the last one padded, and a rank's slices lie end to end.

    The parameters themselves are empty tensors. DeepSpeed adds the number of elements (`ds_numel`), the shape
    (`ds_shape`) and the length of a slice (`partition_numel()`) to them.
    """

    def __init__(self, local: Tensor, parameters: Sequence[Any], world: World) -> None:
        self.local = local  # (sum of self._lengths,)
        self.parameters = parameters
        self._world = world
        self._lengths = [int(parameter.partition_numel()) for parameter in parameters]

    def slice_of(self, wholes: Sequence[Tensor]) -> Tensor:
        """See :class:`Partition`."""
        slices = []
        for length, whole in zip(self._lengths, wholes, strict=True):
            # Any shape -> flat, padded to (R * length,) with zeros -> row `rank` of (R, length).
            padded = torch.zeros(length * self._world.size)
            padded[: whole.numel()] = whole.flatten()
            slices.append(padded.view(self._world.size, length)[self._world.rank])
        return torch.cat(slices)

    def gather(self, local: Tensor) -> list[Tensor]:
        """See :class:`Partition`."""
        rows = _gather_rows(local, self._world)  # (R, sum of self._lengths)
        if not rows.numel():  # on ranks other than 0
            return []
        # A parameter is a block of columns (R, length) with one rank's slice in each row. Flattening it row by row puts
        # the slices in the order of the ranks, (R * length,). Without the padding that is (ds_numel,), the flattened
        # parameter.
        columns = torch.split(rows, self._lengths, dim=1)
        return [
            column.flatten()[: parameter.ds_numel].view(parameter.ds_shape).clone()
            for column, parameter in zip(columns, self.parameters, strict=True)
        ]


def _gather_rows(local: Tensor, world: World) -> Tensor:
    """Gather every rank's (n,) as rows (world.size, n) on rank 0's CPU; an empty tensor elsewhere. Collective.

    Gathered in chunks, so that the device of rank 0 never holds the moments of all ranks at once.
    """
    rows = torch.empty(world.size, local.numel()) if world.rank == 0 else torch.empty(0)
    length = max(1, GATHER_ELEMENTS // world.size)  # elements that one rank sends per chunk
    for start in range(0, local.numel(), length):
        # Offloaded tensors are on the CPU, from where NCCL cannot send.
        chunk = local.detach()[start : start + length].to(world.device)
        received = [torch.empty_like(chunk) for _ in range(world.size)] if world.rank == 0 else None
        dist.gather(chunk, received)
        for rank, theirs in enumerate(received or ()):
            rows[rank, start : start + length] = theirs
    return rows


def optimized_parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """The parameters in an optimizer's groups, group by group."""
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def names_by_id(module: nn.Module) -> dict[int, str]:
    """Parameter names by `id` of the parameter, because a partition knows its parameters but not their names."""
    return {id(parameter): name for name, parameter in module.named_parameters()}


def read_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, partitions: Sequence[Partition]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both moments by parameter name on rank 0; zeros where AdamW has taken no step yet. Collective.

    On other ranks the result is empty, or at ZeRO-0, where every rank has everything, the same as on rank 0.
    """
    names = names_by_id(module)
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for moment, into in zip(MOMENTS, found, strict=True):
        for partition in partitions:
            # `in` first: optimizer.state is a defaultdict, and reading a missing key would create an empty state, which
            # must not exist before AdamW's own first step.
            held = optimizer.state[partition.local].get(moment) if partition.local in optimizer.state else None
            wholes = partition.gather(torch.zeros_like(partition.local) if held is None else held)
            # Not strict: `wholes` is empty on ranks other than 0.
            into.update({names[id(p)]: whole for p, whole in zip(partition.parameters, wholes, strict=False)})
    return found


def write_moments(
    module: nn.Module, optimizer: torch.optim.Optimizer, partitions: Sequence[Partition], state: TrainingState
) -> None:
    """Restore AdamW's moments and step count from whole tensors; every rank writes its own partitions.

    Existing moments are overwritten in place, because DeepSpeed keeps references to them.
    """
    names = names_by_id(module)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for partition in partitions:
        held = optimizer.state[partition.local]
        # AdamW keeps its step count, a tensor of one element, on the parameter's device if fused and else on the CPU.
        count_device = partition.local.device if fused else torch.device("cpu")
        held["step"] = torch.tensor(float(state.optimizer_step), device=count_device)
        for moment in MOMENTS:
            wholes = getattr(state, moment)
            values = partition.slice_of([wholes[names[id(parameter)]] for parameter in partition.parameters])
            if moment not in held:  # no step has been taken yet; create what AdamW would create
                held[moment] = torch.zeros_like(partition.local, memory_format=torch.preserve_format)
            held[moment].copy_(values)


def applied_steps(optimizer: torch.optim.Optimizer) -> int:
    """Adam's count of applied steps; 0 before the first.

    Adam counts per parameter. The maximum is taken because a parameter without a gradient is not counted.
    """
    return max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)


def check_state_fits(module: nn.Module, state: TrainingState) -> None:
    """Raise UserError for the first tensor that is missing from the checkpoint or the model, or has another shape."""
    # What is expected and what the checkpoint has, for each kind of tensor. Frozen parameters have no moments.
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
        if different := sorted(ours.keys() ^ theirs.keys()):  # names that only one of the two has
            absent_from = "checkpoint" if different[0] in ours else "model"
            raise UserError(f"checkpoint {kind}: {different[0]} is not in the {absent_from}; {fix}")
        for name, tensor in ours.items():
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))  # a ZeRO-3 parameter itself is empty
            if tuple(theirs[name].shape) != shape:
                raise UserError(f"checkpoint {kind}: {name} has shape {tuple(theirs[name].shape)}, not {shape}; {fix}")
