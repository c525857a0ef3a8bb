"""Frames of one video file by their real presentation time, through PyAV.

Nothing here seeks and nothing believes a header. The packets of a file are demuxed once and kept, and a frame is
reached by decoding forward from the key packet before it: container seeks land on the wrong frame in several formats,
and frame counts in headers lie. H W are pixels as shown: rotation applied, pixels square.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import av
import numpy as np
from av.stream import Disposition

from video_swinv2.data.display import Display, Orientation
from video_swinv2.errors import UserError

if TYPE_CHECKING:
    import torch
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream
    from numpy.typing import NDArray

# Containers that store a presentation time per picture, and codecs whose every packet is one shown picture. Elsewhere
# packets mislead: AVI carries decoding times, MPEG-TS may carry one packet per field, VP8 packets may show nothing.
TIMED_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
ONE_PICTURE_CODECS = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg"})
RETAINED_BYTES = 256 * 2**20


class DecodeError(UserError):
    """A video that cannot be read; `reason` is missing, empty, not_video, no_frames, decode_error or timeout."""

    def __init__(self, message: str, reason: str = "decode_error") -> None:
        super().__init__(message)
        self.reason = reason


class VideoReader:
    """One open video file; a context manager.

    `times`: (n,) float64 seconds, ascending, one per frame that exists. `fps`: the average rate. `codec`: FFmpeg's name
    for it. `missing`: how many of the frames asked for so far could not be decoded and were stood in for by their
    neighbours. `time_limit_seconds` holds for each call by itself. Raises DecodeError, whose message begins with the
    path, for what cannot be read.
    """

    def __init__(self, path: Path, *, time_limit_seconds: float = 60.0) -> None:
        self.path = Path(path)
        self.missing = 0
        self._limit = time_limit_seconds
        self._deadline = time.monotonic() + time_limit_seconds
        self._packets: list[Packet[VideoStream]] | None = []
        self._container, self._stream = self._open()
        self._display = Display(self._stream)
        self.codec = self._stream.codec_context.name
        try:
            self._index()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.times)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as shown: turned, square pixels. Decodes the first frame if none was decoded yet."""
        if self._display.size is None:
            self._start_clock()
            for _ in self._decode(0):
                break
        if self._display.size is None:
            raise self._error("no frame can be decoded", "no_frames")
        return self._display.size

    def close(self) -> None:
        """Give the file back; PyAV leaks what is not closed."""
        self._packets = []
        self._container.close()

    def frames(self, indices: Sequence[int], short_side: int | None = None) -> torch.Tensor:
        """Frames by index, in any order, repeats allowed -> uint8 (len(indices), 3, H, W) RGB.

        With `short_side` the pictures are resized, up as well as down, so that their short side is exactly that. Raises
        IndexError for an index outside 0..n-1 and DecodeError where nothing can be decoded.
        """
        import torch  # not at the top: the preparation tool reads with this file and starts without torch

        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"{self.path}: has frames 0..{len(self) - 1}, asked for {wanted[:1]}..{wanted[-1:]}")
        self._start_clock()
        images = self._collect(wanted, short_side)
        if len(images) < len(wanted):
            images |= self._collect_stand_ins([index for index in wanted if index not in images], short_side)
        unique = np.stack([images[index] for index in wanted])
        rows = np.searchsorted(wanted, np.asarray(indices))
        return torch.from_numpy(unique[rows]).permute(0, 3, 1, 2).contiguous()

    def sequence(self, first: int = 0) -> Iterator[tuple[int, av.VideoFrame]]:
        """Every frame that can be decoded from the key frame before `first` on, with its index, in the order shown.

        As decoded: not turned, not resized.
        """
        self._start_clock()
        # Frames before the first key frame decode in part at best, but what there is belongs to the sequence.
        packet = next(self._runs([first]))[0] if first else 0
        return self._decode(packet)

    @property
    def orientation(self) -> Orientation:
        """How a frame of `sequence` has to be turned to be seen as shown."""
        return self._display.orientation if self.size else Orientation()

    def picture(self, frame: av.VideoFrame, short_side: int | None = None) -> NDArray[np.uint8]:
        """A frame of `sequence` as shown -> uint8 (H, W, 3), its short side resized to `short_side`."""
        return self._display.picture(frame, short_side)

    def _error(self, what: str, reason: str = "decode_error") -> DecodeError:
        return DecodeError(f"{self.path}: {what}", reason)

    def _start_clock(self) -> None:
        self._deadline = time.monotonic() + self._limit

    def _check_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise self._error(f"not read within {self._limit:g} s; leave it out or raise the time limit", "timeout")

    def _open(self) -> tuple[InputContainer, VideoStream]:
        if not self.path.exists():
            raise self._error("no such file", "missing")
        if not self.path.is_file():
            raise self._error("is not a file", "not_video")
        if not self.path.stat().st_size:
            raise self._error("is empty (0 bytes)", "empty")
        try:
            # absolute: FFmpeg reads a bare `name:rest` as a protocol and `-name` as an option
            container = av.open(str(self.path.absolute()), metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as fault:
            raise self._error(f"is not a video FFmpeg can open ({_words(fault)})", "not_video") from fault
        for stream in container.streams.video:
            if not stream.disposition & Disposition.attached_pic:
                # Decoder threads dead-lock in loader workers (PyAV#1849, #1962): parallelise over videos instead.
                stream.codec_context.thread_type = "NONE"
                stream.codec_context.thread_count = 1
                return container, stream
        container.close()
        raise self._error("holds no video stream", "not_video")

    def _index(self) -> None:
        """Demux once: keep the packets; number the frames by time or, where packets mislead, by decoding them all."""
        packets, size = [], 0
        for packet in self._demuxed(self._container, self._stream):
            size += packet.size
            packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
            if self._packets is not None:
                self._packets.append(packet)
            if size > RETAINED_BYTES:
                self._packets = None  # read from the file again, from its start, each time frames are asked for
        shown = [pts for pts, _, discard in packets if not discard and pts is not None]
        kinds = set(self._container.format.name.split(","))
        by_packet = (
            bool(kinds & TIMED_CONTAINERS)
            and self._stream.codec_context.name in ONE_PICTURE_CODECS
            and len(set(shown)) == len(shown) == sum(not discard for _, _, discard in packets)
        )
        self._ordinal: dict[int, int] | None = None
        self._keys = [0]
        self._key_pts = [-(2**63)]
        if by_packet:
            shown.sort()
            self._ordinal = {pts: index for index, pts in enumerate(shown)}
            self._note_keys([(pts, place) for place, (pts, key, _) in enumerate(packets) if key and pts is not None])
            self._pts = shown
        else:
            decoded = [frame.pts for _, frame in self._decode(0)]
            # AVI frames come in the order shown but bear decoding times: sorted, those are the times shown.
            self._pts = sorted(pts for pts in decoded if pts is not None)
            self._pts += [self._pts[-1] if self._pts else 0] * (len(decoded) - len(self._pts))
        self._time_frames()

    def _note_keys(self, keys: list[tuple[int, int]]) -> None:
        for pts, place in keys:
            if place and pts > self._key_pts[-1]:
                self._keys.append(place)
                self._key_pts.append(pts)

    def _time_frames(self) -> None:
        if not self._pts:
            raise self._error("no frame can be decoded", "no_frames")
        base = float(self._stream.time_base or Fraction(1, 90000))
        rate = float(self._stream.average_rate or 0) or 25.0
        times = np.array(self._pts, dtype=np.float64) * base
        for i in np.flatnonzero(np.diff(times) <= 0) + 1:
            # A time missing or given twice: one frame on, but never past the next one that is known.
            later = times[i + 1 :][times[i + 1 :] > times[i - 1]]
            times[i] = times[i - 1] + min(1 / rate, (later[0] - times[i - 1]) / 2 if len(later) else np.inf)
        self.times: NDArray[np.float64] = times
        self.fps = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else rate

    def _demuxed(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
        try:
            for packet in container.demux(stream):
                self._check_clock()
                if packet.size:
                    yield packet
        except (av.FFmpegError, OSError, ValueError):
            return  # a file cut short: what comes before the cut is the video

    def _packets_from(self, start: int) -> Iterator[Packet[VideoStream]]:
        if self._packets is not None:
            yield from islice(self._packets, start, None)
            return
        with av.open(str(self.path.absolute()), metadata_errors="replace") as container:
            yield from islice(self._demuxed(container, container.streams.video[self._stream_place()]), start, None)

    def _stream_place(self) -> int:
        return [stream.index for stream in self._container.streams.video].index(self._stream.index)

    def _decode(self, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) in the order shown, decoding forward from packet `start`; damaged packets are passed over."""
        codec = self._stream.codec_context
        codec.flush_buffers()
        count = 0
        for packet in chain(self._packets_from(start), (None,)):  # None draws out the frames the decoder still holds
            self._check_clock()
            try:
                decoded = codec.decode(packet)
            except (av.FFmpegError, ValueError):
                continue
            for frame in decoded:
                self._display.note(frame)
                index = count if self._ordinal is None else self._ordinal.get(frame.pts or 0)
                count += 1
                if index is not None:
                    yield index, frame

    def _collect(self, wanted: list[int], short_side: int | None) -> dict[int, NDArray[np.uint8]]:
        """The wanted frames that decode, each once: one forward pass per run of neighbouring groups of pictures."""
        images: dict[int, NDArray[np.uint8]] = {}
        for start, run in self._runs(wanted):
            left = set(run)
            for index, frame in self._decode(start):
                if index in left:
                    images[index] = self.picture(frame, short_side)
                    left.remove(index)
                if not left or index > run[-1]:
                    break
        return images

    def _runs(self, wanted: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Wanted frames by the key packet to start from; a run goes on into the next group of pictures undisturbed."""
        run: list[int] = []
        first = last = -1
        for index in wanted:
            group = int(np.searchsorted(self._key_pts, self._pts[index], side="right")) - 1
            if run and group > last + 1:
                yield self._keys[first], run
                run = []
            first, last = (first if run else group), group
            run.append(index)
        yield self._keys[first], run

    def _collect_stand_ins(self, lost: list[int], short_side: int | None) -> dict[int, NDArray[np.uint8]]:
        """Frames lost when started from their key packet: decoded from the start, else the nearest earlier good one."""
        images: dict[int, NDArray[np.uint8]] = {}
        waiting = list(lost)
        before: av.VideoFrame | None = None
        for index, frame in self._decode(0):
            while waiting and waiting[0] < index:
                images[waiting.pop(0)] = self.picture(before or frame, short_side)
                self.missing += 1
            if waiting and waiting[0] == index:
                images[waiting.pop(0)] = self.picture(frame, short_side)
            if not waiting:
                break
            before = frame
        if waiting:
            if before is None:
                raise self._error("no frame can be decoded", "no_frames")
            images |= dict.fromkeys(waiting, self.picture(before, short_side))
            self.missing += len(waiting)
        return images


def _words(fault: BaseException) -> str:
    """What the library said, in one line and without the path."""
    return (getattr(fault, "strerror", None) or str(fault) or type(fault).__name__).splitlines()[0]
