"""mIoU and accuracies: equal to those of NumPy and scikit-learn; intervals against their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from video_swinv2.dense import segmentation_metrics
from video_swinv2.dense.segmentation_metrics import (
    confusion_matrix,
    image_areas,
    miou_interval,
    segmentation_figures,
)

CLASSES = 4


def pair(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, CLASSES, (13, 17)).astype(np.uint8)
    predicted = np.where(rng.random(mask.shape) < 0.6, mask, rng.integers(0, CLASSES, mask.shape)).astype(np.uint8)
    mask[rng.random(mask.shape) < 0.1] = 255
    return torch.from_numpy(predicted), torch.from_numpy(mask)


def test_figures_are_those_of_numpy_and_scikit_learn() -> None:
    pairs = [pair(seed) for seed in range(5)]
    total = sum(confusion_matrix(*each, CLASSES) for each in pairs)
    assert isinstance(total, torch.Tensor)
    truth = torch.cat([mask[mask != 255] for _, mask in pairs]).numpy()
    answer = torch.cat([predicted[mask != 255] for predicted, mask in pairs]).numpy()
    by_hand = np.zeros((CLASSES, CLASSES), dtype=np.int64)
    for t, a in zip(truth, answer, strict=True):
        by_hand[t, a] += 1
    assert np.array_equal(total[:, :CLASSES], by_hand)
    assert np.array_equal(by_hand, sklearn_confusion(truth, answer))
    assert not total[:, CLASSES].any()
    found = segmentation_figures(total)
    assert found.iou == pytest.approx(jaccard_score(truth, answer, average=None))
    assert found.miou == pytest.approx(np.mean(found.iou))
    recall = [np.mean(answer[truth == k] == k) for k in range(CLASSES)]
    assert found.accuracy == pytest.approx(recall)
    assert found.mean_accuracy == pytest.approx(np.mean(recall))
    assert found.pixel_accuracy == pytest.approx(np.mean(truth == answer))


def test_absent_classes_are_no_part_of_a_mean_and_false_ones_are() -> None:
    mask = torch.tensor([[0, 0, 1, 1]])
    found = segmentation_figures(confusion_matrix(torch.tensor([[0, 0, 1, 2]]), mask, CLASSES))
    assert found.iou[:3] == (1.0, 0.5, 0.0)  # class 2 is nowhere true
    assert math.isnan(found.iou[3])
    assert found.miou == pytest.approx(0.5)
    assert found.mean_accuracy == pytest.approx(0.75)
    assert math.isnan(found.accuracy[2])
    empty = segmentation_figures(confusion_matrix(mask, torch.full_like(mask, 255), CLASSES))
    assert math.isnan(empty.miou)
    assert math.isnan(empty.pixel_accuracy)


def test_an_image_without_a_prediction_counts_as_missed() -> None:
    mask = torch.tensor([[0, 0, 1, 255]])
    total = confusion_matrix(mask, mask, 2) + confusion_matrix(None, mask, 2)
    found = segmentation_figures(total)
    assert total.tolist() == [[2, 0, 2], [0, 1, 1]]
    assert (found.miou, found.pixel_accuracy) == (0.5, 0.5)


def test_the_interval_resamples_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation_metrics, "RESAMPLINGS", 400)
    matrices = [confusion_matrix(*pair(seed), CLASSES) for seed in range(12)]
    matrices[0] = confusion_matrix(None, pair(0)[1], CLASSES)
    areas = np.stack([image_areas(matrix) for matrix in matrices])
    low, high = miou_interval(areas, seed=1)
    # The same draws, the slow way: whole matrices of the drawn images are summed.
    random, found = np.random.default_rng(1), []
    for _ in range(2):
        for drawn in random.multinomial(12, np.full(12, 1 / 12), size=200):
            total = sum(int(times) * matrix for times, matrix in zip(drawn, matrices, strict=True))
            found.append(segmentation_figures(total).miou)  # type: ignore[arg-type]  # a tensor, not 0
    assert (low, high) == pytest.approx(np.quantile(found, [0.025, 0.975]))
    assert low < segmentation_figures(sum(matrices)).miou < high  # type: ignore[arg-type]  # as above
    assert miou_interval(areas, seed=1) == (low, high)
    assert all(math.isnan(value) for value in miou_interval(areas[:0]))


def test_one_image_gives_no_width() -> None:
    areas = image_areas(confusion_matrix(*pair(3), CLASSES))[None]
    low, high = miou_interval(areas)
    assert low == high == pytest.approx(segmentation_figures(confusion_matrix(*pair(3), CLASSES)).miou)
