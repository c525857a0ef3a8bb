"""The order of samples, and loaders that keep it: a function of (seed, step), whatever the processes and workers.

Workers get the data set by fork, or through torch's shared memory where they are spawned; what it knows of its entries
is a handful of tensors (`index.py`), so a worker copies nothing of it however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from video_swinv2.data.datasets import Address, Batch, SampleDataset, collate
from video_swinv2.errors import UsageError


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch of a step is cut: rank after rank, each in `accumulation` pieces of `micro`."""

    batch: int
    world: int
    micro: int

    @property
    def accumulation(self) -> int:
        """Forward passes per step and process."""
        return self.batch // self.world // self.micro


def plan_batch(batch: int, micro_batch: int, world: int) -> BatchPlan:
    """The largest pieces up to `micro_batch` that divide the share of a process; UsageError if `batch` does not."""
    if batch % world:
        raise UsageError(
            f"optim.batch: {batch} samples cannot be shared by {world} processes; take a multiple of {world}"
        )
    share = batch // world
    return BatchPlan(batch, world, max(n for n in range(1, min(micro_batch, share) + 1) if share % n == 0))


class StepSampler(Sampler[list[Address]]):
    """The micro-batches of one process from step `first` to step `last` (exclusive), as addresses (epoch, number).

    All epochs, each `samples` long and in its `order`, form one stream; step s takes positions s * batch to
    (s + 1) * batch. So no batch is short, and a resumed run needs to know nothing but its step.
    """

    def __init__(
        self,
        samples: int,
        order: Callable[[int], NDArray[np.int64]],
        plan: BatchPlan,
        *,
        rank: int,
        first: int,
        last: int,
    ) -> None:
        self.samples = samples
        self.order = order
        self.plan = plan
        self.rank = rank
        self.first = first
        self.last = last

    def __len__(self) -> int:
        return (self.last - self.first) * self.plan.accumulation

    def __iter__(self) -> Iterator[list[Address]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        share = self.plan.batch // self.plan.world
        for step in range(self.first, self.last):
            start = step * self.plan.batch + self.rank * share
            for piece in range(start, start + share, self.plan.micro):
                addresses = []
                for position in range(piece, piece + self.plan.micro):
                    if position // self.samples != epoch:
                        epoch = position // self.samples
                        order = self.order(epoch)
                    addresses.append((epoch, int(order[position % self.samples])))
                yield addresses


def training_loader(
    dataset: SampleDataset, plan: BatchPlan, *, seed: int, rank: int, first: int, last: int, pin: bool
) -> DataLoader[Batch]:
    """All micro-batches of this process from step `first` on; its workers live as long as the loop over it."""
    order = partial(dataset.mixture.order, seed)
    sampler = StepSampler(len(dataset), order, plan, rank=rank, first=first, last=last)
    return _loader(dataset, sampler, pin)


def validation_loader(
    dataset: SampleDataset, micro_batch: int, *, rank: int, world: int, pin: bool
) -> DataLoader[Batch]:
    """This process's share of the validation samples, each exactly once: rank, rank + world, ... without padding."""
    mine = [(0, index) for index in range(rank, len(dataset), world)]
    batches = [mine[start : start + micro_batch] for start in range(0, len(mine), micro_batch)]
    return _loader(dataset, batches, pin)


def _loader(
    dataset: SampleDataset, batches: Sampler[list[Address]] | list[list[Address]], pin: bool
) -> DataLoader[Batch]:
    workers = dataset.data.workers
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # torch types the loader by the dataset's item, not by what collate makes
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
