"""Images of one source in splits and classes, and the choice of a split: millions of them, without an object each."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_swinv2.data.index import Index, Indexed
from video_swinv2.data.lists import SPLIT_WORDS, SPLITS
from video_swinv2.data.manifest import Manifest, label_index, read_class_list
from video_swinv2.errors import UsageError

HELD_OUT = 20  # one image in this many validates, where a source has no val split
EVERYTHING = "all"


@dataclass(frozen=True)
class Collection:
    """All images of a source, as its folders or tars tell."""

    root: Path
    index: Index
    splits: tuple[str, ...]
    """The split of each container."""
    words: tuple[str, ...]
    """The labels as found, each once: class names, or numbers where `numbered`."""
    labels: Tensor
    """int32, for each entry the place of its label in `words`, -1 for none."""
    numbered: bool
    empty: str = ""
    """A class folder without images, if there is one: half an unpacked data set, or a class never to be learned."""

    @property
    def filled(self) -> set[str]:
        """The splits that hold images."""
        return {split for split, count in zip(self.splits, self.index.counts, strict=True) if count}

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits there are, val among them if it has to be held out of train; and `all`, which is every image."""
        found = self.filled | ({"val"} if "train" in self.filled else set())
        return (*(split for split in SPLITS if split in found), EVERYTHING)

    def entries(self, split: str) -> Indexed:
        """The images of a split without their labels; UsageError if there is no such split."""
        rows = self._rows(split)
        return Indexed(self.root, self.index, rows, torch.full((len(rows),), -1, dtype=torch.int32))

    def manifest(self, split: str, classes: Sequence[str] | None = None) -> Manifest:
        """The images of a split with labels into `classes`, or into the source's own.

        Those are in classes.txt, else all names in order. Numbers count the lines of classes.txt, else the classes
        asked for, as the folders of ImageNet-V2 do. The fingerprint covers names, labels and classes, not the bytes.
        """
        rows = self._rows(split)
        found = self.labels[rows].numpy()
        if len(rows) and found.min() < 0:
            name = Indexed(self.root, self.index, rows[int(found.argmin())][None], torch.tensor([-1]))[0].name
            raise UsageError(f"{self.root / name}: has no label; move it into a class folder or leave it out")
        if self.empty:
            raise UsageError(f"{self.root / self.empty}: a class folder without images; fill it or remove it")
        wanted, own, labels_found = self._classes(classes)
        place = {name: number for number, name in enumerate(wanted)}
        table = np.full(len(self.words), -1, dtype=np.int32)
        for word in np.unique(found):  # a class of another split need not be known
            table[word] = label_index(labels_found[word], str(self.root), own, place)
        labels = torch.from_numpy(table[found])
        entries = Indexed(self.root, self.index, rows, labels)
        fingerprint = self._fingerprint(rows, labels, wanted)
        return Manifest(self.root, split, wanted, entries, fingerprint)  # type: ignore[arg-type]  # a member of a tar has all that an entry has

    def _rows(self, split: str) -> Tensor:
        """The entries of a split, int64 ascending."""
        split = SPLIT_WORDS.get(split, split)
        if split not in self.split_names:
            raise UsageError(f"{self.root}: no split {split!r}, there is {', '.join(self.split_names)}")
        if split == EVERYTHING:
            return torch.arange(len(self.index))
        held = "val" not in self.filled and split in ("train", "val")
        of_split = np.array([word == ("train" if held else split) for word in self.splits])
        rows = np.flatnonzero(np.repeat(of_split, self.index.counts))
        if held:
            chosen = held_out(self.labels.numpy()[rows], self.index.columns["hash"][rows])
            rows = rows[chosen == (split == "val")]
        return torch.from_numpy(rows)

    def _classes(self, classes: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...], Sequence[str | int]]:
        """The classes to use, the source's own, and `words` as names or as places in the source's own."""
        file = self.root / "classes.txt"
        listed = read_class_list(file) if file.is_file() else None
        known = listed or (None if classes is None else tuple(classes))
        digits = all(word.isascii() and word.isdigit() for word in self.words)
        if digits and (self.numbered or (known and not set(known) & set(self.words))):
            numbers = [int(word) for word in self.words]
            own = known or tuple(str(number) for number in range(1 + max(numbers, default=-1)))
            return (own if classes is None else tuple(classes)), own, numbers
        own = listed or self.words
        return (own if classes is None else tuple(classes)), own, self.words

    def _fingerprint(self, rows: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
        digest = hashlib.sha256()
        index = self.index
        for array in (index.containers.text, index.starts, index.names.text, rows.numpy(), labels.numpy()):
            digest.update(np.ascontiguousarray(array).data)
        digest.update("\n".join(classes).encode())
        return digest.hexdigest()


def held_out(groups: NDArray[np.int32], hashes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """True for one entry in twenty of each group (class), at least one of two or more: those of the smallest hashes."""
    order = np.argsort((groups.astype(np.int64) << 32) + hashes, kind="stable")
    counts = np.bincount(groups + 1)  # -1 is a group too
    held = np.maximum((counts + HELD_OUT // 2) // HELD_OUT, counts > 1)
    sorted_groups = groups[order] + 1
    chosen = np.empty(len(groups), dtype=bool)
    chosen[order] = np.arange(len(groups)) - (np.cumsum(counts) - counts)[sorted_groups] < held[sorted_groups]
    return chosen
