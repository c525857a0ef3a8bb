"""Manifests: the videos of a split with their labels, read from any of the usual layouts without opening a video."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from video_swinv2.data.groups import group_of, notes_on_shared_groups
from video_swinv2.data.lists import (
    ListedVideo,
    first_uses,
    groups_in,
    labels_in,
    read_listed_videos,
    root_folder,
    split_column,
    split_sources,
)
from video_swinv2.data.rows import Numeral
from video_swinv2.data.trees import check_split_name
from video_swinv2.errors import UsageError, nearest_name
from video_swinv2.files import check_class_names, read_class_list, sha256
from video_swinv2.records import Record, read_record

# Without a list of classes, ids give the number of classes. One below this is taken for an id in any case, a larger one
# only if lists have at least a tenth as many different ids: a date or a number of frames is none.
MAX_SPARSE_ID = 1000
IDS_PER_CLASS = 10


@dataclass(frozen=True, slots=True)
class Entry:
    """One video or image file.

    `name` is as listed and unique within its split, `location` is the absolute path, and `label` is an index into the
    classes, or -1 for none. Videos of the same `group` are not independent, such as clips cut from one recording; '' is
    unknown. The path is kept as text: a `Path` would be most of the memory and a third of the time of a long list.
    """

    name: str
    location: str
    label: int
    group: str = ""

    @property
    def path(self) -> Path:
        """The absolute path."""
        return Path(self.location)


@dataclass(frozen=True)
class Manifest:
    """One split of a data set.

    `fingerprint` identifies the split in results: it changes with the files, their order and their labels, and, for a
    prepared data set, with the bytes of the files (otherwise only with their sizes, and for images not with them).
    `failed_in_preparation` counts the videos of the split that could not be prepared and so are not in `entries`.
    `notes` are remarks for whoever trains or tests on the split.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    entries: Sequence[Entry]
    fingerprint: str
    failed_in_preparation: int = 0
    notes: tuple[str, ...] = ()


class SplitRecord(Record, extra="ignore"):
    """What dataset.json says about a split and is read back."""

    failed: int = Field(default=0, ge=0)
    fingerprint: str | None = None
    list_sha256: str | None = None


class DatasetRecord(Record, extra="ignore"):
    """What is read back of dataset.json, which `data_prep` writes."""

    classes: list[str]
    splits: dict[str, SplitRecord] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


def read_dataset_record(root: Path) -> DatasetRecord:
    """The dataset.json of a folder. Raises UserError, naming it and the key, if it cannot be used."""
    path = root / "dataset.json"
    record = read_record(path, DatasetRecord, "prepare the data set again")
    check_class_names(record.classes, str(path))
    for split in record.splits:
        check_split_name(split, str(path))
    return record


def is_prepared(source: Path) -> bool:
    """Whether `source` is a folder made by `prepare`, with the lists that it wrote: all of its clips have one form."""
    if not (source / "dataset.json").is_file():
        return False
    record = read_dataset_record(source)
    lists = {source / f"{split}.csv": content.list_sha256 for split, content in record.splits.items()}
    return record.settings.get("made_by") == "prepare" and all(
        path.is_file() and sha256(path) == recorded for path, recorded in lists.items()
    )


def class_list_hash(classes: Sequence[str]) -> str:
    """sha256 of the ordered class names, one per line."""
    return hashlib.sha256("\n".join(classes).encode()).hexdigest()


def find_splits(source: Path, annotations: Sequence[Path] = ()) -> tuple[str, ...]:
    """The splits that `read_manifest` can read from `source`, in the order train, val, test, others."""
    return tuple(split_sources(source, annotations))


