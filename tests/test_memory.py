"""Memory as the kernel reports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from video_swinv2 import memory
from video_swinv2.memory import free_memory_bytes, kernel_bytes, peak_memory_bytes

GIB = 2**30


@pytest.fixture
def control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A control group that uses 5 GiB, 2 GiB of them reclaimable page cache, on a machine with 7 GiB available."""
    (tmp_path / "meminfo").write_text("MemTotal: 9437184 kB\nMemAvailable: 7340032 kB\n")
    monkeypatch.setitem(memory._KERNEL_FILES, "MemAvailable", str(tmp_path / "meminfo"))
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    (tmp_path / "memory.current").write_text(f"{5 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2 * GIB}\nactive_file 3\n")
    return tmp_path


@pytest.mark.parametrize(
    ("limit", "free"), [(f"{6 * GIB}", 3 * GIB), (f"{100 * GIB}", 7 * GIB), ("max", 7 * GIB), (None, 7 * GIB)]
)
def test_free_memory_is_the_lesser_of_the_machine_and_the_control_group(
    control_group: Path, limit: str | None, free: int
) -> None:
    if limit is not None:
        (control_group / "memory.max").write_text(f"{limit}\n")
    assert free_memory_bytes() == free


def test_free_memory_is_unknown_where_the_kernel_reports_nothing(control_group: Path) -> None:
    (control_group / "meminfo").unlink()
    assert kernel_bytes("MemAvailable") is None
    assert free_memory_bytes() is None


def test_the_kernel_reports_bytes() -> None:
    """The resident size of this process grows by what it writes to."""
    before = kernel_bytes("VmRSS")
    if before is None:
        pytest.skip("the kernel reports no memory here")
    held = bytearray(b"x") * (200 * 2**20)
    after = kernel_bytes("VmRSS")
    assert after is not None
    assert after - before == pytest.approx(len(held), rel=0.1)


def test_peak_memory_is_that_of_the_process_itself() -> None:
    """getrusage would report the peak of the parent that started it."""
    held = bytearray(400 * 2**20)
    code = "from video_swinv2.memory import peak_memory_bytes; print(peak_memory_bytes())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert 2**23 < int(done.stdout) < len(held)
    assert peak_memory_bytes() > len(held)
