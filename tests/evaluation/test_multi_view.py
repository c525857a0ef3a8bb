"""The scores and accuracies that users compute in their own code are those of `test`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

import video_swinv2 as vs
from tests.evaluation.small import make_answers_differ, picture
from video_swinv2.data.decode import DecodeError
from video_swinv2.errors import UsageError
from video_swinv2.report.metrics import video_probabilities
from video_swinv2.report.scores import load_scores


def test_scores_of_every_view_and_their_average_are_those_of_test(model_path: Path, data: Path, tested: Path) -> None:
    model, scores = vs.load_model(model_path).train(), load_scores(tested / "scores.npz")
    found = [vs.multi_view(model, data / path) for path in scores.paths]
    assert model.training, "the mode is restored"
    # `test` stores float16, and gives the model other videos in the same batch.
    logits = torch.stack([video.logits for video in found])
    assert logits.shape == (7, 12, 3)
    np.testing.assert_allclose(logits, scores.logits, rtol=2e-3, atol=2e-3)
    average = torch.stack([video.average for video in found])
    np.testing.assert_allclose(average, video_probabilities(scores), atol=1e-3)
    stored = [[(view.start, *view.box) for view in video.views] for video in found]
    np.testing.assert_array_equal(stored, scores.views)
    accuracy, results = vs.accuracy(average, scores.labels), json.loads((tested / "results.json").read_text())
    assert accuracy.top1 == results["top1"]
    assert list(accuracy.interval) == results["top1_interval"]
    assert (accuracy.videos, accuracy.groups) == (7, 7)


def test_a_protocol_that_averages_logits_and_an_image(tmp_path: Path) -> None:
    model = make_answers_differ(vs.create_model("swinv2_nano", num_classes=3, image_size=32, window=4))
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"preprocessing: .*model\.preprocessing"):
        vs.multi_view(model, tmp_path / "a.png")
    shown = vs.Preprocessing(None, 1, (32, 32))
    name = "1x3:starts=videoswin:crops=even:resize=1:average=logit"
    found = vs.multi_view(model, tmp_path / "a.png", name, preprocessing=shown)
    torch.testing.assert_close(found.average, found.logits.double().mean(0).softmax(0))
    assert not torch.allclose(found.average, found.logits.double().softmax(1).mean(0), atol=1e-6)


def test_what_cannot_be_scored(model_path: Path, tmp_path: Path) -> None:
    model = vs.load_model(model_path)
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(DecodeError, match=r"a\.mp4"):
        vs.multi_view(model, tmp_path / "a.mp4")
    with pytest.raises(UsageError, match="protocol"):
        vs.multi_view(model, tmp_path / "a.mp4", "videoswin-4x9")


def test_an_accuracy_with_its_interval() -> None:
    # 40 videos of 4 groups; the answers to all videos of the last group are wrong.
    labels = np.arange(40) % 5
    scores = np.eye(5)[(labels + (np.arange(40) >= 30)) % 5]
    alone = vs.accuracy(torch.tensor(scores), torch.tensor(labels))
    wilson = binomtest(30, 40).proportion_ci(method="wilson")
    assert (alone.top1, alone.videos, alone.groups) == (0.75, 40, 40)
    assert alone.interval == pytest.approx((wilson.low, wilson.high))
    grouped = vs.accuracy(scores, labels, [f"recording {row // 10}" for row in range(40)])
    assert (grouped.top1, grouped.groups) == (0.75, 4)
    assert grouped.interval[0] < alone.interval[0] - 0.1
    assert grouped.interval[1] > alone.interval[1] + 0.05
    assert str(alone) == "75.00 % [59.81, 85.81] of 40 videos in 40 groups"


@pytest.mark.parametrize(
    ("scores", "labels", "groups", "fault"),
    [
        ([[1.0, 0.0]], [0, 1], None, r"scores \(1, 2\), labels \(2,\)"),
        ([1.0, 0.0], [0, 1], None, r"scores \(2,\)"),
        ([[1.0, 0.0]], [0], ["a", "b"], "2 groups"),
        ([[float("nan"), 0.0]], [0], None, "NaN"),
        ([[1.0, 0.0]], [2], None, "labels from 2 to 2 for 2 classes"),
        ([[1.0, 0.0]], 0, None, r"labels \(\)"),
        (torch.empty(0, 3), [], None, r"scores \(0, 3\)"),
    ],
)
def test_numbers_that_are_no_accuracy(scores: object, labels: object, groups: list[str] | None, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        vs.accuracy(scores, labels, groups)  # type: ignore[arg-type]  # nested lists of numbers are arrays too
