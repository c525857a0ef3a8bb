"""The frames of a video in display order, as they arrive: from a file, a URL, a camera or another program's output.

Everything is read forwards once and nothing is kept, so the stream may be endless. H W are pixels of the frame as
shown: rotation applied, pixels square.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import av
import numpy as np
from av.stream import Disposition
from numpy.typing import NDArray

from video_swinv2.data.decode import DecodeError
from video_swinv2.data.display import Display, size_for
from video_swinv2.evaluation.placement import resized_short_side
from video_swinv2.evaluation.protocols import find_protocol, plan_views

STANDARD_INPUT = "-"
# The sender of a live stream does not wait: frames that are not taken in time are lost, and frames taken late are no
# longer what is happening. The sender of a patient one pauses when we do (TCP), so nothing has to be skipped.
LIVE_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp"})
PATIENT_SCHEMES = frozenset({"http", "https", "tcp"})
FALLBACK_FPS = 25.0
# Some containers report their clock, 90,000 ticks per second, as the frame rate: rates outside are not believed.
CREDIBLE_FPS = (0.1, 1000.0)


@dataclass(frozen=True)
class Frame:
    """One frame as the model sees it: `image`, uint8 (H, W, 3), is oriented, resized and cropped to its size."""

    index: int
    seconds: float
    image: NDArray[np.uint8]


def is_stream(source: str) -> bool:
    """True for a URL, standard input, a camera and a named pipe: whatever can be read only once, and from the start."""
    if source == STANDARD_INPUT or _scheme(source) in LIVE_SCHEMES | PATIENT_SCHEMES:
        return True
    return _is_camera(source) or _has_mode(source, stat.S_ISFIFO)


def is_live(source: str) -> bool:
    """True for a stream whose sender does not wait for the reader."""
    return _scheme(source) in LIVE_SCHEMES or _is_camera(source)


class FrameStream:
    """An open video, of a file or of anything else FFmpeg reads; a context manager, to be iterated over once.

    Iterating gives (seconds since the first frame, frame as decoded) in display order; damaged frames are missing. The
    times increase strictly. `fps` and `duration_seconds` (None if unknown) come from the header: good enough for
    planning, but not to be relied on. Raises DecodeError, whose message begins with the name of the source.
    """

    def __init__(self, source: str, *, descriptor: int | None = None, wait_seconds: float = 60.0) -> None:
        """descriptor: an open file to read; `source` is then just its name. wait_seconds: limit on waiting for data."""
        self.name = source
        self._container = self._open(descriptor, wait_seconds)
        # An attached picture is the cover of an audio file, not a video.
        stream = next((s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            self._container.close()
            raise DecodeError(f"{source}: contains no video stream", "not_video")
        # FFmpeg's own threads can deadlock when reading stops early, and a segment decodes quickly without them.
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        self._stream = stream
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        self.fps = rate if CREDIBLE_FPS[0] <= rate <= CREDIBLE_FPS[1] else FALLBACK_FPS
        duration = self._container.duration  # in units of 1 / av.time_base; None or negative for a live stream
        self.duration_seconds = duration / av.time_base if duration and duration > 0 else None
        self._display = Display(stream)

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[tuple[float, av.VideoFrame]]:
        # A frame's presentation time stamp (pts) times its time base is `frame.time`. It counts from wherever the
        # sender's clock stood, so the first one is subtracted: a camera that has run for a day starts at 0 too.
        first_time, last_seconds = math.nan, -math.inf
        for frame in self._decoded():
            self._display.note(frame)
            time = math.nan if frame.time is None else frame.time
            first_time = time if math.isnan(first_time) else first_time
            seconds = time - first_time
            # Time stamps cannot be trusted to increase. They are missing (NaN) where a stream is joined in the middle,
            # are those of decoding in AVI files, and jump back where a sender restarts its clock. Such a frame is taken
            # to be one frame period after the last. `not a < b`, unlike `a >= b`, is also true for NaN.
            if not last_seconds < seconds:
                seconds = 0.0 if last_seconds == -math.inf else last_seconds + 1 / self.fps
            last_seconds = seconds
            yield seconds, frame

    def image(self, frame: av.VideoFrame, short_side: int | None) -> NDArray[np.uint8]:
        """The frame as shown, uint8 (H, W, 3), resized so that its short side has `short_side` pixels (None: as is)."""
        return self._display.picture(frame, short_side)

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) of the frames as shown, known once the first frame is; DecodeError if there was none."""
        if self._display.size is None:
            raise DecodeError(f"{self.name}: no frame can be decoded", "no_frames")
        return self._display.size

    def _open(self, descriptor: int | None, wait_seconds: float) -> av.container.InputContainer:
        format_name = None
        if descriptor is not None:
            # `pipe:` reads forwards only, as a pipe must be; /dev/fd/ can seek, which MP4 files need.
            target = "pipe:" if self.name == STANDARD_INPUT else "/dev/fd/"
            target += str(descriptor)
        elif _scheme(self.name):
            target = self.name
        else:
            # An absolute path, because FFmpeg takes a bare `name:rest` for a protocol and `-name` for an option.
            target = str(Path(self.name).absolute())
            format_name = "v4l2" if _is_camera(self.name) else None
        try:
            return av.open(target, format=format_name, timeout=wait_seconds, metadata_errors="replace")
        except av.ExitError as fault:
            raise DecodeError(f"{self.name}: no data within {wait_seconds:g} seconds", "timeout") from fault
        except (av.FFmpegError, OSError, ValueError) as fault:
            words = getattr(fault, "strerror", None) or str(fault)
            raise DecodeError(f"{self.name}: is not a video FFmpeg can open ({words})", "not_video") from fault

    def _decoded(self) -> Iterator[av.VideoFrame]:
        try:
            # PyAV ends with an empty packet, which makes the decoder give out the frames it holds back for reordering.
            for packet in self._container.demux(self._stream):
                try:
                    yield from packet.decode()
                except (av.FFmpegError, ValueError):
                    continue  # one damaged packet: a stream recovers at its next key frame
        except (av.FFmpegError, OSError, ValueError):
            return  # a file cut short or a sender that fell silent: the video is what came before


def centre_crop(shown_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, tuple[slice, slice]]:
    """How a frame of `shown_size` (H, W) becomes one of `size` (H, W), exactly as in the protocol center-1x1.

    Returns the short side to resize to, and the (rows, columns) to keep after that.
    """
    protocol = find_protocol("center-1x1")
    side = resized_short_side(*shown_size, size, protocol.resize)
    top, left, height, width = plan_views(protocol, 1, *size_for(shown_size, side), 1, 1, size)[0].box
    return side, (slice(top, top + height), slice(left, left + width))


def _scheme(source: str) -> str:
    """The part of a URL before `://`, in lower case; empty for anything else."""
    scheme, found, _ = source.partition("://")
    return scheme.lower() if found else ""


def _is_camera(source: str) -> bool:
    return _has_mode(source, stat.S_ISCHR)


def _has_mode(source: str, test: Callable[[int], bool]) -> bool:
    try:
        return test(Path(source).stat().st_mode)
    except (OSError, ValueError):
        return False
