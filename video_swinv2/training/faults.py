"""What goes wrong on a machine, said as one line that names the knob; and the record of steps that were dropped."""

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

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")
GIB = 2**30


@contextmanager
def explained(config: Config, world: World) -> Iterator[None]:
    """Turns exhausted memory and a disk that refuses into a UserError with its mend."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        raise UserError(
            f"{config.out}: cannot be written ({error.strerror}); free space, or move the folder and start again: "
            "training resumes from its newest checkpoint"
        ) from error
    except (
        MemoryError,
        RuntimeError,
    ) as error:  # torch's of the CPU has no type of its own
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in NO_MEMORY):
            raise
        raise UserError(f"out of memory on process {world.rank} ({_memory(world)}): {_knobs(config, world)}") from error


def _memory(world: World) -> str:
    if world.device.type != "cuda":
        return "of the host"
    free, whole = torch.cuda.mem_get_info(world.device)
    held = torch.cuda.max_memory_allocated(world.device)
    return f"{held / GIB:.1f} GiB held at most by tensors, {free / GIB:.1f} of {whole / GIB:.1f} GiB free"


def _knobs(config: Config, world: World) -> str:
    optim = config.optim
    micro = plan_batch(optim.batch, optim.micro_batch, world.size, config.augment.repeats).micro
    if micro > config.augment.repeats:
        less = max(micro // 2, config.augment.repeats)
        return f"lower optim.micro_batch from {micro} to {less}; the batch stays {config.optim.batch}, in more pieces"
    if config.engine.engine == "deepspeed" and config.engine.zero_stage < 3:
        return (
            f"optim.micro_batch is at its least; raise model.checkpoint_blocks ({config.model.checkpoint_blocks}), or "
            f"engine.zero_stage ({config.engine.zero_stage}) with more processes"
        )
    return f"optim.micro_batch is at its least; raise model.checkpoint_blocks ({config.model.checkpoint_blocks})"


class Faults:
    """What went wrong in a run and was survived: broken files, dropped steps; and the file that was slowest to read."""

    def __init__(self, config: Config, world: World, samples: SampleDataset) -> None:
        self.broken: dict[str, None] = {}  # a set that keeps its order
        self.broken_samples = 0
        """Training samples of this process that a broken file was replaced in."""
        self.skipped = self.skipped_in_row = 0
        self.slowest = (0.0, "")
        """Seconds and file."""
        self._config, self._world, self._samples = config, world, samples
        self._folder = Path(config.out)

    def note(self, batch: Batch) -> None:
        """What a training batch tells of the files it was read from."""
        self.broken_samples += len(batch.broken)
        self._name(batch.broken, "the next sample takes its place")
        seconds = max(batch.seconds)
        if seconds > self.slowest[0]:
            self.slowest = seconds, self._samples.name(batch.numbers[batch.seconds.index(seconds)])

    def name_unread(self, lines: Sequence[str]) -> None:
        """Broken files among those of a validation."""
        self._name(lines, "it does not count as a right answer")

    def _name(self, lines: Sequence[str], consequence: str) -> None:
        for line in lines:
            if line not in self.broken:
                self.broken[line] = None
                print(f"broken: {line}; {consequence}", flush=True)

    def check_broken(self, broken: int, drawn: int) -> None:
        """UserError if more of the samples drawn, in all processes, came from broken files than data.max_broken."""
        if broken > self._config.data.max_broken * drawn:
            raise UserError(
                f"{self._folder}: {broken} of {drawn} samples came from broken files, more than data.max_broken="
                f"{self._config.data.max_broken} allows; prepare the data set again (the files are named above)"
            )

    def count_step(self, step: int, dropped: bool, inputs: Sequence[tuple[tuple[int, ...], Tensor]]) -> None:
        """Count a step; one that was dropped is said, its inputs (numbers and loss of each micro-batch) written down.

        UserError after optim.max_skipped in a row. Collective.
        """
        self.skipped_in_row = self.skipped_in_row + 1 if dropped else 0
        if not dropped:
            return
        self.skipped += 1
        mine = [
            (self._world.rank, float(loss), [self._samples.name(number) for number in numbers])
            for numbers, loss in inputs
        ]
        pieces = [piece for found in all_gather_objects(self._world, mine) for piece in found]
        if self._world.rank == 0:
            write_skipped(self._folder, step, pieces)
        print_on_rank_zero(self._world, f"step {step} dropped: loss or gradient not finite; skipped.jsonl names its inputs")
        if self.skipped_in_row >= self._config.max_skipped:
            raise UserError(
                f"{self._folder}: loss or gradient was not finite in {self.skipped_in_row} steps in a row, the last is "
                f"{step}; the weights are those before them, skipped.jsonl names their inputs: leave those out, lower "
                "optim.lr, or use engine.precision=fp32"
            )

    def share(self) -> None:
        """Let every process know all broken files and the slowest one. Collective."""
        found = all_gather_objects(self._world, (list(self.broken), self.slowest))
        self.broken = dict.fromkeys(sorted({line for lines, _ in found for line in lines}))
        self.slowest = max(slowest for _, slowest in found)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it. Collective."""
        self.share()
        (samples,) = all_reduce_sum(self._world, [self.broken_samples])
        rows = {"skipped": self.skipped, "skipped_in_row": self.skipped_in_row, "broken_samples": samples}
        return {**rows, "broken": list(self.broken), "slowest": list(self.slowest)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on counting from a checkpoint's."""
        self.skipped, self.skipped_in_row = state.get("skipped", 0), state.get("skipped_in_row", 0)
        self.broken = dict.fromkeys(state.get("broken", ()))
        self.slowest = tuple(state.get("slowest", self.slowest))
        if self._world.rank == 0:  # it is the sum over all processes that counts
            self.broken_samples = int(state.get("broken_samples", 0))


def write_skipped(folder: Path, step: int, pieces: Sequence[tuple[int, float, Sequence[str]]]) -> None:
    """One line of `skipped.jsonl`: a dropped step and what went into it, (process, loss, files) per micro-batch.

    Losses that are not finite are written as text, which JSON has no numbers for.
    """
    found = [
        {"process": rank, "loss": loss if math.isfinite(loss) else str(loss), "files": list(files)}
        for rank, loss, files in pieces
    ]
    with (folder / "skipped.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "micro_batches": found}, ensure_ascii=False) + "\n")
