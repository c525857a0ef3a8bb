"""Prepares one video: reads the source, writes the prepared file and checks it.

This code runs in a worker process that may be killed at any moment. Its steps are:

    identify     record size, mtime and sha256 of the source
    select       choose the frames to keep, all of them or those of a segment, by their presentation times
    write        copy the source if it already has the prepared form, otherwise decode -> resize -> encode
    read back    reopen the written file and compare frame count, size, times and every compressed picture with what
                 the encoder made; of a copy, which no encoder made, decode every frame
    commit       sync the file to disk and rename it from its hidden name to its target

Until the commit, nothing is changed under the target's name. A process that is killed earlier leaves only a hidden
partial file, which the next run deletes.

Times are either presentation times in seconds, as VideoReader gives them (edit lists applied), or *ticks* of 1/90000 s
counted from the first frame that is kept. VideoReader.size is the size as shown: rotated upright, with square pixels.
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
from math import prod
from pathlib import Path

import av
import numpy as np

from data_prep.encode import TIME_BASE, difference_from_prepared_form, pictures_sha256, to_ticks, write_video
from data_prep.jobs import Outcome, TranscodeJob, TranscodeSettings, encode_limit_seconds
from data_prep.layouts import seconds_in_name
from data_prep.picture import Fitter
from data_prep.pool import Allow
from video_swinv2.data.decode import DecodeError, VideoReader, named_errors, one_line
from video_swinv2.data.display import size_for
from video_swinv2.data.media import IMAGE, media_type_of
from video_swinv2.files import PARTIAL_SUFFIX, commit_file, sha256

# A video fails if less than this share of its frames can be decoded, or if those that can span less than this share of
# its duration. Otherwise it is prepared without the frames that are lost, and `detail` says how many there are.
MIN_DECODED_SHARE = 0.9
# How long a frame may be shown: with B-frames, the index of an MP4 holds times of up to 2^31 ticks.
MAX_FRAME_SECONDS = float(2**31 * TIME_BASE)
# If the source contains less than this share of a segment, it is probably not the video that the list refers to.
MIN_SEGMENT_SHARE = 0.5
# Fewer frames per second than this are taken for damaged time stamps if a constant rate is to be made of them: to fill
# a gap of a thousand years with repeated frames would take for ever.
MIN_SOURCE_FPS = 0.01
# Two floating-point times of the same moment may differ by rounding. The tolerance is far shorter than any frame.
TIME_TOLERANCE_SECONDS = 1e-6
# Errors of the output disk (full, over quota, read-only, no permission) rather than of the video. Every other video
# would fail in the same way, so they stop the run.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
# The hidden names of unfinished files: with eight hex digits as written here (_unique_partial_path), or without as
# written by a merge of shards (files.partial_path).
PARTIAL_FILE = re.compile(r"\.(?P<name>.+?)(\.[0-9a-f]{8})?" + re.escape(PARTIAL_SUFFIX))


@dataclass
class _Progress:
    """What the generators below have done so far. They update it while frames flow through them.

    `decoded`: source frames decoded. `last_tick`: the tick of the last of them. `written_ticks`: the tick of every
    frame passed to the encoder, which differ from those of the source after a change of frame rate.
    """

    decoded: int = 0
    last_tick: int = 0
    written_ticks: list[int] = field(default_factory=list)


class ReadBackError(Exception):
    """The written file differs from what should have been written."""


def transcode_video(job: TranscodeJob, allow: Allow) -> Outcome:
    """Decode, resize, encode and check one video. Errors are not raised but become the reason of the outcome.

    The time limit of the job is at first that for reading its index. As soon as the frames of the video are known,
    `allow` is called with a limit that fits them.
    """
    started = time.monotonic()
    known = Outcome()
    partial = _unique_partial_path(job.target)
    # `known` is replaced after each step, so that the outcome of a failure still identifies the source.
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
    # Even, because in 4:2:0 two by two pixels share a chroma sample. size_for rounds the long side to even too.
    short = max(2, min(short_side, *shown_size) // 2 * 2)
    return size_for(shown_size, short)


def remove_partial_files(videos: Path, is_ours: Callable[[Path], bool] = lambda target: True) -> int:
    """Delete the partial files that a killed run left below `videos`. Returns how many.

    Only those for whose target `is_ours` holds: a run of one shard must not delete what other shards are writing.
    """
    count = 0
    for parent, _, files in os.walk(videos):
        for name in files:
            if (partial := PARTIAL_FILE.fullmatch(name)) and is_ours(Path(parent, partial["name"])):
                Path(parent, name).unlink(missing_ok=True)
                count += 1
    return count


def _unique_partial_path(target: Path) -> Path:
    """A hidden name next to the target, unique to this attempt.

    Dask may start a job again on another machine while the first attempt, which it believes lost, is still writing.
    """
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{PARTIAL_SUFFIX}")


def _identify(source: Path) -> Outcome:
    """Size, modification time and sha256 of the source. Raises DecodeError if it cannot be read."""
    # As a DecodeError, "permission denied" fails this video alone. As an OSError it would be among the DISK_ERRORS,
    # which are about the output, and would stop the run.
    try:
        status = source.stat()
        return Outcome(source_size=status.st_size, source_mtime_ns=status.st_mtime_ns, source_sha256=sha256(source))
    except FileNotFoundError as error:
        raise DecodeError(f"{source}: no such file", "missing") from error
    except OSError as error:
        raise DecodeError(f"{source}: {error.strerror}") from error


def _write_checked(job: TranscodeJob, partial: Path, known: Outcome, allow: Allow) -> Outcome:
    """Write the prepared file to `partial` and read it back. Returns `known` and what has been found out since.

    Raises DecodeError if the source is at fault, ReadBackError if the written file is, OSError if it cannot be written.
    """
    settings = job.settings
    if media_type_of(job.source) == IMAGE:  # which FFmpeg would read as a video of one frame
        raise DecodeError(f"{job.source}: is an image, not a video", "not_video")
    # The reader gets no time limit of its own: the pool kills the whole process when the job exceeds its limit.
    with VideoReader(job.source, time_limit_seconds=float("inf")) as reader:
        known = replace(known, codec=reader.codec)
        selected = _select_frames(reader, job)
        times = reader.times[selected.start : selected.stop]
        # The average rate is computed from the frames: headers are often wrong, and files with a variable frame rate
        # have no rate to give. n frames have n - 1 intervals between them.
        rate = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else reader.fps
        duration = float(times[-1] - times[0]) + 1 / rate  # the last frame is shown for one frame period
        # All frames from the first one of the source count, not only those of the segment. In formats without reliable
        # timestamps (see decode.TIMED_CONTAINERS) a segment is reached by decoding everything before it. The limit has
        # time for reading all packets of the source once more, to check for the prepared form.
        size = output_size(reader.size, settings.short_side)
        written = round(duration * settings.fps) if settings.fps and rate >= MIN_SOURCE_FPS else len(times)
        allow(encode_limit_seconds(known.source_size or 0, selected.stop, prod(reader.size), written, prod(size)))
        known = replace(known, duration_seconds=duration)
        if duration < settings.min_seconds - TIME_TOLERANCE_SECONDS:
            raise DecodeError(f"{job.source}: {duration:.2f} s, less than {settings.min_seconds:g}", "too_short")
        if settings.fps and rate < MIN_SOURCE_FPS:
            raise DecodeError(
                f"{job.source}: only {len(times)} frames in {duration:.0f} s; its time stamps are damaged"
            )
        # Either way, what is recorded below describes the written file.
        if settings.copy and _copy(reader, job, partial):
            size, fps = reader.size, rate
            progress = _Progress(len(times), written_ticks=to_ticks(times.tolist()))
        else:
            fps = settings.fps or rate
            progress, pictures = _encode(reader, selected, partial, size, rate, settings)
            read_back(partial, size, progress.written_ticks, pictures)
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
    """The indices of the frames to keep: all of them, or those shown in [start, end) if the job has a segment.

    Frames are selected by presentation time, never by `start * fps`, since frame rates vary. The times of a job count
    from the first frame, while the timestamps of a file may start anywhere. Raises DecodeError if the source is too
    short for the segment, or, if it is a segment already, for the times in its name.
    """
    source_end = float(reader.times[-1] - reader.times[0]) + 1 / reader.fps
    if job.start is None and job.end is None:
        named = seconds_in_name(job.source.stem)
        if source_end < MIN_SEGMENT_SHARE * named:
            raise DecodeError(f"{job.source}: {source_end:.2f} s of a segment of {named:g} s", "too_short")
        return range(len(reader))
    start, end = job.start or 0.0, float("inf") if job.end is None else job.end
    # With the tolerance, a frame exactly at `start` is included and one exactly at `end` is not, even if rounding puts
    # either slightly too early.
    times = reader.times - reader.times[0] + TIME_TOLERANCE_SECONDS
    first, stop = (int(index) for index in np.searchsorted(times, (start, end)))
    # A segment without an end requests "the rest", of which any length will do.
    available, requested = min(source_end, end) - start, end - start if job.end is not None else 0.0
    if first == stop or available < MIN_SEGMENT_SHARE * requested:
        raise DecodeError(
            f"{job.source}: segment {start:g} to {end:g} s, but the source ends at {source_end:.2f} s", "too_short"
        )
    return range(first, stop)


def _copy(reader: VideoReader, job: TranscodeJob, partial: Path) -> bool:
    """Copy the source to `partial` if it already has the prepared form and decodes completely.

    Returns False if it has to be encoded; a file that may be left at `partial` is then overwritten.
    """
    settings = job.settings
    # A segment cannot be cut, nor a picture turned upright, without encoding.
    if job.start is not None or job.end is not None or any(reader.orientation):
        return False
    with named_errors(job.source):
        if difference_from_prepared_form(job.source, short_side=settings.short_side, gop=settings.gop):
            return False
    source_ticks = to_ticks(reader.times.tolist())
    if settings.fps:
        # Every frame must lie within one tick of where a constant rate puts it.
        constant_ticks = np.arange(len(source_ticks)) / settings.fps / float(TIME_BASE)
        if np.abs(constant_ticks - source_ticks).max() > 1:
            return False
    shutil.copyfile(job.source, partial)
    try:
        read_back(partial, reader.size, source_ticks)
    except ReadBackError:  # the source is damaged, but encoding may save most of its frames
        return False
    return True


def _encode(
    reader: VideoReader,
    selected: range,
    partial: Path,
    size: tuple[int, int],
    rate: float,
    settings: TranscodeSettings,
) -> tuple[_Progress, str]:
    """Encode the selected frames -> what was done, and the sha256 of the compressed pictures.

    Raises DecodeError if too few frames can be decoded or times are damaged, OSError if encoding fails.

    The steps form a chain of generators, decode -> (constant rate) -> resize -> encode, which the encoder pulls frames
    through one at a time. So only a few frames are in memory, however long the video is.
    """
    times = reader.times[selected.start : selected.stop]
    longest = float(np.diff(times).max(initial=0))
    if longest > MAX_FRAME_SECONDS:
        hours = f"{longest / 3600:,.0f} hours"
        raise DecodeError(f"{reader.path}: its time stamps are damaged: one frame is shown for {hours}")
    progress = _Progress()
    frames = _decode(reader, selected, progress)
    if settings.fps:
        frames = _resample(frames, settings.fps, 1 / rate)
    fps = settings.fps or rate
    try:
        pictures = write_video(
            partial, _resize(reader, frames, size, progress), size=size, fps=fps, settings=settings.encoding
        )
    except av.FFmpegError as error:
        # The encoder or the muxer failed: what fails because of the source is a DecodeError. The error number is kept
        # because _diagnose recognises a full disk by it.
        raise OSError(getattr(error, "errno", 0) or 0, f"while encoding: {error.strerror}") from error
    if progress.decoded < MIN_DECODED_SHARE * len(times):
        raise DecodeError(f"{reader.path}: only {progress.decoded} of {len(times)} frames decode")
    # The number of frames is not enough: with a variable frame rate, nine tenths of the frames may all be at the start
    # and cover little of the time.
    decoded_seconds, total_seconds = progress.last_tick * float(TIME_BASE), float(times[-1] - times[0])
    if decoded_seconds < MIN_DECODED_SHARE * total_seconds:
        raise DecodeError(f"{reader.path}: the frames that decode cover {decoded_seconds:.2f} of {total_seconds:.2f} s")
    return progress, pictures


def _decode(reader: VideoReader, selected: range, progress: _Progress) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, frame) of every selected frame that can be decoded. Ticks count from the first of them."""
    ticks = to_ticks(reader.times[selected.start : selected.stop].tolist())
    first_tick, last_index = 0, selected.start - 1
    for index, frame in reader.sequence(selected.start):
        if index >= selected.stop:
            return
        # Decoding starts at the key frame before the segment, so frames before the segment come first. This also drops
        # any frame that arrives twice or out of order.
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
    """Convert to a constant rate: output frame n is the source frame on screen at n / fps seconds.

    Source frames are repeated or skipped as needed, never blended. `last_frame_seconds` is how long the last frame is
    shown, which the times alone do not say.
    """
    count = 0  # output frames so far
    shown: av.VideoFrame | None = None
    tick = 0
    for tick, frame in frames:
        # `shown` stays on screen until `tick`, so it is the output at every output time before that.
        while shown is not None and (output_tick := round(count / fps / TIME_BASE)) < tick:
            yield output_tick, shown
            count += 1
        shown = frame
    # The last frame fills the output up to the end of the video; even a very short video gets one frame.
    if shown is not None:
        total = max(1, count, round((tick * TIME_BASE + last_frame_seconds) * fps))
        yield from ((round(index / fps / TIME_BASE), shown) for index in range(count, total))


