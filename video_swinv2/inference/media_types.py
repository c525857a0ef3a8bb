"""Which files are videos and which are images, by what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_swinv2.data.images import IMAGE_SUFFIXES
from video_swinv2.data.manifest import VIDEO_SUFFIXES
from video_swinv2.errors import UsageError

VIDEO = "video"
IMAGE = "image"
HEAD_BYTES = 400
_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")
_STILL_BRANDS = (b"heic", b"heix", b"mif1", b"avif")
_VIDEO_STARTS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"FLV\x01",
    b"OggS",
    b"\x00\x00\x01\xba",  # MPEG program stream
    b"\x00\x00\x01\xb3",  # MPEG video
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF, WMV
)
_IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8")


def find_media_files(paths: Sequence[Path], wanted: str) -> list[tuple[Path, str | None]]:
    """(file, its kind): files given by name whatever they are, and those of the kind `wanted` in folders, sorted.

    Raises UsageError for a folder that holds none.
    """
    found: list[tuple[Path, str | None]] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, media_type_of(path)))
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and media_type_of(file) == wanted]
        if not inside:
            raise UsageError(f"{path}: no {wanted} in this folder, and this model takes {wanted}s")
        found += [(file, wanted) for file in inside]
    return found


def media_type_of(path: Path) -> str | None:
    """VIDEO or IMAGE by the first bytes, else by the suffix, so that a broken video is still one; None for neither."""
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        head = b""
    suffix = path.suffix.lower()
    by_suffix = VIDEO if suffix in VIDEO_SUFFIXES else IMAGE if suffix in IMAGE_SUFFIXES else None
    return media_type_of_bytes(head) or by_suffix


def media_type_of_bytes(head: bytes) -> str | None:
    """VIDEO or IMAGE by the marks that containers begin with; None for none of them."""
    riff = head[8:12] if head.startswith(b"RIFF") else b""
    mpeg_ts = len(head) > 376 and head[0] == head[188] == head[376] == 0x47
    still = head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS
    if head.startswith(_IMAGE_STARTS) or riff == b"WEBP" or still:
        return IMAGE
    if head.startswith(_VIDEO_STARTS) or head[4:8] in _MP4_BOXES or riff == b"AVI " or mpeg_ts:
        return VIDEO
    return None
