"""Measures of a model on the whole validation split: every sample once, whatever the number of processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from video_swinv2.data.datasets import Batch, SampleDataset, collate
from video_swinv2.data.loading import validation_loader
from video_swinv2.distributed.world import World, gather, total
from video_swinv2.engine.deepspeed import Engine
from video_swinv2.training.tasks import Task


@contextmanager
def ready(engine: Engine, averaged: bool) -> Iterator[dict[str, Tensor] | None]:
    """Inside, the module is in eval mode, without gradients, and holds averaged weights where they are kept.

    Gives those weights by name on rank 0, None elsewhere. Collective, as is everything inside.
    """
    weights = engine.weights()
    shown = engine.averaged_weights() if averaged else weights
    if averaged:
        engine.write_weights(shown)
    engine.module.eval()
    with torch.no_grad():
        yield shown
    # Not after an error: other processes would not take part, and this one would wait for them instead of telling.
    engine.module.train()
    if averaged:
        engine.write_weights(weights)


def measure(
    task: Task,
    engine: Engine,
    samples: SampleDataset,
    micro_batch: int,
    world: World,
    name_broken: Callable[[Sequence[str]], None],
) -> dict[str, float]:
    """The task's measures, `val/loss` and the like, averaged over the samples. Collective; inside `ready`."""
    sums: dict[str, float] = {"samples": 0.0}
    for batch, counts in _batches(samples, micro_batch, world):
        tally = task.tally(engine.forward, batch.to(world.device))
        if counts:
            name_broken(batch.broken)
            for key, value in tally.items():
                sums[key] = sums.get(key, 0.0) + value
    return _averages(sums, world)


def _batches(samples: SampleDataset, micro_batch: int, world: World) -> Iterator[tuple[Batch, bool]]:
    """This process's batches; then its last again, not to be counted, until every process has had as many.

    Under ZeRO-3 each forward pass is a collective, so all processes must do the same number of them.
    """
    most = math.ceil(math.ceil(len(samples) / world.size) / micro_batch)
    done, batch = 0, None
    for batch in validation_loader(
        samples, micro_batch, rank=world.rank, world=world.size, pin=world.device.type == "cuda"
    ):
        done += 1
        yield batch, True
    for _ in range(most - done):
        batch = batch or collate([samples[(0, 0)]])
        yield batch, False


def _averages(sums: Mapping[str, float], world: World) -> dict[str, float]:
    # A process that got no validation sample knows only of the count.
    keys = sorted({key for names in gather(world, list(sums)) for key in names})
    summed = dict(zip(keys, total(world, [sums.get(key, 0.0) for key in keys]), strict=True))
    count = summed.pop("samples")
    return {f"val/{key}": value / count for key, value in summed.items()}
