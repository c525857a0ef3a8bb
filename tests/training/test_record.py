"""What a run records about itself."""

from __future__ import annotations

import json

import pytest
import torch

from video_swinv2.distributed.world import World
from video_swinv2.training.record import arithmetic, arithmetic_changes

HERE = World(0, 1, 0, torch.device("cpu"))


def test_a_resumed_run_is_told_what_changes_its_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    then = arithmetic(HERE, "fp32")
    assert arithmetic_changes(then, arithmetic(HERE, "fp32")) == ""
    assert arithmetic_changes({}, then) == "", "an older checkpoint says nothing"
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)  # conftest restores it
    line = arithmetic_changes(then, arithmetic(HERE, "fp32"))
    assert f"(threads {threads} then, {threads + 1} now)" in line
    assert "\n" not in line
    torch.set_num_threads(threads)
    two = World(1, 2, 1, torch.device("cpu"))
    assert "(processes 1 then, 2 now)" in arithmetic_changes(then, arithmetic(two, "fp32"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = arithmetic_changes(then, arithmetic(World(0, 1, 0, torch.device("cuda", 0)), "fp32"))
    assert "device CPU then, NVIDIA H100 80GB HBM3 now" in gpu
    assert f"threads {threads} then, none now" in gpu
    assert json.loads(json.dumps(then)) == then, "a checkpoint's state is JSON"
