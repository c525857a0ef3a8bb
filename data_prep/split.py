"""Set aside a share of the training videos for validation. Files stay where they are; only the lists change.

Videos cut from the same longer video form a *group*, which must not be divided: otherwise the model would be validated
on scenes that it has seen in training. Whole groups are therefore chosen, such that the share of every class in val is
as close as possible to the requested one.

A group may contain several classes, so choosing them is a hard combinatorial problem (a variant of bin packing). The
solution here is a local search: it starts from a fold of scikit-learn and improves it group by group.
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

# Only whole videos can be moved, so a class that misses its share by less than one video counts as exact.
NOTICEABLE_VIDEOS = 1.0
MAX_PASSES = 4  # of the local search over all groups; it ends earlier if a pass changes nothing
ROUNDING = 1e-6  # in videos: tolerance for sums of shares, which are floating-point numbers
MAX_CLASSES_SHOWN = 10


class GroupedVideo(NamedTuple):
    """What decides the split of a video: its class, and its `group`, all of which goes to the same split."""

    label: str
    group: str


@dataclass(frozen=True)
class SplitResult:
    """The number of videos in train and in val, and (number in val, number requested) for each class."""

    train: int
    val: int
    classes: dict[str, tuple[int, float]]

    def lines(self) -> list[str]:
        """The report for the user: the counts, then the classes that missed their share noticeably, worst first."""
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
    """The groups selected for validation so far, and how far each class is from its share.

    Selecting a group changes the excess of only the few classes it contains, so evaluating a change is cheap.
    """

    def __init__(self, videos: Sequence[GroupedVideo], share: float) -> None:
        self.selected: set[str] = set()
        self.groups: dict[str, Counter[str]] = {}  # videos per class in each group
        for video in videos:
            self.groups.setdefault(video.group, Counter())[video.label] += 1
        total = Counter(video.label for video in videos)
        # For each class: the number of videos selected minus the number requested, and the largest value of this that
        # leaves one video in train. Of `count` videos, share * count are requested and count - 1 may be selected.
        self.excess = {label: -share * count for label, count in total.items()}
        self.max_excess = {label: (1 - share) * count - 1 for label, count in total.items()}

    def gain(self, *groups: str) -> float:
        """By how many videos the classes, taken together, would come closer to their shares by these changes of side.

        Negative if they would be further away; -inf if train would be left without any video of a class.
        """
        change: dict[str, int] = {}  # by class: videos that would move to validation, negative if back to train
        for group in groups:
            sign = -1 if group in self.selected else 1
            for label, count in self.groups[group].items():
                change[label] = change.get(label, 0) + sign * count
        after = {label: self.excess[label] + count for label, count in change.items()}
        # count > 0: a change that takes no video of a class out of train is never to blame.
        if any(count > 0 and after[label] > self.max_excess[label] + ROUNDING for label, count in change.items()):
            return -math.inf
        return sum(abs(self.excess[label]) - abs(value) for label, value in after.items())

    def change_sides(self, *groups: str) -> None:
        """Select each of these groups, or deselect it if it is selected."""
        for group in groups:
            sign = -1 if group in self.selected else 1
            self.selected.symmetric_difference_update({group})
            for label, count in self.groups[group].items():
                self.excess[label] += sign * count


def choose_validation_groups(videos: Sequence[GroupedVideo], share: float, seed: int) -> set[str]:
    """Choose the groups to set aside: about `share` of every class, but never all videos of a class.

    1. Start from one fold of scikit-learn's StratifiedGroupKFold, whose folds are similar in size and in classes. This
       step considers only groups of several videos.
    2. Move single groups to the other side, or exchange two groups, as long as that brings their classes closer to the
       share. This step includes groups of one video. It corrects what the fold leaves uneven, and reaches shares that
       are not 1/n.

    Groups of one video are left out of step 1 because the folds would take minutes, and a matrix of videos by classes,
    for a result that is no better. The choice depends on the names and the seed only, not on the order of `videos`.
    """
    selection = _Selection(videos, share)
    # A random order that is the same on every machine, and that one more video does not change for the others.
    order = sorted(selection.groups, key=lambda group: hashlib.sha256(f"{seed}/{group}".encode()).digest())
    several = [group for group in order if selection.groups[group].total() > 1]
    proposed = _first_fold([video for video in videos if selection.groups[video.group].total() > 1], share, seed)
    # A fold may contain all videos of a class. Here the group with the last training video of a class stays in train.
    for group in several:
        if group in proposed and selection.gain(group) > -math.inf:
            selection.change_sides(group)
    # Every accepted change reduces the sum of all deviations, so the search cannot cycle.
    for _ in range(MAX_PASSES):
        changed = False
        for group in order:
            if selection.gain(group) > ROUNDING:
                selection.change_sides(group)
                changed = True
        # Exchanges find improvements that single moves cannot: moving one large group out first makes things worse.
        if not (_exchange(selection, several) or changed):
            break
    return selection.selected


def _exchange(selection: _Selection, groups: Sequence[str]) -> bool:
    """Exchange selected groups for unselected ones that share a class and fit better.

    Each selected group with a class that noticeably misses its share is exchanged for the best candidate, if that is
    an improvement.
    Returns whether any group was exchanged.
    """
    by_label: dict[str, list[str]] = {}
    for group in groups:
        for label in selection.groups[group]:
            by_label.setdefault(label, []).append(group)
    exchanged = False
    for group in groups:
        labels = selection.groups[group]
        if group not in selection.selected or all(abs(selection.excess[label]) < NOTICEABLE_VIDEOS for label in labels):
            continue
        # A dict in place of a set, because its order is reproducible: max takes the first of equally good candidates.
        others = {other: None for label in labels for other in by_label[label] if other not in selection.selected}
        best = max(others, key=lambda other: selection.gain(group, other), default=None)
        if best is not None and selection.gain(group, best) > ROUNDING:
            selection.change_sides(group, best)
            exchanged = True
    return exchanged


def _first_fold(videos: Sequence[GroupedVideo], share: float, seed: int) -> set[str]:
    """The groups of the first of about 1/share folds; empty if there are too few videos or groups for that."""
    folds = max(2, round(1 / share))
    largest = max(Counter(video.label for video in videos).values(), default=0)
    if min(largest, len({video.group for video in videos})) < folds:
        return set()
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to import

    videos = sorted(videos)  # the folds depend on the order of their input, but the choice must not
    labels, groups = [video.label for video in videos], [video.group for video in videos]
    with warnings.catch_warnings():
        # Warns of a class with fewer videos than folds, which is then absent from some folds. Step 2 corrects that.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
        # Each item is (training indices, test indices); the test indices are the fold.
        return {groups[index] for index in next(splits)[1]}


def split_validation(out: Path, share: float, seed: int) -> SplitResult:
    """Move `share` of each class from train to val, keeping videos cut from the same longer video together.

    Running it again replaces the earlier choice, since it starts from the splits that the source lists. Raises
    UsageError if the source has a val split of its own or the share is impossible, UserError while another run is
    preparing the data set.
    """
    if not 0 < share < 1:
        raise UsageError(f"--val {share}: must be between 0 and 1, for instance 0.1")
    with PreparationState(out) as state, lock_dataset(out):
        train: dict[int, tuple[str, GroupedVideo]] = {}  # (status, video) by row id
        for row in state.rows(columns=("listed_split", "status", "label", "name", "origin")):
            if row["listed_split"] == "val":
                raise UsageError(f"{out}: the source has a val split of its own; use that one")
            if row["listed_split"] == "train":
                # A video of unknown origin is a group by itself. Without the prefixes, an origin that equals the name
                # of another video would join the two.
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
        # Failed videos do not count towards the shares, but they move with their group: if one of them succeeds later,
        # it must not end up on the other side.
        state.move_to_splits({row: "val" if video.group in selected else "train" for row, (_, video) in train.items()})
        write_lists(state, out)
    return _split_result(usable, selected, share)


def _split_result(videos: Sequence[GroupedVideo], selected: set[str], share: float) -> SplitResult:
    """Count the usable videos on both sides."""
    total = Counter(video.label for video in videos)
    val = Counter(video.label for video in videos if video.group in selected)
    classes = {label: (val[label], share * total[label]) for label in sorted(total)}
    return SplitResult(len(videos) - val.total(), val.total(), classes)