def _resize(
    reader: VideoReader, frames: Iterator[tuple[int, av.VideoFrame]], size: tuple[int, int], progress: _Progress
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(tick, picture to encode), with pictures upright and resized to `size` (height, width).

    A frame that _resample repeats arrives as the same object several times and is resized only once.
    """
    fitter = Fitter(size, reader.orientation)
    shown: av.VideoFrame | None = None
    for tick, frame in frames:
        if frame is not shown:
            with named_errors(reader.path):
                shown, picture = frame, fitter.fit(frame)
        progress.written_ticks.append(tick)
        yield tick, picture


def read_back(path: Path, size: tuple[int, int], written_ticks: list[int], pictures: str | None = None) -> None:
    """Reopen the written file and compare it with what was written. Raises ReadBackError.

    `pictures` is the sha256 of the compressed pictures that the encoder made. Without it, every frame is decoded.
    """
    try:
        with VideoReader(path, time_limit_seconds=float("inf")) as reader:
            found = to_ticks(reader.times.tolist())
            if len(found) != len(written_ticks):
                raise ReadBackError(f"{len(written_ticks)} frames written, {len(found)} read back")
            if reader.size != size:  # of the first frame, which is decoded for it
                raise ReadBackError(f"{size} written, {reader.size} read back")
            # One tick of difference is rounding: a copied file may count its times in other units than 1/90000 s.
            if np.abs(np.subtract(found, written_ticks)).max() > 1:
                raise ReadBackError("frame times read back differ from those written")
            # The index may look right although the pictures are damaged. Comparing their bytes finds more than decoding
            # them, since most damage still decodes, and takes a fiftieth of the time.
            if pictures is not None:
                with named_errors(path):
                    pictures_found = pictures_sha256(path)
                if pictures_found != pictures:
                    raise ReadBackError("pictures read back differ from those encoded")
                return
            decoded = sum(1 for _ in reader.sequence())
            if decoded != len(written_ticks):
                raise ReadBackError(f"{len(written_ticks)} frames written, {decoded} decode")
    except DecodeError as error:
        raise ReadBackError(str(error)) from error


def _diagnose(error: Exception) -> tuple[str, str]:
    """(reason, detail) of an error that occurred while a video was prepared; for the reasons see outcomes.REASONS.

    A MemoryError means that the process reached the limit that the pool sets on its address space.
    """
    if isinstance(error, MemoryError):
        return "crashed", "out of memory"
    if isinstance(error, DecodeError):
        return error.reason, str(error).partition(": ")[2]  # without the path, which is in the row already
    if isinstance(error, ReadBackError):
        return "check_failed", str(error)
    if isinstance(error, OSError):
        detail = error.strerror or str(error)
        return ("disk" if error.errno in DISK_ERRORS else "encode_error"), detail
    return "crashed", one_line(error)
