"""A job, which says how to prepare one video, its outcome, and its time limits.

Jobs and outcomes are plain data: they are pickled on their way between the parent process and its workers.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from sqlite3 import Row

from data_prep.encode import H264Settings
from video_swinv2.files import path_under

# To be incremented whenever a change of the code makes the same settings produce different files. It is part of the
# settings' hash, so videos prepared with an older version are prepared again. In dataset.json it is called "form".
OUTPUT_VERSION = 3
FULL_HD = 1920 * 1080  # pixels
MAX_LIMIT_SECONDS = 24 * 3600.0  # of any job, whatever its file says


@dataclass(frozen=True)
class TranscodeSettings:
    """How every video of a data set is prepared.

    `short_side`, in pixels, is an upper limit: smaller videos are not enlarged. `gop` is the number of frames from one
    key frame to the next. `fps` is a constant frame rate to convert to; with None every frame keeps its own time.
    `copy` copies sources that already have the prepared form instead of encoding them again. Videos shorter than
    `min_seconds` fail as too_short.
    """

    short_side: int = 320
    gop: int = 16
    fps: float | None = None
    copy: bool = False
    min_seconds: float = 0.0

    @property
    def encoding(self) -> H264Settings:
        """The settings of the encoder. Only the key frame distance can be chosen by the user."""
        return H264Settings(gop=self.gop)

    def record(self) -> dict[str, object]:
        """Everything that determines the form of a prepared file, as stored in dataset.json."""
        return {"made_by": "prepare", "form": OUTPUT_VERSION, **asdict(self), **asdict(self.encoding)}

    def hash(self) -> str:
        """The sha256 of the record. Videos whose row in prep.sqlite has a different one are prepared again."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True, allow_nan=False).encode()).hexdigest()


@dataclass(frozen=True)
class TranscodeJob:
    """One video to prepare.

    `row_id` is the id of its row in prep.sqlite. `source` and `target` are absolute. `start` and `end`, in seconds from
    the first frame, bound the segment to cut out; None means from the beginning and to the end.
    """

    row_id: int
    source: Path
    target: Path
    settings: TranscodeSettings
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended. The fields are columns of prep.sqlite. After a failure, those that are not known are None.

    `reason` is '' if the video was prepared, a key of outcomes.REASONS if it failed, or 'disk' if the run has to stop.
    `sha256`, `frames`, `fps`, `height` and `width` describe the prepared file, `codec` the source. `duration_seconds`
    is that of the frames kept; `seconds` is how long the job took.
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
    """The job for a row of the prep.sqlite of data set `out`. Raises UserError if its target is not inside `out`."""
    source, target = Path(row["source"]), path_under(out, row["target"])
    return TranscodeJob(row["id"], source, target, settings, row["start_seconds"], row["end_seconds"])


def size_and_mtime(source: str | Path) -> tuple[int | None, int | None]:
    """(size in bytes, modification time in ns) of a file; (None, None) if it does not exist or cannot be examined."""
    try:
        status = os.stat(source)
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


# The time limits exist to end jobs that hang, not to make slow ones fail. They are therefore generous: a minute for
# slow file systems and busy machines, and then far more than the work takes.


def initial_limit_seconds(job: TranscodeJob) -> float:
    """The time limit of a job until the frames of its video are known: that for reading its index."""
    return index_limit_seconds(size_and_mtime(job.source)[0] or 0)


def index_limit_seconds(size_bytes: int) -> float:
    """The time limit for reading all packets of a file: a minute, and 10 s per MiB; at most a day."""
    return min(MAX_LIMIT_SECONDS, 60.0 + 10.0 * size_bytes / 2**20)


def encode_limit_seconds(size_bytes: int, frames: int, pixels: int, written: int = 0, written_pixels: int = 0) -> float:
    """The time limit for decoding `frames` frames of `pixels` pixels and writing `written` of `written_pixels`.

    That for reading the index, and 1.2 s per frame, about a hundred times what it takes on one core; above Full HD it
    grows with the number of pixels. A written frame adds 0.5 s at Full HD, ten times what it takes to encode, read back
    and decode one that repeats the one before. At most a day. Frames are counted and not seconds: what a file says
    about its duration costs it nothing, but every frame is in the file.
    """
    decoding = 1.2 * frames * max(1.0, pixels / FULL_HD)
    writing = 0.5 * written * written_pixels / FULL_HD
    return min(MAX_LIMIT_SECONDS, index_limit_seconds(size_bytes) + decoding + writing)
