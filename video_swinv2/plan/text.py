"""A plan in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from video_swinv2.plan.plan import Plan

GB = 1e9


def show(plan: Plan, shortfalls: Sequence[str] = (), memory: int | None = None) -> str:
    """The plan for people, what will not fit, and whether it fits `memory` bytes."""
    lines = [*_work(plan), *_rates(plan), *_memory(plan), *_files(plan), *_time(plan)]
    if memory is not None:
        lines.append(f"{'fits' if plan.peak <= memory else 'does not fit'} {memory / GB:.1f} GB")
    return "\n".join([*lines, *(f"problem: {text}" for text in shortfalls)])


def _work(plan: Plan) -> Iterator[str]:
    trained = "" if plan.trained == plan.parameters else f", {plan.trained:,} of them trained"
    yield f"{plan.model}: {plan.parameters:,} parameters{trained}, {plan.giga_macs:.1f} GMAC a sample forward"
    yield f"engine: {plan.engine}; attention by stage: {', '.join(plan.backends)}"
    yield (
        f"batch {plan.batch} = {plan.processes} devices ({plan.device}) x {plan.micro_batch} samples x "
        f"{plan.accumulation} accumulated"
    )
    steps = "unknown; give --samples"
    if plan.steps is not None:
        steps = f"{plan.steps}, {plan.steps_per_epoch:.1f} per epoch of {plan.samples} samples"
    yield f"steps: {steps}"


def _rates(plan: Plan) -> Iterator[str]:
    yield "learning rate at its peak:"
    for layer in plan.layers:
        yield f"  {layer.name:22s}{layer.lr:10.3g}{layer.parameters:16,} parameters, {layer.decayed:,} of them decayed"


def _memory(plan: Plan) -> Iterator[str]:
    states = plan.states
    yield "memory per device, GB, each part at its most:"
    rows = [
        ("weights", states.weights),
        ("gradients", states.gradients),
        ("optimizer", states.optimizer),
        ("averages", states.averages),
        ("buffers", states.buffers),
        ("activations", plan.activations),
        ("update", states.update),
    ]
    for key, value in rows:
        if value:
            yield f"  {key:12s}{value / GB:9.2f}"
    if states.host:
        yield f"  of these on the host {states.host / GB:.2f}"
    at_once = ", ".join(f"in the {key} {value / GB:.2f}" for key, value in plan.moments.items())
    yield f"  at most     {plan.peak / GB:9.2f}  ({at_once})"


def _files(plan: Plan) -> Iterator[str]:
    yield f"a checkpoint: {plan.checkpoint / GB:.2f} GB, as much host memory in the first process while it is written"
    yield f"on disk at most: {plan.files / GB:.2f} GB"


def _time(plan: Plan) -> Iterator[str]:
    pace = plan.pace
    if pace.tflops is None or pace.step_seconds is None:
        yield "time: unknown; give --tflops (video-swinv2 bench train measures what a device reaches)"
    else:
        yield f"a step: {pace.step_seconds:.3g} s at {pace.tflops:.3g} TFLOP/s a device"
        if pace.hours is not None:
            hours = f"{pace.hours:.3g} h, {pace.hours * plan.processes:.3g} device hours"
            yield f"training: {hours}; validation comes on top"
        yield f"to be read: {pace.samples_per_second:.3g} samples/s for each device"
    if pace.read is not None:
        needed = "" if pace.workers_needed is None else f", so {pace.workers_needed} workers are needed"
        rate = f"{pace.read.per_second:.3g} samples/s ({pace.read.read})"
        yield f"one core here reads {rate}; data.workers is {pace.workers}{needed}"
