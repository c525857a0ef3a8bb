"""The samples of several sources as one numbered whole, and the order in which an epoch draws them.

Every sample has a number. Numbers run through the sources one after the other, and the `repeats` samples of one entry
are neighbours. For two sources, of 3 entries with 2 samples each and of 2 entries with 1:

    source          0            1
    entry           0   1   2    0 1
    sample number   0 1 2 3 4 5  6 7      distinct_samples = 8

The order of an epoch is a permutation of *entries*, each then expanded to its samples, so that the samples of one entry
stay together and the frames of a video are decoded in one pass.

In a weighted mixture an epoch draws a share of each source. Of a small source some entries come twice or more; their
samples are numbered on from `distinct_samples` for each further time (8..15 are 0..7 a second time), so that the same
entry is augmented differently each time. Of a large source an epoch draws a part, continuing where the last one ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from video_swinv2.data.index import AnyEntry
from video_swinv2.errors import UsageError


@dataclass(frozen=True)
class MixtureSource:
    """One source: its entries, how many samples in a row each entry gives, and its weight (None: all of it)."""

    entries: Sequence[AnyEntry]
    repeats: int = 1
    weight: float | None = None


@dataclass(frozen=True)
class SampleOrigin:
    """What a sample number stands for: the `nth` of the `count` samples of `entry`, of which `first` is the first."""

    entry: AnyEntry
    first: int
    nth: int
    count: int


class Mixture:
    """All samples of a run: `len()` of them in an epoch, `distinct_samples` different ones."""

    def __init__(self, sources: Sequence[MixtureSource]) -> None:
        self.sources = tuple(sources)
        if len({source.weight is None for source in self.sources}) > 1:
            raise UsageError("data.source: some sources have a weight and some do not; give one to each, or to none")
        entries = np.array([len(source.entries) for source in self.sources])
        self._repeats = np.array([source.repeats for source in self.sources])
        # Where each source ends, counted in entries and in samples.
        self._entry_ends = np.cumsum(entries)
        self._sample_ends = np.cumsum(entries * self._repeats)
        self.distinct_samples = int(self._sample_ends[-1])
        drawn = entries
        if self.sources[0].weight is not None:
            weights = np.array([source.weight for source in self.sources], dtype=np.float64)
            shares = weights / weights.sum()
            # An epoch is as long as without weights, up to rounding; weights are shares of samples, not of entries.
            drawn = np.maximum(np.rint(shares * self.distinct_samples / self._repeats), 1).astype(np.int64)
        self._entries_per_epoch = drawn

    def __len__(self) -> int:
        return int((self._entries_per_epoch * self._repeats).sum())

    def __getitem__(self, number: int) -> SampleOrigin:
        """What a sample number stands for; numbers from `distinct_samples` on stand for the same entries again."""
        if not len(self):
            raise IndexError(number)
        within = number % self.distinct_samples
        place = int(np.searchsorted(self._sample_ends, within, side="right"))
        source = self.sources[place]
        within_source = within - (int(self._sample_ends[place - 1]) if place else 0)
        entry, nth = divmod(within_source, source.repeats)
        return SampleOrigin(source.entries[entry], number - nth, nth, source.repeats)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The sample numbers of an epoch, int64 (len(self),), each once: a function of (seed, epoch)."""
        random = np.random.default_rng((seed, epoch))
        if self.sources[0].weight is None:
            entries = random.permutation(int(self._entry_ends[-1]))
        else:
            drawn = [self._drawn_entries(seed, epoch, place) for place in range(len(self.sources))]
            entries = random.permutation(np.concatenate(drawn))
        if self._repeats.max() == 1:
            return entries  # entry numbers and sample numbers are the same then
        # From entries to samples. An entry number is counted through all sources, plus a multiple of their number of
        # entries for each further time that a weighted epoch draws it: take it apart,
        times, entry = np.divmod(entries, self._entry_ends[-1])
        source = np.searchsorted(self._entry_ends, entry, side="right")
        within_source = entry - np.concatenate([[0], self._entry_ends])[source]
        # find the number of its first sample,
        repeats = self._repeats[source]
        samples_before = np.concatenate([[0], self._sample_ends])[source] + within_source * repeats
        first = times * self.distinct_samples + samples_before
        # and write out first, first + 1, ..., first + repeats - 1 for each. The result has repeats.sum() values; those
        # of an entry begin at `starts`, so value i of the result is first + (i - starts).
        starts = np.cumsum(repeats) - repeats
        return np.repeat(first - starts, repeats) + np.arange(repeats.sum())

    def _drawn_entries(self, seed: int, epoch: int, place: int) -> NDArray[np.int64]:
        """The entries of one source that a weighted epoch draws.

        The source is an endless sequence of permutations, one after the other; epoch e takes the stretch from
        e * drawn to (e + 1) * drawn. So every entry has been drawn before any comes again, and no state is kept.
        """
        size, drawn = len(self.sources[place].entries), int(self._entries_per_epoch[place])
        base, all_entries = int(self._entry_ends[place]) - size, int(self._entry_ends[-1])

        def stretches() -> Iterator[NDArray[np.int64]]:
            start, stop = epoch * drawn, (epoch + 1) * drawn
            for turn in range(start // size, -(-stop // size)):  # the permutations that the stretch touches
                shuffled = np.random.default_rng((seed, turn, place + 1)).permutation(size)
                chosen = shuffled[max(start - turn * size, 0) : stop - turn * size]
                yield base + chosen + (turn - start // size) * all_entries  # numbered on at each further turn

        return np.concatenate(list(stretches()))
