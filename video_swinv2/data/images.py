"""Image files: read as shown, whatever their kind, and found in folders of any size."""

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

from video_swinv2.data.collection import Collection
from video_swinv2.data.decode import DecodeError
from video_swinv2.data.index import UNSETTLED, Index, Listing, Member, Stamp, name_hashes, open_index, stamp_of
from video_swinv2.data.lists import SPLIT_WORDS, SPLITS, VIDEO_SUFFIXES
from video_swinv2.errors import UsageError, UserError

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})


def read_image(path: Path) -> Tensor:
    """An image file as shown, (3, H, W) uint8 RGB; DecodeError if it is missing, cut off or no image."""
    return _decode(path, str(path))


def read_member(member: Member) -> Tensor:
    """An image in a tar, as `read_image`. The tar is opened each time: 20 us, and a worker holds no handles."""
    try:
        with member.path.open("rb") as file:
            file.seek(member.offset)
            return _decode(io.BytesIO(file.read(member.size)), f"{member.path}: {Path(member.name).name}")
    except OSError as error:
        raise DecodeError(f"{member.path}: cannot be read ({error.strerror or error})", "missing") from error


def _decode(file: Path | BinaryIO, name: str) -> Tensor:
    try:
        # Pillow warns of odd EXIF, odd palettes and large pictures: a flood where there are millions of files.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                return torch.from_numpy(_rgb(image)).permute(2, 0, 1)
    except FileNotFoundError as error:
        raise DecodeError(f"{name}: no such file", "missing") from error
    except UnidentifiedImageError as error:
        empty = not (file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END))
        what = "is empty (0 bytes)" if empty else "is not an image of a kind that Pillow reads"
        raise DecodeError(f"{name}: {what}", "empty" if empty else "not_image") from error
    except Exception as error:  # a damaged file makes Pillow's readers raise whatever struct, zlib or indexing raise
        fault = (str(error) or type(error).__name__).splitlines()[0]
        raise DecodeError(f"{name}: not a readable image ({fault})") from error


def _rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8. Of an animation the first picture; colour profiles are not applied.

    What is transparent lies on white, as a page shows it: dropping alpha would bring out colours that nobody sees.
    Profiles are left alone as in torchvision and timm, whose numbers released weights are made of and tested with.
    """
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # Pillow's own conversion cuts everything above 255 to white; 65535 / 255 = 257.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("its 32-bit samples have no agreed range; save it with 8 or 16 bits")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def walk(root: Path, previous: Index | None) -> Iterator[Listing | int]:
    """Every folder below `root`, itself first, with its image files; hidden ones are passed over.

    `about` names a video or tar that lies in the folder too. Raises UserError for a folder that may not be read.
    """
    known = {} if previous is None else {name: place for place, name in enumerate(previous.containers)}
    stamps = [] if previous is None else [tuple(stamp) for stamp in previous.stamps.tolist()]
    inside: dict[str, list[str]] = defaultdict(list)
    for name in known:
        if name:
            inside[os.path.dirname(name)].append(name)
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        folder, above = waiting.pop()
        path = root / folder
        state = path.stat()
        if (state.st_dev, state.st_ino) in above:  # a link to a folder that it lies in: all in it is listed already
            continue
        stamp, place = stamp_of(path), known.get(folder)
        if place is not None and stamp == stamps[place] != UNSETTLED:
            below = inside[folder]
            yield place
        else:
            listing, below = _list_folder(path, folder, stamp)
            yield listing
        above |= {(state.st_dev, state.st_ino)}
        waiting += [(name, above) for name in sorted(below, reverse=True)]


def _list_folder(path: Path, folder: str, stamp: Stamp) -> tuple[Listing, list[str]]:
    """What one folder holds, and the folders in it."""
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
        raise UserError(f"{path}: cannot be read ({fault.strerror}); mend that first") from fault
    images.sort()
    hashes = name_hashes(os.fsencode(top) + name for name in images)
    return Listing(folder, stamp, b"".join(name + b"\0" for name in images), {"hash": hashes}, other), below


def image_tree(root: Path) -> Collection | None:
    """The images below a folder, in splits and classes; None if there is none.

    ROOT/CLASS/..., ROOT/train|val|test/CLASS/... as ImageNet is kept, or images without class folders. UsageError for
    folders in which images lie beside videos or tars, or splits beside other folders: what is meant cannot be known.
    """
    index = open_index("images", root, "", partial(walk, root))
    if not len(index):
        return None
    for folder, other in zip(index.containers, index.about, strict=True):
        if other:
            raise UsageError(
                f"{root}: holds images and other data ({os.path.join(folder, other)}): both images and videos or tars; "
                "move one kind away, or add a train.txt"
            )
    folders = [tuple(name.split("/")) if name else () for name in index.containers]
    tops = {parts[0] if parts else "" for parts, count in zip(folders, index.counts, strict=True) if count}
    words = {SPLIT_WORDS.get(top, top) for top in tops}
    # A class may well be called "train"; a folder with nothing but splits, or with a val, has splits.
    divided = "val" in words or words <= set(SPLITS)
    beside = sorted(top for top in tops if SPLIT_WORDS.get(top, top) not in SPLITS)
    if divided and "train" in words and beside:
        raise UsageError(f"{root / beside[0]}: images beside the splits, in none of them; move it into one")
    splits: list[str] = []
    classes: list[str] = []
    for parts in folders:
        word = SPLIT_WORDS.get(parts[0], parts[0]) if divided and parts else ""
        splits.append(word if word in SPLITS else "train")
        rest = parts[1:] if word in SPLITS else parts
        classes.append(rest[0] if rest else "")
    names = tuple(sorted({name for name, count in zip(classes, index.counts, strict=True) if name and count}))
    number = {name: place for place, name in enumerate(names)}
    labels = np.array([number.get(name, -1) for name in classes], dtype=np.int32)
    tree = Collection(
        root,
        index,
        tuple(splits),
        names,
        torch.from_numpy(np.repeat(labels, index.counts)),
        numbered=False,
        empty=_empty(list(zip(splits, classes, strict=True)), index),
    )
    if divided and (bare := set(splits) - tree.filled - {"train"}):
        raise UsageError(f"{root}: its {min(bare)} folder holds no images; fill it or remove it")
    return tree


def _empty(kinds: list[tuple[str, str]], index: Index) -> str:
    """A folder whose split and class have no image, itself and all below it taken together; '' if there is none."""
    filled = {kind for kind, count in zip(kinds, index.counts, strict=True) if count}
    bare = (name for name, kind in zip(index.containers, kinds, strict=True) if kind[1] and kind not in filled)
    return next(bare, "")
