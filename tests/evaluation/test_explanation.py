"""Grad-CAM against its definition with automatic differentiation, and the picture made of it."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

import video_swinv2 as vs
from tests.closeness import assert_close
from tests.models.reference import randomise
from video_swinv2.data.transforms import normalise
from video_swinv2.evaluation.explanation import class_evidence, explain, heat_strip
from video_swinv2.models.swinv2 import SwinV2


def model_and_views(frames: int | None) -> tuple[SwinV2, torch.Tensor, vs.Preprocessing]:
    """A model with random weights and 5 views of noise; its last stage has a grid of 1 (or 2) x 2 x 2 tokens."""
    window = (4, 4) if frames is None else (2, 4, 4)
    model = vs.create_model("swinv2_nano", num_classes=7, frames=frames, image_size=64, window=window)
    views = torch.randint(0, 256, (5, 3, *(() if frames is None else (frames,)), 64, 64), dtype=torch.uint8)
    return randomise(model).eval(), views, vs.Preprocessing(frames, 2, (64, 64))


@pytest.mark.parametrize("frames", [None, 4])
def test_evidence_is_that_of_grad_cam(frames: int | None) -> None:
    model, views, preprocessing = model_and_views(frames)
    evidence, logits = class_evidence(model, views, preprocessing, 3, batch=2)
    features = model.forward_features(normalise(views, preprocessing.mean, preprocessing.std)).detach()
    features.requires_grad_()
    expected = model.forward_head(features)
    assert_close(logits, expected.detach())
    expected[:, 3].sum().backward()
    assert features.grad is not None
    tokens = features[0, ..., 0].numel()
    # Equations 1 and 2: the weight of a channel is its mean gradient. Before ReLU, and without the factor 1 / tokens.
    weights = features.grad.flatten(1, -2).mean(1)  # (V, C)
    assert_close(evidence, torch.einsum("v...c,vc->v...", features.detach(), weights) * tokens)
    assert_close(evidence.flatten(1).mean(1) + model.head.bias[3].detach(), logits[:, 3])


def test_the_view_that_is_most_certain_is_explained() -> None:
    model, views, preprocessing = model_and_views(4)
    _, logits = class_evidence(model, views, preprocessing, 5)
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
