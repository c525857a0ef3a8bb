"""Tampered files of a prepared data set are one line, and nothing outside the data set is touched."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.cli import main
from data_prep.dataset import PreparedVideo, SplitContent, write_dataset
from data_prep.jobs import TranscodeSettings
from data_prep.layouts import read_official_lists
from data_prep.state import PlannedVideo, PreparationState
from tests.hostile.bounded import run_bounded
from tests.hostile.test_paths import contents, refused
from tests.hostile.test_tars import member
from video_swinv2.data.manifest import read_manifest
from video_swinv2.data.sources import check_files_exist
from video_swinv2.errors import UserError

DEEP = "[" * 100_000
VERBS = (
    "status OUT",
    "status OUT --html page.html",
    "split OUT --val 0.5",
    "verify OUT --workers 1",
    "prepare raw OUT --workers 1",
)


def state(out: Path, path: Path | None = None, *, first: int = 0) -> Path:
    """The state of two prepared videos, and the videos. Returns its path."""
    target = path or out / "prep.sqlite"
    target.parent.mkdir(parents=True, exist_ok=True)
    videos = [
        PlannedVideo("train", n, f"a/{n}.mp4", "a", str(out.parent / f"raw/a/{n}.mp4"), f"videos/train/a/{n}.mp4")
        for n in (first, first + 1)
    ]
    with PreparationState(out, create=True, path=path) as opened:
        opened.sync_with_plan(videos)
        for video, row in zip(videos, list(opened.rows()), strict=True):
            (out / video.target).parent.mkdir(parents=True, exist_ok=True)
            (out / video.target).write_bytes(b"video")
            known = {"frames": 4, "fps": 25.0, "duration_seconds": 0.16, "sha256": hashlib.sha256(b"video").hexdigest()}
            opened.record_outcome(row["id"], {"status": "ok", "source_size": 5, "seconds": 0.5, **known})
        facts = {"name": "n", "classes": '["a"]', "extra": "[]", "listing": "x"}
        for key, value in (facts | {"settings": json.dumps(TranscodeSettings().record())}).items():
            opened.set_fact(key, value)
    return target


def tamper(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as base:
        for statement in statements:
            base.execute(statement)
    base.close()


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A data set of two videos with a state, in whose neighbourhood nothing may change."""
    monkeypatch.chdir(tmp_path)
    out, outside = tmp_path / "out", tmp_path / "outside"
    state(out)
    write_dataset(out, name="n", classes=["a"], splits={"train": SplitContent([])}, settings={})
    shutil.copytree(out / "videos" / "train", tmp_path / "raw")
    for name in ("a.mp4", "x.csv", "videos/train/a/0.mp4"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text("precious")
    before = contents(outside) | contents(tmp_path / "raw")
    yield out
    assert contents(outside) | contents(tmp_path / "raw") == before
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "outside", "raw", "other", "page.html"}


# Absolute paths lead to the folder `outside`, since these tests have to fail harmlessly.
ROWS = {
    "target = '../outside/a.mp4'": "target",
    "target = 'videos/../../outside/a.mp4'": "target",
    "target = '{outside}/a.mp4'": "target",
    "target = 'train.csv'": "target",
    "target = ''": "target",
    "target = x'00ff'": "target",
    "split = '../outside/x'": "cannot be the name of a split",
    "listed_split = '{outside}/x'": "cannot be the name of a split",
    "split = x'61'": "split",
    "label = x'61'": "label",
    "name = 7.5, source = x'00'": "source",
    "id = -5": "id",
    "position = -1": "position",
    "position = 'first'": "position",
    "status = 'done'": "status",
    "status = x'6f6b'": "status",
    "reason = x'ff'": "reason",
    "sha256 = x'ff'": "sha256",
    "frames = 'many'": "frames",
    "fps = 9e999": "fps",
    "source_size = -1": "source_size",
    "duration_seconds = x'ff'": "duration_seconds",
    "start_seconds = 'now'": "start_seconds",
    "finished_at = 9e999": "finished_at",
    "finished_at = 'now'": "finished_at",
}


