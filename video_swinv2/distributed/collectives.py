"""Collectives on plain numbers and objects: maximum, sum, gather with and without a limit; printing on one rank only.

In a world of size one the collectives return their input and communicate nothing. In a larger one every rank must make
the same calls in the same order.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from video_swinv2.distributed.world import World

T = TypeVar("T")
_store_numbers = itertools.count()


def all_reduce_max(world: World, *values: float) -> tuple[float, ...]:
    """The maximum of each value over all ranks, in one collective. Used for flags that all ranks must act on together.

    Values must not be NaN, for which a maximum is undefined: pass ``float(not isfinite(loss))`` rather than the loss.
    """
    if world.size == 1:
        return tuple(float(value) for value in values)
    return tuple(_all_reduce(world, values, dist.ReduceOp.MAX))


def all_reduce_sum(world: World, values: Sequence[float]) -> list[float]:
    """The sum of each value over all ranks, in float64 and one collective."""
    if world.size == 1:
        return [float(value) for value in values]
    return _all_reduce(world, values, dist.ReduceOp.SUM)


def _all_reduce(world: World, values: Sequence[float], operation: Any) -> list[float]:
    # float64 keeps counts exact up to 2^53. On the rank's own device, because NCCL cannot reduce CPU tensors.
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor, operation)
    return [float(value) for value in tensor.tolist()]


def all_gather_objects(world: World, value: T) -> list[T]:
    """Every rank's value, in rank order, on all ranks. Torch pickles the values, so pass plain data only."""
    if world.size == 1:
        return [value]
    values: list[Any] = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def gather_shares(world: World, value: T) -> list[T]:
    """Every rank's value, like `all_gather_objects`, after waiting for the slowest rank however long it takes.

    For work that is shared unevenly: a collective alone would fail after COLLECTIVE_TIMEOUT. If a rank fails instead of
    coming here, the lifeline ends the others.
    """
    if world.size > 1:
        store = common_store()
        store.add("arrived", 1)
        seconds = 0.01
        while store.add("arrived", 0) < world.size:
            time.sleep(seconds)
            seconds = min(1.5 * seconds, 0.5)
    # Nobody has to wait long for this. It also keeps rank 0, which may host the store, until all have looked.
    return all_gather_objects(world, value)


def common_store() -> dist.Store:
    """A new key-value store, shared by all ranks and empty at first. Every rank must ask for it in the same order."""
    base = cast(Any, dist.distributed_c10d)._get_default_store()  # torch has no public name for it
    return dist.PrefixStore(f"video-swinv2/{next(_store_numbers)}", base)


def print_on_rank_zero(world: World, text: str) -> None:
    """Print on rank 0 only. Flushed at once, because output to a file is buffered and a killed run would lose it."""
    if world.rank == 0:
        print(text, flush=True)
