"""Random access to images in tar shards of the WebDataset layout: members KEY.jpg and KEY.cls or KEY.json.

Here a sample is a function of its address, so the offset of every image in its tar is listed once (`index.py`), and the
image is then read directly. The `webdataset` library cannot do that: it reads shards as streams, and its companion for
random access, `wids`, needs an index that its own tool has to make first, and is not in the wheel of 1.0. Parts of the
library are used nevertheless: its `group_by_keys` decides which members form a sample, and `braceexpand`, on which it
depends, expands patterns such as `{000..146}`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from video_swinv2.data.collection import ImageCollection
from video_swinv2.data.index import (
    UNSETTLED,
    ChangeStamp,
    ContainerContents,
    FileIndex,
    change_stamp,
    name_hashes,
    open_index,
)
from video_swinv2.data.media import IMAGE_SUFFIXES
from video_swinv2.data.tars import BoundedTarInfo
from video_swinv2.data.trees import SPLITS, UNCLEAR, files_below, find_split
from video_swinv2.distributed.launchers import is_rank_zero
from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.records import Record, parse_json, parse_record

TAR_BLOCK_BYTES = 512  # headers and data of a tar are padded to multiples of this, and a block of zeros ends it
WEBDATASET_METADATA = re.compile(r"__[^/]*__($|/)")  # members for the library's own use, which it skips too
MAX_LABEL_BYTES = 1 << 20  # of KEY.cls and KEY.json, which may hold much more than the label
ByteRange = tuple[int, int]
"""(offset, size)."""


class Labelled(Record, extra="ignore"):
    """What is read of KEY.json."""

    label: str | int | None = None


def shard_files(source: str) -> list[Path]:
    """The tars that a pattern with braces expands to, a single tar, or all tars below a folder; may be empty.

    Raises UsageError for sources without random access, and UserError if a tar of the pattern does not exist.
    """
    if "://" in source or source.startswith("pipe:"):
        raise UsageError(f"{source}: shards are read at random, from a disk; copy them to one first")
    if Path(source).is_dir():
        return [Path(source) / name for name in files_below(Path(source)) if name.endswith(".tar")]
    if "{" not in source and not source.endswith((".tar", ".tar.gz", ".tgz")):
        return []
    from braceexpand import braceexpand  # installed with webdataset

    paths = [Path(path) for path in braceexpand(source)]
    packed = next((path for path in paths if path.suffix != ".tar"), None)
    if packed:
        raise UsageError(f"{packed}: shards are read at random, so only plain .tar is supported; unpack it (gunzip)")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such shard; {len(missing)} of the {len(paths)} in data.source are missing")
    return paths


def shard_collection(source: str) -> ImageCollection | None:
    """The images in a source of tar shards; None if the source has no tars.

    A tar belongs to the split in its file or folder name (`imagenet1k-validation-00.tar`), or else to train. Labels are
    numbers or names, from KEY.cls or from `label` in KEY.json. A damaged shard is reported, and the images before the
    damage are used.
    """
    tars = [path.absolute() for path in shard_files(source)]
    if not tars:
        return None
    root = Path(os.path.commonpath([path.parent for path in tars]))
    names = [path.relative_to(root).as_posix() for path in tars]
    index = open_index("shards", root, "\n".join(names), partial(_scan_tars, root, names))
    # `numbers`: label -> number, in the order in which labels are first met in the shards.
    numbers: dict[str, int] = {}
    labels = index.columns["label"].astype(np.int32)
    for place, name in enumerate(names):
        about: dict[str, Any] = json.loads(index.about[place])
        if about["fault"] and is_rank_zero():
            print(for_terminal(f"broken: {root / name}: {about['fault']}"), file=sys.stderr, flush=True)
        # In the index, each tar numbers its labels from 0 on its own, so that a changed tar can be listed alone.
        # Renumber them across all tars. The label -1 (none) picks the last element of the table, which is -1 as well.
        table = np.array([*(numbers.setdefault(word, len(numbers)) for word in about["labels"]), -1], dtype=np.int32)
        first, last = index.starts[place : place + 2].tolist()
        labels[first:last] = table[labels[first:last]]
    # Numbers in sorted order do not depend on which tar holds which label.
    label_names = sorted(numbers)
    rank = np.array([*(label_names.index(word) for word in numbers), -1], dtype=np.int32)  # found order -> sorted order
    found = torch.from_numpy(rank[labels])
    return ImageCollection(
        root, index, _splits_of_tars(root, names), tuple(label_names), found, labels_are_numbers=True
    )


def _splits_of_tars(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    """The split of each tar: that in its name or, without one, in the nearest folder above it; or else train.

    Raises UsageError for a name such as `eval-00.tar` beside tars of a split.
    """

    def find(name: str) -> str:
        parts = reversed(name.removesuffix(".tar").split("/"))
        return next((found.split for part in parts if (found := find_split(part))), "")

    splits = [find(name) for name in names]
    for name, split in zip(names, splits, strict=True):
        if split == UNCLEAR and not {*splits}.isdisjoint(SPLITS):
            raise UsageError(f"{root / name}: its name does not say whether it is of train, val or test; rename it")
    return tuple(split if split in SPLITS else "train" for split in splits)


def _scan_tars(root: Path, names: list[str], previous: FileIndex | None) -> Iterator[ContainerContents | int]:
    """The contents of every tar, or the number in the previous index of a tar that has not changed since."""
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
        # `group_by_keys` expects members with their data. It is given (offset, size) in its place, so no image is read.
        stream = ({"fname": member, "data": byte_range, "__url__": name} for member, byte_range in members)
        try:
            samples = list(group_by_keys(stream))
        except ValueError as error:
            raise UserError(f"{path}: {error.args[0]}; pack it again with a key for each sample") from error
        if fault:
            samples = samples[:-1]  # the last sample may be incomplete
        for sample in samples:
            # A sample maps suffixes to byte ranges. A suffix may itself contain dots, as in KEY.left.jpg.
            suffix = next((key for key in sample if f".{key.rpartition('.')[2]}" in IMAGE_SUFFIXES), None)
            if suffix is not None:
                label = _read_label(file, sample, path)
                number = -1 if label is None else numbers.setdefault(label, len(numbers))
                images.append((os.fsencode(f"{sample['__key__']}.{suffix}"), *sample[suffix], number))
    if fault:
        fault = f"{fault}; the {len(images)} images before are used"
    table = np.array([image[1:] for image in images], dtype=np.int64).reshape(-1, 3)  # (images, 3), also for none
    top = os.fsencode(name) + b"/"
    columns = {"hash": name_hashes(top + image[0] for image in images)}
    columns |= {key: table[:, column] for column, key in enumerate(("offset", "size", "label"))}
    about = json.dumps({"fault": fault, "labels": list(numbers)}, allow_nan=False)
    return ContainerContents(name, stamp, b"".join(image[0] + b"\0" for image in images), columns, about)


def _tar_members(file: BinaryIO) -> tuple[list[tuple[str, ByteRange]], str]:
    """The (name, (offset, size)) of the regular files in a tar, and what is wrong with the tar, '' if nothing is.

    If something is, the last member may be incomplete. `tarfile` stops silently at a damaged header, so the block at
    which it stopped is checked to be the block of zeros that ends a tar.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found: list[tuple[str, ByteRange]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=BoundedTarInfo) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory; not in typeshed
                if member.isreg() and not WEBDATASET_METADATA.match(member.name):
                    found.append((member.name, (member.offset_data, member.size)))
            end = tar.offset
        file.seek(end)
        ended = file.read(TAR_BLOCK_BYTES) == bytes(TAR_BLOCK_BYTES)
        fault = "" if ended else f"is truncated or damaged at byte {end} of {size}"
    except tarfile.TarError as error:
        fault = f"is truncated or not a plain tar ({error})"
    return found, fault


def _read_label(file: BinaryIO, sample: dict[str, Any], path: Path) -> str | None:
    """The label in KEY.cls or, without that, in KEY.json; None if a sample has neither. Reads these members only."""
    for suffix in ("cls", "json"):
        if suffix not in sample:
            continue
        offset, size = sample[suffix]
        where = f"{path}: {sample['__key__']}.{suffix} holds no label"
        if size > MAX_LABEL_BYTES:
            raise UserError(f"{where}: has {size:,} bytes, more than {MAX_LABEL_BYTES:,}; pack it again")
        file.seek(offset)
        text = file.read(size)
        label = _text(text, where) if suffix == "cls" else parse_record(parse_json(text, where), Labelled, where).label
        if label is not None and label != "":
            return str(label)
    return None


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode().strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: is not UTF-8; pack it again") from error
