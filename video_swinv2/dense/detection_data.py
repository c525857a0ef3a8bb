"""Data sets of images with boxes: the annotations of a split in memory, checked, and the items made from them.

Letters: H W pixels, N objects of an image, M objects of a split.

`coco.py` and `voc.py` read the two layouts. Labels count from 1, in the order of the classes, because 0 is the
background for torchvision's detectors and for ours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_swinv2.data.decode import DecodeError
from video_swinv2.data.images import shown_size
from video_swinv2.data.manifest import Entry
from video_swinv2.dense.outlines import decode_outlines, outline_fault
from video_swinv2.errors import UsageError
from video_swinv2.files import check_class_names

TOLERANCE = 1.0  # pixels that a box may exceed its image, because of rounding; it is clipped
SHOWN_FAULTS = 3  # in one message


@dataclass(frozen=True)
class AnnotatedObject:
    """One object as a file describes it."""

    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels; the pixel at the top left covers 0 to 1."""
    label: int
    """The number of its class, from 1."""
    ignored: bool
    """A crowd of COCO or a difficult object of VOC: neither trained on nor counted in a test."""
    area: float | None
    """In pixels; None for that of the box."""
    outline: Any
    """As `outlines.py` describes; None for none."""
    where: str
    """How a message names it."""


@dataclass(frozen=True)
class AnnotatedImage:
    """One image as a file describes it."""

    name: str
    path: Path
    size: tuple[int, int]
    """(H, W) in pixels, as annotated."""
    image_id: int
    objects: Sequence[AnnotatedObject]


@dataclass(frozen=True)
class DetectionData:
    """One split of a data set. Objects are in arrays, which loader workers share, in the order of the images."""

    root: Path
    split: str
    classes: tuple[str, ...]
    """The name of label k is number k - 1."""
    entries: tuple[Entry, ...]
    """The images, those without objects included. The label of each is its place in this list."""
    notes: tuple[str, ...]
    """What was noticed, and what was left out, one line each."""
    category_ids: NDArray[np.int64] = field(repr=False)
    """(classes,): the number of each class in the data set's own files; -1 for a class that they do not have."""
    image_ids: NDArray[np.int64] = field(repr=False)
    sizes: NDArray[np.int64] = field(repr=False)
    """(images, 2): height and width."""
    first: NDArray[np.int64] = field(repr=False)
    """(images + 1,): the first object of each image, and M."""
    boxes: NDArray[np.float32] = field(repr=False)
    """(M, 4): x1, y1, x2, y2."""
    labels: NDArray[np.int64] = field(repr=False)
    ignored: NDArray[np.bool_] = field(repr=False)
    areas: NDArray[np.float32] = field(repr=False)
    outlines: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = field(repr=False)
    """The JSON of all outlines, one after the other, and where each begins, (M + 1,); None unless all have one."""

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def has_masks(self) -> bool:
        """Whether every object has an outline."""
        return self.outlines is not None

    def size(self, place: int) -> tuple[int, int]:
        """(H, W) of an image in pixels, as annotated."""
        return int(self.sizes[place, 0]), int(self.sizes[place, 1])

    def outlines_of(self, places: Iterable[int]) -> list[Any]:
        """The outlines of the objects at these places, as their file has them."""
        if self.outlines is None:
            return []
        text, begin = self.outlines
        return [json.loads(text[begin[place] : begin[place + 1]].tobytes()) for place in places]

    def objects(self, place: int, ignored: bool = False) -> NDArray[np.int64]:
        """The places of the objects of an image: those to be found, or also those that are ignored."""
        places = np.arange(self.first[place], self.first[place + 1])
        return places if ignored else places[~self.ignored[places]]

    def target(self, place: int, *, ignored: bool = False, masks: bool = True) -> dict[str, Tensor]:
        """The target of an image.

        Args:
            place: of the image.
            ignored: whether crowds and difficult objects are in it; `iscrowd` tells which they are.
            masks: whether to decode the masks, if there are any.

        `boxes` float32 (N, 4) as x1, y1, x2, y2 in pixels, `labels` int64 (N,) from 1, `area` float32 (N,), `iscrowd`
        int64 (N,), `image_id` int64 (), and `masks` uint8 (N, H, W), 1 inside.
        """
        places = self.objects(place, ignored)
        target = {
            "boxes": torch.from_numpy(self.boxes[places]),
            "labels": torch.from_numpy(self.labels[places]),
            "area": torch.from_numpy(self.areas[places]),
            "iscrowd": torch.from_numpy(self.ignored[places].astype(np.int64)),
            "image_id": torch.tensor(int(self.image_ids[place])),
        }
        if masks and self.has_masks:
            target["masks"] = torch.from_numpy(decode_outlines(self.outlines_of(places), self.size(place)))
        return target

    def check(self) -> str:
        """Read the header of every image, and return the fingerprint of the split.

        The fingerprint changes with the classes, the names and sizes of the images and the objects. Raises DecodeError
        for an image that cannot be read, or that has another size than its annotation says.
        """
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow releases Python's lock
            list(pool.map(self._check_size, range(len(self))))
        digest = hashlib.sha256("\n".join((self.split, *self.classes)).encode())
        for entry in self.entries:
            digest.update(os.fsencode(entry.name) + b"\0")
        for array in (self.sizes, self.first, self.boxes, self.labels, self.ignored, *(self.outlines or ())):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def _check_size(self, place: int) -> None:
        path, annotated = self.entries[place].path, self.size(place)
        if (found := shown_size(path)) != annotated:
            raise size_fault(path, found, annotated)


