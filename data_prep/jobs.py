"""What to do with one video and how it went: the plain data that travels between the parent process and its workers."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from sqlite3 import Row

from data_prep.encode import H264Settings

# Incremented whenever the same settings would produce different bytes. It is part of what decides whether a prepared
# file is still valid, and is stored as "form" in dataset.json.
OUTPUT_VERSION = 2
FULL_HD = 1920 * 1080  # pixels


@dataclass(frozen=True)
class TranscodeSettings:
    """How every video of a data set is prepared.

    `short_side` in pixels is an upper limit: nothing is enlarged. `gop` is the number of frames from key frame to key
    frame. `fps` asks for a constant frame rate; with None every frame keeps its own time. `copy` keeps the bytes of
    sources that already have the prepared form. Videos shorter than `min_seconds` fail as too_short.
    """

    short_side: int = 320
    gop: int = 16
    fps: float | None = None
    copy: bool = False
    min_seconds: float = 0.0

    @property
    def encoding(self) -> H264Settings:
        """The settings of the encoder."""
        return H264Settings(gop=self.gop)

    def record(self) -> dict[str, object]:
        """Everything that decides the form of a prepared file, as it is stored in dataset.json."""
        return {"made_by": "prepare", "form": OUTPUT_VERSION, **asdict(self), **asdict(self.encoding)}

    def hash(self) -> str:
        """The sha256 of the record. Rows of prep.sqlite with another one are prepared again."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TranscodeJob:
    """One video to prepare. `start` and `end`, in seconds from its first frame, bound the segment to cut out."""

    row_id: int
    source: Path
    target: Path
    settings: TranscodeSettings
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended; the fields are columns of prep.sqlite.

    `reason` is '' if the video was prepared, a key of outcomes.REASONS if it failed, or 'disk' if the run has to stop.
    `fps`, `height`, `width` and `frames` describe the prepared file, `codec` the source; `seconds` is the time taken.
    """

    reason: str = ""
    detail: str = ""
    source_size: int | None = None
    source_mtime_ns: int | None = None
    source_sha256: str | None = None
    sha256: str | None = None
    frames: int | None = None
    fps: float | None = None
    height: int | None = None
    width: int | None = None
    codec: str | None = None
    duration_seconds: float | None = None
    seconds: float = 0.0


def job_for_row(row: Row, out: Path, settings: TranscodeSettings) -> TranscodeJob:
    """The job for a row of the data set's prep.sqlite."""
    source, target = Path(row["source"]), out / row["target"]
    return TranscodeJob(row["id"], source, target, settings, row["start_seconds"], row["end_seconds"])


def size_and_mtime(source: str | Path) -> tuple[int | None, int | None]:
    """(size in bytes, modification time in ns) of a file; (None, None) if there is none."""
    try:
        status = os.stat(source)
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


def initial_limit_seconds(job: TranscodeJob) -> float:
    """The time limit of a job before the duration of its video is known."""
    return index_limit_seconds(size_and_mtime(job.source)[0] or 0)


def index_limit_seconds(size_bytes: int) -> float:
    """The time limit for reading all packets of a file."""
    return 60.0 + 10.0 * size_bytes / 2**20


def encode_limit_seconds(duration_seconds: float, pixels: int) -> float:
    """The time limit for decoding and encoding a video: about a hundred times what it takes on one core."""
    return 60.0 + 30.0 * duration_seconds * max(1.0, pixels / FULL_HD)
