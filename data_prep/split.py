"""Set aside a share of the training videos for validation. Files stay where they are; only the lists change.

Videos cut from the same longer video (one *group*) must stay on one side, or validation would test on what training has
seen. So whole groups are chosen, such that every class comes as close as possible to the requested share.
"""

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

# A class within one video of its share is as close as whole videos can come.
NOTICEABLE_VIDEOS = 1.0
MAX_PASSES = 4
ROUNDING = 1e-6  # tolerance for sums of shares
MAX_CLASSES_SHOWN = 10


class GroupedVideo(NamedTuple):
    """What decides where a video goes: its class, and its `group`, which is not divided."""

    label: str
    group: str


@dataclass(frozen=True)
class SplitResult:
    """The number of videos in train and val, and of each class (number in val, number requested)."""

    train: int
    val: int
    classes: dict[str, tuple[int, float]]

    def lines(self) -> list[str]:
        """The counts, then the classes whose groups did not allow the requested share, worst first."""
        missed_by = {label: abs(found - requested) for label, (found, requested) in self.classes.items()}
        worst = sorted(
            (label for label in missed_by if missed_by[label] >= NOTICEABLE_VIDEOS), key=lambda label: -missed_by[label]
        )
        lines = [
            f"{self.train} videos in train, {self.val} in val;"
            f" every class is within {max(missed_by.values()):.1f} videos of its share"
        ]
        for label in worst[:MAX_CLASSES_SHOWN]:
            found, requested = self.classes[label]
            lines.append(f"  {label or 'without a class'}: {found} in val, {requested:.1f} requested")
        if len(worst) > MAX_CLASSES_SHOWN:
            largest = missed_by[worst[MAX_CLASSES_SHOWN]]
            lines.append(f"  and {len(worst) - MAX_CLASSES_SHOWN} more classes, each off by {largest:.1f} or less")
        return lines


class _Selection:
    """The groups selected so far, and how far each class is from its share."""

    def __init__(self, videos: Sequence[GroupedVideo], share: float) -> None:
        self.selected: set[str] = set()
        self.groups: dict[str, Counter[str]] = {}  # videos per class in each group
        for video in videos:
            self.groups.setdefault(video.group, Counter())[video.label] += 1
        total = Counter(video.label for video in videos)
        # Per class: videos selected less videos requested, and the largest value that leaves one video in train.
        self.excess = {label: -share * count for label, count in total.items()}
        self.max_excess = {label: (1 - share) * count - 1 for label, count in total.items()}

    def gain(self, *groups: str) -> float:
        """By how many videos the classes together come closer to their shares if these groups change sides.

        -inf if that would leave no video of a class in train.
        """
        change: dict[str, int] = {}
        for group in groups:
            sign = -1 if group in self.selected else 1
            for label, count in self.groups[group].items():
                change[label] = change.get(label, 0) + sign * count
        after = {label: self.excess[label] + count for label, count in change.items()}
        if any(count > 0 and after[label] > self.max_excess[label] + ROUNDING for label, count in change.items()):
            return -math.inf
        return sum(abs(self.excess[label]) - abs(value) for label, value in after.items())

    def change_sides(self, *groups: str) -> None:
        """Select these groups, or deselect those that are selected."""
        for group in groups:
            sign = -1 if group in self.selected else 1
            self.selected.symmetric_difference_update({group})
            for label, count in self.groups[group].items():
                self.excess[label] += sign * count


