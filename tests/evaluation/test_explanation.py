"""Grad-CAM against its definition with automatic differentiation, its pictures, and those that a test keeps."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.evaluation.small import CLASSES, make_answers_differ, picture, quick
from tests.models.reference import randomise
from video_swinv2.data.manifest import read_manifest
from video_swinv2.data.transforms import normalise
from video_swinv2.evaluation.explanation import explain, explanation_strip, heat_strip
from video_swinv2.evaluation.forward import forward_views
from video_swinv2.evaluation.protocols import PROTOCOLS
from video_swinv2.evaluation.testing import run_test
from video_swinv2.evaluation.views import read_views
from video_swinv2.inference.predictor import OverTime, predict
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.report.metrics import video_probabilities
from video_swinv2.report.mistakes import read_strips, surest_mistakes
from video_swinv2.report.scores import load_scores


def model_and_views(frames: int | None) -> tuple[SwinV2, torch.Tensor, vs.Preprocessing]:
    """A model with random weights and 5 views of noise; its last stage has a grid of 1 (or 2) x 2 x 2 tokens."""
    window = (4, 4) if frames is None else (2, 4, 4)
    model = vs.create_model("swinv2_nano", num_classes=7, frames=frames, image_size=64, window=window)
    views = torch.randint(0, 256, (5, 3, *(() if frames is None else (frames,)), 64, 64), dtype=torch.uint8)
    return randomise(model).eval(), views, vs.Preprocessing(frames, 2, (64, 64))


@pytest.mark.parametrize("frames", [None, 4])
def test_evidence_is_that_of_grad_cam(frames: int | None) -> None:
    model, views, preprocessing = model_and_views(frames)
    scored = forward_views(model, views, preprocessing, batch=2, bf16=False)
    evidence = torch.stack([scored.evidence(view, 3) for view in range(5)])
    features = model.forward_features(normalise(views, preprocessing.mean, preprocessing.std)).detach()
    features.requires_grad_()
    expected = model.forward_head(features)
    assert_close(scored.logits, expected.detach())
    expected[:, 3].sum().backward()
    assert features.grad is not None
    tokens = features[0, ..., 0].numel()
    # Equations 1 and 2: the weight of a channel is its mean gradient. Before ReLU, and without the factor 1 / tokens.
    weights = features.grad.flatten(1, -2).mean(1)  # (V, C)
    assert_close(evidence, torch.einsum("v...c,vc->v...", features.detach(), weights) * tokens)
    assert_close(evidence.flatten(1).mean(1) + model.head.bias[3].detach(), scored.logits[:, 3])
    model.reset_classifier(0)
    with pytest.raises(ValueError, match="without a head"):
        forward_views(model, views, preprocessing, batch=2, bf16=False).evidence(0, 0)


def test_the_view_that_is_most_certain_is_explained() -> None:
    model, views, preprocessing = model_and_views(4)
    logits = forward_views(model, views, preprocessing, batch=12, bf16=False).logits
    explanation = explain(model, views, preprocessing, 5)
    assert explanation.view == int(logits.softmax(1)[:, 5].argmax())
    alone = explain(model, views[explanation.view, None], preprocessing, 5)
    assert Image.open(io.BytesIO(alone.jpeg)).size == Image.open(io.BytesIO(explanation.jpeg)).size


def test_the_strip_is_tinted_where_the_evidence_lies() -> None:
    """Grey frames, with evidence in the lower right quarter of the second half, and evidence against it elsewhere."""
    view = torch.full((3, 10, 32, 32), 128, dtype=torch.uint8)
    evidence = torch.full((2, 4, 4), -3.0)
    evidence[1, 2:, 2:] = 1.0
    picture = np.asarray(Image.open(io.BytesIO(heat_strip(view, evidence))).convert("RGB"), dtype=float)
    assert picture.shape == (2 * 34 + 2, 8 * 34 + 2, 3)  # at most 8 frames, and gaps of 2 pixels
    assert abs(picture[4:30, 4:30] - 128).max() < 20, "the frames as they are"
    below = [picture[36:68, 2 + 34 * i : 34 * (i + 1)] for i in range(8)]
    assert abs(below[0][2:-2, 2:-2] - 128).max() < 20, "evidence against the class is not shown"
    assert abs(below[7][2:10, 2:10] - 128).max() < 20
    assert (below[7][-6:, -6:, 0] - below[7][-6:, -6:, 2]).mean() > 90, "orange"
    still = heat_strip(view[:, 0], evidence[1])
    assert Image.open(io.BytesIO(still)).size == (36, 70)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 64 pixels, the last stage of which has 2 x 2 x 2 tokens."""
    torch.manual_seed(5)
    model = vs.create_model("swinv2_nano", num_classes=3, frames=4, image_size=64, window=(2, 4, 4))
    path = tmp_path_factory.mktemp("larger") / "model.safetensors"
    preprocessing = vs.Preprocessing(frames=4, frame_stride=2, image_size=(64, 64))
    vs.save_model(make_answers_differ(model), path, classes=CLASSES, preprocessing=preprocessing, provenance={})
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_explains_the_mistakes_that_its_report_shows(
    workers: int, larger: Path, data: Path, tmp_path: Path
) -> None:
    """The strips are those made by hand, one view at a time; the page shows both pictures of each."""
    run_test(larger, data, protocol="videoswin-4x3", split="test", out=tmp_path, overrides=quick(workers=workers))
    scores, strips = load_scores(tmp_path / "scores.npz"), read_strips(tmp_path / "strips.npz")
    mistakes = surest_mistakes(scores, video_probabilities(scores))
    assert len(mistakes) > 1
    assert list(strips) == [mistake.position for mistake in mistakes]
    model, card = vs.load_model(larger), vs.read_card(larger)
    entries = read_manifest(data, "test", CLASSES).entries
    for mistake in mistakes:
        pixels, _ = read_views(entries[mistake.position].path, PROTOCOLS["videoswin-4x3"], card.preprocessing)
        alone = forward_views(model, pixels[mistake.view, None], card.preprocessing, batch=1, bf16=False)
        expected = explanation_strip(pixels[mistake.view], alone.evidence(0, CLASSES.index(mistake.answer)))
        files = expected, strips[mistake.position].explanation
        found = (np.asarray(Image.open(io.BytesIO(file)), float) for file in files)
        assert np.abs(np.subtract(*found)).mean() < 2  # rounded otherwise in another batch
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") == 2 * len(mistakes)
    assert f"orange: evidence for {mistakes[0].answer}" in page
    assert "the brighter the orange, the more a region adds" in page


