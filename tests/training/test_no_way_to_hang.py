"""Two processes of a run, of which one fails, dies or stops: both end, with one report, and the run can be resumed.

Most processes are forked from a server and started without a launcher, so nobody but themselves can end them.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.launching import LAUNCHERS, clean_environment, errors_in
from tests.training.resume_worker import Ranks, train_run
from tests.training.runs import small_disk, write_noise_clips, write_recipe
from video_swinv2.cli import main
from video_swinv2.distributed.signals import EXIT_RESTART
from video_swinv2.errors import UserError
from video_swinv2.training.tasks.classification import Classification
from video_swinv2.weights.store import read_tensors

SECONDS = 600  # after which a test gives up waiting for the end of a process; on a quiet machine it takes a few
SILENCE = 16.0
STEPS = 8
WriteRecipe = Callable[..., Path]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    return write_noise_clips(tmp_path_factory.mktemp("clips"), write_video, [0, 1] * 4, ("even", "odd"))


def recipe_in(folder: Path, clips: Path, **changes: Any) -> Path:
    values = {
        "out": str(folder / "run"),
        "init": "scratch",
        "model": {"name": "swinv2_nano", "window": [2, 4, 4], "drop_path": 0.1},
        "data": {"source": str(clips), "frames": 2, "image_size": 32, "workers": 1},
        "optim": {"epochs": STEPS / 2, "lr": 1e-3, "batch": 4, "micro_batch": 2},
        "engine": {"zero_stage": 1, "precision": "fp32", "device": "cpu"},
        "log_every": 1,
        "val_epochs": STEPS / 2,
        "checkpoint_minutes": 0,
    }
    return write_recipe(folder, values, changes)


@pytest.fixture
def recipe(tmp_path: Path, clips: Path) -> WriteRecipe:
    return lambda **changes: recipe_in(tmp_path, clips, **changes)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> dict[str, Tensor]:
    """The weights of a run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ranks = Ranks(2, train_run, recipe_in(folder, clips), log=folder / "log")
    assert ranks.wait() == [0, 0], (folder / "log").read_text()
    return read_tensors(folder / "run" / "last.safetensors")[0]


def train_and_fail(config: Path, guilty: int, error: Exception) -> None:
    """Like `train_run`, but one process raises an error of its own in its fourth step.

    Destroying the process group would hang, as it does under NCCL while another process is stuck in a collective.
    """
    torch.distributed.destroy_process_group = lambda *_: time.sleep(1e6)
    if int(os.environ["RANK"]) == guilty:
        really, steps = Classification.loss, []

        def loss(*arguments: Any) -> Tensor:
            steps.append(None)
            if len(steps) == 4:
                raise error
            return really(*arguments)

        Classification.loss = loss  # type: ignore[method-assign]  # in this process only
    train_run(config)


def newest_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in run.glob("checkpoints/step-??????")), default=0)


def wait_for_step(ranks: Ranks, run: Path, step: int) -> None:
    while newest_step(run) < step:
        assert ranks.running, "it ended before it could be disturbed"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def family(ranks: Ranks) -> list[int]:
    """The processes of a run and the loader workers that they have started."""
    found = []
    for process in ranks.processes:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        found += [int(process.pid or 0), *map(int, children.read_text().split())]
    return found


def assert_all_end(ranks: Ranks, members: list[int], codes: set[int | None]) -> None:
    started = time.monotonic()
    assert set(ranks.wait(SECONDS)) <= codes
    while any(map(is_alive, members)):
        assert time.monotonic() - started < SECONDS, "loader workers are left over"
        time.sleep(0.1)


def assert_resumes(config: Path, tmp_path: Path, undisturbed: dict[str, Tensor]) -> None:
    """The same command goes on to weights that are equal to the bit."""
    ranks = Ranks(2, train_run, config, log=tmp_path / "resumed.log")
    assert ranks.wait() == [0, 0], (tmp_path / "resumed.log").read_text()
    assert "weights: own checkpoint" in (tmp_path / "resumed.log").read_text()
    weights = read_tensors(tmp_path / "run" / "last.safetensors")[0]
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


