"""Validation: the task's metrics over the whole validation split.

Every sample counts exactly once, so the metrics do not depend on the number of processes or on the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from video_swinv2.data.datasets import Batch, SampleDataset, collate
from video_swinv2.data.loading import validation_loader
from video_swinv2.distributed.collectives import all_gather_objects
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import Engine
from video_swinv2.training.tasks.base import Tally, Task


@contextmanager
def evaluation_mode(engine: Engine, averaged: bool) -> Iterator[dict[str, Tensor] | None]:
    """Inside, the module is in eval mode and no gradients are computed; afterwards training continues unchanged.

    averaged: inside, the module holds the averaged weights (EMA) instead of those that are trained.

    Yields the weights that the module holds, by name, on rank 0 and None on the others. Entering and leaving are
    collective, and every process has to run the same forward passes inside.
    """
    # The trained weights are kept here, on the CPU of rank 0, while the averaged ones take their place.
    weights = engine.weights()
    shown = engine.averaged_weights() if averaged else weights
    if averaged:
        engine.write_weights(shown)
    engine.module.eval()
    with torch.no_grad():
        yield shown
    # Deliberately not in a `finally`. If only this process fails, the others do not take part in the collectives of
    # write_weights, so this process would hang there instead of reporting its error.
    engine.module.train()
    if averaged:
        engine.write_weights(weights)


def validate(
    task: Task,
    engine: Engine,
    samples: SampleDataset,
    micro_batch: int,
    world: World,
    report_broken: Callable[[Sequence[str]], None],
) -> dict[str, float]:
    """The task's metrics over all samples, with keys such as `val/loss`.

    report_broken: called with the lines about files that could not be read.

    Collective; call it inside `evaluation_mode`.
    """
    counted: Tally = {}
    # Samples of different sizes go one by one: padded to the size of another, a sample would not be quite the same.
    for batch, counts in _equally_many_batches(samples, micro_batch if samples.one_size else 1, world):
        tally = task.tally(engine.forward, batch.to(world.device))
        if counts:
            report_broken(batch.broken)
            _add(counted, tally)
    total: Tally = {}
    for tally in all_gather_objects(world, counted):
        _add(total, tally)
    return {f"val/{key}": value for key, value in task.figures(total).items()}


def _add(total: Tally, tally: Tally) -> None:
    """Add a tally to `total`, key by key: numbers and tensors are summed, lists are joined."""
    for key, value in tally.items():
        total[key] = total[key] + value if key in total else value


def _equally_many_batches(samples: SampleDataset, micro_batch: int, world: World) -> Iterator[tuple[Batch, bool]]:
    """This process's validation batches, and as many fillers as it takes for all processes to have equally many.

    Yields (batch, counts). `counts` is False for a filler, which repeats the last batch and must be left out of the
    metrics. Fillers are needed because under ZeRO-3 each forward pass is a collective, so every process has to make the
    same number of them, but the split rarely divides evenly: 2 processes get 3 and 2 of 5 samples.
    """
    # Rank 0 has the most samples, ceil(samples / processes), because process r takes samples r, r + processes, ...
    most = math.ceil(math.ceil(len(samples) / world.size) / micro_batch)
    done, batch = 0, None
    for batch in validation_loader(
        samples, micro_batch, rank=world.rank, world=world.size, pin=world.device.type == "cuda"
    ):
        done += 1
        yield batch, True
    for _ in range(most - done):
        # With fewer samples than processes, some have no batch to repeat, and take the first sample of the split.
        batch = batch or collate([samples[(0, 0)]])
        yield batch, False
