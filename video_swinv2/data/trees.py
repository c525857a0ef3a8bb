"""Folders of samples: the one walk that every verb uses, and the rule that tells folders of splits from classes.

Walk: folders and links to folders are visited in sorted order. Hidden names and `lost+found` are skipped. A link that
leads to a folder above itself is not followed, so no folder is entered twice on one path. What cannot be read is
refused, because its samples would otherwise be missing without a word.

Splits: the folders directly below the root are splits or classes, all of them. Names of splits are SPLITS and
SPLIT_SYNONYMS in any case, alone (`Train`) or as a word of a longer name (`train_256`, `videos_val`). Classes have such
names, too (`train` in a set of vehicles, "training dog" in Kinetics), so a name alone does not decide; `_are_splits`
says what does. Beside splits, a folder that is not understood is refused.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from video_swinv2.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from video_swinv2.errors import UsageError, UserError

SPLITS = ("train", "val", "test")
SPLIT_SYNONYMS = {
    "training": "train",
    "trainset": "train",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "valset": "val",
    "testing": "test",
    "testset": "test",
}
# Words that name a split, but not the same one in every data set.
UNCLEAR_WORDS = frozenset({"dev", "devset", "eval", "evaluation", "heldout", "holdout", "minival", "trainval"})
UNCLEAR = "unclear"
SAMPLE_SUFFIXES = VIDEO_SUFFIXES | IMAGE_SUFFIXES | {".tar"}
# Files that data_prep writes: a folder with one of them holds a prepared data set, or one in preparation.
PREPARED_MARKERS = frozenset({"dataset.json", "prep.sqlite", ".prep.lock"})
# Splits may have other names. Each is also that of a list and of a folder in a prepared data set, beside other lists.
SPLIT_NAME = re.compile(r"\w[\w .-]{0,39}")
OTHER_LISTS = ("failed", "extra", "verify")
# The words of a name: runs of letters, also divided before a capital (`videosTrain`, `UCFTest`).
WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
T = TypeVar("T")


class FolderContents(NamedTuple):
    """The names of the folders and files directly in a folder, links to them included, sorted.

    Without hidden ones, and without what is neither, such as pipes and sockets.
    """

    folders: list[str]
    files: list[str]


def list_folder(path: Path) -> FolderContents:
    """The contents of one folder. Raises UserError for what cannot be read, such as a link that leads nowhere.

    A link to a sample that is gone is listed as a file: whoever reads the sample reports it.
    """
    folders, files = [], []
    try:
        with os.scandir(path) as items:
            for item in items:
                if item.name.startswith(".") or item.name == "lost+found":
                    continue
                if item.is_dir():
                    folders.append(item.name)
                elif item.is_file():
                    files.append(item.name)
                elif item.is_symlink() and not os.path.exists(item.path):
                    if suffix_of(item.name) not in SAMPLE_SUFFIXES:  # it may have led to a folder of samples
                        raise UserError(f"{item.path}: is a link that leads nowhere; restore its target or remove it")
                    files.append(item.name)
    except OSError as fault:
        raise _unreadable(fault, path) from fault
    return FolderContents(sorted(folders), sorted(files))


def suffix_of(name: str) -> str:
    """The suffix of a file name in lower case, with its dot; '' if it has none."""
    return os.path.splitext(name)[1].lower()


def explore(root: Path, look: Callable[[str], tuple[T, Sequence[str]]]) -> Iterator[T]:
    """Visit `root` and all folders below it, depth first and sorted by name, and yield what `look` makes of each.

    look: is called with the path of a folder relative to `root` ('' for `root` itself), and returns what to yield and
    the names of its subfolders that are to be visited. Raises UserError for a folder that cannot be read.
    """
    # A stack of folders to visit, each with the identities (device, inode) of all folders above it. A path of names
    # would not reveal a symbolic link that leads back to a folder above. The folders above the root belong to them:
    # from the folder of one split, a link to the root would otherwise lead to the other splits.
    above_root = frozenset(_identity(folder) for folder in root.resolve().parents)
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", above_root)]
    while waiting:
        folder, above = waiting.pop()
        identity = _identity(root / folder)
        if identity in above:
            continue
        found, below = look(folder)
        yield found
        top = f"{folder}/" if folder else ""
        # The stack is popped from its end, so pushing in reverse order visits the folders sorted by name.
        waiting += [(top + name, above | {identity}) for name in sorted(below, reverse=True)]


def _identity(folder: Path) -> tuple[int, int]:
    try:
        state = folder.stat()
    except OSError as fault:
        raise _unreadable(fault, folder) from fault
    return state.st_dev, state.st_ino


def _unreadable(fault: OSError, path: Path) -> UserError:
    return UserError(f"{fault.filename or path}: cannot be read ({fault.strerror}); make it readable, or remove it")


def files_below(root: Path) -> list[str]:
    """All visible files below a folder, at any depth, as paths relative to it, sorted by folder and then by name.

    Raises UserError for a folder that cannot be read.
    """

    def look(folder: str) -> tuple[list[str], list[str]]:
        contents = list_folder(root / folder)
        return _joined(folder, contents.files), contents.folders

    return sorted((name for names in explore(root, look) for name in names), key=_folders_first)


class FoundVideos(NamedTuple):
    """Videos below a folder, sorted by folder and then by name, and the folders directly below it without any video.

    Both are paths relative to the folder.
    """

    videos: list[str]
    empty: list[str]


def walk_videos(root: Path) -> FoundVideos:
    """Find all videos below a folder, at any depth.

    Skips prepared data sets, so that a second preparation does not take the output of the first for input. Raises
    UserError for a folder that cannot be read.
    """
    videos: list[str] = []
    filled: dict[str, bool] = {}  # by folder directly below the root
    for folder, names in _videos_by_folder(root):
        videos += names
        if folder:
            top = folder.partition("/")[0]
            filled[top] = filled.get(top, False) or bool(names)
    return FoundVideos(
        sorted(videos, key=_folders_first), [top for top, has_videos in filled.items() if not has_videos]
    )


def videos_below(root: Path) -> list[str]:
    """The videos that `walk_videos` finds."""
    return walk_videos(root).videos


def _videos_by_folder(root: Path) -> Iterator[tuple[str, list[str]]]:
    """The videos of `root` and of each folder below it, with the folder's path; for a prepared data set ("", [])."""

    def look(folder: str) -> tuple[tuple[str, list[str]], list[str]]:
        contents = list_folder(root / folder)
        if folder and _is_prepared(root / folder):
            return ("", []), []
        videos = [name for name in contents.files if suffix_of(name) in VIDEO_SUFFIXES]
        return (folder, _joined(folder, videos)), contents.folders

    return explore(root, look)


