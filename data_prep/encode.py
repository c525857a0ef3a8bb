"""The one form of prepared videos: H.264 yuv420p in MP4, short groups of pictures, no B-frames, sound or metadata."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av

# MPEG's clock: whole ticks for every usual frame rate but 23.976, and within a hundredth of a millisecond there.
TIME_BASE = Fraction(1, 90000)


@dataclass(frozen=True)
class H264:
    """How to encode: key frames every `gop` frames, x264's constant quality `crf` and `preset`."""

    gop: int = 16
    crf: int = 23
    preset: str = "medium"


def ticks(times: Sequence[float]) -> list[int]:
    """Seconds, ascending -> ticks of TIME_BASE from the first frame on, strictly ascending."""
    result: list[int] = []
    for when in times:
        tick = round((when - times[0]) / TIME_BASE)
        result.append(max(tick, result[-1] + 1) if result else tick)
    return result


def write_video(
    path: Path, frames: Iterable[tuple[int, av.VideoFrame]], *, size: tuple[int, int], fps: float, settings: H264
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
