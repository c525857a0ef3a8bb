"""The memory of weights, gradients, optimizer and buffers in each process, and the peak memory of a step.

The rules follow the engines of `engine/` and DeepSpeed 0.19; docs/results/memory.md has them as a table. They were
checked against the peak memory of CPU processes, which tests/plan/test_plan.py measures again.

ZeRO-1 partitions the optimizer states among the processes, ZeRO-2 also the gradients, ZeRO-3 also the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from video_swinv2.config import EngineConfig
from video_swinv2.config.deepspeed_keys import ZERO
from video_swinv2.engine.deepspeed_config import BUCKET_ELEMENTS
from video_swinv2.plan.activation_memory import PassMemory

FP32_BYTES = 4  # weights, gradients, moments and averages are fp32 in every engine
# Defaults of DeepSpeed, in elements.
ZERO3_LIVE_PARAMETERS = 1_000_000_000  # limit of gathered weights in ZeRO-3 (stage3_max_live_parameters)
ZERO3_PREFETCH = 50_000_000  # weights gathered ahead of their use (stage3_prefetch_bucket_size)
ZERO0_ALL_REDUCE = 500_000_000  # gradients that ZeRO-0 reduces at once


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameter elements, not bytes, and how a step divides them."""

    weights: int
    """All parameters, frozen ones included."""
    trained: int
    largest_group: int
    """Trained elements of the largest optimizer group."""
    largest: int
    """Elements of the largest trained parameter."""
    processes: int
    accumulation: int
    """Micro-batches per step."""

    def partition(self, elements: int) -> int:
        """How many of `elements` one process holds under ZeRO, which pads them to equal shares."""
        return math.ceil(elements / self.processes)


def count_parameters(
    sizes: Sequence[Sequence[int]], weights: int, processes: int, accumulation: int
) -> ParameterCounts:
    """sizes: of the trained parameters of each optimizer group. weights: all parameters, frozen ones included."""
    groups = [sum(group) for group in sizes]
    largest = max(max(group) for group in sizes)
    return ParameterCounts(weights, sum(groups), max(groups), largest, processes, accumulation)


@dataclass(frozen=True)
class StateMemory:
    """Bytes of one process. Gradients, buffers and update exist only during a step, the others all the time."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's moments, and from ZeRO-1 on the copy of the weights that the optimizer updates."""
    averages: int
    """The averaged weights of `optim.ema`."""
    buffers: int
    """DeepSpeed's own buffers: buckets of gradients, and weights that are gathered."""
    update: int
    """Temporaries of AdamW's step."""
    host: int
    """How many of all these bytes are offloaded, that is, in host memory and not on the device."""


def state_memory(engine: EngineConfig, counts: ParameterCounts, *, ema: bool, device: str) -> StateMemory:
    """The memory of one process on a device of type `device`; `ema` says whether averaged weights are kept.

    From ZeRO-1 on, each process updates a copy of the weights in its partition.
    """
    whole, trained = counts.weights, counts.trained
    partition = counts.partition(trained)
    stage = engine.zero_stage if engine.engine == "deepspeed" else None
    # On GPUs, and on the host with offloading, AdamW is a fused kernel. Otherwise it makes two temporaries the size of
    # the tensor that it updates: the root of the second moment, and the quotient of the moments.
    temporaries = 0 if device == "cuda" or engine.offload_optimizer != "none" else 2
    if stage is None or stage == 0:
        buffers = 0 if stage is None else min(trained, ZERO0_ALL_REDUCE)
        # Plain and ZeRO-0: nothing is partitioned, and AdamW updates the weights themselves, one tensor at a time.
        elements = [whole, trained, 2 * trained, trained, buffers, temporaries * counts.largest]
    else:
        elements = [
            # weights
            whole if stage < 3 else counts.partition(whole),
            # gradients: ZeRO-1 partitions them only at the end of a step, so while micro-batches are accumulated the
            # whole gradients exist as well
            partition + (trained if stage == 1 and counts.accumulation > 1 else 0),
            # optimizer: the copy of the weights of the partition, and two moments
            3 * partition,
            # averages
            partition,
            # buffers
            _buffer_elements(engine, counts, device),
            # update: the temporaries, and the gradients of a group copied into one flat tensor
            (temporaries + 1) * counts.partition(counts.largest_group),
        ]
    elements[3] *= int(ema)  # averages
    weights, gradients, optimizer, averages, buffers, update = (FP32_BYTES * number for number in elements)
    host = 0
    if engine.offload_optimizer != "none":
        # The gradients of the partition move to the host too, where the optimizer runs.
        host = optimizer + averages + FP32_BYTES * partition + (weights if engine.offload_parameters != "none" else 0)
    return StateMemory(weights, gradients, optimizer, averages, buffers, update, host)


