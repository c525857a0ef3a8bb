"""The images of one source in splits and classes, possibly millions of them, and the choice of a split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_swinv2.data.index import FileIndex, IndexedEntries
from video_swinv2.data.lists import SPLIT_SYNONYMS, SPLITS
from video_swinv2.data.manifest import Manifest, label_index
from video_swinv2.errors import UsageError
from video_swinv2.files import read_class_list

HELD_OUT = 20  # one image in this many validates, if a source has no val split
ALL_IMAGES = "all"


@dataclass(frozen=True)
class ImageCollection:
    """All images of a source, as its folders or tars record them."""

    root: Path
    index: FileIndex
    splits: tuple[str, ...]
    """The split of each container."""
    label_names: tuple[str, ...]
    """The labels as found, each once: class names, or numbers if `labels_are_numbers`."""
    labels: Tensor
    """int32 (entries,): the position of the label of each entry in `label_names`, -1 for none."""
    labels_are_numbers: bool
    empty_class_folder: str = ""
    """A class folder without images, if there is one: half an unpacked data set, or a class that is never learned."""

    @property
    def splits_with_images(self) -> set[str]:
        """The splits that hold images."""
        return {split for split, count in zip(self.splits, self.index.counts, strict=True) if count}

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits there are, val among them if it has to be held out of train, and `all`, which is every image."""
        found = self.splits_with_images | ({"val"} if "train" in self.splits_with_images else set())
        return (*(split for split in SPLITS if split in found), ALL_IMAGES)

    def entries(self, split: str) -> IndexedEntries:
        """The images of a split without their labels; UsageError if there is no such split."""
        rows = self._rows(split)
        return IndexedEntries(self.root, self.index, rows, torch.full((len(rows),), -1, dtype=torch.int32))

    def manifest(self, split: str, classes: Sequence[str] | None = None) -> Manifest:
        """The images of a split with labels into `classes`, or into the source's own.

        The source's own classes are those of its classes.txt, else all label names in order. Labels that are numbers
        count the lines of classes.txt, else the classes asked for, as the folders of ImageNet-V2 do. The fingerprint
        covers names, labels and classes, not the bytes of the images. Raises UsageError.
        """
        rows = self._rows(split)
        found = self.labels[rows].numpy()
        if len(rows) and found.min() < 0:
            first = IndexedEntries(self.root, self.index, rows[int(found.argmin())][None], torch.tensor([-1]))[0]
            raise UsageError(f"{self.root / first.name}: has no label; move it into a class folder or remove it")
        if self.empty_class_folder:
            raise UsageError(
                f"{self.root / self.empty_class_folder}: a class folder without images; fill it or remove it"
            )
        wanted, own, labels_found = self._classes(classes)
        position = {name: number for number, name in enumerate(wanted)}
        # From positions in `label_names` to positions in `wanted`. Only labels of this split are looked up: a class
        # that occurs in another split alone need not be known.
        table = np.full(len(self.label_names), -1, dtype=np.int32)
        for label in np.unique(found):
            table[label] = label_index(labels_found[label], str(self.root), own, position)
        labels = torch.from_numpy(table[found])
        entries = IndexedEntries(self.root, self.index, rows, labels)
        fingerprint = self._fingerprint(rows, labels, wanted)
        return Manifest(self.root, split, wanted, entries, fingerprint)  # type: ignore[arg-type]  # a TarMember has all that an Entry has

    def _rows(self, split: str) -> Tensor:
        """The entries of a split, int64 ascending."""
        split = SPLIT_SYNONYMS.get(split, split)
        if split not in self.split_names:
            raise UsageError(f"{self.root}: no split {split!r}, there is {', '.join(self.split_names)}")
        if split == ALL_IMAGES:
            return torch.arange(len(self.index))
        # Without a val split of its own, a source's val is a part of train, and train is the rest.
        divide = "val" not in self.splits_with_images and split in ("train", "val")
        of_split = np.array([name == ("train" if divide else split) for name in self.splits])
        rows = np.flatnonzero(np.repeat(of_split, self.index.counts))
        if divide:
            chosen = held_out(self.labels.numpy()[rows], self.index.columns["hash"][rows])
            rows = rows[chosen == (split == "val")]
        return torch.from_numpy(rows)

    def _classes(self, classes: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...], Sequence[str | int]]:
        """The classes to use, the source's own, and `label_names` as names or as positions in the source's own."""
        file = self.root / "classes.txt"
        listed = read_class_list(file) if file.is_file() else None
        known = listed or (None if classes is None else tuple(classes))
        digits = all(name.isascii() and name.isdigit() for name in self.label_names)
        # Class folders called 0, 1, 2, ... are names only if a class list says so.
        if digits and (self.labels_are_numbers or (known and not set(known) & set(self.label_names))):
            numbers = [int(name) for name in self.label_names]
            own = known or tuple(str(number) for number in range(1 + max(numbers, default=-1)))
            return (own if classes is None else tuple(classes)), own, numbers
        own = listed or self.label_names
        return (own if classes is None else tuple(classes)), own, self.label_names

    def _fingerprint(self, rows: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
        digest = hashlib.sha256()
        index = self.index
        for array in (index.containers.text, index.starts, index.names.text, rows.numpy(), labels.numpy()):
            digest.update(np.ascontiguousarray(array).data)
        digest.update("\n".join(classes).encode())
        return digest.hexdigest()


def held_out(groups: NDArray[np.int32], hashes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool (n,): True for one entry in twenty of each group (class), at least one of two or more.

    The entries with the smallest hashes are held out, so adding images to a class moves hardly any from train to val.
    """
    # Sorted by group, and by hash within a group: hashes have 32 bits, so one int64 holds both.
    order = np.argsort((groups.astype(np.int64) << 32) + hashes, kind="stable")
    counts = np.bincount(groups + 1)  # -1, no label, is a group too
    held = np.maximum((counts + HELD_OUT // 2) // HELD_OUT, counts > 1)  # rounded
    sorted_groups = groups[order] + 1
    rank_in_group = np.arange(len(groups)) - (np.cumsum(counts) - counts)[sorted_groups]
    chosen = np.empty(len(groups), dtype=bool)
    chosen[order] = rank_in_group < held[sorted_groups]
    return chosen
