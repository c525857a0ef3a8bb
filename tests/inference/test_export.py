"""Exported programs: run without this package, on a real clip, for any number of samples, and describe themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.models.reference import randomise
from video_swinv2.cli import main
from video_swinv2.data.transforms import normalise
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.views import read_views
from video_swinv2.inference import export as export_module
from video_swinv2.inference.export import export
from video_swinv2.models.swinv2 import SwinV2

CLASSES = ("a", "b", "c")
KEY = "video_swinv2"


def save(path: Path, frames: int | None, depths: tuple[int, ...] = (2, 1), classes: tuple[str, ...] = CLASSES) -> Path:
    """Shifted windows, padding and patch merging with random weights. Few blocks: exporting one takes seconds."""
    model = SwinV2(
        embed_dim=32,
        depths=depths,
        num_heads=(1, 2)[: len(depths)],
        num_classes=len(classes),
        frames=frames,
        image_size=(40, 32),
        patch_size=(1, 4, 4) if frames else 4,
        window=(2, 4, 4) if frames else 4,
    )
    preprocessing = vs.Preprocessing(frames=frames, frame_stride=2, image_size=(40, 32))
    vs.save_model(randomise(model), path, classes=classes, preprocessing=preprocessing)
    return path


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("model") / "clip.safetensors", 5)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (12, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    return write_video(tmp_path_factory.mktemp("files") / "clip.mp4", noise)


def views_as_described(description: dict[str, object], video: Path) -> torch.Tensor:
    """The input that a user without this package would make by the description in the file: (V, 3, T, H, W)."""
    values = description["preprocessing"]
    assert isinstance(values, dict)
    preprocessing = vs.Preprocessing(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    views, _ = read_views(video, PROTOCOLS["videoswin-4x3"], preprocessing)
    return normalise(views, preprocessing.mean, preprocessing.std)


def test_onnx_of_a_clip_model(
    clip_model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clip.onnx"
    assert main(["export", str(clip_model), str(out), "--check", str(video)]) == 0
    assert "the logits differ from the model's by at most" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["clip.onnx"]
    proto = onnx.load(out)
    assert proto.opset_import[0].version == 23
    assert sum(node.op_type == "Attention" for node in proto.graph.node) == 3, "one per block"
    description = json.loads({entry.key: entry.value for entry in proto.metadata_props}[KEY])
    assert description["classes"] == list(CLASSES)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    pixels = views_as_described(description, video)
    model = vs.load_model(clip_model)
    for count in (1, 2, 5):
        (got,) = session.run(None, {"pixels": pixels[:count].numpy()})
        with torch.no_grad():
            expected = model(pixels[:count])
        assert_close(got, expected)
    assert np.abs(got[0] - got[-1]).max() > 1e-3, "equal outputs would prove nothing"


def test_torch_export_of_a_clip_model_at_another_size(video: Path, tmp_path: Path) -> None:
    out, clip_model = tmp_path / "clip.pt2", save(tmp_path / "clip.safetensors", 5, (2,))
    checked = export(clip_model, out, frames=3, image_size=(32, 32), check=[video])
    extra = {f"{KEY}.json": ""}
    program = torch.export.load(out, extra_files=extra).module()
    description = json.loads(extra[f"{KEY}.json"])
    pixels = views_as_described(description, video)
    assert pixels.shape[1:] == (3, 3, 32, 32)
    model = vs.load_model(clip_model, frames=3, image_size=(32, 32))
    for count in (1, 4):
        with torch.no_grad():
            expected = model(pixels[:count])
            assert_close(program(pixels[:count]), expected)
    assert checked.difference <= 1e-5 * expected.abs().max()


def test_an_image_model(tmp_path: Path) -> None:
    """Compared on noise, in the oldest opset supported."""
    model = save(tmp_path / "image.safetensors", None, (2,))
    export(model, tmp_path / "image.onnx", opset=18)
    session = onnxruntime.InferenceSession(tmp_path / "image.onnx")
    pixels = torch.randn(3, 3, 40, 32)
    with torch.no_grad():
        assert_close(session.run(None, {"pixels": pixels.numpy()})[0], vs.load_model(model)(pixels))
    shape = session.get_inputs()[0].shape
    assert shape[1:] == [3, 40, 32]
    assert shape[0] == "batch", "the number of samples is free"
    assert session.get_outputs()[0].shape == ["batch", 3]


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
@pytest.mark.parametrize("frames", [4, None])
def test_ten_real_clips(frames: int | None, suffix: str, outside_data: Path, tmp_path: Path) -> None:
    """Exported clip and image models agree with the originals on real clips, also in the order of the top classes."""
    clips = sorted((outside_data / "ut_interaction").rglob("*.avi"))[::12][:10]
    assert len(clips) == 10
    model = save(tmp_path / "model.safetensors", frames, (2,), tuple("abcdefghijkl"))
    checked = export(model, tmp_path / f"model.{suffix}", check=clips)
    assert checked.samples == 1 + 10 * 3
    assert checked.same == checked.samples
    assert checked.difference < 1e-4
    card = vs.read_card(model)
    answers = []
    for clip in clips:
        views, _ = read_views(clip, PROTOCOLS["center-1x1"], card.preprocessing)
        with torch.no_grad():
            answers.append(vs.load_model(model)(normalise(views, card.preprocessing.mean, card.preprocessing.std)))
    assert torch.cat(answers).std(0).min() > 1e-3, "equal outputs would prove nothing"


def test_a_program_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(tmp_path / "image.safetensors", None, (1,))
    monkeypatch.setattr(export_module, "MAX_LOGIT_DIFFERENCE", -1.0)
    with pytest.raises(UserError, match=r"image\.pt2: differs from the model"):
        export(model, tmp_path / "image.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["image.safetensors"]


def test_wrong_usage(clip_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for out, options, words in (
        ("a.tflite", {}, "must end in .pt2"),
        ("a.pt2", {"opset": 18}, "--opset 18: must be from 18 to 23, and applies to .onnx only"),
        ("a.onnx", {"opset": 11}, "from 18 to 23"),
        ("gone/a.onnx", {}, "does not exist"),
        ("a.onnx", {"check": [tmp_path / "gone.mp4"]}, r"gone\.mp4: no such file"),
    ):
        with pytest.raises(UsageError, match=words):
            export(clip_model, tmp_path / out, **options)
    encoder = vs.create_model("swinv2_nano", num_classes=0, image_size=64)
    preprocessing = vs.Preprocessing(frames=None, frame_stride=1, image_size=(64, 64))
    vs.save_model(vs.SimMIM(encoder), tmp_path / "no-logits.safetensors", classes=(), preprocessing=preprocessing)
    with pytest.raises(UserError, match="SimMIM pre-training file has no classifier"):
        export(tmp_path / "no-logits.safetensors", tmp_path / "a.onnx")
    for options, words in (
        ({"in_chans": 1, "num_classes": 3}, "takes inputs of 1 channels, but videos and images are read as RGB"),
        ({"features_only": True, "num_classes": 0}, "returns feature maps and no logits; export a classifier"),
    ):
        other = vs.create_model("swinv2_nano", image_size=64, **options)
        mean = (0.5,) * other.in_chans
        preprocessing = vs.Preprocessing(frames=None, frame_stride=1, image_size=(64, 64), mean=mean, std=mean)
        vs.save_model(other, tmp_path / "no-logits.safetensors", classes=(), preprocessing=preprocessing)
        with pytest.raises(UserError, match=rf"^{tmp_path}/no-logits\.safetensors: [^\n]*{words}"):
            export(tmp_path / "no-logits.safetensors", tmp_path / "a.pt2")
    monkeypatch.setattr(export_module.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match=r"onnxscript not installed; pip install 'video-swinv2\[export\]'"):
        export(clip_model, tmp_path / "a.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["no-logits.safetensors"]
