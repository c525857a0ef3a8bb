"""A preparation in parts, each with a state of its own, on many machines at once; and the merge of these states."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.state import STATE_NAME, PreparationState
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import commit_file, lock_file, partial_path, sha256

LOCK_NAME = ".prep.lock"
FOLDER = "shards"
STATE_FILE = re.compile(r"(?P<place>\d+)-of-(?P<count>\d+)\.sqlite")
# What all shards of one preparation must agree on; the lists are written from it after the merge.
FACTS = ("name", "classes", "settings", "extra", "listing")


@dataclass(frozen=True)
class WorkShard:
    """Part `place` (from 0) of `count`."""

    place: int
    count: int

    def __str__(self) -> str:
        return f"{self.place}/{self.count}"

    def holds(self, name: str) -> bool:
        """Whether a video of this name is in this part: by a hash, so that it does not depend on the rest of a list."""
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % self.count == self.place

    def state_path(self, out: Path) -> Path:
        """Where the state of this part lies."""
        return out / FOLDER / f"{self.place}-of-{self.count}.sqlite"


def parse_shard(text: str, environment: Mapping[str, str] = os.environ) -> WorkShard:
    """`i/n`, or `slurm` for the place of this task in its job array. Raises UsageError."""
    if text == "slurm":
        try:
            ours, first, count = (int(environment[f"SLURM_ARRAY_TASK_{key}"]) for key in ("ID", "MIN", "COUNT"))
        except KeyError as fault:
            raise UsageError(f"--shard slurm: {fault.args[0]} is not set; start it by sbatch --array=0-N") from fault
        place = (ours - first) // int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        if not 0 <= place < count:
            raise UsageError(f"--shard slurm: task {ours} of the array from {first} on; use --array=0-{count - 1}")
        return WorkShard(place, count)
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if numbers is None or int(numbers[1]) >= int(numbers[2]):
        raise UsageError(f"--shard {text}: must be i/n with 0 <= i < n, for instance 0/8, or slurm")
    return WorkShard(int(numbers[1]), int(numbers[2]))


@contextlib.contextmanager
def lock_dataset(out: Path, shard: WorkShard | None = None) -> Iterator[None]:
    """Keep a data set for one run, or for the runs of its shards, each of which keeps its own part.

    Raises UserError where another run is in the way, or the data set is prepared the other way.
    """
    with contextlib.ExitStack() as held:
        busy = f"{out}: another run is preparing this data set; wait for it or stop it"
        held.enter_context(lock_file(out / LOCK_NAME, busy, shared=shard is not None))
        whole = (out / STATE_NAME).is_file()
        if shard is None:
            if not whole and (found := shard_state_paths(out)):
                raise UserError(f"{found[0]}: this data set is prepared in shards; merge them first (`merge {out}`)")
        else:
            if whole:
                raise UserError(f"{out}: holds {STATE_NAME}; go on without --shard, or give the shards another folder")
            (out / FOLDER).mkdir(exist_ok=True)
            busy = f"{out}: another run is preparing shard {shard}; wait for it or stop it"
            held.enter_context(lock_file(out / FOLDER / f".{shard.place}-of-{shard.count}.lock", busy))
        yield


def shard_state_paths(out: Path) -> list[Path]:
    """The states of the shards prepared in `out`, by place."""
    found = [(match, path) for path in (out / FOLDER).glob("*") if (match := STATE_FILE.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0]["place"]))]


@contextlib.contextmanager
def lock_datasets(folders: Sequence[Path]) -> Iterator[None]:
    """Keep several data sets whole. Raises UserError where one is at work."""
    with contextlib.ExitStack() as held:
        for folder in dict.fromkeys(folders):
            held.enter_context(lock_file(folder / LOCK_NAME, f"{folder}: is being prepared; wait for it or stop it"))
        yield


def merge_shard_states(state: PreparationState, out: Path, others: Sequence[Path]) -> int:
    """Take the rows of all shards prepared in `out` and in `others` over into the empty `state` of `out`; their number.

    Videos in `others` are linked into `out`, or copied and checked. Raises UserError for shards that lack or are not
    finished, or do not belong together.
    """
    sources = [(folder, path) for folder in dict.fromkeys((out, *others)) for path in shard_state_paths(folder)]
    with contextlib.ExitStack() as opened:
        shards = [
            (folder, opened.enter_context(PreparationState(folder, path=path)))
            for folder, path in _complete(out, sources)
        ]
        _agree([shard for _, shard in shards])
        for folder, shard in shards:
            if folder != out:
                _bring(shard, folder, out)
        for key in FACTS:
            if (value := shards[0][1].get_fact(key)) is not None:
                state.set_fact(key, value)
        state.set_fact("merged", str(len(shards)))
        state.add_rows(row for _, shard in shards for row in shard.rows())
    return len(shards)


def _complete(out: Path, sources: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """The states by place, checked that each place is there once."""
    if not sources:
        raise UsageError(f"{out}: no shards to merge; `prepare SRC {out} --shard 0/8` makes the first of eight")
    by_place: dict[int, tuple[Path, Path]] = {}
    counts = {}
    for folder, path in sources:
        place, count = (int(number) for number in path.stem.split("-of-"))
        counts[count] = path
        if place in by_place:
            raise UserError(f"{path}: {by_place[place][1]} is the same shard; leave one of the folders out")
        by_place[place] = (folder, path)
    if len(counts) > 1:
        one, other = list(counts.values())[:2]
        raise UserError(f"{one} and {other} count the shards differently; remove those not wanted")
    lacking = [place for place in range(next(iter(counts))) if place not in by_place]
    if lacking:
        names = ", ".join(f"{place}/{next(iter(counts))}" for place in lacking[:10])
        more = f" and {len(lacking) - 10} more" if len(lacking) > 10 else ""
        raise UserError(f"{out}: lacks shard {names}{more}; prepare it, or name the folder that holds it too")
    return [by_place[place] for place in sorted(by_place)]


def _agree(shards: Sequence[PreparationState]) -> None:
    """Raises UserError unless all are finished parts of one preparation."""
    for shard in shards:
        pending = sum(count.pending for count in shard.counts_by_split().values())
        if pending:
            raise UserError(f"{shard.path}: {pending} videos are still pending; run this shard again to its end")
        for key in FACTS:
            if shard.get_fact(key) != shards[0].get_fact(key):
                raise UserError(
                    f"{shard.path}: was prepared with another {key} than {shards[0].path}; run the shards again alike"
                )


def _bring(shard: PreparationState, folder: Path, out: Path) -> None:
    """Put the videos of a shard, made in another folder, where they belong."""
    for row in shard.rows("ok", ("target", "sha256")):
        made, target = folder / row["target"], out / row["target"]
        target.parent.mkdir(parents=True, exist_ok=True)
        part = partial_path(target)
        part.unlink(missing_ok=True)
        try:
            os.link(made, part)
        except FileNotFoundError as fault:
            raise UserError(f"{made}: is gone; run its shard again") from fault
        except OSError:  # another file system, or one without links
            shutil.copyfile(made, part)
            if sha256(part) != row["sha256"]:
                raise UserError(f"{made}: is not the file that its shard made; run its shard again") from None
        commit_file(part, target)
