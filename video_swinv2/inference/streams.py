"""Reads the frames of a video in display order, as they arrive, from a file, a URL, a camera or standard input.

Everything is read forwards once and nothing is kept, so the stream may be endless.

Letters: S crops, H W pixels of the frame as shown, after rotation and with square pixels, or of a crop.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import av
import numpy as np
from numpy.typing import NDArray

from video_swinv2.data.decode import (
    DECODING_TIMED_CONTAINERS,
    DecodeError,
    decode_packet,
    find_video_stream,
    named_errors,
    one_line,
    open_container,
    presentation_times,
)
from video_swinv2.data.display import MAX_PIXELS, Display, size_for
from video_swinv2.evaluation.placement import CROP_RULES, Box, crop_boxes, resized_short_side
from video_swinv2.evaluation.protocols import Protocol

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.stream import VideoStream

STANDARD_INPUT = "-"
# The sender of a live stream does not wait. Frames that are not read in time are lost, and frames that are read late no
# longer show what is happening. The sender of a patient stream pauses while we do not read (TCP), so that nothing has
# to be skipped.
LIVE_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtmps", "rtp", "udp"})
PATIENT_SCHEMES = frozenset({"http", "https", "tcp"})
FALLBACK_FPS = 25.0  # for a stream without a credible frame rate
# Frame rates outside this range are ignored: some containers report their clock, 90,000 ticks per second, instead.
CREDIBLE_FPS = (0.1, 1000.0)


@dataclass(frozen=True)
class Frame:
    """One frame for the model: its index in the stream, its time, and its `crops`, uint8 (S, H, W, 3).

    They are oriented, resized and cut to the input size of the model, and are the crops of a protocol, in its order.
    """

    index: int
    seconds: float
    crops: NDArray[np.uint8]


def is_stream(source: str) -> bool:
    """True for what can be read only once, from start to end: a URL, standard input, a camera or a named pipe."""
    if source == STANDARD_INPUT or _scheme(source) in LIVE_SCHEMES | PATIENT_SCHEMES:
        return True
    return _is_camera(source) or _has_mode(source, stat.S_ISFIFO)


def is_live(source: str) -> bool:
    """True for a stream whose sender does not wait for the reader."""
    return _scheme(source) in LIVE_SCHEMES or _is_camera(source)


class FrameStream:
    """An open video from any source that FFmpeg can read. It is a context manager and can be iterated over once.

    Iteration yields (seconds since the first frame, frame as decoded) in display order. Damaged frames are left out,
    and times are strictly increasing. `fps` comes from the header and may be wrong. Whatever goes wrong with the source
    is raised as a DecodeError whose message begins with its name.
    """

    def __init__(self, source: str, *, descriptor: int | None = None, wait_seconds: float = 60.0) -> None:
        """Open the source.

        descriptor: an open file to read instead; `source` is then only a name. wait_seconds: how long to wait for data.
        """
        self.name = source
        with named_errors(source):
            self._container = self._open(descriptor, wait_seconds)
            try:
                self._stream = find_video_stream(self._container, source)
                rate = float(self._stream.average_rate or self._stream.guessed_rate or 0)
                self._display = Display(self._stream)
                formats = self._container.format.name.split(",")
                self._has_decoding_times = not DECODING_TIMED_CONTAINERS.isdisjoint(formats)
            except BaseException:
                self._container.close()
                raise
        self.fps = rate if CREDIBLE_FPS[0] <= rate <= CREDIBLE_FPS[1] else FALLBACK_FPS

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._container.close()

    def __iter__(self) -> Iterator[tuple[float, av.VideoFrame]]:
        with named_errors(self.name):
            # Time stamps start at the sender's clock, so that of the first frame is subtracted: a camera that has been
            # running for a day starts at 0, too.
            first_time, last_seconds = math.nan, -math.inf
            for time, frame in self._timed():
                first_time = time if math.isnan(first_time) else first_time
                seconds = time - first_time
                # Time stamps do not always increase. They are missing (NaN here) where a stream is joined in the
                # middle, and they jump back when a sender restarts its clock. Such a frame is placed one frame period
                # after the previous one. `not a < b`, unlike `a >= b`, is also true for NaN.
                if not last_seconds < seconds:
                    seconds = 0.0 if last_seconds == -math.inf else last_seconds + 1 / self.fps
                last_seconds = seconds
                yield seconds, frame

    def count(self) -> tuple[int, float]:
        """(pictures, seconds) of the stream, by its packets, in place of iterating over it. Nothing is decoded."""
        with named_errors(self.name):
            pictures, first, last = 0, math.inf, -math.inf
            for packet in self._packets():
                pictures += packet.size > 0
                if packet.pts is not None:
                    first, last = min(first, packet.pts), max(last, packet.pts)
            base = float(self._stream.time_base or 0)
            # The last picture is shown for as long as the others on average.
            lasts = (last - first) * base * pictures / (pictures - 1) if pictures > 1 and last > first else 0.0
            return pictures, lasts or pictures / self.fps

    def image(self, frame: av.VideoFrame, short_side: int | None) -> NDArray[np.uint8]:
        """The frame as shown, uint8 (H, W, 3), resized to `short_side` pixels on its short side (None: not resized)."""
        with named_errors(self.name):
            return self._display.picture(frame, short_side)

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) of the frames as shown. Raises DecodeError before the first frame, or if there is none."""
        if self._display.size is None:
            raise DecodeError(f"{self.name}: no frame can be decoded", "no_frames")
        return self._display.size

    def _open(self, descriptor: int | None, wait_seconds: float) -> av.container.InputContainer:
        format_name = None
        if descriptor is not None:
            # FFmpeg's `pipe:` protocol reads only forwards, as standard input requires. /dev/fd/ also seeks, which is
            # needed for MP4 files with their index at the end.
            target = "pipe:" if self.name == STANDARD_INPUT else "/dev/fd/"
            target += str(descriptor)
        elif _scheme(self.name):
            target = self.name
        else:
            # The path is made absolute, because FFmpeg takes a bare `name:rest` for a protocol and `-name` for an
            # option.
            target = str(Path(self.name).absolute())
            format_name = "v4l2" if _is_camera(self.name) else None
        try:
            return open_container(target, MAX_PIXELS, format=format_name, timeout=wait_seconds)
        except av.ExitError as fault:
            raise DecodeError(f"{self.name}: no data within {wait_seconds:g} seconds", "timeout") from fault
        except (av.FFmpegError, OSError, ValueError) as fault:
            raise DecodeError(
                f"{self.name}: not a video that FFmpeg can open ({one_line(fault)})", "not_video"
            ) from fault

    def _timed(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """(presentation time stamp in seconds or NaN, frame), in display order."""
        if not self._has_decoding_times:
            for frame in self._decoded():
                yield math.nan if frame.time is None else frame.time, frame
            return
        for pts, frame in presentation_times(self._decoded()):
            yield math.nan if pts is None or frame.time_base is None else float(pts * frame.time_base), frame

    def _decoded(self) -> Iterator[av.VideoFrame]:
        """All frames that can be decoded, in display order. Damage is skipped, and never raised as an error."""
        for packet in self._packets():
            # After a damaged packet the decoder recovers at the next key frame.
            for frame in decode_packet(self._stream.codec_context, packet, MAX_PIXELS):
                self._display.note(frame)
                yield frame

    def _packets(self) -> Iterator[Packet[VideoStream]]:
        """All packets. The last one of PyAV's demux is empty; it releases the frames held back for reordering."""
        try:
            yield from self._container.demux(self._stream)
        except (av.FFmpegError, OSError, ValueError):
            return  # a truncated file or a silent sender; the video ends with what was decoded so far


def frame_crops(protocol: Protocol, shown_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, tuple[Box, ...]]:
    """How a test with `protocol` resizes and crops a frame of `shown_size` (H, W) for a model of input `size` (H, W).

    Returns the short side to resize to, and the boxes of the S crops to cut afterwards.
    """
    side = resized_short_side(*shown_size, size, protocol.resize)
    return side, crop_boxes(protocol.boxes, *size_for(shown_size, side), size, protocol.crops)


def middle_crop(protocol: Protocol) -> int:
    """Which of a protocol's crops lies nearest to the middle of the frame; crops are not always in spatial order."""
    spare = 1000  # pixels; any even number will do
    offsets = CROP_RULES[protocol.boxes](spare, protocol.crops)
    return min(range(protocol.crops), key=lambda i: abs(offsets[i] - spare // 2))


def _scheme(source: str) -> str:
    """The scheme of a URL, the part before `://`, in lower case; empty for anything else."""
    scheme, found, _ = source.partition("://")
    return scheme.lower() if found else ""


def _is_camera(source: str) -> bool:
    # Cameras are character devices, such as /dev/video0.
    return _has_mode(source, stat.S_ISCHR)


def _has_mode(source: str, test: Callable[[int], bool]) -> bool:
    try:
        return test(Path(source).stat().st_mode)
    except (OSError, ValueError):  # no such file, or a name that no file can have
        return False
