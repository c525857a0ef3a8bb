"""The images of one source, possibly millions, with their splits and classes; selects the images of one split."""

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
from video_swinv2.data.manifest import Manifest, label_indices, numbered_classes
from video_swinv2.data.rows import NUMBER
from video_swinv2.data.trees import SPLITS, split_of
from video_swinv2.errors import UsageError
from video_swinv2.files import check_class_names, read_class_list

HELD_OUT = 20  # one image in 20 is used for validation if a source has no val split
ALL_IMAGES = "all"


@dataclass(frozen=True)
class ImageCollection:
    """All images of a source, with the splits and labels found in its folders or tars."""

    root: Path
    index: FileIndex
    splits: tuple[str, ...]
    """The split of each container (folder or tar) of `index`, in the same order."""
    label_names: tuple[str, ...]
    """The distinct labels as found: class names, or class numbers in decimal digits."""
    labels: Tensor
    """int32 (entries,): for each entry, the position of its label in `label_names`, or -1 if it has no label."""
    labels_are_numbers: bool
    """Whether labels made of digits are always class numbers, as in tar shards; for class folders it depends on the
    class list."""

    @property
    def splits_with_images(self) -> set[str]:
        """The splits that contain at least one image."""
        return {split for split, count in zip(self.splits, self.index.counts, strict=True) if count}

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that can be read: those found, val (held out of train if absent), and `all` for every image."""
        found = self.splits_with_images | ({"val"} if "train" in self.splits_with_images else set())
        return (*(split for split in SPLITS if split in found), ALL_IMAGES)

    def entries(self, split: str) -> IndexedEntries:
        """The images of a split, without labels. Raises UsageError if there is no such split."""
        rows = self._rows(split)
        return IndexedEntries(self.root, self.index, rows, torch.full((len(rows),), -1, dtype=torch.int32))

    def fingerprint(self, split: str) -> str:
        """Identifies the images of a split by their names, without labels."""
        rows = self._rows(split)
        return self._fingerprint(rows, torch.empty(0, dtype=torch.int32), ())

    def manifest(self, split: str, classes: Sequence[str] | None = None) -> Manifest:
        """The images of a split, with labels that index `classes` or, without them, the source's own classes.

        The source's own classes are the lines of its classes.txt or, without that file, all label names in sorted
        order. Labels that are numbers index the lines of classes.txt or, without that file, the given `classes`, which
        is how the folders of ImageNet-V2 are numbered. The fingerprint covers names, labels and classes, but not the
        bytes of the images. Raises UsageError for an unknown split, and for a missing or unknown label.
        """
        rows = self._rows(split)
        found = self.labels[rows].numpy()
        if len(rows) and found.min() < 0:
            first = IndexedEntries(self.root, self.index, rows[int(found.argmin())][None], torch.tensor([-1]))[0]
            raise UsageError(f"{self.root / first.name}: has no label; move it into a class folder or remove it")
        wanted, own, labels_found = self._classes(classes)
        # `table` maps positions in `label_names` to positions in `wanted`: one lookup per class instead of one per
        # image. Only labels of this split are looked up, so a class that occurs only in another split may be unknown.
        table = np.full(len(self.label_names), -1, dtype=np.int32)
        used = np.unique(found)
        indices = label_indices({labels_found[label]: str(self.root) for label in used}, own, wanted)
        table[used] = [indices[labels_found[label]] for label in used]
        labels = torch.from_numpy(table[found])
        entries = IndexedEntries(self.root, self.index, rows, labels)
        fingerprint = self._fingerprint(rows, labels, wanted)
        return Manifest(self.root, split, wanted, entries, fingerprint)  # type: ignore[arg-type]  # a TarMember has all that an Entry has

    def _rows(self, split: str) -> Tensor:
        """The entry numbers of a split, int64, ascending."""
        split = split_of(split) or split
        if split not in self.split_names:
            raise UsageError(f"{self.root}: no split {split!r}; available: {', '.join(self.split_names)}")
        if split == ALL_IMAGES:
            return torch.arange(len(self.index))
        # If the source has no val split, val is held out of train, and train is what remains.
        divide = "val" not in self.splits_with_images and split in ("train", "val")
        # Splits are known per container: (containers,) bool is repeated to (entries,) by the number of entries in each.
        of_split = np.array([name == ("train" if divide else split) for name in self.splits])
        rows = np.flatnonzero(np.repeat(of_split, self.index.counts))
        if divide:
            chosen = held_out(self.labels.numpy()[rows], self.index.columns["hash"][rows])
            rows = rows[chosen == (split == "val")]
        return torch.from_numpy(rows)

    def _classes(self, classes: Sequence[str] | None) -> tuple[tuple[str, ...], tuple[str, ...], Sequence[str | int]]:
        """The classes to use, the source's own classes, and `label_names` as names or as indices into the latter."""
        file = self.root / "classes.txt"
        listed = read_class_list(file) if file.is_file() else None
        known = listed or (None if classes is None else tuple(classes))
        digits = all(NUMBER.fullmatch(name) and name.isdigit() for name in self.label_names)
        # Class folders called 0, 1, 2, ... are numbers if there is a class list that does not contain any of them as a
        # name, and names otherwise.
        if digits and (self.labels_are_numbers or (known and not set(known) & set(self.label_names))):
            numbers = [int(name) for name in self.label_names]
            own = known or numbered_classes(max(numbers, default=-1), len(numbers), str(self.root))
            return (own if classes is None else tuple(classes)), own, numbers
        own = listed or self.label_names
        check_class_names(own, str(self.root))
        return (own if classes is None else tuple(classes)), own, self.label_names

    def _fingerprint(self, rows: Tensor, labels: Tensor, classes: Sequence[str]) -> str:
        # Names are hashed for the whole source, in the arrays that the index holds them in: no loop over the entries.
        # `rows` then says which of them belong to the split.
        digest = hashlib.sha256()
        index = self.index
        for array in (index.containers.text, index.starts, index.names.text, rows.numpy(), labels.numpy()):
            digest.update(np.ascontiguousarray(array).data)
        digest.update("\n".join(classes).encode())
        return digest.hexdigest()


def held_out(groups: NDArray[np.int32], hashes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Choose one entry in twenty of each group (class), and at least one of any group of two or more.

    The entries with the smallest hashes are chosen, so adding images to a class moves hardly any between train and val.

    Args:
        groups: (n,), the group of each entry, from -1 on.
        hashes: (n,), from 0 to 2^32 - 1.

    Returns:
        bool (n,), True for the chosen entries.
    """
    # Sort by group, and by hash within a group. Hashes have 32 bits, so an int64 holds the group above the hash.
    order = np.argsort((groups.astype(np.int64) << 32) + hashes, kind="stable")
    counts = np.bincount(groups + 1)  # shifted by 1: bincount takes no negatives, and -1 (no label) is a group too
    held = np.maximum((counts + HELD_OUT // 2) // HELD_OUT, counts > 1)  # counts / 20 rounded, but 1 for 2 to 9 entries
    # Position within the group = position in the sorted order - position at which the group begins.
    sorted_groups = groups[order] + 1
    rank_in_group = np.arange(len(groups)) - (np.cumsum(counts) - counts)[sorted_groups]
    chosen = np.empty(len(groups), dtype=bool)
    # Assigning through `order` puts the answers back into the order of the entries.
    chosen[order] = rank_in_group < held[sorted_groups]
    return chosen