def _joined(folder: str, names: Sequence[str]) -> list[str]:
    return [f"{folder}/{name}" for name in names] if folder else list(names)


def _folders_first(name: str) -> str:
    """A sorting key: the path with NUL, which sorts before every character of a name, in place of "/".

    With "/" itself, the folder "a-b" would come before the folder "a", because "-" sorts before "/".
    """
    return name.replace("/", "\0")


def _is_prepared(folder: Path) -> bool:
    """Whether a folder holds a prepared data set, or one in preparation."""
    return any((folder / name).is_file() for name in PREPARED_MARKERS)


@dataclass(frozen=True)
class TopLevel:
    """What is directly below the root of a tree.

    Attributes:
        direct: the folders with samples directly in them.
        deep: the folders whose samples are all in folders below.
        empty: the folders without any sample.
        loose: the name of a sample directly in the root, or ''.
    """

    direct: Collection[str]
    deep: Collection[str]
    empty: Collection[str]
    loose: str = ""


def split_folders_of_videos(root: Path) -> dict[str, str]:
    """The split of each folder directly below `root` that is one; empty if the folders are classes.

    Raises UsageError as `split_folders` does.
    """
    contents = list_folder(root)
    if not any(map(find_split, contents.folders)):  # no folder needs to be looked into
        return {}
    direct: list[str] = []
    deep: list[str] = []
    empty: list[str] = []
    for name in contents.folders:
        if _is_prepared(root / name):
            continue
        # Lazy: of a large folder, no more is read than up to its first video.
        counts = (len(videos) for _, videos in _videos_by_folder(root / name))
        (direct if next(counts, 0) else deep if any(counts) else empty).append(name)
    loose = next((name for name in contents.files if suffix_of(name) in VIDEO_SUFFIXES), "")
    return split_folders(root, TopLevel(direct, deep, empty, loose), "videos")


