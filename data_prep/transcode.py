"""One raw video in, one checked video out; runs in a process of its own that may be killed at any moment."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from sqlite3 import Row

import av
import numpy as np

from data_prep.encode import TIME_BASE, H264Settings, difference_from_prepared_form, to_ticks, write_video
from data_prep.picture import Fitter
from data_prep.pool import Allow
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.display import size_for
from video_swinv2.files import PARTIAL_SUFFIX, commit_file, sha256

# Raised when the same settings would give other bytes; part of what decides whether an old output still counts.
FORM = 2
# Below this share of decodable frames, or of the time they span, a video is damaged goods; above it a few frames short.
SOUND_SHARE = 0.9
# A segment of which the source holds less than this is not what the list speaks of.
SEGMENT_SHARE = 0.5
# Times are sums of fractions: two that mean the same moment may differ by far less than any frame lasts.
SAME_SECONDS = 1e-6
FULL_HD = 1920 * 1080
# Faults of the disk, not of the video: they would fail every other video too.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
PARTIAL_FILE = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?" + re.escape(PARTIAL_SUFFIX))


@dataclass(frozen=True)
class TranscodeSettings:
    """How every video of a data set is made.

    `short_side` in pixels is a ceiling, nothing is enlarged. `fps` asks for a constant rate; without it every frame
    keeps its own time. `copy` keeps the bytes of a source that is of the prepared form. A video of less than
    `min_seconds` is too short.
    """

    short_side: int = 320
    gop: int = 16
    fps: float | None = None
    copy: bool = False
    min_seconds: float = 0.0

    @property
    def encoding(self) -> H264Settings:
        """What the encoder is told."""
        return H264Settings(gop=self.gop)

    def record(self) -> dict[str, object]:
        """All that decides the form of an output, for dataset.json."""
        return {"made_by": "prepare", "form": FORM, **asdict(self), **asdict(self.encoding)}

    def hash(self) -> str:
        """sha256 of the record."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TranscodeJob:
    """What to make of which file; `start` and `end`, seconds from its first frame on, bound the part to cut out."""

    row: int
    source: Path
    target: Path
    settings: TranscodeSettings
    start: float | None = None
    end: float | None = None


def job_for_row(row: Row, out: Path, settings: TranscodeSettings) -> TranscodeJob:
    """What to do for a row of the state of `out`."""
    source, target = Path(row["source"]), out / row["target"]
    return TranscodeJob(row["id"], source, target, settings, row["start_seconds"], row["end_seconds"])


@dataclass(frozen=True)
class Outcome:
    """What became of a video. `reason`: '' for a good one, 'disk' where the run has to stop, else of state.REASONS."""

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


@dataclass
class _Made:
    """What went into the file: how many frames of the source, the source's last moment, and the ticks written."""

    decoded: int = 0
    reached: int = 0
    ticks: list[int] = field(default_factory=list)


class ReadBackError(Exception):
    """The file written does not read back as it was meant."""


def transcode_video(task: TranscodeJob, allow: Allow) -> Outcome:
    """Decode, resize, encode and check one video; never raises. `allow` is told how long that may take once known."""
    started = time.monotonic()
    known = Outcome()
    part = _unique_partial_path(task.target)
    try:
        known = _identify(task.source)
        task.target.parent.mkdir(parents=True, exist_ok=True)
        known = _make(task, part, known, allow)
        commit_file(part, task.target)
    except Exception as fault:
        reason, detail = _diagnose(fault)
        known = replace(known, reason=reason, detail=detail)
        part.unlink(missing_ok=True)
    return replace(known, seconds=time.monotonic() - started)


def size_and_mtime(source: str | Path) -> tuple[int | None, int | None]:
    """(bytes, time of change in ns) of a file; None for what is not there."""
    try:
        status = os.stat(source)
    except OSError:
        return None, None
    return status.st_size, status.st_mtime_ns


def initial_limit_seconds(task: TranscodeJob) -> float:
    """How long a task may take until it knows better."""
    return index_limit_seconds(size_and_mtime(task.source)[0] or 0)


def index_limit_seconds(size: int) -> float:
    """How long reading a file of `size` bytes may take before its duration is known."""
    return 60.0 + 10.0 * size / 2**20


def encode_limit_seconds(duration_seconds: float, pixels: int) -> float:
    """How long a video may take: some hundred times what it needs on one core."""
    return 60.0 + 30.0 * duration_seconds * max(1.0, pixels / FULL_HD)


