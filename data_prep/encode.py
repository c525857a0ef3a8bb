"""The prepared form of videos: encoding to it, and checking whether a file already has it.

All videos of a data set are H.264 yuv420p in MP4, with the index (moov) in front of the frames, short closed groups of
pictures, no edit list, no sound and no metadata. All decoders read such a file in the same way, and a seek is cheap,
because at most `gop` frames have to be decoded.

Most frames are B-frames that no other frame refers to. `VideoReader` passes over those that a clip does not show.

As in transcode.py, a tick is 1/90000 s, and sizes are (height, width) in pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import av
from av.video.reformatter import ColorRange

from video_swinv2.data.decode import open_container

if TYPE_CHECKING:
    from av.container import InputContainer, OutputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

# The 90 kHz clock of MPEG, in seconds per tick. At all common frame rates a frame lasts a whole number of ticks, except
# at 23.976 and 59.94 fps, where rounding changes times by less than a hundredth of a millisecond.
TIME_BASE = Fraction(1, 90000)
# Colour matrices (by their numbers in H.264 table E-5) that all readers treat as BT.601: unspecified (2), and the two
# under which BT.601 itself is listed (5, 6).
BT601_COLORSPACES = {2, 5, 6}
# FFmpeg's MP4 muxer writes these tags by itself, so they do not count as metadata of the source.
MUXER_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "language", "handler_name", "vendor_id"}


@dataclass(frozen=True)
class H264Settings:
    """Settings of x264: a key frame every `gop` frames, constant quality `crf` (lower is better), speed `preset`.

    `b_frames` is how many B-frames stand between two frames that others refer to.
    """

    gop: int = 16
    crf: int = 23
    preset: str = "medium"
    b_frames: int = 3


def to_ticks(times: Sequence[float]) -> list[int]:
    """Ascending times in seconds -> ticks counted from the first of them, strictly ascending as a muxer requires."""
    # Two times that round to the same tick are moved apart: the later one is put one tick after the earlier.
    result: list[int] = []
    for when in times:
        tick = round((when - times[0]) / TIME_BASE)
        result.append(max(tick, result[-1] + 1) if result else tick)
    return result


def x264_options(settings: H264Settings) -> dict[str, str]:
    """The options of FFmpeg's libx264 for the prepared form."""
    # threads=1: the work is parallelised over videos, one process each.
    # sc_threshold=0: no extra key frames at scene cuts.
    options = {"crf": str(settings.crf), "preset": settings.preset, "threads": "1", "sc_threshold": "0"}
    # b_strategy=0: always as many B-frames, whatever the pictures show.
    # b-pyramid=none: B-frames refer to other kinds of frames only, so each of them can be passed over.
    options |= {"bf": str(settings.b_frames), "b_strategy": "0", "b-pyramid": "none"}
    # x264's macroblock tree is off. With it, the same frames gave other bytes in one of twenty encodings of pictures of
    # 42 x 32: some frames were quantised differently, depending on what was in memory (never with asm=0, which is x264
    # without vector instructions). Without the tree the bytes are a function of the frames. At the same crf, files of
    # real clips get a tenth larger and 0.2 to 0.6 dB better.
    options["mbtree"] = "0"
    return options | {"g": str(settings.gop), "keyint_min": str(settings.gop)}


def muxer_options(settings: H264Settings) -> dict[str, str]:
    """The options of FFmpeg's MP4 muxer for the prepared form."""
    # faststart moves the index to the front when the file is closed. With B-frames, the first frame would be shown only
    # after others have been decoded, and an edit list would undo the delay; negative_cts_offsets avoids both.
    return {"movflags": "+faststart+negative_cts_offsets" if settings.b_frames else "+faststart"}


def write_video(
    path: Path,
    frames: Iterable[tuple[int, av.VideoFrame]],
    *,
    size: tuple[int, int],
    fps: float,
    settings: H264Settings,
) -> str:
    """Encode (tick, frame) pairs to `path`; `size` is (height, width), both even. Returns the pictures' sha256.

    `fps` goes into the header and gives the duration of frames; when a frame is shown depends on its tick alone. Raises
    av.FFmpegError.
    """
    digest = hashlib.sha256()
    # bitexact leaves the version of the muxer out of the file. The path is absolute because FFmpeg takes a bare "a:b"
    # for a protocol.
    options = muxer_options(settings) | {"fflags": "+bitexact"}
    with av.open(str(path.absolute()), "w", format="mp4", options=options) as out:
        rate = Fraction(fps).limit_denominator(10000)
        stream = out.add_stream("libx264", rate=rate, options=x264_options(settings))
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        # By default the encoder counts time in units of 1/fps. Times would be rounded to multiples of that, and videos
        # with a variable frame rate would fail with "non monotonically increasing dts".
        stream.codec_context.time_base = TIME_BASE
        for tick, frame in frames:
            frame.pts, frame.time_base, frame.duration = tick, TIME_BASE, max(1, round(1 / fps / TIME_BASE))
            _write_packets(out, stream.encode(frame), digest)
        _write_packets(out, stream.encode(None), digest)  # the frames that the encoder still holds
    return digest.hexdigest()


def pictures_sha256(path: Path) -> str:
    """The sha256 of all compressed pictures of a video, in the order of the file. Raises av.FFmpegError, OSError."""
    digest = hashlib.sha256()
    with open_container(str(path.absolute())) as container:
        for packet in container.demux(video=0):
            digest.update(bytes(packet))
    return digest.hexdigest()


