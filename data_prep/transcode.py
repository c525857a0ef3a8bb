"""One raw video in, one checked video out. Runs in a worker process that may be killed at any moment.

    identify     size, mtime and sha256 of the source
    select       the frames to keep: all of them, or those of a segment, by their presentation times
    write        copy the source if it already has the prepared form, otherwise decode -> resize -> encode
    read back    reopen the written file, compare frame count, size and times, and decode every frame
    commit       sync the file to disk and rename it from its hidden name to its target

Times are presentation times in seconds, as VideoReader gives them (edit lists applied), or *ticks* of 1/90000 s counted
from the first frame kept. VideoReader.size is the size as shown: rotated upright, with square pixels.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np

from data_prep.encode import TIME_BASE, difference_from_prepared_form, to_ticks, write_video
from data_prep.jobs import Outcome, TranscodeJob, TranscodeSettings, encode_limit_seconds, index_limit_seconds
from data_prep.picture import Fitter
from data_prep.pool import Allow
from video_swinv2.data.decode import DecodeError, VideoReader
from video_swinv2.data.display import size_for
from video_swinv2.files import PARTIAL_SUFFIX, commit_file, sha256

# A video of which less than this share of the frames decodes, or of the time they should span, fails. Above it, the
# video is prepared with a few frames missing, and `detail` says how many.
MIN_DECODED_SHARE = 0.9
# A segment of which the source holds less than this share is not the segment the list means.
MIN_SEGMENT_SHARE = 0.5
# Times are sums of fractions: two that mean the same moment may differ by rounding, far less than a frame lasts.
TIME_TOLERANCE_SECONDS = 1e-6
# These errors come from the disk, not from the video: they would fail every other video too, so they stop the run.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
PARTIAL_FILE = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?" + re.escape(PARTIAL_SUFFIX))


@dataclass
class _Progress:
    """Counted while frames flow through the generators below.

    `decoded` source frames, the tick of the last of them, and the tick of every frame written.
    """

    decoded: int = 0
    last_tick: int = 0
    written_ticks: list[int] = field(default_factory=list)


class ReadBackError(Exception):
    """The written file does not read back as intended."""


def transcode_video(job: TranscodeJob, allow: Allow) -> Outcome:
    """Decode, resize, encode and check one video. Never raises: an error becomes the reason of the outcome.

    `allow` is called with a new time limit as soon as the duration of the video is known.
    """
    started = time.monotonic()
    known = Outcome()
    partial = _unique_partial_path(job.target)
    try:
        known = _identify(job.source)
        job.target.parent.mkdir(parents=True, exist_ok=True)
        known = _write_checked(job, partial, known, allow)
        commit_file(partial, job.target)
    except Exception as error:
        reason, detail = _diagnose(error)
        known = replace(known, reason=reason, detail=detail)
        partial.unlink(missing_ok=True)
    return replace(known, seconds=time.monotonic() - started)


def output_size(shown_size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """(height, width) to encode: the aspect ratio is kept, the short side is at most `short_side`, both are even."""
    short = max(2, min(short_side, *shown_size) // 2 * 2)
    return size_for(shown_size, short)


def remove_partial_files(videos: Path, is_ours: Callable[[Path], bool] = lambda target: True) -> int:
    """Delete the partial files a killed run left below `videos`, if their target `is_ours`. Returns how many."""
    count = 0
    for parent, _, files in os.walk(videos):
        for name in files:
            if (partial := PARTIAL_FILE.fullmatch(name)) and is_ours(Path(parent, partial["name"])):
                Path(parent, name).unlink(missing_ok=True)
                count += 1
    return count


def _unique_partial_path(target: Path) -> Path:
    """A hidden name that no other attempt uses: an attempt that Dask has given up may still be writing elsewhere."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


def _identify(source: Path) -> Outcome:
    try:
        status = source.stat()
        return Outcome(source_size=status.st_size, source_mtime_ns=status.st_mtime_ns, source_sha256=sha256(source))
    except FileNotFoundError as error:
        raise DecodeError(f"{source}: no such file", "missing") from error
    except OSError as error:
        raise DecodeError(f"{source}: {error.strerror}") from error


