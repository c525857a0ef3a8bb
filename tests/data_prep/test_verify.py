"""Verification on real files with real damage: each level finds what it should and reports it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.cli import main
from data_prep.findings import FAULTS
from data_prep.prepare import write_lists
from data_prep.state import PreparationState
from data_prep.verify import LEVELS, VerifyResult, verify
from tests.conftest import REPOSITORY
from video_swinv2.errors import UsageError, UserError

Writer = Callable[..., Path]
COUNT = 9


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, write_video: Writer) -> Path:
    """A data set of nine videos in two classes, really prepared."""
    folder = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        frames = rng.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        write_video(folder / "raw" / "ab"[n % 2] / f"{n}.mp4", frames)
    command = ["prepare", str(folder / "raw"), str(folder / "out"), "--short-side", "64", "--workers", "2"]
    assert main(command) == 0
    return folder / "out"


@pytest.fixture
def out(prepared: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(prepared, tmp_path / "out"))


def bad(result: VerifyResult) -> dict[str, str]:
    return {Path(item.name).name: item.reason for item in result.bad}


def video(out: Path, n: int) -> Path:
    return out / "videos" / "train" / "ab"[n % 2] / f"{n}.mp4"


def flip_a_bit(path: Path) -> None:
    """Flip a bit in the frames, well after the index, and restore the mtime."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 4
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("level", LEVELS)
def test_an_intact_data_set_passes(out: Path, level: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(out), "--level", level, "--workers", "2"]) == 0
    assert f"{COUNT} files checked ({level}), 0 bad" in capsys.readouterr().out
    assert (out / "verify.csv").read_text() == "path,level,reason,detail\n"


def damage(out: Path, write_video: Writer) -> None:
    """One file for every kind of damage; 7 and 8 stay intact."""
    for n, keep in ((0, 0.5), (1, 0.97)):
        with video(out, n).open("r+b") as file:
            file.truncate(int(video(out, n).stat().st_size * keep))
    video(out, 2).write_bytes(b"")
    video(out, 3).unlink()
    video(out, 4).write_bytes(b"<html>not found</html>")
    shutil.copyfile(video(out, 8), video(out, 5))  # a complete video, but of another source
    content = np.zeros((30, 48, 48, 3), np.uint8)
    write_video(video(out, 6), content, codec="mpeg4")


