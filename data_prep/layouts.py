"""Readers for the official lists of Kinetics, UCF101, HMDB51 and Something-Something V2.

Every data set names its videos differently (a YouTube id and two times, CLASS/NAME.avi, or a number), and people keep
the files in different folders. A list is therefore read together with a VideoTree, which finds a file by its stem
anywhere below the source.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import Strict

from video_swinv2.data.groups import KINETICS_NAME, group_of, origin_of
from video_swinv2.data.lists import ListedVideo, choose_copy, read_kinetics_lines, videos_below, videos_by_stem
from video_swinv2.errors import UsageError
from video_swinv2.files import read_text_lines
from video_swinv2.records import Record, parse_record, read_json

# Folders, relative to the videos, in which people unpack the official lists. "" is the folder of the videos itself.
LIST_FOLDERS = ("", "annotations", "labels", "splits", "ucfTrainTestlist", "testTrainMulti_7030_splits")
OFFICIAL_FILE = re.compile(
    r"classInd\.txt|(train|test)list0\d\.txt|.+_test_split\d\.txt|(something-something-v2-)?(labels|train|validation|test)\.json"
)
FIX = "unpack it again"
YOUTUBE_ID = re.compile(r"[A-Za-z0-9_-]{11}")


class SourceVideo(NamedTuple):
    """One video of a source, as a list names it.

    `name` is the path relative to the root of the source; if the file is absent, the path it should have. `path` is the
    absolute path. `label` is as in `ListedVideo`. `where` gives the list and the line for error messages. `group` is
    what the list says or else, for example, the YouTube id of the longer video that this one was cut from; '' if
    unknown. `start` and `end`, in seconds, bound the segment that is to be cut out; None means the whole file.
    """

    split: str
    name: str
    path: str
    label: str | None
    where: str
    group: str = ""
    youtube_id: str = ""
    start: float | None = None
    end: float | None = None


class VideoTree:
    """All videos below a folder, indexed by stem (file name without suffix). The folder is walked once."""

    def __init__(self, root: Path) -> None:
        self.prefix = f"{root}/"
        self.videos = videos_below(root)
        self._by_stem = videos_by_stem(self.videos)
        # Filled on first use: only UCF101 needs it.
        self._by_folded_stem: dict[str, list[str]] = {}

    def find(self, stem: str, folder: str) -> str | None:
        """The path, relative to the root, of the video with this stem; None if there is no such video.

        If several videos have it, one below a folder named `folder` (a split or a class) is preferred.
        """
        names = self._by_stem.get(stem)
        return choose_copy(names, folder) if names else None

    def find_ignoring_case(self, stem: str, folder: str) -> str | None:
        """Like `find`, but compares without case if no video has exactly this stem."""
        if stem in self._by_stem:
            return self.find(stem, folder)
        if not self._by_folded_stem:
            for name, found in self._by_stem.items():
                self._by_folded_stem.setdefault(name.casefold(), []).extend(found)
        names = self._by_folded_stem.get(stem.casefold())
        return choose_copy(names, folder) if names else None


@dataclass(frozen=True)
class SourceListing:
    """The content of all lists of a source.

    `classes` are in label order. `tree` is None if the source has no lists, so that its folders define the videos.
    `unused` holds the names of videos that the lists mention without assigning them to a split. `notes` are remarks for
    the user.
    """

    root: Path
    classes: tuple[str, ...]
    videos: list[SourceVideo]
    tree: VideoTree | None
    unused: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


class SomethingLabels(Record):
    """labels.json of Something-Something V2: the number of each class, which the file writes as a text."""

    labels: dict[str, Annotated[int, Strict(False)]]


class SomethingVideo(Record, extra="ignore"):
    """A video in the other lists of Something-Something V2."""

    id: str | int
    template: str | None = None


class SomethingVideos(Record):
    """One of those lists."""

    videos: list[SomethingVideo]


def read_official_lists(source: Path, annotations: Sequence[Path], number: int) -> SourceListing | None:
    """The listing of UCF101, HMDB51 (both with official split `number`) or Something-Something V2.

    The lists are searched for in the folders `annotations` if given, otherwise in LIST_FOLDERS below `source`. Returns
    None if there are no such lists. Raises UsageError if one of the arguments is a single official list instead of
    their folder, or if a list cannot be read.
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
    """The videos of a Kinetics list: trimmed files (ID_START_END), or segments to be cut from whole videos (ID, v_ID).

    The files may be anywhere in the tree. A video that is absent gets the name it should have, and later fails with the
    reason `missing`. Raises UsageError naming the line.
    """
    for clip in read_kinetics_lines(path, split):
        # label, where, group, youtube_id: the fields of SourceVideo that are the same in both cases below.
        fields = (clip.label or None, clip.where, clip.group, clip.youtube_id)
        stem = clip.stem
        # A trimmed file wins over a whole video, because nothing has to be cut.
        trimmed = tree.find(stem, split)
        whole = None if trimmed else tree.find(clip.youtube_id, split) or tree.find(f"v_{clip.youtube_id}", split)
        if whole:
            # The usual stem rounds times down to whole seconds, so two segments with fractional times could share it.
            if not (clip.start.is_integer() and clip.end.is_integer()):
                stem = f"{clip.youtube_id}_{clip.start:010.3f}_{clip.end:010.3f}"
            yield SourceVideo(split, f"{stem}.mp4", _absolute(tree, whole), *fields, clip.start, clip.end)
        else:
            name = trimmed or f"{stem}.mp4"
            yield SourceVideo(split, name, _absolute(tree, name), *fields)