def _write_checked(job: TranscodeJob, partial: Path, known: Outcome, allow: Allow) -> Outcome:
    """Write and read back the file. Returns what is now known. Raises DecodeError, ReadBackError, OSError."""
    settings = job.settings
    # No time limit inside the reader: the pool kills the whole process when its limit is exceeded.
    with VideoReader(job.source, time_limit_seconds=float("inf")) as reader:
        known = replace(known, codec=reader.codec)
        selected = _select_frames(reader, job)
        times = reader.times[selected.start : selected.stop]
        # The rate of the frames themselves; the rate in the header is often wrong and VFR files have none.
        rate = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else reader.fps
        duration = float(times[-1] - times[0]) + 1 / rate  # the last frame is shown for one frame period
        # In formats whose packets cannot be told apart, a segment is reached by decoding everything before it.
        decoded_seconds = float(times[-1] - reader.times[0]) + 1 / reader.fps
        pixels = reader.size[0] * reader.size[1]
        allow(encode_limit_seconds(decoded_seconds, pixels) + index_limit_seconds(known.source_size or 0))
        known = replace(known, duration_seconds=duration)
        if duration < settings.min_seconds - TIME_TOLERANCE_SECONDS:
            raise DecodeError(f"{job.source}: {duration:.2f} s, less than {settings.min_seconds:g}", "too_short")
        if settings.copy and _copy(reader, job, partial):
            size, fps = reader.size, rate
            progress = _Progress(len(times), written_ticks=to_ticks(times.tolist()))
        else:
            size, fps = output_size(reader.size, settings.short_side), settings.fps or rate
            progress = _encode(reader, selected, partial, size, rate, settings)
            _read_back(partial, size, progress.written_ticks)
    lost = len(times) - progress.decoded
    return replace(
        known,
        detail=f"{lost} of {len(times)} frames could not be decoded" if lost else "",
        sha256=sha256(partial),
        frames=len(progress.written_ticks),
        fps=fps,
        height=size[0],
        width=size[1],
    )


def _select_frames(reader: VideoReader, job: TranscodeJob) -> range:
    """The indices of the frames to keep: all, or those shown in [start, end). DecodeError if the source is too short.

    By presentation times, never by `start * fps`: frame rates vary, and times in the list are relative to the first
    frame, while the clock of a source may start anywhere.
    """
    if job.start is None and job.end is None:
        return range(len(reader))
    start, end = job.start or 0.0, float("inf") if job.end is None else job.end
    # The tolerance keeps a frame that is exactly at `start` in, and one exactly at `end` out, despite rounding.
    times = reader.times - reader.times[0] + TIME_TOLERANCE_SECONDS
    first, stop = (int(index) for index in np.searchsorted(times, (start, end)))
    source_end = float(times[-1]) + 1 / reader.fps
    available, requested = min(source_end, end) - start, end - start if job.end is not None else 0.0
    if first == stop or available < MIN_SEGMENT_SHARE * requested:
        raise DecodeError(
            f"{job.source}: segment {start:g} to {end:g} s, but the source ends at {source_end:.2f} s", "too_short"
        )
    return range(first, stop)


def _copy(reader: VideoReader, job: TranscodeJob, partial: Path) -> bool:
    """Copy a source that already has the prepared form and decodes completely. False if it must be encoded."""
    settings = job.settings
    if job.start is not None or job.end is not None or any(reader.orientation):
        return False
    if difference_from_prepared_form(job.source, short_side=settings.short_side, gop=settings.gop):
        return False
    source_ticks = to_ticks(reader.times.tolist())
    if settings.fps:
        constant_ticks = np.arange(len(source_ticks)) / settings.fps / float(TIME_BASE)
        if np.abs(constant_ticks - source_ticks).max() > 1:
            return False
    shutil.copyfile(job.source, partial)
    try:
        _read_back(partial, reader.size, source_ticks)
    except ReadBackError:  # damaged: encoding may save most of it
        return False
    return True


