"""What a run takes from a machine: real limits and file systems, and the loaders' true use of shared memory."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import small_config, write_noise_clips
from video_swinv2.config import Config, load_config
from video_swinv2.data.datasets import SampleDataset
from video_swinv2.data.loading import BatchPlan, training_loader
from video_swinv2.data.sources import labelled_manifest
from video_swinv2.plan.loader_memory import loader_bytes, micro_batch_bytes
from video_swinv2.tools import resources
from video_swinv2.tools.demo import recipe
from video_swinv2.tools.resources import (
    PlannedRun,
    check_disk,
    check_memory,
    check_open_files,
    check_shared_memory,
)

KINETICS = load_config(recipe("kinetics400/base.yaml"))


def planned(config: Config = KINETICS, processes: int = 8) -> PlannedRun:
    return PlannedRun(config, processes, "a test")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    found = check_disk(small_disk / "runs")
    assert found.state == "fault"
    assert f"MB free in {small_disk}" in found.found
    assert "choose another folder" in found.fix


def test_a_disk_that_cannot_be_written() -> None:
    found = check_disk(Path("/proc/runs"))
    assert found.state == "fault"
    assert "/proc is not writable" in found.found


def test_shared_memory_is_sized_from_ranks_and_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight ranks of the Kinetics recipe fill 10 GB, and the loaders of a validation as much again."""

    def free(gigabytes: float) -> None:
        usage = shutil._ntuple_diskusage(int(2e11), 0, int(1e9 * gigabytes))  # type: ignore[attr-defined]
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda folder: usage)

    # 8 clips of 32 frames of 224x224 in three colours, (8 workers x 4 batches + 1) times, by 8 ranks.
    needed = 8 * 33 * 8 * 3 * 32 * 224 * 224
    assert needed == 8 * loader_bytes(KINETICS.data, 8)
    for gigabytes, state in ((1.2, "fault"), (9.0, "fault"), (12.0, "note"), (21.0, "ok")):
        free(gigabytes)
        found = check_shared_memory(tmp_path, planned())
        assert found.state == state, gigabytes
        assert "10.17 GB needed, 2 times that while validating: 8 process(es) x 8 workers x 4 batches" in found.found
    free(12.0)
    found = check_shared_memory(tmp_path, planned())
    assert "--shm-size=19g" in found.fix
    workers = int(found.fix.split("data.workers=")[1].split(",")[0])
    for changed, state in ((workers, "ok"), (workers + 1, "note")):  # the fix is the largest number that suffices
        config = load_config(recipe("kinetics400/base.yaml"), [f"data.workers={changed}"])
        assert check_shared_memory(tmp_path, planned(config)).state == state
    free(2.6)
    assert check_shared_memory(tmp_path, planned(processes=1)).state == "ok"


def test_little_shared_memory(small_disk: Path) -> None:
    """A real small file system, as a container's 64 MB."""
    found = check_shared_memory(small_disk, planned(processes=1))
    assert found.state == "fault"
    assert "--shm-size=3g" in found.fix
    assert "data.workers=0" in found.fix
    assert check_shared_memory(small_disk / "absent", planned()).state == "note"
    assert check_shared_memory(small_disk, planned(small_config(workers=0))).state == "ok"


def shared_bytes() -> int:
    """The sizes of all files in shared memory that this process or one of its children has open, each once."""
    sizes = {}
    for pid in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed in the meantime
                if os.readlink(handle).startswith("/dev/shm/torch"):
                    sizes[handle.stat().st_ino] = handle.stat().st_size
    return sum(sizes.values())


def test_a_loader_fills_as_much_shared_memory_as_is_planned(tmp_path: Path, write_video: Any) -> None:
    """Two workers that have read ahead all they may: exactly the planned bytes of pixels, seen in their files."""
    folder = write_noise_clips(tmp_path, write_video, [0, 1] * 10, ["a", "b"])
    config = small_config(workers=2, data={"source": str(folder), "frames": 4, "image_size": 128, "workers": 2})
    entries = labelled_manifest(config.data, "train").entries
    samples = SampleDataset(entries, config.data, config.augment, 0, None)
    planned_bytes, batch_bytes = loader_bytes(config.data, 4), micro_batch_bytes(config.data, 4)
    assert batch_bytes == 4 * 3 * 4 * 128 * 128
    batches = iter(training_loader(samples, BatchPlan(4, 1, 4), seed=0, rank=0, first=0, last=100, pin=False))
    batch = next(batches)
    assert batch.pixels.nbytes == batch_bytes
    # Labels and the table of files in hand are shared too, and take no more than a page each.
    until = time.monotonic() + 600
    while (seen := shared_bytes()) < planned_bytes and time.monotonic() < until:
        time.sleep(0.05)
    assert planned_bytes <= seen < planned_bytes + batch_bytes
    del batches, batch
    gc.collect()


def test_files_are_sized_from_workers_and_ranks() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    many = load_config(recipe("kinetics400/base.yaml"), ["data.workers=32"])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
        assert check_open_files(planned()).state == "ok"
        found = check_open_files(planned(many))
        assert (found.state, found.found) == ("fault", "at most 1024; 1664 needed by a process with 32 workers")
        assert found.fix == "ulimit -n 1664"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_memory_is_sized_from_ranks_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "free_memory_bytes", lambda: 32_000_000_000)
    assert check_memory(planned(processes=1)).state == "ok"
    found = check_memory(planned(processes=8))
    assert found.state == "fault"
    assert "32.0 GB free" in found.found
    assert "8 process(es) with 8 workers each need 61.9 GB" in found.found
    monkeypatch.setattr(resources, "free_memory_bytes", lambda: None)
    assert check_memory(planned()).state == "ok"