@pytest.mark.parametrize(
    ("guilty", "error"),
    [
        (1, ZeroDivisionError("the cause")),
        pytest.param(0, ZeroDivisionError("the cause"), marks=pytest.mark.slow),
        pytest.param(1, UserError("the cause"), marks=pytest.mark.slow),
        pytest.param(0, UserError("the cause"), marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_process_ends_both_and_is_reported_once(
    recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, Tensor], guilty: int, error: Exception
) -> None:
    config, log = recipe(), tmp_path / "log"
    ranks = Ranks(2, train_and_fail, config, guilty, error, log=log)
    wait_for_step(ranks, tmp_path / "run", 1)
    assert_all_end(ranks, family(ranks), {1})
    text = log.read_text()
    (line,) = errors_in(log)
    if isinstance(error, UserError):
        assert line == "error: the cause"
        assert "Traceback" not in text
    else:
        assert f"process {guilty} of 2 on " in line
        assert "failed with ZeroDivisionError: the cause; start the same command again" in line
        assert text.count("Traceback") == 1
        assert "in train_and_fail" in text or "raise error" in text
    assert_resumes(config, tmp_path, undisturbed)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_is_killed_ends_both(
    recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, Tensor], victim: int
) -> None:
    config, log = recipe(), tmp_path / "log"
    ranks = Ranks(2, train_run, config, log=log)
    wait_for_step(ranks, tmp_path / "run", 2)
    members = family(ranks)
    ranks.processes[victim].kill()
    assert_all_end(ranks, members, {1, -signal.SIGKILL})
    assert ranks.processes[1 - victim].exitcode == 1
    (line,) = errors_in(log)
    assert line.startswith(f"error: process {victim} of 2 died; start the same command again")
    assert "Traceback" not in log.read_text()
    assert_resumes(config, tmp_path, undisturbed)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_is_stopped_is_named_and_ended(
    recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, Tensor], victim: int
) -> None:
    config, log = recipe(engine={"silence_seconds": SILENCE}), tmp_path / "log"
    ranks = Ranks(2, train_run, config, log=log)
    wait_for_step(ranks, tmp_path / "run", 2)
    members = family(ranks)
    os.kill(int(ranks.processes[victim].pid or 0), signal.SIGSTOP)
    assert_all_end(ranks, members, {1, -signal.SIGKILL})
    assert ranks.processes[1 - victim].exitcode == 1
    (line,) = errors_in(log)
    assert line.startswith(f"error: process {victim} of 2 has not answered for 16 seconds (engine.silence_seconds)")
    assert f"lifeline: process {victim} of 2 has not answered for 8 seconds" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert_resumes(config, tmp_path, undisturbed)


@pytest.mark.slow
def test_a_process_that_is_stopped_for_a_moment_costs_nothing(
    recipe: WriteRecipe, tmp_path: Path, undisturbed: dict[str, Tensor]
) -> None:
    """Both are stopped, as a scheduler suspends a job, for longer than the limit; then one of them, for less."""
    log = tmp_path / "log"
    ranks = Ranks(2, train_run, recipe(engine={"silence_seconds": SILENCE}), log=log)
    wait_for_step(ranks, tmp_path / "run", 2)
    for stopped, seconds in ((ranks.processes, 2 * SILENCE), (ranks.processes[1:], 0.7 * SILENCE)):
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in stopped:
                os.kill(int(process.pid or 0), number)
            if number == signal.SIGSTOP:
                time.sleep(seconds)
    assert ranks.wait(SECONDS) == [0, 0], log.read_text()
    weights = read_tensors(tmp_path / "run" / "last.safetensors")[0]
    assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


@pytest.mark.slow
def test_data_that_disappears_is_one_line(tmp_path: Path, clips: Path, undisturbed: dict[str, Tensor]) -> None:
    data = shutil.copytree(clips, tmp_path / "data")
    config, log = recipe_in(tmp_path, data), tmp_path / "log"
    ranks = Ranks(2, train_run, config, log=log)
    wait_for_step(ranks, tmp_path / "run", 2)
    members = family(ranks)
    data.rename(tmp_path / "elsewhere")
    assert_all_end(ranks, members, {1})
    (line,) = errors_in(log)
    assert "no such file" in line
    assert str(data) in line
    assert "Traceback" not in log.read_text()
    (tmp_path / "elsewhere").rename(data)
    assert_resumes(config, tmp_path, undisturbed)


@pytest.mark.slow
def test_a_full_disk_ends_both_and_with_room_the_run_resumes(
    tmp_path: Path, clips: Path, undisturbed: dict[str, Tensor]
) -> None:
    with small_disk(tmp_path / "disk") as make_room:
        config, log = recipe_in(tmp_path, clips, out=str(tmp_path / "disk" / "run")), tmp_path / "log"
        assert Ranks(2, train_run, config, log=log).wait(SECONDS) == [1, 1]
        (line,) = errors_in(log)
        assert "disk/run" in line
        assert "free space" in line
        assert "Traceback" not in log.read_text()
        make_room()
        assert Ranks(2, train_run, config, log=tmp_path / "resumed.log").wait(SECONDS) == [0, 0]
        weights = read_tensors(tmp_path / "disk" / "run" / "last.safetensors")[0]
        assert all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def train_in(folders: tuple[Path, Path], config: Path) -> None:
    """Each process runs in a folder of its own, so a relative path means another folder for each."""
    os.chdir(folders[int(os.environ["RANK"])])
    train_run(config)


