"""Image files: decodes them to RGB as a viewer would show them, and finds them in folders of any size."""

from __future__ import annotations

import io
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from video_swinv2.data.collection import ImageCollection
from video_swinv2.data.decode import DecodeError
from video_swinv2.data.display import MAX_PIXELS, PictureSizeError, check_pixels
from video_swinv2.data.index import (
    UNSETTLED,
    AnyEntry,
    ChangeStamp,
    ContainerContents,
    FileIndex,
    TarMember,
    change_stamp,
    name_hashes,
    open_index,
)
from video_swinv2.data.media import IMAGE, IMAGE_SUFFIXES, VIDEO_SUFFIXES, media_type_of
from video_swinv2.data.trees import TopLevel, explore, list_folder, split_folders, suffix_of
from video_swinv2.errors import UsageError

# What Pillow may read. It knows forty more formats, some of which start another program (EPS) or are hardly tested.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values by which height and width change places


def is_image(entry: AnyEntry) -> bool:
    """Whether an entry is read as a still image: a member of a tar always is, a file if its content says so."""
    return isinstance(entry, TarMember) or media_type_of(entry.path) == IMAGE


def read_entry(entry: AnyEntry, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file or an image in a tar to uint8 (3, H, W), RGB. Raises DecodeError if that is impossible."""
    if isinstance(entry, TarMember):
        return read_tar_member(entry, max_pixels)
    return read_image(entry.path, max_pixels)


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image file to uint8 (3, H, W), RGB.

    Raises DecodeError if it is missing, truncated, not an image or has more than `max_pixels` pixels.
    """
    return _decode(path, str(path), max_pixels)


def shown_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image as `read_image` returns it, from its header. Raises DecodeError if that cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                turned = image.getexif().get(ORIENTATION) in TURNED
                return (image.width, image.height) if turned else (image.height, image.width)
    except UnidentifiedImageError as error:
        raise DecodeError(f"{path}: is not an image that is read ({', '.join(FORMATS)})", "not_image") from error
    except Exception as error:  # as in `_decode`
        fault = (str(error) or type(error).__name__).splitlines()[0]
        raise DecodeError(f"{path}: not a readable image ({fault})") from error


def read_tar_member(member: TarMember, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Decode an image in a tar, like `read_image`.

    Opens the tar for each image, which takes 20 us, so that workers need not keep a file handle per shard.
    """
    try:
        with member.path.open("rb") as file:
            file.seek(member.offset)
            return _decode(io.BytesIO(file.read(member.size)), f"{member.path}: {Path(member.name).name}", max_pixels)
    except OSError as error:
        raise DecodeError(f"{member.path}: cannot be read ({error.strerror or error})", "missing") from error


def _decode(file: Path | BinaryIO, name: str, max_pixels: int) -> Tensor:
    try:
        # Pillow warns about unusual EXIF data, palettes and sizes, which with millions of files would flood the log.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                check_pixels(image.height, image.width, max_pixels)  # nothing is decoded before
                return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    except FileNotFoundError as error:
        raise DecodeError(f"{name}: no such file", "missing") from error
    except UnidentifiedImageError as error:
        empty = not (file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END))
        what = "is empty (0 bytes)" if empty else f"is not an image that is read ({', '.join(FORMATS)})"
        raise DecodeError(f"{name}: {what}", "empty" if empty else "not_image") from error
    except PictureSizeError as error:
        raise DecodeError(f"{name}: {error}") from error
    except MemoryError as error:
        raise DecodeError(f"{name}: takes too much memory to decode") from error
    except Exception as error:  # for a damaged file, Pillow lets through whatever struct, zlib or indexing raise
        fault = (str(error) or type(error).__name__).splitlines()[0]
        raise DecodeError(f"{name}: not a readable image ({fault})") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    """Convert an image to RGB, uint8 (H, W, 3); an animation gives its first picture.

    Transparent pixels are composited on white, as on a web page: dropping the alpha channel would reveal colours that
    no viewer shows. Colour profiles are not applied. torchvision and timm do not apply them either, and released
    weights were trained and tested on pixels that were read that way.
    """
    ImageOps.exif_transpose(image, in_place=True)  # cameras store a rotation in EXIF instead of rotating the pixels
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        # 16-bit grey. Pillow's conversion to RGB would clip everything above 255 to white, so scale by
        # 65535 / 255 = 257 here; adding 128 before the division rounds to the nearest value.
        grey = (np.asarray(image).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise ValueError("its 32-bit samples have no agreed range; save it with 8 or 16 bits")
    # Alpha is a channel of its own, or (palette images, PNG and GIF) a transparent colour named in `info`.
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        shown = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def image_tree(root: Path) -> ImageCollection | None:
    """The images below a folder, with the splits and classes that the folder names give; None if there are no images.

    The layout is ROOT/CLASS/..., or ROOT/train|val|test/CLASS/... as for ImageNet, or images without class folders;
    `trees.py` tells splits from classes. Raises UsageError for a class folder without images, and for ambiguous
    contents: images beside videos or tars, or split folders beside other folders.
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
    # The split and class of each folder, from its path relative to the root: (), ("train",), ("train", "cat"), ...
    folders = [tuple(name.split("/")) if name else () for name in index.containers]
    split_of_top = split_folders(root, _top_level(folders, index), "images")
    splits: list[str] = []
    classes: list[str] = []
    for parts in folders:
        split = split_of_top.get(parts[0]) if parts else None
        splits.append(split or "train")
        # Whatever is beside split folders holds no images (see `split_folders`), and is no class folder.
        below = parts[1:] if split else () if split_of_top else parts
        classes.append(below[0] if below else "")
    _refuse_empty_class(root, list(zip(splits, classes, strict=True)), index)
    # Only folders that directly contain images define a class; their labels are then repeated for each of the images.
    names = tuple(sorted({name for name, count in zip(classes, index.counts, strict=True) if name and count}))
    position = {name: place for place, name in enumerate(names)}
    labels = np.array([position.get(name, -1) for name in classes], dtype=np.int32)  # (folders,)
    return ImageCollection(
        root,
        index,
        tuple(splits),
        names,
        torch.from_numpy(np.repeat(labels, index.counts)),
        labels_are_numbers=False,
    )


def _top_level(folders: Sequence[tuple[str, ...]], index: FileIndex) -> TopLevel:
    """What is directly below the root, of which `folders` are all folders, as the parts of their paths."""
    counts = index.counts.tolist()
    filled = {parts[0] for parts, count in zip(folders, counts, strict=True) if parts and count}
    direct = {parts[0] for parts, count in zip(folders, counts, strict=True) if len(parts) == 1 and count}
    empty = {parts[0] for parts in folders if parts} - filled
    return TopLevel(direct, filled - direct, sorted(empty), index.names[0] if counts[0] else "")


def _refuse_empty_class(root: Path, kinds: Sequence[tuple[str, str]], index: FileIndex) -> None:
    """Raise UsageError for a class folder without images: it is half unpacked, or the class has no samples.

    kinds: the split and the class of each folder, '' for a folder above the classes. A split with images that are in no
    class folder has no labels, so its folders are no classes.
    """
    filled = {kind for kind, count in zip(kinds, index.counts, strict=True) if count}
    for name, (split, label) in zip(index.containers, kinds, strict=True):
        if label and (split, label) not in filled and (split, "") not in filled:
            raise UsageError(f"{root / name}: a class folder without images; fill it or remove it")


def scan_folders(root: Path, previous: FileIndex | None) -> Iterator[ContainerContents | int]:
    """List `root` and all folders below it, each with its image files; hidden files and folders are skipped.

    For a folder that has not changed since `previous` was made, yields its number there instead of its contents, which
    costs no more than a few `stat`. `about` names a video or tar in the folder, or is ''. Raises UserError for a folder
    that cannot be read.
    """
    known = {} if previous is None else {name: place for place, name in enumerate(previous.containers)}
    stamps = [] if previous is None else [tuple(stamp) for stamp in previous.stamps.tolist()]
    # An unchanged folder still has the subfolders it had, because adding or removing one changes its stamp. The stamp
    # does not cover what is inside them, so each subfolder is visited all the same.
    known_subfolders: dict[str, list[str]] = defaultdict(list)
    for name in known:
        if name:
            known_subfolders[os.path.dirname(name)].append(os.path.basename(name))

    def look(folder: str) -> tuple[ContainerContents | int, Sequence[str]]:
        stamp, place = change_stamp(root / folder), known.get(folder)
        if place is not None and stamp == stamps[place] != UNSETTLED:
            return place, known_subfolders[folder]
        return _list_folder(root / folder, folder, stamp)

    return explore(root, look)


def _list_folder(path: Path, folder: str, stamp: ChangeStamp) -> tuple[ContainerContents, list[str]]:
    """The contents of one folder, whose path relative to the root is `folder`, and the names of its subfolders."""
    below, files = list_folder(path)
    images = [os.fsencode(name) for name in files if suffix_of(name) in IMAGE_SUFFIXES]
    images.sort()  # by bytes, which for names that are not UTF-8 is another order
    other = next((name for name in files if suffix_of(name) in VIDEO_SUFFIXES | {".tar"}), "")
    top = os.fsencode(folder) + b"/" if folder else b""
    hashes = name_hashes(top + name for name in images)
    names = b"".join(name + b"\0" for name in images)
    return ContainerContents(folder, stamp, names, {"hash": hashes}, other), below
