"""Where the cells and labels of a confusion matrix go, for a picture that can be read with 2 or with 700 classes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NUMBERS_UP_TO = 20
NAMES_UP_TO = 60
_LONGEST_NAME = 26
_LETTER = 7.2  # width of a 12 pixel letter in the widest of the system fonts
_FAINTEST = 0.18
_FAINTEST_SMALL = 0.45


@dataclass(frozen=True)
class Cell:
    """One count above zero, at `x`, `y`; rows are labels, columns answers. `strength` is its opacity, 0..1."""

    x: int
    y: int
    count: int
    strength: float
    right: bool
    label: str
    answer: str
    share: float


@dataclass(frozen=True)
class Name:
    """A class name, or a class number where names do not fit, at `offset` along an axis; `full` is the whole name."""

    offset: float
    text: str
    full: str


@dataclass(frozen=True)
class Matrix:
    """A drawing in its own units, about one pixel each. `side` is the square of cells, `margin` the room for names."""

    n: int
    cell: int
    gap: int
    side: int
    margin: int
    overhang: int
    numbers: bool
    names: tuple[Name, ...]
    cells: tuple[Cell, ...]


def draw_matrix(confusion: NDArray[np.int64], classes: tuple[str, ...]) -> Matrix:
    """Lay out a (K, K) confusion matrix whose rows are labels and whose columns are answers."""
    n = len(classes)
    cell = 44 if n <= 12 else 34 if n <= NUMBERS_UP_TO else 18 if n <= NAMES_UP_TO else max(2, 900 // n)
    names = _names(classes, cell)
    named = n <= NAMES_UP_TO
    longest = max((len(name.text) for name in names), default=1)
    totals = np.maximum(confusion.sum(axis=1), 1)
    return Matrix(
        n=n,
        cell=cell,
        gap=1 if named else 0,
        side=cell * n,
        margin=round(_LETTER * longest) + 14,
        overhang=round(_LETTER * longest * 0.72) if named else 16,
        numbers=n <= NUMBERS_UP_TO,
        names=names,
        cells=tuple(_cell(confusion, totals, classes, cell, *place) for place in np.argwhere(confusion > 0).tolist()),
    )


def _cell(
    confusion: NDArray[np.int64], totals: NDArray[np.int64], classes: tuple[str, ...], cell: int, row: int, column: int
) -> Cell:
    count = int(confusion[row, column])
    share = count / int(totals[row])
    faintest = _FAINTEST if cell >= 18 else _FAINTEST_SMALL
    return Cell(
        x=column * cell,
        y=row * cell,
        count=count,
        strength=round(faintest + (1 - faintest) * share**0.5, 2),
        right=row == column,
        label=classes[row],
        answer=classes[column],
        share=share,
    )


def _names(classes: tuple[str, ...], cell: int) -> tuple[Name, ...]:
    """Names where they fit; else the numbers of every so many classes, counted from 0 as in the class list."""
    if len(classes) <= NAMES_UP_TO:
        return tuple(Name((i + 0.5) * cell, _shorten(name), name) for i, name in enumerate(classes))
    every = 50 if len(classes) > 150 else 10
    return tuple(Name((i + 0.5) * cell, str(i), classes[i]) for i in range(0, len(classes), every))


def _shorten(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
