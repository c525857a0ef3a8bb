"""What a test decides before it starts: the origins of its videos, and which finished parts it may reuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from video_swinv2.data.manifest import read_manifest
from video_swinv2.evaluation.parts import MAX_PARTS, PartFolder
from video_swinv2.evaluation.planning import read_origins


def test_origins_are_the_groups_of_the_list_or_of_the_names(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("path,label,group\n1.mp4,a,one\n2.mp4,a,one\nv_a_g01_c02.avi,a,\n3.mp4,a,\n")
    assert read_origins(read_manifest(tmp_path, "test")) == ["one", "one", "a_g01", ""]


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
