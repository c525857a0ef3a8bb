"""The one form of prepared videos: H.264 yuv420p in MP4, short groups of pictures, no B-frames, sound or metadata."""

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

# MPEG's clock: whole ticks for every usual frame rate but 23.976, and within a hundredth of a millisecond there.
TIME_BASE = Fraction(1, 90000)
# What readers take a file to be that says nothing, and BT.601 under its two names (H.264 table E-5: 5, 6; 2 unknown).
PLAIN_COLOURS = {2, 5, 6}
MUXER_TAGS = {"major_brand", "minor_version", "compatible_brands", "encoder", "language", "handler_name", "vendor_id"}


@dataclass(frozen=True)
class H264Settings:
    """How to encode: key frames every `gop` frames, x264's constant quality `crf` and `preset`."""

    gop: int = 16
    crf: int = 23
    preset: str = "medium"


def to_ticks(times: Sequence[float]) -> list[int]:
    """Seconds, ascending -> ticks of TIME_BASE from the first frame on, strictly ascending."""
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

    No B-frames, so that decoding order is the order shown and no edit list is needed. One thread: the work is spread
    over videos. Raises av.FFmpegError.
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
        # The rate alone would round every time to 1/fps: "non monotonically increasing dts" on videos of uneven rate.
        stream.codec_context.time_base = TIME_BASE
        for tick, frame in frames:
            frame.pts, frame.time_base, frame.duration = tick, TIME_BASE, max(1, round(1 / fps / TIME_BASE))
            out.mux(stream.encode(frame))
            count += 1
        out.mux(stream.encode(None))
    return count


def difference_from_prepared_form(path: Path, *, short_side: int, gop: int) -> str:
    """The first way in which a video is not of the prepared form, '' where it is; reads all packets, decodes nothing.

    Of metadata only what a muxer writes by itself may be there. Whether the picture is upright only a frame tells, and
    that is left to the caller. Raises av.FFmpegError, OSError.
    """
    with av.open(str(path.absolute())) as container:
        stream = container.streams.video[0]
        codec = stream.codec_context
        size = (codec.height, codec.width)
        said = {key for tags in (container.metadata, stream.metadata) for key in tags} - MUXER_TAGS
        wrong = {
            "not MP4": "isom" not in container.metadata.get("compatible_brands", ""),
            "not the picture alone": len(container.streams) != 1,
            "not H.264 yuv420p": (codec.name, codec.pix_fmt) != ("h264", "yuv420p"),
            "colours of another kind": codec.color_range == ColorRange.JPEG or codec.colorspace not in PLAIN_COLOURS,
            "pixels not square": (stream.sample_aspect_ratio or 1) != 1,
            f"short side above {short_side}": min(size) > short_side,
            "odd size": any(side % 2 for side in size),
            f"metadata ({', '.join(sorted(said))})": bool(said),
            "index behind the frames": not _index_first(path),
        }
        reasons = [reason for reason, is_so in wrong.items() if is_so]
        return reasons[0] if reasons else _packets_differ(container, gop)


def _packets_differ(container: InputContainer, gop: int) -> str:
    since_key, last = gop, -1
    for packet in container.demux(video=0):
        if not packet.size:
            continue
        since_key = 1 if packet.is_keyframe else since_key + 1
        if since_key > gop:
            return f"key frames more than {gop} frames apart"
        if packet.pts is None or packet.pts <= last or packet.pts != packet.dts or packet.is_discard:
            return "B-frames or an edit list"
        if last < 0 and packet.pts:
            return "does not start at 0"
        last = packet.pts
    return ""


def _index_first(path: Path) -> bool:
    """Whether an MP4's moov box comes before its mdat, so that it plays before it is there as a whole."""
    with path.open("rb") as file:
        while len(head := file.read(16)) >= 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:8]
            if kind in (b"moov", b"mdat"):
                return kind == b"moov"
            length = int.from_bytes(head[8:], "big") if length == 1 else length
            if length < 8:
                return False
            file.seek(length - len(head), 1)
    return False
