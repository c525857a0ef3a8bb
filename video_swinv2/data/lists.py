"""Lists of videos in the layouts people keep, and walks over folders: which video is in which split, and where."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from video_swinv2.errors import UsageError
from video_swinv2.files import read_text_lines

SPLITS = ("train", "val", "test")
VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"}
    | {".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
PREPARED_MARKERS = frozenset({"dataset.json", "prep.sqlite", ".prep.lock"})
# The path is everything before the last separator, so it may itself hold spaces and commas.
LIST_LINE = re.compile(r"^(?P<path>.+?)[\s,]+(?P<label>-?\d+)$")
SPLIT_SYNONYMS = {"validate": "val", "validation": "val", "training": "train", "testing": "test"}


class ListedVideo(NamedTuple):
    """A line of a list, or a file of a folder.

    `path` is absolute; `label` a class name, an index into the classes or None; `where` names file and line.
    """

    name: str
    path: str
    label: str | int | None
    where: str


class KineticsLine(NamedTuple):
    """A line of a Kinetics list: from which second to which of a YouTube video; `label` is '' if it has none."""

    youtube_id: str
    start: float
    end: float
    label: str
    where: str

    @property
    def stem(self) -> str:
        """The name of its file without the suffix: the id and two times of six digits."""
        return f"{self.youtube_id}_{int(self.start):06d}_{int(self.end):06d}"


def root_folder(source: Path) -> Path:
    """The folder that the paths of a source are relative to."""
    return source.parent if source.is_file() else source


def split_sources(source: Path, annotations: Sequence[Path] = ()) -> dict[str, list[Path]]:
    """What defines each split, in the order train, val, test, others: list files, or a folder to walk.

    Raises UsageError if `source` or one of `annotations` does not exist or holds no lists.
    """
    source = _existing(source)
    found: list[tuple[str, Path]] = []
    if annotations:
        for path in map(_existing, annotations):
            found += _splits_of_file(path) if path.is_file() else _lists_in(path)
        if not found:
            raise UsageError(f"{annotations[0]}: holds no list train, val or test; name a list or a CSV")
    elif source.is_file():
        found = _splits_of_file(source)
    else:
        found = _lists_in(source) or _lists_in(source / "annotations")
        if not found and not (source / "dataset.json").is_file():
            found = [(split, source / split) for split in SPLITS if (source / split).is_dir()] or [("train", source)]
    order = dict.fromkeys((*SPLITS, *sorted(split for split, _ in found)))
    return {split: paths for split in order if (paths := [path for word, path in found if word == split])}


def _existing(source: Path) -> Path:
    source = Path(source).absolute()
    if not source.exists():
        raise UsageError(f"{source}: no such data set; give a folder, a list file or a CSV")
    return source


def _lists_in(folder: Path) -> list[tuple[str, Path]]:
    """The lists of a folder; .txt wins over .csv, as it is the complete one of Kinetics-600's official lists."""
    found: dict[str, Path] = {}
    for word in (*SPLIT_SYNONYMS, *SPLITS):
        for suffix in (".csv", ".txt"):
            path = folder / f"{word}{suffix}"
            if path.is_file():
                found[SPLIT_SYNONYMS.get(word, word)] = path
    return [item for path in found.values() for item in _splits_of_file(path)]


def _splits_of_file(path: Path) -> list[tuple[str, Path]]:
    """The splits of one list: those of its column `split`, else the one in its file name, else train."""
    words = re.findall(r"[a-z]+", path.stem.lower())
    named = next((split for word in words if (split := SPLIT_SYNONYMS.get(word, word)) in SPLITS), "train")
    return [(split, path) for split in sorted(split_column(path))] or [(named, path)]


def split_column(path: Path) -> set[str]:
    """The values of the column `split`; none if there is no such column. Raises UsageError."""
    if not _is_table(path) or "split" not in _header(path):
        return set()
    words = {word.strip() for _, (word,) in _table(path, "split")}
    if "" in words and len(words) > 1:
        raise UsageError(f"{path}: some lines have a split and some do not; fill in the column or remove it")
    return {SPLIT_SYNONYMS.get(word, word) for word in words if word}


def read_listed_videos(root: Path, source: Path, split: str) -> Iterator[ListedVideo]:
    """The lines of one list that belong to `split`, or the videos of a folder. Raises UsageError naming the line."""
    if source.is_dir():
        return _walk(root, source)
    if is_kinetics_list(source):
        return _kinetics_rows(root, source, split)
    return _path_rows(root, source, split) if _is_table(source) else _list_rows(root, source)


def labels_in(root: Path, source: Path) -> set[str | int]:
    """All labels of a list, whatever their split, or of a folder."""
    if source.is_dir():
        return {row.label for row in _walk(root, source) if row.label is not None}
    if _is_table(source):
        return {label for _, (label,) in _table(source, "label") if label}
    return {row.label for row in _list_rows(root, source) if row.label is not None}


