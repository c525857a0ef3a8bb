"""Whether a file is a video or an image: by its first bytes, the same for every command.

The name of a file decides only where its content does not: for a damaged or missing file, which should be reported as
an unreadable video or image, and where folders are searched. A GIF with more than one picture is a video, and a GIF
with a single one is an image. Other animated pictures (WebP, PNG) are images, of which the first picture is read.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import BinaryIO

VIDEO = "video"
IMAGE = "image"
VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"}
    | {".mpeg", ".mpg", ".mts", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
HEAD_BYTES = 400  # enough for all signatures; MPEG-TS needs most, the first byte of three packets of 188
# An MP4 or QuickTime file starts with the length of its first box (4 bytes), followed by the type of that box.
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
# HEIC and AVIF images are MP4 containers, too. The brand that follows `ftyp` distinguishes them from videos.
_STILL_BRANDS = (b"heic", b"heix", b"mif1", b"avif")
_VIDEO_SIGNATURES = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"OggS",
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
)
_GIF = b"GIF8"
_IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\x00", b"MM\x00*")  # JPEG, PNG, TIFF


def media_type_of(path: Path) -> str | None:
    """VIDEO or IMAGE by the content or, if that matches nothing, by the suffix; None for any other file.

    The suffix matters for damaged videos, which should be reported as unreadable and not be skipped silently.
    """
    found = None
    # The reader reports why a file cannot be opened; here only the type is asked for. A pipe might wait for ever.
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                found = media_type_of_content(file)
    suffix = path.suffix.lower()
    by_suffix = VIDEO if suffix in VIDEO_SUFFIXES else IMAGE if suffix in IMAGE_SUFFIXES else None
    return found or by_suffix


def media_type_of_content(file: BinaryIO) -> str | None:
    """VIDEO or IMAGE by the content of an open file, which is read from its start; None for an unknown format."""
    file.seek(0)
    head = file.read(HEAD_BYTES)
    return VIDEO if head.startswith(_GIF) and _is_animated(file) else media_type_of_bytes(head)


def media_type_of_bytes(head: bytes) -> str | None:
    """VIDEO or IMAGE by the first HEAD_BYTES bytes of a file; None if they match no known format.

    They do not tell an animated GIF from a still one, so every GIF is an IMAGE here.
    """
    # A RIFF file is WebP or AVI, depending on the four bytes after its length.
    riff = head[8:12] if head.startswith(b"RIFF") else b""
    # Packets of an MPEG transport stream have 188 bytes and start with 0x47. Three in a row are hardly a coincidence.
    mpeg_ts = len(head) > 376 and head[0] == head[188] == head[376] == 0x47
    still = head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS
    if head.startswith((_GIF, *_IMAGE_SIGNATURES)) or riff == b"WEBP" or still:
        return IMAGE
    if head.startswith(_VIDEO_SIGNATURES) or head[4:8] in _MP4_BOXES or riff == b"AVI " or mpeg_ts:
        return VIDEO
    return None


def _is_animated(file: BinaryIO) -> bool:
    """Whether an open GIF has a second picture. A damaged one counts as still; the reader says what is wrong with it.

    Walks over the blocks of the file without decoding anything (GIF89a specification, sections 18 to 26).
    """
    file.seek(0)
    screen = file.read(13)  # signature, width, height, flags, background, aspect ratio
    pictures = 0
    _skip_colours(file, screen[10:11])
    while pictures < 2 and (kind := file.read(1)) in (b"\x21", b"\x2c"):
        if kind == b"\x2c":  # an image: position, size and flags, its own colours, and the LZW code size
            pictures += 1
            _skip_colours(file, file.read(9)[8:9])
        file.seek(1, 1)  # the LZW code size of an image, the label of an extension
        while length := file.read(1)[:1]:
            if not length[0]:  # an empty block ends the data
                break
            file.seek(length[0], 1)
    return pictures == 2


def _skip_colours(file: BinaryIO, flags: bytes) -> None:
    """Skip the colour table that bit 7 of `flags` announces; it has 3 * 2^(n + 1) bytes, n being the lowest bits."""
    if flags and flags[0] & 0x80:
        file.seek(3 << ((flags[0] & 7) + 1), 1)
