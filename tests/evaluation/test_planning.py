"""What a test decides before it starts: the origins of its videos, and which finished parts it may reuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.state import PlannedVideo, PreparationState
from video_swinv2.data.manifest import Entry, Manifest
from video_swinv2.evaluation.parts import MAX_PARTS, PartFolder
from video_swinv2.evaluation.planning import read_origins


def test_origins_are_those_recorded_by_the_preparation(tmp_path: Path) -> None:
    names = [f"videos/test/a/{name}.mp4" for name in ("one_1", "one_2", "other")]
    manifest = Manifest(tmp_path, "test", ("a",), tuple(Entry(name, tmp_path / name, 0) for name in names), "f")
    assert read_origins(manifest) == ["", "", ""]
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(
            PlannedVideo("test", place, name, "a", f"/from/{place}", target=name, origin=origin)
            for place, (name, origin) in enumerate(zip(names, ("one", "one", ""), strict=True))
        )
    assert read_origins(manifest) == ["one", "one", ""]
    (tmp_path / "prep.sqlite").write_bytes(b"no state" * 200)
    assert read_origins(manifest) == ["", "", ""]


@pytest.mark.parametrize("groups", [1, 2, MAX_PARTS, MAX_PARTS + 1, 20_000])
def test_every_group_is_in_one_part_and_parts_are_not_too_many(tmp_path: Path, groups: int) -> None:
    folder = PartFolder(tmp_path, {"model": "a"}, groups)
    missing = folder.open()
    assert len(missing) == folder.count <= MAX_PARTS
    held = [group for part in missing for group in folder.groups_in(part)]
    assert held == list(range(groups))
    assert all(folder.part_of(group) == part for part in missing for group in folder.groups_in(part))


def test_only_parts_of_the_same_test_are_reused(tmp_path: Path) -> None:
    for identity, left in (({"seed": 0}, 3), ({"seed": 0}, 2), ({"seed": 1}, 3), ({"seed": 0}, 3)):
        folder = PartFolder(tmp_path, identity, 3)
        assert len(folder.open()) == left
        next(tmp_path.glob("shards/*")).joinpath("00001.npz").write_bytes(b"done")
        (tmp_path / "shards" / "stale.npz").write_bytes(b"of an older layout")
    folder.remove()
    assert not (tmp_path / "shards").exists()
