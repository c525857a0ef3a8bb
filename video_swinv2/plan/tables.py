"""The text that `plan` prints: lines of facts, and tables of learning rates and memory."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from video_swinv2.escaping import for_terminal
from video_swinv2.plan.plan import Plan
from video_swinv2.progress import duration_text

GB = 1e9  # bytes
WIDTH = 120  # columns, on terminals and in files alike, so that the plans of two machines can be compared


def plan_text(plan: Plan, shortfalls: Sequence[str] = (), memory: int | None = None) -> str:
    """The plan as text, whether it fits into `memory` bytes (unless None), and the lines of `shortfalls`."""
    lines = [*_work(plan), "", _rate_table(plan), "", _memory_table(plan), *_memory_notes(plan), ""]
    lines += [*_files(plan), *_time(plan)]
    if memory is not None:
        lines.append(f"{'fits' if plan.peak <= memory else 'does not fit'} into {memory / GB:.1f} GB")
    return "\n".join([*lines, *(for_terminal(f"problem: {text}") for text in shortfalls)])


def _work(plan: Plan) -> Iterator[str]:
    trained = "" if plan.trained == plan.parameters else f", {plan.trained:,} of them trained"
    yield f"{plan.model}: {plan.parameters:,} parameters{trained}, {plan.giga_macs:.1f} GMAC per sample forward"
    yield f"engine: {plan.engine}; attention by stage: {', '.join(plan.backends)}"
    if plan.device == "cpu":
        yield "planned for the CPU; engine.device=cuda plans for GPUs, whether or not there is one here"
    yield (
        f"batch: {plan.batch} = {plan.processes} devices ({plan.device}) x {plan.micro_batch} samples x "
        f"{plan.accumulation} accumulated"
    )
    steps = "unknown; give --samples"
    if plan.steps is not None:
        steps = f"{plan.steps}, {plan.steps_per_epoch:.1f} per epoch of {plan.samples} samples"
    yield f"steps: {steps}"


def _rate_table(plan: Plan) -> str:
    rows = [(group.name, f"{group.lr:.3g}", f"{group.parameters:,}", f"{group.decayed:,}") for group in plan.layers]
    return _table(("learning rates", "peak", "parameters", "with weight decay"), rows)


def _memory_table(plan: Plan) -> str:
    """The parts of the memory that are not zero."""
    states = plan.states
    parts = [
        ("weights", states.weights),
        ("gradients", states.gradients),
        ("optimizer", states.optimizer),
        ("averages", states.averages),
        ("buffers", states.buffers),
        ("activations", plan.activations),
        ("process", plan.process),
        ("update", states.update),
    ]
    rows = [(name, f"{value / GB:.2f}") for name, value in parts if value]
    return _table(("memory per device", "GB at the peak"), rows)


def _memory_notes(plan: Plan) -> Iterator[str]:
    if plan.states.host:
        yield f"{plan.states.host / GB:.2f} GB of these are offloaded to the host"
    # The peak is below the sum of the table wherever some parts are freed before others are allocated.
    peaks = ", ".join(f"{(value + plan.process) / GB:.2f} GB in the {key}" for key, value in plan.moments.items())
    yield f"peak: {plan.peak / GB:.2f} GB ({peaks}; not all parts are at their peak at once)"


def _files(plan: Plan) -> Iterator[str]:
    host = f"{plan.checkpoint_host / GB:.2f} GB of host memory on the first process while it is written"
    yield f"a checkpoint: {plan.checkpoint / GB:.2f} GB, and {host}"
    yield f"loading: up to {plan.loader / GB:.2f} GB of shared memory (/dev/shm) per process"
    yield f"on disk at the peak: {plan.files / GB:.2f} GB"


def _time(plan: Plan) -> Iterator[str]:
    pace = plan.pace
    if pace.tflops is None or pace.step_seconds is None:
        yield "time: unknown; give --tflops (video-swinv2 bench train measures what a device reaches)"
    else:
        yield f"a step: {duration_text(pace.step_seconds)} at {pace.tflops:.3g} TFLOP/s per device"
        if pace.hours is not None:
            seconds = 3600 * pace.hours
            total = f", {duration_text(seconds * plan.processes)} of device time" if plan.processes > 1 else ""
            yield f"training: {duration_text(seconds)}{total}; validation comes on top"
        yield f"data: each device needs {pace.samples_per_second:.3g} samples/s"
    if pace.read is not None:
        needed = "" if pace.workers_needed is None else f", so {pace.workers_needed} workers are needed"
        rate = f"{pace.read.per_second:.3g} samples/s ({pace.read.read})"
        yield f"one core here reads {rate}; data.workers is {pace.workers}{needed}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table without lines and colours; the first column is left-aligned, the numbers are right-aligned."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    # Printed into a buffer of fixed width, because rich would otherwise fit the table to the terminal. Cells are
    # padded, so trailing spaces are removed.
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").splitlines())
