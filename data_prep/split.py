"""Set aside shares of the training videos for validation and test, or divide them into folds. Only lists change.

Videos that are not independent form a *group* (video_swinv2/data/groups.py), which must not be divided: otherwise the
model would be validated on scenes that it has seen in training. Whole groups are therefore chosen (choice.py).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.choice import NOTICEABLE_VIDEOS, GroupedVideo, choose_folds, choose_groups, fold_limits
from data_prep.dataset import csv_text, write_text
from data_prep.groups import GroupRule
from data_prep.outcomes import split_order
from data_prep.prepare import write_lists
from data_prep.shards import lock_dataset
from data_prep.state import GROUP_COLUMNS, PreparationState, group_of_row
from video_swinv2.errors import UsageError
from video_swinv2.files import path_under

MAX_CLASSES_SHOWN = 10
FOLD_LIST = re.compile(r"fold-[0-9]+\.csv")
GIVE_GROUPS = "give --groups FILE with the columns path,group, or --group-regex"


@dataclass(frozen=True)
class SplitResult:
    """The number of videos in each split; (number found, number requested) for each split and class; the fold lists.

    `notes` are remarks for the user.
    """

    counts: dict[str, int]
    shares: dict[tuple[str, str], tuple[int, float]]
    folds: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report for the user: the counts, then the classes that missed their share noticeably, worst first."""
        missed_by = {key: abs(found - requested) for key, (found, requested) in self.shares.items()}
        worst = sorted(
            (key for key in missed_by if missed_by[key] >= NOTICEABLE_VIDEOS), key=lambda key: -missed_by[key]
        )
        (first, count), *others = self.counts.items()
        summary = ", ".join([f"{count} videos in {first}", *(f"{count} in {split}" for split, count in others)])
        if missed_by:
            summary += f"; every class is within {max(missed_by.values()):.1f} videos of its share"
        lines = [*self.notes, summary]
        for split, label in worst[:MAX_CLASSES_SHOWN]:
            found, requested = self.shares[split, label]
            lines.append(f"  {label or 'without a class'}: {found} in {split}, {requested:.1f} requested")
        if len(worst) > MAX_CLASSES_SHOWN:
            largest = missed_by[worst[MAX_CLASSES_SHOWN]]
            lines.append(f"  and {len(worst) - MAX_CLASSES_SHOWN} more classes, each off by {largest:.1f} or less")
        if self.folds:
            lines.append(
                f"{len(self.folds)} folds, each a list with train and val: {self.folds[0]} to {self.folds[-1].name}"
            )
        return lines


class _Row(NamedTuple):
    """A row of the state: its id, the split of its list, whether it was prepared, the file, its class and its group."""

    id: int
    listed_split: str
    ok: bool
    target: str
    video: GroupedVideo
    known_group: str


def split_dataset(
    out: Path,
    *,
    val: float | None = None,
    test: float | None = None,
    folds: int | None = None,
    groups: GroupRule | None = None,
    seed: int = 0,
) -> SplitResult:
    """Move shares of each class from train to val and to test, or divide train into folds. Groups stay together.

    Of `folds`, fold K is written to fold-K.csv: a list in which the fold is val and the others are train. What `groups`
    says is stored, and takes precedence over the lists of the source. Running it again replaces the earlier choice,
    since it starts from the splits that the source lists. Raises UsageError if the source has such a split of its own
    or the shares are impossible, UserError while another run is preparing the data set.
    """
    _check_numbers(val, test, folds)
    with PreparationState(out) as state, lock_dataset(out):
        notes = _store_groups(state, groups or GroupRule())
        rows = _read_rows(state)
        _refuse_own_splits(out, rows, {"val": bool(val or folds), "test": bool(test)})
        train = [row for row in rows if row.listed_split == "train"]
        if not train:
            raise UsageError(f"{out}: has no train split to take videos from")
        notes += _notes_on_groups(train)
        usable = [row.video for row in train if row.ok]
        # Test first: val then gets its share of all videos from those that are left.
        side: dict[str, str] = dict.fromkeys((row.video.group for row in train), "train")
        for split, share, left in (("test", test, 1.0), ("val", val, 1 - (test or 0))):
            if share is not None:
                remaining = [video for video in usable if side[video.group] == "train"]
                chosen = choose_groups(remaining, share / left, seed)
                if not chosen:
                    largest = f"{share:g} of the largest class is less than one video or group"
                    raise UsageError(f"{out}: {largest}; use a larger --{split}")
                side |= dict.fromkeys(chosen, split)
        fold_of = {}
        if folds:
            remaining = [video for video in usable if side[video.group] == "train"]
            fold_of = _divide(out, remaining, folds, seed)
            notes += _notes_on_folds(remaining, fold_of)
        # Failed videos do not count towards the shares, but they move with their group: if one of them succeeds later,
        # it must not end up on the other side.
        state.move_to_splits({row.id: side[row.video.group] for row in train})
        write_lists(state, out)
    placed = [
        (side[row.video.group] if row.listed_split == "train" else row.listed_split, row) for row in rows if row.ok
    ]
    lists = _write_folds(out, placed, fold_of, folds or 0)
    counts = Counter(split for split, _ in placed)
    ordered = {split: counts[split] for split in sorted(counts, key=split_order)}
    return SplitResult(ordered, _shares(usable, side, {"val": val, "test": test}), lists, tuple(notes))


