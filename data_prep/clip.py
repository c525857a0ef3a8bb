"""One raw video in, one checked video out; runs in a process of its own that may be killed at any moment."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from data_prep.encode import H264, ticks, write_video
from data_prep.pool import Allow
from video_swinv2.data.decode import DecodeError, VideoReader, size_for
from video_swinv2.files import PART_SUFFIX, keep, part_of, sha256

# Without the accurate flags a change of colour matrix darkens the picture by two to three grey levels.
SCALING = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
)
# Below this share of decodable frames a video is damaged goods, above it a few frames short.
SOUND_SHARE = 0.9
FULL_HD = 1920 * 1080
# Faults of the disk, not of the video: they would fail every other video too.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


@dataclass(frozen=True)
class Task:
    """What to make of which file: `short_side` in pixels is a ceiling, nothing is enlarged."""

    row: int
    source: Path
    target: Path
    short_side: int
    encoding: H264


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


class CheckError(Exception):
    """The file written does not read back as it was meant."""


def prepare_clip(task: Task, allow: Allow) -> Outcome:
    """Decode, resize, encode and check one video; never raises. `allow` is told how long that may take once known."""
    started = time.monotonic()
    known = Outcome()
    part = part_of(task.target)
    try:
        known = _identify(task.source)
        known = _transcode(task, part, known, allow)
        keep(part, task.target)
    except Exception as fault:
        reason, detail = _diagnose(fault)
        known = replace(known, reason=reason, detail=detail)
        part.unlink(missing_ok=True)
    return replace(known, seconds=time.monotonic() - started)


def seconds_to_index(size: int) -> float:
    """How long reading a file of `size` bytes may take before its duration is known."""
    return 60.0 + 10.0 * size / 2**20


def seconds_to_encode(duration_seconds: float, pixels: int) -> float:
    """How long a video may take: some hundred times what it needs on one core."""
    return 60.0 + 30.0 * duration_seconds * max(1.0, pixels / FULL_HD)


def target_size(shown: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) to encode: the short side at most as asked, both even, the aspect ratio kept."""
    short = max(2, min(short_side, *shown) // 2 * 2)
    return size_for(shown, short)


def _identify(source: Path) -> Outcome:
    try:
        status = source.stat()
        return Outcome(source_size=status.st_size, source_mtime_ns=status.st_mtime_ns, source_sha256=sha256(source))
    except FileNotFoundError as fault:
        raise DecodeError(f"{source}: no such file", "missing") from fault
    except OSError as fault:
        raise DecodeError(f"{source}: {fault.strerror}") from fault


def _transcode(task: Task, part: Path, known: Outcome, allow: Allow) -> Outcome:
    with VideoReader(task.source, time_limit_seconds=float("inf")) as reader:
        known = replace(known, codec=reader.codec)
        duration = float(reader.times[-1] - reader.times[0]) + 1 / reader.fps
        allow(seconds_to_encode(duration, reader.size[0] * reader.size[1]))
        size = target_size(reader.size, task.short_side)
        written: list[int] = []
        pictures = _pictures(reader, size, written)
        try:
            write_video(part, pictures, size=size, fps=reader.fps, settings=task.encoding)
        except av.FFmpegError as fault:
            raise OSError(getattr(fault, "errno", 0) or 0, f"while encoding: {fault.strerror}") from fault
        lost = len(reader) - len(written)
        if len(written) < SOUND_SHARE * len(reader):
            raise DecodeError(f"{task.source}: only {len(written)} of {len(reader)} frames can be decoded")
    _check(part, size, written)
    return replace(
        known,
        detail=f"{lost} of {lost + len(written)} frames could not be decoded" if lost else "",
        sha256=sha256(part),
        frames=len(written),
        fps=reader.fps,
        height=size[0],
        width=size[1],
        duration_seconds=duration,
    )


def _pictures(reader: VideoReader, size: tuple[int, int], written: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, picture to encode) of every frame that decodes; the ticks go into `written` too."""
    moments = ticks(reader.times.tolist())
    resize = VideoReformatter()
    turn = reader.orientation
    first = last = -1
    for index, frame in reader.sequence():
        if index <= last:
            continue
        first, last = (index if first < 0 else first), index
        height, width = (size[1], size[0]) if turn.transpose else size
        if any(turn):
            lying = resize.reformat(frame, width, height, "rgb24", interpolation=SCALING, threads=1).to_ndarray()
            upright = turn.apply(np.asarray(lying, dtype=np.uint8))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(upright), format="rgb24")
            height, width = size
        # Everything becomes limited-range BT.601, which is also what readers assume of a file that says nothing.
        picture = resize.reformat(
            frame,
            width,
            height,
            "yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            interpolation=SCALING,
            threads=1,
        )
        picture.pict_type = PictureType.NONE  # else x264 repeats the source's key frames and B-frames
        written.append(moments[index] - moments[first])
        yield written[-1], picture


def _check(path: Path, size: tuple[int, int], written: list[int]) -> None:
    """Reopen and decode what was written. Raises CheckError."""
    try:
        with VideoReader(path, time_limit_seconds=float("inf")) as reader:
            found = ticks(reader.times.tolist())
            if len(found) != len(written):
                raise CheckError(f"{len(written)} frames written, {len(found)} read back")
            if reader.size != size:
                raise CheckError(f"{size} written, {reader.size} read back")
            if np.abs(np.subtract(found, written)).max() > 1:
                raise CheckError("frame times read back differ from those written")
            decoded = sum(1 for _ in reader.sequence())
            if decoded != len(written):
                raise CheckError(f"{len(written)} frames written, {decoded} decode")
    except DecodeError as fault:
        raise CheckError(str(fault)) from fault


def _diagnose(fault: Exception) -> tuple[str, str]:
    """(reason, last words) of whatever went wrong with a video."""
    if isinstance(fault, MemoryError):
        return "crashed", "out of memory"
    if isinstance(fault, DecodeError):
        return fault.reason, str(fault).partition(": ")[2]
    if isinstance(fault, CheckError):
        return "check_failed", str(fault)
    if isinstance(fault, OSError):
        words = fault.strerror or str(fault)
        return ("disk" if fault.errno in DISK_FAULTS else "encode_error"), words
    return "crashed", f"{type(fault).__name__}: {fault}".splitlines()[0]


def sweep(videos: Path) -> int:
    """Remove the half files a killed run left below `videos`; returns how many."""
    count = 0
    for parent, _, files in os.walk(videos):
        for name in files:
            if name.startswith(".") and name.endswith(PART_SUFFIX):
                Path(parent, name).unlink(missing_ok=True)
                count += 1
    return count
