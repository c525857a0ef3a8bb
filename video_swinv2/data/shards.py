"""Images in tar shards of the WebDataset layout, read at random: members KEY.jpg and KEY.cls or KEY.json, side by side.

The `webdataset` library reads shards as streams, and its companion for random access, `wids`, needs an index made by
its own tool beforehand and is not in the wheel of 1.0. Here a sample is a function of its address, so the
offset of every image is listed once (`index.py`) and read directly. Which members belong together is decided by the
library's own `group_by_keys`, and which shards a pattern `{000..146}` stands for by `braceexpand`, which it uses too.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from video_swinv2.data.collection import ImageCollection
from video_swinv2.data.images import IMAGE_SUFFIXES
from video_swinv2.data.index import (
    UNSETTLED,
    ChangeStamp,
    ContainerContents,
    FileIndex,
    change_stamp,
    name_hashes,
    open_index,
)
from video_swinv2.data.lists import SPLIT_SYNONYMS, SPLITS
from video_swinv2.errors import UsageError, UserError

TAR_BLOCK_BYTES = 512
WEBDATASET_METADATA = re.compile(r"__[^/]*__($|/)")  # the library's own notes inside a tar, which it skips too
ByteRange = tuple[int, int]
"""(offset, size)."""


def shard_files(source: str) -> list[Path]:
    """The tars that a pattern with braces or a single path stands for, or those in and below a folder; may be none.

    Raises UsageError for what cannot be read at random, and UserError if a tar of a pattern does not exist.
    """
    if "://" in source or source.startswith("pipe:"):
        raise UsageError(f"{source}: shards are read at random, from a disk; copy them to one first")
    if Path(source).is_dir():
        return sorted(path for path in Path(source).rglob("*.tar") if not path.name.startswith("."))
    if "{" not in source and not source.endswith((".tar", ".tar.gz", ".tgz")):
        return []
    from braceexpand import braceexpand  # installed with webdataset

    paths = [Path(path) for path in braceexpand(source)]
    packed = next((path for path in paths if path.suffix != ".tar"), None)
    if packed:
        raise UsageError(f"{packed}: shards are read at random, so only plain .tar is supported; unpack it (gunzip)")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such shard, one of {len(missing)} of {len(paths)} missing (data.source)")
    return paths


def shard_collection(source: str) -> ImageCollection | None:
    """The images in a source of tar shards; None if it is no such source.

    A tar belongs to the split in its file or folder name (`imagenet1k-validation-00.tar`), else to train. Labels are
    those of KEY.cls, or of `label` in KEY.json: numbers or names. A damaged shard is reported, and the images before
    the damage are used.
    """
    tars = [path.absolute() for path in shard_files(source)]
    if not tars:
        return None
    root = Path(os.path.commonpath([path.parent for path in tars]))
    names = [path.relative_to(root).as_posix() for path in tars]
    index = open_index("shards", root, "\n".join(names), partial(_scan_tars, root, names))
    splits, numbers = [], dict[str, int]()
    labels = index.columns["label"].astype(np.int32)
    for place, name in enumerate(names):
        words = (SPLIT_SYNONYMS.get(word, word) for word in re.findall(r"[a-z]+", name.lower()))
        splits.append(next((word for word in words if word in SPLITS), "train"))
        about: dict[str, Any] = json.loads(index.about[place])
        if about["fault"] and os.environ.get("RANK", "0") == "0":
            print(f"broken: {root / name}: {about['fault']}", file=sys.stderr, flush=True)
        # The index numbers the labels of each tar by themselves: renumber them through all tars. -1, for none, picks
        # the last element of the table, which is -1 too.
        table = np.array([*(numbers.setdefault(word, len(numbers)) for word in about["labels"]), -1], dtype=np.int32)
        first, last = index.starts[place : place + 2].tolist()
        labels[first:last] = table[labels[first:last]]
    label_names = sorted(numbers)
    rank = np.array([*(label_names.index(word) for word in numbers), -1], dtype=np.int32)  # found order -> sorted order
    found = torch.from_numpy(rank[labels])
    return ImageCollection(root, index, tuple(splits), tuple(label_names), found, labels_are_numbers=True)


def _scan_tars(root: Path, names: list[str], previous: FileIndex | None) -> Iterator[ContainerContents | int]:
    """The contents of every tar; of one that has not changed, its number in the previous index."""
    known = {} if previous is None else {name: place for place, name in enumerate(previous.containers)}
    for name in names:
        stamp, place = change_stamp(root / name), known.get(name)
        if previous is not None and place is not None and stamp == tuple(previous.stamps[place].tolist()) != UNSETTLED:
            yield place
        else:
            yield _list_tar(root / name, name, stamp)


def _list_tar(path: Path, name: str, stamp: ChangeStamp) -> ContainerContents:
    """The images of one tar: name, offset, size, and the number of the label among the tar's own."""
    from webdataset.tariterators import group_by_keys  # not at the top: it imports torch's distributed package

    images: list[tuple[bytes, int, int, int]] = []
    numbers: dict[str, int] = {}
    with path.open("rb") as file:
        members, fault = _tar_members(file)
        stream = ({"fname": member, "data": byte_range, "__url__": name} for member, byte_range in members)
        try:
            samples = list(group_by_keys(stream))
        except ValueError as error:
            raise UserError(f"{path}: {error.args[0]}; pack it again with a key for each sample") from error
        if fault:
            samples = samples[:-1]  # members of the last sample may be lost
        for sample in samples:
            suffix = next((key for key in sample if f".{key.rpartition('.')[2]}" in IMAGE_SUFFIXES), None)
            if suffix is not None:
                label = _read_label(file, sample, path)
                number = -1 if label is None else numbers.setdefault(label, len(numbers))
                images.append((os.fsencode(f"{sample['__key__']}.{suffix}"), *sample[suffix], number))
    if fault:
        fault = f"{fault}; the {len(images)} images before are used"
    table = np.array([image[1:] for image in images], dtype=np.int64).reshape(-1, 3)
    top = os.fsencode(name) + b"/"
    columns = {"hash": name_hashes(top + image[0] for image in images)}
    columns |= {key: table[:, column] for column, key in enumerate(("offset", "size", "label"))}
    about = json.dumps({"fault": fault, "labels": list(numbers)})
    return ContainerContents(name, stamp, b"".join(image[0] + b"\0" for image in images), columns, about)


