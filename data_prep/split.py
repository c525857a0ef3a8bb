"""Set aside a part of the training videos for validation; files stay where they are, only the lists change."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data_prep.prepare import write_lists
from data_prep.shards import lock_dataset
from data_prep.state import PreparationState
from video_swinv2.errors import UsageError

# A class that misses its share by less is as close as whole videos can be.
NOTICEABLE = 1.0
PASSES = 4
ROUNDING = 1e-6  # of sums of shares
MOST_LINES = 10


class GroupedVideo(NamedTuple):
    """What decides where a video goes: videos of one `group` stay together."""

    label: str
    group: str


@dataclass(frozen=True)
class SplitResult:
    """How many videos are in train and val, and of every class (number in val, number asked for)."""

    train: int
    val: int
    classes: dict[str, tuple[int, float]]

    def lines(self) -> list[str]:
        """What to tell: the counts, and the classes whose groups do not allow the share, the worst first."""
        missed = {label: abs(found - asked) for label, (found, asked) in self.classes.items()}
        worst = sorted((label for label in missed if missed[label] >= NOTICEABLE), key=lambda label: -missed[label])
        told = [
            f"  {label or 'without a class'}: {self.classes[label][0]} in val, {self.classes[label][1]:.1f} asked for"
            for label in worst[:MOST_LINES]
        ]
        if len(worst) > MOST_LINES:
            told.append(
                f"  and {len(worst) - MOST_LINES} more classes, each off by {missed[worst[MOST_LINES]]:.1f} or less"
            )
        return [
            f"{self.train} videos in train, {self.val} in val, every class within {max(missed.values()):.1f}",
            *told,
        ]


class _Choice:
    """The groups chosen so far and how far that is from `share` of every class."""

    def __init__(self, videos: Sequence[GroupedVideo], share: float) -> None:
        self.chosen: set[str] = set()
        self.groups: dict[str, Counter[str]] = {}
        for video in videos:
            self.groups.setdefault(video.group, Counter())[video.label] += 1
        total = Counter(video.label for video in videos)
        self.off = {label: -share * count for label, count in total.items()}  # videos chosen less those asked for
        self.most = {label: (1 - share) * count - 1 for label, count in total.items()}  # one stays in train

    def gain(self, *groups: str) -> float:
        """By how much all classes together come nearer to the share if these groups change sides."""
        change: dict[str, int] = {}
        for group in groups:
            sign = -1 if group in self.chosen else 1
            for label, count in self.groups[group].items():
                change[label] = change.get(label, 0) + sign * count
        after = {label: self.off[label] + count for label, count in change.items()}
        if any(count > 0 and after[label] > self.most[label] + ROUNDING for label, count in change.items()):
            return -math.inf
        return sum(abs(self.off[label]) - abs(value) for label, value in after.items())

    def move(self, *groups: str) -> None:
        """Let these groups change sides."""
        for group in groups:
            sign = -1 if group in self.chosen else 1
            self.chosen.symmetric_difference_update({group})
            for label, count in self.groups[group].items():
                self.off[label] += sign * count


def choose_validation_groups(videos: Sequence[GroupedVideo], share: float, seed: int) -> set[str]:
    """The groups to set aside: `share` of every class as nearly as whole groups allow, never all of a class.

    Groups of several videos are divided by scikit-learn's StratifiedGroupKFold, which spreads them over folds of like
    size and mixture. Then groups, single videos too, change sides or change places as long as that brings their classes
    nearer to the share: this evens out what the folds left, meets shares that are no 1/n, and alone decides where no
    groups are known (there the folds would take minutes and a matrix of videos by classes for a result no better).
    Depends on names and seed alone.
    """
    choice = _Choice(videos, share)
    order = sorted(choice.groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    several = [group for group in order if choice.groups[group].total() > 1]
    proposed = _first_fold([video for video in videos if choice.groups[video.group].total() > 1], share, seed)
    for group in several:
        if group in proposed and choice.gain(group) > -math.inf:
            choice.move(group)
    for _ in range(PASSES):
        moved = False
        for group in order:
            if choice.gain(group) > ROUNDING:
                choice.move(group)
                moved = True
        if not (_exchange(choice, several) or moved):
            break
    return choice.chosen


def _exchange(choice: _Choice, groups: Sequence[str]) -> bool:
    """Exchange chosen groups for others that share a class and fit better; true if any was."""
    by_label: dict[str, list[str]] = {}
    for group in groups:
        for label in choice.groups[group]:
            by_label.setdefault(label, []).append(group)
    moved = False
    for group in groups:
        labels = choice.groups[group]
        if group not in choice.chosen or all(abs(choice.off[label]) < NOTICEABLE for label in labels):
            continue
        others = {other: None for label in labels for other in by_label[label] if other not in choice.chosen}
        best = max(others, key=lambda other: choice.gain(group, other), default=None)
        if best is not None and choice.gain(group, best) > ROUNDING:
            choice.move(group, best)
            moved = True
    return moved


def _first_fold(videos: Sequence[GroupedVideo], share: float, seed: int) -> set[str]:
    """The groups of one fold of about 1/share; none where there are too few videos or groups for folds."""
    folds = max(2, round(1 / share))
    largest = max(Counter(video.label for video in videos).values(), default=0)
    if min(largest, len({video.group for video in videos})) < folds:
        return set()
    from sklearn.model_selection import StratifiedGroupKFold

    # Sorted: the folds depend on the order of the lines otherwise.
    videos = sorted(videos)
    labels, groups = [video.label for video in videos], [video.group for video in videos]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)  # a small class may miss a fold
        splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
        return {groups[place] for place in next(splits)[1]}


def split_validation(out: Path, share: float, seed: int) -> SplitResult:
    """Move `share` of each class of train to val, videos cut from one video together.

    Running it again replaces the earlier choice. Raises UsageError where the source brought a val split of its own,
    UserError while a run is preparing the data set.
    """
    if not 0 < share < 1:
        raise UsageError(f"--val {share}: must lie between 0 and 1, for instance 0.1")
    with PreparationState(out) as state, lock_dataset(out):
        train: dict[int, tuple[str, GroupedVideo]] = {}
        for row in state.rows(columns=("listed_split", "status", "label", "name", "origin")):
            if row["listed_split"] == "val":
                raise UsageError(f"{out}: the source has a val split of its own; use that")
            if row["listed_split"] == "train":
                group = f"origin {row['origin']}" if row["origin"] else f"video {row['name']}"
                train[row["id"]] = (row["status"], GroupedVideo(row["label"], group))
        if not train:
            raise UsageError(f"{out}: no train split to take from")
        usable = [video for status, video in train.values() if status == "ok"]
        chosen = choose_validation_groups(usable, share, seed)
        if not chosen:
            raise UsageError(f"{out}: {share:g} of the largest class is less than one video or group; raise --val")
        # Failed videos go with their group: tried again, they must not end on the other side of it.
        state.move_to_splits({row: "val" if video.group in chosen else "train" for row, (_, video) in train.items()})
        write_lists(state, out)
    return _division(usable, chosen, share)


def _division(videos: Sequence[GroupedVideo], chosen: set[str], share: float) -> SplitResult:
    total = Counter(video.label for video in videos)
    val = Counter(video.label for video in videos if video.group in chosen)
    return SplitResult(
        len(videos) - val.total(), val.total(), {label: (val[label], share * total[label]) for label in sorted(total)}
    )
