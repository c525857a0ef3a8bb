"""Checkpoints: exact round trips, kills, damage, full disks, and how many are kept."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.engine.harness import identical
from video_swinv2.engine.checkpoint import Checkpoints, TrainingState
from video_swinv2.errors import UsageError, UserError

WORKER = Path(__file__).with_name("checkpoint_worker.py")


def _state(step: int, *, ema: bool = False) -> TrainingState:
    generator = torch.Generator().manual_seed(step)

    def tensors() -> dict[str, torch.Tensor]:
        return {name: torch.randn(5, 3, generator=generator) for name in ("layers.0.weight", "head.bias")}

    weights = tensors() | {"count": torch.tensor(step)}
    return TrainingState(weights, tensors(), tensors(), optimizer_step=step, ema=tensors() if ema else {})


def _save(folder: Path, *steps: int, keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(_state(step), {"samples": 8 * step}, step=step)
    checkpoints.wait()
    return checkpoints


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("ema", [False, True])
def test_what_was_saved_comes_back(tmp_path: Path, ema: bool) -> None:
    given = dataclasses.replace(_state(7, ema=ema), loss_scale=(1024.0, 17) if ema else None)
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    run_state: dict[str, Any] = {"epoch": 3, "best": {"accuracy": 0.5}, "classes": ["a", "ü"], "stopped": None}
    run_state |= {"module": 1, "optimizer": 2, "files": 3}  # DeepSpeed's client_state overwrites its own by such names
    expected = dict(run_state)
    checkpoints.save(given, run_state, step=123)
    run_state["epoch"] = 99
    checkpoints.wait()
    assert _names(checkpoints.folder) == ["step-000123"]
    found = checkpoints.newest()
    assert found is not None
    step, state, restored = found
    assert step == 123
    assert identical(state, given)
    assert state.weights["count"].dtype == torch.int64
    assert restored == expected
    again, _ = checkpoints.read(123)
    assert identical(again, given)


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").newest() is None
    assert Checkpoints(tmp_path).newest() is None


def test_the_newest_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    checkpoints = _save(tmp_path, 9, 999_999, 1_000_000, 1_000_001, keep=2)
    assert _names(tmp_path) == ["step-1000000", "step-1000001"]
    found = checkpoints.newest()
    assert found is not None
    assert found[0] == 1_000_001


def test_keep_one_and_keep_none(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2, 3, keep=1)
    assert _names(tmp_path) == ["step-000003"]
    with pytest.raises(UsageError, match=r"keep_checkpoints: 0"):
        Checkpoints(tmp_path, keep=0)


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = [
    ("weights.safetensors", _flip, "content does not match"),
    ("optimizer.safetensors", _cut, "bytes instead of the"),
    ("optimizer.safetensors", Path.unlink, "No such file"),
    ("state.json", _cut, "truncated"),
    ("state.json", lambda path: path.write_text("[]"), "not a checkpoint record"),
    ("state.json", lambda path: path.write_text('{"format": 1, "files": {}}'), "not a checkpoint record"),
    ("state.json", lambda path: path.write_text('{"format": 2, "files": {}}'), "format 2"),
    ("state.json", Path.unlink, "incomplete"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_skipped(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    _save(tmp_path, 1, 2)
    damage(tmp_path / "step-000002" / name)
    said: list[str] = []
    found = Checkpoints(tmp_path, report=said.append).newest()
    assert found is not None
    assert found[0] == 1
    assert identical(found[1], _state(1))
    assert len(said) == 1
    assert f"step-000002/{name}" in said[0]
    assert message in said[0]
    assert "\n" not in said[0]


def test_if_all_are_damaged_the_run_does_not_silently_start_over(tmp_path: Path) -> None:
    checkpoints = _save(tmp_path, 1, 2)
    for step in (1, 2):
        _flip(tmp_path / f"step-00000{step}" / "weights.safetensors")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged"):
        checkpoints.newest()
    with pytest.raises(UserError, match="content does not match"):
        checkpoints.read(2)


def test_a_damaged_checkpoint_is_replaced_when_its_step_is_saved_again(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)
    _flip(tmp_path / "step-000002" / "weights.safetensors")
    checkpoints = _save(tmp_path, 2)
    found = checkpoints.newest()
    assert found is not None
    assert found[0] == 2
    assert _names(tmp_path) == ["step-000001", "step-000002"]


def test_a_damaged_later_checkpoint_does_not_push_out_undamaged_ones(tmp_path: Path) -> None:
    _save(tmp_path, 2, 9)
    _flip(tmp_path / "step-000009" / "weights.safetensors")
    _save(tmp_path, 3, 4)
    assert _names(tmp_path) == ["step-000003", "step-000004", "step-000009"]


def test_saving_a_step_twice_keeps_the_first(tmp_path: Path) -> None:
    checkpoints = _save(tmp_path, 5)
    checkpoints.save(_state(6), {}, step=5)
    checkpoints.wait()
    assert identical(checkpoints.read(5)[0], _state(5))


def test_a_kill_while_writing_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    process = subprocess.Popen([sys.executable, str(WORKER), "hang", str(tmp_path)], env=_environment())
    try:
        deadline = time.monotonic() + 600
        while not (tmp_path / "step-000002.tmp" / "weights.safetensors").exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    assert _names(tmp_path) == ["step-000001", "step-000002.tmp"]
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    assert found[0] == 1
    assert identical(found[1], _state(1))
    assert _names(tmp_path) == ["step-000001", "step-000002.tmp"], "another run may read while this one writes"
    _save(tmp_path, 3)
    assert _names(tmp_path) == ["step-000001", "step-000003"]


def test_a_full_disk_is_reported_by_the_next_call_and_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    done = subprocess.run(
        [sys.executable, str(WORKER), "full", str(tmp_path)], env=_environment(), capture_output=True, text=True,
        timeout=600, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{tmp_path}: the checkpoint of step 2 could not be written (")
    assert done.stdout.count("\n") == 1
    assert _names(tmp_path) == ["step-000001"]


def test_an_unwritable_folder_is_reported_by_wait_and_only_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    checkpoints.save(_state(1), {}, step=1)
    with pytest.raises(UserError, match="could not be written"):
        checkpoints.wait()
    checkpoints.wait()


def test_a_bug_in_the_writer_is_not_lost_either(tmp_path: Path) -> None:
    weights = {"a": torch.ones(2)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(TrainingState(weights, weights, weights, optimizer_step=1), {}, step=1)
    with pytest.raises(RuntimeError, match="share memory"):
        checkpoints.wait()


def test_the_record_has_size_and_hash_of_each_file(tmp_path: Path) -> None:
    _save(tmp_path, 4)
    record = json.loads((tmp_path / "step-000004" / "state.json").read_text())
    assert set(record["files"]) == {"weights.safetensors", "optimizer.safetensors"}
    assert record["step"] == record["optimizer_step"] == 4
    assert record["state"] == {"samples": 32}
    for name, entry in record["files"].items():
        assert entry["bytes"] == (tmp_path / "step-000004" / name).stat().st_size


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "step-000001").iterdir()}
    assert len(modes) == 3
    assert set(modes.values()) == {modes["state.json"]}
