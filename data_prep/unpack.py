"""Extract videos from an untrusted tar: only regular files are written, and only under their bare names.

A tar can name files outside the folder (absolute paths, `..`), hold links that redirect later members, devices, sparse
files that claim terabytes, or headers that make a reader allocate gigabytes; and a gzip can expand a thousandfold. None
of these is needed for an archive of videos, so each is refused, before any byte of that member is written. The caller
gives a folder of its own to extract into and discards it after any error, so a refused archive leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import gzip
import tarfile
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from data_prep.fetch import StopError, as_disk_error, require_free_space
from video_swinv2.data.lists import VIDEO_SUFFIXES
from video_swinv2.errors import UserError
from video_swinv2.files import commit_file, partial_path, sha256

# Far beyond Kinetics, with videos of ten seconds and archives of a few gigabytes with a few thousand of them.
MAX_MEMBER_BYTES = 1 << 30
MAX_TOTAL_BYTES = 64 << 30
MAX_MEMBERS = 100_000
MAX_NAME_BYTES = 200
MAX_HEADER_BYTES = 1 << 20  # of a long name or an extended header, which tarfile reads into memory in one piece
BLOCK = 1 << 20


@dataclass(frozen=True)
class Unpacked:
    """What an archive contained: the file names of its videos, how many of these have 0 bytes, how many other files."""

    names: tuple[str, ...]
    empty: int
    other: int


class DamagedError(UserError):
    """The archive is damaged or incomplete; fetching it again may help."""


class _RefusedError(Exception):
    """The archive contains or claims something that no archive of videos should."""


class _Header(tarfile.TarInfo):
    """Headers as tarfile reads them, except that a damaged header is an error.

    tarfile takes a damaged header for the end of the archive, so the members after it would be lost silently.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):
            return super().frombuf(
                buf, encoding, errors
            )  # zeros are the regular end: tarfile raises EOFHeaderError and handles it
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error
        # Long names and extended headers are members whose content tarfile reads itself, before we see the member.
        if header.size < 0 or (header.size > MAX_HEADER_BYTES and not header.isreg()):
            raise _RefusedError(f"member {header.name!r} is a header that claims to have {header.size} bytes")
        return header


def archive_fault(path: Path) -> str:
    """What is wrong with the file unless it begins like a tar, plain or gzipped; '' if it does. Ignores the name."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return ""
    kind = "a web page or an error message" if start.lstrip()[:1] == b"<" else f"{path.stat().st_size} unknown bytes"
    return f"{kind}, not a tar archive"


def unpack(archive: Path, folder: Path, stop: threading.Event | None = None) -> Unpacked:
    """Extract every video of the archive into `folder`, without its path. Other files are only counted.

    `folder` is created here, and the caller discards it after any error. Folders inside the archive are dropped: they
    are class names, and the classes come from the lists.

    Raises UserError for an absolute name or one that leads outside, a link, a device, a sparse file, sizes and numbers
    beyond the limits above, two different videos with one file name, data after the end of the tar, or no video at all;
    DamagedError for an archive that is truncated or unreadable; DiskError; StopError.
    """
    stop = stop or threading.Event()
    with as_disk_error(folder):
        folder.mkdir(parents=True)
    names: list[str] = []
    empty = other = total = count = 0
    try:
        with _opened(archive) as stream, tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar:
            # Streamed: members are checked and written one by one, in the order of the archive.
            for member in tar:
                count, total = count + 1, total + member.size
                _check_member(member, count, total)
                name = PurePosixPath(member.name).name
                # Hidden files: macOS adds "._NAME.mp4" with metadata for every NAME.mp4.
                video = not name.startswith(".") and PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES
                if member.isdir() or not video:
                    other += member.isreg()
                    continue
                content = tar.extractfile(member)
                if content is not None and _write(content, member.size, folder / name, stop):
                    names.append(name)
                    empty += member.size == 0
            _check_end(stream)
    except _RefusedError as error:
        raise UserError(f"{archive}: {error}; nothing of it is used, replace or remove it") from error
    except (EOFError, OSError, zlib.error, tarfile.TarError) as error:
        message = " ".join(str(error).split())
        raise DamagedError(
            f"{archive}: damaged or not a tar archive ({message}); run again to fetch it again"
        ) from error
    if not names:
        raise UserError(f"{archive}: contains no video; replace or remove it")
    return Unpacked(tuple(names), empty, other)


def same_content(one: Path, other: Path) -> bool:
    """Whether two files have the same bytes."""
    return one.stat().st_size == other.stat().st_size and sha256(one) == sha256(other)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[IO[bytes]]:
    """The tar stream. Decided by content, since Kinetics-400 has had a plain tar under the name part_120.tar.gz."""
    with archive.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not is_gzip:
            yield file
            return
        with gzip.open(file, "rb") as stream:
            yield stream  # type: ignore[misc]  # GzipFile is a binary stream in everything but its declared type


def _check_member(member: tarfile.TarInfo, count: int, total: int) -> None:
    """Raises _RefusedError. `count` and `total` (bytes) include this member."""
    path = PurePosixPath(member.name)
    # Only the last part of the name is used, so such a member would be harmless here; but nobody who publishes videos
    # needs one, so it means that the archive is not what it should be.
    if path.is_absolute() or ".." in path.parts:
        raise _RefusedError(f"member {member.name!r} leads outside the folder")
    if not (member.isreg() or member.isdir()) or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "a device, a pipe or a sparse file"
        raise _RefusedError(f"member {member.name!r} is {kind}")
    # isprintable is False for control characters, NUL, and bytes that are not UTF-8.
    if not path.name.isprintable() or len(path.name.encode()) > MAX_NAME_BYTES:
        raise _RefusedError(f"member {member.name[:300]!r} has an impossible file name")
    if member.size > MAX_MEMBER_BYTES:
        raise _RefusedError(
            f"member {member.name!r} claims to have {member.size / 1e9:.1f} GB, far more than any video"
        )
    if total > MAX_TOTAL_BYTES or count > MAX_MEMBERS:
        raise _RefusedError(
            f"{count} members with {total / 1e9:.1f} GB up to {member.name!r}, far more than any archive of Kinetics"
        )


def _write(content: IO[bytes], size: int, target: Path, stop: threading.Event) -> bool:
    """Write one video. False if the same video is there already; _RefusedError if another one has that name."""
    partial = partial_path(target)
    with as_disk_error(target):
        require_free_space(target.parent, size)
        file = partial.open("wb")
    with file:
        while block := content.read(BLOCK):
            if stop.is_set():
                raise StopError
            with as_disk_error(target):
                file.write(block)
    with as_disk_error(target):
        if target.exists():
            if not same_content(partial, target):
                raise _RefusedError(f"contains two different videos named {target.name!r}")
            partial.unlink()
            return False
        commit_file(partial, target)
        return True


def _check_end(stream: IO[bytes]) -> None:
    """Read the rest of the stream: after a tar come only zeros, and at its end gzip verifies its checksum."""
    while block := stream.read(BLOCK):
        if block.strip(b"\0"):
            raise _RefusedError("has other data after the end of the tar")
