"""Validation: the task's metrics over the whole validation split.

Every sample counts exactly once, so the metrics do not depend on the number of processes or on the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from video_swinv2.data.datasets import Batch, SampleDataset, collate
from video_swinv2.data.loading import validation_loader
from video_swinv2.distributed.collectives import all_gather_objects, all_reduce_sum
from video_swinv2.distributed.world import World
from video_swinv2.engine.base import Engine
from video_swinv2.training.tasks.base import Task


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
    """The task's metrics averaged over all samples, with keys such as `val/loss`.

    report_broken: called with the lines about files that could not be read.

    Collective; call it inside `evaluation_mode`.
    """
    sums: dict[str, float] = {"samples": 0.0}
    for batch, counts in _equally_many_batches(samples, micro_batch, world):
        tally = task.tally(engine.forward, batch.to(world.device))
        if counts:
            report_broken(batch.broken)
            for key, value in tally.items():
                sums[key] = sums.get(key, 0.0) + value
    return _averages(sums, world)


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


def _averages(sums: Mapping[str, float], world: World) -> dict[str, float]:
    """The sums over all processes divided by the number of samples, as metrics."""
    # A process without any sample of its own knows no key but `samples`, although all processes must reduce the same
    # keys in the same order. So they first agree on the keys.
    keys = sorted({key for names in all_gather_objects(world, list(sums)) for key in names})
    summed = dict(zip(keys, all_reduce_sum(world, [sums.get(key, 0.0) for key in keys]), strict=True))
    count = summed.pop("samples")
    return {f"val/{key}": value / count for key, value in summed.items()}
