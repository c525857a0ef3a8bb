"""Samples of several sources as one numbered whole, and the order in which an epoch draws them.

Sample numbers run through the sources one after the other; `repeats` samples of one entry are neighbours, and the order
keeps them together, so that the frames of a video are decoded at once. In a weighted mixture an epoch draws a share of
each source: of a small one some entries twice or more, numbered on from the number of all samples for each further
time, of a large one a part, going on where the epoch before left off.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.data.index import Item
from video_swinv2.errors import UsageError


@dataclass(frozen=True)
class Part:
    """One source: its entries, how many samples each gives in a row, and its weight, None for all of it."""

    entries: Sequence[Item]
    repeats: int = 1
    weight: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a sample number points: its entry, and that it is the `nth` of `of` samples of it, from `first` on."""

    entry: Item
    first: int
    nth: int
    of: int


class Mixture:
    """All samples of a run. `len()` is the samples of an epoch; `total`, those there are."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        if len({part.weight is None for part in self.parts}) > 1:
            raise UsageError("data.source: some sources have a weight and some have none; give one to each, or to none")
        units = np.array([len(part.entries) for part in self.parts])
        self._repeats = np.array([part.repeats for part in self.parts])
        self._unit_ends = np.cumsum(units)
        self._ends = np.cumsum(units * self._repeats)
        self.total = int(self._ends[-1])
        if self.parts[0].weight is not None:
            weights = np.array([part.weight for part in self.parts], dtype=np.float64)
            shares = weights / weights.sum()
            units = np.maximum(np.rint(shares * self.total / self._repeats), 1).astype(np.int64)
        self._drawn = units  # entries per epoch of each part

    def __len__(self) -> int:
        return int((self._drawn * self._repeats).sum())

    def __getitem__(self, number: int) -> Place:
        """Where a sample number points; numbers beyond `total` point to the same entries again."""
        if not len(self):
            raise IndexError(number)
        within = number % self.total
        place = int(np.searchsorted(self._ends, within, side="right"))
        part = self.parts[place]
        local = within - (int(self._ends[place - 1]) if place else 0)
        unit, nth = divmod(local, part.repeats)
        return Place(part.entries[unit], number - nth, nth, part.repeats)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The sample numbers of an epoch, each once: a function of (seed, epoch)."""
        random = np.random.default_rng((seed, epoch))
        if self.parts[0].weight is None:
            units = random.permutation(int(self._unit_ends[-1]))
        else:
            parts = [self._units(seed, epoch, place) for place in range(len(self.parts))]
            units = random.permutation(np.concatenate(parts))
        if self._repeats.max() == 1:
            return units
        times, unit = np.divmod(units, self._unit_ends[-1])
        part = np.searchsorted(self._unit_ends, unit, side="right")
        before = unit - np.concatenate([[0], self._unit_ends])[part]
        repeats = self._repeats[part]
        first = times * self.total + np.concatenate([[0], self._ends])[part] + before * repeats
        starts = np.cumsum(repeats) - repeats
        return np.repeat(first - starts, repeats) + np.arange(repeats.sum())

    def _units(self, seed: int, epoch: int, place: int) -> NDArray[np.int64]:
        """The entries that a weighted epoch draws of one part: a stretch of an endless row of permutations."""
        size, drawn = len(self.parts[place].entries), int(self._drawn[place])
        base, every = int(self._unit_ends[place]) - size, int(self._unit_ends[-1])

        def stretches() -> Iterator[NDArray[np.int64]]:
            start, stop = epoch * drawn, (epoch + 1) * drawn
            for turn in range(start // size, -(-stop // size)):
                shuffled = np.random.default_rng((seed, turn, place + 1)).permutation(size)
                chosen = shuffled[max(start - turn * size, 0) : stop - turn * size]
                yield base + chosen + (turn - start // size) * every

        return np.concatenate(list(stretches()))
