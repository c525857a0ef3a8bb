"""Lists: every form that is understood, with what it means, and every form that is refused, with what is said.

Each form is read in both ways that the project has: `read_manifest`, for training, tests and probes, and
`plan_preparation`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.sources import plan_preparation
from tests.conftest import REPOSITORY
from video_swinv2.config import DataConfig
from video_swinv2.data.manifest import class_list_hash, read_manifest
from video_swinv2.data.rows import COLUMN_NAMES
from video_swinv2.data.sources import labelled_manifest
from video_swinv2.errors import UsageError

Videos = dict[str, str | None]
NAMES = ["walk", "run", "jump"]
IDS = ["0", "1", "2"]

# What a list means: path -> class. With `NAMES` there is a classes.txt, with None there is none.
FORMS: list[tuple[str, str, list[str] | None, Videos]] = [
    ("blanks", "a.mp4 0\nsub dir/b, c.mp4   2\n", None, {"a.mp4": "0", "sub dir/b, c.mp4": "2"}),
    ("commas", "a.mp4,0\nb.mp4 , 2\n", None, {"a.mp4": "0", "b.mp4": "2"}),
    ("semicolons", "a.mp4;0\nb.mp4; 2\n", None, {"a.mp4": "0", "b.mp4": "2"}),
    ("tabs", "a.mp4\t0\nb c.mp4\t2\n", None, {"a.mp4": "0", "b c.mp4": "2"}),
    ("paths only", "a.mp4\nb c.mp4\n", None, {"a.mp4": None, "b c.mp4": None}),
    ("no label", "a.mp4 -1\nb.mp4 1\n", None, {"a.mp4": None, "b.mp4": "1"}),
    ("quotes", '"a b.mp4" 0\n\'c.mp4\' 1\n"d ""e"".mp4",2\n', None, {"a b.mp4": "0", "c.mp4": "1", 'd "e".mp4': "2"}),
    ("quotes within names", 'it\'s "e".mp4 0\nb".mp4 1\n', None, {'it\'s "e".mp4': "0", 'b".mp4': "1"}),
    ("decimals", "a.mp4 0.0\nb.mp4,2.0\n", None, {"a.mp4": "0", "b.mp4": "2"}),
    ("comments", "# my list\na.mp4 0\n  #b.mp4 1\n./#c.mp4 1\n\n", None, {"a.mp4": "0", "#c.mp4": "1"}),
    ("no suffix", "a 0\nb c,1\n", None, {"a": "0", "b c": "1"}),
    ("suffix twice", "a.mp4 (copy).MP4 1\n", None, {"a.mp4 (copy).MP4": "1"}),
    ("Windows", "\ufeffa.mp4 0\r\nb.mp4 1\r\n", None, {"a.mp4": "0", "b.mp4": "1"}),
    ("old Macintosh", "a.mp4 0\rb.mp4 1\r", None, {"a.mp4": "0", "b.mp4": "1"}),
    ("names", "a.mp4 run\nb.mp4, go \nc.mp4\tlong jump\n", None, {"a.mp4": "run", "b.mp4": "go", "c.mp4": "long jump"}),
    ("quoted names", 'a.mp4,"run, fast"\nb.mp4 "walk slowly"\n', None, {"a.mp4": "run, fast", "b.mp4": "walk slowly"}),
    ("names in a list of ids", "a.mp4 1\nb.mp4 jump\n", NAMES, {"a.mp4": "run", "b.mp4": "jump"}),
    ("classes called by numbers", "a 10\nb 007\nc 1.0\n", ["1.0", "007", "10"], {"a": "10", "b": "007", "c": "1.0"}),
    ("leading zeros", "a.mp4 00\nb.mp4 10\n", None, {"a.mp4": "0", "b.mp4": "10"}),
    ("header", "path,label\na.mp4,run\n\"b, c.mp4\",walk\n", None, {"a.mp4": "run", "b, c.mp4": "walk"}),
    ("header with blanks", "path, label\na.mp4, run \nb.mp4,run\n", None, {"a.mp4": "run", "b.mp4": "run"}),
    ("header in capitals", "Path,Label\na.mp4,run\n", None, {"a.mp4": "run"}),
    ("header video,label", "video,label\na.mp4,run\n", None, {"a.mp4": "run"}),
    ("header in words", "Video_Path;Class Name\na.mp4;run\n", None, {"a.mp4": "run"}),
    ("header with tabs", "# from a sheet\nlabel\tpath\nrun\ta b.mp4\n", None, {"a b.mp4": "run"}),
    ("header between blanks", 'path label\na.mp4  run \n"b c.mp4" walk\n', None, {"a.mp4": "run", "b c.mp4": "walk"}),
    ("header, quoted", '"path" ,"label"\n"a.mp4" , "run"\n', None, {"a.mp4": "run"}),
    ("header, more columns", "id,path,fps,label\n7,a.mp4,25,run\n", None, {"a.mp4": "run"}),
    ("header and ids", "path,label\na.mp4,1.0\nb.mp4,\nc.mp4,10\n", None, {"a.mp4": "1", "b.mp4": None, "c.mp4": "10"}),
    ("header and ids of classes", "path,label\na.mp4,2\nb.mp4,walk\n", NAMES, {"a.mp4": "jump", "b.mp4": "walk"}),
    ("empty rows", "\n \npath,label\n  \na.mp4,run\n , \n,\n", None, {"a.mp4": "run"}),
    ("header of one column", "path\na.mp4\n", None, {"a.mp4": None}),
    ("strange spaces", "a\u2028b\x85c\x0bd\xa0e.mp4 1\n", None, {"a\u2028b\x85c\x0bd\xa0e.mp4": "1"}),
    ("strange spaces, header", "path,label\na\u2028\x85b.mp4,r\x0bn\n", None, {"a\u2028\x85b.mp4": "r\x0bn"}),
    ("detours", "./a.mp4 0\nb//c/../d.mp4 1\n", None, {"a.mp4": "0", "b/d.mp4": "1"}),
]  # fmt: skip
# What is refused, and what is said about it after the path of the list.
REFUSALS = [
    ("folders of frames", "a.mp4 0\nframes/a 300 1\n", r", line 2: 2 numbers after 'frames/a', but one label is"),
    ("several labels", "a.mp4 0 3\n", r", line 1: 2 numbers after 'a\.mp4', but one label is wanted"),
    ("several labels, commas", "a.mp4,0,3\n", r", line 1: 2 numbers after 'a\.mp4', but one label is wanted"),
    ("more fields", "a.mp4,run,train\n", r", line 1: too many fields; quote names that contain commas"),
    ("more fields than columns", "path,label\na.mp4,run,fast\n", r", line 2: too many fields; quote names"),
    ("an unknown header", "name,kind\na.mp4,run\n", r", line 1: 'name,kind' is neither .*,label\[,split\]\[,group\]$"),
    ("an unknown header, quoted", '"name","label"\n"a.mp4","run"\n', r", line 1: .* is neither a video nor a header"),
    ("an unknown header of one column", "clip\na.mp4\n", r", line 1: 'clip' is neither a video nor a header"),
    ("a header without paths", "# clips\nlabel;group\nrun;g1\n", r", line 2: 'label;group' is neither a video nor a"),
    ("no column of labels", "path,kind\na.mp4,run\n", r": no column is called label.*\(found: path, kind; wanted: "),
    ("no path", "path,label\n,run\n", r", line 2: has no path"),
    ("fractions", "a.mp4 0\nb.mp4 1.5\n", r", line 2: label 1\.5 is not the id of a class"),
    ("negative ids", "a.mp4 0\nb.mp4 -3\n", r", line 2: label -3 is not the id of a class"),
    ("a date", "a.mp4 0\nb.mp4 20240315\n", r", line 2: label 20240315 is too large for the id of a class"),
    ("a very long number", f"a.mp4 0\nb.mp4 {'1' * 18}\n", r", line 2: label 1{18} is too large"),
    ("numbers among names", "a.mp4 run\nb.mp4 1\n", r", line 2: label 1 is a number, but other labels are names"),
    ("a contradiction", "a.mp4 0\n./a.mp4 1\n", r", line 2: 'a\.mp4' is (also )?listed"),
    ("not UTF-8", b"a\xff.mp4 0\n", r": cannot be read as UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "classes", "expected"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_forms(tmp_path: Path, text: str, classes: list[str] | None, expected: Videos) -> None:
    listed = tmp_path / "train.txt"
    listed.write_text(text, encoding="utf-8", newline="")
    if classes:
        (tmp_path / "classes.txt").write_text("\n".join(classes))
    manifest = read_manifest(listed, "train")
    assert {e.name: manifest.classes[e.label] if e.label >= 0 else None for e in manifest.entries} == expected
    assert [entry.path for entry in manifest.entries] == [tmp_path / name for name in expected]
    planned = plan_preparation(listed)
    assert {video.name: video.label or None for video in planned.videos} == expected
    assert tuple(planned.classes) == manifest.classes


@pytest.mark.parametrize(("text", "words"), [case[1:] for case in REFUSALS], ids=[case[0] for case in REFUSALS])
def test_refusals(tmp_path: Path, text: str | bytes, words: str) -> None:
    listed = tmp_path / "train.txt"
    listed.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (lambda: read_manifest(listed, "train"), lambda: plan_preparation(listed)):
        with pytest.raises(UsageError, match=rf"^{listed}{words}") as caught:
            read()
        assert "\n" not in str(caught.value)


def test_the_documentation_has_the_right_examples(tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "data-formats.md").read_text(encoding="utf-8")

    def table(header: str) -> list[list[str]]:
        lines = text.partition(f"| {header} |\n")[2].partition("\n\n")[0].splitlines()[1:]
        return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]

    understood, refused = table("line | path | label"), table("line | why")
    assert (len(understood), len(refused)) == (12, 6)
    listed = tmp_path / "train.txt"
    for line, path, label in understood:
        listed.write_text(line)
        (video,) = plan_preparation(listed).videos
        assert (video.name, video.label or "none") == (path, label)
    for line, _ in refused:
        listed.write_text(line)
        with pytest.raises(UsageError, match=r"train\.txt, line 1: "):
            plan_preparation(listed)
    for column, names, _ in table("column | names | "):
        assert COLUMN_NAMES[column] == tuple(names.replace("`", "").split(", "))


def test_ids_are_numbers_not_words(tmp_path: Path) -> None:
    """Class 10 comes after class 2, whether the list has a header or not."""
    lines = [f"{n}.mp4,{n}" for n in range(11)]
    for header in ([], ["path,label"]):
        (tmp_path / "train.csv").write_text("\n".join([*header, *lines]))
        manifest = read_manifest(tmp_path, "train")
        assert [entry.label for entry in manifest.entries] == list(range(11))
        # Without a list of classes of its own, the ids are those of the model.
        model = [f"class {n}" for n in range(11)]
        assert read_manifest(tmp_path, "train", model).entries[10].label == 10


@pytest.mark.parametrize(("largest", "others", "understood"), [(999, 1, True), (1000, 99, False), (1000, 100, True)])
def test_ids_are_dense(tmp_path: Path, largest: int, others: int, understood: bool) -> None:
    """An id is below 1000, or below ten times the number of different ids."""
    (tmp_path / "train.txt").write_text("".join(f"{n}.mp4 {n}\n" for n in [*range(others), largest]))
    if understood:
        assert len(read_manifest(tmp_path, "train").classes) == largest + 1
        return
    with pytest.raises(UsageError, match=rf"train\.txt, line {others + 1}: label {largest} is too large"):
        read_manifest(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("".join(f"class {n}\n" for n in range(largest + 1)))
    assert read_manifest(tmp_path, "train").entries[-1].label == largest


def test_a_wild_number_of_another_split_is_found(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a.mp4 0\n")
    (tmp_path / "val.txt").write_text("b.mp4 0\nc.mp4 20240315\n")
    with pytest.raises(UsageError, match=r"val\.txt, line 2: label 20240315"):
        read_manifest(tmp_path, "train")


@pytest.mark.parametrize(
    ("train", "val", "notes"),
    [
        ("a.mp4 0\nb.mp4 1\n", "c.mp4 1\n", ()),
        ("a.mp4 0\nb.mp4 2\n", "c.mp4 1\n", ("split train has no video of 1 of 3 classes: '1'",)),
        (
            "a.mp4 1\nb.mp4 2\n",
            "c.mp4 2\n",
            (
                "split train has no video of 1 of 3 classes: '0'",
                "ids of classes count from 0, and class 0 has no video; if yours count from 1, subtract 1",
            ),
        ),
        ("a.mp4 run\n", "c.mp4 walk\n", ("split train has no video of 1 of 2 classes: 'walk'",)),
        ("a.mp4\n", "c.mp4\n", ()),
    ],
)
def test_classes_without_a_training_video_are_told(
    tmp_path: Path, train: str, val: str, notes: tuple[str, ...]
) -> None:
    (tmp_path / "train.txt").write_text(train)
    (tmp_path / "val.txt").write_text(val)
    assert read_manifest(tmp_path, "train").notes == notes
    assert tuple(plan_preparation(tmp_path).notes) == notes


def test_a_video_named_from_the_root_is_the_same_video(tmp_path: Path) -> None:
    listed = tmp_path / "train.txt"
    listed.write_text(f"a.mp4 0\n{tmp_path}/a.mp4 1\n")
    for read in (lambda: read_manifest(listed, "train"), lambda: plan_preparation(listed)):
        with pytest.raises(UsageError, match=r"train\.txt, line 2: .*listed"):
            read()


def test_white_space_around_the_names_of_class_folders_does_not_count(tmp_path: Path) -> None:
    for folder in ("run", "run "):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{len(folder)}.mp4").write_bytes(b"x")
    manifest = read_manifest(tmp_path, "train")
    assert (manifest.classes, [entry.label for entry in manifest.entries]) == (("run",), [0, 0])


@pytest.mark.parametrize("suffix", ["mp4", "png"])
def test_class_folders_are_in_utf8(tmp_path: Path, suffix: str) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder), f"a.{suffix}").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"class 'caf\\udce9' is not valid UTF-8; rename its folder"):
        labelled_manifest(DataConfig(source=str(tmp_path), image_size=32), "train")


def test_lines_of_class_lists_end_at_line_breaks_only(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("run\u2028fast\r\nw\x85lk\x0bit\r\n", newline="")
    (tmp_path / "train.txt").write_text("a.mp4 1\n")
    classes = read_manifest(tmp_path, "train").classes
    assert classes == ("run\u2028fast", "w\x85lk\x0bit")
    assert class_list_hash(classes)
