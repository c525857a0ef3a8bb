"""Data sets of images and masks of classes: finds the pairs of a split, checks them, and reads them.

Letters: H W pixels, K classes.

A mask is a PNG of the image's size, whose pixels are numbers: grey of 8 bits, or the indices of a palette. Layouts:

    ROOT/classes.txt                  one name per line, for the indices 0, 1, ...
    ROOT/images/NAME.jpg              with ROOT/masks/NAME.png (or annotations/) and the lists train.txt, val.txt and
                                      test.txt of NAMEs; without lists, all images are the split train
    ROOT/images/training/NAME.jpg     with ROOT/annotations/training/NAME.png: folders for the splits, as in ADE20K,
                                      whose objectInfo150.txt serves as a class list too
    ROOT/leftImg8bit/train/CITY/...   with ROOT/gtFine/train/CITY/..._labelTrainIds.png (or _labelIds): Cityscapes
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from video_swinv2.data.decode import DecodeError
from video_swinv2.data.display import MAX_PIXELS, PictureSizeError, check_pixels
from video_swinv2.data.images import read_image, shown_size
from video_swinv2.data.manifest import Entry
from video_swinv2.data.media import IMAGE_SUFFIXES
from video_swinv2.data.trees import SPLIT_SYNONYMS, SPLITS
from video_swinv2.dense.segmenters import IGNORE, MAX_CLASSES
from video_swinv2.errors import UsageError
from video_swinv2.files import check_class_names, name_unreadable, read_class_list, read_text_lines

MASK_FOLDERS = ("masks", "annotations", "labels")
UNKNOWN = -1  # in a table of indices: an index that means nothing
# Of PNG: the bytes of the bit depth and of the colour type, and the types whose values are numbers.
DEPTH_BYTE, COLOUR_BYTE, HEADER_BYTES, GREY_TYPE, PALETTE_TYPE = 24, 25, 26, 0, 3
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The classes of Cityscapes that are evaluated, with their numbers in labelIds.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
CITYSCAPES_LABEL_IDS = 34
LEFT = "_leftImg8bit"


@dataclass(frozen=True)
class SegmentationData:
    """One split of a data set."""

    root: Path
    split: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    """The images. The label of each is its place in this list, and in that of the masks."""
    masks: tuple[Path, ...]
    indices: NDArray[np.int16] = field(repr=False)
    """What the 256 indices of a mask mean: a class, IGNORE or UNKNOWN."""
    listed: str
    """Where the classes are listed, for messages."""
    max_pixels: int = MAX_PIXELS

    def read_mask(self, place: int) -> Tensor:
        """The mask of an image, uint8 (H, W): classes, or IGNORE. Raises DecodeError, also for an unknown index."""
        path = self.masks[place]
        return self._classes(path, _decode_mask(_read_bytes(path), path, self.max_pixels))

    def count_pixels(self) -> Tensor:
        """How many pixels of all masks belong to each class: int64 (K,). Raises DecodeError as `read_mask` does."""
        counts = torch.zeros(256, dtype=torch.int64)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for mask in pool.map(self.read_mask, range(len(self.entries))):
                counts += torch.bincount(mask.flatten(), minlength=256)
        return counts[: len(self.classes)]

    def check(self) -> str:
        """Read the header of every image and every mask completely, and return the fingerprint of the split.

        The fingerprint changes with the names of the classes and of the images, and with the bytes of the masks. Raises
        DecodeError for a file that cannot be read, an unknown index or a mask of another size than its image.
        """
        digest = hashlib.sha256("\n".join((self.split, *self.classes)).encode())
        digest.update(self.indices.tobytes())
        # Pillow and hashlib release Python's lock while they work.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for entry, found in zip(self.entries, pool.map(self._check, range(len(self.entries))), strict=True):
                digest.update(os.fsencode(entry.name) + b"\0" + found)
        return digest.hexdigest()

    def _check(self, place: int) -> bytes:
        """Check one pair; returns the digest of the mask file."""
        entry, path = self.entries[place], self.masks[place]
        content = _read_bytes(path)
        mask = self._classes(path, _decode_mask(content, path, self.max_pixels))
        size = shown_size(entry.path)
        if tuple(mask.shape) != size:
            raise DecodeError(
                f"{path}: is {mask.shape[1]} x {mask.shape[0]} pixels, but its image {entry.path.name} is "
                f"{size[1]} x {size[0]}; make them one size"
            )
        return hashlib.sha256(content).digest()

    def _classes(self, path: Path, mask: NDArray[np.uint8]) -> Tensor:
        """Indices as in the file -> classes."""
        found = self.indices[mask]
        if (found == UNKNOWN).any():
            index, count = int(mask[found == UNKNOWN].max()), len(self.classes)
            last = int(np.flatnonzero((self.indices != UNKNOWN) & (self.indices != IGNORE)).max())
            zero = " (reduce_zero_label makes 1 the first)" if self.indices[0] == IGNORE else ""
            raise DecodeError(
                f"{path}: has pixels of index {index}, but the {count} classes of {self.listed} end at {last}{zero}; "
                f"add the missing classes, or set segmentation.ignore_index={index} if these pixels belong to none"
            )
        return torch.from_numpy(found.astype(np.uint8))


def read_segmentation_data(
    path: Path | str,
    split: str,
    *,
    ignore_index: int = IGNORE,
    reduce_zero_label: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> SegmentationData:
    """Find the images and masks of a split; the layouts are at the top of this file. Only lists and folders are read.

    Raises UsageError for a folder of another layout, a split that it lacks, an image without a mask or a mask without
    an image, and for class names that cannot be used.
    """
    root = Path(path).absolute()
    if not root.is_dir():
        raise UsageError(f"{path}: no such folder; give a data set of images and masks")
    if (root / "leftImg8bit").is_dir():
        return _cityscapes(root, split, max_pixels)
    masks = next((root / name for name in MASK_FOLDERS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        raise UsageError(
            f"{path}: has no folders images and masks; docs/data-formats.md shows the layouts for segmentation"
        )
    classes, listed = _class_list(root)
    pairs = _pairs(root, masks, split)
    indices = np.full(256, UNKNOWN, dtype=np.int16)
    first = int(reduce_zero_label)
    indices[first : first + len(classes)] = np.arange(len(classes))
    indices[[*range(first), ignore_index, IGNORE]] = IGNORE
    return _data(root, split, classes, pairs, indices, listed, max_pixels)


def segmentation_splits(path: Path | str) -> tuple[str, ...]:
    """The splits of a data set, in the order train, val, test, others."""
    root = Path(path)
    if (root / "leftImg8bit").is_dir():
        names = set(_split_folders(root / "leftImg8bit"))
    else:
        names = set(_lists(root)) or set(_split_folders(root / "images")) or {"train"}
    return tuple(dict.fromkeys([*(name for name in SPLITS if name in names), *sorted(names)]))


def _data(
    root: Path,
    split: str,
    classes: tuple[str, ...],
    pairs: Sequence[tuple[str, Path, Path]],
    indices: NDArray[np.int16],
    listed: str,
    max_pixels: int,
) -> SegmentationData:
    if not pairs:
        raise UsageError(f"{root}: its split {split} has no images; name another split")
    for _, image, mask in pairs:
        for path, other in ((image, "image"), (mask, "mask")):
            if not path.is_file():
                raise UsageError(
                    f"{path}: is missing, the {other} of {(mask if other == 'image' else image).name}; add it, or "
                    "remove the name from the list"
                )
    entries = tuple(Entry(name, str(image), place) for place, (name, image, _) in enumerate(pairs))
    masks = tuple(mask for _, _, mask in pairs)
    return SegmentationData(root, split, classes, entries, masks, indices, listed, max_pixels)


def _class_list(root: Path) -> tuple[tuple[str, ...], str]:
    """The names of the classes, and the file that lists them."""
    path, info = root / "classes.txt", root / "objectInfo150.txt"
    if path.is_file():
        names = read_class_list(path)
    elif info.is_file():
        # Tab-separated: Idx, Ratio, Train, Val, Stuff, Name, after a line with these titles.
        path = info
        names = tuple(line.split("\t")[-1].strip() for line in read_text_lines(info)[1:])
        check_class_names(names, str(info))
    else:
        raise UsageError(f"{path}: is missing; list the names of the classes there, one per line, from index 0 on")
    if not 1 <= len(names) <= MAX_CLASSES:
        raise UsageError(f"{path}: names {len(names)} classes; a mask of bytes has 1 to {MAX_CLASSES}")
    return names, path.name


def _pairs(root: Path, masks: Path, split: str) -> list[tuple[str, Path, Path]]:
    """(name, image, mask) of a split in the order of its list, or by name."""
    images = root / "images"
    if lists := _lists(root):
        if split not in lists:
            raise UsageError(f"{root}: has no list {split}.txt; it has the splits {', '.join(lists)}")
        by_stem = {_stem(path, images): path for path in _files(images, IMAGE_SUFFIXES)}
        found = []
        for line in read_text_lines(lists[split]):
            if not (name := line.strip()):
                continue
            stem = name.rsplit(".", 1)[0] if name not in by_stem else name
            found.append((stem, by_stem.get(stem, images / name), masks / f"{stem}.png"))
        return found
    folders = _split_folders(images)
    if split not in (folders or {"train": images}):
        raise UsageError(f"{root}: has no split {split}; it has {', '.join(folders or ['train'])}")
    folder = folders.get(split, images)
    beside = masks / folder.relative_to(images)
    found = [
        (stem := _stem(path, folder), path, beside / f"{stem}.png") for path in sorted(_files(folder, IMAGE_SUFFIXES))
    ]
    stems = {stem for stem, _, _ in found}
    alone = next((mask for mask in sorted(_files(beside, {".png"})) if _stem(mask, beside) not in stems), None)
    if alone is not None:
        raise UsageError(f"{alone}: a mask without an image; add the image to {folder}, or remove the mask")
    return found


def _lists(root: Path) -> dict[str, Path]:
    """The lists of names by split: train.txt, val.txt, test.txt, or their synonyms."""
    found: dict[str, Path] = {}
    for word in (*SPLIT_SYNONYMS, *SPLITS):
        if (root / f"{word}.txt").is_file():
            found[SPLIT_SYNONYMS.get(word, word)] = root / f"{word}.txt"
    return found


def _split_folders(folder: Path) -> dict[str, Path]:
    """The folders of splits in a folder, by split; empty if it has none."""
    with name_unreadable(folder):
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = {SPLIT_SYNONYMS.get(name, name): folder / name for name in names}
    return {split: path for split, path in found.items() if split in SPLITS}


def _files(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    """All files with one of the suffixes below a folder, without hidden ones."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield Path(parent, name)


