"""What can go wrong during a run: exhausted memory and disks, broken files, and steps that were skipped.

Running out of memory or disk space ends the run with one line that names the setting to change. Broken files and
skipped steps are survived and recorded; only too many of them end the run.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from video_swinv2.config import Config
from video_swinv2.data.datasets import Batch, SampleDataset
from video_swinv2.data.loading import plan_batch
from video_swinv2.distributed.collectives import all_gather_objects, all_reduce_sum, print_on_rank_zero
from video_swinv2.distributed.world import World
from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal

# Disk full, quota exceeded, file too large, read-only file system, and a failing disk.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# How PyTorch's CPU allocator (the first two), PyTorch on GPUs and C++ word a failed allocation.
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
GIB = 2**30


@contextmanager
def explain_exhaustion(config: Config, world: World) -> Iterator[None]:
    """Inside, running out of memory or disk space raises a UserError that names the setting to change."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise UserError(
            f"{config.out}: cannot be written ({error.strerror}); free space, or move the folder, and start again: "
            "training resumes from its newest checkpoint"
        ) from error
    except (MemoryError, RuntimeError) as error:
        # PyTorch raises torch.OutOfMemoryError, a RuntimeError, for GPUs only. A failed allocation on the CPU is a
        # plain RuntimeError, and every library words it differently, so the message decides.
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in MEMORY_WORDS):
            raise
        raise UserError(
            f"out of memory on process {world.rank} ({_describe_memory(world)}): {_memory_advice(config, world)}"
        ) from error