def _write_packets(out: OutputContainer, packets: Sequence[Packet[VideoStream]], digest: hashlib._Hash) -> None:
    """Write packets of the encoder, and add to `digest` the bytes that they have in an MP4."""
    for packet in packets:
        # H.264 consists of NAL units. The encoder begins each with the bytes 0 0 1, before which there may be more
        # zeros; the MP4 muxer puts its length in their place, in 4 bytes (ISO/IEC 14496-15, 5.3.2). Within a unit 0 0 1
        # does not occur, and none ends in 0 (H.264, 7.4.1).
        for part in bytes(packet).split(b"\0\0\1")[1:]:
            unit = part.rstrip(b"\0")
            digest.update(len(unit).to_bytes(4, "big") + unit)
    out.mux(packets)


def difference_from_prepared_form(path: Path, *, short_side: int, gop: int) -> str:
    """The first way in which a video differs from the prepared form; '' if it has that form.

    All packets are read, but nothing is decoded. The only metadata allowed is what a muxer writes by itself. Rotation
    is not checked, because it may be recorded in the frames alone: the caller has to decode one and look at it. Raises
    av.FFmpegError, OSError.
    """
    with open_container(str(path.absolute())) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        size = (codec.height, codec.width)
        tags_found = {key for tags in (container.metadata, stream.metadata) for key in tags} - MUXER_TAGS
        # Each difference with whether the file has it, in the order in which they are reported.
        differences = {
            "not MP4": "isom" not in container.metadata.get("compatible_brands", ""),
            "has more than one stream": len(container.streams) != 1,
            "not H.264 yuv420p": (codec.name, codec.pix_fmt) != ("h264", "yuv420p"),
            "not limited-range BT.601 colours": codec.color_range == ColorRange.JPEG
            or codec.colorspace not in BT601_COLORSPACES,
            "pixels are not square": (stream.sample_aspect_ratio or 1) != 1,
            f"short side above {short_side}": min(size) > short_side,
            "odd size": any(side % 2 for side in size),
            f"metadata ({', '.join(sorted(tags_found))})": bool(tags_found),
            "index after the frames": not _index_first(path),
            "has an edit list": _has_edit_list(path),
        }
        found = [difference for difference, applies in differences.items() if applies]
        # The packets come last: going through them takes longer than everything above.
        return found[0] if found else _packet_difference(container, gop)


def _packet_difference(container: InputContainer, gop: int) -> str:
    """The first difference that the packets show: key frames too far apart, open groups of pictures, or a late start.

    '' if there is none.
    """
    # Packets since the last key frame, that one included. It starts at `gop`, so that a file whose first packet is not
    # a key frame exceeds the limit at once. `key` is the pts of that key frame; `seen` holds those of all packets.
    since_key, key, seen = gop, 0, set[int]()
    for packet in container.demux(video=0):
        if not packet.size:  # the empty packet that ends the stream
            continue
        since_key = 1 if packet.is_keyframe else since_key + 1
        if since_key > gop:
            return f"key frames more than {gop} frames apart"
        if packet.pts is None or packet.pts in seen or packet.is_discard:
            return "frames without a time of their own"
        if packet.is_keyframe:
            if not seen and packet.pts:
                return "does not start at 0"
            key = packet.pts
        # A picture that is stored after a key frame and shown before it refers to pictures on both sides of it.
        if packet.pts < key:
            return "open groups of pictures"
        seen.add(packet.pts)
    return ""


def _index_first(path: Path) -> bool:
    """Whether the index of an MP4 (moov box) comes before the frames (mdat), so that it is found without seeking."""
    with path.open("rb") as file:
        kinds = (kind for kind, _, _ in _boxes(file, path.stat().st_size))
        return next((kind == b"moov" for kind in kinds if kind in (b"moov", b"mdat")), False)


def _has_edit_list(path: Path) -> bool:
    """Whether an edit list of an MP4 does more than to show the whole video from its start on."""
    with path.open("rb") as file:
        for _, start, _ in _find_boxes(file, [b"moov", b"trak", b"edts", b"elst"], path.stat().st_size):
            file.seek(start)
            # version and flags, the number of edits, and of the first its duration and start, both longer in version 1
            edits = file.read(24)
            wide = edits[:1] == b"\1"
            if int.from_bytes(edits[4:8], "big") != 1 or any(edits[16:24] if wide else edits[12:16]):
                return True
    return False


def _find_boxes(file: BinaryIO, kinds: list[bytes], end: int) -> Iterator[tuple[bytes, int, int]]:
    """The boxes at a path of nested `kinds`, from the position of `file` up to `end`, as `_boxes` gives them."""
    for kind, start, stop in _boxes(file, end):
        if kind != kinds[0]:
            continue
        if len(kinds) == 1:
            yield kind, start, stop
        else:
            file.seek(start)
            yield from _find_boxes(file, kinds[1:], stop)


def _boxes(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(type, where its contents start, where they end) of the boxes between the position of `file` and `end`.

    An MP4 is a sequence of boxes (ISO/IEC 14496-12, 4.2): a 32-bit big-endian length, which counts the whole box, a
    type of four letters, the contents. Length 1 means that a 64-bit length follows the type; length 0 means that the
    box extends to the end of the file. Stops at a box that is damaged.
    """
    start = file.tell()
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        length, kind, size = int.from_bytes(head[:4], "big"), head[4:8], 8
        if length == 1:
            length, size = int.from_bytes(head[8:], "big"), 16
        stop = start + length if length else end
        if not start + size <= stop <= end:
            return
        yield kind, start + size, stop
        start = stop