def _check_numbers(val: float | None, test: float | None, folds: int | None) -> None:
    """Raises UsageError unless the numbers asked for can be had together."""
    if val is None and test is None and folds is None:
        raise UsageError("split: nothing to do; give --val SHARE, --test SHARE or --folds K")
    for option, share in (("--val", val), ("--test", test)):
        if share is not None and not 0 < share < 1:
            raise UsageError(f"{option} {share}: must be between 0 and 1, for instance 0.1")
    if (val or 0) + (test or 0) >= 1:
        raise UsageError(f"--val {val} and --test {test}: leave nothing for train; use smaller shares")
    if folds is not None and val is not None:
        raise UsageError("--folds makes a val split of each fold; omit --val")


def _store_groups(state: PreparationState, rule: GroupRule) -> list[str]:
    """Store the groups that the rule gives to the rows. Returns its remarks."""
    rows = list(state.rows(columns=("name", "target", "source")))
    groups, notes = rule.apply([(row["name"], row["target"], row["source"]) for row in rows])
    state.give_groups({row["id"]: group for row, group in zip(rows, groups, strict=True) if group})
    return notes


def _read_rows(state: PreparationState) -> list[_Row]:
    """All rows that are to be in the data set, in list order."""
    rows = []
    for row in state.rows(columns=("listed_split", "status", "label", "name", "target", *GROUP_COLUMNS)):
        if row["status"] != "excluded":
            known = group_of_row(row)
            # A video of unknown group is a group by itself. Without the prefixes, a group that equals the name of
            # another video would join the two.
            group = f"group {known}" if known else f"video {row['name']}"
            video = GroupedVideo(row["label"], group)
            rows.append(_Row(row["id"], row["listed_split"], row["status"] == "ok", row["target"], video, known))
    return rows


def _refuse_own_splits(out: Path, rows: Sequence[_Row], wanted: Mapping[str, bool]) -> None:
    """Raises UsageError if the lists of the source have one of the splits that are to be made."""
    for split in sorted({row.listed_split for row in rows}):
        if wanted.get(split):
            raise UsageError(f"{out}: the source has a {split} split of its own; use that one")
        if FOLD_LIST.fullmatch(f"{split}.csv"):
            raise UsageError(f"{out}: the source has a split {split!r}, which is the name of a fold; rename it")


def _notes_on_groups(rows: Sequence[_Row]) -> list[str]:
    """A remark on videos of which no group is known."""
    alone = sum(not row.known_group for row in rows)
    if alone == len(rows):
        return [
            f"no groups are known: clips of one recording may be in several splits; if there are such, {GIVE_GROUPS}"
        ]
    return [f"{alone} of {len(rows)} videos have no group, and count as independent; {GIVE_GROUPS}"] if alone else []


def _divide(out: Path, videos: Sequence[GroupedVideo], folds: int, seed: int) -> dict[str, int]:
    """The fold of each group. Raises UsageError if there are too few groups, or videos of each class, for the folds."""
    found, largest = fold_limits(videos)
    if min(found, largest) < folds:
        raise UsageError(
            f"{out}: {found} groups, and at most {largest} videos of a class, are too few for {folds} folds; use a "
            "smaller --folds"
        )
    return choose_folds(videos, folds, seed)


def _notes_on_folds(videos: Sequence[GroupedVideo], fold_of: Mapping[str, int]) -> list[str]:
    """A remark on the classes that are not in val of every fold."""
    found: dict[str, set[int]] = {}
    for video in videos:
        found.setdefault(video.label, set()).add(fold_of[video.group])
    folds = max(fold_of.values()) + 1
    few = sorted(label for label, inside in found.items() if len(inside) < folds)
    shown = ", ".join(map(repr, few[:MAX_CLASSES_SHOWN])) + (", ..." if len(few) > MAX_CLASSES_SHOWN else "")
    return [f"{len(few)} classes are not in every fold, since they have few groups: {shown}"] if few else []


def _write_folds(
    out: Path, placed: Sequence[tuple[str, _Row]], fold_of: Mapping[str, int], folds: int
) -> tuple[Path, ...]:
    """Write fold-K.csv of every fold, and remove those of an earlier choice. placed: prepared rows with their split."""
    for path in out.iterdir():
        if FOLD_LIST.fullmatch(path.name):
            path.unlink()
    paths = []
    for fold in range(folds):
        lines = []
        for split, row in placed:
            if split == "train":
                split = "val" if fold_of[row.video.group] == fold else "train"
            lines.append((row.target, row.video.label, split, row.known_group))
        paths.append(path_under(out, f"fold-{fold}.csv"))
        write_text(paths[-1], csv_text(("path", "label", "split", "group"), lines))
    return tuple(paths)


def _shares(
    videos: Sequence[GroupedVideo], side: Mapping[str, str], wanted: Mapping[str, float | None]
) -> dict[tuple[str, str], tuple[int, float]]:
    """(number of usable videos found, number requested) by split and class."""
    total = Counter(video.label for video in videos)
    found = Counter((side[video.group], video.label) for video in videos)
    return {
        (split, label): (found[split, label], share * total[label])
        for split, share in wanted.items()
        if share is not None
        for label in sorted(total)
    }
