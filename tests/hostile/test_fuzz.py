"""The fuzzer itself: it finds each kind of fault, and a short run of it finds none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile import fuzz, targets
from tests.hostile.bounded import run_bounded
from video_swinv2.errors import UserError

KINDS = ("archive", "boxes", "config", "image", "list", "model", "record", "scores", "shard")


def test_a_short_run_finds_no_fault(tmp_path: Path) -> None:
    """Videos have a test of their own, tests/data/test_mutations.py."""
    kinds = [f"--kind={kind}" for kind in KINDS]
    command = ("-m", "tests.hostile.fuzz", "--mutants", "240", "--workers", "1", "--keep", tmp_path, *kinds)
    ended = run_bounded(*command, cpu_seconds=300)
    assert ended.code == 0, ended.out + ended.err
    assert "0 faults" in ended.out


def raise_value_error(path: Path) -> None:
    raise ValueError("no")


def refuse_without_a_name(path: Path) -> None:
    raise UserError("cannot be read")


def refuse_in_two_lines(path: Path) -> None:
    raise UserError(f"{path}: cannot\nbe read")


def refuse(path: Path) -> None:
    raise UserError(f"{path}: cannot be read")


@pytest.mark.parametrize(
    ("target", "number", "fault"),
    [
        (raise_value_error, 1, "ValueError: no"),
        (refuse_without_a_name, 1, "does not name its file"),
        (refuse_in_two_lines, 1, "takes several lines"),
        (refuse, fuzz.SOUND, "is refused although nothing was changed"),
        (refuse, 1, ""),
        (lambda path: None, 1, ""),
    ],
)
def test_what_counts_as_a_fault(target, number, fault, tmp_path, monkeypatch):
    seed = tmp_path / "seed.txt"
    seed.write_text("content")
    monkeypatch.setitem(targets.TARGETS, "image", (target,))
    verdict = fuzz.judge(fuzz.Trial("image", 0, seed, number, tmp_path), lambda seconds: None)
    assert fault in verdict.fault
    assert bool(verdict.fault) == bool(fault)
    assert [path.name for path in tmp_path.iterdir()] == ["seed.txt"]


def test_memory_counts(tmp_path, monkeypatch):
    seed = tmp_path / "seed.txt"
    seed.write_text("content")
    monkeypatch.setitem(targets.TARGETS, "image", (lambda path: None,))
    monkeypatch.setattr(fuzz, "MAX_BYTES", 2**20)
    assert fuzz.judge(fuzz.Trial("image", 0, seed, 1, tmp_path), lambda seconds: None).fault.endswith(" GiB")