def video_from_row(row: ListedVideo, split: str) -> SourceVideo:
    """The video of a line of any other list, or of a file in a folder."""
    match = _kinetics_name(_stem(row.name))
    group = group_of(row.name, row.label, row.group)
    return SourceVideo(split, row.name, row.path, row.label, row.where, group, match["origin"] if match else "")


def seconds_in_name(stem: str) -> float:
    """How long a trimmed video of Kinetics, ID_START_END, should be by its name; 0 for any other name."""
    match = _kinetics_name(stem)
    return float(match["end"]) - float(match["start"]) if match else 0.0


def _ucf101(source: Path, folder: Path, number: int) -> SourceListing:
    """Read UCF101: classInd.txt numbers the classes from 1, and trainlist01.txt to testlist03.txt name the videos.

    Their lines are `Class/v_Class_g01_c02.avi 1`; the test lists omit the class number, so the folder gives the class.
    """
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
            # The lists spell v_HandStandPushups, while some copies of the videos spell v_HandstandPushups.
            name = tree.find_ignoring_case(_stem(listed), label) or listed
            videos.append(SourceVideo(split, name, _absolute(tree, name), label, where, origin_of(_stem(name))))
    return SourceListing(source, classes, videos, tree)


def _hmdb51(source: Path, folder: Path, number: int) -> SourceListing:
    """Read HMDB51: one list per class, CLASS_test_split1.txt, with lines `name.avi 1`.

    The number is 1 for train, 2 for test, and 0 for videos that the split does not use.
    """
    ending = f"_test_split{number}.txt"
    paths = sorted(folder.glob(f"*{ending}"))
    classes = tuple(sorted(path.name.removesuffix(ending) for path in paths))
    if not classes:
        raise UsageError(f"{folder}: no lists *{ending}; unpack all of them, or choose another --official-split")
    tree, unused, videos = VideoTree(source), set(), []
    for path in paths:
        label = path.name.removesuffix(ending)
        for where, line in _numbered_lines(path):
            listed, _, use = line.rpartition(" ")  # from the right, in case the name contains spaces
            if use not in ("0", "1", "2") or not listed:
                raise UsageError(f"{where}: must be `name 0`, `name 1` or `name 2`")
            name = tree.find(_stem(listed.strip()), label) or f"{label}/{listed.strip()}"
            if use == "0":
                unused.add(name)
                continue
            split, group = "train" if use == "1" else "test", origin_of(_stem(name), label)
            videos.append(SourceVideo(split, name, _absolute(tree, name), label, where, group))
    return SourceListing(source, classes, videos, tree, unused)


def _something_v2(source: Path, folder: Path) -> SourceListing:
    """Read Something-Something V2: labels.json numbers the classes, and the other lists hold {id, template} objects.

    The class is the template without its brackets: "Pushing [something]" is of class "Pushing something". The test list
    has no templates. Its classes are in test-answers.csv, with lines `id;class`; without that file the test videos have
    no label.
    """
    path = _json_file(folder, "labels")
    numbers = parse_record({"labels": read_json(path, FIX)}, SomethingLabels, str(path), FIX).labels
    classes = tuple(sorted(numbers, key=lambda name: numbers[name]))
    answers = {}
    if (folder / "test-answers.csv").is_file():
        answers = dict(line.partition(";")[::2] for line in read_text_lines(folder / "test-answers.csv"))
    tree, videos = VideoTree(source), []
    for split, word in (("train", "train"), ("val", "validation"), ("test", "test")):
        path = _json_file(folder, word)
        listed = {"videos": read_json(path, FIX) if path.is_file() else []}
        for item in parse_record(listed, SomethingVideos, str(path), FIX).videos:
            number, template = str(item.id), item.template
            label = answers.get(number) if template is None else template.replace("[", "").replace("]", "")
            name = tree.find(number, split) or f"{number}.webm"
            videos.append(SourceVideo(split, name, _absolute(tree, name), label, f"{path}, id {number}"))
    return SourceListing(source, classes, videos, tree)


def _json_file(folder: Path, word: str) -> Path:
    """The path of a list: with the file name prefix of the first release, or without it as in the second."""
    long = folder / f"something-something-v2-{word}.json"
    return long if long.is_file() else folder / f"{word}.json"


def _numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Pairs of ("PATH, line N" for error messages, stripped text), one for every line that is not blank."""
    for number, line in enumerate(read_text_lines(path), start=1):
        if line.strip():
            yield f"{path}, line {number}", line.strip()


def _kinetics_name(stem: str) -> re.Match[str] | None:
    """The match of a name of Kinetics. Other data sets use the same form, so the origin must look like a YouTube id."""
    match = KINETICS_NAME.fullmatch(stem)
    return match if match and YOUTUBE_ID.fullmatch(match["origin"]) else None


def _stem(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[0]


def _absolute(tree: VideoTree, name: str) -> str:
    # String concatenation, because creating Path objects is slow for lists as long as those of Kinetics.
    return name if name.startswith("/") else tree.prefix + name
