"""Preparation: the result is right and checked, whatever the input, and however often the run was killed."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.cli import main
from data_prep.outcomes import REASONS
from data_prep.state import PreparationState
from data_prep.transcode import output_size
from tests.conftest import REPOSITORY
from video_swinv2.data.decode import VideoReader
from video_swinv2.data.manifest import read_manifest

Writer = Callable[..., Path]


def noise(count: int = 6, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 255, (count, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, axis=1).repeat(8, axis=2)


def run(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments), "--workers", "2"])


def failures(out: Path) -> dict[str, tuple[str, str]]:
    with (out / "failed.csv").open(newline="") as file:
        return {row["path"]: (row["reason"], row["detail"]) for row in csv.DictReader(file)}


def rows_of(out: Path) -> dict[str, dict[str, object]]:
    with PreparationState(out) as state:
        return {row["name"]: dict(row) for row in state.rows()}


@pytest.mark.parametrize(
    ("shown", "short_side", "expected"),
    [
        ((1080, 1920), 320, (320, 568)),
        ((1920, 1080), 320, (568, 320)),
        ((240, 426), 320, (240, 426)),
        ((333, 335), 320, (320, 322)),
        ((101, 301), 320, (100, 298)),
        ((1, 1), 320, (2, 2)),
    ],
)
def test_output_size_is_even_and_never_larger(
    shown: tuple[int, int], short_side: int, expected: tuple[int, int]
) -> None:
    assert output_size(shown, short_side) == expected


def test_class_folders_end_to_end(write_video: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    names = ["walk it's/-a b.mp4", 'walk it\'s/say "hi", you.mp4', "run/x.mp4", "run/deep/x.mp4", "run/.y.mp4"]
    for place, name in enumerate(names):
        write_video(source / name, noise(seed=place))
    (source / "run" / "broken.mp4").write_bytes(b"<html>")
    (source / "run" / "empty.mp4").write_bytes(b"")
    assert run(source, out, "--short-side", 32, "--max-fail-rate", 0.5) == 0
    assert "FFmpeg does not recognise the container" in capsys.readouterr().out
    manifest = read_manifest(out, "train")
    assert manifest.classes == ("run", "walk it's")
    assert len(manifest.entries) == 4
    assert len({entry.path for entry in manifest.entries if entry.path.is_file()}) == 4
    assert "videos/train/walk it's/-a b.mp4" in {entry.name for entry in manifest.entries}
    assert {name: reason for name, (reason, _) in failures(out).items()} == {
        "run/broken.mp4": "not_video",
        "run/empty.mp4": "empty",
    }
    record = json.loads((out / "dataset.json").read_text())
    assert record["splits"]["train"]["listed"] == 6
    assert record["splits"]["train"]["ok"] == 4
    assert record["splits"]["train"]["fingerprint"] == manifest.fingerprint
    assert record["settings"]["short_side"] == 32
    assert not list(out.rglob("*.part"))
    for entry in manifest.entries:
        with VideoReader(entry.path) as reader:
            assert (len(reader), reader.size) == (6, (32, 42))
    assert run(source, out, "--short-side", 32) == 1
    assert "33.3% of the videos failed, more than --max-fail-rate 5.0%" in capsys.readouterr().err


def test_frames_and_times_survive(outside_data: Path, tmp_path: Path) -> None:
    sources = ["decord__video_90.mov", "tc__var_fps_video.mp4", "ft__fixture2.mpg", "decord__corrupted.mp4"]
    sources += [
        "tc__bt709_full_range.mp4",
        "mp4p__h264_white_frame_sar_16_9.mp4",
        "ft__fixture.mov",
        "tc__av1_video.mkv",
    ]
    source, out = tmp_path / "raw", tmp_path / "out"
    (source / "odd").mkdir(parents=True)
    for name in sources:
        (source / "odd" / name).symlink_to(outside_data / "odd_clips" / name)
    (source / "odd" / "ut.avi").symlink_to(outside_data / "ut_interaction" / "kicking" / "set1_seq01_001.avi")
    assert run(source, out, "--short-side", 96) == 0
    rows = rows_of(out)
    assert "1 of 50 frames" in str(rows["odd/decord__corrupted.mp4"]["detail"])
    for name in rows:
        with VideoReader(source / name) as raw, VideoReader(out / str(rows[name]["target"])) as made:
            if "corrupted" in name:
                assert len(made) == len(raw) - 1
                continue
            assert len(made) == len(raw)
            np.testing.assert_allclose(made.times - made.times[0], raw.times - raw.times[0], atol=1.2e-5)
            picks = np.linspace(0, len(raw) - 1, 4).astype(int).tolist()
            before, after = (reader.frames(picks, 96).float() for reader in (raw, made))
            assert before.shape == after.shape
            # Rotated pictures are upright; BT.709 and full range were converted, not merely relabelled.
            assert (before - after).abs().mean() < 9, name
            assert (before.mean((0, 2, 3)) - after.mean((0, 2, 3))).abs().max() < 4, name


def test_broken_files_fail_by_reason(outside_data: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    (source / "x").mkdir(parents=True)
    for path in [
        *(outside_data / "odd_clips" / "broken").iterdir(),
        outside_data / "odd_clips" / "mp4p__short-cenc.mp4",
    ]:
        (source / "x" / path.name).symlink_to(path)
    (source / "x" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    assert run(source, out, "--short-side", 64, "--max-fail-rate", 1) == 0
    reasons = {Path(name).name: reason for name, (reason, _) in failures(out).items()}
    assert reasons == {
        "empty_0byte.mp4": "empty",
        "gone.mp4": "missing",
        "html_error_page.mp4": "not_video",
        "mp4p__short-cenc.mp4": "no_frames",
        "trunc_first4k.mp4": "not_video",
        "trunc_head50pct.mp4": "not_video",
        "trunc_head95pct.mp4": "not_video",
    }
    assert set(reasons.values()) <= set(REASONS)


def test_lists_with_splits_on_real_clips(outside_data: Path, tmp_path: Path) -> None:
    folder = outside_data / "ut_interaction"
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "classes.txt").write_text((folder / "classes.txt").read_text())
    (lists / "pushing").symlink_to(folder / "pushing")
    (lists / "hugging").symlink_to(folder / "hugging")
    (lists / "train.txt").write_text("pushing/set1_seq03_016.avi 5\nhugging/set1_seq04_019.avi 1\n")
    (lists / "test.txt").write_text("hugging/set2_seq11_005.avi 1\nhugging/none.avi 1\n")
    assert run(lists, tmp_path / "out", "--short-side", 64, "--max-fail-rate", 0.25, "--name", "ut") == 0
    record = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert record["name"] == "ut"
    assert record["classes"] == ["handshaking", "hugging", "kicking", "pointing", "punching", "pushing"]
    assert {split: (count["ok"], count["failed"]) for split, count in record["splits"].items()} == {
        "train": (2, 0),
        "test": (1, 1),
    }
    assert [entry.label for entry in read_manifest(tmp_path / "out", "train").entries] == [5, 1]


def test_kinetics_annotations(write_video: Writer, tmp_path: Path) -> None:
    write_video(tmp_path / "raw" / "part_0" / "-aU_xCCzkT0_000061_000071.mp4", noise(126))  # 5.04 s at 25 fps
    write_video(tmp_path / "raw" / "ccccccccccc_000000_000010.mp4", noise(124))  # less than half of its ten seconds
    table = tmp_path / "k.csv"
    table.write_text(
        "label,youtube_id,time_start,time_end,split\n"
        "massaging person's head,-aU_xCCzkT0,61,71,val\nabseiling,bbbbbbbbbbb,0,10,val\n"
        "abseiling,ccccccccccc,0,10,val\n"
    )
    assert run(tmp_path / "raw", tmp_path / "out", "--annotations", table, "--max-fail-rate", 0.7) == 0
    entry = read_manifest(tmp_path / "out", "val").entries[0]
    assert entry.name == "videos/val/massaging person's head/-aU_xCCzkT0_000061_000071.mp4"
    assert failures(tmp_path / "out") == {
        "bbbbbbbbbbb_000000_000010.mp4": ("missing", "no such file"),
        "ccccccccccc_000000_000010.mp4": ("too_short", "4.96 s of a segment of 10 s"),
    }


def test_a_label_outside_the_class_list_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "classes.txt").write_text("walking\nrunning\n")
    (tmp_path / "train.csv").write_text("path,label\na.mp4,runing\n")
    assert run(tmp_path, tmp_path.parent / f"{tmp_path.name}_out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "line 2: label 'runing'" in error
    assert "nearest is 'running'" in error


def test_finished_work_is_kept_and_changes_are_noticed(
    write_video: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    for place, name in enumerate(["a/1.mp4", "a/2.mp4", "b/3.mp4"]):
        write_video(source / name, noise(seed=place))
    (source / "b" / "4.mp4").write_bytes(b"junk")
    common = ("--short-side", 32, "--max-fail-rate", 0.5)

    def attempts() -> dict[str, object]:
        return {name: row["attempts"] for name, row in rows_of(out).items()}

    assert run(source, out, *common) == 0
    first = (out / "dataset.json").read_bytes()
    assert run(source, out, *common) == 0
    assert set(attempts().values()) == {1}
    assert (out / "dataset.json").read_bytes() == first

    assert run(source, out, *common, "--retry-failed", "timeout", "crashed") == 0
    assert set(attempts().values()) == {1}
    assert run(source, out, *common, "--retry-failed", "timeout", "not_video") == 0
    assert attempts() == {"a/1.mp4": 1, "a/2.mp4": 1, "b/3.mp4": 1, "b/4.mp4": 2}
    assert run(source, out, *common, "--retry-failed") == 0
    assert attempts()["b/4.mp4"] == 3

    write_video(source / "a" / "1.mp4", noise(count=9))  # a new source
    (out / "videos/train/a/2.mp4").unlink()  # a lost output
    (source / "b" / "3.mp4").unlink()  # no longer listed
    write_video(source / "b" / "4.mp4", noise())  # a repaired source
    capsys.readouterr()
    assert run(source, out, *common) == 0
    told = capsys.readouterr().out
    assert "removed 1 videos that are no longer listed" in told
    assert "2 videos are prepared again: their sources have changed" in told
    assert attempts() == {"a/1.mp4": 2, "a/2.mp4": 2, "b/4.mp4": 4}
    assert not (out / "videos/train/b/3.mp4").exists()

    assert run(source, out, "--short-side", 16) == 0
    assert "3 videos are prepared again: the settings have changed" in capsys.readouterr().out
    assert {row["height"] for row in rows_of(out).values()} == {16}


def test_kill_minus_nine_and_resume(write_video: Writer, tmp_path: Path) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    original = write_video(source / "a" / "00.mp4", noise(count=40, height=160, width=208))
    for number in range(1, 12):
        (source / "a" / f"{number:02d}.mp4").write_bytes(original.read_bytes())
    command = [sys.executable, "-m", "data_prep", "prepare", str(source), str(out), "--workers", "2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 600
    while finished(out) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)  # the kernel kills the workers
    before = rows_of(out)
    done = {name for name, row in before.items() if row["status"] == "ok"}
    assert 2 <= len(done) < 12
    assert len(before) == 12
    (out / "videos/train/a/.left.mp4.part").write_bytes(b"half")
    assert run(source, out) == 0
    after = rows_of(out)
    assert {row["status"] for row in after.values()} == {"ok"}
    assert {after[name]["finished_at"] for name in done} == {before[name]["finished_at"] for name in done}
    assert all(row["attempts"] == 1 for row in after.values())
    assert not list(out.rglob("*.part"))
    assert len(read_manifest(out, "train").entries) == 12


def test_killed_many_times_the_result_is_the_same(write_video: Writer, tmp_path: Path) -> None:
    source = tmp_path / "raw"
    for number in range(10):
        write_video(source / "a" / f"{number}.mp4", noise(count=40, height=160, width=208, seed=number))
    (source / "a" / "broken.mp4").write_bytes(b"junk")
    command = [sys.executable, "-m", "tests.data_prep.kill", str(source), str(tmp_path), "--kills", "4"]
    # With so few videos many are started twice; the real overhead is measured on more (see kill.py).
    done = subprocess.run([*command, "--excess", "3", "--workers", "2"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the same in every file and row" in done.stdout


def finished(out: Path) -> int:
    if not (out / "prep.sqlite").exists():
        return 0
    try:
        with sqlite3.connect(f"file:{out / 'prep.sqlite'}?mode=ro", uri=True) as db:
            return int(db.execute("SELECT COUNT(*) FROM clips WHERE status = 'ok'").fetchone()[0])
    except sqlite3.Error:
        return 0


def test_ctrl_c_stops_at_once_and_says_how_to_resume(write_video: Writer, tmp_path: Path) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    original = write_video(source / "a" / "0.mp4", noise(count=300, height=240, width=320))
    for number in range(1, 9):
        (source / "a" / f"{number}.mp4").write_bytes(original.read_bytes())
    command = [sys.executable, "-m", "data_prep", "prepare", str(source), str(out), "--workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and the tests may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 600
    while not list(out.rglob("*.part")) and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "error: interrupted; run the same command again to resume"
    assert "Traceback" not in errors
    assert len(rows_of(out)) == 9


def test_two_runs_on_one_data_set_are_refused(
    write_video: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import fcntl

    write_video(tmp_path / "raw" / "a" / "1.mp4", noise())
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".prep.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(tmp_path / "raw", tmp_path / "out") == 1
    assert "another run is preparing this data set" in capsys.readouterr().err


def test_out_inside_the_source_and_bad_numbers_are_refused(
    write_video: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video(tmp_path / "raw" / "a" / "1.mp4", noise())
    for arguments, words in [
        ((tmp_path / "raw" / "out",), "is inside the source"),
        ((tmp_path / "out", "--short-side", 31), "--short-side 31"),
        ((tmp_path / "out", "--gop", 0), "--gop 0"),
        ((tmp_path / "out", "--fps", 0), "--fps 0"),
        ((tmp_path / "out", "--retry-failed", "bored"), "--retry-failed bored: unknown reason; must be one of missing"),
        ((tmp_path / "out", "--shard", "8/8"), "--shard 8/8: must be i/n"),
        ((tmp_path / "out", "--executor", "ray"), "--executor ray: must be local, dask or dask:"),
    ]:
        assert run(tmp_path / "raw", *arguments) == 2
        assert words in capsys.readouterr().err
    assert run(tmp_path / "nowhere", tmp_path / "out") == 2
    for option, number in (("--max-fail-rate", 5), ("--min-seconds", -1)):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path / "raw", tmp_path / "out", option, number)
        assert f"{option}: must be from 0 to " in capsys.readouterr().err


def test_split_takes_a_share_of_each_class_and_prepare_keeps_the_choice(
    write_video: Writer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "raw", tmp_path / "out"
    original = write_video(source / "a" / "0.mp4", noise(count=2))
    for name in [*(f"a/{n}.mp4" for n in range(1, 10)), *(f"b/{n}.mp4" for n in range(5)), "c/0.mp4"]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(original.read_bytes())
    assert run(source, out) == 0
    assert main(["split", str(out), "--val", "0.2", "--seed", "3"]) == 0
    train, val = (read_manifest(out, split) for split in ("train", "val"))
    assert [sum(entry.label == label for entry in val.entries) for label in range(3)] == [2, 1, 0]
    assert len(train.entries) == 13
    assert not {entry.name for entry in train.entries} & {entry.name for entry in val.entries}
    chosen = {entry.name for entry in val.entries}
    assert run(source, out) == 0  # another run of prepare keeps the choice
    assert {entry.name for entry in read_manifest(out, "val").entries} == chosen
    assert main(["split", str(out), "--val", "0.2", "--seed", "4"]) == 0
    assert {entry.name for entry in read_manifest(out, "val").entries} != chosen
    with pytest.raises(SystemExit, match="2"):
        main(["split", str(out), "--val", "1.5"])
    assert main(["split", str(tmp_path), "--val", "0.1"]) == 2
    assert "run `prepare SRC" in capsys.readouterr().err


def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    code = "import sys; from data_prep.cli import main; main(['status', sys.argv[1]]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith("error: ")
    code = "import data_prep.prepare, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("verb", ["synth", "prepare", "merge", "status", "verify", "split"])
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"example: python -m data_prep {verb}" in capsys.readouterr().out


def test_prepared_videos_have_no_sound(tmp_path: Path, outside_data: Path) -> None:
    source = tmp_path / "raw" / "x"
    source.mkdir(parents=True)
    (source / "b.mp4").symlink_to(outside_data / "odd_clips" / "mma2__part_0.mp4")
    assert run(tmp_path / "raw", tmp_path / "out", "--short-side", 64, "--gop", 8) == 0
    with av.open(str(tmp_path / "out/videos/train/x/b.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        packets = [packet for packet in container.demux(video=0) if packet.size]
    assert [place for place, packet in enumerate(packets) if packet.is_keyframe] == list(range(0, len(packets), 8))
