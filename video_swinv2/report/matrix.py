"""The confusion matrix as the page's script reads it: the counts above zero, and orders to look at it in."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import leaves_list, linkage  # type: ignore[import-untyped]  # SciPy comes without types
from scipy.spatial.distance import squareform  # type: ignore[import-untyped]  # as above


def matrix_data(confusion: NDArray[np.int64], classes: tuple[str, ...], unit: str) -> dict[str, Any]:
    """Plain data of a (K, K) confusion matrix whose rows are labels and whose columns are answers.

    cells: row, column, count, row, column, count, ... of counts above zero. together: places of the classes in an
    order that puts classes confused with each other side by side.
    """
    places = np.argwhere(confusion > 0)
    cells = np.concatenate([places, confusion[confusion > 0][:, None]], axis=1)
    return {
        "classes": list(classes),
        "cells": cells.ravel().tolist(),
        "together": confused_order(confusion),
        "unit": unit,
    }


def confused_order(confusion: NDArray[np.int64]) -> list[int]:
    """Places of the classes, those often taken for each other near each other: leaves of average linkage."""
    k = len(confusion)
    if k < 3:
        return list(range(k))
    rows = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    distance = 1 - np.minimum(rows + rows.T, 1)
    np.fill_diagonal(distance, 0)
    return [int(place) for place in leaves_list(linkage(squareform(distance, checks=False), method="average"))]