def size_fault(path: Path, found: tuple[int, int], annotated: tuple[int, int]) -> DecodeError:
    """The error for an image of another size (H, W) than its annotation says."""
    return DecodeError(
        f"{path}: is {found[1]} x {found[0]} pixels, but annotated as {annotated[1]} x {annotated[0]}; correct the "
        "annotation, or replace the image"
    )


def compact(
    root: Path,
    split: str,
    classes: Sequence[str],
    images: Sequence[AnnotatedImage],
    notes: Sequence[str],
    where: str,
    *,
    drop_faulty: bool,
    category_ids: Sequence[int] | None = None,
) -> DetectionData:
    """Check what a file describes, and put it into arrays.

    Args:
        where: the file or folder that it comes from, for messages.
        drop_faulty: leave out missing images and faulty objects with a note, instead of raising UsageError.
        category_ids: the number of each class in the file, -1 for none; by default the labels, from 1.

    Raises UsageError for no images at all and for class names that cannot be used.
    """
    check_class_names(classes, where)
    if not images:
        raise UsageError(f"{where}: the split {split} has no images; name another split")
    faults: list[str] = []
    kept_images, kept_objects = [], []
    for image in images:
        if not os.path.isfile(image.path):  # unlike Path.is_file, it is not stopped by a name that is too long
            faults.append(f"{image.path}: no such image, but {where} lists it; add it, or remove its annotation")
            continue
        objects = []
        for item in image.objects:
            if fault := _object_fault(item, image.size):
                faults.append(f"{where}: {item.where}: {fault}")
            else:
                objects.append(item)
        kept_images.append(image)
        kept_objects.append(objects)
    if faults and (not drop_faulty or not kept_images):
        others = f" (and {len(faults) - 1:,} more faults; drop_faulty leaves all of them out)" if faults[1:] else ""
        raise UsageError(f"{faults[0]}{others}")
    shown = [f"left out: {fault}" for fault in faults[:SHOWN_FAULTS]]
    if len(faults) > SHOWN_FAULTS:
        shown.append(f"left out: {len(faults) - SHOWN_FAULTS:,} more")
    outlines, outline_notes = _joined_outlines([item for objects in kept_objects for item in objects])
    entries = tuple(Entry(image.name, str(image.path), place) for place, image in enumerate(kept_images))
    ids = np.array(range(1, len(classes) + 1) if category_ids is None else category_ids, dtype=np.int64)
    notes = (*notes, *shown, *outline_notes)
    return _arrays(root, split, tuple(classes), entries, notes, ids, kept_images, kept_objects, outlines)


def _arrays(
    root: Path,
    split: str,
    classes: tuple[str, ...],
    entries: tuple[Entry, ...],
    notes: tuple[str, ...],
    category_ids: NDArray[np.int64],
    images: Sequence[AnnotatedImage],
    objects: Sequence[Sequence[AnnotatedObject]],
    outlines: tuple[NDArray[np.uint8], NDArray[np.int64]] | None,
) -> DetectionData:
    everything = [item for found in objects for item in found]
    sizes = np.array([image.size for image in images], dtype=np.int64).reshape(-1, 2)
    counts = np.array([len(found) for found in objects], dtype=np.int64)
    boxes = np.array([item.box for item in everything], dtype=np.float32).reshape(-1, 4)
    # Clipped to the image: width, height, width, height of each object's image.
    limits = np.repeat(sizes[:, [1, 0, 1, 0]], counts, axis=0)
    boxes = np.clip(boxes, 0, limits).astype(np.float32)
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = [np.nan if item.area is None else item.area for item in everything]
    return DetectionData(
        root,
        split,
        classes,
        entries,
        notes,
        category_ids,
        np.array([image.image_id for image in images], dtype=np.int64),
        sizes,
        np.concatenate(([0], counts.cumsum())),
        boxes,
        np.array([item.label for item in everything], dtype=np.int64),
        np.array([item.ignored for item in everything], dtype=bool),
        np.where(np.isnan(areas), sides.prod(axis=1), areas).astype(np.float32),
        outlines,
    )


def _object_fault(item: AnnotatedObject, size: tuple[int, int]) -> str:
    """What is wrong with an object in an image of `size` (H, W); '' if nothing is."""
    left, top, right, bottom = item.box
    height, width = size
    shown = f"the box from ({left:g}, {top:g}) to ({right:g}, {bottom:g})"
    if not (right > left and bottom > top):  # also NaN
        return f"{shown} has no width or no height; correct or remove it"
    if min(left, top) < -TOLERANCE or right > width + TOLERANCE or bottom > height + TOLERANCE:
        return f"{shown} is outside the image of {width} x {height} pixels; correct or remove it"
    if not (right > 0 and bottom > 0 and left < width and top < height):
        return f"{shown} lies at the border of the image, outside; correct or remove it"
    if item.outline is not None and (fault := outline_fault(item.outline, size)):
        return f"its segmentation: {fault}; correct or remove it"
    return ""


def _joined_outlines(
    objects: Sequence[AnnotatedObject],
) -> tuple[tuple[NDArray[np.uint8], NDArray[np.int64]] | None, list[str]]:
    """The outlines as one array of bytes with offsets, or None unless all objects have one; and notes."""
    without = sum(item.outline is None for item in objects)
    if without:
        partly = f"{without:,} of {len(objects):,} objects have no segmentation, so there are no masks"
        return None, [partly] if without < len(objects) else []
    texts = [json.dumps(item.outline, separators=(",", ":"), allow_nan=False).encode() for item in objects]
    begin = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return (np.frombuffer(b"".join(texts), dtype=np.uint8), begin), []
