"""Manifests: every layout gives the same videos and labels, and errors name file and line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from video_swinv2.data.manifest import Manifest, class_list_hash, find_splits, read_manifest
from video_swinv2.errors import UsageError, UserError


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def labels(manifest: Manifest) -> list[tuple[str, str | None]]:
    return [(e.name, manifest.classes[e.label] if e.label >= 0 else None) for e in manifest.entries]


@pytest.mark.parametrize("separator", [" ", ",", "\t", ", "])
def test_list_files_with_every_separator_and_awkward_names(tmp_path: Path, separator: str) -> None:
    names = ["a.mp4", "sub dir/b, c.mp4", "-d.mp4", 'it\'s "e".mp4']
    (tmp_path / "val.txt").write_text("".join(f"{n}{separator}{i % 2}\n" for i, n in enumerate(names)) + "\n")
    manifest = read_manifest(tmp_path / "val.txt", "val")
    assert [entry.name for entry in manifest.entries] == names
    assert [entry.label for entry in manifest.entries] == [0, 1, 0, 1]
    assert manifest.classes == ("0", "1")
    assert manifest.entries[1].path == tmp_path / "sub dir" / "b, c.mp4"
    assert manifest.root == tmp_path


def test_folder_of_lists_with_class_names(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("x/a.mp4 1\nx/b.mp4 0\n")
    (tmp_path / "test.txt").write_text("x/c.mp4\nx/d.mp4 -1\n")
    (tmp_path / "classes.txt").write_text("walking\nrunning fast\n")
    assert find_splits(tmp_path) == ("train", "test")
    assert labels(read_manifest(tmp_path, "train")) == [("x/a.mp4", "running fast"), ("x/b.mp4", "walking")]
    assert labels(read_manifest(tmp_path, "test")) == [("x/c.mp4", None), ("x/d.mp4", None)]
    with pytest.raises(UsageError, match="no split 'val'; available: train, test"):
        read_manifest(tmp_path, "val")


def test_bare_lists_named_csv_are_lists(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("clips/a.mp4 3\nclips/b.mp4 0\n")
    (tmp_path / "val.csv").write_text("clips/c.mp4 5\n")
    manifest = read_manifest(tmp_path, "train")
    assert [entry.label for entry in manifest.entries] == [3, 0]
    assert manifest.classes == tuple("012345")  # numbered over all splits, so that train and val agree


def test_index_labels_take_the_class_names_given(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("a.mp4 1\n")
    assert labels(read_manifest(tmp_path, "val", ["walk", "run"])) == [("a.mp4", "run")]
    (tmp_path / "val.txt").write_text("a.mp4 2\n")
    with pytest.raises(UsageError, match=r"val\.txt, line 1: label 2 is out of range for 2 classes"):
        read_manifest(tmp_path, "val", ["walk", "run"])


def test_labels_are_mapped_by_name_to_the_class_order_given(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("a.mp4 0\nb.mp4 1\n")
    (tmp_path / "classes.txt").write_text("run\nwalk\n")
    manifest = read_manifest(tmp_path, "val", ["walk", "jump", "run"])
    assert [entry.label for entry in manifest.entries] == [2, 0]
    assert manifest.classes == ("walk", "jump", "run")


def test_an_unknown_label_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "val.csv").write_text('path,label\na.mp4,walking\n"b, c.mp4",runing\n')
    with pytest.raises(UsageError) as caught:
        read_manifest(tmp_path, "val", ["walking", "running", "standing"])
    assert f"{tmp_path / 'val.csv'}, line 3: label 'runing'" in str(caught.value)
    assert "nearest is 'running'" in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("top", ["", "train/"])
def test_class_folders(tmp_path: Path, top: str) -> None:
    for name in ("run/a.mp4", "run/deep/b.MKV", "walk it/it's.avi", ".hidden/x.mp4", "run/.part.mp4", "run/notes.txt"):
        touch(tmp_path / f"{top}{name}")
    manifest = read_manifest(tmp_path, "train")
    expected = [("run/a.mp4", "run"), ("run/deep/b.MKV", "run"), ("walk it/it's.avi", "walk it")]
    assert labels(manifest) == [(top + name, label) for name, label in expected]
    assert manifest.classes == ("run", "walk it")


def test_class_folders_number_their_classes_over_all_splits(tmp_path: Path) -> None:
    for name in ("train/a/1.mp4", "train/c/2.mp4", "val/b/3.mp4", "val/c/4.mp4"):
        touch(tmp_path / name)
    assert read_manifest(tmp_path, "train").classes == read_manifest(tmp_path, "val").classes == ("a", "b", "c")
    assert [entry.label for entry in read_manifest(tmp_path, "val").entries] == [1, 2]


def test_class_folders_without_splits_are_all_train(tmp_path: Path) -> None:
    touch(tmp_path / "run" / "a.mp4")
    with pytest.raises(UsageError, match="no split 'val'; available: train"):
        read_manifest(tmp_path, "val")


def test_flat_folder_is_unlabelled_and_mixed_folders_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "b.mp4")
    touch(tmp_path / "a.mp4")
    assert labels(read_manifest(tmp_path, "train")) == [("a.mp4", None), ("b.mp4", None)]
    touch(tmp_path / "run" / "c.mp4")
    with pytest.raises(UsageError, match=r"a\.mp4: a video beside class folders"):
        read_manifest(tmp_path, "train")


def test_kinetics_csv_finds_its_files_anywhere(tmp_path: Path) -> None:
    (tmp_path / "k.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "playing guitar,-aU_xCCzkT0,61,71,val,0\n"
        '"massaging person\'s head",_wjbrrLyhIM,6700,6710.0,validate,1\n'
        "abseiling,aaaaaaaaaaa,0,10,train,0\n"
    )
    touch(tmp_path / "val" / "playing_guitar" / "-aU_xCCzkT0_000061_000071.mkv")
    assert find_splits(tmp_path / "k.csv") == ("train", "val")
    manifest = read_manifest(tmp_path / "k.csv", "val")
    assert labels(manifest) == [
        ("val/playing_guitar/-aU_xCCzkT0_000061_000071.mkv", "playing guitar"),
        ("_wjbrrLyhIM_006700_006710.mp4", "massaging person's head"),
    ]
    assert manifest.classes == ("abseiling", "massaging person's head", "playing guitar")
    assert not manifest.entries[1].path.exists()


def test_annotations_beside_another_folder(tmp_path: Path) -> None:
    touch(tmp_path / "clips" / "aaaaaaaaaaa_000000_000010.mp4")
    table = tmp_path / "lists" / "k.csv"
    touch(table, b"label,youtube_id,time_start,time_end,split\nrun,aaaaaaaaaaa,0,10,test\n")
    manifest = read_manifest(tmp_path / "clips", "test", annotations=[table])
    assert manifest.entries[0].path == tmp_path / "clips" / "aaaaaaaaaaa_000000_000010.mp4"
    assert find_splits(tmp_path / "clips", [table]) == ("test",)


def test_several_lists_and_folders_of_lists_are_joined(tmp_path: Path) -> None:
    touch(tmp_path / "lists" / "my_train.txt", b"a.mp4 1\n")
    touch(tmp_path / "lists" / "my-validation.csv", b"b.mp4 0\n")
    touch(tmp_path / "more" / "train.txt", b"label,youtube_id,time_start,time_end\nrun,aaaaaaaaaaa,0,10\n")
    touch(tmp_path / "more" / "train.csv", b"label,youtube_id,time_start,time_end\n")  # .txt wins
    touch(tmp_path / "more" / "classes.txt", b"walk\nrun\n")
    (tmp_path / "clips").mkdir()
    lists = [tmp_path / "lists" / "my_train.txt", tmp_path / "lists" / "my-validation.csv", tmp_path / "more"]
    assert find_splits(tmp_path / "clips", lists) == ("train", "val")
    train = read_manifest(tmp_path / "clips", "train", annotations=lists)
    assert labels(train) == [("a.mp4", "run"), ("aaaaaaaaaaa_000000_000010.mp4", "run")]
    assert labels(read_manifest(tmp_path / "clips", "val", annotations=lists)) == [("b.mp4", "walk")]


def test_lists_in_a_folder_annotations_beside_the_videos(tmp_path: Path) -> None:
    touch(tmp_path / "val" / "aaaaaaaaaaa_000000_000010.mp4")
    header = b"label,youtube_id,time_start,time_end,split\n"
    touch(tmp_path / "annotations" / "validate.csv", header + b"run,aaaaaaaaaaa,0,10,validate\n")
    assert find_splits(tmp_path) == ("val",)
    assert labels(read_manifest(tmp_path, "val")) == [("val/aaaaaaaaaaa_000000_000010.mp4", "run")]


def test_the_copy_in_the_folder_of_the_split_is_preferred(tmp_path: Path) -> None:
    for folder in ("copies", "val"):
        touch(tmp_path / folder / "aaaaaaaaaaa_000000_000010.mp4")
    touch(tmp_path / "val.csv", b"label,youtube_id,time_start,time_end\nrun,aaaaaaaaaaa,0,10\n")
    assert read_manifest(tmp_path, "val").entries[0].name == "val/aaaaaaaaaaa_000000_000010.mp4"


def test_a_column_of_splits_has_no_gaps(tmp_path: Path) -> None:
    touch(tmp_path / "k.csv", b"path,label,split\na.mp4,run,train\nb.mp4,run,\n")
    with pytest.raises(UsageError, match="some lines have a split and some do not"):
        find_splits(tmp_path / "k.csv")


def test_official_kinetics_lists(outside_data: Path) -> None:
    folder = outside_data / "kinetics"
    manifest = read_manifest(folder / "kinetics-400_val.csv", "val")
    assert len(manifest.entries) == 19_906
    assert list(manifest.classes) == (folder / "k400_classes.txt").read_text().splitlines()
    unlabelled = read_manifest(folder / "kinetics-400_test.csv", "test")
    assert {entry.label for entry in unlabelled.entries} == {-1}


def test_real_lists(outside_data: Path) -> None:
    counts = {s: len(read_manifest(outside_data / "ut_interaction", s).entries) for s in ("train", "val", "test")}
    assert counts == {"train": 84, "val": 12, "test": 24}
    manifest = read_manifest(outside_data / "ut_interaction", "test")
    assert all(
        entry.path.is_file() and entry.name.startswith(manifest.classes[entry.label]) for entry in manifest.entries
    )


def test_fingerprint_follows_order_labels_and_bytes(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4", b"123")
    lists = tmp_path / "val.txt"
    seen = set()
    for text, content in [("a.mp4 0\nb.mp4 1\n", b"1"), ("b.mp4 1\na.mp4 0\n", b"1"), ("a.mp4 1\nb.mp4 1\n", b"1")]:
        touch(tmp_path / "b.mp4", content)
        lists.write_text(text)
        seen.add(read_manifest(lists, "val").fingerprint)
        assert read_manifest(lists, "val").fingerprint in seen
    touch(tmp_path / "b.mp4", b"22")
    seen.add(read_manifest(lists, "val").fingerprint)
    assert len(seen) == 4


def test_prepared_fingerprint_is_the_recorded_one_until_the_list_is_edited(tmp_path: Path) -> None:
    touch(tmp_path / "videos" / "test" / "a.mp4")
    table = tmp_path / "test.csv"
    table.write_text("path,label\nvideos/test/a.mp4,run\n")
    split = {"fingerprint": "f" * 64, "list_sha256": hashlib.sha256(table.read_bytes()).hexdigest()}
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["walk", "run"], "splits": {"test": split}}))
    manifest = read_manifest(tmp_path, "test")
    assert (manifest.classes, manifest.entries[0].label, manifest.fingerprint) == (("walk", "run"), 1, "f" * 64)
    table.write_text("path,label\nvideos/test/a.mp4,walk\n")
    assert read_manifest(tmp_path, "test").fingerprint != "f" * 64


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("val.txt", b"a.mp4 0\na.mp4 1\n", r"val\.txt, line 2: 'a\.mp4' is listed twice \(first in .*line 1\)"),
        ("val.txt", b"\n", "no videos for split 'val'"),
        ("val.txt", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("val.csv", b"path,label\na,b,c.mp4,run\n", r"val\.csv, line 2: too many fields"),
        ("val.csv", b"label,youtube_id,time_start,time_end\nrun,abc,x,2\n", "line 2: time_start and time_end"),
        ("dataset.json", b"{", r"dataset\.json"),
        ("classes.txt", b"a\na\n", r"no split 'val'"),
    ],
)
def test_errors_name_the_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    touch(tmp_path / name, content)
    if name == "dataset.json":
        touch(tmp_path / "val.csv", b"path,label\na.mp4,run\n")
    with pytest.raises(UserError, match=words) as caught:
        read_manifest(tmp_path, "val")
    assert "\n" not in str(caught.value)


def test_repeated_class_names_are_refused(tmp_path: Path) -> None:
    touch(tmp_path / "val.txt", b"a.mp4 0\n")
    touch(tmp_path / "classes.txt", b"run\nrun\n")
    with pytest.raises(UsageError, match="class 'run' is listed twice"):
        read_manifest(tmp_path, "val")


def test_absent_source(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such data set"):
        read_manifest(tmp_path / "nowhere", "val")


def test_class_list_hash_depends_on_the_order() -> None:
    assert class_list_hash(["a", "b"]) != class_list_hash(["b", "a"])
    assert class_list_hash(["a", "b"]) == hashlib.sha256(b"a\nb").hexdigest()


def test_a_prepared_split_records_how_many_videos_failed(tmp_path: Path) -> None:
    listing = "path,label\nvideos/a.mp4,one\n"
    (tmp_path / "test.csv").write_text(listing)
    digest = hashlib.sha256(listing.encode()).hexdigest()
    split = {"listed": 4, "ok": 1, "failed": 3, "fingerprint": "f" * 64, "list_sha256": digest}
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["one"], "splits": {"test": split}}))
    manifest = read_manifest(tmp_path, "test")
    assert (manifest.failed_in_preparation, manifest.fingerprint) == (3, "f" * 64)
    (tmp_path / "test.csv").write_text(listing + "videos/b.mp4,one\n")
    assert read_manifest(tmp_path, "test").failed_in_preparation == 0, "the list was edited since"
