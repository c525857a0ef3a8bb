"""Dask does the same as local processes: a dead worker loses no video, one that kills workers is lost alone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep import executors
from data_prep.jobs import TranscodeSettings
from data_prep.pool import Lost, each
from data_prep.prepare import prepare
from data_prep.state import PreparationState
from tests.data_prep.kill import differences
from tests.data_prep.test_pool import act
from video_swinv2.errors import UsageError, UserError

distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'video-swinv2[cluster]'")
SMALL = TranscodeSettings(short_side=32)


def seconds_for(job: str) -> float:
    return 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[object]:
    """Two workers, each a process with a nanny that replaces it."""
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        yield cluster


def test_jobs_on_a_cluster_run_in_killable_processes(cluster: distributed.LocalCluster) -> None:
    jobs = ["a", "hang", "die", "b", "c"]
    with executors.start_crew(f"dask:{cluster.scheduler_address}", 1, seconds_for, 8.0) as crew:
        assert crew.workers() == 2
        outcomes = dict(each(crew, act, jobs))
    lost = {job: outcome.reason for job, outcome in outcomes.items() if isinstance(outcome, Lost)}
    assert lost == {"hang": "timeout", "die": "crashed"}
    assert [outcomes[job] for job in "abc"] == ["a done", "b done", "c done"]


def test_a_killed_worker_loses_nothing(cluster: distributed.LocalCluster, write_video: object, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (60, 30, 40, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    original = write_video(tmp_path / "raw" / "a" / "00.mp4", frames)  # type: ignore[operator]  # the fixture
    for number in range(1, 12):
        (tmp_path / "raw" / "a" / f"{number:02d}.mp4").write_bytes(original.read_bytes())
    (tmp_path / "raw" / "a" / "bad.mp4").write_bytes(b"junk")
    prepare(tmp_path / "raw", tmp_path / "local", SMALL, name="x", workers=2)
    with distributed.Client(cluster, set_as_default=False) as client:
        pids = client.run(os.getpid)
    address, out = f"dask:{cluster.scheduler_address}", tmp_path / "dask"
    victim = threading.Thread(target=kill_at_work, args=(next(iter(pids.values())), out))
    victim.start()
    prepare(tmp_path / "raw", out, SMALL, name="x", executor=address)
    victim.join()
    assert differences(tmp_path / "local", out) == []
    with PreparationState(out) as state:
        assert [row["attempts"] for row in state.rows()] == [1] * 13


def kill_at_work(pid: int, out: Path) -> None:
    end = time.monotonic() + 600
    while time.monotonic() < end and not list(out.glob("videos/train/a/*.mp4")):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_job_that_kills_its_workers_is_lost_alone(cluster: distributed.LocalCluster) -> None:
    with executors.start_crew(f"dask:{cluster.scheduler_address}", 1, seconds_for, 8.0) as crew:
        outcomes = dict(each(crew, act, ["a", "take the worker along", "b"]))
    assert outcomes["take the worker along"] == Lost("crashed", "every Dask worker that took it died")
    assert (outcomes["a"], outcomes["b"]) == ("a done", "b done")


@pytest.mark.slow
def test_a_new_local_cluster(tmp_path: Path) -> None:
    with executors.start_crew("dask", 2, seconds_for, 8.0) as crew:
        assert dict(each(crew, act, ["a", "b"])) == {"a": "a done", "b": "b done"}


def test_an_unreachable_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(UserError, match="no Dask scheduler answers"),
        executors.start_crew("dask:tcp://127.0.0.1:1", 1, seconds_for, 8.0),
    ):
        pass
    for where in ("ray", "dask:", "local:4", ""):
        with (
            pytest.raises(UsageError, match="must be local, dask"),
            executors.start_crew(where, 1, seconds_for, 8.0),
        ):
            pass
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if it were not installed
    with (
        pytest.raises(UsageError, match=r"pip install 'video-swinv2\[cluster\]'"),
        executors.start_crew("dask", 1, seconds_for, 8.0),
    ):
        pass
