"""Planning a preparation: every listed video with its split, class, segment and path in the data set.

The plan is made in four steps:

list       read the lists of the source, in any known layout       (layouts.py, video_swinv2/data/lists.py)
merge      drop lines that repeat an earlier line, and refuse lines that contradict one
exclude    mark duplicates between lists, and training videos whose YouTube id is held out
place      give each video a path in the data set that is unique and valid on every file system

No video is opened here. Whether the files can be read is found out when they are transcoded.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.groups import GroupRule
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
    first_uses,
    is_kinetics_list,
    read_kinetics_lines,
    read_listed_videos,
    root_folder,
    split_sources,
)
from video_swinv2.data.manifest import classes_of_source, label_indices, notes_on_classes
from video_swinv2.data.rows import read_header
from video_swinv2.errors import UsageError

# File systems allow 255 bytes. The rest leaves room for the hash, the suffix, and the affixes of a partial file.
MAX_NAME_BYTES = 150
# Path separators, control characters, and a leading dot, which would hide the file.
UNSAFE = re.compile(r"[/\\\x00-\x1f\x7f]|^\.")


@dataclass(frozen=True)
class PreparationPlan:
    """What the data set should contain.

    `classes` are in label order. `videos` holds every listed video, including the excluded ones. `extra` holds the
    videos of the source that no list names, as paths relative to the source. `notes` are remarks for the user.
    """

    classes: list[str]
    videos: list[PlannedVideo]
    extra: list[str]
    notes: list[str]


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pause the search for objects that refer to each other. It goes through all rows again and again, and finds none.

    Without it, planning takes three quarters of the time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage_collection()
def plan_preparation(
    source: Path,
    annotations: Sequence[Path] = (),
    *,
    held_out: Sequence[Path] = (),
    official_split: int = 1,
    groups: GroupRule | None = None,
) -> PreparationPlan:
    """Plan the preparation of the videos in `source`, as listed by `annotations` (lists, or folders of lists) if given.

    All layouts of `read_manifest` are supported. In addition, Kinetics lists may refer to whole videos, from which
    segments will be cut, and UCF101, HMDB51 (both with `official_split` 1, 2 or 3) and Something-Something V2 are
    recognised by their official lists. If there are several lists, the plan contains the videos and classes of all.
    Groups that `groups` gives to videos take precedence over those of the lists and of file names.

    Two kinds of videos are listed but excluded: those that an earlier list already has in the same split, and training
    videos whose YouTube id occurs in another split of any list, or in one of the lists `held_out`.

    Raises UsageError naming the line.
    """
    source = Path(source).absolute()
    annotations = [Path(path).absolute() for path in annotations]
    listing = read_official_lists(source, annotations, official_split) or _read_lists(source, annotations)
    if not listing.videos:
        raise UsageError(f"{source}: no videos found; give a folder of videos, a folder of lists, or a CSV")
    given, group_notes = (groups or GroupRule()).apply([(video.name, video.path) for video in listing.videos])
    grouped = [
        video._replace(group=group) if group else video for video, group in zip(listing.videos, given, strict=True)
    ]
    videos, notes = _merge_repeated(grouped)
    notes = [*listing.notes, *group_notes, *notes]
    # Segments of one YouTube video look alike, so a model would be tested on what it has seen in training if they were
    # on both sides.
    held_out_ids, more = _held_out_ids(videos, listing.tree is not None, held_out)
    # A name that differs from the video's own marks a duplicate: _merge_repeated has appended " (2)" or higher.
    excluded = [
        name != video.name or (video.split == "train" and video.youtube_id in held_out_ids) for video, name in videos
    ]
    extra = _unlisted(listing)
    notes += more + _notes(videos, excluded, extra)
    planned = _assign_targets(listing.classes, videos, excluded)
    trained = {video.label for video in planned if video.split == "train" and not video.excluded} - {""}
    notes += notes_on_classes(listing.classes, trained, "train")
    return PreparationPlan(list(listing.classes), planned, extra, notes)


def _read_lists(source: Path, annotations: Sequence[Path]) -> SourceListing:
    """Read a source in any layout other than those of `read_official_lists`."""
    sources = split_sources(source, annotations)
    root = root_folder(source)
    # A folder of class folders needs no tree: its files are the list. Walking a large data set takes a while.
    tree = VideoTree(root) if any(path.is_file() for paths in sources.values() for path in paths) else None
    videos: list[SourceVideo] = []
    ignored: dict[Path, tuple[str, ...]] = {}
    for split, paths in sources.items():
        for path in paths:
            # read_listed_videos can read Kinetics lists too, but only finds trimmed videos, not whole ones.
            if tree and path.is_file() and is_kinetics_list(path):
                videos += read_kinetics_list(path, split, tree)
                continue
            videos += (video_from_row(row, split) for row in read_listed_videos(root, path, split))
            if path.is_file() and (header := read_header(path)) and header.ignored:
                ignored[path] = header.ignored
    notes = [f"{path}: columns that are not used: {', '.join(columns)}" for path, columns in ignored.items()]
    classes = classes_of_source(root, annotations, lambda: first_uses((video.label, video.where) for video in videos))
    return SourceListing(root, classes, videos, tree, notes=notes)


def _merge_repeated(videos: Sequence[SourceVideo]) -> tuple[list[tuple[SourceVideo, str]], list[str]]:
    """Drop repeated lines. Returns (video, name) pairs with names that are unique per split, and remarks.

    `name` is the video's own name, or `NAME (2)`, `NAME (3)`, ... if an earlier list has the same video in this split.
    A line that repeats an earlier line of the same list is dropped. Raises UsageError if the two lines contradict each
    other.
    """
    first: dict[tuple[str, str], SourceVideo] = {}
    copies: Counter[tuple[str, str]] = Counter()
    repeated: Counter[str] = Counter()
    kept: list[tuple[SourceVideo, str]] = []
    for video in videos:
        # Lists may name a file from their folder or from the root of the file system, so a file is known by its path
        # too. A segment is not: the others of its video have the same path.
        whole = video.start is None and video.end is None
        keys = [(video.split, name) for name in (video.name, *([os.path.normpath(video.path)] if whole else []))]
        earlier = next((first[key] for key in keys if key in first), None)
        if earlier is None:
            first |= dict.fromkeys(keys, video)
            kept.append((video, video.name))
            continue
        # The lists of different Kinetics versions share videos, so a repetition between two of them is normal, even
        # with another label. The later line keeps a row of its own, which will be excluded, so that the counts of
        # every list still add up. Lists without YouTube ids must not contradict each other.
        same_list = _list_of(video) == _list_of(earlier)
        same = all(
            getattr(video, field) == getattr(earlier, field) for field in ("label", "group", "path", "start", "end")
        )
        if not same and (same_list or not video.youtube_id):
            where = f"is also listed in {earlier.where}, with another label, group or segment"
            raise UsageError(f"{video.where}: {video.name!r} {where}; remove one")
        if same_list:
            repeated[_list_of(video)] += 1
        else:
            copies[keys[0]] += 1
            kept.append((video, f"{video.name} ({copies[keys[0]] + 1})"))
    return kept, [f"{path}: {count} lines repeat an earlier one and were dropped" for path, count in repeated.items()]


def _list_of(video: SourceVideo) -> str:
    """The path of the list that names the video, that is `where` without the line number or the id."""
    return re.split(r", (?:line|id) \d+$", video.where)[0]


def _held_out_ids(
    videos: Sequence[tuple[SourceVideo, str]], lists: bool, held_out: Sequence[Path]
) -> tuple[set[str], list[str]]:
    """The YouTube ids that must not be in train, and remarks about them. `lists`: whether the source has any list."""
    by_split: dict[str, set[str]] = {}
    if lists:  # without lists, whoever sorted the files into split folders has decided, and nothing is excluded
        for video, _ in videos:
            if video.youtube_id:
                by_split.setdefault(video.split, set()).add(video.youtube_id)
    by_split.pop("train", None)  # val and test remain, and train must not share any id with them
    both = by_split.get("val", set()) & by_split.get("test", set())
    notes = [f"{len(both)} YouTube videos are in both val and test, and are kept in both"] if both else []
    return set().union(*by_split.values(), *map(_youtube_ids, held_out)), notes


def _youtube_ids(path: Path) -> set[str]:
    """The YouTube ids of all splits of a list, or of a folder of lists or videos. Raises UsageError if it has none."""
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
    # '' comes from files whose name does not contain a YouTube id.
    if not ids - {""}:
        raise UsageError(f"{path}: contains no YouTube ids; --held-out needs a Kinetics list")
    return ids - {""}


def _unlisted(listing: SourceListing) -> list[str]:
    """The videos below the root that no list names, as paths relative to it.

    If no list was given for a split, the videos in the folder of that split are not reported: the user prepares, for
    example, only val of a complete download.
    """
    if listing.tree is None:
        return []
    prefix = f"{listing.root}/"
    # Lists may spell a path in several ways, such as `./a.mp4` or `b/../a.mp4`.
    used = {os.path.normpath(video.path).removeprefix(prefix) for video in listing.videos} | listing.unused
    others = set(SPLITS) - {video.split for video in listing.videos}
    # A file name may contain bytes that are not UTF-8. They are escaped, since extra.csv is written as UTF-8.
    return [
        name.encode(errors="backslashreplace").decode()
        for name in listing.tree.videos
        if name not in used and name.partition("/")[0] not in others
    ]


def _notes(videos: Sequence[tuple[SourceVideo, str]], excluded: Sequence[bool], extra: Sequence[str]) -> list[str]:
    """Remarks for the user: what is excluded and why, what will be cut, and what no list names."""
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
    """The planned videos, each with a unique target. Raises UsageError for a label that is not a class.

    The target is videos/SPLIT/CLASS/NAME.mp4, without the class folder if the video has no label.
    """
    labels = _label_indices(classes, [video for video, _ in videos])
    folders = _folder_names(classes)
    homes = [
        f"videos/{video.split}/" + (f"{folders[classes[label]]}/" if label >= 0 else "")
        for (video, _), label in zip(videos, labels, strict=True)
    ]
    files = _file_names([name for _, name in videos], homes, excluded)
    # The position of a video in its split keeps the prepared lists in the order of the source's lists.
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
                group=video.group,
                start=video.start,
                end=video.end,
                excluded="duplicate" if is_excluded else "",
            )
        )
        position[video.split] += 1
    return planned


def _label_indices(classes: Sequence[str], videos: Sequence[SourceVideo]) -> list[int]:
    """The index of each video's class, -1 for no label. Raises UsageError, naming the line, for an unknown label."""
    used: dict[str | int, str] = first_uses((video.label, video.where) for video in videos)
    indices = label_indices(used, classes, classes)
    return [indices[video.label] for video in videos]


