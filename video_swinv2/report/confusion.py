"""Which classes are mistaken for which: the most frequent confusions, and the confusion matrix as data for the page.

Letters: K classes. A confusion matrix is (K, K) with a row for each label and a column for each answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage  # type: ignore[import-untyped]  # SciPy has no type hints
from scipy.spatial.distance import squareform  # type: ignore[import-untyped]  # as above


@dataclass(frozen=True)
class ConfusedPair:
    """A wrong answer given `count` times: videos of class `label` that were answered `answer`.

    share: `count` as a fraction of all scored videos of class `label`.
    """

    label: str
    answer: str
    count: int
    share: float


def confusion_counts(labels: NDArray[np.int64], answers: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """(K, K) the number of videos with each label and answer. labels and answers: (N,)."""
    counts = np.zeros((k, k), dtype=np.int64)
    np.add.at(counts, (labels, answers), 1)
    return counts


def most_confused(
    confusion: NDArray[np.int64], classes: tuple[str, ...], max_pairs: int = 12
) -> tuple[ConfusedPair, ...]:
    """The most frequent wrong answers, sorted by count and then by share of the class."""
    # What is on the diagonal is right.
    wrong = confusion.copy()
    np.fill_diagonal(wrong, 0)
    rows, columns = np.nonzero(wrong)
    counts = wrong[rows, columns]
    shares = counts / confusion.sum(axis=1)[rows]
    order = np.lexsort((-shares, -counts))[:max_pairs]  # lexsort sorts by its last key first
    return tuple(ConfusedPair(classes[rows[i]], classes[columns[i]], int(counts[i]), float(shares[i])) for i in order)


def matrix_data(confusion: NDArray[np.int64], classes: tuple[str, ...], unit: str) -> dict[str, Any]:
    """The confusion matrix as plain JSON data for report.js.j2.

    cells: the non-zero cells as a flat list row, column, count, row, column, count, ... Few of the 160,000 cells of 400
    classes are non-zero, so this keeps the page small. together: class indices in the order of `confused_order`.
    """
    places = np.argwhere(confusion > 0)  # (cells, 2)
    cells = np.concatenate([places, confusion[confusion > 0][:, None]], axis=1)  # (cells, 3)
    return {
        "classes": list(classes),
        "cells": cells.ravel().tolist(),
        "together": confused_order(confusion),
        "unit": unit,
    }


def confused_order(confusion: NDArray[np.int64]) -> list[int]:
    """Class indices, ordered so that classes that are often confused with each other are neighbours.

    These are the leaves of a hierarchical clustering with average linkage (scipy). The distance of two classes is 1
    minus the sum of the shares of their videos that are answered as the other class.
    """
    k = len(confusion)
    if k < 3:  # nothing to order
        return list(range(k))
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)  # each row sums to 1, or to 0 if empty
    distance = 1 - np.minimum(shares + shares.T, 1)  # symmetric, since a distance has to be
    np.fill_diagonal(distance, 0)
    condensed = squareform(distance, checks=False)  # (K, K) -> the K (K - 1) / 2 values above the diagonal
    return [int(leaf) for leaf in leaves_list(linkage(condensed, method="average"))]
