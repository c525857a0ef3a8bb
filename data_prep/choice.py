"""Choosing whole groups of videos: those that give about a share of every class, and those of each fold.

A group may contain several classes, so choosing groups for a share is a hard combinatorial problem (a variant of bin
packing). The solution here is a local search: it starts from a fold of scikit-learn and improves it group by group.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Only whole videos can be moved, so a class that misses its share by less than one video counts as exact.
NOTICEABLE_VIDEOS = 1.0
MAX_PASSES = 4  # of the local search over all groups; it ends earlier if a pass changes nothing
ROUNDING = 1e-6  # in videos: tolerance for sums of shares, which are floating-point numbers


class GroupedVideo(NamedTuple):
    """What decides the split of a video: its class, and its `group`, all of which goes to the same split."""

    label: str
    group: str


class _Selection:
    """The groups selected for the other split so far, and how far each class is from its share.

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
        change: dict[str, int] = {}  # by class: videos that would move to the other split, negative if back to train
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


def choose_groups(videos: Sequence[GroupedVideo], share: float, seed: int) -> set[str]:
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


def choose_folds(videos: Sequence[GroupedVideo], folds: int, seed: int) -> dict[str, int]:
    """The fold of each group, from 0 on, such that folds are similar in size and in classes.

    There may be at most min(fold_limits(videos)) folds. As above, the result does not depend on the order of `videos`.
    """
    return {group: fold for fold, groups in enumerate(_folds(videos, folds, seed)) for group in groups}


def fold_limits(videos: Sequence[GroupedVideo]) -> tuple[int, int]:
    """The number of groups, and of videos in the largest class. scikit-learn makes no more folds than either."""
    largest = max(Counter(video.label for video in videos).values(), default=0)
    return len({video.group for video in videos}), largest


def _first_fold(videos: Sequence[GroupedVideo], share: float, seed: int) -> set[str]:
    """The groups of the first of about 1/share folds; empty if there are too few videos or groups for that."""
    folds = max(2, round(1 / share))
    if min(fold_limits(videos)) < folds:
        return set()
    return next(_folds(videos, folds, seed))


def _folds(videos: Sequence[GroupedVideo], folds: int, seed: int) -> Iterator[set[str]]:
    """The groups of each fold of scikit-learn's StratifiedGroupKFold."""
    from sklearn.model_selection import StratifiedGroupKFold  # takes a second to import

    videos = sorted(videos)  # the folds depend on the order of their input, but the choice must not
    labels, groups = [video.label for video in videos], [video.group for video in videos]
    with warnings.catch_warnings():
        # Warns of a class with fewer videos than folds, which is then absent from some folds.
        warnings.filterwarnings("ignore", "The least populated class", UserWarning)
        splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(labels, labels, groups)
        # Each item is (training indices, test indices); the test indices are the fold.
        for _, fold in splits:
            yield {groups[index] for index in fold}
