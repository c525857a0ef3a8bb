"""The prepared form that all videos of a data set share, and writing it.

H.264 yuv420p in MP4, with the index (moov) in front; short groups of pictures, no B-frames, no edit list, no sound, no
metadata. All decoders read this form alike, and a seek is cheap: it decodes at most `gop` frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
from av.video.reformatter import ColorRange

if TYPE_CHECKING:
    from av.container import InputContainer

# The MPEG clock. At all common frame rates a frame lasts a whole number of ticks, except at 23.976 and 59.94 fps, where
# times are rounded by less than a hundredth of a millisecond.
TIME_BASE = Fraction(1, 90000)
# Colour matrices that all readers treat as BT.601 (H.264 table E-5): unspecified (2), and BT.601 under both its names.
BT601_COLORSPACES = {2, 5, 6}
# Written by FFmpeg's MP4 muxer itself, so their presence says nothing about a source.
MUXER_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "language", "handler_name", "vendor_id"}


@dataclass(frozen=True)
class H264Settings:
    """Settings of x264: a key frame every `gop` frames, constant quality `crf`, speed `preset`."""

    gop: int = 16
    crf: int = 23
    preset: str = "medium"


def to_ticks(times: Sequence[float]) -> list[int]:
    """Seconds, ascending -> ticks of TIME_BASE counted from the first time, strictly ascending as a muxer requires."""
    result: list[int] = []
    for when in times:
        tick = round((when - times[0]) / TIME_BASE)
        result.append(max(tick, result[-1] + 1) if result else tick)
    return result


def write_video(
    path: Path,
    frames: Iterable[tuple[int, av.VideoFrame]],
    *,
    size: tuple[int, int],
    fps: float,
    settings: H264Settings,
) -> int:
    """Encode (tick, frame) pairs to `path`; `size` is (height, width), both even. Returns how many were written.

    Without B-frames the decoding order is the display order, and no edit list is needed. sc_threshold=0 turns off the
    extra key frames at scene cuts. One thread, since the work is spread over videos. Raises av.FFmpegError.
    """
    options = {"crf": str(settings.crf), "preset": settings.preset, "bf": "0", "threads": "1", "sc_threshold": "0"}
    options |= {"g": str(settings.gop), "keyint_min": str(settings.gop)}
    count = 0
    with av.open(
        str(path.absolute()), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}
    ) as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(10000), options=options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        # Without this, times are rounded to multiples of 1/fps, and videos with a variable frame rate fail with
        # "non monotonically increasing dts".
        stream.codec_context.time_base = TIME_BASE
        for tick, frame in frames:
            frame.pts, frame.time_base, frame.duration = tick, TIME_BASE, max(1, round(1 / fps / TIME_BASE))
            out.mux(stream.encode(frame))
            count += 1
        out.mux(stream.encode(None))
    return count


def difference_from_prepared_form(path: Path, *, short_side: int, gop: int) -> str:
    """The first way in which a video differs from the prepared form; '' if it has that form.

    Reads all packets but decodes nothing. Of metadata, only what a muxer writes by itself is allowed. Rotation is not
    checked here: it may be recorded in the frames alone, so the caller has to look at one. Raises av.FFmpegError,
    OSError.
    """
    with av.open(str(path.absolute())) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        size = (codec.height, codec.width)
        tags_found = {key for tags in (container.metadata, stream.metadata) for key in tags} - MUXER_TAGS
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
        }
        found = [difference for difference, applies in differences.items() if applies]
        return found[0] if found else _packet_difference(container, gop)


def _packet_difference(container: InputContainer, gop: int) -> str:
    """The first difference in the packets: key frames too far apart, reordered frames, or a late start."""
    since_key, last = gop, -1
    for packet in container.demux(video=0):
        if not packet.size:  # the empty packet that ends the stream
            continue
        since_key = 1 if packet.is_keyframe else since_key + 1
        if since_key > gop:
            return f"key frames more than {gop} frames apart"
        # B-frames make pts and dts differ; an edit list discards packets.
        if packet.pts is None or packet.pts <= last or packet.pts != packet.dts or packet.is_discard:
            return "B-frames or an edit list"
        if last < 0 and packet.pts:
            return "does not start at 0"
        last = packet.pts
    return ""


def _index_first(path: Path) -> bool:
    """Whether the moov box of an MP4 comes before its mdat box, so that a reader finds the index without seeking."""
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if kind in (b"moov", b"mdat"):
                return kind == b"moov"
            # A box is a 32-bit length (of the whole box), four letters, contents; length 1: 64 bits of length follow.
            length = int.from_bytes(head[8:], "big") if length == 1 else length
            if length < 8:
                return False
            file.seek(length - len(head), 1)
    return False
