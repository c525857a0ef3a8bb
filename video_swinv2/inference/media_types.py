"""Detects whether a file is a video or an image from its content, and finds such files in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_swinv2.data.trees import IMAGE_SUFFIXES, VIDEO_SUFFIXES, files_below
from video_swinv2.errors import UsageError

VIDEO = "video"
IMAGE = "image"
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
_IMAGE_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")


def find_media_files(paths: Sequence[Path], wanted: str) -> list[tuple[Path, str | None]]:
    """Expand folders into the files of media type `wanted` inside them, sorted. Returns pairs (file, media type).

    A file that is given by name is always returned, with its media type or None. Raises UsageError for a folder without
    a file of the wanted type, and UserError for a folder that cannot be read.
    """
    found: list[tuple[Path, str | None]] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, media_type_of(path)))
            continue
        inside = [file for name in files_below(path) if media_type_of(file := path / name) == wanted]
        if not inside:
            raise UsageError(f"{path}: no {wanted} in this folder; this model takes {wanted}s")
        found += [(file, wanted) for file in inside]
    return found


def media_type_of(path: Path) -> str | None:
    """VIDEO or IMAGE by the first bytes or, if these match nothing, by the suffix; None for any other file.

    The suffix matters for damaged videos, which should be reported as unreadable and not be skipped silently.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        # The reader reports why it cannot be opened; here only the type is asked for.
        head = b""
    suffix = path.suffix.lower()
    by_suffix = VIDEO if suffix in VIDEO_SUFFIXES else IMAGE if suffix in IMAGE_SUFFIXES else None
    return media_type_of_bytes(head) or by_suffix


def media_type_of_bytes(head: bytes) -> str | None:
    """VIDEO or IMAGE by the first HEAD_BYTES bytes of a file; None if they match no known format."""
    # A RIFF file is WebP or AVI, depending on the four bytes after its length.
    riff = head[8:12] if head.startswith(b"RIFF") else b""
    # Packets of an MPEG transport stream have 188 bytes and start with 0x47. Three in a row are hardly a coincidence.
    mpeg_ts = len(head) > 376 and head[0] == head[188] == head[376] == 0x47
    still = head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS
    if head.startswith(_IMAGE_SIGNATURES) or riff == b"WEBP" or still:
        return IMAGE
    if head.startswith(_VIDEO_SIGNATURES) or head[4:8] in _MP4_BOXES or riff == b"AVI " or mpeg_ts:
        return VIDEO
    return None
