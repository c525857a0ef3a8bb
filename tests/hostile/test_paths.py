"""Nothing outside OUT is written, replaced or deleted, whatever lists, states and records say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from video_swinv2.data.manifest import read_manifest
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.parts import FOLDER, PartFolder
from video_swinv2.files import path_under

OUTSIDE = ["/etc/passwd", "//etc", "..", "../x", "a/../../x", "a/..", "a/../b", "", ".", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_that_leaves_its_root_is_refused_in_one_line_that_names_the_file_and_the_path(tmp_path, name):
    with pytest.raises(UserError) as refused:
        path_under(tmp_path, name, "list.csv, line 3")
    assert str(refused.value).startswith("list.csv, line 3: ")
    assert repr(name) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a", "a/b.mp4", "./a", "a..b", "..a", "a/.b", "no such folder/file", "x\ny"])
def test_a_path_inside_its_root_is_returned(tmp_path, name):
    assert path_under(tmp_path, name, "list") == tmp_path / name


def test_a_link_that_leads_out_is_refused_and_one_that_stays_inside_is_not(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "inside").mkdir(parents=True)
    outside.mkdir()
    (root / "out").symlink_to(outside)
    (root / "nowhere").symlink_to(tmp_path / "root2")  # a prefix of its name is that of the root
    (root / "up").symlink_to("..")
    (root / "in").symlink_to("inside")
    for name in ("out/a", "out", "nowhere", "nowhere/a", "up", "up/outside/a", "in/../out/a"):
        with pytest.raises(UserError, match=r"^state: "):
            path_under(root, name, "state")
    assert path_under(root, "in/a", "state") == root / "in/a"


def test_the_root_may_itself_be_reached_through_a_link(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "root").symlink_to("disk")
    assert path_under(tmp_path / "root", "a/b", "list") == tmp_path / "root/a/b"
    monkeypatch.chdir(tmp_path)  # a relative root is one as well
    assert path_under(Path("root"), "a", "list") == Path("root/a")


def contents(folder: Path) -> dict[str, str]:
    """What every path below a folder is: the hash of a file, the target of a link, or a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"-> {path.readlink()}"
        else:
            found[str(path)] = "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder beside OUT that nothing may change, with names that attacks below aim at."""
    folder = tmp_path / "outside"
    for name in ("a.mp4", "x.csv", "train.csv", ".a.mp4.0123abcd.part", "train/a/b.mp4", "shards/0-of-1.sqlite"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"precious {name}")
    before = contents(folder)
    yield folder
    assert contents(folder) == before