def _tar_members(file: BinaryIO) -> tuple[list[tuple[str, ByteRange]], str]:
    """Name, offset and size of the regular files in a tar; and its fault, '' if it has none.

    With a fault, the last member may be incomplete. `tarfile` stops silently at a damaged header, so what it stopped at
    is checked to be the block of zeros that ends a tar.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found: list[tuple[str, ByteRange]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory; not in typeshed
                if member.isreg() and not member.issparse() and not WEBDATASET_METADATA.match(member.name):
                    found.append((member.name, (member.offset_data, member.size)))
            end = tar.offset
        file.seek(end)
        ended = file.read(TAR_BLOCK_BYTES) == bytes(TAR_BLOCK_BYTES)
        fault = "" if ended else f"is truncated or damaged at byte {end} of {size}"
    except tarfile.TarError as error:
        fault = f"is truncated or not a plain tar ({error})"
    return found, fault


def _read_label(file: BinaryIO, sample: dict[str, Any], path: Path) -> str | None:
    """The label in the members of a sample; None if there is none."""
    for suffix in ("cls", "json"):
        if suffix not in sample:
            continue
        offset, size = sample[suffix]
        file.seek(offset)
        text = file.read(size)
        try:
            label = json.loads(text).get("label") if suffix == "json" else text.decode().strip()
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: {sample['__key__']}.{suffix} holds no label ({error}); pack it again") from error
        if label is not None and label != "":
            return str(label)
    return None
