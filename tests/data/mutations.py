"""Damaged video files: seeded mutations of small clips in eleven combinations of container and codec.

Most mutations leave a file that still opens, with a header or a packet that says something absurd: a picture of 2 x
16384 pixels, a time base of zero, a codec that does not exist, a duration of thousands of years.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# (suffix, codec, pixel format, options)
KINDS = (
    ("mp4", "libx264", "yuv420p", {"preset": "ultrafast", "bf": "2", "g": "6"}),
    ("mkv", "libvpx-vp9", "yuv420p", {"deadline": "realtime", "cpu-used": "8", "g": "6"}),
    ("webm", "libvpx", "yuv420p", {"deadline": "realtime", "cpu-used": "8"}),
    ("avi", "mpeg4", "yuv420p", {"bf": "2"}),
    ("mov", "mjpeg", "yuvj420p", {}),
    ("flv", "flv", "yuv420p", {}),
    ("ts", "libx264", "yuv420p", {"preset": "ultrafast", "g": "6"}),
    ("gif", "gif", "rgb8", {}),
    ("mkv", "libx264", "yuv420p", {"preset": "ultrafast", "g": "6"}),
    ("mov", "libx264", "yuv420p", {"preset": "ultrafast", "g": "6"}),
    ("mp4", "libx265", "yuv420p", {"preset": "ultrafast", "x265-params": "log-level=none"}),
)
# Where numbers and codecs are found: boxes of MP4 and MOV, IDs of Matroska (TimestampScale, Duration, FrameRate, pixel
# and display sizes, CodecID), chunks of AVI, tags of FLV and the descriptors of GIF.
MARKERS = (
    *b"mvhd tkhd mdhd elst stsd avc1 hev1 jpeg stts ctts stsz stco stsc stss pasp colr hdlr trak moov avcC".split(),
    *(b"\x2a\xd7\xb1", b"\x44\x89", b"\x23\xe3\x83", b"\xb0", b"\xba", b"\x54\xb0", b"\x54\xba", b"\x86"),
    *b"avih strh strf idx1 vids FMP4 hdrl 00dc".split(),
    *b"duration width height framerate videocodecid".split(),
    *(b"GIF89a", b"\x21\xf9\x04", b"NETSCAPE2.0"),
)
NUMBERS = (0, 1, 2, 3, 0x7F, 0xFF, 1000, 0x4000, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def write_clip(path: Path, codec: str, pixel_format: str, options: dict[str, str], seed: int = 0) -> Path:
    """Twelve frames of coarse noise, 64 x 48 pixels that are not square; MP4 and MOV turn them upside down."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 6, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(25), options=options)
        stream.height, stream.width = noise.shape[1:3]
        stream.pix_fmt = pixel_format
        if codec != "gif":
            stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        if path.suffix in (".mp4", ".mov") and hasattr(stream, "set_display_rotation"):
            stream.set_display_rotation(180)
        for image in noise:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pixel_format)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_mutations(folder: Path, numbers: Iterable[int]) -> list[Path]:
    """Write the mutations with the given numbers to `folder` and return their paths.

    Mutation i is a function of i alone. Its name tells what was done: 0042-truncate.mkv.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for kind, (suffix, codec, pixel_format, options) in enumerate(KINDS):
        path = write_clip(folder / f"source-{kind}.{suffix}", codec, pixel_format, options)
        sources.append((path.read_bytes(), suffix))
        path.unlink()
    paths = []
    for number in numbers:
        rng = np.random.default_rng(number)
        data, suffix = sources[number % len(sources)]
        mutation = MUTATIONS[int(rng.integers(len(MUTATIONS)))]
        paths.append(folder / f"{number:04d}-{mutation.__name__}.{suffix}")
        paths[-1].write_bytes(mutation(bytearray(data), rng))
    return paths


def flip_bits(data: bytearray, rng: np.random.Generator) -> bytes:
    for place in rng.integers(len(data), size=int(rng.choice([1, 3, 30, 300]))):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def overwrite_run(data: bytearray, rng: np.random.Generator) -> bytes:
    start, stop = _stretch(data, rng)
    data[start:stop] = bytes([int(rng.choice([0, 0xFF]))]) * (stop - start)
    return bytes(data)


def truncate(data: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(data[: int(rng.integers(1, max(2, len(data))))])


def remove(data: bytearray, rng: np.random.Generator) -> bytes:
    start, stop = _stretch(data, rng)
    return bytes(data[:start] + data[stop:])


def duplicate(data: bytearray, rng: np.random.Generator) -> bytes:
    start, stop = _stretch(data, rng)
    return bytes(data[:stop] + data[start:])


def swap(data: bytearray, rng: np.random.Generator) -> bytes:
    """Swap two neighbouring stretches, as if boxes had been written in the wrong order."""
    a, b, c = sorted(int(place) for place in rng.integers(len(data), size=3))
    return bytes(data[:a] + data[b:c] + data[a:b] + data[c:])


def change_number(data: bytearray, rng: np.random.Generator) -> bytes:
    """Overwrite one to four numbers after markers: sizes, durations, time bases, tables, matrix, pixel aspect."""
    for _ in range(int(rng.integers(1, 5))):
        place, marker = _marker(data, rng)
        form = str(rng.choice([">B", ">H", ">I", "<I", "<H", ">Q"]))
        value = int(rng.choice(NUMBERS)) % 256 ** struct.calcsize(form)
        start = place + len(marker) + int(rng.choice([0, 1, 4, 8, 12, 16, 20, 24, 32, 36, 40, 52, 76, 78]))
        data[start : start + struct.calcsize(form)] = struct.pack(form, value)
    return bytes(data)


def change_name(data: bytearray, rng: np.random.Generator) -> bytes:
    """Overwrite a marker: a box, chunk or codec that does not exist."""
    place, marker = _marker(data, rng)
    data[place : place + len(marker)] = rng.integers(32, 127, len(marker), dtype=np.uint8).tobytes()
    return bytes(data)


Mutation = Callable[[bytearray, np.random.Generator], bytes]
# Changed headers are the most fruitful, so they are drawn more often.
MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    overwrite_run,
    truncate,
    remove,
    duplicate,
    swap,
    change_name,
    change_name,
    change_number,
    change_number,
    change_number,
    change_number,
)


def _stretch(data: bytearray, rng: np.random.Generator) -> tuple[int, int]:
    """(start, stop) of a stretch of a few bytes up to a fifth of the file."""
    start = int(rng.integers(len(data)))
    return start, start + int(rng.choice([1, 4, 16, 64, 512, len(data) // 5]))


def _marker(data: bytearray, rng: np.random.Generator) -> tuple[int, bytes]:
    """(place, marker) of a marker that the file contains; a random place in the first 256 bytes if it has none."""
    found = [marker for marker in MARKERS if marker in data]
    if not found:
        return int(rng.integers(min(256, len(data)))), b"\0\0\0\0"
    marker = found[int(rng.integers(len(found)))]
    places = [data.find(marker)]
    while (place := data.find(marker, places[-1] + 1)) >= 0:
        places.append(place)
    return places[int(rng.integers(len(places)))], marker