def test_header_finds_truncated_empty_missing_and_foreign_files(out: Path, write_video: Writer) -> None:
    damage(out, write_video)
    (out / "videos" / "train" / "a" / ".left.mp4.part").write_bytes(b"half")
    (out / "videos" / "train" / "z.mp4").write_bytes(b"extra")
    result = verify(out, "header", workers=2)
    assert bad(result) == {
        "0.mp4": "cut_short",
        "1.mp4": "cut_short",
        "2.mp4": "empty",
        "3.mp4": "missing",
        "4.mp4": "not_video",
        "6.mp4": "form",
    }
    assert set(bad(result).values()) <= set(FAULTS)
    assert result.extra == ("videos/train/z.mp4", "videos/train/a/.left.mp4.part")
    with (out / "verify.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {Path(line["path"]).name: line["reason"] for line in lines} == bad(result)
    assert {line["level"] for line in lines} == {"header"}
    assert next(line["detail"] for line in lines if line["reason"] == "form") == "contains video mpeg4"


@pytest.mark.parametrize("level", LEVELS)
def test_an_unknown_codec_is_reported(out: Path, level: str) -> None:
    """FFmpeg has no decoder then, and PyAV nothing to ask about pictures."""
    video(out, 2).write_bytes(video(out, 2).read_bytes().replace(b"avc1", b"none"))
    (item,) = verify(out, level, workers=1).bad
    assert (Path(item.name).name, item.reason, item.detail) == ("2.mp4", "form", "contains video unknown")


def lists(out: Path) -> bytes:
    return b"".join((out / name).read_bytes() for name in ("train.csv", "dataset.json", "failed.csv"))


def test_prepare_makes_the_damaged_files_again_and_no_others(
    prepared: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, flipped = lists(out), video(out, 2).read_bytes()
    flip_a_bit(video(out, 2))
    video(out, 3).unlink()
    assert main(["verify", str(out), "--workers", "1"]) == 1
    assert "`verify --repair`, makes them again" in capsys.readouterr().out
    assert main(["verify", str(out), "--workers", "1"]) == 1  # damage stays known until it is repaired
    made = {n: video(out, n).stat().st_mtime_ns for n in range(COUNT) if n not in (2, 3)}
    command = ["prepare", str(prepared.parent / "raw"), str(out), "--short-side", "64", "--workers", "1"]
    capsys.readouterr()
    assert main(command) == 0
    assert "2 videos are prepared again: verify found the prepared files damaged" in capsys.readouterr().out
    assert verify(out, "hash", workers=1).bad == ()
    assert {n: video(out, n).stat().st_mtime_ns for n in made} == made
    assert (video(out, 2).read_bytes(), lists(out)) == (flipped, before)


def test_repair_makes_damaged_files_and_lists_again(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = lists(out)
    flip_a_bit(video(out, 0))
    video(out, 5).write_bytes(b"")
    (out / "train.csv").write_text(
        "path,label\n" + "".join(f"videos/train/{'ab'[n % 2]}/{n}.mp4,a\n" for n in range(9))
    )
    assert main(["verify", str(out), "--repair", "--workers", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["bad"], found["repaired"]) == ([], ["train.csv", "videos/train/a/0.mp4", "videos/train/b/5.mp4"])
    assert lists(out) == before
    assert (out / "verify.csv").read_text() == "path,level,reason,detail\n"
    assert verify(out, "hash", workers=1).bad == ()


def test_what_cannot_be_repaired_is_named_and_a_restored_file_is_recognised(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, before = video(out, 0).read_bytes(), lists(out)
    with contextlib.closing(sqlite3.connect(out / "prep.sqlite")) as base, base:
        base.execute("UPDATE clips SET source = '/gone/0.mp4' WHERE name = 'a/0.mp4'")
    flip_a_bit(video(out, 0))
    flip_a_bit(video(out, 1))
    assert main(["verify", str(out), "--repair", "--workers", "1"]) == 1
    shown = capsys.readouterr().out
    assert "9 files checked (hash), 2 bad, 1 of them repaired" in shown
    assert "  videos/train/a/0.mp4: hash: sha256 is" in shown
    assert "was written; its source /gone/0.mp4 is gone: restore either" in shown
    assert "a/0.mp4" not in (out / "train.csv").read_text()
    assert "damaged" in (out / "failed.csv").read_text()
    video(out, 0).write_bytes(whole)
    assert main(["verify", str(out), "--repair", "--workers", "1"]) == 0
    assert lists(out) == before


def test_groups_on_both_sides_are_told(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nine videos of four groups are divided without regard to the groups."""
    with contextlib.closing(sqlite3.connect(out / "prep.sqlite")) as base, base:
        base.execute("UPDATE clips SET origin = 'g' || (position % 4), split = iif(position < 5, 'train', 'val')")
    with PreparationState(out) as state:
        write_lists(state, out)
    capsys.readouterr()
    assert main(["verify", str(out), "--level", "header", "--workers", "1"]) == 0
    assert (
        "4 groups are in both train and val, such as 'g0': accuracy on val is then too high" in capsys.readouterr().out
    )


def test_only_hash_finds_a_flipped_bit(out: Path) -> None:
    flip_a_bit(video(out, 0))
    assert verify(out, "header", workers=1).bad == ()
    assert verify(out, "full", workers=1).bad == ()
    assert bad(verify(out, "hash", workers=1)) == {"0.mp4": "hash"}


def test_hash_finds_everything_else_too(out: Path, write_video: Writer) -> None:
    damage(out, write_video)
    result = bad(verify(out, "hash", workers=2))
    assert result.pop("5.mp4") == "hash"
    assert sorted(result) == [f"{n}.mp4" for n in (0, 1, 2, 3, 4, 6)]


def test_full_decodes_every_frame(out: Path) -> None:
    with video(out, 0).open("r+b") as file:  # the last frames are overwritten, the index is intact
        size = video(out, 0).stat().st_size
        file.seek(int(size * 0.6))
        file.write(bytes(size - int(size * 0.6)))
    shutil.copyfile(video(out, 1), video(out, 3))
    with sqlite3.connect(
        out / "prep.sqlite"
    ) as db:  # recorded for number 3: another number of frames; for 5: another duration
        db.execute("UPDATE clips SET frames = 21 WHERE name LIKE '%3.mp4'")
        db.execute("UPDATE clips SET duration_seconds = 1.5 WHERE name LIKE '%5.mp4'")
        db.execute("UPDATE clips SET width = 66 WHERE name LIKE '%7.mp4'")
    db.close()
    assert bad(verify(out, "header", workers=1)) == {"3.mp4": "frames", "7.mp4": "size"}
    full = verify(out, "full", workers=2)
    assert bad(full) == {"0.mp4": "decode_error", "3.mp4": "frames", "5.mp4": "duration", "7.mp4": "size"}
    assert next(item.detail for item in full.bad if item.reason == "duration") == "0.800 s, 1.500 s written"


def test_without_a_state_the_fingerprint_is_checked(out: Path) -> None:
    (out / "prep.sqlite").unlink()
    assert verify(out, "hash", workers=1).bad == ()
    flip_a_bit(video(out, 0))
    assert bad(verify(out, "full", workers=1)) == {}
    assert bad(verify(out, "hash", workers=1)) == {"train.csv": "fingerprint"}


def test_changed_and_missing_lists(out: Path) -> None:
    lines = (out / "train.csv").read_text().splitlines(keepends=True)
    (out / "train.csv").write_text("".join(lines[:-1]))
    result = verify(out, "header", workers=1)
    assert bad(result) == {"train.csv": "list"}
    assert result.extra == (lines[-1].split(",")[0],)
    (out / "train.csv").unlink()
    result = verify(out, "header", workers=1)
    assert bad(result) == {"train.csv": "list"}
    assert result.checked == 0
    assert len(result.extra) == COUNT


def test_an_interrupted_run_resumes_and_the_next_checks_everything(out: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
import data_prep.findings as findings
import data_prep.verify as module
findings.SAVE_EVERY_SECONDS = 0.0
write, seen = module.VerifyLedger.write, []
def cut_off(ledger, found):
    write(ledger, found)
    seen.append(found)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
module.VerifyLedger.write = cut_off
module.verify(Path(sys.argv[1]), "full", workers=1)
"""
    flip_a_bit(video(out, 8))
    video(out, 0).write_bytes(b"")
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=REPOSITORY, capture_output=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with sqlite3.connect(out / "verify.sqlite") as db:
        known = [row[0] for row in db.execute("SELECT path FROM files WHERE level = 'full' ORDER BY rowid")]
    db.close()
    assert len(known) == 4
    (out / known[1]).write_bytes((out / known[1]).read_bytes())  # touched since: checked again
    assert verify(out, "header", workers=1).before == 0, "another level has no findings yet"
    result = verify(out, "full", workers=1)
    assert (result.checked, result.before) == (COUNT, 3)
    assert bad(result) == {"0.mp4": "empty"}, "found before the run was cut off, and still told"
    assert verify(out, "full", workers=1).before == 0, "a run that ended leaves nothing to resume from"


def test_json_and_exit_code(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video(out, 4).unlink()
    assert main(["verify", str(out), "--json", "--workers", "1"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["level"], found["checked"], found["extra"]) == ("hash", COUNT, [])
    assert [(item["path"], item["reason"]) for item in found["bad"]] == [("videos/train/a/4.mp4", "missing")]
    assert main(["verify", str(out), "--workers", "1"]) == 1
    text = capsys.readouterr().out
    assert "videos/train/a/4.mp4: missing: listed, but there is no file" in text
    assert "verify.csv lists all 1" in text


def test_what_cannot_be_verified_is_one_line(out: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no dataset\.json"):
        verify(tmp_path, "header", workers=1)
    (out / "verify.sqlite").write_bytes(b"junk" * 1000)
    with pytest.raises(UserError, match=r"verify\.sqlite: file is not a database") as caught:
        verify(out, "header", workers=1)
    assert "\n" not in str(caught.value)


def test_a_named_pipe_is_not_waited_for(out: Path) -> None:
    """Opening a pipe to which nobody writes would block forever."""
    video(out, 2).unlink()
    os.mkfifo(video(out, 2))
    video(out, 4).unlink()
    video(out, 4).mkdir()
    assert bad(verify(out, "hash", workers=1)) == {"2.mp4": "missing", "4.mp4": "missing"}


def test_another_pixel_format_is_reported(out: Path, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "x.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        for _ in range(20):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    shutil.copyfile(tmp_path / "x.mp4", video(out, 1))
    result = verify(out, "header", workers=1)
    assert [item.detail for item in result.bad] == ["pictures are yuv444p"]