@pytest.fixture
def source(write_video: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder of two classes with a short video each."""
    for name in ("a/1.mp4", "b/2.mp4"):
        write_video(tmp_path / "raw" / name, np.zeros((4, 32, 32, 3), dtype=np.uint8))
    return tmp_path / "raw"


def prepare(source: Path, out: Path, *options: object) -> int:
    """Run the verb in this process. Anything but a UserError is raised."""
    return main(["prepare", str(source), str(out), "--short-side", "32", "--workers", "1", *map(str, options)])


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> None:
    """The exit code is that of an error, and the only line about it has all the words."""
    told = capsys.readouterr().err
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code in (1, 2)
    assert "Traceback" not in told
    assert len(errors) == 1, told
    for word in words:
        assert word in errors[0]


SPLITS = [
    "{outside}/x",
    "../outside/x",
    "../../x",
    "..",
    ".",
    "a/b",
    "a\x1b[2Jb",
    "n" * 300,
    "failed",
    "-",
    ".b",
]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("header", ["path,label,split", "youtube_id,time_start,time_end,label,split"])
def test_a_split_that_is_no_name_is_refused_with_its_line(
    source: Path, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, header: str
) -> None:
    """In every kind of list that has the column, before anything is written."""
    split = split.format(outside=outside)
    rows = [
        f"a/1.mp4,a,{name}" if header.startswith("path") else f"abcdefghijk,0,1,a,{name}" for name in ("train", split)
    ]
    (tmp_path / "list.csv").write_text("\n".join([header, *rows]) + "\n")
    before = contents(tmp_path)
    code = prepare(source, tmp_path / "out", "--annotations", tmp_path / "list.csv")
    refused(capsys, code, f"{tmp_path}/list.csv, line 3: ", "cannot be the name of a split; use up to 40 letters")
    with pytest.raises(UsageError, match="cannot be the name of a split"):
        read_manifest(tmp_path / "list.csv", "train")
    assert contents(tmp_path) == before


def test_splits_with_other_names_are_prepared_as_before(source: Path, tmp_path: Path) -> None:
    """In any alphabet, with blanks, dots and dashes."""
    names = ["test-1.b", "Prüfung 2"]
    (tmp_path / "list.csv").write_text(f"path,label,split\na/1.mp4,a,{names[0]}\nb/2.mp4,b,{names[1]}\n")
    out = tmp_path / "out"
    assert prepare(source, out, "--annotations", tmp_path / "list.csv") == 0
    for name, path in zip(names, ("a/1", "b/2"), strict=True):
        assert (out / f"{name}.csv").read_text() == f"path,label\nvideos/{name}/{path}.mp4,{path[0]}\n"


LINKS = {
    "videos": "",
    "videos/train": "train",
    "videos/train/a": "",
    "prep.sqlite": "x.csv",
    ".prep.lock": "lock",
    "shards": "shards",
    ".preflight": "train",
    "train.csv": "train.csv",
    ".train.csv.part": "train.csv",
    "dataset.json": "x.csv",
}


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_or_deleted_through_a_link_in_out(
    source: Path, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A link that a rename or an unlink replaces does no harm. Any other is refused, and named."""
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside / LINKS[name])
    options = {"shards": ["--shard", "0/1"], ".preflight": ["--preflight"]}.get(name, [])
    code = prepare(source, tmp_path / "out", *options)
    if name in (".train.csv.part", "dataset.json"):
        assert code == 0
        assert not link.is_symlink()
    else:
        refused(capsys, code, f"{tmp_path}/out", "symbolic link", name.rpartition("/")[2])


def test_out_itself_may_be_a_link(source: Path, tmp_path: Path) -> None:
    """To another disk, for instance."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert prepare(source, tmp_path / "out") == 0
    assert (tmp_path / "disk" / "videos" / "train" / "a" / "1.mp4").is_file()
    assert main(["verify", str(tmp_path / "out"), "--workers", "1"]) == 0


def test_synth_and_verify_follow_no_link_out(outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both write files of their own into OUT."""
    arguments = ["--train", "1", "--val", "0", "--test", "0", "--size", "32", "--frames", "2", "--workers", "1"]
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "videos").symlink_to(outside)
    refused(capsys, main(["synth", str(tmp_path / "linked"), *arguments]), "videos/train", "symbolic link")
    out = tmp_path / "out"
    part = out / "videos" / "train" / "left" / ".00000.mp4.part"
    part.parent.mkdir(parents=True)
    part.symlink_to(outside / "a.mp4")
    assert main(["synth", str(out), *arguments]) == 0
    (out / "verify.sqlite").symlink_to(outside / "x.csv")
    refused(capsys, main(["verify", str(out), "--workers", "1"]), "verify.sqlite", "symbolic link")


def test_a_list_edited_to_name_files_elsewhere_harms_none_of_them(
    source: Path, outside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a list may be read. Verifying and preparing again write and delete below OUT only."""
    out = tmp_path / "out"
    assert prepare(source, out) == 0
    (out / "train.csv").write_text(f"path,label\n../outside/a.mp4,a\n{outside}/train/a/b.mp4,b\n")
    assert main(["verify", str(out), "--workers", "1"]) == 1
    assert "2 files checked (hash), 3 bad" in capsys.readouterr().out
    assert prepare(source, out) == 0
    assert main(["verify", str(out), "--workers", "1"]) == 0


def test_the_parts_of_a_test_are_not_in_a_folder_elsewhere(outside: Path, tmp_path: Path) -> None:
    """What other tests left beside them is deleted."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FOLDER).symlink_to(outside)
    with pytest.raises(UserError, match=r"leads out of .* symbolic link"):
        PartFolder(tmp_path / "out", {"seed": 0}, 3).open()
