"""Preflight: the sample is really prepared and leaves nothing behind; every problem comes with its fix."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.jobs import TranscodeJob, TranscodeSettings, initial_limit_seconds
from data_prep.pool import Pool
from data_prep.preflight import (
    PreflightReport,
    SampleResult,
    _check_disk,
    _check_encoder,
    _check_memory,
    _check_open_files,
    _mean_range,
    run_preflight,
    sample_size,
)
from video_swinv2.errors import UserError

Writer = Callable[..., Path]


@pytest.fixture
def tasks(tmp_path: Path, write_video: Writer) -> list[TranscodeJob]:
    """Five videos, of which one is broken and one is missing."""
    frames = np.random.default_rng(0).integers(0, 255, (20, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    made = [write_video(tmp_path / "raw" / f"{n}.mp4", frames) for n in range(3)]
    (tmp_path / "raw" / "3.mp4").write_bytes(b"<html>")
    made += [tmp_path / "raw" / "3.mp4", tmp_path / "raw" / "4.mp4"]
    return [
        TranscodeJob(n, path, tmp_path / "out" / f"{n}.mp4", TranscodeSettings(short_side=32))
        for n, path in enumerate(made)
    ]


def test_a_sample_is_prepared_and_leaves_nothing_behind(tasks: list[TranscodeJob], tmp_path: Path) -> None:
    folder = tmp_path / "out" / ".preflight"
    folder.mkdir(parents=True)
    (folder / "of a killed run.mp4").write_bytes(b"half")
    with Pool(2, initial_limit_seconds, 8.0) as crew:
        found = run_preflight(crew, tasks, pending=1000, workers=2, folder=folder)
    assert list((tmp_path / "out").iterdir()) == []
    assert found.problems == ()
    assert found.reasons == {"not_video": 1, "missing": 1}
    assert len(found.trials) == 5
    good = [trial for trial in found.trials if not trial.reason]
    assert all(trial.size > 1000 and trial.seconds > 0 and 2**24 < trial.peak_bytes < 2**31 for trial in good)
    assert [trial.size for trial in found.trials if trial.reason] == [0, 0]
    assert found.bytes is not None
    assert found.hours is not None
    mean = sum(trial.size for trial in found.trials) / 5
    assert found.bytes[0] < 1000 * mean < found.bytes[1]
    seconds = sum(trial.seconds for trial in found.trials) / 5
    assert found.hours[0] < 1000 * seconds / 2 / 3600 < found.hours[1]
    text = found.as_text().splitlines()
    assert text[0] == "1000 videos to prepare on 2 workers"
    assert "5 videos" in text[1]
    assert "2 failed (40%, 1 not_video, 1 missing)" in text[1] or "2 failed (40%, 1 missing, 1 not_video)" in text[1]
    assert text[2].startswith("expected: ")
    assert "free" in text[2]


def test_without_a_sample_only_the_machine_is_checked(tmp_path: Path) -> None:
    (tmp_path / ".preflight").mkdir()
    with Pool(1, initial_limit_seconds) as crew:
        found = run_preflight(crew, [], pending=7, workers=1, folder=tmp_path / ".preflight")
    assert (found.trials, found.hours, found.bytes, found.problems) == ((), None, None, ())
    assert found.as_text() == "7 videos to prepare on 1 workers"
    assert not (tmp_path / ".preflight").exists()


@pytest.mark.parametrize(
    ("pending", "requested", "size"),
    [(300_000, False, 20), (300_000, True, 20), (7, True, 7), (49, False, 0), (500, False, 10)],
)
def test_an_unrequested_sample_is_small(pending: int, requested: bool, size: int) -> None:
    assert sample_size(pending, requested=requested) == size


def test_a_folder_that_cannot_be_created_is_one_line(tasks: list[TranscodeJob], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with (
        Pool(1, initial_limit_seconds) as crew,
        pytest.raises(UserError, match=r"x: cannot be created \(Not a directory\)"),
    ):
        run_preflight(crew, tasks, pending=5, workers=1, folder=tmp_path / "file" / "x")


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    assert _check_disk(tmp_path, 1e3, 10**9, 5) == []
    (problem,) = _check_disk(tmp_path, 4.4e11, 3 * 10**11, 5)
    assert problem == (
        f"{tmp_path}: 300 GB are free, but at least 440 GB are needed;"
        " free space, choose another folder or use a smaller --short-side"
    )
    if os.statvfs(tmp_path).f_files:
        assert "more files, 1000000000000 are needed" in _check_disk(tmp_path, 1e3, 10**9, 10**12)[0]


def test_too_little_memory_suggests_the_number_of_workers() -> None:
    assert _check_memory(2**28, 8, 2**31) == []
    assert _check_memory(2**40, 8, None) == []
    (problem,) = _check_memory(10**9, 64, 10 * 10**9)
    assert problem == ("a worker took 1 GB of memory, 64 of them take 64 GB, 10 GB are available; use --workers 10")


def test_too_few_open_files_suggest_a_command() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        assert _check_open_files(16) == []
        assert _check_open_files(64) == ["256 open files are allowed, 64 workers need 576; run `ulimit -n 576` first"]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_pool_needs_no_more_open_files_than_estimated() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with Pool(4, lambda job: 60.0) as crew:
        for future in [crew.submit(count_of, n) for n in range(8)]:
            assert future.result() >= 0
        used = len(os.listdir("/proc/self/fd")) - before
    assert 0 < used <= 4 * 8


def count_of(number: int, allow: object) -> int:
    """The work of the test above."""
    return number


def test_this_machine_can_encode() -> None:
    assert _check_encoder() == []


def test_the_range_of_an_estimate() -> None:
    assert _mean_range([2.0]) == (2.0, 2.0)
    assert _mean_range([2.0, 2.0, 2.0]) == (2.0, 2.0)
    low, high = _mean_range([1.0, 3.0])
    assert (low, high) == (0.0, 4.0)


def test_problems_come_last() -> None:
    trial = SampleResult(2.0, 10**6, "", "", 10**8)
    found = PreflightReport(360_000, 4, (trial,), (50.0, 50.0), (3.6e11, 4e11), 10**12, ("one", "two"))
    lines = found.as_text().splitlines()
    assert lines[2] == "expected: 2 d 2 h, 360 GB to 400 GB of output, 1 TB free"
    assert lines[3:] == ["problem: one", "problem: two"]
