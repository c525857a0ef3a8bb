"""Pictures in the order shown, as they come: from a file, the URL of a stream, a camera, or another program's output.

One forward pass and nothing kept, so that a source may have no end. H W are pixels as shown: rotation applied, pixels
square.
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
# Their senders do not wait: what is not taken in time is lost, and what is taken late is no longer what happens.
LIVE_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp"})
PATIENT_SCHEMES = frozenset({"http", "https", "tcp"})
LIKELY_RATE = 25.0  # pictures per second, where nothing tells
RATES = (0.1, 1000.0)  # some containers give their clock, 90000 a second, for a rate


@dataclass(frozen=True)
class Frame:
    """One frame as the model sees it: `image` uint8 (H, W, 3), resized, turned and cut to the model's size."""

    index: int
    seconds: float
    image: NDArray[np.uint8]


def is_stream(source: str) -> bool:
    """True for a URL, standard input, a camera, a named pipe: what has to be watched, since it is not a file."""
    if source == STANDARD_INPUT or _scheme(source) in LIVE_SCHEMES | PATIENT_SCHEMES:
        return True
    return _is_camera(source) or _has_mode(source, stat.S_ISFIFO)


def is_live(source: str) -> bool:
    """True for a stream whose sender does not wait."""
    return _scheme(source) in LIVE_SCHEMES or _is_camera(source)


class FrameStream:
    """An open source, a context manager; iterating gives (seconds, frame as decoded) once, damaged frames left out.

    `fps`: pictures a second; `seconds`: how long the header says it is, None if it says nothing. Both are for planning,
    not to be relied on. Raises DecodeError, whose message begins with the name of the source.
    """

    def __init__(self, source: str, *, descriptor: int | None = None, wait_seconds: float = 60.0) -> None:
        """descriptor: an open file to read in place of `source`, which then is only its name."""
        self.name = source
        self._container = self._open(descriptor, wait_seconds)
        stream = next((s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            self._container.close()
            raise DecodeError(f"{source}: holds no video stream", "not_video")
        # One thread: FFmpeg's own can dead-lock when reading ends early, and a window is soon decoded.
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        self._stream = stream
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        self.fps = rate if RATES[0] <= rate <= RATES[1] else LIKELY_RATE
        length = self._container.duration
        self.seconds = length / av.time_base if length and length > 0 else None
        self._display = Display(stream)

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[tuple[float, av.VideoFrame]]:
        first, last = math.nan, -math.inf
        step = 1 / self.fps
        for frame in self._decoded():
            self._display.note(frame)
            time = math.nan if frame.time is None else frame.time
            first = time if math.isnan(first) else first
            seconds = time - first
            # Streams join in the middle, AVI frames bear decoding times, clocks jump: one frame on from the last then.
            if not last < seconds:
                seconds = 0.0 if last == -math.inf else last + step
            last = seconds
            yield seconds, frame

    def image(self, frame: av.VideoFrame, short: int | None) -> NDArray[np.uint8]:
        """The frame as shown, (H, W, 3) uint8, its short side `short` pixels long if given."""
        return self._display.picture(frame, short)

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) as shown; known from the first frame on."""
        if self._display.size is None:
            raise DecodeError(f"{self.name}: no frame can be decoded", "no_frames")
        return self._display.size

    def _open(self, descriptor: int | None, wait_seconds: float) -> av.container.InputContainer:
        format_name = None
        if descriptor is not None:
            target = "pipe:" if self.name == STANDARD_INPUT else "/dev/fd/"
            target += str(descriptor)
        elif _scheme(self.name):
            target = self.name
        else:
            # absolute: FFmpeg reads a bare `name:rest` as a protocol and `-name` as an option
            target = str(Path(self.name).absolute())
            format_name = "v4l2" if _is_camera(self.name) else None
        try:
            return av.open(target, format=format_name, timeout=wait_seconds, metadata_errors="replace")
        except av.ExitError as fault:
            raise DecodeError(f"{self.name}: nothing came within {wait_seconds:g} seconds", "timeout") from fault
        except (av.FFmpegError, OSError, ValueError) as fault:
            words = getattr(fault, "strerror", None) or str(fault)
            raise DecodeError(f"{self.name}: is not a video FFmpeg can open ({words})", "not_video") from fault

    def _decoded(self) -> Iterator[av.VideoFrame]:
        try:
            for packet in self._container.demux(self._stream):  # the last one, empty, draws out what is held back
                try:
                    yield from packet.decode()
                except (av.FFmpegError, ValueError):
                    continue
        except (av.FFmpegError, OSError, ValueError):
            return  # cut short, or a sender that fell silent: what came before is the video


def centre_crop(shown: tuple[int, int], size: tuple[int, int]) -> tuple[int, tuple[slice, slice]]:
    """How a picture of `shown` (H, W) becomes one of `size`: its short side, and what is then cut from the middle.

    As in the protocol center-1x1.
    """
    protocol = find_protocol("center-1x1")
    side = resized_short_side(*shown, size, protocol.resize)
    top, left, height, width = plan_views(protocol, 1, *size_for(shown, side), 1, 1, size)[0].box
    return side, (slice(top, top + height), slice(left, left + width))


def _scheme(source: str) -> str:
    scheme, found, _ = source.partition("://")
    return scheme.lower() if found else ""


def _is_camera(source: str) -> bool:
    return _has_mode(source, stat.S_ISCHR)


def _has_mode(source: str, test: Callable[[int], bool]) -> bool:
    try:
        return test(Path(source).stat().st_mode)
    except (OSError, ValueError):
        return False
