"""The order of samples, and loaders that keep it: a function of (seed, step), whatever the processes and workers.

Workers get the data set by fork on Linux, through torch's shared memory elsewhere; what it knows of its entries is a
handful of tensors (`index.py`), so a worker copies nothing of it however many there are.

A worker that dies or hangs costs time and at most the file it had in hand: the others are started again and what was
not yet delivered is read again, so the order stays what it was.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from video_swinv2.data.datasets import Address, Batch, SampleDataset, collate
from video_swinv2.errors import UsageError, UserError

PREFETCH = 4  # micro-batches that a worker may be ahead: with their size, all the memory that loading takes
WORKER_DIED = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")
DYING_SECONDS = 2.0  # in which the end of a worker shows
DEATHS = 5  # of workers without one batch in between, then the machine is at fault and not a file


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


def plan_batch(batch: int, micro_batch: int, world: int, repeats: int = 1) -> BatchPlan:
    """The largest pieces up to `micro_batch` that divide the share of a process; UsageError if `batch` does not.

    All `repeats` of a clip are in one piece, so that it is decoded once.
    """
    if batch % (world * repeats):
        shared = f"{world} processes" + (f" in {repeats} repeats of a clip" if repeats > 1 else "")
        raise UsageError(
            f"optim.batch: {batch} samples cannot be shared by {shared}; take a multiple of {world * repeats}"
        )
    if micro_batch < repeats:
        raise UsageError(
            f"optim.micro_batch: {micro_batch} samples cannot hold the {repeats} of augment.repeats; take {repeats}"
        )
    clips = batch // world // repeats
    most = min(micro_batch // repeats, clips)
    return BatchPlan(batch, world, repeats * max(n for n in range(1, most + 1) if clips % n == 0))


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


class Loader:
    """Batches of the addresses given, in their order, whatever becomes of the workers that read them.

    A worker that dies is replaced and what was not delivered yet is read again. The file it had in hand is given up,
    named and replaced like any broken one if it was the second worker to die of it, or hung (the worker's own alarm
    ends it). UserError if workers die one after the other.
    """

    def __init__(self, dataset: SampleDataset, addresses: Sequence[list[Address]] | StepSampler, pin: bool) -> None:
        self.dataset = dataset
        self.addresses = addresses
        self.pin = pin
        self.restarts = 0
        self._died_of: set[int] = set()

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
                if not self._tells_of_a_death(error):
                    raise
                deaths += 1
                self.restarts += 1
                if deaths >= DEATHS:
                    raise UserError(
                        f"data.workers: {deaths} loader workers died one after the other; if memory or /dev/shm is "
                        f"short lower data.workers ({self.dataset.data.workers}) or optim.micro_batch"
                    ) from error
                self._judge()  # while the other workers live
            del batches  # ends them

    def _start(self, delivered: int) -> Iterator[Batch]:
        """Workers that go on after so many batches."""
        workers = self.dataset.data.workers
        if workers:
            self.dataset.at_work = torch.full((workers, 3), -1.0, dtype=torch.float64).share_memory_()
        loader = DataLoader(
            self.dataset,
            batch_sampler=Rest(self.addresses, delivered),
            num_workers=workers,
            collate_fn=partial(collate, repeats=self.dataset.repeats),
            pin_memory=self.pin,
            prefetch_factor=PREFETCH if workers else None,
            # What Linux did by default before Python 3.14: a forked worker starts at once, another in seconds.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        )
        if not workers or threading.current_thread() is not threading.main_thread():
            return iter(loader)
        # PyTorch would have a dying worker raise inside whatever the main thread does then, a collective for example;
        # without its handler the death is found when the next batch is waited for.
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return iter(loader)
        finally:
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)

    def _tells_of_a_death(self, error: Exception) -> bool:
        """PyTorch says so, or a batch could not be fetched from the memory of a worker that is no more."""
        if isinstance(error, RuntimeError):
            return WORKER_DIED.search(str(error)) is not None
        if self.dataset.at_work is None:
            return False
        until = time.monotonic() + DYING_SECONDS
        while time.monotonic() < until:
            multiprocessing.active_children()  # takes notice of those that ended
            if any(pid >= 0 and not _is_alive(int(pid)) for pid in self.dataset.at_work[:, 0].tolist()):
                return True
            time.sleep(0.05)
        return False

    def _judge(self) -> None:
        """Give up the file in the dead worker's hand if it hung, or if it is not the first worker to die of it."""
        if self.dataset.at_work is None:
            return
        now = time.monotonic()
        for pid, first, since in self.dataset.at_work.tolist():
            if first < 0 or _is_alive(int(pid)):
                continue
            file = int(first)
            if now - since >= self.dataset.patience_seconds:
                seconds = self.dataset.patience_seconds
                self.dataset.lost[file] = f"the decoder did not answer within {seconds:g} s; leave the file out"
            elif file in self._died_of:
                self.dataset.lost[file] = "the decoder crashed twice; leave the file out"
            self._died_of.add(file)


class Rest(Sampler[list[Address]]):
    """The addresses without the first `skip`."""

    def __init__(self, addresses: Sequence[list[Address]] | StepSampler, skip: int) -> None:
        self.addresses = addresses
        self.skip = skip

    def __len__(self) -> int:
        return len(self.addresses) - self.skip

    def __iter__(self) -> Iterator[list[Address]]:
        return islice(iter(self.addresses), self.skip, None)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def training_loader(
    dataset: SampleDataset, plan: BatchPlan, *, seed: int, rank: int, first: int, last: int, pin: bool
) -> Loader:
    """All micro-batches of this process from step `first` on; its workers live as long as the loop over it."""
    order = partial(dataset.mixture.order, seed)
    return Loader(dataset, StepSampler(len(dataset), order, plan, rank=rank, first=first, last=last), pin)


def validation_loader(dataset: SampleDataset, micro_batch: int, *, rank: int, world: int, pin: bool) -> Loader:
    """This process's share of the validation samples, each exactly once: rank, rank + world, ... without padding."""
    mine = [(0, index) for index in range(rank, len(dataset), world)]
    return Loader(dataset, [mine[start : start + micro_batch] for start in range(0, len(mine), micro_batch)], pin)
