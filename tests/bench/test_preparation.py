"""The benchmark of preparation: all ways make the same files, and a way that does not is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from video_swinv2.bench import preparation
from video_swinv2.bench.preparation import NO_COLOURS, OURS, SAME, bench_preparation, measure_start, preparation_table
from video_swinv2.bench.sample_clip import write_clip
from video_swinv2.errors import UsageError, UserError

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the program ffmpeg")


@needs_ffmpeg
def test_all_ways_make_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write_clip(tmp_path / "a" / "x.mp4", seconds=0.5)
    shutil.copy(tmp_path / "a" / "x.mp4", tmp_path / "y.mp4")
    result = bench_preparation(tmp_path, clips=3, workers=1, rows=300, rounds=1)
    assert result["videos"] == 2
    assert list(result["seconds"]) == [OURS, SAME, NO_COLOURS]
    seconds = {name: found[0] for name, found in result["seconds"].items()}
    assert min(seconds.values()) > 0
    assert result["throughput"] == {name: pytest.approx(seconds[name] / seconds[OURS]) for name in (SAME, NO_COLOURS)}
    assert result["difference"] < 1
    table = preparation_table(result)
    assert "start with a list of 300 rows" in table
    assert f" {result['throughput'][SAME]:.2f} |" in table


@needs_ffmpeg
def test_a_program_that_does_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_clip(tmp_path / "x.mp4", seconds=0.5)
    options = preparation.x264_options
    monkeypatch.setattr(preparation, "x264_options", lambda settings: options(settings) | {"g": "8", "keyint_min": "8"})
    with pytest.raises(UserError, match="differ in size or key frames"):
        bench_preparation(tmp_path, clips=1, workers=1, rows=10, rounds=1)


def test_the_start_is_measured() -> None:
    start = measure_start(2000)
    assert start["rows"] == 2000
    assert min(start.values()) > 0


@needs_ffmpeg
def test_a_folder_without_videos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="contains no videos"):
        bench_preparation(tmp_path, clips=1, workers=1, rows=10, rounds=1)
