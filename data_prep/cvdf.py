"""Where the CVD Foundation publishes Kinetics, and reading the text files it publishes there.

The layout, the same in every mirror (from the scripts of github.com/cvdfoundation/kinetics-dataset):
    400/annotations/val.csv, 600/annotations/val.txt    what the split should contain
    400/val/k400_val_path.txt                           one URL of an archive per line
    400/val/part_0.tar.gz                               videos ID_START_END.mp4; 600 and 700_2020 have some per class
    400/replacement_for_corrupted_k400.tgz              videos that replace broken ones, of all splits
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from video_swinv2.data.lists import SPLITS, is_kinetics_list, read_kinetics_lines
from video_swinv2.errors import UserError
from video_swinv2.files import atomic_write

BASE_URL = "https://s3.amazonaws.com/kinetics"
COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
ARCHIVE_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.(tar|tar\.gz|tgz)")
# A video in its class folder. The id is everything before the last two fields, since it may contain underscores itself.
CLIP_LINE = re.compile(
    r"(?:(?:.*/)?(?P<label>[^/]+)/)?(?P<id>[^/\s]+)_(?P<start>\d{6})_(?P<end>\d{6})(?:\.\w+)?(?:\s.*)?"
)
SUM_LINE = re.compile(r"(?P<sum>[0-9a-f]{64}) [ *](?P<name>.+)")


@dataclass(frozen=True)
class KineticsVersion:
    """Where a version of Kinetics is below the base URL, and the file names of its annotations."""

    folder: str
    prefix: str
    annotations: dict[str, str]
    replacement: str = ""


ANNOTATION_TABLES = {split: f"{split}.csv" for split in SPLITS}
VERSIONS = {
    "kinetics400": KineticsVersion("400", "k400", ANNOTATION_TABLES, "replacement_for_corrupted_k400.tgz"),
    # train.csv and val.csv exist too, but lack half of the videos (issue 33 of kinetics-dataset).
    "kinetics600": KineticsVersion("600", "k600", {**ANNOTATION_TABLES, "train": "train.txt", "val": "val.txt"}),
    "kinetics700_2020": KineticsVersion("700_2020", "k700_2020", ANNOTATION_TABLES),
}


@dataclass(frozen=True)
class Archive:
    """An archive of a split: its path below the base URL as the list spells it, and its file name on disk."""

    split: str
    path: str
    name: str

    @property
    def key(self) -> str:
        """Its path below the download folder; identifies it in archives.json."""
        return f"archives/{self.split}/{self.name}"


def text_fault(path: Path) -> str:
    """What is wrong with the file if it is not a UTF-8 list; '' if it is one."""
    try:
        start = path.read_text(encoding="utf-8-sig").lstrip()[:1]
    except UnicodeDecodeError:
        return "not a text file"
    return {"": "an empty file", "<": "a web page or an error message, not a list"}.get(start, "")


def read_part_list(path: Path, split: str, folder: str) -> list[Archive]:
    """The archives in a list of URLs. Raises UserError naming the file and the line.

    Only the part of a URL after `/kinetics/` counts, since a mirror has another base. A URL without that part is taken
    to name a file in `folder`.
    """
    archives: dict[str, Archive] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        whole_path = urlsplit(line.strip()).path
        raw = whole_path.rpartition("/")[2]
        below = whole_path.rpartition("/kinetics/")[2] if "/kinetics/" in whole_path else f"{folder}/{raw}"
        archive = Archive(split, below, unquote(raw))
        if not ARCHIVE_NAME.fullmatch(archive.name) or ".." in unquote(below).split("/"):
            raise UserError(
                f"{path}, line {number}: {line.strip()!r} is not the URL of an archive; fix or remove the line"
            )
        if archives.setdefault(archive.name, archive) != archive:
            raise UserError(f"{path}, line {number}: a second archive named {archive.name!r}; fix or remove the line")
    return list(archives.values())


def read_sums(path: Path) -> dict[str, str]:
    """sha256 by file name, in the format of the sha256sum program. Raises UserError naming the file and the line."""
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        match = SUM_LINE.fullmatch(line.strip())
        if not match:
            raise UserError(f"{path}, line {number}: not a checksum and a file name; fix or remove the line")
        sums[match["name"].removeprefix("./")] = match["sum"]
    return sums


def write_list(published: Path, target: Path, split: str) -> str:
    """Convert a published list to the CSV that `prepare` reads. Returns a remark if its form is unknown, otherwise ''.

    A Kinetics CSV is copied unchanged. Lines that are paths of videos (CLASS/ID_START_END.mp4) are converted to one.
    """
    target.parent.mkdir(exist_ok=True)
    if is_kinetics_list(published):
        with atomic_write(target) as part:
            part.write_bytes(published.read_bytes())
        return ""
    lines = [line.strip() for line in published.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    matches = [match for line in lines if (match := CLIP_LINE.fullmatch(line))]
    if len(matches) < len(lines):
        return f"{published}: unknown form, so {target} was not written; give `prepare` a list of your own"
    with atomic_write(target) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for match in matches:
            label = "" if match["label"] in (*SPLITS, None) else match["label"]
            writer.writerow((label, match["id"], int(match["start"]), int(match["end"]), split))
    return ""


def listed_clips(path: Path, split: str) -> frozenset[str]:
    """The file names, without suffix, of the videos in a Kinetics CSV; empty if there is no CSV."""
    return frozenset(clip.stem for clip in read_kinetics_lines(path, split)) if path.exists() else frozenset()
