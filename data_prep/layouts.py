"""Official lists: what Kinetics, UCF101, HMDB51 and Something-Something V2 name, and where below a folder it lies."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from video_swinv2.data.lists import ListedVideo, choose_copy, read_kinetics_lines, videos_below, videos_by_stem
from video_swinv2.errors import UsageError
from video_swinv2.files import read_text_lines

# Where the official lists lie when they were unpacked beside the videos; "" is the folder of the videos itself.
LIST_FOLDERS = ("", "annotations", "labels", "splits", "ucfTrainTestlist", "testTrainMulti_7030_splits")
OFFICIAL_FILE = re.compile(
    r"classInd\.txt|(train|test)list0\d\.txt|.+_test_split\d\.txt|(something-something-v2-)?(labels|train|validation|test)\.json"
)
# ID_START_END: an id may hold any of these signs, also the underscore, so only the two times tell where it ends.
KINETICS_NAME = re.compile(r"(?P<origin>.+)_\d{6}_\d{6}")
YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
UCF101_NAME = re.compile(r"v_(?P<origin>.+_g\d{2})_c\d{2}")
# What follows the film's name and the class: visible parts, camera motion, people, viewpoint, quality, number.
HMDB51_NAME = re.compile(r"(?P<origin>.+)_[hufl]_(?:cm|nm)_np\d_(?:fr|ri|le|ba)_(?:goo|med|bad)_\d+")


class SourceVideo(NamedTuple):
    """A video that a list names: `name` is its path below the root, or what that should be; `path` is absolute.

    `label` as in `ListedVideo`. `origin` is the video it was cut from, which may be a YouTube id; '' where unknown. `start` and
    `end`, in seconds, are the part to cut out; None for all of it.
    """

    split: str
    name: str
    path: str
    label: str | int | None
    where: str
    origin: str = ""
    youtube_id: str = ""
    start: float | None = None
    end: float | None = None


class VideoTree:
    """The videos below a folder, walked once, known by their names."""

    def __init__(self, root: Path) -> None:
        self.top = f"{root}/"
        self.videos = videos_below(root)
        self._by_stem = videos_by_stem(self.videos)
        self._by_folded: dict[str, list[str]] = {}

    def find(self, stem: str, folder: str) -> str | None:
        """The path below the root of the video of that name, of several the one below `folder`; None if absent."""
        names = self._by_stem.get(stem)
        return choose_copy(names, folder) if names else None

    def find_folded(self, stem: str, folder: str) -> str | None:
        """As `find`, upper and lower case being the same where nothing is spelled exactly so."""
        if stem in self._by_stem:
            return self.find(stem, folder)
        if not self._by_folded:
            for name, found in self._by_stem.items():
                self._by_folded.setdefault(name.casefold(), []).extend(found)
        names = self._by_folded.get(stem.casefold())
        return choose_copy(names, folder) if names else None


@dataclass(frozen=True)
class SourceListing:
    """All videos that the lists of a source name, its classes in order; `tree` is None where the folder is the list.

    `unused` are videos that the lists name for no split.
    """

    root: Path
    classes: tuple[str, ...]
    videos: list[SourceVideo]
    tree: VideoTree | None
    unused: set[str] = field(default_factory=set)


def read_official_lists(source: Path, annotations: Sequence[Path], number: int) -> SourceListing | None:
    """The listing of UCF101, HMDB51 (their split `number`) or Something-Something V2; None if these are not there.

    Their lists are looked for in the folder `annotations`, else in `source` and the folders they are unpacked to.
    Raises UsageError.
    """
    for path in (source, *annotations):
        if path.is_file() and OFFICIAL_FILE.fullmatch(path.name):
            raise UsageError(
                f"{path}: name the folder of the official lists, {path.parent}, and choose --official-split"
            )
    if not source.is_dir():
        return None
    for folder in annotations or [source / name for name in LIST_FOLDERS]:
        if (folder / "classInd.txt").is_file():
            return _ucf101(source, folder, number)
        if any(folder.glob("*_test_split[0-9].txt")):
            return _hmdb51(source, folder, number)
        if _json_file(folder, "labels").is_file() and _json_file(folder, "train").is_file():
            return _something_v2(source, folder)
    return None


def read_kinetics_list(path: Path, split: str, tree: VideoTree) -> Iterator[SourceVideo]:
    """What a Kinetics list names: trimmed clips, wherever they lie, else parts of whole videos named by YouTube id.

    What is not there keeps the name it should have. Raises UsageError naming the line.
    """
    for clip in read_kinetics_lines(path, split):
        fields = (clip.label or None, clip.where, clip.youtube_id, clip.youtube_id)
        stem = clip.stem
        trimmed = tree.find(stem, split)
        whole = None if trimmed else tree.find(clip.youtube_id, split) or tree.find(f"v_{clip.youtube_id}", split)
        if whole:
            if not (clip.start.is_integer() and clip.end.is_integer()):
                stem = f"{clip.youtube_id}_{clip.start:010.3f}_{clip.end:010.3f}"
            yield SourceVideo(split, f"{stem}.mp4", _join(tree, whole), *fields, clip.start, clip.end)
        else:
            name = trimmed or f"{stem}.mp4"
            yield SourceVideo(split, name, _join(tree, name), *fields)


def video_from_row(row: ListedVideo, split: str) -> SourceVideo:
    """A line of any other list, or a file of a folder; its name may tell the origin."""
    origin = origin_of(_stem(row.name), row.label)
    youtube_id = origin if KINETICS_NAME.fullmatch(_stem(row.name)) and YOUTUBE_ID.fullmatch(origin) else ""
    return SourceVideo(split, row.name, row.path, row.label, row.where, origin, youtube_id)


def origin_of(stem: str, label: str | int | None = None) -> str:
    """The video a clip was cut from, as far as a name of Kinetics, UCF101 or HMDB51 tells; '' for any other name."""
    for form in (KINETICS_NAME, UCF101_NAME):
        if match := form.fullmatch(stem):
            return match["origin"]
    match = HMDB51_NAME.fullmatch(stem)
    # The film's name is followed by the class, which some names abbreviate.
    return match["origin"].removesuffix(f"_{label}") if match else ""


def _ucf101(source: Path, folder: Path, number: int) -> SourceListing:
    """Lines `Class/v_Class_g01_c02.avi 1`; classInd.txt numbers the classes from 1. The test list has no numbers."""
    numbered = [line.split(maxsplit=1) for line in read_text_lines(folder / "classInd.txt") if line.strip()]
    try:
        classes = tuple(name.strip() for _, name in sorted((int(place), name) for place, name in numbered))
    except ValueError as fault:
        raise UsageError(f"{folder / 'classInd.txt'}: needs lines `number class` ({fault})") from fault
    tree, videos = VideoTree(source), []
    for split in ("train", "test"):
        for where, line in _numbered(folder / f"{split}list0{number}.txt"):
            listed = line.split()[0]
            label = listed.partition("/")[0]
            # The lists say v_HandStandPushups, some copies of the videos v_HandstandPushups.
            name = tree.find_folded(_stem(listed), label) or listed
            videos.append(SourceVideo(split, name, _join(tree, name), label, where, origin_of(_stem(name))))
    return SourceListing(source, classes, videos, tree)


def _hmdb51(source: Path, folder: Path, number: int) -> SourceListing:
    """A file a class, CLASS_test_split1.txt, of lines `name.avi 1`: 1 is train, 2 test, 0 in neither."""
    ending = f"_test_split{number}.txt"
    paths = sorted(folder.glob(f"*{ending}"))
    classes = tuple(sorted(path.name.removesuffix(ending) for path in paths))
    if not classes:
        raise UsageError(f"{folder}: no lists *{ending}; unpack them all or choose another --official-split")
    tree, unused, videos = VideoTree(source), set(), []
    for path in paths:
        label = path.name.removesuffix(ending)
        for where, line in _numbered(path):
            listed, _, use = line.rpartition(" ")
            if use not in ("0", "1", "2") or not listed:
                raise UsageError(f"{where}: needs `name 0`, `name 1` or `name 2`")
            name = tree.find(_stem(listed.strip()), label) or f"{label}/{listed.strip()}"
            if use == "0":
                unused.add(name)
                continue
            split, origin = "train" if use == "1" else "test", origin_of(_stem(name), label)
            videos.append(SourceVideo(split, name, _join(tree, name), label, where, origin))
    return SourceListing(source, classes, videos, tree, unused)


def _something_v2(source: Path, folder: Path) -> SourceListing:
    """labels.json numbers the classes; the others list {id, template}: a template without its brackets is a class.

    The test list has no templates; its classes are in test-answers.csv, `id;class`, where that was released.
    """
    numbers: dict[str, Any] = _read_json(_json_file(folder, "labels"))
    classes = tuple(sorted(numbers, key=lambda name: int(numbers[name])))
    answers = {}
    if (folder / "test-answers.csv").is_file():
        answers = dict(line.partition(";")[::2] for line in read_text_lines(folder / "test-answers.csv"))
    tree, videos = VideoTree(source), []
    for split, word in (("train", "train"), ("val", "validation"), ("test", "test")):
        path = _json_file(folder, word)
        for item in _read_json(path) if path.is_file() else ():
            number = str(item["id"])
            label = item["template"].replace("[", "").replace("]", "") if "template" in item else answers.get(number)
            name = tree.find(number, split) or f"{number}.webm"
            videos.append(SourceVideo(split, name, _join(tree, name), label, f"{path}, id {number}"))
    return SourceListing(source, classes, videos, tree)


def _json_file(folder: Path, word: str) -> Path:
    """The list of that name, with the prefix of the first release or without it as in the second."""
    long = folder / f"something-something-v2-{word}.json"
    return long if long.is_file() else folder / f"{word}.json"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise UsageError(f"{path}: not readable as JSON ({fault}); unpack it again") from fault


def _numbered(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(read_text_lines(path), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _join(tree: VideoTree, name: str) -> str:
    return name if name.startswith("/") else tree.top + name
