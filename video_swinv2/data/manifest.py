"""Which videos a split holds and what they show, from any of the layouts people keep; no video is opened here."""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_swinv2.errors import UsageError

SPLITS = ("train", "val", "test")
VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"}
    | {".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
# The path is everything before the last separator, so it may itself hold spaces and commas.
LIST_LINE = re.compile(r"^(?P<path>.+?)[\s,]+(?P<label>-?\d+)$")
SPLIT_WORDS = {"validate": "val", "validation": "val", "training": "train", "testing": "test"}


@dataclass(frozen=True)
class Entry:
    """One video: `name` as listed (unique in its split), absolute `path`, `label` an index into the classes or -1."""

    name: str
    path: Path
    label: int


@dataclass(frozen=True)
class Manifest:
    """One split of a data set; the `fingerprint` changes when its videos, their order, labels or bytes do.

    `lost` is how many videos of the split failed in preparation and so are not among the entries.
    """

    root: Path
    split: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    fingerprint: str
    lost: int = 0


@dataclass(frozen=True)
class _Row:
    """A line as read: the label is a class name, an index into unnamed classes, or None; `where` is for messages."""

    name: str
    path: Path
    label: str | int | None
    where: str


def class_list_hash(classes: Sequence[str]) -> str:
    """sha256 of the ordered class names, one a line."""
    return hashlib.sha256("\n".join(classes).encode()).hexdigest()


def find_splits(source: Path, annotations: Path | None = None) -> tuple[str, ...]:
    """The splits that `read_manifest` can read from `source`, in the order train, val, test."""
    return tuple(_split_sources(_existing(source), annotations))


def read_manifest(
    source: Path, split: str, classes: Sequence[str] | None = None, *, annotations: Path | None = None
) -> Manifest:
    """One split of a data set, in whichever of these layouts `source` is.

    A prepared folder (dataset.json); a folder with train/val/test lists as .txt or .csv; a list file (`path
    label_index`, or a CSV with a header `path,label` or Kinetics' `label,youtube_id,time_start,time_end,split`); class
    folders, with or without split folders on top (without, all is train); a flat folder of videos (unlabelled).
    `annotations` is a list or CSV whose paths are relative to the folder `source`. `classes` is the order wanted, a
    model's for instance: labels are mapped by name. Raises UsageError naming file and line.
    """
    source = _existing(source)
    if classes is not None:
        _refuse_repeated(classes, "the class list asked for")
    sources = _split_sources(source, annotations)
    single = source.is_file() and not (source.suffix == ".csv" and _split_column(source))
    if split not in sources and not single:
        raise UsageError(f"{annotations or source}: no split {split!r}, there is {', '.join(sources) or 'none'}")
    root = source.parent if source.is_file() else source
    chosen = next(iter(sources.values())) if single else sources[split]
    rows = _rows(root, chosen, split)
    if not rows:
        raise UsageError(f"{chosen}: no videos for split {split!r}")
    own = _own_classes(root, sources, annotations, classes)
    wanted = tuple(classes) if classes is not None else own
    index = {name: place for place, name in enumerate(wanted)}
    entries = tuple(Entry(row.name, row.path, _label(row, own, index)) for row in rows)
    _refuse_twice(rows)
    recorded = _recorded_split(root, split) if annotations is None else {}
    fingerprint = recorded.get("fingerprint") or _fingerprint(entries, wanted)
    return Manifest(root, split, wanted, entries, fingerprint, int(recorded.get("failed", 0)))


def read_class_list(path: Path) -> tuple[str, ...]:
    """The class names of a text file, one a line, in order."""
    names = tuple(line.strip() for line in _lines(path) if line.strip())
    _refuse_repeated(names, str(path))
    return names


def content_fingerprint(rows: Sequence[tuple[str, str, str]]) -> str:
    """sha256 over the ordered (name, class name, sha256 of the file) of a prepared split."""
    return hashlib.sha256("\n".join("\t".join(row) for row in rows).encode()).hexdigest()


def _existing(source: Path) -> Path:
    source = Path(source).absolute()
    if not source.exists():
        raise UsageError(f"{source}: no such data set; give a folder, a list file or a CSV")
    return source


def _split_sources(source: Path, annotations: Path | None) -> dict[str, Path]:
    """Where each split is written down: a list file, or a folder to walk."""
    if annotations is not None:
        return _splits_of_file(_existing(annotations))
    if source.is_file():
        return _splits_of_file(source)
    found = {
        split: source / f"{split}{suffix}"
        for split in SPLITS
        for suffix in (".csv", ".txt")  # the later one wins where there are both
        if (source / f"{split}{suffix}").is_file()
    }
    if found or (source / "dataset.json").is_file():
        return found
    folders = {split: source / split for split in SPLITS if (source / split).is_dir()}
    return folders or {"train": source}


def _splits_of_file(path: Path) -> dict[str, Path]:
    in_column = _split_column(path)
    if in_column:
        return {split: path for split in (*SPLITS, *sorted(in_column - set(SPLITS))) if split in in_column}
    return {path.stem if path.stem in SPLITS else "train": path}


def _split_column(path: Path) -> set[str]:
    if not _is_table(path):
        return set()
    return {SPLIT_WORDS.get(word, word) for _, record in _table(path) if (word := record.get("split", "").strip())}


def _rows(root: Path, source: Path, split: str) -> list[_Row]:
    if source.is_dir():
        return list(_walk(root, source))
    if not _is_table(source):
        return list(_list_rows(root, source))
    if "path" in _header(source):
        return list(_path_rows(root, source, split))
    return list(_kinetics_rows(root, source, split))


def _own_classes(
    root: Path, sources: dict[str, Path], annotations: Path | None, wanted: Sequence[str] | None
) -> tuple[str, ...]:
    """The source's own ordered class names: recorded ones, else the sorted names over all its splits, else numbers."""
    if annotations is None and (root / "dataset.json").is_file():
        return tuple(_recorded(root)["classes"])
    for folder in (root, annotations.parent if annotations else root):
        if (folder / "classes.txt").is_file():
            return read_class_list(folder / "classes.txt")
    # Over every split, or train and val would number their classes differently.
    labels = {label for source in dict.fromkeys(sources.values()) for label in _labels(root, source)}
    names = {label for label in labels if isinstance(label, str)}
    if names:
        return tuple(sorted(names))
    if wanted is not None:
        return tuple(wanted)
    return tuple(str(number) for number in range(1 + max((n for n in labels if isinstance(n, int)), default=-1)))


def _labels(root: Path, source: Path) -> set[str | int]:
    if source.is_dir():
        folders = [path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")]
        return {path.name for path in folders if next(_videos_below(path), None) is not None}
    if _is_table(source):
        return {label for _, record in _table(source) if (label := record.get("label", ""))}
    return {row.label for row in _list_rows(root, source) if row.label is not None}


def _label(row: _Row, own: tuple[str, ...], index: dict[str, int]) -> int:
    if row.label is None or row.label == -1:
        return -1
    name = row.label
    if isinstance(name, int):
        if not 0 <= name < len(own):
            raise UsageError(f"{row.where}: label {name}, but there are {len(own)} classes (0 to {len(own) - 1})")
        name = own[name]
    if name not in index:
        nearest = difflib.get_close_matches(name, index, n=1, cutoff=0.0)
        hint = f"the nearest is {nearest[0]!r}; " if nearest else ""
        raise UsageError(f"{row.where}: label {name!r} is not one of the {len(index)} classes; {hint}rename or add it")
    return index[name]


def _refuse_twice(rows: Sequence[_Row]) -> None:
    first: dict[str, str] = {}
    for row in rows:
        if row.name in first:
            raise UsageError(f"{row.where}: {row.name!r} is listed twice (first in {first[row.name]}); remove one")
        first[row.name] = row.where


def _refuse_repeated(names: Sequence[str], where: str) -> None:
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UsageError(f"{where}: class {repeated[0]!r} is there twice; every class needs its own name")


def _walk(root: Path, folder: Path) -> Iterator[_Row]:
    """Class folders of videos, or a flat folder of unlabelled ones; hidden files and folders are passed over."""
    shown = sorted(_videos_below(folder))
    loose = [path for path in shown if path.parent == folder]
    if loose and len(loose) < len(shown):
        raise UsageError(f"{loose[0]}: a video beside class folders; move it into one, or give a list of the videos")
    for path in shown:
        label = None if loose else path.relative_to(folder).parts[0]
        yield _Row(path.relative_to(root).as_posix(), path, label, str(path))


def _videos_below(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES:
                yield Path(parent, name)


def _list_rows(root: Path, path: Path) -> Iterator[_Row]:
    for number, line in enumerate(_lines(path), start=1):
        text = line.strip()
        if text:
            match = LIST_LINE.match(text)
            name = match["path"] if match else text
            yield _Row(name, root / name, int(match["label"]) if match else None, f"{path}, line {number}")


def _path_rows(root: Path, path: Path, split: str) -> Iterator[_Row]:
    for number, record in _table(path):
        if _in_split(record, split):
            name = record["path"]
            yield _Row(name, root / name, record.get("label") or None, f"{path}, line {number}")


def _kinetics_rows(root: Path, path: Path, split: str) -> Iterator[_Row]:
    """Clips named ID_START_END, wherever below `root` they lie; an absent one keeps the name it should have."""
    at = {found.stem: found for found in sorted(_videos_below(root))}
    for number, record in _table(path):
        if not _in_split(record, split):
            continue
        where = f"{path}, line {number}"
        try:
            start, end = (int(float(record[key])) for key in ("time_start", "time_end"))
        except (KeyError, ValueError) as fault:
            raise UsageError(f"{where}: time_start and time_end must be seconds ({fault})") from fault
        stem = f"{record['youtube_id']}_{start:06d}_{end:06d}"
        found = at.get(stem, root / f"{stem}.mp4")
        yield _Row(found.relative_to(root).as_posix(), found, record.get("label") or None, where)


def _in_split(record: dict[str, str], split: str) -> bool:
    word = record.get("split", "").strip()
    return not word or SPLIT_WORDS.get(word, word) == split


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({fault})") from fault


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({fault})") from fault


def _is_table(path: Path) -> bool:
    """True for a CSV with a header; SlowFast and VideoMAE name their bare lists .csv too, so the name does not tell."""
    header = set(_header(path))
    return "path" in header or {"youtube_id", "time_start", "time_end"} <= header


def _table(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="")
        try:
            for record in reader:
                if None in record:
                    raise UsageError(f"{path}, line {reader.line_num}: too many fields; quote names that hold commas")
                yield reader.line_num, record
        except (UnicodeDecodeError, csv.Error) as fault:
            raise UsageError(f"{path}, line {reader.line_num + 1}: not UTF-8 CSV ({fault})") from fault


def _recorded(root: Path) -> dict[str, Any]:
    path = root / "dataset.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UsageError(f"{path}: not readable as JSON ({fault}); prepare the data set again") from fault
    if not isinstance(record, dict) or not isinstance(record.get("classes"), list):
        raise UsageError(f"{path}: no list 'classes'; prepare the data set again")
    return record


def _recorded_split(root: Path, split: str) -> dict[str, Any]:
    """What dataset.json says of a prepared split; empty if its list was edited since, or if there is no record."""
    path = root / f"{split}.csv"
    if not (root / "dataset.json").is_file() or not path.is_file():
        return {}
    record: dict[str, Any] = _recorded(root).get("splits", {}).get(split, {})
    edited = record.get("list_sha256") != hashlib.sha256(path.read_bytes()).hexdigest()
    return {} if edited else record


def _fingerprint(entries: Sequence[Entry], classes: Sequence[str]) -> str:
    """sha256 over the ordered (name, class name, file size); -1 is the size of a file that is not there."""
    digest = hashlib.sha256()
    for entry in entries:
        size = entry.path.stat().st_size if entry.path.is_file() else -1
        label = classes[entry.label] if entry.label >= 0 else ""
        digest.update(f"{entry.name}\t{label}\t{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
