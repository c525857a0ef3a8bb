"""The layout in which the CVD Foundation (CVDF) publishes Kinetics, and readers for the text files it contains.

Every mirror has the same layout, as used by the scripts of github.com/cvdfoundation/kinetics-dataset:
    400/annotations/val.csv, 600/annotations/val.txt    the videos that the split should contain
    400/val/k400_val_path.txt                           the URLs of the archives of the split, one per line
    400/val/part_0.tar.gz                               videos ID_START_END.mp4; 600 and 700_2020 have some per class
    400/replacement_for_corrupted_k400.tgz              videos of all splits that replace broken ones
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from video_swinv2.data.lists import SPLITS, is_kinetics_list, read_kinetics_lines
from video_swinv2.errors import UserError
from video_swinv2.files import atomic_write, read_text_lines

BASE_URL = "https://s3.amazonaws.com/kinetics"
COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
# A plain file name: no separators or control characters, and no leading dot, which would hide the file.
ARCHIVE_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.(tar|tar\.gz|tgz)")
# A path CLASS/ID_START_END.mp4, optionally below other folders and followed by more fields. The id is everything before
# the two times, since it may contain underscores itself.
CLIP_LINE = re.compile(
    r"(?:(?:.*/)?(?P<label>[^/]+)/)?(?P<id>[^/\s]+)_(?P<start>\d{6})_(?P<end>\d{6})(?:\.\w+)?(?:\s.*)?"
)
# A line of the sha256sum program. It separates hash and name by two spaces, or by " *" for a file read in binary mode.
SUM_LINE = re.compile(r"(?P<sum>[0-9a-f]{64}) [ *](?P<name>.+)")


@dataclass(frozen=True)
class KineticsVersion:
    """Where the files of one version of Kinetics are.

    `folder` is relative to the base URL, and `prefix` begins the names of the lists of archives. `annotations` gives
    the file name of the annotations by split. `replacement` is the archive with the replacements of broken videos; ''
    if the version has none.
    """

    folder: str
    prefix: str
    annotations: dict[str, str]
    replacement: str = ""


ANNOTATION_TABLES = {split: f"{split}.csv" for split in SPLITS}
VERSIONS = {
    "kinetics400": KineticsVersion("400", "k400", ANNOTATION_TABLES, "replacement_for_corrupted_k400.tgz"),
    # There are also train.csv and val.csv, but half of the videos are missing from them (issue 33 of kinetics-dataset).
    "kinetics600": KineticsVersion("600", "k600", {**ANNOTATION_TABLES, "train": "train.txt", "val": "val.txt"}),
    "kinetics700_2020": KineticsVersion("700_2020", "k700_2020", ANNOTATION_TABLES),
}


@dataclass(frozen=True)
class Archive:
    """An archive of a split.

    `path` is relative to the base URL and still percent-encoded, as in the list. `name` is the decoded file name on
    disk.
    """

    split: str
    path: str
    name: str

    @property
    def key(self) -> str:
        """The path relative to the download folder, which also identifies the archive in archives.json."""
        return f"archives/{self.split}/{self.name}"


def text_fault(path: Path) -> str:
    """What is wrong with a file that should be a text list; '' if it can be one."""
    # The first character shows whether it is HTML or XML, which some servers send with status 200 for an absent file.
    try:
        start = path.read_text(encoding="utf-8-sig").lstrip()[:1]
    except UnicodeDecodeError:
        return "not a text file"
    return {"": "an empty file", "<": "a web page or an error message, not a list"}.get(start, "")


def read_part_list(path: Path, split: str, folder: str) -> list[Archive]:
    """The archives in a list of URLs, without repetitions. Raises UserError naming the file and the line.

    Only the part of a URL after `/kinetics/` is used, because a mirror has another base but often keeps the original
    lists. If a URL does not contain `/kinetics/`, its file name is looked for in `folder`.
    """
    archives: dict[str, Archive] = {}
    for number, line in enumerate(read_text_lines(path), start=1):
        if not line.strip():
            continue
        whole_path = urlsplit(line.strip()).path
        raw = whole_path.rpartition("/")[2]  # still percent-encoded, as it has to be in a request
        below = whole_path.rpartition("/kinetics/")[2] if "/kinetics/" in whole_path else f"{folder}/{raw}"
        archive = Archive(split, below, unquote(raw))
        # The list comes from the network, so its names must not lead outside the download folder or the source. The
        # decoded name is checked, because %2e%2e also means "..".
        if not ARCHIVE_NAME.fullmatch(archive.name) or ".." in unquote(below).split("/"):
            raise UserError(
                f"{path}, line {number}: {line.strip()!r} is not the URL of an archive; fix or remove the line"
            )
        # A repeated line is harmless. Two archives with the same name would overwrite each other on disk.
        if archives.setdefault(archive.name, archive) != archive:
            raise UserError(f"{path}, line {number}: a second archive named {archive.name!r}; fix or remove the line")
    return list(archives.values())


def read_sums(path: Path) -> dict[str, str]:
    """Read a file written by the sha256sum program. Returns the hexadecimal sha256 by file name.

    Raises UserError naming the file and the line.
    """
    sums = {}
    for number, line in enumerate(read_text_lines(path), start=1):
        match = SUM_LINE.fullmatch(line.strip())
        if not match:
            raise UserError(f"{path}, line {number}: not a checksum and a file name; fix or remove the line")
        sums[match["name"].removeprefix("./")] = match["sum"]
    return sums


def write_list(published: Path, target: Path, split: str) -> str:
    """Convert a published list to the CSV that `prepare` reads.

    A Kinetics CSV is copied unchanged. A list of paths of videos (CLASS/ID_START_END.mp4) is converted to such a CSV.
    Returns '' if that succeeded. A list in any other form is not converted, and a remark for the user is returned: the
    videos can be downloaded all the same.
    """
    target.parent.mkdir(exist_ok=True)
    if is_kinetics_list(published):
        with atomic_write(target) as part:
            part.write_bytes(published.read_bytes())
        return ""
    lines = [line.strip() for line in read_text_lines(published) if line.strip()]
    matches = [match for line in lines if (match := CLIP_LINE.fullmatch(line))]
    if len(matches) < len(lines):
        return f"{published}: unknown form, so {target} was not written; give `prepare` a list of your own"
    with atomic_write(target) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for match in matches:
            # The folder above a video is usually its class, but in a list without classes it may be the split.
            label = "" if match["label"] in (*SPLITS, None) else match["label"]
            writer.writerow((label, match["id"], int(match["start"]), int(match["end"]), split))
    return ""


def listed_clips(path: Path, split: str) -> frozenset[str]:
    """The file names, without suffix, of the videos in a Kinetics CSV; empty if the CSV does not exist."""
    return frozenset(clip.stem for clip in read_kinetics_lines(path, split)) if path.exists() else frozenset()
