"""Figures of a semantic segmentation: mIoU and accuracies from the confusion matrix, with intervals over images.

Letters: K classes, N images, R resamplings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_swinv2.dense.segmenters import IGNORE

RESAMPLINGS = 2000
BLOCK = 200  # resamplings that are computed at once


def confusion_matrix(predicted: Tensor | None, mask: Tensor, num_classes: int) -> Tensor:
    """The pixels of an image by true class (row) and predicted class (column), int64 (K, K + 1) on the CPU.

    Pixels of IGNORE do not count. The last column is for pixels without a prediction: all of them, if `predicted` is
    None, as for an image that cannot be read. They are no right answers, and belong to the union of their class.

    predicted, mask: classes, integers of one shape.
    """
    counted = mask != IGNORE
    truth = mask[counted].long()
    answer = torch.full_like(truth, num_classes) if predicted is None else predicted[counted].long()
    cells = torch.bincount(truth * (num_classes + 1) + answer, minlength=num_classes * (num_classes + 1))
    return cells.view(num_classes, num_classes + 1).cpu()


@dataclass(frozen=True)
class SegmentationFigures:
    """Shares from 0 to 1. Those of a class are NaN if it has no pixel to compute them from, and no part of a mean."""

    miou: float
    """Mean over the classes of intersection / union of the true and the predicted pixels."""
    mean_accuracy: float
    """Mean over the classes of the share of their pixels that is predicted right."""
    pixel_accuracy: float
    """The share of all pixels that is predicted right."""
    iou: tuple[float, ...]
    """Of each class."""
    accuracy: tuple[float, ...]
    """Of each class."""


def segmentation_figures(confusion: Tensor | NDArray[np.int64]) -> SegmentationFigures:
    """The figures of a confusion matrix, (K, K + 1) as `confusion_matrix` returns it, summed over images.

    A class that is predicted but nowhere true has an IoU of 0 and no accuracy, as in mmsegmentation.
    """
    matrix = np.asarray(confusion, dtype=np.int64)
    right, true, union = _areas(matrix)
    iou, accuracy = _shares(right, union), _shares(right, true)
    return SegmentationFigures(
        _mean(iou),
        _mean(accuracy),
        float(_shares(right.sum(), true.sum())),
        tuple(iou.tolist()),
        tuple(accuracy.tolist()),
    )


def image_areas(confusion: Tensor) -> NDArray[np.int64]:
    """What `miou_interval` needs of the confusion matrix of an image: right and united pixels by class, (2, K)."""
    right, _, union = _areas(confusion.numpy())
    return np.stack([right, union])


def miou_interval(areas: NDArray[np.int64], seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """The bootstrap interval of the mIoU over images, by percentiles.

    A resampling draws N of the N images with replacement, adds up their pixels and computes the mIoU of the sums. It
    says how much the mIoU would differ on other images of this kind; how similar images of one scene are, it cannot
    know. NaN without any pixel of a class.

    areas: `image_areas` of each image, int64 (N, 2, K).
    """
    images = len(areas)
    if not areas.any():
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    flat = areas.reshape(images, -1).astype(np.float64)  # sums of pixels are exact below 2^53
    found = []
    for start in range(0, RESAMPLINGS, BLOCK):
        # How often each image is drawn, (R, N) -> sums (R, 2, K).
        drawn = random.multinomial(images, np.full(images, 1 / images), size=min(BLOCK, RESAMPLINGS - start))
        right, union = np.moveaxis((drawn @ flat).reshape(-1, *areas.shape[1:]), 1, 0)
        found.append(np.nanmean(_shares(right, union), axis=1))
    low, high = np.nanquantile(np.concatenate(found), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _areas(matrix: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Pixels of each class that are right, that are true, and that are true or predicted, (K,) each."""
    classes = len(matrix)
    right, true = np.diagonal(matrix), matrix.sum(axis=1)
    return right, true, true + matrix[:, :classes].sum(axis=0) - right


def _shares(part: NDArray[np.generic] | np.generic, whole: NDArray[np.generic] | np.generic) -> NDArray[np.float64]:
    """part / whole; NaN where the whole is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.true_divide(part, whole))


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of the values that are numbers; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
