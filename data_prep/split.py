"""Set aside a part of the training videos for validation; files stay where they are, only the lists change."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data_prep.prepare import write_lists
from data_prep.state import State
from video_swinv2.errors import UsageError


def choose(names_by_class: dict[str, Sequence[str]], share: float, seed: int) -> set[str]:
    """The names to set aside: `share` of every class, rounded, never all of it.

    A name's place in the order depends on it and the seed alone, so videos added later hardly change the choice.
    """
    chosen: set[str] = set()
    for names in names_by_class.values():
        ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
        chosen.update(ordered[: min(round(share * len(ordered)), len(ordered) - 1)])
    return chosen


def split_validation(out: Path, share: float, seed: int) -> tuple[int, int]:
    """Move `share` of each class of train to val; returns how many are in train and val now.

    Running it again replaces the earlier choice. Raises UsageError where the source brought a val split of its own.
    """
    if not 0 < share < 1:
        raise UsageError(f"--val {share}: must lie between 0 and 1, for instance 0.1")
    with State(out) as state:
        rows = list(state.rows())
        if any(row["listed_split"] == "val" for row in rows):
            raise UsageError(f"{out}: the source has a val split of its own; use that")
        train = [row for row in rows if row["listed_split"] == "train"]
        if not train:
            raise UsageError(f"{out}: no train split to take from")
        by_class: dict[str, list[str]] = defaultdict(list)
        for row in train:
            if row["status"] == "ok":
                by_class[row["label"]].append(row["name"])
        chosen = choose(dict(by_class), share, seed)
        if not chosen:
            raise UsageError(f"{out}: {share:g} of the largest class is less than one video; raise --val")
        state.move({row["id"]: "val" if row["name"] in chosen else "train" for row in train})
        write_lists(state, out)
    return len(train) - len(chosen), len(chosen)
