"""What an engine keeps of a model on each device and on its host, and the most that a step holds at any moment.

Follows `training/engine.py` and DeepSpeed 0.19; the rules were measured on CPU processes (docs/training.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from video_swinv2.config import EngineConfig
from video_swinv2.engine.deepspeed_config import BUCKET, ZERO
from video_swinv2.plan.activations import PassMemory

NUMBER = 4  # bytes: weights, gradients, moments and averages are fp32 in every engine
LIVE = 1_000_000_000  # weights that ZeRO-3 keeps gathered at most (stage3_max_live_parameters)
PREFETCH = 50_000_000  # weights that it gathers in one go (stage3_prefetch_bucket_size)
ALL_REDUCE = 500_000_000  # gradients that ZeRO-0 averages at a time


@dataclass(frozen=True)
class Counts:
    """Numbers, not bytes: all weights, those that are trained, and the trained ones of the largest group."""

    weights: int
    trained: int
    largest_group: int
    largest: int
    """Of the largest parameter."""
    processes: int
    accumulation: int

    def piece(self, numbers: int) -> int:
        """The share of a process."""
        return math.ceil(numbers / self.processes)


def count(sizes: Sequence[Sequence[int]], weights: int, processes: int, accumulation: int) -> Counts:
    """From the sizes of the trained parameters, group by group."""
    groups = [sum(group) for group in sizes]
    largest = max(max(group) for group in sizes)
    return Counts(weights, sum(groups), max(groups), largest, processes, accumulation)


@dataclass(frozen=True)
class States:
    """Bytes of one process, between steps but for gradients, buffers and temporaries, which are those of a step."""

    weights: int
    gradients: int
    optimizer: int
    averages: int
    """The averaged weights of `optim.ema`."""
    buffers: int
    """DeepSpeed's own: buckets of gradients, gathered weights."""
    update: int
    """What AdamW's step works in."""
    host: int
    """Of these, on the host's memory and not on the device: what is offloaded."""


def states_of(engine: EngineConfig, counts: Counts, *, ema: bool, device: str) -> States:
    """What each process keeps. From ZeRO-1 on the optimizer updates its own copy of the weights it owns."""
    whole, trained = counts.weights, counts.trained
    piece = counts.piece(trained)
    stage = engine.zero_stage if engine.engine == "deepspeed" else None
    # A GPU's AdamW is one fused kernel; a CPU's makes a root and a quotient of each tensor it updates.
    temporaries = 0 if device == "cuda" or engine.offload_optimizer != "none" else 2
    if stage is None or stage == 0:
        buffers = 0 if stage is None else min(trained, ALL_REDUCE)
        numbers = [whole, trained, 2 * trained, trained, buffers, temporaries * counts.largest]
    else:
        numbers = [
            whole if stage < 3 else counts.piece(whole),
            # ZeRO-1 cuts gradients up at the end of a step only; until then accumulated ones are whole.
            piece + (trained if stage == 1 and counts.accumulation > 1 else 0),
            3 * piece,
            piece,
            _buffers(engine, counts, device),
            (temporaries + 1) * counts.piece(counts.largest_group),  # one: a group's gradients, end to end
        ]
    numbers[3] *= int(ema)
    weights, gradients, optimizer, averages, buffers, update = (NUMBER * number for number in numbers)
    host = 0
    if engine.offload_optimizer != "none":
        host = optimizer + averages + NUMBER * piece + (weights if engine.offload_parameters != "none" else 0)
    return States(weights, gradients, optimizer, averages, buffers, update, host)


def _buffers(engine: EngineConfig, counts: Counts, device: str) -> int:
    """Numbers in DeepSpeed's buffers at ZeRO 1-3. Of a CPU's bucket only what was written to takes memory."""
    tuned = engine.deepspeed.get(ZERO, {})
    bucket = int(tuned.get("reduce_bucket_size", BUCKET))
    bucket = min(bucket, counts.trained) if device == "cpu" else bucket
    if engine.communication == "bf16":
        bucket += bucket // 2  # a second one, of two bytes a number
    if engine.zero_stage < 3:
        return bucket
    live = min(counts.weights, int(tuned.get("stage3_max_live_parameters", LIVE)))
    return bucket + live + min(counts.weights, int(tuned.get("stage3_prefetch_bucket_size", PREFETCH)))


def moments_of(states: States, passed: PassMemory, engine: EngineConfig, counts: Counts, device: str) -> dict[str, int]:
    """Bytes on the device at the two fullest moments of a step: in the passes, and in the update.

    On a CPU what is offloaded is still this process's.
    """
    offloaded = states.host if device == "cuda" else 0
    kept = states.weights + states.optimizer + states.averages - offloaded
    bucketed = engine.engine == "deepspeed" and engine.zero_stage > 0
    if not bucketed:
        # Gradients of earlier micro-batches are there from the start; without any they grow as activations go.
        passes = passed.activations + states.gradients if counts.accumulation > 1 else passed.together
        return {"passes": kept + passes, "update": kept + states.gradients + max(states.update, states.buffers)}
    if engine.zero_stage < 3 and device == "cpu":
        # A bucket fills as gradients leave the weights, so the memory is the same as if they had stayed; accumulated
        # ones are there besides, and with ZeRO-1 nothing goes into the bucket until the last micro-batch.
        passes = min(passed.together, passed.activations + states.buffers)
        if counts.accumulation > 1:
            passes = (passed.activations if engine.zero_stage == 1 else passes) + states.gradients
    else:
        passes = passed.activations + states.buffers + states.gradients
    resting = states.buffers if engine.zero_stage == 3 else 0  # the others are made anew for every pass
    return {"passes": kept + passes, "update": kept + states.gradients + resting + states.update}
