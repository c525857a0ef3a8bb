"""Image files: decoded as they should be shown, whatever their format, and found in folders of any size."""

from __future__ import annotations

import io
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from video_swinv2.data.collection import ImageCollection
from video_swinv2.data.decode import DecodeError
from video_swinv2.data.index import (
    UNSETTLED,
    ChangeStamp,
    ContainerContents,
    FileIndex,
    TarMember,
    change_stamp,
    name_hashes,
    open_index,
)
from video_swinv2.data.lists import SPLIT_SYNONYMS, SPLITS, VIDEO_SUFFIXES
from video_swinv2.errors import UsageError, UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def is_image_file(path: Path) -> bool:
    """Whether the name of a file is that of an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def read_image(path: Path) -> Tensor:
    """An image file as it should be shown, uint8 (3, H, W) RGB; DecodeError if it is missing, truncated or no image."""
    return _decode(path, str(path))


def read_tar_member(member: TarMember) -> Tensor:
    """An image in a tar, as `read_image`.

    The tar is opened each time, which takes 20 us, so that a worker keeps no handles.
    """
    try:
        with member.path.open("rb") as file:
            file.seek(member.offset)
            return _decode(io.BytesIO(file.read(member.size)), f"{member.path}: {Path(member.name).name}")
    except OSError as error:
        raise DecodeError(f"{member.path}: cannot be read ({error.strerror or error})", "missing") from error


def _decode(file: Path | BinaryIO, name: str) -> Tensor:
    try:
        # Pillow warns of odd EXIF data, odd palettes and large pictures: a flood with millions of files.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1)
    except FileNotFoundError as error:
        raise DecodeError(f"{name}: no such file", "missing") from error
    except UnidentifiedImageError as error:
        empty = not (file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END))
        what = "is empty (0 bytes)" if empty else "is not an image in a format that Pillow reads"
        raise DecodeError(f"{name}: {what}", "empty" if empty else "not_image") from error
    except Exception as error:  # a damaged file makes Pillow's readers raise whatever struct, zlib or indexing raise
        fault = (str(error) or type(error).__name__).splitlines()[0]
        raise DecodeError(f"{name}: not a readable image ({fault})") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3); of an animation, the first picture.

    Transparent pixels are composited on white, as a page shows them: dropping alpha would reveal colours that nobody
    sees. Colour profiles are not applied, as in torchvision and timm, with whose numbers released weights were trained
    and tested.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion clips everything above 255 to white; 65535 / 255 = 257.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("its 32-bit samples have no agreed range; save it with 8 or 16 bits")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def image_tree(root: Path) -> ImageCollection | None:
    """The images below a folder, in splits and classes; None if there is none.

    The layout is ROOT/CLASS/..., or ROOT/train|val|test/CLASS/... as ImageNet is kept, or images without class folders.
    Raises UsageError where the meaning is unclear: images beside videos or tars, or splits beside other folders.
    """
    index = open_index("images", root, "", partial(scan_folders, root))
    if not len(index):
        return None
    for folder, other in zip(index.containers, index.about, strict=True):
        if other:
            raise UsageError(
                f"{root}: holds images and other data ({os.path.join(folder, other)}): both images and videos or tars; "
                "move one kind elsewhere, or add a train.txt"
            )
    folders = [tuple(name.split("/")) if name else () for name in index.containers]
    has_splits = _top_folders_are_splits(root, folders, index)
    splits: list[str] = []
    classes: list[str] = []
    for parts in folders:
        top = SPLIT_SYNONYMS.get(parts[0], parts[0]) if has_splits and parts else ""
        splits.append(top if top in SPLITS else "train")
        below = parts[1:] if top in SPLITS else parts
        classes.append(below[0] if below else "")
    names = tuple(sorted({name for name, count in zip(classes, index.counts, strict=True) if name and count}))
    position = {name: place for place, name in enumerate(names)}
    labels = np.array([position.get(name, -1) for name in classes], dtype=np.int32)  # of each folder
    tree = ImageCollection(
        root,
        index,
        tuple(splits),
        names,
        torch.from_numpy(np.repeat(labels, index.counts)),
        labels_are_numbers=False,
        empty_class_folder=_empty_class_folder(list(zip(splits, classes, strict=True)), index),
    )
    if has_splits and (bare := set(splits) - tree.splits_with_images - {"train"}):
        raise UsageError(f"{root}: its {min(bare)} folder holds no images; fill it or remove it")
    return tree


def _top_folders_are_splits(root: Path, folders: list[tuple[str, ...]], index: FileIndex) -> bool:
    """Whether the folders just below the root are splits, not classes; UsageError if some are and some are not."""
    tops = {parts[0] if parts else "" for parts, count in zip(folders, index.counts, strict=True) if count}
    found = {SPLIT_SYNONYMS.get(top, top) for top in tops}
    # A class may well be called "train"; a root with nothing but splits, or with a val, has splits.
    has_splits = "val" in found or found <= set(SPLITS)
    beside = sorted(top for top in tops if SPLIT_SYNONYMS.get(top, top) not in SPLITS)
    if has_splits and "train" in found and beside:
        raise UsageError(f"{root / beside[0]}: images beside the splits, in none of them; move it into one")
    return has_splits


def _empty_class_folder(kinds: list[tuple[str, str]], index: FileIndex) -> str:
    """A folder whose (split, class) has no image in any folder of that kind; '' if there is none."""
    filled = {kind for kind, count in zip(kinds, index.counts, strict=True) if count}
    bare = (name for name, kind in zip(index.containers, kinds, strict=True) if kind[1] and kind not in filled)
    return next(bare, "")


def scan_folders(root: Path, previous: FileIndex | None) -> Iterator[ContainerContents | int]:
    """Every folder below `root`, itself first, with its image files; hidden ones are skipped.

    A folder that has not changed since `previous` is given as its number there and is not listed: one `stat` per
    folder. `about` names a video or tar that lies in the folder too. Raises UserError for a folder that cannot be read.
    """
    known = {} if previous is None else {name: place for place, name in enumerate(previous.containers)}
    stamps = [] if previous is None else [tuple(stamp) for stamp in previous.stamps.tolist()]
    # The folders in a folder that has not changed are those it had: its own stamp covers them, but not their contents.
    known_subfolders: dict[str, list[str]] = defaultdict(list)
    for name in known:
        if name:
            known_subfolders[os.path.dirname(name)].append(name)
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        path = root / folder
        state = path.stat()
        identity = (state.st_dev, state.st_ino)
        if identity in above:  # a link to a folder that it lies in: all of it is listed already
            continue
        stamp, place = change_stamp(path), known.get(folder)
        if place is not None and stamp == stamps[place] != UNSETTLED:
            below = known_subfolders[folder]
            yield place
        else:
            contents, below = _list_folder(path, folder, stamp)
            yield contents
        # The last one pushed is visited first, so this walks depth first in the order of the names.
        waiting += [(name, above | {identity}) for name in sorted(below, reverse=True)]


def _list_folder(path: Path, folder: str, stamp: ChangeStamp) -> tuple[ContainerContents, list[str]]:
    """The contents of one folder, and the folders in it."""
    images, below, other = [], [], ""
    top = f"{folder}/" if folder else ""
    try:
        with os.scandir(path) as items:
            for item in items:
                if item.name.startswith("."):
                    continue
                suffix = os.path.splitext(item.name)[1].lower()
                if item.is_dir():
                    below.append(top + item.name)
                elif suffix in IMAGE_SUFFIXES:
                    images.append(os.fsencode(item.name))
                elif suffix in VIDEO_SUFFIXES or suffix == ".tar":
                    other = item.name if not other else min(other, item.name)
    except OSError as fault:
        raise UserError(f"{path}: cannot be read ({fault.strerror}); fix its permissions first") from fault
    images.sort()
    hashes = name_hashes(os.fsencode(top) + name for name in images)
    names = b"".join(name + b"\0" for name in images)
    return ContainerContents(folder, stamp, names, {"hash": hashes}, other), below