@pytest.mark.parametrize("change", ROWS)
def test_a_tampered_row_is_refused_by_every_verb(out: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line that names the file and the column."""
    tamper(out / "prep.sqlite", f"UPDATE clips SET {change.format(outside=out.parent / 'outside')} WHERE id = 1")
    before = contents(out)
    for verb in VERBS:
        code = main([str(out) if word == "OUT" else word for word in verb.split()])
        refused(capsys, code, f"{out}/prep.sqlite: ", ROWS[change])
    (out / ".prep.lock").unlink()
    assert contents(out) == before


SCHEMAS = {
    "a missing table": ["DROP TABLE facts"],
    "a missing column": ["ALTER TABLE clips DROP COLUMN origin"],
    "a column more": ["ALTER TABLE clips ADD COLUMN more TEXT"],
    "another type": ["ALTER TABLE facts RENAME TO old", "CREATE TABLE facts (key TEXT, value BLOB)"],
    "a view": ["DROP TABLE facts", "CREATE VIEW facts AS SELECT name AS key, label AS value FROM clips"],
    "a trigger": ["CREATE TRIGGER t AFTER UPDATE ON clips BEGIN DELETE FROM clips; END"],
    "a later version": ["PRAGMA user_version = 99"],
    "no version": ["PRAGMA user_version = 0", "DROP TABLE clips", "CREATE TABLE clips (id INTEGER)"],
    "a negative version": ["PRAGMA user_version = -1", "DROP TABLE clips", "CREATE TABLE clips (id TEXT, name BLOB)"],
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_state_of_another_form_is_refused(out: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever its version says."""
    tamper(out / "prep.sqlite", *SCHEMAS[kind])
    for verb in ("status", "verify"):
        refused(capsys, main([verb, str(out)]), f"{out}/prep.sqlite: ")


FACTS = [DEEP, "5", '{"a": [1]}', "[1]", "[[]]", '["\\ud800"]', '["a", "a"]', "9" * 5000, "NaN", "", "{"]


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key in ("classes", "settings", "extra") for value in FACTS]
)
def test_tampered_facts_are_refused(out: Path, key: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are written to dataset.json and to extra.csv."""
    tamper(out / "prep.sqlite", f"UPDATE facts SET value = '{value}' WHERE key = '{key}'")
    code = main(["split", str(out), "--val", "0.5"])
    if (key, value) in {("settings", '{"a": [1]}'), ("extra", '["\\ud800"]'), ("extra", '["a", "a"]')}:
        assert code == 0  # is what they may be
    else:
        refused(capsys, code, f"{out}/prep.sqlite: facts", key)


@pytest.mark.parametrize(
    "change", ["target = '../outside/a.mp4'", "target = '{outside}/a.mp4'", "split = '../outside/x'"]
)
@pytest.mark.parametrize("tampered", ["out", "other"])
def test_a_merge_takes_nothing_from_and_puts_nothing_to_other_places(
    tmp_path: Path, out: Path, change: str, tampered: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one of two shards tampered with, here or in the other folder."""
    shards = _shards(tmp_path, out)
    change = change.format(outside=tmp_path / "outside")
    tamper(shards[tampered], f"UPDATE clips SET {change} WHERE id = 1")
    before = contents(out)
    code = main(["merge", str(out), str(tmp_path / "other")])
    refused(capsys, code, str(shards[tampered]), change.partition(" ")[0])
    (out / ".prep.lock").unlink()
    assert {name for name, one in contents(out).items() if before.get(name) != one} <= {f"{out}/.prep.sqlite.part"}


@pytest.mark.parametrize("link", ["other/videos/train/a/2.mp4", "other/videos", "out/videos/train/a"])
def test_a_merge_follows_no_link(tmp_path: Path, out: Path, link: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to a file elsewhere would be linked or copied into the data set; one in OUT would receive files."""
    _shards(tmp_path, out)
    path = tmp_path / link
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(tmp_path / "outside" / ("a.mp4" if link.endswith(".mp4") else ""))
    code = main(["merge", str(out), str(tmp_path / "other")])
    refused(capsys, code, "'videos/train/a/2.mp4' leads out of", "symbolic link")


def _shards(tmp_path: Path, out: Path) -> dict[str, Path]:
    """A shard in each of two folders, in place of the whole in the first."""
    (out / "prep.sqlite").unlink()
    return {
        folder: state(tmp_path / folder, tmp_path / folder / "shards" / f"{n}-of-2.sqlite", first=2 * n)
        for n, folder in enumerate(("out", "other"))
    }


def test_a_merge_of_honest_shards_still_works(tmp_path: Path, out: Path) -> None:
    """The attacks above fail for no other reason."""
    _shards(tmp_path, out)
    assert main(["merge", str(out), str(tmp_path / "other")]) == 0
    assert len((out / "train.csv").read_text().splitlines()) == 5


RECORDS = {
    "deep": DEEP,
    "deep within": '{"classes": ["a"], "splits": ' + DEEP,
    "an array": "[]",
    "no classes": "{}",
    "classes of numbers": '{"classes": [1]}',
    "a class twice": '{"classes": ["a", "a"]}',
    "half a character": '{"classes": ["\\ud800"]}',
    "splits as a list": '{"classes": ["a"], "splits": ["train"]}',
    "a split as a number": '{"classes": ["a"], "splits": {"train": 3}}',
    "a path for a split": '{"classes": ["a"], "splits": {"../outside/x": {}}}',
    "an absolute path": '{"classes": ["a"], "splits": {"/nowhere/x": {}}}',
    "a negative number": '{"classes": ["a"], "splits": {"train": {"failed": -1}}}',
    "a huge number": '{"classes": ["a"], "splits": {"train": {"failed": ' + "9" * 5000 + "}}}",
    "a text for a number": '{"classes": ["a"], "splits": {"train": {"failed": "x"}}}',
    "a number for a hash": '{"classes": ["a"], "splits": {"train": {"list_sha256": 5}}}',
    "settings as a list": '{"classes": ["a"], "settings": []}',
    "no text": "\udcff\udcfe",
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_tampered_dataset_json_is_refused_by_every_reader(
    out: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`prepare` writes a new one."""
    (out / "dataset.json").write_text(RECORDS[kind], errors="surrogateescape")
    (out / "train.csv").write_text("path,label\nvideos/train/a/0.mp4,a\n")
    before = contents(out)
    for verb in (["verify", str(out)], ["synth", str(out), "--train", "1"]):
        refused(capsys, main(verb), f"{out}/dataset.json: ")
    with pytest.raises(UserError, match=rf"^{out}/dataset\.json: .*$"):
        read_manifest(out, "train")
    assert contents(out) == before


def test_a_tampered_verify_sqlite_is_not_believed(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that are no findings are checked again; tables of another form are one line."""
    write_dataset(
        out,
        name="n",
        classes=["a"],
        splits={"train": SplitContent([PreparedVideo("videos/train/a/0.mp4", "a", "0" * 64)])},
        settings={},
    )
    assert main(["verify", str(out), "--workers", "1"]) == 1
    about = (out / "videos/train/a/0.mp4").stat()
    for values in ("x'ff', ''", "'strange', ''", "'', x'ff'", "NULL, NULL"):
        row = f"'videos/train/a/0.mp4', 'hash', {values}, {about.st_size}, {about.st_mtime_ns}, NULL"
        tamper(out / "verify.sqlite", "DELETE FROM ended", f"INSERT OR REPLACE INTO files VALUES ({row})")
        capsys.readouterr()
        assert main(["verify", str(out), "--workers", "1"]) == 1
        assert "videos/train/a/0.mp4: not_video: " in capsys.readouterr().out
    tamper(out / "verify.sqlite", "DROP TABLE files", "CREATE TABLE files (path TEXT)")
    refused(capsys, main(["verify", str(out), "--workers", "1"]), f"{out}/verify.sqlite: ")


@pytest.mark.parametrize("line", ["videos/train/a/0.mp4", ",a", "a\0b.mp4,a", '"' + "x" * 200_000 + '",a'])
def test_a_tampered_list_is_a_finding(out: Path, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A line of one field, without a path, with a NUL, or longer than the csv module reads."""
    (out / "train.csv").write_text(f"path,label\n{line}\n")
    assert main(["verify", str(out), "--workers", "1"]) == 1
    assert "train.csv: list: cannot be read (" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["a\0b.mp4 0", "x" * 100_000, "1 " * 50_000 + "x", '"' + "x" * 200_000])
def test_a_hostile_list_of_videos_is_one_line(tmp_path: Path, line: str) -> None:
    """For `prepare` and for training."""
    (tmp_path / "train.txt").write_text(f"a.mp4 0\n{line}\n")
    with pytest.raises(UserError, match=r"train\.txt, line 2: (a NUL|more than 65536) character.*$"):
        read_manifest(tmp_path, "train")


def test_numbers_in_a_list_are_found_in_linear_time(tmp_path: Path) -> None:
    """A line of 64 KB took a minute, and four times as long for twice as many numbers."""
    (tmp_path / "train.txt").write_text(("1 " * 32_000 + "x\n") * 3)
    code = "import sys; from data_prep.cli import main; sys.exit(main(sys.argv[1:]))"
    ended = run_bounded("-c", code, "prepare", tmp_path / "train.txt", tmp_path / "out", cpu_seconds=20)
    assert ended.code == 2
    assert "line 1: cannot tell the path from the label" in ended.err


def test_a_listed_name_that_no_file_system_takes_is_a_missing_file(tmp_path: Path) -> None:
    """Names are longer than 255 bytes in some lists that were made by programs."""
    (tmp_path / "train.txt").write_text("n" * 5000 + ".mp4 0\n")
    manifest = read_manifest(tmp_path, "train")
    with pytest.raises(UserError, match="is listed but does not exist"):
        check_files_exist(manifest.entries)


CLASSES = """
import sys
from video_swinv2.config import DataConfig
from video_swinv2.data.sources import labelled_manifest
from video_swinv2.errors import UserError
try:
    print(labelled_manifest(DataConfig(source=sys.argv[1], image_size=32, workers=0), "train").classes)
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("label", "told"),
    [("99999999999", "label 99999999999 is too large for the id of a class"), ("9" * 5000, f"('{'9' * 5000}',)")],
    ids=["an id", "a name"],
)
def test_a_huge_class_id_in_a_shard_does_not_stand_for_as_many_classes(tmp_path: Path, label: str, told: str) -> None:
    """More digits than an id may have are a name."""
    content = member("0.png", b"x") + member("0.cls", label.encode()) + bytes(1024)
    (tmp_path / "train-0.tar").write_bytes(content)
    ended = run_bounded("-c", CLASSES, tmp_path, cpu_seconds=60, memory_gib=8)
    assert told in ended.out
    assert len(ended.out.splitlines()) == 1


@pytest.mark.parametrize("name", ["labels", "train"])
@pytest.mark.parametrize(
    "value", [DEEP, "5", "[5]", '{"a": "x"}', '[{"template": "a"}]', '{"a": {}}', "[" + "9" * 5000]
)
def test_tampered_lists_of_something_something_are_refused(tmp_path: Path, name: str, value: str) -> None:
    """Its lists are JSON."""
    for other, good in (("labels", '{"a": "0"}'), ("train", '[{"id": "1", "template": "[a]"}]')):
        (tmp_path / f"{other}.json").write_text(value if other == name else good)
    with pytest.raises(UserError, match=rf"^{tmp_path}/{name}\.json: .*; unpack it again$"):
        read_official_lists(tmp_path, (), 1)
