"""Shards of a preparation, which many machines can work on at once, and merging them afterwards.

A *shard of the work* consists of the videos whose names hash to its index. (Elsewhere in the project a shard is a tar
of samples. Here the word is that of the command line, `--shard 0/8`.) The machines need not talk to each other: each
shard computes from the lists which videos are its own, and has its own state.

    OUT/videos/...               the prepared videos of all shards
    OUT/shards/I-of-N.sqlite     the state of shard I, and beside it .I-of-N.lock
    OUT/.prep.lock               held shared by runs of shards, exclusively by any other run
    OUT/prep.sqlite              the state of the whole: the rows of all shards, copied together by `merge`
"""

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
from video_swinv2.files import commit_file, create_folder, lock_file, partial_path, path_under, sha256

LOCK_NAME = ".prep.lock"
SHARDS_FOLDER = "shards"
SHARD_STATE_FILE = re.compile(r"(?P<index>\d+)-of-(?P<count>\d+)\.sqlite")
# Facts (see PreparationState.set_fact) that must be equal in all shards of one preparation. The merged state gets them
# too, and the lists are written from them.
SHARED_FACTS = ("name", "classes", "settings", "extra", "listing")


@dataclass(frozen=True)
class WorkShard:
    """Shard `index` (from 0) of `count` of the work."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, name: str) -> bool:
        """Whether this shard contains the video of that name.

        It depends on the hash of the name alone. So a video stays in its shard when other videos are added to the list
        or removed, which it would not if videos were dealt out by their position.
        """
        # 64 of the 256 bits are plenty: the shards differ in size by chance only.
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % self.count == self.index

    def state_path(self, out: Path) -> Path:
        """Where the state of this shard is stored."""
        return path_under(out, f"{SHARDS_FOLDER}/{self.index}-of-{self.count}.sqlite")


def parse_shard(text: str, environment: Mapping[str, str] = os.environ) -> WorkShard:
    """The shard that the option --shard names: `i/n`, or `slurm` for the place of this task in its job array.

    Raises UsageError.
    """
    if text == "slurm":
        try:
            task, first, count = (int(environment[f"SLURM_ARRAY_TASK_{key}"]) for key in ("ID", "MIN", "COUNT"))
        except KeyError as error:
            raise UsageError(
                f"--shard slurm: {error.args[0]} is not set; start the job with sbatch --array=0-7 (for 8 shards)"
            ) from error
        # The ids of an array such as 10-80:10 start anywhere and have a step: its tasks are shards 0/8 to 7/8.
        index = (task - first) // int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        if not 0 <= index < count:
            # An array with gaps, such as 0,5,9. A task cannot see the gaps, but the last one at least gets here.
            raise UsageError(
                f"--shard slurm: task {task} does not fit an array of {count} tasks that starts at {first};"
                f" use --array=0-{count - 1}"
            )
        return WorkShard(index, count)
    numbers = re.fullmatch(r"(\d+)/(\d+)", text)
    if numbers is None or int(numbers[1]) >= int(numbers[2]):
        raise UsageError(f"--shard {text}: must be i/n with 0 <= i < n, for instance 0/8, or slurm")
    return WorkShard(int(numbers[1]), int(numbers[2]))


@contextlib.contextmanager
def lock_dataset(out: Path, shard: WorkShard | None = None) -> Iterator[None]:
    """Reserve a data set for one run inside the context. Runs of different shards share it, but not their shard.

    Raises UserError if another run has reserved it, or if it was begun in the other way (as a whole, or in shards).
    """
    with contextlib.ExitStack() as stack:
        busy = f"{out}: another run is preparing this data set; wait for it or stop it"
        # A run of the whole takes this lock exclusively, runs of shards share it. So neither kind can start while the
        # other one is active. The kernel releases locks when a process ends, so killed runs leave no stale ones.
        stack.enter_context(lock_file(out / LOCK_NAME, busy, shared=shard is not None))
        prepared_whole = (out / STATE_NAME).is_file()
        if shard is None:
            if not prepared_whole and (found := shard_state_paths(out)):
                raise UserError(f"{found[0]}: this data set is prepared in shards; merge them first (`merge {out}`)")
        else:
            if prepared_whole:
                raise UserError(f"{out}: holds {STATE_NAME}; resume without --shard, or give the shards another folder")
            folder = path_under(out, SHARDS_FOLDER)
            create_folder(folder)
            busy = f"{out}: another run is preparing shard {shard}; wait for it or stop it"
            lock_path = folder / f".{shard.index}-of-{shard.count}.lock"
            stack.enter_context(lock_file(lock_path, busy))
        yield


@contextlib.contextmanager
def lock_datasets(folders: Sequence[Path]) -> Iterator[None]:
    """Reserve several data sets inside the context, each as a whole. Raises UserError if one is being prepared."""
    with contextlib.ExitStack() as stack:
        # dict.fromkeys removes repetitions but keeps the order. If a folder were locked twice, the second lock would be
        # refused because of the first: flock distinguishes open files, not processes.
        for folder in dict.fromkeys(folders):
            busy = f"{folder}: is being prepared; wait for that run or stop it"
            stack.enter_context(lock_file(folder / LOCK_NAME, busy))
        yield


def shard_state_paths(out: Path) -> list[Path]:
    """The paths of the states of all shards prepared in `out`, sorted by index."""
    names = (path.name for path in (out / SHARDS_FOLDER).glob("*"))
    found = sorted((int(match["index"]), name) for name in names if (match := SHARD_STATE_FILE.fullmatch(name)))
    return [path_under(out, f"{SHARDS_FOLDER}/{name}") for _, name in found]


def merge_shard_states(state: PreparationState, out: Path, others: Sequence[Path]) -> int:
    """Copy the rows of all shards in `out` and in `others` into the empty `state` of `out`.

    Videos in `others` are hard-linked into `out`, or copied and checked where that is impossible. Returns the number of
    shards. Raises UsageError if there are none, and UserError if one is absent or unfinished, or if they do not belong
    to the same preparation.
    """
    found = [(folder, path) for folder in dict.fromkeys((out, *others)) for path in shard_state_paths(folder)]
    with contextlib.ExitStack() as stack:
        shards = [
            (folder, stack.enter_context(PreparationState(folder, path=path)))
            for folder, path in _require_every_shard_once(out, found)
        ]
        _require_same_preparation([shard for _, shard in shards])
        # Videos before rows, as everywhere: no row may refer to a file that does not exist yet.
        for folder, shard in shards:
            if folder != out:
                _link_videos(shard, folder, out)
        for key in SHARED_FACTS:
            if (value := shards[0][1].get_fact(key)) is not None:
                state.set_fact(key, value)
        state.set_fact("merged", str(len(shards)))
        state.add_rows(row for _, shard in shards for row in shard.rows())
    return len(shards)


def _require_every_shard_once(out: Path, found: Sequence[tuple[Path, Path]]) -> list[tuple[Path, Path]]:
    """The (folder, state path) pairs, sorted by index.

    Raises UsageError if there are none, and UserError unless every index occurs exactly once and all agree on their
    number.
    """
    if not found:
        raise UsageError(f"{out}: no shards to merge; `prepare SRC {out} --shard 0/8` prepares the first of eight")
    by_index: dict[int, tuple[Path, Path]] = {}
    path_by_count: dict[int, Path] = {}
    for folder, path in found:
        index, count = (int(number) for number in path.stem.split("-of-"))
        path_by_count[count] = path
        if index in by_index:
            raise UserError(f"{path}: is the same shard as {by_index[index][1]}; omit one of the folders")
        by_index[index] = (folder, path)
    if len(path_by_count) > 1:
        one, other = list(path_by_count.values())[:2]
        raise UserError(
            f"{one} and {other}: belong to preparations with different numbers of shards; "
            "remove the ones you do not want"
        )
    (count,) = path_by_count
    absent = [index for index in range(count) if index not in by_index]
    if absent:
        names = ", ".join(f"{index}/{count}" for index in absent[:10])
        more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
        raise UserError(f"{out}: missing shards: {names}{more}; prepare them, or also name the folder that holds them")
    return [by_index[index] for index in sorted(by_index)]


def _require_same_preparation(shards: Sequence[PreparationState]) -> None:
    """Raises UserError unless all shards are finished and were prepared from the same lists with the same settings."""
    for shard in shards:
        pending = sum(counts.pending for counts in shard.counts_by_split().values())
        if pending:
            raise UserError(f"{shard.path}: {pending} videos are still pending; run this shard again to the end")
        for key in SHARED_FACTS:
            if shard.get_fact(key) != shards[0].get_fact(key):
                raise UserError(
                    f"{shard.path}: its {key} differs from that of {shards[0].path};"
                    " run all shards again with the same arguments"
                )


def _link_videos(shard: PreparationState, folder: Path, out: Path) -> None:
    """Link or copy the prepared videos of a shard from another folder to their targets in `out`.

    A link takes no space and no time. It is made under a hidden name and renamed, as a copy is, so that a merge that is
    killed leaves no incomplete video and can be repeated: the rename replaces what an earlier one has left.
    """
    for row in shard.rows("ok", ("target", "sha256")):
        made, target = (path_under(root, row["target"]) for root in (folder, out))
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(target)
        partial.unlink(missing_ok=True)
        try:
            os.link(made, partial)
        except FileNotFoundError as error:
            raise UserError(f"{made}: the file is gone; run its shard again") from error
        except OSError:  # another file system, or one without hard links
            shutil.copyfile(made, partial)
            # Unlike a link, a copy between machines may go wrong, or the original may have been changed.
            if sha256(partial) != row["sha256"]:
                raise UserError(f"{made}: is not the file its shard prepared; run its shard again") from None
        commit_file(partial, target)
