"""The plan of a preparation: every listed video, its split, class and segment, and the path it will have.

list       read the lists of any known layout                      (layouts.py, video_swinv2/data/lists.py)
merge      a line that repeats an earlier one is dropped, one that contradicts it is refused
exclude    duplicates between lists, and training videos whose YouTube id is held out
place      a path in the data set for each video: safe on every file system, and unique
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.layouts import (
    SourceListing,
    SourceVideo,
    VideoTree,
    read_kinetics_list,
    read_official_lists,
    video_from_row,
)
from data_prep.state import PlannedVideo
from video_swinv2.data.lists import (
    SPLITS,
    is_kinetics_list,
    read_kinetics_lines,
    read_listed_videos,
    root_folder,
    split_sources,
)
from video_swinv2.data.manifest import classes_of_source, label_index
from video_swinv2.errors import UsageError

MAX_NAME_BYTES = 150
# Separators, control characters, and a leading dot, which would hide the file.
UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]|^\.")


@dataclass(frozen=True)
class PreparationPlan:
    """What the data set should contain.

    The ordered classes; every listed video, including excluded ones; the videos of the source that no list names
    (`extra`, paths relative to it); and remarks for the user.
    """

    classes: list[str]
    videos: list[PlannedVideo]
    extra: list[str]
    notes: list[str]


def plan_preparation(
    source: Path, annotations: Sequence[Path] = (), *, held_out: Sequence[Path] = (), official_split: int = 1
) -> PreparationPlan:
    """Plan the preparation of what `source` lists, or of what `annotations` (lists, or folders of them) list of it.

    Layouts are those of `read_manifest`; also Kinetics lists over whole videos, from which segments are cut; and
    UCF101, HMDB51 (both with `official_split` 1, 2 or 3) and Something-Something V2, recognised by their official
    lists. Several lists are joined, and the classes are all of their classes. Two kinds of videos are excluded: those
    that an earlier list has in the same split, and training videos whose YouTube id occurs in another split of any list
    or in one of the lists `held_out`. Raises UsageError naming the line.
    """
    source = Path(source).absolute()
    annotations = [Path(path).absolute() for path in annotations]
    listing = read_official_lists(source, annotations, official_split) or _read_lists(source, annotations)
    if not listing.videos:
        raise UsageError(f"{source}: no videos found; give a folder of videos, a folder of lists, or a CSV")
    videos, notes = _merge_repeated(listing.videos)
    held_out_ids, more = _held_out_ids(videos, listing.tree is not None, held_out)
    excluded = [
        name != video.name or (video.split == "train" and video.youtube_id in held_out_ids) for video, name in videos
    ]
    extra = _unlisted(listing)
    notes += more + _notes(videos, excluded, extra)
    return PreparationPlan(list(listing.classes), _assign_targets(listing.classes, videos, excluded), extra, notes)


def _read_lists(source: Path, annotations: Sequence[Path]) -> SourceListing:
    """Every layout other than the official ones."""
    sources = split_sources(source, annotations)
    root = root_folder(source)
    # Folders of classes need no tree: they are their own list.
    tree = VideoTree(root) if any(path.is_file() for paths in sources.values() for path in paths) else None
    videos: list[SourceVideo] = []
    for split, paths in sources.items():
        for path in paths:
            if tree and path.is_file() and is_kinetics_list(path):
                videos += read_kinetics_list(path, split, tree)
            else:
                videos += (video_from_row(row, split) for row in read_listed_videos(root, path, split))
    classes = classes_of_source(root, annotations, {video.label for video in videos if video.label is not None})
    return SourceListing(root, classes, videos, tree)


def _merge_repeated(videos: Sequence[SourceVideo]) -> tuple[list[tuple[SourceVideo, str]], list[str]]:
    """Each video with a name that is unique in its split: its own name, or `NAME (2)` if an earlier list has it.

    A line that repeats an earlier line of the same list is dropped; one that contradicts it is refused.
    """
    first: dict[tuple[str, str], SourceVideo] = {}
    copies: Counter[tuple[str, str]] = Counter()
    repeated: Counter[str] = Counter()
    kept: list[tuple[SourceVideo, str]] = []
    for video in videos:
        key = (video.split, video.name)
        earlier = first.setdefault(key, video)
        if earlier is video:
            kept.append((video, video.name))
            continue
        # Kinetics lists of different versions share videos, so a repetition between two lists is normal: the later one
        # gets a row of its own, which will be excluded.
        same_list = _list_of(video) == _list_of(earlier)
        same = video[:4] == earlier[:4] and (video.start, video.end) == (earlier.start, earlier.end)
        if not same and (same_list or not video.youtube_id):
            where = f"is also listed in {earlier.where}, with another label or segment"
            raise UsageError(f"{video.where}: {video.name!r} {where}; remove one")
        if same_list:
            repeated[_list_of(video)] += 1
        else:
            copies[key] += 1
            kept.append((video, f"{video.name} ({copies[key] + 1})"))
    return kept, [f"{path}: {count} lines repeat an earlier one and were dropped" for path, count in repeated.items()]


def _list_of(video: SourceVideo) -> str:
    """The list that names the video: `where` without the line."""
    return re.split(r", (?:line|id) \d+$", video.where)[0]


def _held_out_ids(
    videos: Sequence[tuple[SourceVideo, str]], lists: bool, held_out: Sequence[Path]
) -> tuple[set[str], list[str]]:
    """The YouTube ids that must not be in train, and remarks about them."""
    by_split: dict[str, set[str]] = {}
    if lists:  # the splits of a folder tree without lists are taken as they are
        for video, _ in videos:
            if video.youtube_id:
                by_split.setdefault(video.split, set()).add(video.youtube_id)
    by_split.pop("train", None)  # what is left is val and test, which train must not contain
    both = by_split.get("val", set()) & by_split.get("test", set())
    notes = [f"{len(both)} YouTube videos are in both val and test, and are kept in both"] if both else []
    return set().union(*by_split.values(), *map(_youtube_ids, held_out)), notes


def _youtube_ids(path: Path) -> set[str]:
    """The YouTube ids that a list names in any split. Raises UsageError if it names none."""
    path = Path(path).absolute()
    ids: set[str] = set()
    for split, lists in split_sources(path).items():
        for one in lists:
            if one.is_file() and is_kinetics_list(one):
                ids.update(clip.youtube_id for clip in read_kinetics_lines(one, split))
            else:
                ids.update(
                    video_from_row(row, split).youtube_id for row in read_listed_videos(root_folder(path), one, split)
                )
    if not ids - {""}:
        raise UsageError(f"{path}: contains no YouTube ids; --held-out needs a Kinetics list")
    return ids - {""}


def _unlisted(listing: SourceListing) -> list[str]:
    """The videos below the root that no list names, except in folders of splits for which no list was given."""
    if listing.tree is None:
        return []
    prefix = f"{listing.root}/"
    used = {os.path.normpath(video.path).removeprefix(prefix) for video in listing.videos} | listing.unused
    others = set(SPLITS) - {video.split for video in listing.videos}
    # Names that are not UTF-8 are escaped, so that extra.csv can be written.
    return [
        name.encode(errors="backslashreplace").decode()
        for name in listing.tree.videos
        if name not in used and name.partition("/")[0] not in others
    ]


def _notes(videos: Sequence[tuple[SourceVideo, str]], excluded: Sequence[bool], extra: Sequence[str]) -> list[str]:
    duplicates = Counter(video.split for video, name in videos if name != video.name)
    held_out = sum(excluded) - sum(duplicates.values())
    segments = sum(video.start is not None for video, _ in videos)
    notes = [
        f"{count} videos of {split} are excluded: an earlier list also has them" for split, count in duplicates.items()
    ]
    if held_out:
        notes.append(f"{held_out} training videos are excluded: another split or a held-out list has their YouTube ids")
    if segments:
        notes.append(f"{segments} videos are segments to be cut from longer videos")
    if extra:
        notes.append(f"{len(extra)} videos in the source are on no list; extra.csv names them")
    return notes


def _assign_targets(
    classes: Sequence[str], videos: Sequence[tuple[SourceVideo, str]], excluded: Sequence[bool]
) -> list[PlannedVideo]:
    """The planned videos, each with a target of its own. Raises UsageError for a label that is not a class."""
    index = {name: number for number, name in enumerate(classes)}
    labels = [label_index(video.label, video.where, classes, index) for video, _ in videos]  # -1: no label
    folders = _folder_names(classes)
    homes = [
        f"videos/{video.split}/" + (f"{folders[classes[label]]}/" if label >= 0 else "")
        for (video, _), label in zip(videos, labels, strict=True)
    ]
    files = _file_names([name for _, name in videos], homes, excluded)
    position: Counter[str] = Counter()
    planned: list[PlannedVideo] = []
    for (video, name), label, home, file, is_excluded in zip(videos, labels, homes, files, excluded, strict=True):
        _refuse_undecodable_name(video.path)
        planned.append(
            PlannedVideo(
                split=video.split,
                position=position[video.split],
                name=name,
                label=classes[label] if label >= 0 else "",
                source=video.path,
                target=f"{home}{file}.mp4",
                origin=video.origin,
                start=video.start,
                end=video.end,
                excluded="duplicate" if is_excluded else "",
            )
        )
        position[video.split] += 1
    return planned


def _folder_names(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each class: the class name itself, wherever a file system allows it."""
    safe = {name: _safe(name) for name in names}
    # casefold: "Run" and "run" are one folder on file systems that ignore case.
    taken = Counter(folder.casefold() for folder in safe.values())
    return {
        name: folder if taken[folder.casefold()] == 1 else _with_hash(folder, name) for name, folder in safe.items()
    }


