"""The multi-view test, and exported programs: on the GPU what they are on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.export.passes import move_to_device_pass

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.evaluation.small import quick
from tests.models.reference import randomise
from video_swinv2.evaluation.testing import run_test
from video_swinv2.inference.export import export
from video_swinv2.report.scores import load_scores

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")]


# Scores are stored in fp16: rounding alone makes them differ by 0.0005 of themselves.
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 0.05)])
@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa", "flex", "sequential"])
def test_scores_are_those_of_the_cpu(
    attention: str, precision: str, tolerance: float, device: torch.device, model_path: Path, data: Path, tmp_path: Path
) -> None:
    """Every view of every video, as a part of the largest score."""
    found = []
    for where, changes in (("cpu", {}), (device.type, {"attention": attention, "precision": precision})):
        settings = quick(device=where, **changes)
        out = tmp_path / f"{len(found)}"
        run_test(model_path, data, protocol="videoswin-4x3", split="test", out=out, overrides=settings)
        found.append(load_scores(out / "scores.npz"))
    expected, got = found
    assert got.paths == expected.paths
    assert (got.views == expected.views).all()
    assert_close(got.logits.astype(np.float32), expected.logits.astype(np.float32), tolerance)


def test_an_exported_program_moves_to_the_device(device: torch.device, tmp_path: Path) -> None:
    """torch.export's program, made and checked on the CPU, then moved: padding, shifts and a free batch size."""
    model = randomise(vs.create_model("swinv2_nano", num_classes=3, frames=5, image_size=(40, 32), window=4))
    file, out = tmp_path / "model.safetensors", tmp_path / "model.pt2"
    preprocessing = vs.Preprocessing(frames=5, frame_stride=1, image_size=(40, 32))
    vs.save_model(model, file, classes=("a", "b", "c"), preprocessing=preprocessing)
    export(file, out)
    program = move_to_device_pass(torch.export.load(out), device.type).module()
    x = torch.randn(3, 3, 5, 40, 32)
    for count in (1, 3):
        with torch.no_grad():
            got, expected = program(x[:count].to(device)), model(x[:count])
        assert_close(got.cpu(), expected, 1e-3)
