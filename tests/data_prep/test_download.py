"""Downloading Kinetics from a faulty server or a folder: everything arrives and is recorded, nothing else."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

from data_prep import fetch as fetching
from data_prep.cli import main
from tests.conftest import REPOSITORY
from tests.data_prep.mirror import (
    ID,
    Server,
    archive_of,
    busy,
    dropped,
    kinetics400,
    layout,
    name_of,
    short,
    table,
)
from tests.waiting import wait_until


def tree(folder: Path) -> dict[str, bytes]:
    """All files except the ledger, the lock and what was fetched."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {
        name: content
        for name, content in found.items()
        if not name.startswith(("archives/", "annotations/")) and name not in ("archives.json", ".download.lock")
    }


def run(server: Server, to: Path, *arguments: str, dataset: str = "kinetics400") -> int:
    return main(["download", dataset, "--to", str(to), "--source", server.base, *arguments])


def test_a_complete_download_and_a_second_with_nothing_to_do(server, tmp_path, capsys):
    server.files, wanted = kinetics400()
    server.faults = {f"400/train/part_{n}.tar.gz": [busy, short, dropped] for n in range(4)}
    assert run(server, tmp_path / "k400", "--split", "train", "val", "--workers", "3") == 0
    assert tree(tmp_path / "k400") == wanted
    assert sorted(os.listdir(tmp_path)) == ["k400"]
    assert (tmp_path / "k400/annotations/val.csv").read_bytes() == server.files["400/annotations/val.csv"]
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "train: 4 archives, 9 videos, 1 of them empty, 2 replaced",
        "val: 1 archives, 1 videos, 0 of them empty, 1 replaced",
    ]
    record = json.loads((tmp_path / "k400/archives.json").read_text())
    content = server.files["400/train/part_0.tar.gz"]
    entry = record["files"]["archives/train/part_0.tar.gz"]
    assert (entry["sha256"], entry["size"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert record["replaced"]["train"] == [f"{name_of(3)}.mp4", f"{name_of(9)}.mp4"]
    server.asked.clear()
    assert run(server, tmp_path / "k400", "--split", "val", "--split", "train", "--delete-archives") == 0
    assert tree(tmp_path / "k400") == wanted
    assert {path.rpartition("/")[2] for path, _ in server.asked} == {"SHA256SUMS"}
    assert not list((tmp_path / "k400/archives").rglob("part_*.tar.gz"))


def test_kinetics600_has_archives_per_class_and_its_own_lists(server, tmp_path):
    clips = {f"pull ups/{name_of(1)}.mp4": b"1", f"pull ups/{name_of(2)}.mp4": b"2"}
    parts = {"pull%20ups.tar.gz": archive_of(clips), "part_1.tar.gz": archive_of({f"{name_of(3)}.mp4": b"3"})}
    listed = f"pull ups/{name_of(1)}.mp4 4\npull ups/{name_of(2)}.mp4 4\n".encode()
    server.files = layout("600", "k600", "train", parts, listed)
    server.files |= layout("600", "k600", "val", {"part_0.tar.gz": parts["part_1.tar.gz"]}, b"a b c\nd e f\n")
    assert run(server, tmp_path, "--split", "train", "val", "--delete-archives", dataset="kinetics600") == 0
    assert tree(tmp_path) == {
        **{f"train/{name_of(n)}.mp4": str(n).encode() for n in (1, 2, 3)},
        f"val/{name_of(3)}.mp4": b"3",
    }
    with (tmp_path / "annotations/train.csv").open(newline="") as file:
        assert [tuple(row.values()) for row in csv.DictReader(file)] == [
            ("pull ups", f"{ID}01", "1", "11", "train"),
            ("pull ups", f"{ID}02", "2", "12", "train"),
        ]
    assert not (tmp_path / "annotations/val.csv").exists()


def test_a_bad_archive_does_not_stop_the_others_and_is_retried_by_the_next_run(server, tmp_path, capsys):
    server.files, wanted = kinetics400()
    good = {name: server.files[name] for name in server.files if name.endswith("gz")}
    server.files["400/train/part_1.tar.gz"] = b""
    server.files["400/train/part_3.tar.gz"] = archive_of({"../../evil.mp4": b"x"})
    server.files["400/val/part_0.tar.gz"] = good["400/val/part_0.tar.gz"][:-9]
    to = tmp_path / "deep" / "k400"
    assert run(server, to, "--split", "train", "val") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: 3 of the archives failed (5 in all); the first: ")
    assert tree(to) == {f"train/{name_of(n)}.mp4": wanted[f"train/{name_of(n)}.mp4"] for n in (0, 1, 4, 5)}
    assert (os.listdir(tmp_path), os.listdir(tmp_path / "deep")) == (["deep"], ["k400"])
    server.files |= good
    assert run(server, to, "--split", "train", "val") == 1  # the refused archive stays until someone has looked at it
    assert "leads outside the folder" in capsys.readouterr().err.splitlines()[-1]
    (to / "archives/train/part_3.tar.gz").unlink()
    server.asked.clear()
    assert run(server, to, "--split", "train", "val") == 0
    assert tree(to) == wanted
    assert {path for path, _ in server.asked if path.endswith("gz")} == {"400/train/part_3.tar.gz"}


def test_a_folder_as_source_and_checksums(tmp_path, capsys):
    files, wanted = kinetics400(1000)
    for name, content in files.items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(content)
    part = tmp_path / "copy/400/train/part_0.tar.gz"
    sums = part.with_name("SHA256SUMS")
    sums.write_text(f"{'0' * 64}  {part.name}\n")
    command = ["download", "kinetics400", "--split", "train", "val", "--to", str(tmp_path / "a")]
    assert main([*command, "--source", str(tmp_path / "copy")]) == 1
    assert f"{part}: its sha256 begins" in capsys.readouterr().err
    (tmp_path / "a/archives/train/SHA256SUMS").unlink()
    sums.write_text(f"{hashlib.sha256(part.read_bytes()).hexdigest()} *{part.name}\n")
    assert main([*command, "--source", (tmp_path / "copy").as_uri()]) == 0
    assert tree(tmp_path / "a") == wanted
    assert not list((tmp_path / "a/archives").rglob(".*"))
    # A file is compared with what it was when it was fetched.
    command[-1] = str(tmp_path / "b")
    assert main([*command, "--source", str(tmp_path / "copy"), "--no-extract"]) == 0
    assert tree(tmp_path / "b") == {}
    kept = tmp_path / "b/archives/train/part_1.tar.gz"
    kept.write_bytes(archive_of({"other.mp4": b"x"}))
    assert main([*command, "--source", str(tmp_path / "copy")]) == 1
    assert f"{kept}: its sha256 begins" in capsys.readouterr().err


def test_different_videos_with_one_name_are_recorded_as_conflicts(server, tmp_path, capsys):
    one, other = f"{name_of(1)}.mp4", f"{name_of(2)}.mp4"
    parts = {"part_0.tar.gz": archive_of({one: b"first", other: b"same"})}
    parts["part_1.tar.gz"] = archive_of({one: b"second", other: b"same"})
    server.files = kinetics400(10)[0] | layout("400", "k400", "val", parts, table("val", 1, 2))
    assert run(server, tmp_path, "--split", "val", "--workers", "1") == 0
    assert tree(tmp_path) == {f"val/{one}": b"first", f"val/{other}": b"same"}
    assert "1 already there with different bytes" in capsys.readouterr().out
    record = json.loads((tmp_path / "archives.json").read_text())
    assert record["files"]["archives/val/part_1.tar.gz"]["conflicts"] == [one]


def test_wrong_usage(server, tmp_path, capsys):
    server.files, _ = kinetics400(10)
    assert run(server, tmp_path / "a", "--split", "val") == 0
    for arguments, words in (
        (["kinetics600", "--to", str(tmp_path / "a")], "contains kinetics400; give kinetics600 a folder of its own"),
        (["kinetics400", "--to", str(tmp_path / "b"), "--source", "no/such"], "--source no/such: neither a URL"),
        (["kinetics400", "--to", str(tmp_path / "b"), "--no-extract", "--delete-archives"], "--delete-archives"),
    ):
        capsys.readouterr()
        assert main(["download", *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    server.files["400/val/k400_val_path.txt"] = b"http://x/kinetics/400/val/part_0.tar.gz\nhttp://x/../passwd\n"
    assert run(server, tmp_path / "c", "--split", "val") == 1
    assert "k400_val_path.txt, line 2: 'http://x/../passwd' is not the URL of an archive" in capsys.readouterr().err


def started(server: Server, to: Path, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "data_prep", "download", "kinetics400", "--split", "train", "val"]
    command += ["--to", str(to), "--source", server.base]
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, **options)


def test_kills_and_interruptions_lose_next_to_nothing(server, tmp_path, capsys):
    server.files, wanted = kinetics400(500_000)
    total = sum(map(len, server.files.values()))
    for share, interruption in ((0.2, signal.SIGKILL), (0.5, signal.SIGINT), (0.8, signal.SIGKILL)):
        server.limit = share * total  # slow from there on, or it might finish first
        process = started(server, tmp_path / "k400")
        wait_until(lambda: server.sent > server.limit)
        if share == 0.2:
            assert run(server, tmp_path / "k400") == 1
            assert "another run is downloading here" in capsys.readouterr().err
        process.send_signal(interruption)
        error = process.communicate(timeout=600)[1]
        if interruption == signal.SIGINT:
            assert process.returncode == 1
            assert error.splitlines()[-1] == "error: interrupted; run the same command again to resume"
    server.limit = float("inf")
    assert run(server, tmp_path / "k400", "--split", "train", "val") == 0
    assert tree(tmp_path / "k400") == wanted
    assert not list((tmp_path / "k400/archives").rglob(".*"))
    # Each interruption loses what was not yet on disk: some blocks for each of four workers.
    assert server.sent < total + 3 * 4 * (fetching.BLOCK + 500_000)


def test_a_disk_error_is_one_line_and_ends_the_run(server, tmp_path):
    server.files, _ = kinetics400(500_000)
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731 - for preexec_fn alone
    process = started(server, tmp_path / "k400", preexec_fn=limit)
    error = process.communicate(timeout=600)[1]
    assert process.returncode == 1
    assert error.count("\n") == 1
    assert re.match(r"error: .*part_\d\.tar\.gz: cannot be written \(File too large\); free disk space", error)


def test_from_a_server_to_a_prepared_data_set(server, tmp_path, outside_data, capsys):
    clips = sorted((outside_data / "raw_clips").glob("*/*.*"), key=lambda path: path.stat().st_size)[:2]
    listed = "label,youtube_id,time_start,time_end,split,is_cc\n" + "".join(
        f"{clip.parent.name},{ID}{n:02d},{n},{n + 10},val,0\n" for n, clip in enumerate([*clips, clips[0], clips[0]])
    )
    held = {f"{name_of(n)}.mp4": clip.read_bytes() for n, clip in enumerate(clips)} | {f"{name_of(2)}.mp4": b""}
    server.files = kinetics400(10)[0]
    server.files |= layout("400", "k400", "val", {"part_0.tar.gz": archive_of(held)}, listed.encode())
    server.files["400/replacement_for_corrupted_k400.tgz"] = archive_of({"x.mp4": b"x"})
    assert run(server, tmp_path / "raw", "--split", "val") == 0
    arguments = ["--short-side", "64", "--workers", "1", "--max-fail-rate", "0.6"]
    assert main(["prepare", str(tmp_path / "raw"), str(tmp_path / "out"), *arguments]) == 0
    split = json.loads((tmp_path / "out/dataset.json").read_text())["splits"]["val"]
    assert (split["listed"], split["ok"], split["failed"]) == (4, 2, 2)
    with (tmp_path / "out/failed.csv").open(newline="") as file:
        assert sorted(row["reason"] for row in csv.DictReader(file)) == ["empty", "missing"]
