"""Images in tar shards of the WebDataset layout, reached at random: members KEY.jpg, KEY.cls or KEY.json, in a row.

The `webdataset` library reads shards as streams; here a sample is a function of its address, so the place of every
image is listed once (`index.py`) and read by offset. What belongs together is decided by the library's own
`group_by_keys`, and which numbers a pattern `{000..146}` means by the `braceexpand` it uses.
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

from video_swinv2.data.collection import Collection
from video_swinv2.data.images import IMAGE_SUFFIXES
from video_swinv2.data.index import UNSETTLED, Index, Listing, Stamp, name_hashes, open_index, stamp_of
from video_swinv2.data.lists import SPLIT_WORDS, SPLITS
from video_swinv2.errors import UsageError, UserError

BLOCK = 512
SKIPPED = re.compile(r"__[^/]*__($|/)")  # the library's own notes inside a tar
Place = tuple[int, int]


def shard_files(source: str) -> list[Path]:
    """The tars of a pattern with braces, of one path, or of a folder and those below it; none if it has none.

    Raises UsageError for what cannot be read at random, and UserError for a tar of a pattern that is not there.
    """
    if "://" in source or source.startswith("pipe:"):
        raise UsageError(f"{source}: shards are read from the disk, at random; copy them to one first")
    if Path(source).is_dir():
        return sorted(path for path in Path(source).rglob("*.tar") if not path.name.startswith("."))
    if "{" not in source and not source.endswith((".tar", ".tar.gz", ".tgz")):
        return []
    from braceexpand import braceexpand  # comes with webdataset

    paths = [Path(path) for path in braceexpand(source)]
    packed = next((path for path in paths if path.suffix != ".tar"), None)
    if packed:
        raise UsageError(f"{packed}: shards are read at random, so only plain .tar will do; unpack it (gunzip)")
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{missing[0]}: no such shard, one of {len(missing)} of {len(paths)} missing (data.source)")
    return paths


def shard_collection(source: str) -> Collection | None:
    """The images of a source of tar shards; None if it is no such source.

    A tar is of the split that its name or folder tells (`imagenet1k-validation-00.tar`), else of train. Labels are
    those of KEY.cls, or of `label` in KEY.json: numbers or names. What is wrong with a shard is said, and what it holds
    before that is used.
    """
    tars = [path.absolute() for path in shard_files(source)]
    if not tars:
        return None
    root = Path(os.path.commonpath([path.parent for path in tars]))
    names = [path.relative_to(root).as_posix() for path in tars]
    index = open_index("shards", root, "\n".join(names), partial(_scan, root, names))
    splits, words = [], dict[str, int]()
    labels = index.columns["label"].astype(np.int32)
    for place, name in enumerate(names):
        parts = (SPLIT_WORDS.get(word, word) for word in re.findall(r"[a-z]+", name.lower()))
        splits.append(next((word for word in parts if word in SPLITS), "train"))
        about: dict[str, Any] = json.loads(index.about[place])
        if about["fault"] and os.environ.get("RANK", "0") == "0":
            print(f"broken: {root / name}: {about['fault']}", file=sys.stderr, flush=True)
        # The numbers of a tar count its own labels; -1, for none, takes the last of the table.
        table = np.array([*(words.setdefault(word, len(words)) for word in about["labels"]), -1], dtype=np.int32)
        first, last = index.starts[place : place + 2].tolist()
        labels[first:last] = table[labels[first:last]]
    order = sorted(words)
    rank = np.array([*(order.index(word) for word in words), -1], dtype=np.int32)
    return Collection(root, index, tuple(splits), tuple(order), torch.from_numpy(rank[labels]), numbered=True)


def _scan(root: Path, names: list[str], previous: Index | None) -> Iterator[Listing | int]:
    known = {} if previous is None else {name: place for place, name in enumerate(previous.containers)}
    for name in names:
        stamp, place = stamp_of(root / name), known.get(name)
        if previous is not None and place is not None and stamp == tuple(previous.stamps[place].tolist()) != UNSETTLED:
            yield place
        else:
            yield _list_tar(root / name, name, stamp)


def _list_tar(path: Path, name: str, stamp: Stamp) -> Listing:
    """The images of one tar: name, offset, size, number of the label among the tar's own."""
    from webdataset.tariterators import group_by_keys  # not at the top: the library brings torch's distributed part

    images: list[tuple[bytes, int, int, int]] = []
    words: dict[str, int] = {}
    with path.open("rb") as file:
        members, fault = _members(file)
        stream = ({"fname": member, "data": place, "__url__": name} for member, place in members)
        try:
            groups = list(group_by_keys(stream))
        except ValueError as error:
            raise UserError(f"{path}: {error.args[0]}; pack it again with a key for each sample") from error
        if fault:
            groups = groups[:-1]  # of the last a part may be lost
        for group in groups:
            suffix = next((key for key in group if f".{key.rpartition('.')[2]}" in IMAGE_SUFFIXES), None)
            if suffix is not None:
                word = _label(file, group, path)
                label = -1 if word is None else words.setdefault(word, len(words))
                images.append((os.fsencode(f"{group['__key__']}.{suffix}"), *group[suffix], label))
    if fault:
        fault = f"{fault}; the {len(images)} images before are used"
    numbers = np.array([image[1:] for image in images], dtype=np.int64).reshape(-1, 3)
    top = os.fsencode(name) + b"/"
    columns = {"hash": name_hashes(top + image[0] for image in images)}
    columns |= {key: numbers[:, column] for column, key in enumerate(("offset", "size", "label"))}
    about = json.dumps({"fault": fault, "labels": list(words)})
    return Listing(name, stamp, b"".join(image[0] + b"\0" for image in images), columns, about)


def _members(file: BinaryIO) -> tuple[list[tuple[str, Place]], str]:
    """Name, offset and size of the files in a tar; and what is wrong with it, '' if nothing: the last may be cut then.

    `tarfile` ends without a word at a damaged header; so what it ended at has to be the block of zeros that ends a tar.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    found: list[tuple[str, Place]] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory; typeshed hides it
                if member.isreg() and not member.issparse() and not SKIPPED.match(member.name):
                    found.append((member.name, (member.offset_data, member.size)))
            end = tar.offset
        file.seek(end)
        fault = "" if file.read(BLOCK) == bytes(BLOCK) else f"is cut off or damaged at byte {end} of {size}"
    except tarfile.TarError as error:
        fault = f"is cut off or no plain tar ({error})"
    return found, fault


def _label(file: BinaryIO, group: dict[str, Any], path: Path) -> str | None:
    """What the members of a sample say of its class; None if nothing."""
    for suffix in ("cls", "json"):
        if suffix not in group:
            continue
        offset, size = group[suffix]
        file.seek(offset)
        text = file.read(size)
        try:
            label = json.loads(text).get("label") if suffix == "json" else text.decode().strip()
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: {group['__key__']}.{suffix} holds no label ({error}); pack it again") from error
        if label is not None and label != "":
            return str(label)
    return None