def _encode(
    reader: VideoReader,
    selected: range,
    partial: Path,
    size: tuple[int, int],
    rate: float,
    settings: TranscodeSettings,
) -> _Progress:
    """Encode the selected frames. Raises DecodeError if too few of them decode, OSError if encoding fails.

    A chain of generators, so that only a few frames are in memory: decode -> (constant rate) -> resize -> encode.
    """
    progress = _Progress()
    frames = _decode(reader, selected, progress)
    if settings.fps:
        frames = _resample(frames, settings.fps, 1 / rate)
    fps = settings.fps or rate
    try:
        write_video(partial, _resize(reader, frames, size, progress), size=size, fps=fps, settings=settings.encoding)
    except av.FFmpegError as error:
        raise OSError(getattr(error, "errno", 0) or 0, f"while encoding: {error.strerror}") from error
    times = reader.times[selected.start : selected.stop]
    if progress.decoded < MIN_DECODED_SHARE * len(times):
        raise DecodeError(f"{reader.path}: only {progress.decoded} of {len(times)} frames decode")
    # Many frames at the start may decode and still leave most of the time uncovered.
    decoded_seconds, total_seconds = progress.last_tick * float(TIME_BASE), float(times[-1] - times[0])
    if decoded_seconds < MIN_DECODED_SHARE * total_seconds:
        raise DecodeError(f"{reader.path}: the frames that decode cover {decoded_seconds:.2f} of {total_seconds:.2f} s")
    return progress


def _decode(reader: VideoReader, selected: range, progress: _Progress) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, frame) of every selected frame that decodes. Ticks count from the first frame that does."""
    ticks = to_ticks(reader.times[selected.start : selected.stop].tolist())
    first_tick, last_index = 0, selected.start - 1
    for index, frame in reader.sequence(selected.start):
        if index >= selected.stop:
            return
        # The decoder starts at the key frame before the segment, so earlier frames come first.
        if index <= last_index:
            continue
        tick = ticks[index - selected.start]
        if not progress.decoded:
            first_tick = tick
        last_index = index
        progress.decoded += 1
        progress.last_tick = tick - first_tick
        yield tick - first_tick, frame


def _resample(
    frames: Iterator[tuple[int, av.VideoFrame]], fps: float, last_frame_seconds: float
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Convert to a constant rate: at each output time, the frame shown at that moment, repeated or skipped as needed.

    `last_frame_seconds` is how long the last frame is shown.
    """
    count = 0  # output frames so far
    shown: av.VideoFrame | None = None
    tick = 0
    for tick, frame in frames:
        # `shown` is on screen until `tick`: emit it at every output time before that.
        while shown is not None and (output_tick := round(count / fps / TIME_BASE)) < tick:
            yield output_tick, shown
            count += 1
        shown = frame
    if shown is not None:
        total = max(1, count, round((tick * TIME_BASE + last_frame_seconds) * fps))
        yield from ((round(index / fps / TIME_BASE), shown) for index in range(count, total))


def _resize(
    reader: VideoReader, frames: Iterator[tuple[int, av.VideoFrame]], size: tuple[int, int], progress: _Progress
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, picture to encode): upright, resized to (height, width). A repeated frame is resized once."""
    fitter = Fitter(size, reader.orientation)
    shown: av.VideoFrame | None = None
    for tick, frame in frames:
        if frame is not shown:
            shown, picture = frame, fitter.fit(frame)
        progress.written_ticks.append(tick)
        yield tick, picture


def _read_back(path: Path, size: tuple[int, int], written_ticks: list[int]) -> None:
    """Reopen and decode the written file. Raises ReadBackError."""
    try:
        with VideoReader(path, time_limit_seconds=float("inf")) as reader:
            found = to_ticks(reader.times.tolist())
            if len(found) != len(written_ticks):
                raise ReadBackError(f"{len(written_ticks)} frames written, {len(found)} read back")
            if reader.size != size:
                raise ReadBackError(f"{size} written, {reader.size} read back")
            if np.abs(np.subtract(found, written_ticks)).max() > 1:
                raise ReadBackError("frame times read back differ from those written")
            decoded = sum(1 for _ in reader.sequence())
            if decoded != len(written_ticks):
                raise ReadBackError(f"{len(written_ticks)} frames written, {decoded} decode")
    except DecodeError as error:
        raise ReadBackError(str(error)) from error


def _diagnose(error: Exception) -> tuple[str, str]:
    """(reason, detail) of any error while a video was prepared."""
    if isinstance(error, MemoryError):
        return "crashed", "out of memory"
    if isinstance(error, DecodeError):
        return error.reason, str(error).partition(": ")[2]  # without the path, which the row holds already
    if isinstance(error, ReadBackError):
        return "check_failed", str(error)
    if isinstance(error, OSError):
        detail = error.strerror or str(error)
        return ("disk" if error.errno in DISK_ERRORS else "encode_error"), detail
    return "crashed", f"{type(error).__name__}: {error}".splitlines()[0]
