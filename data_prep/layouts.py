"""The official lists of Kinetics, UCF101, HMDB51 and Something-Something V2, and finding the videos they name.

The lists name videos in their own ways (a YouTube id and two times, CLASS/NAME.avi, a number), and copies of a data set
differ in where the files are. So a list is read against a VideoTree, which finds a file by its stem wherever it is.
"""

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

# Folders in which the official lists end up when unpacked beside the videos; "" is the folder of the videos itself.
LIST_FOLDERS = ("", "annotations", "labels", "splits", "ucfTrainTestlist", "testTrainMulti_7030_splits")
OFFICIAL_FILE = re.compile(
    r"classInd\.txt|(train|test)list0\d\.txt|.+_test_split\d\.txt|(something-something-v2-)?(labels|train|validation|test)\.json"
)
# ID_START_END. An id may itself contain underscores, so only the two times show where it ends.
KINETICS_NAME = re.compile(r"(?P<origin>.+)_\d{6}_\d{6}")
YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")
UCF101_NAME = re.compile(r"v_(?P<origin>.+_g\d{2})_c\d{2}")
# What follows the film's name and the class: visible parts, camera motion, people, viewpoint, quality, number.
HMDB51_NAME = re.compile(r"(?P<origin>.+)_[hufl]_(?:cm|nm)_np\d_(?:fr|ri|le|ba)_(?:goo|med|bad)_\d+")


