"""The order of samples, and loaders that keep it: a function of (seed, step), whatever the processes and workers.

How the stream of samples is cut, for a global batch of 8, 2 processes and micro-batches of 2:

    position of a sample in the stream   0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15 | 16 ...
    step                                 0               | 1                     | 2
    rank                                 0       1       | 0         1           | 0
    micro-batch                          0   1   0   1   | 0   1     0     1     | 0

    position p -> epoch p // n, the (p % n)-th number of that epoch's permutation of n samples

Nothing here depends on what was read before, so a run resumes from the number of its step alone, and a run on another
number of processes sees the same global batches. An epoch ends within a step when n is not a multiple of the batch.

Workers get the data set by fork on Linux, through torch's shared memory elsewhere; what it knows of its entries is a
handful of tensors (`index.py`), so a worker copies none of it however many there are.

A worker that dies or hangs costs time and at most the file it was reading: all workers are started again, and what was
not yet delivered is read again, so the order stays what it was (`Loader`).
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

PREFETCH = 4  # micro-batches that a worker may be ahead; times their size, all the memory that loading takes
MAX_DEATHS = 5  # of workers without a single batch in between; beyond that the machine is at fault, not a file


@dataclass(frozen=True)
class BatchPlan:
    """How the global batch of a step is divided: `world` equal shares, each read in `accumulation` micro-batches."""

    batch: int
    world: int
    micro: int

    @property
    def accumulation(self) -> int:
        """Forward passes per step and process."""
        return self.batch // self.world // self.micro


def plan_batch(batch: int, micro_batch: int, world: int, repeats: int = 1) -> BatchPlan:
    """Divide a global batch into the largest micro-batches of at most `micro_batch` samples that divide a share evenly.

    All `repeats` of a clip go into one micro-batch, so that the clip is decoded once. Raises UsageError if `batch`
    cannot be divided among `world` processes, or if a micro-batch cannot hold the repeats of one clip.
    """
    if batch % (world * repeats):
        shared = f"{world} processes" + (f" in {repeats} repeats of a clip" if repeats > 1 else "")
        raise UsageError(
            f"optim.batch: {batch} samples cannot be shared by {shared}; use a multiple of {world * repeats}"
        )
    if micro_batch < repeats:
        raise UsageError(
            f"optim.micro_batch: {micro_batch} samples cannot hold the {repeats} of augment.repeats; "
            f"use at least {repeats}"
        )
    clips = batch // world // repeats
    most = min(micro_batch // repeats, clips)
    return BatchPlan(batch, world, repeats * max(n for n in range(1, most + 1) if clips % n == 0))


class StepSampler(Sampler[list[Address]]):
    """The micro-batches of one process from step `first` to step `last` (exclusive), as addresses (epoch, number).

    samples: the length of an epoch. order: epoch -> its permutation, int64 (samples,). All epochs form one endless
    stream, of which step s takes positions s * batch to (s + 1) * batch; the head of this file has an example.
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
                    # Positions ascend, so each permutation is made once; the epoch may change within a micro-batch.
                    if position // self.samples != epoch:
                        epoch = position // self.samples
                        order = self.order(epoch)
                    addresses.append((epoch, int(order[position % self.samples])))
                yield addresses


class Loader:
    """The batches of the given addresses, in their order, whatever happens to the workers that read them.

    When a worker dies, all are started again from the first batch that was not delivered. The file that it was reading
    is given up if it was the second worker to die of it, or if it hung (the worker's own alarm ends it); a file given
    up is named and replaced like any unreadable one. Raises UserError when workers die one after the other.
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
        delivered = deaths = 0
        while delivered < len(self):
            batches = self._start(delivered)
            try:
                for batch in batches:
                    delivered, deaths = delivered + 1, 0
                    yield batch
            except (RuntimeError, EOFError, OSError) as error:
                if not is_worker_death(error, self.dataset.in_hand):
                    raise
                deaths += 1
                self.restarts += 1
                if deaths >= MAX_DEATHS:
                    raise UserError(
                        f"data.workers: {deaths} loader workers died one after the other; if memory or /dev/shm is "
                        f"short, lower data.workers ({self.dataset.data.workers}) or optim.micro_batch"
                    ) from error
                self._judge_abandoned_files()  # before the other workers are ended too
            del batches  # ends the workers

    def _start(self, delivered: int) -> Iterator[Batch]:
        """Start workers that continue after the first `delivered` batches."""
        workers = self.dataset.data.workers
        # A new table each time, set before the workers are forked: the old one still names the dead.
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
        """Give up the files that hung, and those that a second worker died of; the others get another chance."""
        if self.dataset.in_hand is None:
            return
        patience = self.dataset.patience_seconds
        for file in self.dataset.in_hand.abandoned():
            if file.seconds >= patience:
                self.dataset.given_up[file.number] = (
                    f"the decoder did not answer within {patience:g} s; remove the file from the list"
                )
            elif file.number in self._died_once:
                self.dataset.given_up[file.number] = "the decoder crashed twice; remove the file from the list"
            self._died_once.add(file.number)


class RemainingAddresses(Sampler[list[Address]]):
    """The addresses without the first `skip`."""

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
    """The micro-batches of this process from step `first` to `last` (exclusive); workers live as long as the loop."""
    order = partial(dataset.mixture.order, seed)
    return Loader(dataset, StepSampler(len(dataset), order, plan, rank=rank, first=first, last=last), pin)


def validation_loader(dataset: SampleDataset, micro_batch: int, *, rank: int, world: int, pin: bool) -> Loader:
    """This process's share of the validation samples: rank, rank + world, ..., each exactly once, without padding."""
    mine = [(0, index) for index in range(rank, len(dataset), world)]
    return Loader(dataset, [mine[start : start + micro_batch] for start in range(0, len(mine), micro_batch)], pin)