@pytest.mark.parametrize("steps", [(5, 4), *(pytest.param(each, marks=pytest.mark.slow) for each in ((5, 0), (0, 5)))])
def test_a_run_folder_that_is_not_shared_is_refused(
    recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: tuple[int, int]
) -> None:
    """As on machines with local disks, where one process sees a checkpoint of step 5 and the other one of step 4."""
    config, folders = recipe(out="run"), (tmp_path / "0", tmp_path / "1")
    for folder, step in zip(folders, steps, strict=True):
        (folder / "run" / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    ranks = Ranks(2, train_in, folders, config, log=tmp_path / "log")
    assert ranks.wait(SECONDS) == [1, 1]
    (line,) = errors_in(tmp_path / "log")
    assert "run/.lock" in line
    assert "the folder must be on a file system that all machines of the run share" in line


def train_with(changes: tuple[str, ...], guilty: int, config: Path) -> None:
    """One of the processes overrides something."""
    extra = changes if int(os.environ["RANK"]) == guilty else ()
    sys.exit(main(["train", str(config), *extra]))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ("seed=1", "seed is 1 instead of 0"),
        pytest.param("optim.lr=0.01", "optim.lr is 0.01 instead of 0.001", marks=pytest.mark.slow),
        pytest.param("data", "data.samples is 6 instead of 8", marks=pytest.mark.slow),
        ("content", "data.data_fingerprint is "),
    ],
)
def test_processes_that_differ_are_refused(tmp_path: Path, clips: Path, change: str, found: str) -> None:
    data, changes = tmp_path / "data", (change,)
    shutil.copytree(clips, data)
    lines = (clips / "train.txt").read_text().splitlines()
    other = {"data": lines[:6], "content": [*lines[:6], lines[7], lines[6]]}
    if change in other:
        # The same path, but another content for one of the processes, as on machines with local copies of the data.
        shutil.copytree(clips, tmp_path / "1" / "data")
        (tmp_path / "0").mkdir()
        (tmp_path / "0" / "data").symlink_to(data)
        (tmp_path / "1" / "data" / "train.txt").write_text("\n".join(other[change]) + "\n")
        config = recipe_in(tmp_path, clips, data={"source": "data"})
        ranks = Ranks(2, train_in, (tmp_path / "0", tmp_path / "1"), config, log=tmp_path / "log")
    else:
        ranks = Ranks(2, train_with, changes, 1, recipe_in(tmp_path, data), log=tmp_path / "log")
    assert ranks.wait(SECONDS) == [1, 1]
    (line,) = errors_in(tmp_path / "log")
    assert re.match(r"error: process 1 on \S+ differs from process 0 on \S+: ", line)
    assert found in line


def test_a_second_run_in_one_folder_is_refused_at_once(recipe: WriteRecipe, tmp_path: Path) -> None:
    """The first one goes on, until it is asked to stop."""
    config, log, second = recipe(optim={"epochs": 5000}, val_epochs=5000), tmp_path / "log", tmp_path / "second.log"
    ranks = Ranks(2, train_run, config, log=log)
    wait_for_step(ranks, tmp_path / "run", 1)
    late = Ranks(2, train_run, config, log=second)
    assert late.wait(SECONDS) == [1, 1]
    assert errors_in(second) == [
        f"error: {tmp_path / 'run'}: another run is training here; wait for it, or choose another out"
    ]
    assert ranks.running
    ranks.processes[1].terminate()
    assert ranks.wait(SECONDS) == [EXIT_RESTART, EXIT_RESTART]
    (line,) = errors_in(log)
    assert "the checkpoint is saved; the same command resumes the run" in line


def test_processes_that_do_not_come_are_named(recipe: WriteRecipe, tmp_path: Path) -> None:
    config = recipe(engine={"meeting_seconds": 3})
    ranks = Ranks(3, train_run, config, log=tmp_path / "log", absent=(1,))
    assert ranks.wait(SECONDS) == [1, 1]
    lines = errors_in(tmp_path / "log")
    assert lines
    assert all("the 3 processes of this run have not found each other within 3 seconds (" in line for line in lines)


# For torchrun: the second process never comes to the meeting.
MEET_ALONE = """
import os, sys, time
if os.environ["RANK"] == "1":
    time.sleep(600)
from video_swinv2.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""


@pytest.mark.slow
def test_the_end_of_the_launcher_ends_a_process_that_is_starting(recipe: WriteRecipe, tmp_path: Path) -> None:
    script = tmp_path / "meet_alone.py"
    script.write_text(MEET_ALONE)
    command = [sys.executable, *LAUNCHERS["torchrun"], str(script), str(recipe(engine={"meeting_seconds": 3600}))]
    launcher = subprocess.Popen(command, env=clean_environment())
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    while len(workers := [int(pid) for pid in children.read_text().split() if str(script) in command_of(pid)]) < 2:
        assert launcher.poll() is None
        time.sleep(0.1)
    (waiting,) = [pid for pid in workers if b"\0RANK=0\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    time.sleep(3.0)  # it may be anywhere between its start and the meeting
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + SECONDS
    while is_alive(waiting):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def command_of(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except FileNotFoundError:
        return ""
