"""The group of processes that doctor starts: what is sound, and each way in which one of them can fail."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from video_swinv2.tools import group
from video_swinv2.tools.findings import Finding
from video_swinv2.tools.group import (
    Check,
    Place,
    all_reduce,
    compile_check,
    form_group,
    group_checks,
    run_group,
    take_step,
)

DEVICE, STEP, JOIN, SUM, ZERO = group_checks("cpu")
# A process that is well answers such checks at once, however loaded the machine is; the others never answer.
SHORT_SECONDS = 5.0


def start(place: Place) -> Finding:
    """The first check of a group, whose long limit covers the start of the processes."""
    return Finding("", "ok", "started")


START = Check("start", start, "", seconds=300.0)


def die_on_one(place: Place) -> Finding:
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return Finding("", "ok", "alive")


def hang_on_one(place: Place) -> Finding:
    if place.rank == 1:
        time.sleep(600)
    return Finding("", "ok", "answered")


def join_without_one(place: Place) -> Finding:
    """Rank 1 never comes, as a GPU whose driver hangs."""
    return hang_on_one(place) if place.rank == 1 else form_group(place)


def sum_while_one_dies(place: Place) -> Finding:
    return die_on_one(place) if place.rank == 1 else all_reduce(place)


def lose_a_part(place: Place) -> Finding:
    """The real check over a collective that loses four elements on rank 1."""

    def broken(tensor, *arguments):
        sound(tensor, *arguments)
        if place.rank == 1:
            tensor[1000:1004] = 0

    with pytest.MonkeyPatch.context() as patch:
        sound = dist.all_reduce
        patch.setattr(dist, "all_reduce", broken)
        return all_reduce(place)


def compute_nan(place: Place) -> Finding:
    """The real step, with pixels that are not finite on rank 1."""

    def broken():
        model, clips, labels = sound()
        return model, clips * (float("nan") if place.rank == 1 else 1.0), labels

    with pytest.MonkeyPatch.context() as patch:
        sound = group._small_training
        patch.setattr(group, "_small_training", broken)
        return take_step(place)


def compute_wrongly(place: Place) -> Finding:
    """The real step on a device whose products are wrong, though finite."""

    def broken(model, clips, *arguments):
        return sound(model, clips * 0.0, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        sound = group._two_steps
        patch.setattr(group, "_two_steps", broken)
        return take_step(place)


def test_two_processes_that_are_sound_until_one_loses_data_and_dies() -> None:
    """What a GPU machine runs over NCCL, here over gloo. The death shows long before the limit of the check."""
    lossy = replace(SUM, name="lossy", work=lose_a_part, if_failed="note")
    deadly = replace(SUM, name="deadly", work=sum_while_one_dies, seconds=600.0)
    findings = run_group((DEVICE, STEP, JOIN, SUM, lossy, deadly, SUM), "cpu", 2)
    steps = [finding for finding in findings if finding.name == STEP.name]  # one, if both took the same milliseconds
    device, joined, summed, kept, lost, died, untried = (finding for finding in findings if finding not in steps)
    assert (device.name, device.state) == ("device", "ok")
    assert device.found.startswith("processes 0, 1: CPU (")
    assert {step.state for step in steps} == {"ok"}
    assert all(": loss 2.30" in step.found for step in steps)
    assert joined == Finding("process group", "ok", "processes 0, 1: formed over gloo")
    assert (summed.name, summed.state) == ("all-reduce", "ok")
    assert summed.found.startswith("processes 0, 1: 64 MiB over gloo in ")
    assert summed.found.endswith("GB/s per device; every sum is right")
    assert (kept.state, lost.state) == ("ok", "note")
    assert lost.found == "process 1: 4 of 16777216 elements of an all-reduce are wrong"
    # Only the cause: process 0, whose collective broke, is not blamed.
    assert (died.state, died.found) == ("fault", "process 1: its process died (SIGKILL)")
    assert untried == Finding("all-reduce", "note", "not tried: process 1 failed before", "fix that first")


def test_devices_that_compute_wrongly_crash_or_hang_are_named() -> None:
    """One after the other in one group; the rest goes on each time."""
    checks = (
        START,
        replace(STEP, work=compute_wrongly, if_failed="note"),
        replace(STEP, work=compute_nan, if_failed="note"),
        Check("dies", die_on_one, "look"),
        START,
    )
    _, wrong, sound, broken, alive, dead, again = run_group(checks, "cpu", 2)
    assert wrong.found.startswith("processes 0, 1: the gradient norm is ")
    assert (sound.state, broken.state) == ("ok", "note")
    assert broken.found == "process 1: loss nan, gradient norm nan: not finite"
    assert alive == Finding("dies", "ok", "process 0: alive")
    assert dead == Finding("dies", "fault", "process 1: its process died (SIGKILL)", "look")
    assert again.found == "process 0: started"


def test_a_gpu_that_hangs() -> None:
    """Names are those of GPUs there; these functions need none."""
    _, answered, hung, again = run_group((START, Check("hangs", hang_on_one, "wait", SHORT_SECONDS), START), "cuda", 2)
    assert answered.found == "GPU 0: answered"
    assert hung == Finding("hangs", "fault", "GPU 1: no answer within 5 s", "wait")
    assert again.found == "GPU 0: started"


def test_a_group_that_never_forms() -> None:
    fault = run_group((START, replace(JOIN, work=join_without_one, seconds=SHORT_SECONDS)), "cpu", 2)[-1]
    assert (fault.state, fault.found) == ("fault", "processes 0, 1: no answer within 5 s")
    assert "GLOO_SOCKET_IFNAME" in fault.fix
    assert "NCCL_DEBUG=INFO" in group_checks("cuda")[2].fix


def test_a_network_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    fault = run_group((START, JOIN), "cpu", 2)[-1]
    assert fault.state == "fault"
    assert "nosuch0" in fault.found
    assert "GLOO_SOCKET_IFNAME=lo" in fault.fix


def test_a_broken_deepspeed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('libsomething.so.3: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(str(tmp_path))  # a spawned process has the path of its parent
    fault = run_group((START, JOIN, ZERO), "cpu", 1)[-1]
    assert (fault.name, fault.state) == ("DeepSpeed", "fault")
    assert "libsomething.so.3" in fault.found
    assert "engine.engine=plain" in fault.fix


@pytest.mark.slow
def test_zero_and_the_compiler() -> None:
    """DeepSpeed takes a step in two processes, and a step is compiled."""
    assert [finding.state for finding in run_group((START, JOIN, ZERO), "cpu", 2)] == ["ok", "ok", "ok"]
    (compiled,) = run_group((compile_check("cpu"),), "cpu", 1)
    assert compiled.state == "ok"
    assert "of compilation" in compiled.found


@pytest.mark.slow
def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "g++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    (compiled,) = run_group((compile_check("cpu"),), "cpu", 1)
    assert compiled.state == "note"
    assert "engine.compile=false" in compiled.fix
