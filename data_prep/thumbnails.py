"""Thumbnails of a few prepared videos for the status page: small JPEGs as data URIs.

However large the data set, only a few files are opened, in processes that can be killed, because a file may have been
damaged since it was prepared.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_prep.pool import Allow, run_jobs
from data_prep.state import PreparationState, evenly_spaced
from video_swinv2.data.decode import VideoReader
from video_swinv2.errors import UserError
from video_swinv2.files import path_under

MAX_THUMBNAILS = 24  # also the largest number of classes that have one
FEW_THUMBNAILS = 12  # with fewer classes than this, each class has several
MAX_SIZE = (160, 120)  # width and height in pixels
JPEG_QUALITY = 65  # noise of MAX_SIZE, which compresses worst, then takes 13 kB
LIMIT_SECONDS = 60.0  # for one file; far more than a short clip takes on a busy machine
MEMORY_GIB = 8.0  # of address space for the process that reads them


@dataclass(frozen=True)
class Thumbnail:
    """A frame from the middle of a prepared video. `name` is its path in the data set, `label` its class.

    `uri` is a data URI, or '' if the file cannot be read here.
    """

    name: str
    label: str
    uri: str


def make_thumbnails(
    out: Path, states: Sequence[PreparationState], splits: Sequence[str], classes: Sequence[str]
) -> list[Thumbnail]:
    """Thumbnails of prepared videos, by class. classes: those of which at least one video has been prepared.

    One for each class, or several if there are fewer classes than FEW_THUMBNAILS. Of more classes than MAX_THUMBNAILS,
    evenly spaced ones are chosen.
    """
    chosen = evenly_spaced(classes, min(len(classes), MAX_THUMBNAILS))
    videos = [(name, label) for label in chosen for name in _choose(states, splits, label, len(chosen))]
    paths = {name: path_under(out, name) for name, _ in videos}
    # Files that are not here, such as those of a shard on another machine, need no process to find that out.
    there = [path for path in paths.values() if path.is_file()]
    jpegs: dict[Path, bytes] = {}
    for path, result in run_jobs(draw_thumbnail, there, workers=1, seconds_for=_limit_seconds, memory_gib=MEMORY_GIB):
        jpegs[path] = result if isinstance(result, bytes) else b""
    return [Thumbnail(name, label, _data_uri(jpegs.get(paths[name], b""))) for name, label in videos]


def draw_thumbnail(path: Path, allow: Allow) -> bytes:
    """The middle frame of a video as a JPEG that fits into MAX_SIZE; empty if it cannot be read. Runs in a worker."""
    try:
        # The time limit is that of the job.
        with VideoReader(path, time_limit_seconds=float("inf")) as reader:
            middle = len(reader) // 2
            frame = next(frame for index, frame in reader.sequence(middle) if index >= middle)
            image = Image.fromarray(reader.picture(frame))
    except (UserError, StopIteration):
        return b""
    image.thumbnail(MAX_SIZE)
    jpeg = io.BytesIO()
    image.save(jpeg, format="jpeg", quality=JPEG_QUALITY)
    return jpeg.getvalue()


def _choose(states: Sequence[PreparationState], splits: Sequence[str], label: str, n_classes: int) -> list[str]:
    """The paths of prepared videos of a class, relative to the data set: all of one state, as far as it has any."""
    wanted = max(1, FEW_THUMBNAILS // n_classes)
    for state in states:
        if rows := state.sample_class(splits, label, wanted):
            return [row["target"] for row in rows]
    return []


def _limit_seconds(path: Path) -> float:
    return LIMIT_SECONDS


def _data_uri(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode() if jpeg else ""