def read_manifest(
    source: Path, split: str, classes: Sequence[str] | None = None, *, annotations: Sequence[Path] = ()
) -> Manifest:
    """Read one split of a data set. `source` may have any of these layouts:

    - a prepared folder (with dataset.json);
    - a folder with lists train, val and test as .txt or .csv, at its top or in its folder `annotations`;
    - a list file: lines `path label`, or a CSV with the header `path,label[,split][,group]` or Kinetics'
      `label,youtube_id,time_start,time_end,split` (rows.py has all forms);
    - class folders, inside split folders or without them (then everything is train);
    - a flat folder of videos (unlabelled).

    Args:
        annotations: lists, CSVs or folders of them, whose paths are relative to the folder `source`.
        classes: the class names to index, in order, such as those of a model. Labels are mapped to them by name, and
            ids index them if the source has no list of classes of its own.

    Raises UsageError, naming the file and line, for anything that cannot be understood.
    """
    if classes is not None:
        check_class_names(classes, "the class list asked for")
    sources = split_sources(source, annotations)
    source = Path(source).absolute()
    # A single list without a column `split` serves as whichever split is asked for.
    single = source.is_file() and not split_column(source)
    if split not in sources and not single:
        asked = ", ".join(map(str, annotations)) or source
        raise UsageError(f"{asked}: no split {split!r}; available: {', '.join(sources) or 'none'}")
    root = root_folder(source)
    chosen = next(iter(sources.values())) if single else sources[split]
    rows = [row for path in chosen for row in read_listed_videos(root, path, split)]
    if not rows:
        raise UsageError(f"{chosen[0]}: no videos for split {split!r}")

    def labels() -> Mapping[str, str]:
        # Of all splits: if one split lacked a class, train and val would number the classes differently.
        paths = dict.fromkeys(path for found in sources.values() for path in found)
        return first_uses(use for path in paths for use in labels_in(root, path).items())

    own = classes_of_source(root, annotations, labels, classes)
    wanted = tuple(classes) if classes is not None else own
    used: dict[str | int, str] = first_uses((row.label, row.where) for row in rows)
    indices = label_indices(used, own, wanted)
    # -1, for no label, selects the None at the end.
    names = (*wanted, None)
    entries = tuple(
        Entry(row.name, row.path, label, group_of(row.name, names[label], row.group))
        for row in rows
        for label in (indices[row.label],)
    )
    _refuse_duplicates(rows)
    # For a prepared split, take the fingerprint over the bytes of the files, which was computed during preparation.
    recorded = _recorded_split(root, split) if chosen == [root / f"{split}.csv"] else SplitRecord()
    fingerprint = recorded.fingerprint or _fingerprint(entries, wanted)
    notes = (
        notes_on_classes(wanted, {wanted[entry.label] for entry in entries if entry.label >= 0}, split)
        if classes is None
        else ()
    )
    return Manifest(root, split, wanted, entries, fingerprint, recorded.failed, notes)


def content_fingerprint(rows: Sequence[tuple[str, str, str]]) -> str:
    """The fingerprint of a prepared split: sha256 over (name, class name, sha256 of the file), in order."""
    return hashlib.sha256("\n".join("\t".join(row) for row in rows).encode()).hexdigest()


