"""Tests on any number of processes, killed, or with decoders that crash and hang: the same scores to the bit."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import video_swinv2 as vs
from tests.evaluation.small import N_VIDEOS, quick
from video_swinv2 import files
from video_swinv2.data.decode import VideoReader
from video_swinv2.errors import UserError
from video_swinv2.evaluation import parts, reading, testing
from video_swinv2.evaluation.parts import ScoredVideos
from video_swinv2.evaluation.testing import run_test
from video_swinv2.report.scores import load_scores

SCRIPT = """
import sys
from pathlib import Path
from video_swinv2.evaluation.overrides import TestOverrides
from video_swinv2.evaluation.testing import run_test
from video_swinv2.distributed.world import join_world, leave_world
model, data, out = sys.argv[1:]
join_world("cpu")  # one rendezvous for both tests
for protocol, batch in (("center-1x1", 2), ("videoswin-4x3", 12)):
    result = run_test(model, data, protocol=protocol, split="test", out=Path(out) / protocol,
                      overrides=TestOverrides(workers=1, device="cpu", batch_views=batch))
    print("processes", result["processes"])
leave_world()
"""


def test_two_processes_give_the_scores_of_one_to_the_bit(model_path: Path, with_broken: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(vs.__file__).parents[1])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    both = subprocess.Popen([*launcher, script, model_path, with_broken, tmp_path / "2"], env=environment)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as torchrun does: the number of threads decides how sums are split
    for protocol, batch in (("center-1x1", 2), ("videoswin-4x3", 12)):
        out = tmp_path / "1" / protocol
        run_test(model_path, with_broken, protocol=protocol, split="test", out=out, overrides=quick(batch_views=batch))
    torch.set_num_threads(threads)
    assert both.wait(timeout=600) == 0
    for protocol in ("center-1x1", "videoswin-4x3"):
        one, two = (load_scores(tmp_path / n / protocol / "scores.npz") for n in ("1", "2"))
        assert (one.metadata["processes"], two.metadata["processes"]) == (1, 2)
        assert one.paths == two.paths
        assert one.reasons == two.reasons
        np.testing.assert_array_equal(one.logits.view(np.uint16), two.logits.view(np.uint16))
        np.testing.assert_array_equal(one.views, two.views)


def _one_of(rank: int, size: int, port: int, arguments: tuple[Path, Path, Path], kill: str, kills: int) -> None:
    """One process of a test. `kill` says where it ends itself with signal 9, in its `kills`-th part."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    die, times = (lambda: os.kill(os.getpid(), signal.SIGKILL)), Counter[str]()
    really_save, really_commit = parts.PartFolder.save, files.commit_file

    def save(folder: parts.PartFolder, part: int, scored: ScoredVideos) -> None:
        times["save"] += 1
        if kill == "before" and times["save"] == kills:
            die()
        really_save(folder, part, scored)
        if kill == "after" and times["save"] == kills:
            die()

    def commit(partial: Path, path: Path) -> None:
        if kill == "within" and times["save"] == kills:
            partial.write_bytes(partial.read_bytes()[:99])
            die()
        really_commit(partial, path)

    parts.PartFolder.save, files.commit_file = save, commit  # type: ignore[method-assign]  # in this process only
    if kill == "report":
        testing.write_report = lambda out: die()
    model, data, out = arguments
    run_test(model, data, protocol="videoswin-4x3", split="test", out=out, overrides=quick())


def run_world(size: int, *arguments: Path, kill: str = "", kills: int = 1) -> list[int | None]:
    """Exit codes of a test in `size` processes. When one dies, the others are killed, as a launcher would."""
    context = torch.multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_one_of, args=(rank, size, port, arguments, kill, kills)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + 900
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.02)
    return [process.exitcode for process in processes]


def test_any_number_of_processes_killed_at_any_time_end_in_the_same_bits(
    model_path: Path, with_broken: Path, tmp_path: Path
) -> None:
    """1 and 3 processes, and a test killed five times that resumes each time on another number of processes."""
    done: list[int] = []
    for size in (1, 3):
        assert run_world(size, model_path, with_broken, tmp_path / str(size)) == [0] * size
    for size, kill, kills in ((1, "before", 1), (2, "within", 1), (3, "after", 1), (1, "after", 1), (2, "report", 1)):
        codes = run_world(size, model_path, with_broken, tmp_path / "killed", kill=kill, kills=kills)
        assert -signal.SIGKILL in codes
        done.append(len(list((tmp_path / "killed").glob("shards/*/[0-9]*.npz"))))
    assert done[:2] == [0, 0]
    assert 1 <= done[2] < done[3] <= 4
    assert done[4] == 9, "killed while writing the report, after all parts were done"
    assert run_world(3, model_path, with_broken, tmp_path / "killed") == [0, 0, 0]
    one, *others = (load_scores(tmp_path / name / "scores.npz") for name in ("1", "3", "killed"))
    assert [bool(reason) for reason in one.reasons] == [i in (3, 8) for i in range(9)]
    for other, processes in zip(others, (3, 3), strict=True):
        assert other.metadata["processes"] == processes
        assert (other.paths, other.reasons) == (one.paths, one.reasons)
        np.testing.assert_array_equal(other.logits.view(np.uint16), one.logits.view(np.uint16))
        np.testing.assert_array_equal(other.views, one.views)
    strips = [(tmp_path / name / "strips.npz").read_bytes() for name in ("1", "3", "killed")]
    assert len(set(strips)) == 1
    figures = [json.loads((tmp_path / name / "results.json").read_text())["top1_bounds"] for name in ("1", "killed")]
    assert figures[0] == figures[1]
    assert not (tmp_path / "killed" / "shards").exists()


