"""ZeRO-3 from construction on: a process holds its partition only, and learns what the whole model would learn."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import video_swinv2 as vs
from tests.engine.harness import SINGLE, run_workers
from tests.engine.zero3_worker import ADAM, DECAY, STEP, sample
from tests.models.reference import randomise
from video_swinv2.config import EngineConfig
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.models.swinv2 import SwinV2

WORKER = Path(__file__).with_name("zero3_worker.py")


def work(folder: Path, name: str, stage: int, *options: str) -> list[dict[str, int]]:
    """What each of two processes held after construction."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    # Freed matrices go back to the system at once, so that resident memory is what is held.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, *launcher, str(WORKER), str(folder), name, str(stage), *options]
    done = subprocess.run(command, env=environment, timeout=600, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"stage-{stage}-rank-{rank}.json").read_text()) for rank in range(2)]


def test_torch_is_left_as_it_was(tmp_path: Path) -> None:
    """DeepSpeed can create all tensors on the GPU during construction, and replace F.linear for ever; both are off."""
    run_workers(WORKER.with_name("construction_worker.py"), tmp_path, "construction,whole", 1)
    found = json.loads((tmp_path / "construction.json").read_text())
    assert set(found.pop("devices").values()) == {"cpu"}
    assert found == {"replaced": [], "replaced_by_training": [], "replaced_by_an_error": []}
    assert json.loads((tmp_path / "whole.json").read_text()) == {"replaced": []}


def fresh() -> SwinV2:
    torch.manual_seed(0)
    return vs.create_model("swinv2_nano", num_classes=10, image_size=32, window=4)


def learned(model: SwinV2) -> dict[str, Tensor]:
    """Two steps of the plain engine on the samples of both processes."""
    groups = parameter_groups(model, model.depths, **DECAY)
    engine = make_engine(model.train(), groups, EngineConfig(engine="plain", precision="fp32"), STEP, SINGLE, **ADAM)
    for step in range(2):
        engine.set_lr(1e-3)
        engine.backward(engine.forward(torch.cat([sample(step, rank) for rank in range(2)])).square().mean())
        engine.step()
    return engine.weights() or {}


@pytest.mark.parametrize("options", [(), pytest.param(("offloaded",), marks=pytest.mark.slow)])
def test_a_partitioned_model_loads_and_learns_as_the_whole_one(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Each process holds half; initial values follow from the seed; a model file loads; steps have the same effect."""
    start = randomise(vs.create_model("swinv2_nano", num_classes=10, image_size=32, window=4), seed=5)
    preprocessing = vs.Preprocessing(frames=None, frame_stride=1, image_size=(32, 32))
    vs.save_model(start, tmp_path / "init.safetensors", classes=(), preprocessing=preprocessing)
    for share in work(tmp_path, "swinv2_nano", 3, *options):
        assert share["whole"] == sum(p.numel() for p in start.parameters())
        assert share["held"] == pytest.approx(share["whole"] / 2, rel=1e-3)
    built, loaded, last = torch.load(tmp_path / "weights.pt", weights_only=True)
    expected = learned(copy.deepcopy(start))
    for name, tensor in fresh().state_dict().items():
        assert torch.equal(built[name], tensor), name
        assert torch.equal(loaded[name], start.state_dict()[name]), name
        torch.testing.assert_close(last[name], expected[name], rtol=0, atol=1e-5, msg=name)
    assert max(float((last[name] - loaded[name]).abs().max()) for name in last) > 5e-4


def test_parameter_groups_of_a_partitioned_model_are_those_of_the_whole_one() -> None:
    """ZeRO-3 leaves empty vectors in place of matrices; the original shape, which decides, is kept as an attribute."""
    model = fresh()
    expected = [group["parameter_names"] for group in parameter_groups(model, model.depths, weight_decay=0.1)]
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]  # as DeepSpeed does
        parameter.data = torch.empty(0)
    assert [group["parameter_names"] for group in parameter_groups(model, model.depths, weight_decay=0.1)] == expected


@pytest.mark.slow
def test_memory_at_construction_is_a_fraction(tmp_path: Path) -> None:
    """197 M parameters are 787 MB; a process may grow by half of that plus the largest single module."""
    whole, shared = work(tmp_path, "swinv2_large", 0), work(tmp_path, "swinv2_large", 3)
    for before, after in zip(whole, shared, strict=True):
        assert before["grown"] > 0.9 * 4 * before["whole"]
        assert after["grown"] < 0.65 * 4 * after["whole"]
