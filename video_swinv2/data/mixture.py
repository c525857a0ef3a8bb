"""Mixtures: numbers the samples of one or more sources consecutively, and decides the order of each epoch.

Every sample has a number. Numbers continue from one source to the next, and the `repeats` samples of one entry are
neighbours. For two sources, the first with 3 entries of 2 samples each, the second with 2 entries of 1 sample:

    source          0            1
    entry           0   1   2    0 1
    sample number   0 1 2 3 4 5  6 7      distinct_samples = 8

The order of an epoch is a permutation of *entries*, each of which is then expanded to its samples. The samples of an
entry thus stay together, and the frames of a video are decoded in one pass.

In a weighted mixture, an epoch draws from each source in proportion to its weight. Entries of a small source may be
drawn twice or more per epoch. The samples of each repetition get further numbers, `distinct_samples` higher each time
(8..15 are 0..7 drawn a second time), so that each repetition is augmented differently. From a large source, an epoch
draws only a part, and the next epoch continues where it ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.data.index import AnyEntry
from video_swinv2.errors import UsageError


@dataclass(frozen=True)
class MixtureSource:
    """One source of a mixture.

    Attributes:
        entries: its videos or images.
        repeats: the number of samples, numbered consecutively, that each entry gives.
        weight: its share of the samples of an epoch, relative to the other weights; None to draw every entry once.
        fingerprint: identifies the entries, like that of a `Manifest`.
    """

    entries: Sequence[AnyEntry]
    repeats: int = 1
    weight: float | None = None
    fingerprint: str = ""


@dataclass(frozen=True)
class SampleOrigin:
    """What a sample number refers to: the `nth` sample (from 0) of the `count` of `entry`, numbered from `first` on."""

    entry: AnyEntry
    first: int
    nth: int
    count: int


class Mixture:
    """All samples of a run. An epoch has `len()` of them, drawn from `distinct_samples` different ones."""

    def __init__(self, sources: Sequence[MixtureSource]) -> None:
        self.sources = tuple(sources)
        if len({source.weight is None for source in self.sources}) > 1:
            raise UsageError("data.source: some sources have a weight and some do not; give one to each, or to none")
        entries = np.array([len(source.entries) for source in self.sources])
        self._repeats = np.array([source.repeats for source in self.sources])
        # The end (exclusive) of each source, counted in entries and in samples, (sources,) each.
        self._entry_ends = np.cumsum(entries)
        self._sample_ends = np.cumsum(entries * self._repeats)
        self.distinct_samples = int(self._sample_ends[-1])
        drawn = entries
        if self.sources[0].weight is not None:
            weights = np.array([source.weight for source in self.sources], dtype=np.float64)
            shares = weights / weights.sum()
            # Weights are shares of samples, so divide by `repeats` to get entries. Up to rounding, an epoch has as many
            # samples as without weights. Every source gives at least one entry, however small its weight.
            drawn = np.maximum(np.rint(shares * self.distinct_samples / self._repeats), 1).astype(np.int64)
        self._entries_per_epoch = drawn
        parts = [f"{source.fingerprint} {source.repeats} {source.weight}" for source in self.sources]
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        """Identifies the entries of all sources and how they are mixed."""

    def __len__(self) -> int:
        return int((self._entries_per_epoch * self._repeats).sum())

    def __getitem__(self, number: int) -> SampleOrigin:
        """The origin of a sample number; numbers from `distinct_samples` on refer to the same entries again."""
        if not len(self):
            raise IndexError(number)
        # From the number to the source that contains it, and from there to the entry and the position within it.
        within = number % self.distinct_samples
        place = int(np.searchsorted(self._sample_ends, within, side="right"))
        source = self.sources[place]
        within_source = within - (int(self._sample_ends[place - 1]) if place else 0)
        entry, nth = divmod(within_source, source.repeats)
        return SampleOrigin(source.entries[entry], number - nth, nth, source.repeats)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The sample numbers of an epoch in their order, int64 (len(self),), without repetition.

        The order is a function of (seed, epoch).
        """
        random = np.random.default_rng((seed, epoch))
        if self.sources[0].weight is None:
            entries = random.permutation(int(self._entry_ends[-1]))
        else:
            drawn = [self._drawn_entries(seed, epoch, place) for place in range(len(self.sources))]
            entries = random.permutation(np.concatenate(drawn))
        if self._repeats.max() == 1:
            return entries  # with one sample per entry, entry numbers and sample numbers are the same
        # Expand entries to samples. An entry number counts through all sources. For each repetition in a weighted
        # epoch, the total number of entries is added to it. Split it into repetition and entry,
        times, entry = np.divmod(entries, self._entry_ends[-1])
        source = np.searchsorted(self._entry_ends, entry, side="right")
        within_source = entry - np.concatenate([[0], self._entry_ends])[source]
        # compute the number of the entry's first sample,
        repeats = self._repeats[source]
        samples_before = np.concatenate([[0], self._sample_ends])[source] + within_source * repeats
        first = times * self.distinct_samples + samples_before
        # and write first, first + 1, ..., first + repeats - 1 for each entry. The result has repeats.sum() values. An
        # entry's values begin at position `starts`, so the value at position i is first + (i - starts).
        starts = np.cumsum(repeats) - repeats
        return np.repeat(first - starts, repeats) + np.arange(repeats.sum())

    def _drawn_entries(self, seed: int, epoch: int, place: int) -> NDArray[np.int64]:
        """The entry numbers that a weighted epoch draws from one source, int64 (entries drawn,).

        The source is treated as an endless sequence of permutations of its entries, of which epoch e takes the
        positions from e * drawn to (e + 1) * drawn (exclusive). Every entry is therefore drawn once before any is drawn
        again, and no state has to be saved to resume.
        """
        size, drawn = len(self.sources[place].entries), int(self._entries_per_epoch[place])
        base, all_entries = int(self._entry_ends[place]) - size, int(self._entry_ends[-1])

        def stretches() -> Iterator[NDArray[np.int64]]:
            start, stop = epoch * drawn, (epoch + 1) * drawn
            for turn in range(start // size, -(-stop // size)):  # permutations that overlap
                shuffled = np.random.default_rng((seed, turn, place + 1)).permutation(size)
                chosen = shuffled[max(start - turn * size, 0) : stop - turn * size]
                yield base + chosen + (turn - start // size) * all_entries  # further turns number on

        return np.concatenate(list(stretches()))