def _file_names(names: Sequence[str], homes: Sequence[str], excluded: Sequence[bool]) -> list[str]:
    """A file name (no suffix) for each video: its own, unless two prepared videos would collide in one folder.

    Names that differ only in case collide too: some file systems do not distinguish them.
    """
    stems = [_safe(os.path.splitext(os.path.basename(name))[0]) for name in names]
    keys = [(home, stem.casefold()) for home, stem in zip(homes, stems, strict=True)]
    # Excluded videos are never written, so they must not push a prepared one off its own name.
    taken = Counter(key for key, is_excluded in zip(keys, excluded, strict=True) if not is_excluded)
    return [
        stem if taken[key] == 1 and not is_excluded else _with_hash(stem, name)
        for name, stem, key, is_excluded in zip(names, stems, keys, excluded, strict=True)
    ]


def _safe(name: str) -> str:
    """The name without separators, control characters or a leading dot, and short enough for any file system."""
    clean = UNSAFE.sub("_", name) or "_"
    return (
        clean
        if len(clean.encode()) <= MAX_NAME_BYTES
        else _with_hash(clean.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore"), name)
    )


def _with_hash(name: str, whole: str) -> str:
    """A name made unique by a hash of the original name."""
    return f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _refuse_undecodable_name(path: str) -> None:
    if path.isascii():
        return
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{path!a}: the file name is not valid UTF-8; rename the file") from error
