"""What an engine keeps of a model on each device and on its host, and the most that a step holds at any moment.

Follows the engines of `engine/` and DeepSpeed 0.19. The rules were checked against the peak memory of CPU processes
(docs/results/memory.md; tests/plan/test_plan.py repeats the measurement).
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
# DeepSpeed's defaults, in elements.
ZERO3_LIVE_PARAMETERS = 1_000_000_000  # most weights that ZeRO-3 keeps gathered (stage3_max_live_parameters)
ZERO3_PREFETCH = 50_000_000  # weights that it gathers in one go (stage3_prefetch_bucket_size)
ZERO0_ALL_REDUCE = 500_000_000  # gradients that ZeRO-0 averages in one go


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of elements, not bytes, and how the step divides them."""

    weights: int
    trained: int
    largest_group: int
    """Trained elements of the largest optimizer group."""
    largest: int
    """Elements of the largest trained parameter."""
    processes: int
    accumulation: int

    def partition(self, elements: int) -> int:
        """The share of one process under ZeRO."""
        return math.ceil(elements / self.processes)


def count_parameters(
    sizes: Sequence[Sequence[int]], weights: int, processes: int, accumulation: int
) -> ParameterCounts:
    """From the sizes of the trained parameters, optimizer group by group; `weights` includes frozen ones."""
    groups = [sum(group) for group in sizes]
    largest = max(max(group) for group in sizes)
    return ParameterCounts(weights, sum(groups), max(groups), largest, processes, accumulation)


@dataclass(frozen=True)
class StateMemory:
    """Bytes of one process. Gradients, buffers and the update exist during a step only, the others all the time."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    """The averaged weights of `optim.ema`."""
    buffers: int
    """DeepSpeed's own: buckets of gradients, gathered weights."""
    update: int
    """Temporaries of AdamW's step."""
    host: int
    """How many of these bytes are offloaded: in the host's memory, not the device's."""


def state_memory(engine: EngineConfig, counts: ParameterCounts, *, ema: bool, device: str) -> StateMemory:
    """What each process keeps. From ZeRO-1 on the optimizer updates its own copy of the weights it owns."""
    whole, trained = counts.weights, counts.trained
    partition = counts.partition(trained)
    stage = engine.zero_stage if engine.engine == "deepspeed" else None
    # On GPUs AdamW is one fused kernel. On CPUs it makes two temporaries for each tensor: the root of the second
    # moment, and the quotient.
    temporaries = 0 if device == "cuda" or engine.offload_optimizer != "none" else 2
    if stage is None or stage == 0:
        buffers = 0 if stage is None else min(trained, ZERO0_ALL_REDUCE)
        elements = [whole, trained, 2 * trained, trained, buffers, temporaries * counts.largest]
    else:
        elements = [
            # weights
            whole if stage < 3 else counts.partition(whole),
            # gradients: ZeRO-1 partitions them at the end of a step only, so while micro-batches are accumulated the
            # whole gradients exist too
            partition + (trained if stage == 1 and counts.accumulation > 1 else 0),
            # optimizer: the process's own copy of its weights, and two moments
            3 * partition,
            # averages
            partition,
            # buffers
            _buffer_elements(engine, counts, device),
            # update: the temporaries, and the gradients of a group copied end to end
            (temporaries + 1) * counts.partition(counts.largest_group),
        ]
    elements[3] *= int(ema)
    weights, gradients, optimizer, averages, buffers, update = (FP32_BYTES * number for number in elements)
    host = 0
    if engine.offload_optimizer != "none":
        host = optimizer + averages + FP32_BYTES * partition + (weights if engine.offload_parameters != "none" else 0)
    return StateMemory(weights, gradients, optimizer, averages, buffers, update, host)


def _buffer_elements(engine: EngineConfig, counts: ParameterCounts, device: str) -> int:
    """Elements in DeepSpeed's buffers at ZeRO 1-3."""
    tuned = engine.deepspeed.get(ZERO, {})
    bucket = int(tuned.get("reduce_bucket_size", BUCKET_ELEMENTS))
    # Host memory is taken page by page when it is first written to; GPU memory is taken as a whole.
    bucket = min(bucket, counts.trained) if device == "cpu" else bucket
    if engine.communication == "bf16":
        bucket += bucket // 2  # a second bucket, at two bytes an element
    if engine.zero_stage < 3:
        return bucket
    live = min(counts.weights, int(tuned.get("stage3_max_live_parameters", ZERO3_LIVE_PARAMETERS)))
    return bucket + live + min(counts.weights, int(tuned.get("stage3_prefetch_bucket_size", ZERO3_PREFETCH)))


def step_peaks(
    states: StateMemory, passed: PassMemory, engine: EngineConfig, counts: ParameterCounts, device: str
) -> dict[str, int]:
    """Bytes on the device at the two peaks of a step: during forward and backward (`passes`), and in the `update`.

    On a CPU nothing is saved by offloading: the host's memory is the device's.
    """
    offloaded = states.host if device == "cuda" else 0
    always = states.weights + states.optimizer + states.averages - offloaded
    bucketed = engine.engine == "deepspeed" and engine.zero_stage > 0
    if not bucketed:
        # With accumulation the gradients of earlier micro-batches exist from the start of the pass; without it they
        # grow while activations are freed.
        passes = passed.activations + states.gradients if counts.accumulation > 1 else passed.together
        return {"passes": always + passes, "update": always + states.gradients + max(states.update, states.buffers)}
    if engine.zero_stage < 3 and device == "cpu":
        # The bucket fills as gradients leave the weights, so the memory is the same as if they had stayed, but never
        # more than the whole bucket. Accumulated gradients come on top; with ZeRO-1 nothing enters the bucket before
        # the last micro-batch.
        passes = min(passed.together, passed.activations + states.buffers)
        if counts.accumulation > 1:
            passes = (passed.activations if engine.zero_stage == 1 else passes) + states.gradients
    else:
        passes = passed.activations + states.buffers + states.gradients
    lasting_buffers = states.buffers if engine.zero_stage == 3 else 0  # ZeRO-1 and 2 allocate theirs for every pass
    return {"passes": always + passes, "update": always + states.gradients + lasting_buffers + states.update}