def choose_validation_groups(videos: Sequence[GroupedVideo], share: float, seed: int) -> set[str]:
    """The groups to set aside: `share` of every class, as nearly as whole groups allow, but never all of a class.

    1. Groups of several videos start from one fold of scikit-learn's StratifiedGroupKFold, whose folds are alike in
       size and in classes.
    2. Then groups, including single videos, change sides or are exchanged, as long as that brings their classes closer
       to the share. This evens out what the folds leave, and reaches shares that are not 1/n.

    Single videos take no part in step 1: the folds would need minutes and a matrix of videos by classes, for a result
    that is no better. The choice depends only on names and on the seed, not on the order of the videos.
    """
    selection = _Selection(videos, share)
    order = sorted(selection.groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    several = [group for group in order if selection.groups[group].total() > 1]
    proposed = _first_fold([video for video in videos if selection.groups[video.group].total() > 1], share, seed)
    for group in several:
        if group in proposed and selection.gain(group) > -math.inf:
            selection.change_sides(group)
    for _ in range(MAX_PASSES):
        changed = False
        for group in order:
            if selection.gain(group) > ROUNDING:
                selection.change_sides(group)
                changed = True
        if not (_exchange(selection, several) or changed):
            break
    return selection.selected


def _exchange(selection: _Selection, groups: Sequence[str]) -> bool:
    """Exchange selected groups for others that share a class and fit better. Returns whether any was exchanged."""
    by_label: dict[str, list[str]] = {}
    for group in groups:
        for label in selection.groups[group]:
            by_label.setdefault(label, []).append(group)
    exchanged = False
    for group in groups:
        labels = selection.groups[group]
        if group not in selection.selected or all(abs(selection.excess[label]) < NOTICEABLE_VIDEOS for label in labels):
            continue
        # A dict, not a set: its order, and so the choice between equal candidates, is reproducible.
        others = {other: None for label in labels for other in by_label[label] if other not in selection.selected}
        best = max(others, key=lambda other: selection.gain(group, other), default=None)
        if best is not None and selection.gain(group, best) > ROUNDING:
            selection.change_sides(group, best)
            exchanged = True
    return exchanged


def _first_fold(videos: Sequence[GroupedVideo], share: float, seed: int) -> set[str]:
    """The groups of one of about 1/share folds; empty if there are too few videos or groups for that many folds."""
    folds = max(2, round(1 / share))
    largest = max(Counter(video.label for video in videos).values(), default=0)
    if min(largest, len({video.group for video in videos})) < folds:
        return set()
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to import

    videos = sorted(videos)  # the folds depend on the order of their input
    labels, groups = [video.label for video in videos], [video.group for video in videos]
    with warnings.catch_warnings():
        # A small class may be absent from a fold; step 2 corrects that.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
        return {groups[index] for index in next(splits)[1]}


def split_validation(out: Path, share: float, seed: int) -> SplitResult:
    """Move `share` of each class from train to val, keeping videos cut from one longer video together.

    Running it again replaces the earlier choice. Raises UsageError if the source has a val split of its own, UserError
    while a run is preparing the data set.
    """
    if not 0 < share < 1:
        raise UsageError(f"--val {share}: must be between 0 and 1, for instance 0.1")
    with PreparationState(out) as state, lock_dataset(out):
        train: dict[int, tuple[str, GroupedVideo]] = {}
        for row in state.rows(columns=("listed_split", "status", "label", "name", "origin")):
            if row["listed_split"] == "val":
                raise UsageError(f"{out}: the source has a val split of its own; use that one")
            if row["listed_split"] == "train":
                # The prefixes keep an origin from being taken for the name of a video.
                group = f"origin {row['origin']}" if row["origin"] else f"video {row['name']}"
                train[row["id"]] = (row["status"], GroupedVideo(row["label"], group))
        if not train:
            raise UsageError(f"{out}: has no train split to take videos from")
        usable = [video for status, video in train.values() if status == "ok"]
        selected = choose_validation_groups(usable, share, seed)
        if not selected:
            raise UsageError(
                f"{out}: {share:g} of the largest class is less than one video or group; use a larger --val"
            )
        # Failed videos go with their group: when tried again, they must not end up on the other side.
        state.move_to_splits({row: "val" if video.group in selected else "train" for row, (_, video) in train.items()})
        write_lists(state, out)
    return _split_result(usable, selected, share)


def _split_result(videos: Sequence[GroupedVideo], selected: set[str], share: float) -> SplitResult:
    total = Counter(video.label for video in videos)
    val = Counter(video.label for video in videos if video.group in selected)
    classes = {label: (val[label], share * total[label]) for label in sorted(total)}
    return SplitResult(len(videos) - val.total(), val.total(), classes)