def _folder_names(names: Iterable[str]) -> dict[str, str]:
    """A unique folder name for each class: the class name itself if file systems allow it, otherwise a variant."""
    safe = {name: _safe(name) for name in names}
    # casefold, because "Run" and "run" are one folder on file systems that ignore case.
    taken = Counter(folder.casefold() for folder in safe.values())
    return {
        name: folder if taken[folder.casefold()] == 1 else _with_hash(folder, name) for name, folder in safe.items()
    }


def _file_names(names: Sequence[str], homes: Sequence[str], excluded: Sequence[bool]) -> list[str]:
    """A file name without suffix for each video: its own stem, plus a hash if two would collide in one folder.

    `names`, `homes` (target folders) and `excluded` are parallel. Names that differ only in case collide as well, since
    some file systems do not distinguish them.
    """
    stems = [_safe(os.path.splitext(os.path.basename(name))[0]) for name in names]
    keys = [(home, stem.casefold()) for home, stem in zip(homes, stems, strict=True)]
    # Excluded videos are never written, so a prepared one keeps its own name even if an excluded one shares it. The
    # excluded one gets the hash, because targets are UNIQUE in prep.sqlite even for videos that are not prepared.
    taken = Counter(key for key, is_excluded in zip(keys, excluded, strict=True) if not is_excluded)
    return [
        stem if taken[key] == 1 and not is_excluded else _with_hash(stem, name)
        for name, stem, key, is_excluded in zip(names, stems, keys, excluded, strict=True)
    ]


def _safe(name: str) -> str:
    """The name with unsafe characters replaced by `_`, shortened to MAX_NAME_BYTES plus a hash if it is too long."""
    clean = UNSAFE.sub("_", name) or "_"
    # "ignore" drops the remainder of a multi-byte character that the cut has divided.
    return (
        clean
        if len(clean.encode()) <= MAX_NAME_BYTES
        else _with_hash(clean.encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore"), name)
    )


def _with_hash(name: str, whole: str) -> str:
    """The name plus eight hexadecimal digits of the sha256 of `whole`, the original name, which makes it unique."""
    return f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _refuse_undecodable_name(path: str) -> None:
    """Raise UsageError if a path is not valid UTF-8, since neither prep.sqlite nor a CSV could store it."""
    # Python represents such bytes as lone surrogates, which cannot be encoded. isascii is a fast path for most names.
    if path.isascii():
        return
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"{path!a}: the file name is not valid UTF-8; rename the file") from error