def split_folders(root: Path, top: TopLevel, kind: str) -> dict[str, str]:
    """The split of each folder directly below `root` that is one; empty if the folders are classes.

    kind: "images" or "videos", for messages. Raises UsageError, naming the folder, if there are splits and beside them
    other samples, a second folder for the same split, or a split without samples.
    """
    filled = sorted({*top.direct, *top.deep})
    named = {name: found for name in filled if (found := find_split(name))}
    strays = [name for name in filled if name not in named or named[name].split == UNCLEAR]
    strays += [top.loose] if top.loose else []
    if not _are_splits(named, strays, top.deep):
        return {}
    if strays:
        beside = " and ".join([name for name in named if name not in strays][:2])
        raise UsageError(
            f"{root / strays[0]}: {kind} outside the split folders ({beside}); move the folder into one of them, or "
            f"name it after a split ({', '.join(SPLITS)})"
        )
    folders: dict[str, str] = {}
    for name, found in named.items():
        if found.split in folders:
            raise UsageError(
                f"{root / name}: is a second folder for the split {found.split}, after {folders[found.split]}; keep "
                "one of them, or rename both if they are classes"
            )
        folders[found.split] = name
    # A data set that is only tested may lack its training samples.
    for name in top.empty:
        if split_of(name) not in (None, "train", *folders):
            raise UsageError(f"{root}: its {name} folder holds no {kind}; fill it or remove it")
    return {name: found.split for name, found in named.items()}


def _are_splits(named: Mapping[str, NamedSplit], strays: Sequence[str], deep: Collection[str]) -> bool:
    """Whether the folders directly below a root are splits rather than classes.

    named: the folders with the word for a split in their names. strays: what holds samples and is not understood as a
    split. deep: the folders whose samples are all in folders below.
    """
    whole = [name for name in named if split_of(name)]  # `train`, not `train_256`
    # Every folder is named after a split. If that is only a part of the name, it must also hold folders of classes.
    if named and not strays and all(name in whole or name in deep for name in named):
        return True
    # Two splits with one affix: train and val, train_256 and val_256, but not "training dog" and "test driving".
    splits: dict[str, set[str]] = defaultdict(set)
    for found in named.values():
        splits[found.affix].add(found.split)
    if any(len(several) > 1 for several in splits.values()):
        return True
    # No class is called `val`. A class called `train` or `test` holds its samples itself; a split holds classes.
    return any(split_of(name) == "val" or name in deep for name in whole)


class NamedSplit(NamedTuple):
    """The split that a name contains, or UNCLEAR, and the letters and digits of the rest of the name."""

    split: str
    affix: str


def split_of(name: str) -> str | None:
    """The split of which `name` is the name or a synonym, in any case; None for any other name."""
    word = name.casefold()
    split = SPLIT_SYNONYMS.get(word, word)
    return split if split in SPLITS else None


def check_split_name(name: str, where: str) -> None:
    """Raise UsageError, beginning with `where`, if `name` cannot be that of a split."""
    if not SPLIT_NAME.fullmatch(name) or name.casefold() in OTHER_LISTS:
        raise UsageError(
            f"{where}: {name[:60]!r} cannot be the name of a split; use up to 40 letters, digits, blanks, '.', '-' and "
            f"'_', beginning with a letter, a digit or '_', but not {', '.join(OTHER_LISTS)}"
        )


def find_split(name: str) -> NamedSplit | None:
    """The split that a word of `name` names, or UNCLEAR if the words do not say which; None without such a word."""
    found: set[str] = set()

    def take_out(word: re.Match[str]) -> str:
        split = split_of(word[0]) or (UNCLEAR if word[0].casefold() in UNCLEAR_WORDS else None)
        if split is None:
            return word[0]
        found.add(split)
        return ""

    rest = WORD.sub(take_out, name)
    if not found:
        return None
    return NamedSplit(found.pop() if len(found) == 1 else UNCLEAR, "".join(filter(str.isalnum, rest)).casefold())
