"""Faults of a run: full memory and disks, explained in one line; broken files and skipped steps, recorded."""

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

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
MEMORY_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
GIB = 2**30


@contextmanager
def explain_exhaustion(config: Config, world: World) -> Iterator[None]:
    """Turn running out of memory or disk space into a UserError that names the setting to change."""
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
        # torch.OutOfMemoryError exists for GPUs only: a failed allocation on the CPU is a plain RuntimeError, and each
        # library words it differently. Both types are recognised by the same words.
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in MEMORY_WORDS):
            raise
        raise UserError(
            f"out of memory on process {world.rank} ({_describe_memory(world)}): {_memory_advice(config, world)}"
        ) from error


def _describe_memory(world: World) -> str:
    if world.device.type != "cuda":
        return "of the host"
    free, total = torch.cuda.mem_get_info(world.device)
    peak = torch.cuda.max_memory_allocated(world.device)
    return f"tensors held {peak / GIB:.1f} GiB at the peak, {free / GIB:.1f} of {total / GIB:.1f} GiB free"


def _memory_advice(config: Config, world: World) -> str:
    """The setting to change next, the one that costs least first."""
    optim = config.optim
    micro = plan_batch(optim.batch, optim.micro_batch, world.size, config.augment.repeats).micro
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
    """The faults that a run has survived, and its slowest file.

    Each process records its own; `synchronise` merges them, before a checkpoint and after a validation.
    """

    def __init__(self, config: Config, world: World, samples: SampleDataset) -> None:
        self.broken: dict[str, None] = {}
        """Broken files, one line each; a dict because sets do not keep their order."""
        self.broken_samples = 0
        """Training samples of this process that stand in for one from a broken file."""
        self.skipped = self.skipped_in_row = 0
        self.slowest = (0.0, "")
        """Seconds and name of the file that took longest to read."""
        self._config, self._world, self._samples = config, world, samples
        self._folder = Path(config.out)

    def record_batch(self, batch: Batch) -> None:
        """Record the broken files and the slowest file of a training batch."""
        self.broken_samples += len(batch.broken)
        self._report_new(batch.broken, "the next sample takes its place")
        seconds = max(batch.seconds)
        if seconds > self.slowest[0]:
            self.slowest = seconds, self._samples.name(batch.numbers[batch.seconds.index(seconds)])

    def record_unread(self, lines: Sequence[str]) -> None:
        """Record files that could not be read in a validation."""
        self._report_new(lines, "it does not count as a right answer")

    def _report_new(self, lines: Sequence[str], consequence: str) -> None:
        """Print each broken file once per run, also after a resumption."""
        for line in lines:
            if line not in self.broken:
                self.broken[line] = None
                print(f"broken: {line}; {consequence}", flush=True)

    def check_broken_share(self, broken: int, drawn: int) -> None:
        """Raise UserError if more than data.max_broken of the samples drawn by all processes were broken."""
        if broken > self._config.data.max_broken * drawn:
            raise UserError(
                f"{self._folder}: {broken} of {drawn} samples came from broken files, more than data.max_broken="
                f"{self._config.data.max_broken} allows; prepare the data set again (the files are named above)"
            )

    def record_step(self, step: int, skipped: bool, inputs: Sequence[tuple[tuple[int, ...], Tensor]]) -> None:
        """Count a step; for a skipped one, report it and write down its inputs. Collective.

        inputs: sample numbers and loss of each micro-batch of this process. `skipped` must be the same on every
        process: the collective below would otherwise wait forever. Raises UserError after max_skipped in a row.
        """
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0
        if not skipped:
            return
        self.skipped += 1
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
        """Merge the broken files and the slowest file of all processes. Collective."""
        found = all_gather_objects(self._world, (list(self.broken), self.slowest))
        self.broken = dict.fromkeys(sorted({line for lines, _ in found for line in lines}))
        self.slowest = max(slowest for _, slowest in found)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, the same for any number of processes. Collective."""
        self.synchronise()
        (samples,) = all_reduce_sum(self._world, [self.broken_samples])
        counts = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row, "broken_samples": samples}
        return {**counts, "broken": list(self.broken), "slowest": list(self.slowest)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the state in a checkpoint; old checkpoints lack some keys."""
        self.skipped, self.skipped_in_row = state.get("skipped", 0), state.get("skipped_in_row", 0)
        self.broken = dict.fromkeys(state.get("broken", ()))
        self.slowest = tuple(state.get("slowest", self.slowest))
        # The checkpoint holds the sum over all processes, which later reductions must count once: rank 0 takes it all.
        if self._world.rank == 0:
            self.broken_samples = int(state.get("broken_samples", 0))


def write_skipped(folder: Path, step: int, micro_batches: Sequence[tuple[int, float, Sequence[str]]]) -> None:
    """Append a skipped step to `skipped.jsonl`, with (process, loss, files) of each of its micro-batches.

    JSON has no NaN and no infinity, so a loss that is not finite is written as text.
    """
    rows = [
        {"process": rank, "loss": loss if math.isfinite(loss) else str(loss), "files": list(files)}
        for rank, loss, files in micro_batches
    ]
    with (folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "micro_batches": rows}, ensure_ascii=False) + "\n")