def _stem(path: Path, folder: Path) -> str:
    return os.path.splitext(path.relative_to(folder).as_posix())[0]


def _cityscapes(root: Path, split: str, max_pixels: int) -> SegmentationData:
    folders = _split_folders(root / "leftImg8bit")
    if split not in folders:
        raise UsageError(f"{root}: has no split {split}; it has {', '.join(folders) or 'none'}")
    images = sorted(path for path in _files(folders[split], {".png"}) if path.stem.endswith(LEFT))
    labels = root / "gtFine" / folders[split].name
    prepared = next(_with_end(labels, "_labelTrainIds.png"), None) is not None
    kind = "labelTrainIds" if prepared else "labelIds"
    pairs = []
    for path in images:
        name = _stem(path, folders[split]).removesuffix(LEFT)
        pairs.append((name, path, labels / f"{name}_gtFine_{kind}.png"))
    indices = np.full(256, UNKNOWN, dtype=np.int16)
    if prepared:
        indices[: len(CITYSCAPES)] = np.arange(len(CITYSCAPES))
    else:
        indices[:CITYSCAPES_LABEL_IDS] = IGNORE
        indices[list(CITYSCAPES.values())] = np.arange(len(CITYSCAPES))
    indices[IGNORE] = IGNORE
    return _data(root, split, tuple(CITYSCAPES), pairs, indices, "Cityscapes", max_pixels)


