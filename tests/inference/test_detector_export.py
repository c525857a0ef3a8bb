"""Detectors as ONNX files, beside the models they were made of; run by ONNX Runtime alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import video_swinv2 as vs
from tests.dense.small import save_small_detector, write_two_images
from video_swinv2.cli import main
from video_swinv2.dense.detection_views import View
from video_swinv2.errors import UsageError, UserError
from video_swinv2.inference import export as exporting
from video_swinv2.inference.export import export
from video_swinv2.models.preprocessing import Preprocessing

CLASSES = ("red", "white", "platelet")
onnxruntime: Any = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_small_detector(tmp_path_factory.mktemp("detector") / "model.safetensors", CLASSES)


def test_an_onnx_file_finds_what_the_model_finds(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In images with other numbers of detections than the example's, and with another lowest score."""
    out, images = tmp_path / "model.onnx", write_two_images(tmp_path / "images", (60, 70))
    assert main(["export", str(model), str(out), "--check", str(images)]) == 0
    assert "detections are the model's, and differ by at most" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(out)
    description = json.loads(session.get_modelmeta().custom_metadata_map["video_swinv2"])
    assert description["classes"] == list(CLASSES)
    assert "(3, 48, 80)" in description["input"]
    detector = vs.load_model(model)
    counts, low = set(), np.array(0.05, dtype=np.float32)
    for seed in range(4):
        pixels = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            expected = detector.detect(pixels, [View()])
        names = [output.name for output in session.get_outputs()]
        found = dict(zip(names, session.run(None, {"pixels": pixels.numpy(), "min_score": low}), strict=True))
        assert found.keys() == expected.keys() == {"boxes", "labels", "scores", "masks"}
        for name, tensor in expected.items():
            torch.testing.assert_close(torch.from_numpy(found[name]), tensor, rtol=1e-4, atol=1e-4)
        counts.add(len(found["boxes"]))
    assert len(counts) > 1, "the number of detections is a constant of the program"
    nothing = session.run(None, {"pixels": pixels.numpy(), "min_score": np.array(1.0, dtype=np.float32)})
    assert [part.shape[0] for part in nothing] == [0] * 4


@pytest.mark.parametrize("kind", ["faster_rcnn", "cascade_mask_rcnn"])
def test_the_other_kinds_at_another_size(kind: str, tmp_path: Path) -> None:
    """With a window that does not divide the maps: they are padded and shifted."""
    torch.manual_seed(1)
    detector = vs.create_detector(
        "swinv2_nano", num_classes=2, kind=kind, window=4, fpn_channels=16, head_channels=16, mask_channels=8,
        anchor_sizes=(8, 16, 32, 64, 128), proposals=20, short_side=48, max_side=64,
    )  # fmt: skip
    for stage in detector.roi_heads.stages:
        nn.init.normal_(stage.box_predictor.cls_score.weight)
    path = tmp_path / "model.safetensors"
    vs.save_model(detector, path, classes=("a", "b"), preprocessing=Preprocessing(None, 1, (48, 64)))
    compared = export(path, tmp_path / "model.onnx", image_size=(52, 72))
    assert compared.samples > 20
    assert compared.same == compared.samples
    pixels, _ = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_inputs()
    assert pixels.shape == [3, 52, 72]


def test_a_program_that_differs_is_not_kept(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporting.write_onnx

    def write_another(*arguments: Any) -> Any:
        run = write(*arguments)
        # The third of the outputs are the scores.
        return lambda *given: tuple(part * (0.9 if place == 2 else 1) for place, part in enumerate(run(*given)))

    monkeypatch.setattr(exporting, "write_onnx", write_another)
    with pytest.raises(UserError, match=r"of \d+ detections differ from the model's, and it was not kept"):
        export(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_one_line(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"model\.pt2: torch\.export cannot express a detector.*use \.onnx"):
        export(model, tmp_path / "model.pt2")
    with pytest.raises(UsageError, match="--opset 23: of a detector, from 18 to 20"):
        export(model, tmp_path / "model.onnx", opset=23)
    with pytest.raises(UsageError, match="nowhere: no such file"):
        export(model, tmp_path / "model.onnx", check=[tmp_path / "nowhere"])
    with pytest.raises(UserError, match="takes images of any size; omit frames"):
        export(model, tmp_path / "model.onnx", frames=4)
    assert not list(tmp_path.iterdir())
