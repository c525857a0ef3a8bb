"""What a folder means: splits or classes, links, and what cannot be read; the same for images and videos."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data_prep.sources import plan_preparation
from tests.conftest import REPOSITORY
from video_swinv2.config import DataConfig
from video_swinv2.data.media import IMAGE, VIDEO
from video_swinv2.data.sources import labelled_manifest, unlabelled_mixture
from video_swinv2.data.trees import SPLIT_SYNONYMS, TopLevel, find_split, split_folders, videos_below
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.splits import available_splits
from video_swinv2.inference.media_types import find_media_files

SUFFIXES = {"images": ".png", "videos": ".mp4"}


def tree(root: Path, kind: str, names: str) -> Path:
    """A tree with one sample for each path in `names`, which are given without suffixes; `a/` is an empty folder."""
    for name in names.split():
        path = root / f"{name}{SUFFIXES[kind]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            (root / name).mkdir(exist_ok=True)
        elif kind == "images":
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_bytes(b"")  # trees are read without opening a video
    return root


def data(root: Path) -> DataConfig:
    return DataConfig(source=str(root), image_size=32)


def meaning(root: Path, split: str) -> list[tuple[str, str]]:
    """The name and the class of each sample of a split, as training reads them."""
    manifest = labelled_manifest(data(root), split)
    return [(os.path.splitext(entry.name)[0], manifest.classes[entry.label]) for entry in manifest.entries]


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize(
    "train, val, test",
    [
        ("train", "val", "test"),
        ("train", "valid", "testing"),
        ("train", "validation", "test"),
        ("Train", "Val", "TEST"),
        ("training", "validation", "testing"),
        ("train_256", "val_256", "test_256"),
        ("videos_train", "videos_val", "videos_test"),
        ("imagenet-train", "imagenet-valid", "imagenet-test"),
        ("train2017", "val2017", "test2017"),
        ("trainVideos", "valVideos", "testVideos"),
        ("UCFTrain", "UCFVal", "UCFTest"),
        ("train", "val_320", "test-full"),
    ],
)
def test_split_folders_by_any_usual_name(tmp_path, kind, train, val, test):
    root = tree(tmp_path / "raw", kind, f"{train}/a/1 {train}/b/2 {val}/a/3 {val}/b/4 {test}/b/5 notes/")
    assert meaning(root, "train") == [(f"{train}/a/1", "a"), (f"{train}/b/2", "b")]
    assert meaning(root, "val") == [(f"{val}/a/3", "a"), (f"{val}/b/4", "b")]
    assert meaning(root, "test") == [(f"{test}/b/5", "b")]
    if kind == "videos":
        planned = [(video.split, video.label, video.target) for video in plan_preparation(root).videos]
        assert planned == [
            ("train", "a", "videos/train/a/1.mp4"),
            ("train", "b", "videos/train/b/2.mp4"),
            ("val", "a", "videos/val/a/3.mp4"),
            ("val", "b", "videos/val/b/4.mp4"),
            ("test", "b", "videos/test/b/5.mp4"),
        ]


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize(
    "names, classes",
    [
        ("train/1 bus/2 tram/3", ["bus", "train", "tram"]),  # vehicles
        ("test/1 run/2", ["run", "test"]),
        ("training~dog/1 test~driving/2 bowling/3", ["bowling", "test~driving", "training~dog"]),
        ("training~dog/1 test~driving/2", ["test~driving", "training~dog"]),
        ("train_station/1", ["train_station"]),
        ("valley/1 trainer/2 testifying/3", ["testifying", "trainer", "valley"]),  # no whole word
        ("eval/1 dev/2", ["dev", "eval"]),  # not beside a split
    ],
)
def test_class_folders_named_like_splits(tmp_path, kind, names, classes):
    root = tree(tmp_path / "raw", kind, names)
    assert list(labelled_manifest(data(root), "all" if kind == "images" else "train").classes) == classes


@pytest.mark.parametrize("kind", ["images", "videos"])
@pytest.mark.parametrize(
    "names, fault",
    [
        ("train/a/1 val/a/2 more/a/3", r"more: KIND outside the split folders \(train and val\)"),
        ("train/a/1 extra/a/2", r"extra: KIND outside the split folders \(train\)"),
        ("train/a/1 eval/a/2", r"eval: KIND outside the split folders \(train\)"),
        ("train/1 dev/2", r"dev: KIND outside the split folders \(train\)"),
        ("train_256/a/1 eval_256/a/2", r"eval_256: KIND outside the split folders \(train_256\)"),
        ("train/a/1 val/a/2 train_val/a/3", r"train_val: KIND outside the split folders"),
        ("val/1 a/2 b/3", r"a: KIND outside the split folders \(val\)"),
        ("train/a/1 val/a/2 3", r"3\.\w+: KIND outside the split folders \(train and val\)"),
        ("train/a/1 val/a/2 validation/a/3", "validation: is a second folder for the split val, after val"),
        ("train_256/a/1 train_320/a/1 val_256/a/2", "train_320: is a second folder for the split train, after"),
        ("Train/a/1 train/a/2", "train: is a second folder for the split train, after Train"),
        ("train/a/1 val/", "raw: its val folder holds no KIND; fill it or remove it"),
        ("train/a/1 val/a/2 Testing/b/", "raw: its Testing folder holds no KIND"),
        ("train/a/1 train/b/ val/a/2", "train/b: a class folder without KIND; fill it or remove it"),
        ("train/a/1 val/a/2 val/b/", "val/b: a class folder without KIND; fill it or remove it"),
        ("a/1 b/", "raw/b: a class folder without KIND; fill it or remove it"),
        ("a/1 b/deep/", "raw/b: a class folder without KIND; fill it or remove it"),
    ],
)
def test_what_is_not_understood_is_refused_by_every_verb(tmp_path, kind, names, fault):
    root = tree(tmp_path / "raw", kind, names)
    fault = fault.replace("KIND", kind)
    readers = [lambda: labelled_manifest(data(root), "train"), lambda: unlabelled_mixture(data(root), False)]
    for read in [*readers, *([lambda: plan_preparation(root)] if kind == "videos" else [])]:
        with pytest.raises(UsageError, match=fault):
            read()


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_the_documentation_has_the_right_examples(tmp_path, kind):
    text = (REPOSITORY / "docs" / "data-formats.md").read_text(encoding="utf-8")

    def table(header: str) -> list[list[str]]:
        lines = text.partition(f"| {header} |\n")[2].partition("\n\n")[0].splitlines()[1:]
        return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]

    understood, refused = table("files | splits | classes"), table("files | why")
    assert (len(understood), len(refused)) == (11, 8)
    for number, (files, splits, classes) in enumerate(understood):
        root = tree(tmp_path / str(number), kind, files.strip("`"))
        found = list(available_splits(root))
        assert found == splits.replace(" (no labels)", "").split(", ") or (found, splits) == (["all"], "train")
        if classes != "none":
            assert ", ".join(labelled_manifest(data(root), "train").classes) == classes
    for number, (files, _) in enumerate(refused):
        root = tree(tmp_path / f"refused-{number}", kind, files.strip("`"))
        with pytest.raises(UsageError):
            labelled_manifest(data(root), "train")
    for word in ("train", "val", "test", *SPLIT_SYNONYMS):
        assert f"`{word}`" in text


def test_an_unlabelled_split_may_hold_empty_folders(tmp_path):
    root = tree(tmp_path / "raw", "images", "train/a/1 test/2 test/sub/")
    assert meaning(root, "train") == [("train/a/1", "a")]
    root = tree(tmp_path / "flat", "videos", "1 2 sub/")
    assert [video.name for video in plan_preparation(root).videos] == ["1.mp4", "2.mp4"]


def test_the_word_for_a_split_and_its_affix():
    assert find_split("ILSVRC2012_img_train") == ("train", "ilsvrc2012img")
    assert find_split("videosVal") == ("val", "videos")
    assert find_split("train-val") == ("unclear", "")
    assert find_split("k400_eval") == ("unclear", "k400")
    assert find_split("valley") is None
    assert split_folders(Path("root"), TopLevel([], ["Train"], ["notes"]), "videos") == {"Train": "train"}


def test_a_prepared_data_set_beside_the_splits_is_no_class_folder(tmp_path):
    root = tree(tmp_path / "raw", "videos", "train/a/1 val/a/2 made/videos/train/a/1")
    (root / "made" / "dataset.json").write_text("{}")
    assert [video.split for video in plan_preparation(root).videos] == ["train", "val"]


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    for kind in SUFFIXES:
        root = tree(tmp_path / kind, kind, "train/a/1 train/b/2 val/a/3")
        (root / "train" / "a" / "loop").symlink_to("..")
        (root / "train" / "b" / "root").symlink_to(root)  # val must not become a part of train
        (root / "train" / "b" / "self").symlink_to(".")
        assert meaning(root, "train") == [("train/a/1", "a"), ("train/b/2", "b")]
        assert meaning(root, "val") == [("val/a/3", "a")]
    assert len(plan_preparation(tmp_path / "videos").videos) == 3
    assert [path.name for path, _ in find_media_files([tmp_path / "images"], IMAGE)] == ["1.png", "2.png", "3.png"]


def test_linked_class_folders_are_followed_by_every_verb(tmp_path):
    for kind, media_type in (("images", IMAGE), ("videos", VIDEO)):
        elsewhere = tree(tmp_path / f"disk-{kind}", kind, "1 2")
        root = tree(tmp_path / kind, kind, "b/3")
        (root / "a").symlink_to(elsewhere)
        found = [path.relative_to(root).as_posix() for path, _ in find_media_files([root], media_type)]
        assert [os.path.splitext(name)[0] for name in found] == ["a/1", "a/2", "b/3"]
        assert len(labelled_manifest(data(root), "all" if kind == "images" else "train").entries) == 3


def test_what_cannot_be_read_is_named_by_every_verb(tmp_path):
    """Links, because file permissions do not stop root."""
    for target, fault in (("gone", "is a link that leads nowhere"), ("b", "Too many levels of symbolic links")):
        for kind, media_type in (("images", IMAGE), ("videos", VIDEO)):
            root = tree(tmp_path / f"{kind}-{target}", kind, "a/1")
            (root / "b").symlink_to(target)
            for read in (
                lambda root=root: labelled_manifest(data(root), "train"),
                lambda root=root: plan_preparation(root),
                lambda root=root, media_type=media_type: find_media_files([root], media_type),
            ):
                with pytest.raises(UserError, match=rf"{root}/b: .*{fault}"):
                    read()


def test_a_sample_that_is_gone_is_listed(tmp_path):
    root = tree(tmp_path / "raw", "videos", "a/1")
    (root / "a" / "2.mp4").symlink_to("gone.mp4")
    os.mkfifo(root / "a" / "3.mp4")  # neither a file nor a folder; opening it would wait for ever
    assert videos_below(root) == ["a/1.mp4", "a/2.mp4"]
    assert [path.name for path, _ in find_media_files([root], VIDEO)] == ["1.mp4", "2.mp4"]


def test_prepare_tells_the_user(tmp_path):
    root = tree(tmp_path / "raw", "videos", "train/a/1 eval/a/2")
    command = [sys.executable, "-m", "data_prep", "prepare", str(root), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "raw/eval: videos outside the split folders (train)" in done.stderr
