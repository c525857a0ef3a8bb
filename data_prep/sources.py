"""What a source lists: every video, its split, class and part, and the place it will have in the data set."""

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

LONGEST_NAME = 150
UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]|^\.")


@dataclass(frozen=True)
class PreparationPlan:
    """The ordered classes; every video that is listed, excluded ones included; the videos of the source that are not
    (paths relative to it); and what a user should be told.
    """

    classes: list[str]
    videos: list[PlannedVideo]
    extra: list[str]
    notes: list[str]


def plan_preparation(
    source: Path, annotations: Sequence[Path] = (), *, held_out: Sequence[Path] = (), official_split: int = 1
) -> PreparationPlan:
    """What `source` lists, or what `annotations` (lists, or folders of them) list of it.

    Layouts as in `read_manifest`; also Kinetics lists over whole videos, which are to be cut; UCF101, HMDB51 (both with
    `official_split` 1, 2 or 3) and Something-Something V2, known by their official lists. Several lists are joined, the
    classes are all their classes. A clip that an earlier list has in the same split is excluded, and so is a video of
    train whose YouTube id is in another split of any list or in one of `held_out`. Raises UsageError naming the line.
    """
    source = Path(source).absolute()
    annotations = [Path(path).absolute() for path in annotations]
    listing = read_official_lists(source, annotations, official_split) or _listed(source, annotations)
    if not listing.videos:
        raise UsageError(f"{source}: no videos found; give a folder of videos, lists or a CSV")
    videos, notes = _once(listing.videos)
    banned, more = _banned(videos, listing.tree is not None, held_out)
    excluded = [name != video.name or (video.split == "train" and video.youtube_id in banned) for video, name in videos]
    extra = _extra(listing)
    notes += more + _tell(videos, excluded, extra)
    return PreparationPlan(list(listing.classes), _place(listing.classes, videos, excluded), extra, notes)


def _listed(source: Path, annotations: Sequence[Path]) -> SourceListing:
    """Every layout but the official ones."""
    sources = split_sources(source, annotations)
    root = root_folder(source)
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


def _once(videos: Sequence[SourceVideo]) -> tuple[list[tuple[SourceVideo, str]], list[str]]:
    """Each video with a name of its own in its split, the listed one unless an earlier list has it already.

    A line that says again what an earlier one of its list says is dropped, one that contradicts it is refused.
    """
    first: dict[tuple[str, str], SourceVideo] = {}
    times: Counter[tuple[str, str]] = Counter()
    repeated: Counter[str] = Counter()
    kept: list[tuple[SourceVideo, str]] = []
    for video in videos:
        key = (video.split, video.name)
        earlier = first.setdefault(key, video)
        if earlier is video:
            kept.append((video, video.name))
            continue
        one_list = _list_of(video) == _list_of(earlier)
        same = video[:4] == earlier[:4] and (video.start, video.end) == (earlier.start, earlier.end)
        if not same and (one_list or not video.youtube_id):
            raise UsageError(
                f"{video.where}: {video.name!r} is listed twice and not alike (first in {earlier.where}); remove one"
            )
        if one_list:
            repeated[_list_of(video)] += 1
        else:
            times[key] += 1
            kept.append((video, f"{video.name} ({times[key] + 1})"))
    return kept, [f"{path}: {count} lines say what an earlier line says: merged" for path, count in repeated.items()]


def _list_of(video: SourceVideo) -> str:
    return re.split(r", (?:line|id) \d+$", video.where)[0]


def _banned(
    videos: Sequence[tuple[SourceVideo, str]], lists: bool, held_out: Sequence[Path]
) -> tuple[set[str], list[str]]:
    """The YouTube ids that must not be in train, and what to tell of them."""
    by_split: dict[str, set[str]] = {}
    if lists:  # a tree of folders is what its owner made it
        for video, _ in videos:
            if video.youtube_id:
                by_split.setdefault(video.split, set()).add(video.youtube_id)
    by_split.pop("train", None)
    both = by_split.get("val", set()) & by_split.get("test", set())
    notes = [f"{len(both)} YouTube videos are in val and in test; both are kept"] if both else []
    return set().union(*by_split.values(), *map(_ids, held_out)), notes


def _ids(path: Path) -> set[str]:
    """The YouTube ids that a list, whatever its splits, names. Raises UsageError where it names none."""
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
        raise UsageError(f"{path}: names no YouTube ids; --held-out takes Kinetics lists")
    return ids - {""}