def classes_of_source(
    root: Path,
    annotations: Sequence[Path],
    labels: Callable[[], Mapping[str, str]],
    wanted: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """The source's own class names, in order.

    They come from dataset.json or classes.txt. Without these they are `wanted` or, without it, what the labels are: the
    sorted names, or "0", "1", ... up to the largest id.

    Args:
        labels: gives every label of the source, with the file and line of its first use. It is called only if nothing
            else says what the classes are, since long lists take seconds to read.

    Raises UsageError, naming the line, for a number among names and for a number too large to be an id.
    """
    if not annotations and (root / "dataset.json").is_file():
        return tuple(read_dataset_record(root).classes)
    # The file next to the data comes first, then one next to the annotations.
    for folder in (root, *(path if path.is_dir() else path.parent for path in annotations)):
        if (folder / "classes.txt").is_file():
            return read_class_list(folder / "classes.txt")
    if wanted is not None:
        return tuple(wanted)
    found = labels()
    names = tuple(sorted(label for label in found if not isinstance(label, Numeral)))
    ids = {label.class_id(where): where for label, where in found.items() if isinstance(label, Numeral)}
    ids.pop(-1, None)
    if not ids:
        check_class_names(names, str(root))
        return names
    largest = max(ids)
    if names:
        raise UsageError(
            f"{ids[largest]}: label {largest} is a number, but other labels are names, such as {names[0]!r}; list the "
            "classes in a classes.txt beside the data, one per line"
        )
    return numbered_classes(largest, len(ids), ids[largest])


def numbered_classes(largest: int, count: int, where: str) -> tuple[str, ...]:
    """The names "0", "1", ... of classes that are known by `count` different ids only, up to the `largest`.

    Raises UsageError, beginning with `where`, if that is too large to be an id.
    """
    if largest >= max(MAX_SPARSE_ID, IDS_PER_CLASS * count):
        raise UsageError(
            f"{where}: label {largest} is too large for the id of a class, with {count} different ids in all; ids "
            "count the classes from 0: correct it, or list the classes in a classes.txt beside the data"
        )
    return tuple(map(str, range(1 + largest)))


def label_indices(
    labels: Mapping[str | int, str], own: Sequence[str], wanted: Sequence[str]
) -> dict[str | int | None, int]:
    """The index of each label among the wanted classes; -1 for the label None, which every result has.

    Args:
        labels: class names, Numerals and positions in `own`, each with the file and line of its first use.
        own: the source's own classes.
        wanted: the classes to index.

    Raises UsageError, naming the line, for a label that is not among the classes.
    """
    names, index = set(own), {name: position for position, name in enumerate(wanted)}
    indices: dict[str | int | None, int] = {None: -1}
    for label, where in labels.items():
        name = label
        # A class may be called "7". Only a number that is no name is an id.
        if isinstance(label, int) or (isinstance(label, Numeral) and label not in names):
            number = label if isinstance(label, int) else label.class_id(where)
            if number == -1:
                indices[label] = -1
                continue
            if not 0 <= number < len(own):
                raise UsageError(
                    f"{where}: label {label} is out of range for {len(own)} classes, whose ids count from 0; "
                    "correct it or add the class"
                )
            name = own[number]
        if name not in index:
            nearest = nearest_name(str(name), index)
            # Without a similar name it is less likely a typing error than a data set of other classes.
            fix = (
                f"the nearest is {nearest!r}; rename or add it"
                if nearest
                else "add it, or use data of these classes" + (f" (such as {next(iter(index))!r})" if index else "")
            )
            raise UsageError(f"{where}: label {name!r} is not one of the {len(index)} classes; {fix}")
        indices[label] = index[str(name)]
    return indices


def notes_on_classes(classes: Sequence[str], present: Set[str], split: str) -> tuple[str, ...]:
    """Remarks on the classes of which a training split has no video, given those that are `present` in it."""
    missing = [name for name in classes if name not in present]
    # Without any label, the split is for self-supervised training.
    if not missing or not present:
        return ()
    shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
    notes = [f"split {split} has no video of {len(missing)} of {len(classes)} classes: {shown}"]
    if tuple(classes) == tuple(map(str, range(len(classes)))) and missing[0] == "0":
        notes.append("ids of classes count from 0, and class 0 has no video; if yours count from 1, subtract 1")
    return tuple(notes)


def notes_on_leaks(source: Path, manifest: Manifest, train: str = "train") -> tuple[str, ...]:
    """Remarks on the groups that train shares with the split of a manifest, or with every other split if it is train.

    `source` is what the manifest was read from.
    """
    groups = {manifest.split: {entry.group for entry in manifest.entries}}
    # A single list without splits serves as every split, and so shares all of its groups with itself.
    if not any(groups[manifest.split]) or (source.is_file() and not split_column(source)):
        return ()
    root = root_folder(Path(source).absolute())
    for split, paths in split_sources(source).items():
        if split not in groups and train in (split, manifest.split):
            groups[split] = set().union(*(groups_in(root, path, split) for path in paths))
    return tuple(notes_on_shared_groups(train, groups))


def _refuse_duplicates(rows: Sequence[ListedVideo]) -> None:
    first: dict[str, str] = {}
    for row in rows:
        # By the whole path, since one line may name it from the root of the file system and another from the folder.
        path = os.path.normpath(row.path)
        if path in first:
            raise UsageError(f"{row.where}: {row.name!r} is listed twice (first in {first[path]}); remove one")
        first[path] = row.where


def _recorded_split(root: Path, split: str) -> SplitRecord:
    """The record of a split in dataset.json; empty without one, or if the list of the split was edited afterwards."""
    path = root / f"{split}.csv"
    if not (root / "dataset.json").is_file() or not path.is_file():
        return SplitRecord()
    record = read_dataset_record(root).splits.get(split, SplitRecord())
    return record if record.list_sha256 == sha256(path) else SplitRecord()


def _fingerprint(entries: Sequence[Entry], classes: Sequence[str]) -> str:
    """sha256 over (name, class name, size in bytes) of the files in order; a file that does not exist has size -1."""
    digest = hashlib.sha256()
    for entry in entries:
        size = _size(entry.location)
        label = classes[entry.label] if entry.label >= 0 else ""
        # Names that are not valid UTF-8 contain surrogates, which the default "strict" would refuse to encode.
        digest.update(f"{entry.name}\t{label}\t{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _size(path: str) -> int:
    """The bytes of a file; -1 if there is none. One question to the file system, which may be a slow one."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1