def test_explanations_take_no_pass_of_the_model(
    larger: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in a test nor in `predict --explain`: every view is given to the model once."""
    given: list[int] = []
    embed = SwinV2.embed

    def counting(self: SwinV2, x: torch.Tensor) -> torch.Tensor:
        given.append(len(x))
        return embed(self, x)

    monkeypatch.setattr(SwinV2, "embed", counting)
    run_test(larger, data, protocol="videoswin-4x3", split="test", out=tmp_path, overrides=quick())
    assert sum(len(strip.explanation) > 0 for strip in read_strips(tmp_path / "strips.npz").values()) > 1
    videos = len(read_manifest(data, "test").entries)
    assert sum(given) == 12 * videos
    for over_time in (None, OverTime(every_seconds=100.0)):
        given.clear()
        found = predict(
            larger, [data / "left"], explain=tmp_path / "pictures", over_time=over_time, device="cpu", workers=0
        )
        assert all(Path(one.explanation).is_file() for one in found)
        crops = sum(3 * len(one.segments) for one in found)
        assert sum(given) == 12 * len(found) + crops


def test_a_model_with_a_single_token_per_frame_explains_nothing(tested: Path, tmp_path: Path) -> None:
    model = vs.create_model("swinv2_nano", num_classes=3, image_size=32, window=4)
    preprocessing = vs.Preprocessing(frames=None, frame_stride=1, image_size=(32, 32))
    path = tmp_path / "image.safetensors"
    vs.save_model(make_answers_differ(model), path, classes=CLASSES, preprocessing=preprocessing, provenance={})
    for name in CLASSES:
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        Image.fromarray(picture(len(name))).save(tmp_path / "data" / "test" / name / "0.png")
    run_test(path, tmp_path / "data", protocol="center-1x1", split="test", out=tmp_path / "out", overrides=quick())
    for folder in (tmp_path / "out", tested):  # of images, and of clips with two tokens in time
        strips = read_strips(folder / "strips.npz")
        assert {strip.explanation for strip in strips.values()} == {b""}
    strips = read_strips(tmp_path / "out" / "strips.npz")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/jpeg") == len(strips)
    assert "No explanations are stored with these frames" in page
    assert "orange" not in page.split("<main>")[1]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["videos"]["scored"] == 3