def _with_end(folder: Path, end: str) -> Iterator[Path]:
    return (path for path in _files(folder, {".png"}) if path.name.endswith(end))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DecodeError(f"{path}: cannot be read ({error.strerror or error})", "missing") from error


def _decode_mask(content: bytes, path: Path, max_pixels: int) -> NDArray[np.uint8]:
    """The indices of a mask, uint8 (H, W). Raises DecodeError for anything but a PNG of indices."""
    if not content.startswith(PNG_SIGNATURE) or len(content) < HEADER_BYTES:
        raise DecodeError(f"{path}: is not a PNG; save masks as PNGs, which keep every index", "not_image")
    depth, colour = content[DEPTH_BYTE], content[COLOUR_BYTE]
    # Pillow would stretch grey values of fewer bits to 0..255.
    if colour != PALETTE_TYPE and (colour, depth) != (GREY_TYPE, 8):
        kind = f"{depth}-bit grey" if colour == GREY_TYPE else "in colours"
        raise DecodeError(
            f"{path}: is not an index PNG but {kind}; save it as 8-bit grey, each pixel the number of its class",
            "not_image",
        )
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            check_pixels(image.height, image.width, max_pixels)
            return np.array(image)
    except PictureSizeError as error:
        raise DecodeError(f"{path}: {error}") from error
    except Exception as error:  # for a damaged file, Pillow lets through whatever struct, zlib or indexing raise
        fault = (str(error) or type(error).__name__).splitlines()[0]
        raise DecodeError(f"{path}: not a readable PNG ({fault})") from error


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """The images and masks of one split, for training loops of your own.

    Item i is (image, mask): uint8 (3, H, W), RGB, and int64 (H, W), the class of every pixel or 255 for none.

    Args:
        path: a folder; `segmentation_data.py` and docs/data-formats.md describe the layouts.
        split: such as train, val or test.
        transform: a function of image and mask as above to both, such as a `SegmentationAugment`.
        ignore_index: an index of the masks, beside 255, that is no class.
        reduce_zero_label: whether index 0 is no class either, so that 1 is the first one.

    Raises UsageError for a folder that cannot be used, and on access DecodeError for a file that cannot be read or a
    mask that does not fit. `check` reads all of them beforehand.
    """

    def __init__(
        self,
        path: Path | str,
        split: str,
        *,
        transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
        ignore_index: int = IGNORE,
        reduce_zero_label: bool = False,
    ) -> None:
        self.data = read_segmentation_data(path, split, ignore_index=ignore_index, reduce_zero_label=reduce_zero_label)
        self.transform = transform

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their numbers."""
        return self.data.classes

    @property
    def paths(self) -> list[Path]:
        """The image of every item."""
        return [entry.path for entry in self.data.entries]

    def check(self) -> None:
        """Raise DecodeError for the first mask that cannot be used: unreadable, of another size, or with an index of no
        class."""
        self.data.check()

    def __len__(self) -> int:
        return len(self.data.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        entry = self.data.entries[index]
        image, mask = read_image(entry.path, self.data.max_pixels), self.data.read_mask(entry.label).long()
        if image.shape[1:] != mask.shape:
            raise DecodeError(
                f"{self.data.masks[entry.label]}: is {mask.shape[1]} x {mask.shape[0]} pixels, but its image is "
                f"{image.shape[2]} x {image.shape[1]}; make them one size"
            )
        return (image, mask) if self.transform is None else self.transform(image, mask)