def _walk(root: Path, folder: Path) -> Iterator[ListedVideo]:
    """Class folders of videos, or a flat folder of unlabelled ones."""
    shown = videos_below(folder)
    loose = [name for name in shown if "/" not in name]
    if loose and len(loose) < len(shown):
        raise UsageError(f"{folder / loose[0]}: a video beside class folders; move it into one, or use a list")
    top = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
    for name in shown:
        path = os.path.join(folder, name)
        yield ListedVideo(top + name, path, None if loose else name.partition("/")[0], path)


def videos_below(folder: Path) -> list[str]:
    """The videos anywhere below a folder, relative to it, in order.

    Hidden files and folders are skipped, and so are prepared data sets: otherwise a second run would take the output of
    the first for its input. Raises UsageError for a folder that cannot be read, whose videos would count as missing.
    """

    def refuse(fault: OSError) -> None:
        raise UsageError(f"{fault.filename}: cannot be read ({fault.strerror}); fix its permissions first") from fault

    shown: list[str] = []
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "lost+found"]
        if parent != str(folder) and not PREPARED_MARKERS.isdisjoint(files):
            folders.clear()
            continue
        top = parent[len(str(folder)) :].lstrip("/")
        for name in files:
            if not name.startswith(".") and name[name.rfind(".") :].lower() in VIDEO_SUFFIXES:
                shown.append(f"{top}/{name}" if top else name)
    # Folder by folder: NUL sorts before any character that a name can contain.
    return sorted(shown, key=lambda name: name.replace("/", "\0"))


def _list_rows(root: Path, path: Path) -> Iterator[ListedVideo]:
    for number, line in enumerate(read_text_lines(path), start=1):
        text = line.strip()
        if text:
            match = LIST_LINE.match(text)
            name = match["path"] if match else text
            yield ListedVideo(name, str(root / name), int(match["label"]) if match else None, f"{path}, line {number}")


def _path_rows(root: Path, path: Path, split: str) -> Iterator[ListedVideo]:
    for number, (name, label, word) in _table(path, "path", "label", "split"):
        if _in_split(word, split):
            yield ListedVideo(name, str(root / name), label or None, f"{path}, line {number}")


def _kinetics_rows(root: Path, path: Path, split: str) -> Iterator[ListedVideo]:
    """The lines of a Kinetics list with their files ID_START_END, wherever below `root` those lie.

    A file that does not exist keeps the name it should have, so that it is reported as missing.
    """
    files = videos_by_stem(videos_below(root))
    for clip in read_kinetics_lines(path, split):
        name = choose_copy(files.get(clip.stem, [f"{clip.stem}.mp4"]), split)
        yield ListedVideo(name, os.path.join(root, name), clip.label or None, clip.where)


def is_kinetics_list(path: Path) -> bool:
    """Whether a list, whatever its suffix, has Kinetics' columns of a YouTube id and two times."""
    return {"youtube_id", "time_start", "time_end"} <= set(_header(path))


def read_kinetics_lines(path: Path, split: str) -> Iterator[KineticsLine]:
    """The lines of a Kinetics list that belong to `split`. Raises UsageError naming the line."""
    for number, (youtube_id, first, last, label, word) in _table(
        path, "youtube_id", "time_start", "time_end", "label", "split"
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
        yield KineticsLine(youtube_id, start, end, label, where)


def videos_by_stem(videos: Sequence[str]) -> dict[str, list[str]]:
    """The videos grouped by their file name without folder and suffix."""
    found: dict[str, list[str]] = {}
    for name in videos:
        found.setdefault(name[name.rfind("/") + 1 : name.rfind(".")], []).append(name)
    return found


def choose_copy(names: Sequence[str], folder: str) -> str:
    """Of several copies of a video, the one below the folder of its split or class, else the first."""
    if len(names) == 1:
        return names[0]
    return next((name for name in names if f"/{folder}/" in f"/{name}"), names[0])


def _in_split(word: str, split: str) -> bool:
    return word in ("", split) or SPLIT_SYNONYMS.get(word.strip(), word.strip()) in ("", split)


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as fault:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({fault})") from fault


def _is_table(path: Path) -> bool:
    """Whether a file is a CSV with a header; SlowFast and VideoMAE call bare lists .csv too."""
    header = set(_header(path))
    return "path" in header or {"youtube_id", "time_start", "time_end"} <= header


def _table(path: Path, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """For every record, its line number and the fields of `columns`; '' if there is no such column or field."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            # -1 is the empty field that is appended to every record below.
            places = [header.index(column) if column in header else -1 for column in columns]
            for fields in reader:
                if len(fields) > len(header):
                    raise UsageError(
                        f"{path}, line {reader.line_num}: too many fields; quote names that contain commas"
                    )
                if fields:
                    fields += [""] * (len(header) + 1 - len(fields))
                    yield reader.line_num, [fields[place] for place in places]
        except (UnicodeDecodeError, csv.Error) as fault:
            raise UsageError(f"{path}, line {reader.line_num + 1}: not UTF-8 CSV ({fault})") from fault