def test_parts_of_another_test_are_not_reused(model_path: Path, data: Path, tested: Path, tmp_path: Path) -> None:
    assert run_world(1, model_path, data, tmp_path, kill="after", kills=3) == [-signal.SIGKILL]
    assert len(list(tmp_path.glob("shards/*/[0-9]*.npz"))) == 3
    overrides = quick(frame_order="reversed")
    run_test(model_path, data, protocol="videoswin-4x3", split="test", out=tmp_path, overrides=overrides)
    plain, turned = load_scores(tested / "scores.npz"), load_scores(tmp_path / "scores.npz")
    assert all((plain.logits[row] != turned.logits[row]).any() for row in range(1, N_VIDEOS))


def test_a_second_test_in_one_folder_is_refused(model_path: Path, data: Path, tmp_path: Path) -> None:
    with files.lock_file(tmp_path / ".lock", "x"), pytest.raises(UserError, match="another test is writing here"):
        run_test(model_path, data, protocol="center-1x1", split="test", out=tmp_path, overrides=quick())


@pytest.mark.skipif(torch.multiprocessing.get_start_method() != "fork", reason="the stand-in decoder needs fork")
def test_a_decoder_that_kills_its_process_costs_one_video(
    model_path: Path, data: Path, tested: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a segmentation fault in a decoding library would; the video is named and the test continues."""
    here = os.getpid()

    class Deadly(VideoReader):
        def __init__(self, path: Path, *, time_limit_seconds: float, max_pixels: int) -> None:
            if 'clip" 4' in str(path) and os.getpid() != here:
                os.kill(os.getpid(), signal.SIGKILL)
            super().__init__(path, time_limit_seconds=time_limit_seconds, max_pixels=max_pixels)

    monkeypatch.setattr(reading, "VideoReader", Deadly)
    overrides = quick(workers=2)
    result = run_test(model_path, data, protocol="videoswin-4x3", split="test", out=tmp_path, overrides=overrides)
    assert result["videos"] == {"listed": 7, "scored": 6, "failed": 1}
    scores, whole = load_scores(tmp_path / "scores.npz"), load_scores(tested / "scores.npz")
    assert scores.reasons[4] == "the decoder crashed (SIGKILL)"
    np.testing.assert_array_equal(scores.logits[scores.scored], whole.logits[scores.scored])


@pytest.mark.skipif(torch.multiprocessing.get_start_method() != "fork", reason="the stand-in decoder needs fork")
def test_a_decoder_that_hangs_costs_one_video(
    model_path: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(VideoReader):
        def __init__(self, path: Path, *, time_limit_seconds: float, max_pixels: int) -> None:
            if 'clip" 2' in str(path):
                signal.pause()
            super().__init__(path, time_limit_seconds=time_limit_seconds, max_pixels=max_pixels)

    monkeypatch.setattr(reading, "VideoReader", Hanging)
    monkeypatch.setattr(reading, "_GRACE_SECONDS", 0.0)
    overrides = quick(workers=1, time_limit_seconds=0.5)
    result = run_test(model_path, data, protocol="center-1x1", split="test", out=tmp_path, overrides=overrides)
    assert result["videos"]["failed"] == 1
    assert load_scores(tmp_path / "scores.npz").reasons[2] == "the decoder did not answer within 1.5 seconds"


def test_groups_that_arrive_out_of_order_complete_their_part(
    model_path: Path, with_broken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the death of a worker the suspect groups come first, so the last group of a part may come before others."""
    monkeypatch.setattr(parts, "MAX_PARTS", 2)  # several groups to a part
    settings = quick(batch_views=2)
    run_test(model_path, with_broken, protocol="center-1x1", split="test", out=tmp_path / "a", overrides=settings)
    in_order = testing.deliver_groups

    def backwards(groups: Any, numbers: Sequence[int], workers: int, deliver: Callable[[Any, float], None]) -> float:
        return in_order(groups, numbers[::-1], workers, deliver)

    monkeypatch.setattr(testing, "deliver_groups", backwards)
    run_test(model_path, with_broken, protocol="center-1x1", split="test", out=tmp_path / "b", overrides=settings)
    one, other = (load_scores(tmp_path / name / "scores.npz") for name in ("a", "b"))
    assert len(one.paths) > 4
    assert one.paths == other.paths
    assert one.reasons == other.reasons
    np.testing.assert_array_equal(one.logits, other.logits)
