"""Readers of video lists: text files and CSVs in the usual layouts, and folders of videos with or without classes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from video_swinv2.data.groups import group_of
from video_swinv2.data.rows import KINETICS_COLUMNS, parse_label, read_header, read_rows
from video_swinv2.data.trees import (
    SPLIT_SYNONYMS,
    SPLITS,
    check_split_name,
    split_folders_of_videos,
    videos_below,
    walk_videos,
)
from video_swinv2.errors import UsageError

Label = TypeVar("Label")


class ListedVideo(NamedTuple):
    """One video of a list or folder.

    `name` is as listed, without detours such as `./`; `path` is absolute. `label` is as `parse_label` returns it.
    `where` names the file and line, for messages. `group` is the one that the list gives the video; '' for none.
    """

    name: str
    path: str
    label: str | None
    where: str
    group: str = ""


class KineticsLine(NamedTuple):
    """A line of a Kinetics list: a YouTube video from `start` to `end`, in seconds; `label` is '' if it has none.

    `group` is the YouTube id, unless the list has a column `group`.
    """

    youtube_id: str
    start: float
    end: float
    label: str
    where: str
    group: str

    @property
    def stem(self) -> str:
        """The conventional name of its file without suffix: the id and both times in seconds, with six digits."""
        return f"{self.youtube_id}_{int(self.start):06d}_{int(self.end):06d}"


def root_folder(source: Path) -> Path:
    """The folder that the paths of a source are relative to."""
    return source.parent if source.is_file() else source


def split_sources(source: Path, annotations: Sequence[Path] = ()) -> dict[str, list[Path]]:
    """The list files or the folder that define each split, in the order train, val, test, others.

    Raises UsageError if `source` or one of `annotations` does not exist or holds no lists.
    """
    source = _existing(source)
    # (split, list or folder) pairs; several lists may belong to the same split.
    found: list[tuple[str, Path]] = []
    if annotations:
        for path in map(_existing, annotations):
            found += _splits_of_file(path) if path.is_file() else _lists_in(path)
        if not found:
            raise UsageError(f"{annotations[0]}: holds no list train, val or test; name a list or a CSV")
    elif source.is_file():
        found = _splits_of_file(source)
    else:
        # Lists take precedence over folders. A prepared data set (dataset.json) without lists has no splits: its
        # folders must not be walked in their place.
        found = _lists_in(source) or _lists_in(source / "annotations")
        if not found and not (source / "dataset.json").is_file():
            folders = split_folders_of_videos(source)
            found = [(split, source / name) for name, split in folders.items()] or [("train", source)]
    # A dict without values serves as an ordered set: the usual splits first, then any others by name.
    order = dict.fromkeys((*SPLITS, *sorted(split for split, _ in found)))
    return {split: paths for split in order if (paths := [path for word, path in found if word == split])}


def _existing(source: Path) -> Path:
    source = Path(source).absolute()
    if not source.exists():
        raise UsageError(f"{source}: no such data set; give a folder, a list file or a CSV")
    return source


def _lists_in(folder: Path) -> list[tuple[str, Path]]:
    """The lists of a folder. A .txt is preferred to a .csv, since of Kinetics-600's official lists it is complete."""
    found: dict[str, Path] = {}
    # Later files replace earlier ones of the same split: .txt replaces .csv, and train.csv replaces training.csv.
    for word in (*SPLIT_SYNONYMS, *SPLITS):
        for suffix in (".csv", ".txt"):
            path = folder / f"{word}{suffix}"
            if path.is_file():
                found[SPLIT_SYNONYMS.get(word, word)] = path
    return [item for path in found.values() for item in _splits_of_file(path)]


def _splits_of_file(path: Path) -> list[tuple[str, Path]]:
    """The splits of one list: the values of its column `split`, or the split in its file name, or train."""
    words = re.findall(r"[a-z]+", path.stem.lower())
    named = next((split for word in words if (split := SPLIT_SYNONYMS.get(word, word)) in SPLITS), "train")
    return [(split, path) for split in sorted(split_column(path))] or [(named, path)]


def split_column(path: Path) -> set[str]:
    """The values of the column `split`, if there is one.

    Raises UsageError if only some lines have a value, and naming the line for one that is no name of a split.
    """
    header = read_header(path)
    if header is None or "split" not in header.places:
        return set()  # without reading the rest of a list that may be long
    words = first_uses((word, f"{path}, line {number}") for number, (word,) in read_rows(path, "split"))
    for word, where in words.items():
        if word:
            check_split_name(word, where)
    if "" in words and len(words) > 1:
        raise UsageError(f"{path}: some lines have a split and some do not; fill in the column or remove it")
    return {SPLIT_SYNONYMS.get(word, word) for word in words if word}


def read_listed_videos(root: Path, source: Path, split: str) -> Iterator[ListedVideo]:
    """The lines of one list that belong to `split`, or the videos of a folder.

    Raises UsageError, naming the line, for one that cannot be understood.
    """
    if source.is_dir():
        return _walk(root, source)
    if is_kinetics_list(source):
        return _kinetics_rows(root, source, split)
    return _path_rows(root, source, split)


