"""Preparing in shards: every video is in exactly one, and the merge equals one run over everything."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli import main
from data_prep.shards import WorkShard, parse_shard
from data_prep.state import PreparationState
from tests.data_prep.kill import differences
from video_swinv2.errors import UsageError

Writer = Callable[..., Path]


def run(*arguments: object) -> int:
    return main(["prepare", *map(str, arguments), "--workers", "1", "--max-fail-rate", "1", "--short-side", "32"])


@pytest.fixture
def source(write_video: Writer, tmp_path: Path) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3), dtype=np.uint8)
    original = write_video(tmp_path / "raw" / "a" / "0.mp4", frames)
    for name in [*(f"a/{number}.mp4" for number in range(1, 6)), *(f"b/{number}.mp4" for number in range(6))]:
        (tmp_path / "raw" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "raw" / name).write_bytes(original.read_bytes())
    (tmp_path / "raw" / "b" / "broken.mp4").write_bytes(b"junk")
    return tmp_path / "raw"


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_name_is_in_exactly_one_shard(count: int) -> None:
    names = [f"-{number}_x_000010_000020.mp4" for number in range(400)]
    held = [sum(WorkShard(place, count).holds(name) for name in names) for place in range(count)]
    assert sum(held) == 400
    assert min(held) > 400 / count * 0.6
    assert all(sum(WorkShard(place, count).holds(name) for place in range(count)) == 1 for name in names)


def test_shards_are_stable() -> None:
    # sha256, big-endian: another version or machine must not assign videos differently
    assert [[place for place in range(4) if WorkShard(place, 4).holds(name)] for name in "abcd"] == [[2], [2], [2], [1]]


def test_parsing_of_the_shard_option() -> None:
    assert parse_shard("3/8") == WorkShard(3, 8)
    assert str(parse_shard("0/1")) == "0/1"
    slurm = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert parse_shard("slurm", slurm | {"SLURM_ARRAY_TASK_STEP": "2"}) == WorkShard(3, 4)
    assert parse_shard("slurm", slurm | {"SLURM_ARRAY_TASK_ID": "1"}) == WorkShard(0, 4)
    for text in ("8/8", "-1/8", "1", "a/b", "1/0", ""):
        with pytest.raises(UsageError, match="must be i/n"):
            parse_shard(text)
    with pytest.raises(UsageError, match="SLURM_ARRAY_TASK_ID is not set"):
        parse_shard("slurm", {})
    with pytest.raises(UsageError, match="task 9 does not fit an array"):
        parse_shard("slurm", slurm | {"SLURM_ARRAY_TASK_ID": "9"})  # a task of an array with gaps


def test_merged_shards_equal_a_single_run(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, out, other = (tmp_path / name for name in ("whole", "out", "other"))
    assert run(source, whole) == 0
    assert run(source, out, "--shard", "0/3") == 0
    assert "python -m data_prep merge" in capsys.readouterr().out
    assert not (out / "dataset.json").exists()
    assert main(["merge", str(out)]) == 1
    assert "missing shards: 1/3, 2/3; prepare them" in capsys.readouterr().err
    assert run(source, out, "--shard", "2/3") == 0
    assert run(source, other, "--shard", "1/3") == 0
    assert main(["status", str(out)]) == 0
    assert main(["merge", str(out), str(other)]) == 0
    assert "3 shards merged" in capsys.readouterr().out
    apart = [line for line in differences(whole, out) if not line.startswith("shards/")]
    assert apart == []
    with PreparationState(out) as state:
        assert [row["attempts"] for row in state.rows()] == [1] * 13
    assert all((other / row).is_file() for row in ("shards/1-of-3.sqlite",))

    (out / "train.csv").unlink()  # killed while it wrote the lists
    assert main(["merge", str(out), str(other)]) == 0
    assert (out / "train.csv").read_bytes() == (whole / "train.csv").read_bytes()
    assert run(source, out, "--retry-failed") == 0  # from here on as if prepared in a single run
    assert run(source, out, "--shard", "0/3") == 1
    assert "resume without --shard" in capsys.readouterr().err
    assert main(["merge", str(whole)]) == 1
    assert "was prepared as a whole" in capsys.readouterr().err


def test_a_shard_resumes_and_removes_only_its_own_partial_files(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, out, "--shard", "0/2") == 0
    with PreparationState(out, path=out / "shards/0-of-2.sqlite") as state:
        targets = {row["target"] for row in state.rows()}
        before = {row["name"]: row["finished_at"] for row in state.rows()}
    assert 0 < len(targets) < 13
    ours = next(iter(targets))
    theirs = next(f"videos/train/a/{n}.mp4" for n in range(6) if f"videos/train/a/{n}.mp4" not in targets)
    halves = [out / Path(name).with_name(f".{Path(name).name}.01234567.part") for name in (ours, theirs)]
    for half in halves:
        half.write_bytes(b"half")
    assert run(source, out, "--shard", "0/2") == 0
    assert [half.exists() for half in halves] == [False, True]
    with PreparationState(out, path=out / "shards/0-of-2.sqlite") as state:
        assert {row["name"]: row["finished_at"] for row in state.rows()} == before


def test_which_runs_may_overlap(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    (out / "shards").mkdir(parents=True)
    with (out / ".prep.lock").open("w") as file:  # as another shard does
        fcntl.flock(file, fcntl.LOCK_SH)
        assert run(source, out) == 1
        assert "another run is preparing this data set" in capsys.readouterr().err
        assert main(["merge", str(out)]) == 1
        assert "is being prepared" in capsys.readouterr().err
        assert run(source, out, "--shard", "0/2") == 0
        with (out / "shards" / ".1-of-2.lock").open("w") as own:
            fcntl.flock(own, fcntl.LOCK_EX)
            assert run(source, out, "--shard", "1/2") == 1
            assert "another run is preparing shard 1/2" in capsys.readouterr().err
        fcntl.flock(file, fcntl.LOCK_UN)
        fcntl.flock(file, fcntl.LOCK_EX)  # as a run over everything does
        assert run(source, out, "--shard", "1/2") == 1
    assert run(source, out) == 1
    assert "this data set is prepared in shards; merge them first" in capsys.readouterr().err


def test_shards_of_different_preparations(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    assert run(source, out, "--shard", "0/2") == 0
    assert run(source, out, "--shard", "1/2", "--gop", "8") == 0
    assert main(["merge", str(out)]) == 1
    assert "its settings differs from that of" in capsys.readouterr().err
    assert run(source, other, "--shard", "1/2") == 0
    assert main(["merge", str(out), str(other)]) == 1
    assert "is the same shard" in capsys.readouterr().err
    (other / "shards/1-of-2.sqlite").rename(other / "shards/1-of-4.sqlite")
    (out / "shards/1-of-2.sqlite").unlink()
    assert main(["merge", str(out), str(other)]) == 1
    assert "belong to preparations with different numbers of shards" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "raw")]) == 2
    assert "no shards to merge" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "nowhere")]) == 2
    assert not (tmp_path / "nowhere").exists()