def _buffer_elements(engine: EngineConfig, counts: ParameterCounts, device: str) -> int:
    """Elements in DeepSpeed's buffers at ZeRO 1-3, with the sizes that `engine.deepspeed` may set."""
    tuned = engine.deepspeed.get(ZERO, {})
    bucket = int(tuned.get("reduce_bucket_size", BUCKET_ELEMENTS))
    # A bucket larger than the gradients is never filled. On a CPU memory is taken page by page, when it is first
    # written to, so the rest of the bucket takes none; on a GPU the whole bucket is allocated.
    bucket = min(bucket, counts.trained) if device == "cpu" else bucket
    if engine.communication == "bf16":
        bucket += bucket // 2  # a second bucket of 2 bytes per element, half as many fp32 elements
    if engine.zero_stage < 3:
        return bucket
    live = min(counts.weights, int(tuned.get("stage3_max_live_parameters", ZERO3_LIVE_PARAMETERS)))
    return bucket + live + min(counts.weights, int(tuned.get("stage3_prefetch_bucket_size", ZERO3_PREFETCH)))


def gathering_memory(engine: EngineConfig, counts: ParameterCounts) -> int:
    """Host memory of the first process that gathering a checkpoint takes beyond the checkpoint itself, in bytes.

    Where the moments are partitioned, one moment of one optimizer group is held twice for a moment: as the partitions
    of all processes, and cut into parameters.
    """
    partitioned = engine.engine == "deepspeed" and engine.zero_stage > 0
    return FP32_BYTES * counts.largest_group if partitioned else 0


def step_peaks(
    states: StateMemory, passed: PassMemory, engine: EngineConfig, counts: ParameterCounts, device: str
) -> dict[str, int]:
    """Bytes on the device at the two peaks of a step: in the forward and backward `passes`, and in the `update`.

    On a CPU offloading saves nothing, because host memory is the device's memory.
    """
    offloaded = states.host if device == "cuda" else 0
    always = states.weights + states.optimizer + states.averages - offloaded
    bucketed = engine.engine == "deepspeed" and engine.zero_stage > 0
    if not bucketed:
        # With accumulation the gradients of earlier micro-batches exist throughout the pass. Without it they appear
        # while activations are freed, so both are never complete at once.
        passes = passed.activations + states.gradients if counts.accumulation > 1 else passed.together
        return {"passes": always + passes, "update": always + states.gradients + max(states.update, states.buffers)}
    if engine.zero_stage < 3 and device == "cpu":
        # Gradients move from the weights into the bucket, whose pages are taken as it fills. So the memory is the same
        # as if they had stayed, but never more than with a full bucket. Accumulated gradients are additional. With
        # ZeRO-1 nothing enters the bucket before the last micro-batch.
        passes = min(passed.together, passed.activations + states.buffers)
        if counts.accumulation > 1:
            passes = (passed.activations if engine.zero_stage == 1 else passes) + states.gradients
    else:
        passes = passed.activations + states.buffers + states.gradients
    lasting_buffers = states.buffers if engine.zero_stage == 3 else 0  # ZeRO-1 and 2 allocate theirs for each pass
    return {"passes": always + passes, "update": always + states.gradients + lasting_buffers + states.update}