def _describe_memory(world: World) -> str:
    """Whose memory is exhausted; for a GPU also how much its tensors held and how much is free."""
    if world.device.type != "cuda":
        return "of the host"
    free, total = torch.cuda.mem_get_info(world.device)
    peak = torch.cuda.max_memory_allocated(world.device)
    return f"tensors held {peak / GIB:.1f} GiB at the peak, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _memory_advice(config: Config, world: World) -> str:
    """The next setting to change, cheapest first: smaller micro-batches, then recomputation or more partitioning."""
    optim = config.optim
    # What the run really uses: the largest size up to optim.micro_batch that divides a process's share of the batch.
    micro = plan_batch(optim.batch, optim.micro_batch, world.size, config.augment.repeats).micro
    # All repeats of a clip have to fit into one micro-batch, so it cannot be smaller than augment.repeats.
    if micro > config.augment.repeats:
        smaller = max(micro // 2, config.augment.repeats)
        return (
            f"lower optim.micro_batch from {micro} to {smaller}; the batch stays {config.optim.batch}, "
            "in more micro-batches"
        )
    if config.engine.engine == "deepspeed" and config.engine.zero_stage < 3:
        return (
            "optim.micro_batch is at its minimum; raise model.checkpoint_blocks "
            f"({config.model.checkpoint_blocks}), or engine.zero_stage ({config.engine.zero_stage}) with more processes"
        )
    return f"optim.micro_batch is at its minimum; raise model.checkpoint_blocks ({config.model.checkpoint_blocks})"


class Faults:
    """The faults that a run has survived so far, and the file that was slowest to read.

    Each process records the faults of its own samples. `synchronise` merges them, which happens before each checkpoint
    and after each validation. Checkpoints contain the merged state, so a resumed run continues the counts.
    """

    def __init__(self, config: Config, world: World, samples: SampleDataset) -> None:
        self.broken: dict[str, None] = {}
        """One line for each broken file. The keys of a dict are an ordered set; the values mean nothing."""
        self.broken_samples = 0
        """How often a broken file was replaced in this process; a sample that needs two replacements counts twice."""
        self.skipped = self.skipped_in_row = 0
        """Skipped steps of the whole run, and how many of the latest steps were skipped in a row."""
        self.slowest = (0.0, "")
        """The longest time in seconds that it took to read a training sample, and the file it came from."""
        self._config, self._world, self._samples = config, world, samples
        self._folder = Path(config.out)

    def record_batch(self, batch: Batch) -> None:
        """Record the broken files and the slowest file of a training batch."""
        self.broken_samples += len(batch.broken)
        self._report_new(batch.broken, "the next sample takes its place")
        # Only the slowest sample of a batch can set a new record, so only its name is looked up.
        seconds = max(batch.seconds)
        if seconds > self.slowest[0]:
            self.slowest = seconds, self._samples.name(batch.numbers[batch.seconds.index(seconds)])

    def record_unread(self, lines: Sequence[str]) -> None:
        """Record the validation files that could not be read, one line each."""
        # Labelled samples are not replaced (`SampleDataset`); those of SimMIM, which have mask cells, are.
        replaced = self._samples.cells is not None
        self._report_new(
            lines, "the next sample takes its place" if replaced else "it does not count as a right answer"
        )

    def _report_new(self, lines: Sequence[str], consequence: str) -> None:
        """Print the broken files that this process does not know yet, and what happens to their samples.

        Known files include those that earlier parts of a resumed run reported, and those merged from other processes.
        """
        for line in lines:
            if line not in self.broken:
                self.broken[line] = None
                print(for_terminal(f"broken: {line}; {consequence}"), flush=True)

    def check_broken_share(self, broken: int, drawn: int) -> None:
        """Raise UserError if the share of broken samples exceeds data.max_broken.

        broken, drawn: sums over all processes, so that either all of them raise or none does.
        """
        if broken > self._config.data.max_broken * drawn:
            raise UserError(
                f"{self._folder}: {broken} of {drawn} samples came from broken files, more than data.max_broken="
                f"{self._config.data.max_broken} allows; prepare the data set again (the files are named above)"
            )

    def record_step(self, step: int, skipped: bool, inputs: Sequence[tuple[tuple[int, ...], Tensor]]) -> None:
        """Count a finished step. If it was skipped, report it and append its inputs to skipped.jsonl.

        inputs: the sample numbers and the loss of each micro-batch of this process.

        Collective if the step was skipped, so `skipped` must be the same on every process: otherwise those that
        gather would wait forever. Raises UserError after max_skipped skipped steps in a row.
        """
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        if not skipped:
            return
        self.skipped += 1
        # float() waits for the GPU, which is acceptable here because skipped steps are rare.
        mine = [
            (self._world.rank, float(loss), [self._samples.name(number) for number in numbers])
            for numbers, loss in inputs
        ]
        micro_batches = [item for theirs in all_gather_objects(self._world, mine) for item in theirs]
        if self._world.rank == 0:
            write_skipped(self._folder, step, micro_batches)
        print_on_rank_zero(
            self._world, f"step {step} skipped: loss or gradient not finite; skipped.jsonl lists its inputs"
        )
        if self.skipped_in_row >= self._config.max_skipped:
            raise UserError(
                f"{self._folder}: loss or gradient was not finite in {self.skipped_in_row} steps in a row, the last is "
                f"step {step}; the weights are those from before, skipped.jsonl lists the inputs: remove these files, "
                "lower optim.lr, or use engine.precision=fp32"
            )

    def synchronise(self) -> None:
        """Give every process the broken files and the slowest file of all processes. Collective."""
        found = all_gather_objects(self._world, (list(self.broken), self.slowest))
        # Sorted, so that the order does not depend on which process met a file first.
        self.broken = dict.fromkeys(sorted({line for lines, _ in found for line in lines}))
        self.slowest = max(slowest for _, slowest in found)

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores: totals over all processes, so that any number of them can resume. Collective."""
        self.synchronise()
        (samples,) = all_reduce_sum(self._world, [self.broken_samples])
        counts = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row, "broken_samples": samples}
        return {**counts, "broken": list(self.broken), "slowest": list(self.slowest)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of a checkpoint. Checkpoints of older versions lack some of its keys."""
        self.skipped, self.skipped_in_row = state.get("skipped", 0), state.get("skipped_in_row", 0)
        self.broken = dict.fromkeys(state.get("broken", ()))
        self.slowest = tuple(state.get("slowest", self.slowest))
        # The checkpoint stores the sum over all processes. If each process restored it, the next sum would count it
        # once per process, so rank 0 takes all of it and the others start from 0.
        if self._world.rank == 0:
            self.broken_samples = int(state.get("broken_samples", 0))


def write_skipped(folder: Path, step: int, micro_batches: Sequence[tuple[int, float, Sequence[str]]]) -> None:
    """Append one line for a skipped step to the run folder's `skipped.jsonl`.

    micro_batches: the process, the loss and the files of each micro-batch of the step. JSON has neither NaN nor
    infinity, so a loss that is not finite is written as text ("nan", "inf").
    """
    rows = [
        {"process": rank, "loss": loss if math.isfinite(loss) else str(loss), "files": list(files)}
        for rank, loss, files in micro_batches
    ]
    with (folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "micro_batches": rows}, ensure_ascii=False, allow_nan=False) + "\n")