class SourceVideo(NamedTuple):
    """A video as the list of a source names it.

    `name` is its path below the root, or the path it should have if it is absent; `path` is absolute. `label` as in
    `ListedVideo`. `where` names the list and the line, for messages. `origin` is the video it was cut from, for example
    a YouTube id; '' if unknown. `start` and `end`, in seconds, bound the segment to cut out; None for the whole video.
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
    """The videos below a folder, which is walked once, and finding them by stem (file name without suffix)."""

    def __init__(self, root: Path) -> None:
        self.prefix = f"{root}/"
        self.videos = videos_below(root)
        self._by_stem = videos_by_stem(self.videos)
        self._by_folded_stem: dict[str, list[str]] = {}

    def find(self, stem: str, folder: str) -> str | None:
        """The path, below the root, of the video with this stem; of several, the one in `folder`. None if absent."""
        names = self._by_stem.get(stem)
        return choose_copy(names, folder) if names else None

    def find_ignoring_case(self, stem: str, folder: str) -> str | None:
        """As `find`, but ignoring case if no video has exactly this stem."""
        if stem in self._by_stem:
            return self.find(stem, folder)
        if not self._by_folded_stem:
            for name, found in self._by_stem.items():
                self._by_folded_stem.setdefault(name.casefold(), []).extend(found)
        names = self._by_folded_stem.get(stem.casefold())
        return choose_copy(names, folder) if names else None


@dataclass(frozen=True)
class SourceListing:
    """Everything the lists of a source name: the ordered classes and the videos.

    `tree` is None if there is no list and the folder itself is the source. `unused` are videos that the lists name but
    assign to no split.
    """

    root: Path
    classes: tuple[str, ...]
    videos: list[SourceVideo]
    tree: VideoTree | None
    unused: set[str] = field(default_factory=set)


def read_official_lists(source: Path, annotations: Sequence[Path], number: int) -> SourceListing | None:
    """The listing of UCF101, HMDB51 (official split `number`) or Something-Something V2; None if none of them is found.

    The lists are looked for in the folders `annotations`, otherwise in `source` and in LIST_FOLDERS below it. Raises
    UsageError.
    """
    for path in (source, *annotations):
        if path.is_file() and OFFICIAL_FILE.fullmatch(path.name):
            advice = f"give their folder, {path.parent}, and choose with --official-split"
            raise UsageError(f"{path}: is one of several official lists; {advice}")
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
    """The videos of a Kinetics list: files already trimmed (ID_START_END), or segments of whole videos (ID).

    They are found anywhere in the tree. A video that is absent gets the name it should have, and later fails as
    missing. Raises UsageError naming the line.
    """
    for clip in read_kinetics_lines(path, split):
        fields = (clip.label or None, clip.where, clip.youtube_id, clip.youtube_id)
        stem = clip.stem
        trimmed = tree.find(stem, split)
        whole = None if trimmed else tree.find(clip.youtube_id, split) or tree.find(f"v_{clip.youtube_id}", split)
        if whole:
            # The usual stem holds whole seconds; segments with fractional times must not collide under it.
            if not (clip.start.is_integer() and clip.end.is_integer()):
                stem = f"{clip.youtube_id}_{clip.start:010.3f}_{clip.end:010.3f}"
            yield SourceVideo(split, f"{stem}.mp4", _absolute(tree, whole), *fields, clip.start, clip.end)
        else:
            name = trimmed or f"{stem}.mp4"
            yield SourceVideo(split, name, _absolute(tree, name), *fields)


def video_from_row(row: ListedVideo, split: str) -> SourceVideo:
    """The video of a line of any other list, or of a file in a folder. Only its name can reveal its origin."""
    origin = origin_of(_stem(row.name), row.label)
    youtube_id = origin if KINETICS_NAME.fullmatch(_stem(row.name)) and YOUTUBE_ID.fullmatch(origin) else ""
    return SourceVideo(split, row.name, row.path, row.label, row.where, origin, youtube_id)


def origin_of(stem: str, label: str | int | None = None) -> str:
    """The video a file was cut from, by the naming rules of Kinetics, UCF101 and HMDB51; '' for any other name."""
    for form in (KINETICS_NAME, UCF101_NAME):
        if match := form.fullmatch(stem):
            return match["origin"]
    match = HMDB51_NAME.fullmatch(stem)
    # FILM_CLASS. Where a name abbreviates the class, the abbreviation stays part of the origin.
    return match["origin"].removesuffix(f"_{label}") if match else ""


def _ucf101(source: Path, folder: Path, number: int) -> SourceListing:
    """Lines `Class/v_Class_g01_c02.avi 1`; classInd.txt numbers the classes from 1. The test lists omit the number."""
    numbered = [line.split(maxsplit=1) for line in read_text_lines(folder / "classInd.txt") if line.strip()]
    try:
        classes = tuple(name.strip() for _, name in sorted((int(place), name) for place, name in numbered))
    except ValueError as error:
        raise UsageError(f"{folder / 'classInd.txt'}: each line must be `number class` ({error})") from error
    tree, videos = VideoTree(source), []
    for split in ("train", "test"):
        for where, line in _numbered_lines(folder / f"{split}list0{number}.txt"):
            listed = line.split()[0]
            label = listed.partition("/")[0]
            # The lists spell v_HandStandPushups what some copies of the videos spell v_HandstandPushups.
            name = tree.find_ignoring_case(_stem(listed), label) or listed
            videos.append(SourceVideo(split, name, _absolute(tree, name), label, where, origin_of(_stem(name))))
    return SourceListing(source, classes, videos, tree)


def _hmdb51(source: Path, folder: Path, number: int) -> SourceListing:
    """One file per class, CLASS_test_split1.txt, with lines `name.avi 1`: 1 is train, 2 is test, 0 is neither."""
    ending = f"_test_split{number}.txt"
    paths = sorted(folder.glob(f"*{ending}"))
    classes = tuple(sorted(path.name.removesuffix(ending) for path in paths))
    if not classes:
        raise UsageError(f"{folder}: no lists *{ending}; unpack all of them, or choose another --official-split")
    tree, unused, videos = VideoTree(source), set(), []
    for path in paths:
        label = path.name.removesuffix(ending)
        for where, line in _numbered_lines(path):
            listed, _, use = line.rpartition(" ")
            if use not in ("0", "1", "2") or not listed:
                raise UsageError(f"{where}: must be `name 0`, `name 1` or `name 2`")
            name = tree.find(_stem(listed.strip()), label) or f"{label}/{listed.strip()}"
            if use == "0":
                unused.add(name)
                continue
            split, origin = "train" if use == "1" else "test", origin_of(_stem(name), label)
            videos.append(SourceVideo(split, name, _absolute(tree, name), label, where, origin))
    return SourceListing(source, classes, videos, tree, unused)


def _something_v2(source: Path, folder: Path) -> SourceListing:
    """labels.json numbers the classes; the other lists hold {id, template}. A template without its brackets is a class.

    The test list has no templates. Its classes are in test-answers.csv, with lines `id;class`, if that is present.
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
            videos.append(SourceVideo(split, name, _absolute(tree, name), label, f"{path}, id {number}"))
    return SourceListing(source, classes, videos, tree)


def _json_file(folder: Path, word: str) -> Path:
    """The path of a list: with the prefix of the first release, or without it as in the second."""
    long = folder / f"something-something-v2-{word}.json"
    return long if long.is_file() else folder / f"{word}.json"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); unpack it again") from error


def _numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(list and line number, for messages; text) of every line that is not blank."""
    for number, line in enumerate(read_text_lines(path), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _absolute(tree: VideoTree, name: str) -> str:
    return name if name.startswith("/") else tree.prefix + name
