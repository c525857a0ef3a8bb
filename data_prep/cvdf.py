"""Where CVDF keeps Kinetics, and the text files it publishes there.

The layout, the same in every copy (read from the scripts of github.com/cvdfoundation/kinetics-dataset):
    400/annotations/val.csv, 600/annotations/val.txt    what the split should hold
    400/val/k400_val_path.txt                           one address of an archive a line
    400/val/part_0.tar.gz                               clips ID_START_END.mp4; 600 and 700_2020 have some per class
    400/replacement_for_corrupted_k400.tgz              clips that take the place of broken ones, of all splits
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

BASE = "https://s3.amazonaws.com/kinetics"
COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
ARCHIVE_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]*\.(tar|tar\.gz|tgz)")
# A clip in its class folder. The id is what is left of the last two fields: it may itself hold underscores.
CLIP_LINE = re.compile(
    r"(?:(?:.*/)?(?P<label>[^/]+)/)?(?P<id>[^/\s]+)_(?P<start>\d{6})_(?P<end>\d{6})(?:\.\w+)?(?:\s.*)?"
)
SUM_LINE = re.compile(r"(?P<sum>[0-9a-f]{64}) [ *](?P<name>.+)")


@dataclass(frozen=True)
class KineticsVersion:
    """Where a version of Kinetics lies below the base, and what its annotations are called."""

    folder: str
    prefix: str
    annotations: dict[str, str]
    replacement: str = ""


TABLES = {split: f"{split}.csv" for split in SPLITS}
VERSIONS = {
    "kinetics400": KineticsVersion("400", "k400", TABLES, "replacement_for_corrupted_k400.tgz"),
    # train.csv and val.csv are there too, but lack half of the clips (issue 33 of kinetics-dataset).
    "kinetics600": KineticsVersion("600", "k600", {**TABLES, "train": "train.txt", "val": "val.txt"}),
    "kinetics700_2020": KineticsVersion("700_2020", "k700_2020", TABLES),
}


@dataclass(frozen=True)
class Archive:
    """An archive of a split: its path below the base as the list writes it, and its file name here."""

    split: str
    path: str
    name: str

    @property
    def key(self) -> str:
        """Its path below the folder of the download."""
        return f"archives/{self.split}/{self.name}"


def text_fault(path: Path) -> str:
    """What else the file is, if it is not a list in UTF-8."""
    try:
        start = path.read_text(encoding="utf-8-sig").lstrip()[:1]
    except UnicodeDecodeError:
        return "not a text file"
    return {"": "an empty file", "<": "a web page or an error message, not a list"}.get(start, "")


def read_part_list(path: Path, split: str, folder: str) -> list[Archive]:
    """The archives of a list of addresses. Of an address only the part below `/kinetics/` counts, as the base may be
    another; where that is not in it, it is taken to lie in `folder`. UserError naming file and line.
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
            raise UserError(f"{path}, line {number}: {line.strip()!r} is no address of an archive; mend or remove it")
        if archives.setdefault(archive.name, archive) != archive:
            raise UserError(f"{path}, line {number}: a second archive named {archive.name!r}; mend or remove it")
    return list(archives.values())


def read_sums(path: Path) -> dict[str, str]:
    """sha256 by file name, as the program sha256sum writes them. UserError naming file and line."""
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        match = SUM_LINE.fullmatch(line.strip())
        if not match:
            raise UserError(f"{path}, line {number}: not a checksum and a file name; mend or remove it")
        sums[match["name"].removeprefix("./")] = match["sum"]
    return sums


def write_list(published: Path, target: Path, split: str) -> str:
    """Write what was published as the CSV that `prepare` reads; returns a note where its form is unknown.

    Kinetics' own columns are kept as they are; lines that are paths of clips (CLASS/ID_START_END.mp4) become them.
    """
    target.parent.mkdir(exist_ok=True)
    if is_kinetics_list(published):
        with atomic_write(target) as part:
            part.write_bytes(published.read_bytes())
        return ""
    lines = [line.strip() for line in published.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    matches = [match for line in lines if (match := CLIP_LINE.fullmatch(line))]
    if len(matches) < len(lines):
        return f"{published}: in a form not known here, so there is no {target}; give `prepare` a list of your own"
    with atomic_write(target) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for match in matches:
            label = "" if match["label"] in (*SPLITS, None) else match["label"]
            writer.writerow((label, match["id"], int(match["start"]), int(match["end"]), split))
    return ""


def listed_clips(path: Path, split: str) -> frozenset[str]:
    """The file names, without suffix, of the clips that a Kinetics CSV lists; none if it is not there."""
    return frozenset(clip.stem for clip in read_kinetics_lines(path, split)) if path.exists() else frozenset()
