"""Processes that meet, agree and wait for each other, in worlds of two and four real processes."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from tests.distributed.launching import errors_in
from tests.training.resume_worker import Ranks
from video_swinv2.distributed import world as world_room
from video_swinv2.distributed.agreement import require_agreement
from video_swinv2.distributed.collectives import all_gather_objects, gather_shares
from video_swinv2.distributed.lifeline import Cause
from video_swinv2.distributed.session import describe_failure, distributed_session, is_broken_collective
from video_swinv2.distributed.world import World, alone
from video_swinv2.errors import DEBUG_VARIABLE, UsageError

SECONDS = 600


def session_in(folder: Path, size: int) -> None:
    """Rank 1 comes to the meeting of all much later than collectives may take."""
    world_room.COLLECTIVE_TIMEOUT = timedelta(seconds=2)
    with distributed_session("cpu", "advice", end_with_launcher=True) as world:
        assert all_gather_objects(world, world.rank) == list(range(size))
        if world.rank == 1:
            time.sleep(5)
        assert gather_shares(world, world.rank) == list(range(size))
        assert gather_shares(world, world.rank) == list(range(size))
        (folder / str(world.rank)).touch()


@pytest.mark.parametrize("size", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_all_wait_for_the_slowest_without_a_limit(tmp_path: Path, size: int) -> None:
    ranks = Ranks(size, session_in, tmp_path, size, log=tmp_path / "log")
    assert ranks.wait(SECONDS) == [0] * size, (tmp_path / "log").read_text()
    assert all((tmp_path / str(rank)).exists() for rank in range(size))


def leave_many_times(folder: Path) -> None:
    world = world_room.join_world("cpu")
    for _ in range(60):
        with distributed_session("cpu", "advice", end_with_launcher=True):
            all_gather_objects(world, world.rank)
    (folder / str(world.rank)).touch()
    world_room.leave_world()


def test_nobody_takes_a_goodbye_for_a_death(tmp_path: Path) -> None:
    """Whichever process is the first to leave, and whatever the others are sending at the moment."""
    ranks = Ranks(3, leave_many_times, tmp_path, log=tmp_path / "log")
    assert ranks.wait(SECONDS) == [0, 0, 0], (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text() == ""
    assert all((tmp_path / str(rank)).exists() for rank in range(3))


def break_in(victim: int) -> None:
    """One of four processes is gone; the collective of the others breaks."""
    with distributed_session("cpu", "do it again", end_with_launcher=True) as world:
        if world.rank == victim:
            os._exit(7)
        for _ in range(1000):
            all_gather_objects(world, world.rank)
            time.sleep(0.01)


@pytest.mark.parametrize("victim", [2, pytest.param(0, marks=pytest.mark.slow)])
def test_the_broken_collectives_of_the_others_are_not_reported(tmp_path: Path, victim: int) -> None:
    ranks = Ranks(4, break_in, victim, log=tmp_path / "log")
    codes = ranks.wait(SECONDS)
    assert codes.pop(victim) == 7
    assert codes == [1, 1, 1]
    (line,) = errors_in(tmp_path / "log")
    assert line.startswith(f"error: process {victim} of 4 died; do it again")
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_facts_are_compared_by_name() -> None:
    require_agreement(alone("cpu"), {"optim": {"lr": 0.1}})


def test_what_an_exception_means_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(1, 2, 1, alone("cpu").device)
    failure = describe_failure(UsageError("optim.lr: too large"), world, "advice")
    assert (failure.text, failure.code, failure.cause) == ("error: optim.lr: too large", 2, Cause.ERROR)
    assert describe_failure(KeyboardInterrupt(), world, "advice").text == "error: interrupted; advice"
    broken = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.1]:30497")
    assert is_broken_collective(broken)
    assert describe_failure(broken, world, "advice").cause == Cause.BROKEN_COLLECTIVE
    assert not is_broken_collective(RuntimeError("shapes do not match"))
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    text = describe_failure(UsageError("optim.lr: too large"), world, "advice").text
    assert text.startswith("video_swinv2.errors.UsageError: optim.lr: too large\nerror: process 1 of 2 on ")
