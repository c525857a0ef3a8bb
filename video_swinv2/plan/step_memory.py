"""The memory of a step for each size of its micro-batches, and the largest size that fits into a device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from video_swinv2.config import Config
from video_swinv2.data.loading import BatchPlan
from video_swinv2.memory import free_memory_bytes
from video_swinv2.plan.activation_memory import PassMemory
from video_swinv2.plan.loader_memory import RESIDENT_BYTES, loaders_bytes
from video_swinv2.plan.state_memory import ParameterCounts, StateMemory, count_parameters, state_memory, step_peaks

# Of a device's memory, for a micro-batch that is planned; validation and fragmentation take some more.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class StepPlan:
    """The memory of one process in a step with one division of the batch into micro-batches; see `Plan`."""

    batch: BatchPlan
    counts: ParameterCounts
    states: StateMemory
    passed: PassMemory
    process: int
    moments: dict[str, int]

    @property
    def peak(self) -> int:
        """The most bytes that a device holds at once."""
        return max(self.moments.values()) + self.process


def plan_step(
    config: Config,
    sizes: Sequence[Sequence[int]],
    parameters: int,
    device: str,
    batch: BatchPlan,
    memory_of: Callable[[int], PassMemory],
) -> StepPlan:
    """The memory of a step. sizes, parameters: for `count_parameters`. memory_of: from `micro_batch_memory`."""
    counts = count_parameters(sizes, parameters, batch.world, batch.accumulation)
    states = state_memory(config.engine, counts, ema=config.optim.ema > 0, device=device)
    passed = memory_of(batch.micro)
    moments = step_peaks(states, passed, config.engine, counts, device)
    return StepPlan(batch, counts, states, passed, RESIDENT_BYTES if device == "cpu" else 0, moments)


def divisions(config: Config, whole: BatchPlan) -> list[BatchPlan]:
    """The divisions of the batch to choose from, largest micro-batches first: one if the config gives their size.

    whole: with the largest micro-batches that the config allows.
    """
    if config.optim.micro_batch is not None:
        return [whole]
    repeats = config.augment.repeats
    clips = whole.micro // repeats
    return [dataclasses.replace(whole, micro=repeats * n) for n in range(clips, 0, -1) if clips % n == 0]


def largest_fitting(steps: Iterable[StepPlan], config: Config, memory: int | None) -> StepPlan:
    """The first of the steps that fits into MEMORY_SHARE of `memory` bytes; without a known memory, the first of all.

    If none fits, it is the one that needs least. That need not be the one with the smallest micro-batches, because the
    gradients that are accumulated take memory too.
    """
    seen = []
    for step in steps:
        # On a CPU, the loaders use the same memory.
        loaders = loaders_bytes(config.data, step.batch.micro) if step.process else 0
        if memory is None or step.peak + loaders <= MEMORY_SHARE * memory:
            return step
        seen.append(step)
    return min(seen, key=lambda step: step.peak)


def memory_here(device: str, processes: int) -> int | None:
    """Bytes of a device of type `device` on this machine; None if it has none or its memory is unknown.

    On CPUs it is the free memory, divided by the number of processes.
    """
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    free = free_memory_bytes()
    return None if free is None else free // processes
