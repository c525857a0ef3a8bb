"""The validation split: the requested share of every class, whole groups only, reproducible by seed."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_prep.choice import GroupedVideo, choose_folds, choose_groups
from data_prep.cli import main
from data_prep.groups import GroupRule
from data_prep.split import split_dataset
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
    chosen = choose_groups(videos, share, seed=0)
    missed = misses(videos, chosen, share)
    assert max(missed.values()) <= 2
    assert np.mean(list(missed.values())) < 0.8


def test_it_is_closer_to_the_share_than_the_folds_alone() -> None:
    from sklearn.model_selection import StratifiedGroupKFold

    videos = ucf_like()
    labels, groups = zip(*videos, strict=True)
    test = next(StratifiedGroupKFold(10, shuffle=True, random_state=0).split(labels, labels, groups))[1]
    fold = misses(videos, {groups[place] for place in test}, 0.1)
    ours = misses(videos, choose_groups(videos, 0.1, seed=0), 0.1)
    assert sum(ours.values()) < 0.7 * sum(fold.values())


def test_the_choice_depends_only_on_seed_and_names() -> None:
    videos = films_of_many_classes()
    first = choose_groups(videos, 0.2, seed=3)
    assert choose_groups(videos[::-1], 0.2, seed=3) == first
    assert choose_groups(videos, 0.2, seed=4) != first


def test_single_videos_fill_a_class_exactly_and_small_classes_stay() -> None:
    videos = [
        GroupedVideo(label, f"{label}{n}") for label, count in (("a", 30), ("b", 5), ("c", 1)) for n in range(count)
    ]
    chosen = choose_groups(videos, 0.1, seed=0)
    assert Counter(video.label for video in videos if video.group in chosen) == {"a": 3}
    assert choose_groups([GroupedVideo("a", "one film")] * 9, 0.5, seed=0) == set()  # all of the class or nothing
    many = [GroupedVideo("a", f"{n}") for n in range(4)]
    assert len(choose_groups(many, 0.99, seed=0)) == 3


def prepared(out: Path, rows: list[tuple[str, str, str]]) -> Path:
    """A state in which (name, group, status) were prepared; the videos themselves are not needed."""
    out.mkdir(exist_ok=True)
    with PreparationState(out, create=True) as state:
        state.sync_with_plan(
            PlannedVideo("train", n, name, name[0], f"/raw/{name}", f"videos/train/{name}", group=group)
            for n, (name, group, _) in enumerate(rows)
        )
        # In one transaction, where record_outcome would take one for each row.
        with contextlib.closing(sqlite3.connect(state.path)) as base, base:
            outcomes = ((status, None if status == "ok" else "timeout", name) for name, _, status in rows)
            base.executemany(
                "UPDATE clips SET status = ?, reason = ?, sha256 = hex(zeroblob(32)) WHERE name = ?", outcomes
            )
        for key, value in (("classes", ["a", "b"]), ("settings", {})):
            state.set_fact(key, json.dumps(value))
    return out


def test_segments_of_one_source_go_together_failed_ones_too(tmp_path: Path) -> None:
    rows = [(f"{label}{n}.mp4", f"film{n // 4}", "ok") for label in "ab" for n in range(40)]
    rows += [(f"a{n}.mp4", f"film{n - 100}", "failed") for n in range(100, 110)]
    out = prepared(tmp_path, rows)
    result = split_dataset(out, val=0.2)
    assert result.counts == {"train": 64, "val": 16}
    assert result.shares == {("val", "a"): (8, 8.0), ("val", "b"): (8, 8.0)}
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
    split_dataset(out, val=0.5, seed=1)  # replaces the earlier choice
    assert len(read_manifest(out, "val").entries) == 40


def test_shares_that_groups_do_not_allow_are_reported(tmp_path: Path) -> None:
    rows = [(f"a{n}.mp4", f"film{n // 10}", "ok") for n in range(30)] + [(f"b{n}.mp4", "", "ok") for n in range(20)]
    lines = split_dataset(prepared(tmp_path, rows), val=0.2).lines()
    assert lines == [
        "20 of 50 videos have no group, and count as independent; give --groups FILE with the columns path,group, or "
        "--group-regex",
        "36 videos in train, 14 in val; every class is within 4.0 videos of its share",
        "  a: 10 in val, 6.0 requested",
    ]


def recordings(out: Path, count: int = 60, *, group: bool = True) -> Path:
    """Recordings of three clips each, half of class a and half of class b."""
    rows = [
        (f"{'ab'[n % 2]}/rec{n}_{clip}.mp4", f"rec{n}" if group else "", "ok")
        for n in range(count)
        for clip in range(3)
    ]
    return prepared(out, rows)


def groups_by_split(data: Path, splits: tuple[str, ...]) -> dict[str, set[str]]:
    found = {split: {entry.group for entry in read_manifest(data, split).entries} for split in splits}
    assert all("" not in groups for groups in found.values())
    return found


def test_val_and_test_are_set_aside_together(tmp_path: Path) -> None:
    out = recordings(tmp_path)
    result = split_dataset(out, val=0.1, test=0.2)
    assert result.counts == {"train": 126, "val": 18, "test": 36}
    assert result.shares == {
        ("val", "a"): (9, 9.0),
        ("val", "b"): (9, 9.0),
        ("test", "a"): (18, 18.0),
        ("test", "b"): (18, 18.0),
    }
    found = groups_by_split(out, ("train", "val", "test"))
    assert sum(map(len, found.values())) == len(set().union(*found.values())) == 60
    assert split_dataset(out, val=0.5).counts == {"train": 90, "val": 90}  # the test split is back in train


def test_folds_are_lists_with_every_group_in_val_once(tmp_path: Path) -> None:
    out = recordings(tmp_path)
    result = split_dataset(out, folds=5, test=0.2)
    assert [path.name for path in result.folds] == [f"fold-{n}.csv" for n in range(5)]
    assert result.notes == ()
    validated: list[str] = []
    held_out = {entry.name for entry in read_manifest(out, "test").entries}
    for path in result.folds:
        train, val, test = (read_manifest(path, split) for split in ("train", "val", "test"))
        assert (len(train.entries) + len(val.entries), len(test.entries)) == (144, 36)
        assert {entry.name for entry in test.entries} == held_out
        assert train.classes == ("a", "b")
        assert not {entry.group for entry in train.entries} & {entry.group for entry in val.entries}
        assert max(Counter(entry.label for entry in val.entries).values()) <= 18  # of 72 of each class in 5 folds
        assert all(entry.path == out / entry.name for entry in val.entries)
        # Not the fingerprint that dataset.json has for the split of the same name.
        assert train.fingerprint != read_manifest(out, "train").fingerprint
        validated += [entry.name for entry in val.entries]
    assert len(validated) == len(set(validated)) == 144
    split_dataset(out, folds=2)
    assert sorted(path.name for path in out.glob("fold-*")) == ["fold-0.csv", "fold-1.csv"]
    split_dataset(out, val=0.5)
    assert list(out.glob("fold-*")) == []


def test_folds_depend_on_seed_and_names_only() -> None:
    videos = ucf_like()
    first = choose_folds(videos, 5, seed=0)
    assert choose_folds(videos[::-1], 5, seed=0) == first
    assert choose_folds(videos, 5, seed=1) != first
    sizes = Counter((video.label, first[video.group]) for video in videos)
    assert len(sizes) == 12 * 5
    assert max(sizes.values()) - min(sizes.values()) <= 20


def test_a_class_of_few_groups_is_named(tmp_path: Path) -> None:
    rows = [(f"a{n}.mp4", f"r{n}", "ok") for n in range(8)] + [(f"b{n}.mp4", f"s{n}", "ok") for n in range(2)]
    (note,) = split_dataset(prepared(tmp_path, rows), folds=4).notes
    assert note == "1 classes are not in every fold, since they have few groups: 'b'"


def test_without_known_groups_it_says_so_and_takes_them_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = recordings(tmp_path / "out", group=False)
    assert main(["split", str(out), "--val", "0.2"]) == 0
    assert capsys.readouterr().out.startswith(
        "no groups are known: clips of one recording may be in several splits; if there are such, give --groups FILE "
        "with the columns path,group, or --group-regex\n"
    )
    assert (out / "val.csv").read_text().startswith("path,label\n")
    names = [f"{'ab'[n % 2]}/rec{n}_{clip}.mp4" for n in range(60) for clip in range(3)]
    listed = tmp_path / "groups.csv"
    listed.write_text("group,path\n" + "".join(f"{name[2:].rpartition('_')[0]},./{name}\n" for name in names))
    assert main(["split", str(out), "--val", "0.2", "--groups", str(listed)]) == 0
    assert capsys.readouterr().out == "144 videos in train, 36 in val; every class is within 0.0 videos of its share\n"
    found = groups_by_split(out, ("train", "val"))
    assert not found["train"] & found["val"]
    # They are stored: another share and a resumed preparation keep them.
    assert split_dataset(out, val=0.4).notes == ()
    with PreparationState(out) as state:
        state.sync_with_plan(
            PlannedVideo("train", n, name, name[0], f"/raw/{name}", f"videos/train/{name}")
            for n, name in enumerate(names)
        )
    assert split_dataset(out, val=0.4).notes == ()
    # The paths of the prepared files are understood as well.
    listed.write_text("path,group\n" + "".join(f"videos/train/{name},one\n" for name in names[:-1]))
    (note,) = split_dataset(out, val=0.4, groups=GroupRule(listed)).notes[:1]
    assert note == f"--groups {listed}: gives 1 videos no group, such as 'b/rec59_2.mp4'"


@pytest.mark.parametrize("regex", [r"rec\d+", r"(rec\d+)_\d\.mp4$", r"(?:.*/)([^_]+)"])
def test_a_regular_expression_finds_groups_in_paths(tmp_path: Path, regex: str) -> None:
    out = recordings(tmp_path, group=False)
    assert split_dataset(out, val=0.2, groups=GroupRule(regex=regex)).notes == ()
    found = groups_by_split(out, ("train", "val"))
    assert found["train"] | found["val"] == {f"rec{n}" for n in range(60)}
    assert not found["train"] & found["val"]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (GroupRule(regex="["), r"--group-regex \[: is not a regular expression"),
        (GroupRule(regex="take"), r"--group-regex take: gives none of the 12 videos a group; .* like 'a/rec0_0\.mp4'"),
        ("path,group\nother.mp4,g\n", r"groups\.csv: gives none of the 12 videos"),
        ("a/rec0_0.mp4 g\n", r"groups\.csv: needs the header path,group"),
        ("path,label\na/rec0_0.mp4,g\n", r"groups\.csv: needs the header path,group"),
        ("path,group\na.mp4,g\n./a.mp4,h\n", r"groups\.csv, line 3: './a\.mp4' has two groups"),
        ("path,group\n,g\n", r"groups\.csv, line 2: has no path"),
        (None, r"groups\.csv: cannot be read"),
    ],
)
def test_groups_that_cannot_be_used(tmp_path: Path, rule: GroupRule | str | None, words: str) -> None:
    out = recordings(tmp_path / "out", 4, group=False)
    if not isinstance(rule, GroupRule):
        if rule is not None:
            (tmp_path / "groups.csv").write_text(rule)
        rule = GroupRule(tmp_path / "groups.csv")
    with pytest.raises(UsageError, match=words) as caught:
        split_dataset(out, val=0.5, groups=rule)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "give --val SHARE, --test SHARE or --folds K"),
        ({"val": 0.5, "test": 0.5}, "leave nothing for train"),
        ({"val": 0.5, "folds": 2}, "omit --val"),
        ({"folds": 5}, "4 groups, and at most 6 videos of a class, are too few for 5 folds"),
        ({"test": 0.01}, "use a larger --test"),
    ],
)
def test_splits_that_cannot_be_made(tmp_path: Path, options: dict[str, float], words: str) -> None:
    out = recordings(tmp_path, 4)
    with pytest.raises(UsageError, match=words):
        split_dataset(out, **options)  # type: ignore[arg-type]  # its options by name


@pytest.mark.parametrize(
    ("listed", "options", "words"),
    [
        ("val", {"val": 0.5}, "has a val split of its own"),
        ("val", {"folds": 2}, "has a val split of its own"),
        ("test", {"test": 0.5}, "has a test split of its own"),
        ("fold-1", {"folds": 2}, "'fold-1', which is the name of a fold"),
    ],
)
def test_splits_of_the_source_are_kept(tmp_path: Path, listed: str, options: dict[str, float], words: str) -> None:
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(
            PlannedVideo(split, 0, "a.mp4", "a", "/raw/a.mp4", f"videos/{split}/a.mp4") for split in ("train", listed)
        )
    with pytest.raises(UsageError, match=words):
        split_dataset(tmp_path, **options)  # type: ignore[arg-type]  # its options by name


@pytest.mark.parametrize(("share", "words"), [(1.0, "must be between"), (0.01, "less than one video or group")])
def test_invalid_shares(tmp_path: Path, share: float, words: str) -> None:
    out = prepared(tmp_path, [("a1.mp4", "", "ok"), ("a2.mp4", "", "ok")])
    with pytest.raises(UsageError, match=words):
        split_dataset(out, val=share)
