"""Data loaders whose order of samples is a function of (seed, step), whatever the number of processes and workers.

How the stream of samples is divided, for a global batch of 8, 2 processes and micro-batches of 2:

    position of a sample in the stream   0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15 | 16 ...
    step                                 0               | 1                     | 2
    rank                                 0       1       | 0         1           | 0
    micro-batch                          0   1   0   1   | 0   1     0     1     | 0

    position p -> epoch p // n, the (p % n)-th number of that epoch's permutation of n samples

Nothing here depends on what was read before, so the step number is all that is needed to resume a run, and a run on
another number of processes sees the same global batches. If n is not a multiple of the batch, an epoch ends within a
step, and the rest of the step comes from the next epoch.

Workers receive the data set by fork on Linux, and through torch's shared memory elsewhere. The data set holds its
entries in a handful of tensors (`index.py`), so workers share them instead of copying them, however many there are.

A worker that dies or hangs costs time and at most the file that it was reading: all workers are restarted, and the
batches that were not yet delivered are read again, so the order does not change (see `Loader`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from video_swinv2.data.datasets import Address, Batch, SampleDataset, collate
from video_swinv2.data.workers import FilesInHand, is_worker_death, start_loader
from video_swinv2.errors import UsageError, UserError

# Micro-batches that each worker reads ahead. Loading takes about workers x PREFETCH x size of a micro-batch in memory.
PREFETCH = 4
# Worker deaths without a single batch in between after which loading gives up. By then, the machine is at fault (it is
# out of memory, for example) and not a single file.
MAX_DEATHS = 5


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch of a step is divided: into `world` equal shares of `accumulation` micro-batches each.

    `batch` and `micro` are numbers of samples, `world` is the number of processes.
    """

    batch: int
    world: int
    micro: int

    @property
    def accumulation(self) -> int:
        """The number of micro-batches, and so of forward passes, per step and process."""
        return self.batch // self.world // self.micro