def _extra(listing: SourceListing) -> list[str]:
    """The videos below the root that no list names; a split of which no list was given is passed over."""
    if listing.tree is None:
        return []
    top = f"{listing.root}/"
    used = {os.path.normpath(video.path).removeprefix(top) for video in listing.videos} | listing.unused
    others = set(SPLITS) - {video.split for video in listing.videos}
    return [
        name.encode(errors="backslashreplace").decode()
        for name in listing.tree.videos
        if name not in used and name.partition("/")[0] not in others
    ]


def _tell(videos: Sequence[tuple[SourceVideo, str]], excluded: Sequence[bool], extra: Sequence[str]) -> list[str]:
    again = Counter(video.split for video, name in videos if name != video.name)
    held = sum(excluded) - sum(again.values())
    parts = sum(video.start is not None for video, _ in videos)
    notes = [f"{count} videos of {split} are excluded: an earlier list has them too" for split, count in again.items()]
    if held:
        notes.append(f"{held} videos of train are excluded: another split or a held-out list has their YouTube ids")
    if parts:
        notes.append(f"{parts} clips are to be cut from whole videos")
    if extra:
        notes.append(f"{len(extra)} videos below the source are on no list: extra.csv names them")
    return notes


def _place(
    classes: Sequence[str], videos: Sequence[tuple[SourceVideo, str]], excluded: Sequence[bool]
) -> list[PlannedVideo]:
    """The rows of the data set, each with a file of its own. Raises UsageError for labels that are no class."""
    index = {name: place for place, name in enumerate(classes)}
    places = [label_index(video.label, video.where, classes, index) for video, _ in videos]
    folders = _distinct_names(classes)
    homes = [
        f"videos/{video.split}/" + (f"{folders[classes[place]]}/" if place >= 0 else "")
        for (video, _), place in zip(videos, places, strict=True)
    ]
    files = _file_names([name for _, name in videos], homes, excluded)
    position: Counter[str] = Counter()
    planned: list[PlannedVideo] = []
    for (video, name), place, home, file, left_out in zip(videos, places, homes, files, excluded, strict=True):
        _refuse_undecodable_name(video.path)
        planned.append(
            PlannedVideo(
                split=video.split,
                position=position[video.split],
                name=name,
                label=classes[place] if place >= 0 else "",
                source=video.path,
                target=f"{home}{file}.mp4",
                origin=video.origin,
                start=video.start,
                end=video.end,
                excluded="duplicate" if left_out else "",
            )
        )
        position[video.split] += 1
    return planned


def _distinct_names(names: Iterable[str]) -> dict[str, str]:
    """A folder name for each class name, itself wherever a file system allows it."""
    safe = {name: _safe(name) for name in names}
    taken = Counter(folder.casefold() for folder in safe.values())
    return {name: folder if taken[folder.casefold()] == 1 else _marked(folder, name) for name, folder in safe.items()}


def _file_names(names: Sequence[str], homes: Sequence[str], excluded: Sequence[bool]) -> list[str]:
    """A file name (no suffix) for each video, its own unless two that are prepared would meet in one folder."""
    stems = [_safe(os.path.splitext(os.path.basename(name))[0]) for name in names]
    keys = [(home, stem.casefold()) for home, stem in zip(homes, stems, strict=True)]
    taken = Counter(key for key, left_out in zip(keys, excluded, strict=True) if not left_out)
    return [
        stem if taken[key] == 1 and not left_out else _marked(stem, name)
        for name, stem, key, left_out in zip(names, stems, keys, excluded, strict=True)
    ]


def _safe(name: str) -> str:
    """A name without separators, control characters and a leading dot, short enough for a file system."""
    clean = UNSAFE.sub("_", name) or "_"
    return (
        clean
        if len(clean.encode()) <= LONGEST_NAME
        else _marked(clean.encode()[:LONGEST_NAME].decode("utf-8", "ignore"), name)
    )


def _marked(name: str, whole: str) -> str:
    return f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _refuse_undecodable_name(path: str) -> None:
    if path.isascii():
        return
    try:
        path.encode()
    except UnicodeEncodeError as fault:
        raise UsageError(f"{path!a}: the file name is not UTF-8; rename it") from fault
