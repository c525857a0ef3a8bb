"""The pool: a job that hangs, dies or eats memory is lost alone, and its process is replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from data_prep.pool import Allow, Lost, run_jobs
from tests.conftest import REPOSITORY


def act(job: str, allow: Allow) -> str:
    if job == "hang":
        allow(0.5)
        time.sleep(600)
    if job == "slow":
        time.sleep(600)
    if job == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "take the worker along":  # on a cluster, the process that started this one
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if job == "raise":
        raise ValueError("no")
    if job == "eat":
        try:
            bytearray(2**40)
        except MemoryError:
            return "memory error"
    if job == "patient":
        allow(60)
        time.sleep(0.7)
    return f"{job} done"


def test_bad_jobs_are_lost_alone() -> None:
    jobs = ["a", "hang", "slow", "die", "raise", "b", "eat", "patient", "c"]
    limits = {"slow": 0.5}
    outcomes = dict(run_jobs(act, jobs, workers=2, seconds_for=lambda job: limits.get(job, 600.0), memory_gib=8))
    lost = {job: outcome for job, outcome in outcomes.items() if isinstance(outcome, Lost)}
    assert {job: outcome.reason for job, outcome in lost.items()} == {
        "hang": "timeout",
        "slow": "timeout",
        "die": "crashed",
        "raise": "crashed",
    }
    assert lost["raise"].detail == "ValueError: no"
    assert "SIGSEGV" in lost["die"].detail
    assert outcomes["eat"] == "memory error"
    assert all(outcomes[job] == f"{job} done" for job in ("a", "b", "patient", "c"))


def test_no_jobs_and_fewer_jobs_than_workers() -> None:
    assert list(run_jobs(act, [], workers=3, seconds_for=lambda job: 1.0)) == []
    assert dict(run_jobs(act, ["a"], workers=3, seconds_for=lambda job: 600.0)) == {"a": "a done"}


def sleep_or_finish(mark: str, allow: Allow) -> str:
    """Write the process ID to the file `mark`; a job called "forever" then never ends."""
    path = Path(mark)
    path.with_suffix(".part").write_text(str(os.getpid()))
    path.with_suffix(".part").rename(path)
    if path.name == "forever":
        time.sleep(600)
    return mark


def test_leaving_early_kills_what_is_running(tmp_path: Path) -> None:
    forever, quick = tmp_path / "forever", tmp_path / "quick"
    running = run_jobs(sleep_or_finish, [str(forever), str(quick)], workers=2, seconds_for=lambda job: 600.0)
    assert next(running) == (str(quick), str(quick))
    process = int(wait_for(lambda: forever.read_text() if forever.exists() else ""))
    assert alive(process)
    started = time.monotonic()
    running.close()  # type: ignore[attr-defined]  # of a generator
    assert time.monotonic() - started < 300, "closing waits for the job"
    assert not alive(process)


def test_processes_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, pathlib, sys, time\n"
        "from data_prep.pool import run_jobs\n"
        "def work(job, allow):\n"
        "    pathlib.Path(job).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    list(run_jobs(work, [sys.argv[1]], workers=1, seconds_for=lambda job: 600.0))\n"
    )
    mark = tmp_path / "pid"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, str(script), str(mark)], env=environment)
    child = int(wait_for(lambda: mark.read_text() if mark.exists() else ""))
    parent.kill()
    parent.wait()
    wait_for(lambda: "gone" if not alive(child) else "")


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(look: object, seconds: float = 600.0) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = look()  # type: ignore[operator]  # passed as object
        if found:
            return str(found)
        time.sleep(0.05)
    raise AssertionError("did not happen in time")
