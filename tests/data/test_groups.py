"""Groups: read from every form of list, known by the names of public data sets, and told if two splits share one."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.sources import plan_preparation
from video_swinv2.config import DataConfig
from video_swinv2.data.manifest import read_manifest
from video_swinv2.data.sources import labelled_manifest
from video_swinv2.evaluation.splits import read_labelled_split

LISTS = {
    "commas": "path,label,group\na.mp4,run,room 1\nb.mp4,walk,room 2\n",
    "another order and name": "Group ID;label;path\nroom 1;run;a.mp4\nroom 2;walk;b.mp4\n",
    "blanks": 'path label group\na.mp4 run "room 1"\nb.mp4 walk "room 2"\n',
    "no labels": "path\tgroup\na.mp4\troom 1\nb.mp4\troom 2\n",
    "with splits": "path,label,split,group\na.mp4,run,train,room 1\nb.mp4,walk,train,room 2\nc.mp4,run,val,room 3\n",
    "Kinetics": (
        "label,youtube_id,time_start,time_end,group\nrun,-aU_xCCzkT0,1,11,room 1\nwalk,-aU_xCCzkT0,21,31,room 2\n"
    ),
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS.keys())
def test_every_list_with_a_header_has_groups(tmp_path: Path, text: str) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text(text)
    assert [entry.group for entry in read_manifest(listed, "train").entries] == ["room 1", "room 2"]
    planned = [video for video in plan_preparation(listed).videos if video.split == "train"]
    assert [video.group for video in planned] == ["room 1", "room 2"]


def test_a_group_of_the_list_takes_precedence_over_the_name(tmp_path: Path) -> None:
    names = [
        "v_Run_g01_c01.avi",
        "v_Run_g01_c02.avi",
        "Film_(1)_run_u_cm_np1_fr_med_0.avi",
        "-aU_xCCzkT0_000001_000011.mp4",
    ]
    (tmp_path / "train.csv").write_text("path,label,group\n" + "".join(f"{name},run,\n" for name in names))
    found = [entry.group for entry in read_manifest(tmp_path, "train").entries]
    assert found == ["Run_g01", "Run_g01", "Film_(1)", "-aU_xCCzkT0"]
    (tmp_path / "train.csv").write_text("path,label,group\n" + "".join(f"{name},run,mine\n" for name in names))
    assert {entry.group for entry in read_manifest(tmp_path, "train").entries} == {"mine"}


def split_lists(folder: Path, **groups: str) -> Path:
    """A list per split with one video for each letter, which is its group."""
    folder.mkdir()
    for split, letters in groups.items():
        lines = "".join(f"{split}/{n}.mp4,run,{letter}\n" for n, letter in enumerate(letters))
        (folder / f"{split}.csv").write_text(f"path,label,group\n{lines}")
        (folder / split).mkdir()
        for n in range(len(letters)):
            (folder / split / f"{n}.mp4").write_bytes(b"x")
    return folder


def test_groups_that_train_shares_with_another_split_are_told(tmp_path: Path) -> None:
    data = split_lists(tmp_path / "leak", train="aabcd", val="dec", test="ee")
    config = DataConfig(source=str(data), image_size=32)
    (note,) = labelled_manifest(config, "train").notes
    assert note.startswith("2 groups are in both train and val, such as 'c'")
    assert labelled_manifest(config, "val", ("run",)).notes == ()
    assert read_labelled_split(data, "val", ("run",)).notes == (note,)
    assert read_labelled_split(data, "test", ("run",)).notes == ()
    clean = split_lists(tmp_path / "clean", train="ab", val="c", test="d")
    assert labelled_manifest(DataConfig(source=str(clean), image_size=32), "train").notes == ()


def test_videos_of_unknown_group_and_lists_without_splits_share_nothing(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.csv").write_text(f"path,label,group\n{split}1.mp4,run,\n{split}2.mp4,run,{split}\n")
    assert read_labelled_split(tmp_path, "val", ("run",)).notes == ()
    # A list that is not divided serves as every split.
    listed = tmp_path / "all.csv"
    listed.write_text("path,label,group\na.mp4,run,g\n")
    assert read_labelled_split(listed, "test", ("run",)).notes == ()


def test_names_tell_of_shared_recordings_too(tmp_path: Path) -> None:
    for split, clip in (("train", "c01"), ("test", "c02")):
        (tmp_path / f"{split}.txt").write_text(f"v_Run_g01_{clip}.avi Run\n")
    (note,) = read_labelled_split(tmp_path, "test", ("Run",)).notes
    assert note.startswith("1 groups are in both train and test, such as 'Run_g01'")