def labels_in(root: Path, source: Path) -> dict[str, str]:
    """All labels of a list, whatever their split, or of the videos of a folder, each with where it is used first."""
    if source.is_dir():
        found = ((row.label, row.where) for row in _walk(root, source))
    else:
        lines = ((label, f"{source}, line {number}") for number, (label,) in read_rows(source, "label"))
        found = ((parse_label(label), where) for label, where in lines)
    return first_uses(found)


def groups_in(root: Path, source: Path, split: str) -> set[str]:
    """The groups of the lines of one list that belong to `split`, or of the videos of a folder."""
    if source.is_file() and is_kinetics_list(source):
        return {clip.group for clip in read_kinetics_lines(source, split)}  # without searching for the files
    return {group_of(row.name, row.label, row.group) for row in read_listed_videos(root, source, split)} - {""}


def first_uses(labels: Iterable[tuple[Label | None, str]]) -> dict[Label, str]:
    """Each label other than None with where it is used first, which messages name. labels: (label, where) in order."""
    first: dict[Label, str] = {}
    for label, where in labels:
        if label is not None:
            first.setdefault(label, where)
    return first


def _walk(root: Path, folder: Path) -> Iterator[ListedVideo]:
    """The videos of a folder: labelled with the top folder they are in, or all unlabelled in a flat folder."""
    shown, empty = walk_videos(folder)
    # Videos directly in the folder. A mixture of these and class folders has no clear meaning, so it is refused.
    loose = [name for name in shown if "/" not in name]
    if loose and len(loose) < len(shown):
        raise UsageError(f"{folder / loose[0]}: a video beside class folders; move it into one, or use a list")
    if shown and empty and not loose:
        raise UsageError(f"{folder / empty[0]}: a class folder without videos; fill it or remove it")
    top = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    for name in shown:
        path = os.path.join(folder, name)
        label = None if loose else name.partition("/")[0].strip()
        yield ListedVideo(top + name, path, label, path)


def _path_rows(root: Path, path: Path, split: str) -> Iterator[ListedVideo]:
    for number, (listed, label, word, group) in read_rows(path, "path", "label", "split", "group"):
        if not _in_split(word, split):
            continue
        where = f"{path}, line {number}"
        if not listed:
            raise UsageError(f"{where}: has no path; add it or remove the line")
        # `a.mp4` and `./a.mp4` are one video, which must not have two labels.
        name = os.path.normpath(listed)
        yield ListedVideo(name, os.path.join(root, name), parse_label(label), where, group)


def _kinetics_rows(root: Path, path: Path, split: str) -> Iterator[ListedVideo]:
    """The lines of a Kinetics list with their files, which are called ID_START_END and may be anywhere below `root`.

    For a file that does not exist, gives the name that it should have, so that it is reported as missing.
    """
    # Depending on the downloader, a file is STEM.mp4, SPLIT/STEM.mp4, CLASS/STEM.mkv and so on: find it by its stem.
    files = videos_by_stem(videos_below(root))
    for clip in read_kinetics_lines(path, split):
        name = choose_copy(files.get(clip.stem, [f"{clip.stem}.mp4"]), split)
        yield ListedVideo(name, os.path.join(root, name), parse_label(clip.label), clip.where, clip.group)


def is_kinetics_list(path: Path) -> bool:
    """Whether a list has the columns of Kinetics (YouTube id, start and end), whatever its suffix."""
    header = read_header(path)
    return header is not None and header.places.keys() >= KINETICS_COLUMNS


def read_kinetics_lines(path: Path, split: str) -> Iterator[KineticsLine]:
    """The lines of a Kinetics list that belong to `split`. Raises UsageError, naming the line, for invalid times."""
    for number, (youtube_id, first, last, label, word, group) in read_rows(
        path, "youtube_id", "time_start", "time_end", "label", "split", "group"
    ):
        if not _in_split(word, split):
            continue
        where = f"{path}, line {number}"
        try:
            start, end = float(first), float(last)
        except ValueError as fault:
            raise UsageError(f"{where}: time_start and time_end must be seconds ({fault})") from fault
        if not (0 <= start < end < float("inf") and youtube_id):
            raise UsageError(f"{where}: needs a youtube_id and 0 <= time_start < time_end, in seconds")
        yield KineticsLine(youtube_id, start, end, label, where, group or youtube_id)


def videos_by_stem(videos: Sequence[str]) -> dict[str, list[str]]:
    """The videos grouped by their file name without folder and suffix."""
    found: dict[str, list[str]] = {}
    for name in videos:
        found.setdefault(name[name.rfind("/") + 1 : name.rfind(".")], []).append(name)
    return found


def choose_copy(names: Sequence[str], folder: str) -> str:
    """Choose among copies of a video: the one in a folder named `folder` (its split or class), or else the first."""
    if len(names) == 1:
        return names[0]
    return next((name for name in names if f"/{folder}/" in f"/{name}"), names[0])


def _in_split(word: str, split: str) -> bool:
    """Whether a line whose column `split` is `word` belongs to `split`; lines without a value belong to every split."""
    return word in ("", split) or SPLIT_SYNONYMS.get(word, word) == split