def plan_batch(batch: int, micro_batch: int | None, world: int, repeats: int = 1) -> BatchPlan:
    """Divide a global batch into the largest micro-batches of at most `micro_batch` samples that divide a share evenly.

    Without a `micro_batch`, a whole share is one. All `repeats` of a clip go into the same micro-batch, so that it is
    decoded once. Raises UsageError if `batch` cannot be divided among `world` processes, or if a micro-batch cannot
    hold the repeats of one clip.
    """
    # From here on, everything is counted in clips of `repeats` samples each.
    if batch % (world * repeats):
        shared = f"{world} processes" + (f" in {repeats} repeats of a clip" if repeats > 1 else "")
        raise UsageError(
            f"optim.batch: {batch} samples cannot be shared by {shared}; use a multiple of {world * repeats}"
        )
    if micro_batch is not None and micro_batch < repeats:
        raise UsageError(
            f"optim.micro_batch: {micro_batch} samples cannot hold the {repeats} of augment.repeats; "
            f"use at least {repeats}"
        )
    clips = batch // world // repeats
    most = clips if micro_batch is None else min(micro_batch // repeats, clips)
    return BatchPlan(batch, world, repeats * max(n for n in range(1, most + 1) if clips % n == 0))


class StepSampler(Sampler[list[Address]]):
    """The micro-batches of one process from step `first` to step `last` (exclusive), as addresses (epoch, number).

    All epochs form one endless stream, of which step s takes the positions from s * batch to (s + 1) * batch
    (exclusive). The docstring of this file has an example.

    Args:
        samples: the length of an epoch.
        order: gives the sample numbers of an epoch in their order, int64 (samples,).
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
            share_start = step * self.plan.batch + self.rank * share
            for micro_start in range(share_start, share_start + share, self.plan.micro):
                addresses = []
                for position in range(micro_start, micro_start + self.plan.micro):
                    # Positions ascend, so each epoch's permutation is computed once. The epoch may change within a
                    # micro-batch.
                    if position // self.samples != epoch:
                        epoch = position // self.samples
                        order = self.order(epoch)
                    addresses.append((epoch, int(order[position % self.samples])))
                yield addresses


class Loader:
    """Iterates over the batches at the given addresses, in order, and survives the death of worker processes.

    When a worker dies, all workers are restarted from the first batch that was not delivered. The file that the dead
    worker was reading is given up if a worker died while reading it before, or if the worker hung, in which case its
    own alarm killed it. A file that was given up is reported and replaced like any other unreadable file. Raises
    UserError after MAX_DEATHS deaths without a batch in between.
    """

    def __init__(self, dataset: SampleDataset, addresses: Sequence[list[Address]] | StepSampler, pin: bool) -> None:
        self.dataset = dataset
        self.addresses = addresses
        self.pin = pin
        self.restarts = 0
        self._died_once: set[int] = set()

    def __len__(self) -> int:
        return len(self.addresses)

    def __iter__(self) -> Iterator[Batch]:
        # `delivered` counts batches since the beginning, `deaths` those since the last delivered batch.
        delivered = deaths = 0
        while delivered < len(self):
            batches = self._start(delivered)
            try:
                for batch in batches:
                    delivered, deaths = delivered + 1, 0
                    yield batch
            except (RuntimeError, EOFError, OSError) as error:
                if not is_worker_death(error, self.dataset.in_hand):
                    raise  # a real error, raised by the data set in a worker
                deaths += 1
                self.restarts += 1
                if deaths >= MAX_DEATHS:
                    raise UserError(
                        f"data.workers: {deaths} loader workers died one after the other; if memory or /dev/shm is "
                        f"short, lower data.workers ({self.dataset.data.workers}) or optim.micro_batch"
                    ) from error
                # Before `del batches`, which stops the other workers: they would then look dead too.
                self._judge_abandoned_files()
            del batches  # stops the workers

    def _start(self, delivered: int) -> Iterator[Batch]:
        """Start workers that continue after the first `delivered` batches."""
        workers = self.dataset.data.workers
        # A new table for each start, because the old one still contains the dead workers. It has to be set before the
        # workers are forked, which is how they get it.
        self.dataset.in_hand = FilesInHand(workers) if workers else None
        return start_loader(
            self.dataset,
            RemainingAddresses(self.addresses, delivered),
            partial(collate, repeats=self.dataset.repeats),
            workers=workers,
            prefetch=PREFETCH,
            pin=self.pin,
        )

    def _judge_abandoned_files(self) -> None:
        """Give up files that hung and files whose reader has died twice. Any other file gets a second chance."""
        if self.dataset.in_hand is None:
            return
        patience = self.dataset.patience_seconds
        for file in self.dataset.in_hand.abandoned():
            # A hang is certain, as the alarm ends only a reader that is far over its limits. A crash may have been the
            # fault of the machine (out of memory), so the file is tried once more.
            if file.seconds >= patience:
                self.dataset.given_up[file.number] = (
                    f"the decoder did not answer within {patience:g} s; remove the file from the list"
                )
            elif file.number in self._died_once:
                self.dataset.given_up[file.number] = "the decoder crashed twice; remove the file from the list"
            self._died_once.add(file.number)


class RemainingAddresses(Sampler[list[Address]]):
    """The given batches of addresses without the first `skip`, which were delivered before a restart."""

    def __init__(self, addresses: Sequence[list[Address]] | StepSampler, skip: int) -> None:
        self.addresses = addresses
        self.skip = skip

    def __len__(self) -> int:
        return len(self.addresses) - self.skip

    def __iter__(self) -> Iterator[list[Address]]:
        return islice(iter(self.addresses), self.skip, None)


def training_loader(
    dataset: SampleDataset, plan: BatchPlan, *, seed: int, rank: int, first: int, last: int, pin: bool
) -> Loader:
    """The micro-batches of this process from step `first` to `last` (exclusive). Workers live as long as the loop."""
    order = partial(dataset.mixture.order, seed)
    return Loader(dataset, StepSampler(len(dataset), order, plan, rank=rank, first=first, last=last), pin)


def validation_loader(dataset: SampleDataset, micro_batch: int, *, rank: int, world: int, pin: bool) -> Loader:
    """This process's share of the validation samples: rank, rank + world, ..., each exactly once, without padding.

    Shares may therefore differ by one sample between processes. Every sample has epoch 0, as validation is not random.
    """
    mine = [(0, index) for index in range(rank, len(dataset), world)]
    return Loader(dataset, [mine[start : start + micro_batch] for start in range(0, len(mine), micro_batch)], pin)