def output_size(shown: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) to encode: the short side at most as asked, both even, the aspect ratio kept."""
    short = max(2, min(short_side, *shown) // 2 * 2)
    return size_for(shown, short)


def _unique_partial_path(target: Path) -> Path:
    """A hidden name of its own for each try: a try that a cluster gave up may still be writing elsewhere."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


def remove_partial_files(videos: Path, ours: Callable[[Path], bool] = lambda target: True) -> int:
    """Remove the half files below `videos` that a killed run left of targets that are `ours`; returns how many."""
    count = 0
    for parent, _, files in os.walk(videos):
        for name in files:
            if (half := PARTIAL_FILE.fullmatch(name)) and ours(Path(parent, half["name"])):
                Path(parent, name).unlink(missing_ok=True)
                count += 1
    return count


def _identify(source: Path) -> Outcome:
    try:
        status = source.stat()
        return Outcome(source_size=status.st_size, source_mtime_ns=status.st_mtime_ns, source_sha256=sha256(source))
    except FileNotFoundError as fault:
        raise DecodeError(f"{source}: no such file", "missing") from fault
    except OSError as fault:
        raise DecodeError(f"{source}: {fault.strerror}") from fault


def _make(task: TranscodeJob, part: Path, known: Outcome, allow: Allow) -> Outcome:
    """Write and check the file; what is known of it."""
    settings = task.settings
    with VideoReader(task.source, time_limit_seconds=float("inf")) as reader:
        known = replace(known, codec=reader.codec)
        chosen = _chosen(reader, task)
        times = reader.times[chosen.start : chosen.stop]
        rate = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else reader.fps
        duration = float(times[-1] - times[0]) + 1 / rate
        # Where packets do not tell the frames apart, a part is reached by decoding all that comes before it.
        reach = float(times[-1] - reader.times[0]) + 1 / reader.fps
        allow(
            encode_limit_seconds(reach, reader.size[0] * reader.size[1]) + index_limit_seconds(known.source_size or 0)
        )
        known = replace(known, duration_seconds=duration)
        if duration < settings.min_seconds - SAME_SECONDS:
            raise DecodeError(f"{task.source}: {duration:.2f} s, less than {settings.min_seconds:g}", "too_short")
        if settings.copy and _copy(reader, task, part):
            size, fps, made = reader.size, rate, _Made(len(times), ticks=to_ticks(times.tolist()))
        else:
            size, fps = output_size(reader.size, settings.short_side), settings.fps or rate
            made = _encode(reader, chosen, part, size, rate, settings)
            _check(part, size, made.ticks)
    lost = len(times) - made.decoded
    return replace(
        known,
        detail=f"{lost} of {len(times)} frames could not be decoded" if lost else "",
        sha256=sha256(part),
        frames=len(made.ticks),
        fps=fps,
        height=size[0],
        width=size[1],
    )


def _chosen(reader: VideoReader, task: TranscodeJob) -> range:
    """The frames to keep: all, or those of the segment by their real times. Raises DecodeError where that is short."""
    if task.start is None and task.end is None:
        return range(len(reader))
    start, end = task.start or 0.0, float("inf") if task.end is None else task.end
    times = reader.times - reader.times[0] + SAME_SECONDS
    first, stop = (int(place) for place in np.searchsorted(times, (start, end)))
    lasts = min(float(times[-1]) + 1 / reader.fps, end) - start
    asked = end - start if task.end is not None else 0.0
    if first == stop or lasts < SEGMENT_SHARE * asked:
        have = f"the source ends at {times[-1] + 1 / reader.fps:.2f} s"
        raise DecodeError(f"{task.source}: segment {start:g} to {end:g} s, but {have}", "too_short")
    return range(first, stop)


def _copy(reader: VideoReader, task: TranscodeJob, part: Path) -> bool:
    """Copy a source that is of the prepared form and decodes fully; False where it has to be encoded."""
    settings, whole = task.settings, task.start is None and task.end is None
    if (
        not whole
        or any(reader.orientation)
        or difference_from_prepared_form(task.source, short_side=settings.short_side, gop=settings.gop)
    ):
        return False
    moments = to_ticks(reader.times.tolist())
    if settings.fps and np.abs(np.arange(len(moments)) / settings.fps / float(TIME_BASE) - moments).max() > 1:
        return False
    shutil.copyfile(task.source, part)
    try:
        _check(part, reader.size, moments)
    except ReadBackError:
        return False
    return True


