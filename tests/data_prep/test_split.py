"""The validation split: the requested share of every class, whole groups only, reproducible by seed."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.split import GroupedVideo, choose_validation_groups, split_validation
from data_prep.state import PlannedVideo, PreparationState
from video_swinv2.data.manifest import read_manifest
from video_swinv2.errors import UsageError


def ucf_like(classes: int = 12) -> list[GroupedVideo]:
    """Twenty-five groups of four to seven videos per class, as in UCF101."""
    draw = random.Random(0)
    return [
        GroupedVideo(f"c{c}", f"c{c}_g{g}")
        for c in range(classes)
        for g in range(25)
        for _ in range(draw.randint(4, 7))
    ]


def films_of_many_classes() -> list[GroupedVideo]:
    """Films whose scenes show several classes, as in HMDB51, and single videos."""
    draw = random.Random(1)
    films = [GroupedVideo(f"c{draw.randrange(8)}", f"film {n}") for n in range(60) for _ in range(draw.randint(2, 9))]
    return films + [GroupedVideo(f"c{n % 8}", f"alone {n}") for n in range(200)]


def misses(videos: list[GroupedVideo], chosen: set[str], share: float) -> dict[str, float]:
    total = Counter(video.label for video in videos)
    val = Counter(video.label for video in videos if video.group in chosen)
    assert all(val[label] < total[label] for label in total), "a class of train is empty"
    return {label: abs(val[label] - share * total[label]) for label in total}


@pytest.mark.parametrize("share", [0.1, 0.2, 0.35, 0.8])
@pytest.mark.parametrize("make", [ucf_like, films_of_many_classes])
def test_every_class_gives_its_share_in_whole_groups(make: object, share: float) -> None:
    videos = make()  # type: ignore[operator]  # one of the two functions above
    chosen = choose_validation_groups(videos, share, seed=0)
    missed = misses(videos, chosen, share)
    assert max(missed.values()) <= 2
    assert np.mean(list(missed.values())) < 0.8


def test_it_is_closer_to_the_share_than_the_folds_alone() -> None:
    from sklearn.model_selection import StratifiedGroupKFold

    videos = ucf_like()
    labels, groups = zip(*videos, strict=True)
    test = next(StratifiedGroupKFold(10, shuffle=True, random_state=0).split(labels, labels, groups))[1]
    fold = misses(videos, {groups[place] for place in test}, 0.1)
    ours = misses(videos, choose_validation_groups(videos, 0.1, seed=0), 0.1)
    assert sum(ours.values()) < 0.7 * sum(fold.values())


def test_the_choice_depends_only_on_seed_and_names() -> None:
    videos = films_of_many_classes()
    first = choose_validation_groups(videos, 0.2, seed=3)
    assert choose_validation_groups(videos[::-1], 0.2, seed=3) == first
    assert choose_validation_groups(videos, 0.2, seed=4) != first


def test_single_videos_fill_a_class_exactly_and_small_classes_stay() -> None:
    videos = [
        GroupedVideo(label, f"{label}{n}") for label, count in (("a", 30), ("b", 5), ("c", 1)) for n in range(count)
    ]
    chosen = choose_validation_groups(videos, 0.1, seed=0)
    assert Counter(video.label for video in videos if video.group in chosen) == {"a": 3}
    assert (
        choose_validation_groups([GroupedVideo("a", "one film")] * 9, 0.5, seed=0) == set()
    )  # all of the class or nothing
    many = [GroupedVideo("a", f"{n}") for n in range(4)]
    assert len(choose_validation_groups(many, 0.99, seed=0)) == 3


def prepared(out: Path, rows: list[tuple[str, str, str]]) -> Path:
    """A state in which (name, origin, status) were prepared; the videos themselves are not needed."""
    with PreparationState(out, create=True) as state:
        state.sync_with_plan(
            PlannedVideo("train", n, name, name[0], f"/raw/{name}", f"videos/train/{name}", origin=origin)
            for n, (name, origin, _) in enumerate(rows)
        )
        for row, (_, _, status) in zip(list(state.rows()), rows, strict=True):
            reason = None if status == "ok" else "timeout"
            state.record_outcome(row["id"], {"status": status, "reason": reason, "sha256": "0" * 64})
        for key, value in (("classes", ["a", "b"]), ("settings", {})):
            state.set_fact(key, json.dumps(value))
    return out


def test_segments_of_one_source_go_together_failed_ones_too(tmp_path: Path) -> None:
    rows = [(f"{label}{n}.mp4", f"film{n // 4}", "ok") for label in "ab" for n in range(40)]
    rows += [(f"a{n}.mp4", f"film{n - 100}", "failed") for n in range(100, 110)]
    out = prepared(tmp_path, rows)
    result = split_validation(out, 0.2, seed=0)
    assert (result.train, result.val) == (64, 16)
    assert result.classes == {"a": (8, 8.0), "b": (8, 8.0)}
    assert result.lines() == ["64 videos in train, 16 in val; every class is within 0.0 videos of its share"]
    with PreparationState(out) as state:
        sides = {(row["origin"], row["split"]) for row in state.rows()}
    assert len(sides) == 10
    assert Counter(split for _, split in sides) == {"train": 8, "val": 2}
    train, val = (read_manifest(out, split) for split in ("train", "val"))
    assert (len(train.entries), train.failed_in_preparation, len(val.entries), val.failed_in_preparation) == (
        64,
        8,
        16,
        2,
    )
    split_validation(out, 0.5, seed=1)  # replaces the earlier choice
    assert len(read_manifest(out, "val").entries) == 40


def test_shares_that_groups_do_not_allow_are_reported(tmp_path: Path) -> None:
    rows = [(f"a{n}.mp4", f"film{n // 10}", "ok") for n in range(30)] + [(f"b{n}.mp4", "", "ok") for n in range(20)]
    lines = split_validation(prepared(tmp_path, rows), 0.2, seed=0).lines()
    assert lines == [
        "36 videos in train, 14 in val; every class is within 4.0 videos of its share",
        "  a: 10 in val, 6.0 requested",
    ]


@pytest.mark.parametrize(("share", "words"), [(1.0, "must be between"), (0.01, "less than one video or group")])
def test_invalid_shares(tmp_path: Path, share: float, words: str) -> None:
    out = prepared(tmp_path, [("a1.mp4", "", "ok"), ("a2.mp4", "", "ok")])
    with pytest.raises(UsageError, match=words):
        split_validation(out, share, seed=0)
