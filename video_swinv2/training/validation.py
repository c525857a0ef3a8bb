"""Metrics on the whole validation split: every sample counts once, whatever the number of processes."""

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
    """Inside, the module is in eval mode without gradients and, if `averaged`, holds the averaged weights (EMA).

    Yields those weights by name on rank 0 and None elsewhere. Collective, as is everything inside.
    """
    weights = engine.weights()
    shown = engine.averaged_weights() if averaged else weights
    if averaged:
        engine.write_weights(shown)
    engine.module.eval()
    with torch.no_grad():
        yield shown
    # Deliberately not in a `finally`: after an error on this process alone, the others would not take part in the
    # collectives of write_weights, and this process would hang instead of reporting its error.
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
    """The task's metrics (`val/loss` and so on) averaged over all samples. Collective; call in `evaluation_mode`."""
    sums: dict[str, float] = {"samples": 0.0}
    for batch, counts in _equally_many_batches(samples, micro_batch, world):
        tally = task.tally(engine.forward, batch.to(world.device))
        if counts:
            report_broken(batch.broken)
            for key, value in tally.items():
                sums[key] = sums.get(key, 0.0) + value
    return _averages(sums, world)


def _equally_many_batches(samples: SampleDataset, micro_batch: int, world: World) -> Iterator[tuple[Batch, bool]]:
    """This process's batches, each with True; then its last one again with False, until all processes had equally many.

    Under ZeRO-3 each forward pass is a collective, so every process must make the same number of them, although the
    split seldom divides evenly: 5 samples on 2 processes are 3 and 2. Repeated batches are computed but not counted.
    """
    most = math.ceil(math.ceil(len(samples) / world.size) / micro_batch)
    done, batch = 0, None
    for batch in validation_loader(
        samples, micro_batch, rank=world.rank, world=world.size, pin=world.device.type == "cuda"
    ):
        done += 1
        yield batch, True
    for _ in range(most - done):
        # With fewer samples than processes, some processes have no batch of their own to repeat.
        batch = batch or collate([samples[(0, 0)]])
        yield batch, False


def _averages(sums: Mapping[str, float], world: World) -> dict[str, float]:
    # A process without any validation sample knows no key but `samples`; all must reduce the same keys in one order.
    keys = sorted({key for names in all_gather_objects(world, list(sums)) for key in names})
    summed = dict(zip(keys, all_reduce_sum(world, [sums.get(key, 0.0) for key in keys]), strict=True))
    count = summed.pop("samples")
    return {f"val/{key}": value / count for key, value in summed.items()}