def _encode(
    reader: VideoReader, chosen: range, part: Path, size: tuple[int, int], rate: float, settings: TranscodeSettings
) -> _Made:
    """Encode the chosen frames. Raises DecodeError where too many of them are lost, OSError."""
    made = _Made()
    frames = _decoded(reader, chosen, made)
    if settings.fps:
        frames = _paced(frames, settings.fps, 1 / rate)
    fps = settings.fps or rate
    try:
        write_video(part, _pictures(reader, frames, size, made), size=size, fps=fps, settings=settings.encoding)
    except av.FFmpegError as fault:
        raise OSError(getattr(fault, "errno", 0) or 0, f"while encoding: {fault.strerror}") from fault
    times = reader.times[chosen.start : chosen.stop]
    if made.decoded < SOUND_SHARE * len(times):
        raise DecodeError(f"{reader.path}: only {made.decoded} of {len(times)} frames can be decoded")
    lasts, asked = made.reached * float(TIME_BASE), float(times[-1] - times[0])
    if lasts < SOUND_SHARE * asked:
        raise DecodeError(f"{reader.path}: what can be decoded lasts {lasts:.2f} of {asked:.2f} s")
    return made


def _decoded(reader: VideoReader, chosen: range, made: _Made) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, frame) of every chosen frame that decodes, from the first of them on; counted in `made`."""
    moments = to_ticks(reader.times[chosen.start : chosen.stop].tolist())
    first, last = 0, chosen.start - 1
    for index, frame in reader.sequence(chosen.start):
        if index >= chosen.stop:
            return
        if index <= last:
            continue
        tick = moments[index - chosen.start]
        first, last = (first if made.decoded else tick), index
        made.decoded += 1
        made.reached = tick - first
        yield tick - first, frame


def _paced(
    frames: Iterator[tuple[int, av.VideoFrame]], fps: float, last_seconds: float
) -> Iterator[tuple[int, av.VideoFrame]]:
    """At a constant rate: at each moment the frame that is shown then, repeated or passed over as that takes."""
    count = 0
    shown: av.VideoFrame | None = None
    tick = 0
    for tick, frame in frames:
        while shown is not None and (moment := round(count / fps / TIME_BASE)) < tick:
            yield moment, shown
            count += 1
        shown = frame
    if shown is not None:
        total = max(1, count, round((tick * TIME_BASE + last_seconds) * fps))
        yield from ((round(place / fps / TIME_BASE), shown) for place in range(count, total))


def _pictures(
    reader: VideoReader, frames: Iterator[tuple[int, av.VideoFrame]], size: tuple[int, int], made: _Made
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, picture to encode), upright and resized to (height, width); the ticks go into `made` too."""
    fitter = Fitter(size, reader.orientation)
    shown: av.VideoFrame | None = None
    for tick, frame in frames:
        if frame is not shown:
            shown, picture = frame, fitter.fit(frame)
        made.ticks.append(tick)
        yield tick, picture


def _check(path: Path, size: tuple[int, int], written: list[int]) -> None:
    """Reopen and decode what was written. Raises ReadBackError."""
    try:
        with VideoReader(path, time_limit_seconds=float("inf")) as reader:
            found = to_ticks(reader.times.tolist())
            if len(found) != len(written):
                raise ReadBackError(f"{len(written)} frames written, {len(found)} read back")
            if reader.size != size:
                raise ReadBackError(f"{size} written, {reader.size} read back")
            if np.abs(np.subtract(found, written)).max() > 1:
                raise ReadBackError("frame times read back differ from those written")
            decoded = sum(1 for _ in reader.sequence())
            if decoded != len(written):
                raise ReadBackError(f"{len(written)} frames written, {decoded} decode")
    except DecodeError as fault:
        raise ReadBackError(str(fault)) from fault


def _diagnose(fault: Exception) -> tuple[str, str]:
    """(reason, last words) of whatever went wrong with a video."""
    if isinstance(fault, MemoryError):
        return "crashed", "out of memory"
    if isinstance(fault, DecodeError):
        return fault.reason, str(fault).partition(": ")[2]
    if isinstance(fault, ReadBackError):
        return "check_failed", str(fault)
    if isinstance(fault, OSError):
        words = fault.strerror or str(fault)
        return ("disk" if fault.errno in DISK_FAULTS else "encode_error"), words
    return "crashed", f"{type(fault).__name__}: {fault}".splitlines()[0]
