"""Video reader: gives the frames of one video file by index, with their true presentation times, through PyAV.

Letters: n frames of the video; H W pixels as shown, that is, after rotation and with square pixels.

The reader never seeks in the container and never trusts frame counts in headers: seeks land on the wrong frame in
several formats, and the counts are often wrong. Instead it demuxes all packets of the file once, keeps them in memory,
and reaches a frame by decoding forward from the key packet before it.

How a frame gets its index. A packet holds one compressed picture and carries its `pts`, the time at which the picture
is shown. Packets come in decoding order, which differs from presentation order if there are B-frames. The index of a
frame is therefore the rank of its pts among all packets that are shown. An edit list (MP4's way to trim a video without
re-encoding it) makes FFmpeg mark the packets before the new start as "discard": they have to be decoded, since later
pictures refer to them, but they are not shown and get no index. Nor are pictures shown that precede the first key frame
because a video was cut there, unless they can be decoded. In formats whose packets are unreliable in this respect, the
whole file is decoded once and its frames are counted.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from heapq import heappop, heappush
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import ColorTrc

from video_swinv2.data.display import (
    MAX_PIXELS,
    Box,
    Display,
    Orientation,
    PictureSizeError,
    check_pixels,
    size_for,
)
from video_swinv2.errors import UserError

if TYPE_CHECKING:
    import torch
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream
    from numpy.typing import NDArray

# Containers that store a presentation time for each picture, and codecs in which every packet is exactly one shown
# picture. In others, packets cannot be counted as frames: AVI stores decoding times, MPEG-TS may have one packet per
# field, and a VP8 packet may show nothing.
TIMED_CONTAINERS = frozenset({"mov", "mp4", "matroska", "webm"})
ONE_PICTURE_CODECS = frozenset({"h264", "hevc", "vp9", "av1", "libdav1d", "mjpeg"})
# AVI gives the n-th packet, in decoding order, the n-th time stamp.
DECODING_TIMED_CONTAINERS = frozenset({"avi"})
MAX_B_FRAMES = 16  # in a row; x264's limit, and no other encoder makes more
MAX_RETAINED_BYTES = 256 * 2**20  # limit of packets kept in memory; a larger file is demuxed again for each request
# What a packet takes besides its data: PyAV's and FFmpeg's objects and what is noted about it, measured as 0.6 to 0.9
# kB in MP4, Matroska and MPEG-TS. In a long video of small pictures this is far more than the data.
PACKET_OVERHEAD_BYTES = 1024
# HDR transfer characteristics. Taken for those of ordinary video, they make pictures pale and dark.
HDR_TRANSFERS: dict[int, str] = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}


class DecodeError(UserError):
    """A file that cannot be read.

    `reason` is one of missing, empty, not_video, not_image, no_frames, hdr, decode_error and timeout.
    """

    def __init__(self, message: str, reason: str = "decode_error") -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def named_errors(name: Path | str) -> Iterator[None]:
    """Raise whatever the libraries raise because of a file as a DecodeError whose message begins with its `name`.

    There is no list of what a damaged file can raise. Besides FFmpeg's errors there are AttributeError where PyAV has
    None, OverflowError and ZeroDivisionError from broken time stamps, and MemoryError or torch's RuntimeError from a
    broken size. A UserError, which has its message already, passes, and so do Ctrl-C and the end of the process.
    """
    try:
        yield
    except UserError:
        raise
    except PictureSizeError as fault:
        raise DecodeError(f"{name}: {fault}") from fault
    except Exception as fault:
        what = "takes too much memory to decode" if isinstance(fault, MemoryError) else "cannot be decoded"
        raise DecodeError(f"{name}: {what} ({one_line(fault)})") from fault


class VideoReader:
    """One open video file; a context manager.

    Attributes:
        times: float64 (n,), presentation time of each frame in seconds, strictly ascending.
        fps: the average frame rate.
        codec: FFmpeg's name of the decoder.
        stand_ins: how many of the frames requested so far could not be decoded and were replaced by a neighbour.

    `time_limit_seconds` applies to opening and to each pass of decoding separately. A file with a picture of more than
    `max_pixels` pixels is refused before memory is allocated for it. Whatever goes wrong with the file, in whichever
    library, is raised as a DecodeError whose message begins with the path.
    """

    def __init__(self, path: Path, *, time_limit_seconds: float = 60.0, max_pixels: int = MAX_PIXELS) -> None:
        self.path = Path(path)
        self.stand_ins = 0
        self._limit = time_limit_seconds
        self._max_pixels = max_pixels
        self._deadline = time.monotonic() + time_limit_seconds
        self._packets: list[Packet[VideoStream]] | None = []
        with named_errors(self.path):
            self._container = self._open()
            try:
                self._stream = find_video_stream(self._container, str(self.path), max_pixels)
                self._display = Display(self._stream, max_pixels)
                self.codec = self._stream.codec_context.name
                self._index_frames()
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
        """(height, width) in pixels as shown. Decodes the first frame if none has been decoded so far."""
        if self._display.size is None:
            for _ in self.sequence():
                break
        if self._display.size is None:
            raise self._error("no frame can be decoded", "no_frames")
        return self._display.size

    def close(self) -> None:
        """Close the file. Without this, PyAV leaks memory."""
        self._packets = []
        self._container.close()

    def frames(
        self, indices: Sequence[int], short_side: int | None = None, crop: Callable[[int, int], Box] | None = None
    ) -> torch.Tensor:
        """Decode the frames with the given indices -> uint8 (len(indices), 3, H, W), RGB.

        Indices may come in any order and repeat. A frame that cannot be decoded is replaced (see `decode`).
        Raises IndexError for an index outside 0..n-1 and DecodeError if nothing can be decoded.

        Args:
            short_side: resize frames, up or down, so that their short side has exactly that many pixels.
            crop: called once with the height and width of the frames, gives the part of them that is returned. The rest
                is not converted to RGB where that can be avoided.
        """
        import torch  # not at the top: data_prep imports this file and has to start without loading torch

        rows: dict[int, list[int]] = {}  # of the result, by the frame that they show
        for row, index in enumerate(indices):
            rows.setdefault(index, []).append(row)
        decoded = self.decode(rows)  # not below, where an IndexError would be blamed on the file
        with named_errors(self.path):
            # Each frame is written to its rows as soon as it is decoded, so that there is a single copy of the pixels:
            # 16 frames of 8K are 1.6 GB.
            pixels: NDArray[np.uint8] | None = None
            box: Box | None = None
            for index, frame in decoded:
                if pixels is None and crop is not None:
                    box = crop(*size_for(self._display.note(frame), short_side))
                planes = self._display.planes(frame, short_side, box)
                if pixels is None:
                    pixels = np.empty((len(indices), 3, *planes[0].shape), np.uint8)
                for row in rows[index]:
                    for channel, plane in zip(pixels[row], planes, strict=True):
                        channel[:] = plane
            return torch.from_numpy(pixels)

    def sequence(self, first: int = 0) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) for every frame that can be decoded, in presentation order.

        Starts at the key frame before `first`, so earlier frames may come first. Frames are as decoded, neither rotated
        nor resized; `picture` and `planes` do both.
        """
        # For `first` = 0, start at the first packet even if it is no key packet: those frames before the first key
        # packet that can be decoded have indices.
        packet = next(self._runs([first]))[0] if first else 0
        return self._named(self._decode(packet))

    def decode(self, indices: Iterable[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) once for each of the given frames, as decoded; ascending, but damaged frames come last.

        Groups of pictures without such a frame are skipped. In the other groups, pictures that no other picture refers
        to are skipped.

        A frame that is lost when decoding starts at the key frame before it may be intact when decoding starts at the
        beginning of the file. If it is not, the nearest earlier frame that can be decoded takes its place, or the next
        one if there is no earlier one; `stand_ins` counts these replacements. How the decoder fills in the lost parts
        of a damaged picture can depend on which frames are asked for, since it uses those decoded before.

        Raises IndexError for an index outside 0..n-1 and DecodeError if no frame at all can be decoded.
        """
        wanted = sorted(set(indices))
        if not wanted or wanted[0] < 0 or wanted[-1] >= len(self):
            raise IndexError(f"{self.path}: has frames 0..{len(self) - 1}, asked for {wanted[:1]}..{wanted[-1:]}")
        return self._named(self._decode_wanted(wanted))

    @property
    def orientation(self) -> Orientation:
        """How a frame from `sequence` has to be rotated or mirrored for display."""
        # `size` is read for its side effect: it decodes a frame if necessary, which sets the orientation.
        return self._display.orientation if self.size else Orientation()

    def picture(self, frame: av.VideoFrame, short_side: int | None = None) -> NDArray[np.uint8]:
        """A decoded frame as shown -> uint8 (H, W, 3), RGB, its short side resized to `short_side`."""
        with named_errors(self.path):
            return self._display.picture(frame, short_side)

    def planes(self, frame: av.VideoFrame, short_side: int | None = None) -> list[NDArray[np.uint8]]:
        """Red, green and blue of `picture`: uint8 (H, W) each, without copying them into one array."""
        with named_errors(self.path):
            return self._display.planes(frame, short_side)

    def _named(self, frames: Iterator[tuple[int, av.VideoFrame]]) -> Iterator[tuple[int, av.VideoFrame]]:
        """`named_errors` for a generator, whose code runs only when its frames are taken."""
        with named_errors(self.path):
            yield from frames

    def _error(self, what: str, reason: str = "decode_error") -> DecodeError:
        return DecodeError(f"{self.path}: {what}", reason)

    def _start_clock(self) -> None:
        self._deadline = time.monotonic() + self._limit

    def _check_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise self._error(f"not read within {self._limit:g} s; remove it or raise the time limit", "timeout")

    def _open(self) -> InputContainer:
        if not self.path.exists():
            raise self._error("no such file", "missing")
        if not self.path.is_file():
            raise self._error("is not a file", "not_video")
        if not self.path.stat().st_size:
            raise self._error("is empty (0 bytes)", "empty")
        try:
            # Absolute, because FFmpeg takes a relative `name:rest` for a protocol and `-name` for an option.
            return open_container(str(self.path.absolute()), self._max_pixels)
        except (av.FFmpegError, OSError, ValueError) as fault:
            raise self._error(f"is not a video FFmpeg can open ({one_line(fault)})", "not_video") from fault

    def _index_frames(self) -> None:
        """Demux the file once, keep its packets and number its frames (see the docstring of this file)."""
        packets, size = [], 0
        for packet in self._demuxed(self._container, self._stream):
            size += packet.size + sum(data.data_size for data in packet.iter_sidedata()) + PACKET_OVERHEAD_BYTES
            packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
            if self._packets is not None:
                self._packets.append(packet)
            if size > MAX_RETAINED_BYTES:
                self._packets = None  # too large to keep: `_packets_from` demuxes the file again for every request
        shown = [pts for pts, _, discard in packets if not discard and pts is not None]
        formats = set(self._container.format.name.split(","))  # FFmpeg gives "mov,mp4,m4a,3gp,3g2,mj2" for all of them
        # Packets are trusted if every packet that is shown has a pts and no two have the same one.
        by_packet = (
            bool(formats & TIMED_CONTAINERS)
            and self._stream.codec_context.name in ONE_PICTURE_CODECS
            and len(set(shown)) == len(shown) == sum(not discard for _, _, discard in packets)
        )
        self._index_of_pts: dict[int | None, int] | None = None  # None: frames are counted as they are decoded
        # Key packets, by position in the file and by pts, both ascending. Decoding may start at any of them. The first
        # packet is always listed, with the smallest possible pts, so that every frame has a key packet before it.
        # Where packets are not trusted it stays the only one, and every request decodes from the start of the file.
        self._key_packets = [0]
        self._key_pts = [-(2**63)]
        if by_packet:
            shown = sorted(self._without_lost_start(shown, packets))
            self._index_of_pts = {pts: index for index, pts in enumerate(shown)}
            for place, (pts, is_key, _) in enumerate(packets):
                if is_key and place and pts is not None and pts > self._key_pts[-1]:
                    self._key_packets.append(place)
                    self._key_pts.append(pts)
            self._pts = shown
        else:
            decoded = [frame.pts for _, frame in self._decode(0)]
            # Sorted, the decoding times of AVI are presentation times (see `presentation_times`). Frames without a time
            # are appended with the last known one; `_set_times` spreads them.
            self._pts = sorted(pts for pts in decoded if pts is not None)
            self._pts += [self._pts[-1] if self._pts else 0] * (len(decoded) - len(self._pts))
        self._set_times()

    def _without_lost_start(self, shown: list[int], packets: list[tuple[int | None, bool, bool]]) -> list[int]:
        """`shown` without the pts of pictures before the first key frame that the decoder does not yield.

        These are the first pictures of a video that was cut, without re-encoding, between key frames, or whose first
        group of pictures is open, so that it begins with pictures that refer to the group before. packets: their (pts,
        whether a key packet, whether discarded).
        """
        first_key = min((pts for pts, is_key, _ in packets if is_key and pts is not None), default=2**63)
        if not any(pts < first_key for pts in shown):
            return shown
        decoded = set()
        for _, frame in self._decode(0):
            if frame.pts is not None and frame.pts >= first_key:
                break
            decoded.add(frame.pts)
        return [pts for pts in shown if pts >= first_key or pts in decoded]

    def _set_times(self) -> None:
        """Convert the pts of all frames, ascending, to `times` in seconds, strictly ascending, and compute `fps`."""
        if not self._pts:
            raise self._error("no frame can be decoded", "no_frames")
        base = float(self._stream.time_base or Fraction(1, 90000))
        rate = max(0.0, float(self._stream.average_rate or 0)) or 25.0  # 25 frames per second if the file does not say
        times = np.array(self._pts, dtype=np.float64) * base
        # Frames without a time of their own have that of a frame before them. Those with the same time are spread by a
        # frame period, but closer if the next larger time comes too early. first: the first frame of each such group.
        first = np.flatnonzero(np.diff(times, prepend=-np.inf) > 0)  # (groups,)
        counts = np.diff(first, append=len(times))
        gaps = np.diff(times[first], append=np.inf)  # from each group to the next
        steps = np.minimum(1 / rate, gaps / counts)
        times += np.repeat(steps, counts) * (np.arange(len(times)) - np.repeat(first, counts))
        if not np.all(np.diff(times) > 0):  # the steps are smaller than what a float64 so large can tell apart
            raise self._error("its time stamps are damaged")
        self.times: NDArray[np.float64] = times
        self.fps = (len(times) - 1) / float(times[-1] - times[0]) if len(times) > 1 else rate

    def _demuxed(self, container: InputContainer, stream: VideoStream) -> Iterator[Packet[VideoStream]]:
        try:
            for packet in container.demux(stream):
                self._check_clock()
                # PyAV ends a stream with an empty packet that flushes the decoder; `_decode` flushes it by itself.
                if packet.size:
                    yield packet
        except (av.FFmpegError, OSError, ValueError):
            return  # a truncated or damaged file: the packets before the damage are used as the video

    def _packets_from(self, start: int) -> Iterator[Packet[VideoStream]]:
        """The packets of the file from position `start` on."""
        if self._packets is not None:
            # Not with `islice`, which would go through all packets before `start` for every request.
            yield from (self._packets[place] for place in range(start, len(self._packets)))
            return
        with open_container(str(self.path.absolute()), self._max_pixels) as container:
            yield from islice(self._demuxed(container, container.streams.video[self._stream_place()]), start, None)

    def _stream_place(self) -> int:
        """The position of the stream among the video streams; `stream.index` counts audio and others too."""
        return [stream.index for stream in self._container.streams.video].index(self._stream.index)

    def _decode(self, start: int, wanted: Sequence[int] | None = None) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame) in presentation order, decoding forward from packet `start`. Skips damaged packets.

        With `wanted`, other frames may be missing.
        """
        self._start_clock()
        codec = self._stream.codec_context
        codec.flush_buffers()  # a request that stopped early leaves frames in the decoder
        # The pts of all pictures that are needed for themselves. H.264 marks those that no other picture refers to,
        # which are half or more of them in a video with B-frames; its decoder can be told to pass over these. HEVC's
        # marks do not exclude references from a higher temporal layer, and other codecs have none.
        needed: set[int] | None = None
        if wanted is not None and self._index_of_pts is not None and codec.name == "h264":
            needed = {self._pts[index] for index in wanted}
        codec.skip_frame = "DEFAULT"
        count = 0
        # Decoders hold frames back to reorder them; the final None makes this one release the rest.
        for packet in chain(self._packets_from(start), (None,)):
            self._check_clock()
            if needed is not None and packet is not None:
                codec.skip_frame = "DEFAULT" if packet.pts in needed else "NONREF"
            for frame in decode_packet(codec, packet, self._max_pixels):
                self._display.note(frame)
                # A frame whose pts has no index is discarded by the edit list. One without a pts, which damage can
                # produce, is none of the frames that were numbered by theirs.
                index = count if self._index_of_pts is None else self._index_of_pts.get(frame.pts)
                count += 1
                if index is not None:
                    yield index, frame

    def _decode_wanted(self, wanted: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """`decode` for ascending indices, with one forward pass per run (see `_runs`)."""
        damaged: list[int] = []
        for start, run in self._runs(wanted):
            left = set(run)
            for index, frame in self._decode(start, run):
                if index in left:
                    left.remove(index)
                    yield index, frame
                # Beyond the last wanted frame, whatever is still missing was lost to damage.
                if not left or index > run[-1]:
                    break
            damaged += sorted(left)
        # What the fast way did not yield is tried again from the start of the file, and replaced as a last resort.
        yield from self._decode_damaged(damaged)

    def _runs(self, wanted: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Divide the wanted frames, ascending, into runs: (key packet to start decoding at, frames to reach from it).

        A group of pictures is what lies between two key frames. A run continues into the next group, but ends when at
        least one whole group in between holds no wanted frame, since restarting at a later key packet is then cheaper
        than decoding the group.
        """
        run: list[int] = []
        first = last = -1
        for index in wanted:
            # The group of a frame: that of the last key packet whose pts is not later than the frame's.
            group = bisect_right(self._key_pts, self._pts[index]) - 1
            if run and group > last + 1:
                yield self._key_packets[first], run
                run = []
            first, last = (first if run else group), group
            run.append(index)
        yield self._key_packets[first], run

    def _decode_damaged(self, damaged: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
        """The frames `damaged`, ascending, from the start of the file, or what takes their place (see `decode`)."""
        if not damaged:
            return
        waiting = deque(damaged)
        before: av.VideoFrame | None = None
        for index, frame in self._decode(0):
            while waiting and waiting[0] < index:  # the decoder has passed this frame without yielding it
                self.stand_ins += 1
                yield waiting.popleft(), before or frame
            if waiting and waiting[0] == index:
                yield waiting.popleft(), frame
            if not waiting:
                return
            before = frame
        if before is None:
            raise self._error("no frame can be decoded", "no_frames")
        for index in waiting:  # after the last frame that can be decoded
            self.stand_ins += 1
            yield index, before


def presentation_times(frames: Iterable[av.VideoFrame]) -> Iterator[tuple[int | None, av.VideoFrame]]:
    """(pts, frame) in presentation order, for frames as decoded from one of DECODING_TIMED_CONTAINERS.

    They leave the decoder in presentation order, but each has the time at which its packet is decoded. An example with
    two B-frames, shown as 0 1 2 3 and decoded as 0 3 1 2: their time stamps are 0 2 3 1. In ascending order these are
    the presentation times. At most MAX_B_FRAMES frames come between a time stamp and its place in that order, so no
    more frames than that have to wait. Frames without a time stamp leave None for the last ones.
    """
    waiting: deque[av.VideoFrame] = deque()
    stamps: list[int] = []  # a heap
    for frame in frames:
        waiting.append(frame)
        if frame.pts is not None:
            heappush(stamps, frame.pts)
        if len(waiting) > MAX_B_FRAMES:
            yield heappop(stamps) if stamps else None, waiting.popleft()
    for frame in waiting:
        yield heappop(stamps) if stamps else None, frame


def decode_packet(codec: VideoCodecContext, packet: Packet[VideoStream] | None, max_pixels: int) -> list[av.VideoFrame]:
    """The frames that the decoder gives out after a packet; none if it is damaged.

    After None or an empty packet it gives out all frames that it still holds. Raises PictureSizeError if the packet
    holds a picture of more than `max_pixels` pixels, and MemoryError.
    """
    try:
        frames = codec.decode(packet)
    except MemoryError:  # one of FFmpeg's errors as well
        raise
    except (av.FFmpegError, ValueError):
        # FFmpeg has refused to allocate a picture that is far too large (see `decoder_options`), or the packet is
        # damaged. In the first case, most decoders tell the size.
        check_pixels(codec.height, codec.width, max_pixels)
        return []
    for frame in frames:
        check_pixels(frame.height, frame.width, max_pixels)
    return frames


def decoder_options(max_pixels: int) -> dict[str, str]:
    """Options that make FFmpeg compare the size of each picture with a ceiling before it allocates memory for it."""
    # Compared is the memory's size in pixels. Its sides are padded by less than 64 pixels each, which for sides of up
    # to 100,000 pixels is less than 2^24 pixels in all.
    return {"max_pixels": str(max_pixels + 2**24)}


def open_container(
    target: str, max_pixels: int = MAX_PIXELS, *, format: str | None = None, timeout: float | None = None
) -> InputContainer:
    """Open a file or stream for FFmpeg to read. The arguments after `max_pixels` are those of `av.open`."""
    # Metadata that is not UTF-8 is common in old files and must not make them unreadable, hence "replace". The options
    # are for the decoders with which FFmpeg looks at the first pictures while it opens a file.
    options = decoder_options(max_pixels)
    return av.open(target, format=format, timeout=timeout, metadata_errors="replace", options=options)


def find_video_stream(container: InputContainer, name: str, max_pixels: int = MAX_PIXELS) -> VideoStream:
    """The video stream that players and the `ffmpeg` command show: the one marked as default, or else the largest.

    Cover pictures, which music and some MP4 files carry as video, do not count. The decoder of the stream uses no
    threads of its own and refuses pictures of more than `max_pixels` pixels. `name` is what errors begin with. Raises
    DecodeError, also for HDR video, and PictureSizeError.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not streams:
        raise DecodeError(f"{name}: has no video stream", "not_video")
    # Not simply the first one, because some recorders write a small preview with few frames before the video itself.
    stream = max(streams, key=_prominence)
    if stream.codec_context is None:  # contrary to PyAV's stubs, if FFmpeg has no decoder for the stream
        raise DecodeError(f"{name}: its video codec is unknown to FFmpeg", "no_frames")
    if transfer := HDR_TRANSFERS.get(stream.codec_context.color_trc):
        raise DecodeError(
            f"{name}: is HDR video ({transfer}), whose brightness would be misread; convert it to BT.709 first "
            "(FFmpeg's filters zscale and tonemap)",
            "hdr",
        )
    check_pixels(stream.codec_context.height, stream.codec_context.width, max_pixels)
    # The size may change within a stream, and what the container says may be wrong.
    stream.codec_context.options = decoder_options(max_pixels)
    # Decoder threads deadlock in loader workers (PyAV#1849, #1962), so parallelism is over videos instead.
    stream.codec_context.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    return stream


def _prominence(stream: VideoStream) -> tuple[bool, bool, int]:
    """Sorts video streams by whether they can be decoded, are marked as default, and by their size in pixels."""
    codec = stream.codec_context
    if codec is None:
        return False, False, 0
    return True, bool(stream.disposition & Disposition.default), codec.width * codec.height


def one_line(fault: BaseException) -> str:
    """A library's error on one line, without the path that PyAV adds to it."""
    # The message of a system's or FFmpeg's error speaks for itself. Others ("'key'", "0") need their type.
    if words := getattr(fault, "strerror", None):
        return str(words).splitlines()[0]
    return ": ".join([type(fault).__name__, *str(fault).splitlines()[:1]])
