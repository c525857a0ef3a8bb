"""`test`, `probe` and `predict` in two processes without a launcher: if one fails, dies or stops, both end."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.launching import errors_in
from tests.evaluation.small import quick
from tests.training.resume_worker import Ranks
from video_swinv2.cli import main
from video_swinv2.distributed import world
from video_swinv2.evaluation import features, testing
from video_swinv2.evaluation.testing import run_test
from video_swinv2.report.scores import load_scores

SECONDS = 600  # after which a test gives up waiting for the end of a process; on a quiet machine it takes a few
SILENCE = 16.0


def act_when_scoring(act: Callable[[], None], guilty: int) -> None:
    """Let one process do something before it scores its second group."""
    if int(os.environ["RANK"]) != guilty:
        return
    really, groups = testing.forward_views, []

    def forward_views(*arguments: Any, **named: Any) -> torch.Tensor:
        groups.append(None)
        if len(groups) == 2:
            act()
        return really(*arguments, **named)

    testing.forward_views = features.forward_views = forward_views  # in this process only


def fail() -> None:
    raise ZeroDivisionError("the cause")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def verb(arguments: list[str], act: Callable[[], None], guilty: int) -> None:
    act_when_scoring(act, guilty)
    os._exit(main(arguments))


def test_arguments(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    settings = ["engine.device=cpu", "data.workers=0", *more]
    return ["test", str(model), str(data), "--protocol", "videoswin-4x3", "--out", str(out), *settings]


test_arguments.__test__ = False  # type: ignore[attr-defined]  # for pytest: not a test


@pytest.mark.parametrize(
    ("act", "guilty", "line"),
    [
        pytest.param(
            fail, 0, "failed with ZeroDivisionError: the cause; start the same command again", marks=pytest.mark.slow
        ),
        (fail, 1, "failed with ZeroDivisionError: the cause; start the same command again"),
        (die, 0, "process 0 of 2 died; start the same command again"),
        pytest.param(die, 1, "process 1 of 2 died; start the same command again", marks=pytest.mark.slow),
        pytest.param(stop, 1, "process 1 of 2 has not answered for 16 seconds", marks=pytest.mark.slow),
    ],
)
def test_a_test_ends_in_all_processes_and_continues(
    model_path: Path, data: Path, tested: Path, tmp_path: Path, act: Callable[[], None], guilty: int, line: str
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = test_arguments(model_path, data, out, f"engine.silence_seconds={SILENCE}")
    ranks = Ranks(2, verb, arguments, act, guilty, log=log)
    codes = ranks.wait(SECONDS)
    assert codes[1 - guilty] == 1, log.read_text()
    assert codes[guilty] == (1 if act is fail else -signal.SIGKILL)
    (found,) = errors_in(log)
    assert line in found
    assert log.read_text().count("Traceback") == (act is fail)
    again = Ranks(2, verb, arguments, die, -1, log=tmp_path / "again")
    assert again.wait(SECONDS) == [0, 0], (tmp_path / "again").read_text()
    scores, whole = load_scores(out / "scores.npz"), load_scores(tested / "scores.npz")
    np.testing.assert_array_equal(scores.logits.view(np.uint16), whole.logits.view(np.uint16))


def test_an_unknown_split_is_reported_once(model_path: Path, data: Path, tmp_path: Path) -> None:
    arguments = [*test_arguments(model_path, data, tmp_path / "out"), "--split", "holdout"]
    ranks = Ranks(2, verb, arguments, die, -1, log=tmp_path / "log")
    assert ranks.wait(SECONDS) == [2, 2]
    (line,) = errors_in(tmp_path / "log")
    assert "holdout" in line


def limit_collectives(arguments: list[str]) -> None:
    """Collectives fail after three seconds, and one of the processes takes seven for a group."""
    world.COLLECTIVE_TIMEOUT = timedelta(seconds=3)
    verb(arguments, lambda: time.sleep(7.0), 1)


def test_uneven_shares_are_waited_for(model_path: Path, data: Path, tmp_path: Path) -> None:
    ranks = Ranks(2, limit_collectives, test_arguments(model_path, data, tmp_path / "out"), log=tmp_path / "log")
    assert ranks.wait(SECONDS) == [0, 0], (tmp_path / "log").read_text()


def test_processes_that_test_different_models_are_refused(model_path: Path, data: Path, tmp_path: Path) -> None:
    ranks = Ranks(2, with_own_seed, test_arguments(model_path, data, tmp_path / "out"), log=tmp_path / "log")
    assert ranks.wait(SECONDS) == [1, 1]
    (line,) = errors_in(tmp_path / "log")
    assert "process 1 on " in line
    assert "overrides.frame_order is reversed instead of in-order" in line


def with_own_seed(arguments: list[str]) -> None:
    changes = ["data.frame_order=reversed"] if os.environ["RANK"] == "1" else []
    os._exit(main([*arguments, *changes]))


@pytest.fixture(scope="module")
def labelled(data: Path) -> Path:
    """The data set with a split to fit a probe on, and the same videos to test it on."""
    for split in ("train", "val"):
        (data / f"{split}.txt").write_text((data / "test.txt").read_text())
    return data


def test_two_processes_share_a_probe(model_path: Path, labelled: Path, tmp_path: Path) -> None:
    # Several groups of videos, so that each process has two.
    method = ["--k", "2", "--method", "knn", "--seeds", "1", "--random-weights"]
    settings = [*method, "engine.device=cpu", "data.workers=0", "batch_views=2"]
    probe = ["probe", str(model_path), str(labelled), *settings]
    ranks = Ranks(2, verb, [*probe, "--out", str(tmp_path / "2")], die, -1, log=tmp_path / "log")
    assert main([*probe, "--out", str(tmp_path / "1")]) == 0
    assert ranks.wait(SECONDS) == [0, 0], (tmp_path / "log").read_text()
    one, two = (json.loads((tmp_path / n / "probe.json").read_text()) for n in ("1", "2"))
    assert one == two
    assert (tmp_path / "log").read_text().count("top-1") == 2  # given and random weights, printed by one process
    failed = Ranks(2, verb, probe, fail, 1, log=tmp_path / "failed")
    assert failed.wait(SECONDS) == [1, 1]
    (line,) = errors_in(tmp_path / "failed")
    assert "process 1 of 2" in line


def test_two_processes_share_a_prediction(model_path: Path, data: Path, tmp_path: Path) -> None:
    arguments = ["predict", str(model_path), str(data), "--protocol", "center-1x1", "--json"]
    alone, both = (Ranks(n, verb, arguments, die, -1, log=tmp_path / str(n)) for n in (1, 2))
    assert alone.wait(SECONDS) == [0]
    assert both.wait(SECONDS) == [0, 0], (tmp_path / "2").read_text()
    assert json.loads((tmp_path / "1").read_text()) == json.loads((tmp_path / "2").read_text())
    over_time = Ranks(2, verb, [*arguments[:-1], "--every", "1"], die, -1, log=tmp_path / "over-time")
    assert over_time.wait(SECONDS) == [2, 2]
    (line,) = errors_in(tmp_path / "over-time")
    assert "predictions over time run in one process" in line


def test_a_single_process_raises(model_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, there is nobody to end, and the error is the caller's to handle."""
    monkeypatch.setattr(testing, "forward_views", lambda *_, **__: fail())
    with pytest.raises(ZeroDivisionError, match="the cause"):
        run_test(model_path, data, protocol="center-1x1", split="test", out=tmp_path, overrides=quick())
    assert not torch.distributed.is_initialized()
