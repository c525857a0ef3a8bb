"""Videos out of a tar that nobody vouches for: nothing is written but plain files under their bare names."""

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

# Far beyond what Kinetics has: clips of ten seconds, archives of a few thousand of them and a few gigabytes.
LARGEST_MEMBER = 1 << 30
LARGEST_TOTAL = 64 << 30
MOST_MEMBERS = 100_000
LONGEST_NAME = 200  # bytes
LARGEST_HEADER = 1 << 20  # of a long name or an extended header, which tarfile reads into memory as a whole
BLOCK = 1 << 20


@dataclass(frozen=True)
class Unpacked:
    """What an archive held: file names of videos, how many of these have 0 bytes, how many other files there were."""

    names: tuple[str, ...]
    empty: int
    other: int


class DamagedError(UserError):
    """The archive is not whole: another copy of it may be."""


class _RefusedError(Exception):
    """The archive does or claims what no archive of videos should."""


class _Header(tarfile.TarInfo):
    """Headers as tarfile reads them, but a damaged one is an error and not the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):
            return super().frombuf(buf, encoding, errors)  # the regular end: tarfile raises, and catches it
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as fault:
            raise tarfile.ReadError(str(fault)) from fault
        if header.size < 0 or (header.size > LARGEST_HEADER and not header.isreg()):
            raise _RefusedError(f"member {header.name!r} is a header that claims {header.size} bytes")
        return header


def archive_fault(path: Path) -> str:
    """What else the file is, if it does not begin like a tar, plain or gzipped; its name tells nothing."""
    with path.open("rb") as file:
        start = file.read(512)
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return ""
    what = "a web page or an error message" if start.lstrip()[:1] == b"<" else f"{path.stat().st_size} other bytes"
    return f"{what}, not a tar archive"


def unpack(archive: Path, folder: Path, stop: threading.Event | None = None) -> Unpacked:
    """Write every video of the archive into `folder` (made, and to be thrown away on any error), without its path.

    A folder inside the archive is taken for a class and dropped, lists tell classes; files that are no videos are
    counted only. UserError, before anything of the member is written, for: a name that is absolute or leads outside,
    links, devices, sparse files, sizes and numbers beyond the limits above, two videos of one file name that differ;
    for other data behind the end, or no video at all. DamagedError for one that is cut off or does not read. DiskError,
    StopError.
    """
    stop = stop or threading.Event()
    with as_disk_error(folder):
        folder.mkdir(parents=True)
    names: list[str] = []
    empty = other = total = count = 0
    try:
        with _opened(archive) as stream, tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar:
            for member in tar:
                count, total = count + 1, total + member.size
                _check_member(member, count, total)
                name = PurePosixPath(member.name).name
                video = not name.startswith(".") and PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES
                if member.isdir() or not video:
                    other += member.isreg()
                    continue
                content = tar.extractfile(member)
                if content is not None and _write(content, member.size, folder / name, stop):
                    names.append(name)
                    empty += member.size == 0
            _check_end(stream)
    except _RefusedError as fault:
        raise UserError(f"{archive}: {fault}; nothing of it is used, replace it or remove it") from fault
    except (EOFError, OSError, zlib.error, tarfile.TarError) as fault:
        text = " ".join(str(fault).split())
        raise DamagedError(f"{archive}: damaged or not a tar archive ({text}); run again to fetch it anew") from fault
    if not names:
        raise UserError(f"{archive}: holds no video; replace it or remove it")
    return Unpacked(tuple(names), empty, other)


def same_content(one: Path, other: Path) -> bool:
    """True if two files hold the same bytes."""
    return one.stat().st_size == other.stat().st_size and sha256(one) == sha256(other)


@contextlib.contextmanager
def _opened(archive: Path) -> Iterator[IO[bytes]]:
    """The tar itself. Known by its content: Kinetics-400 has had a plain tar under the name part_120.tar.gz."""
    with archive.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not packed:
            yield file
            return
        with gzip.open(file, "rb") as stream:
            yield stream  # type: ignore[misc]  # GzipFile is a binary stream in all but its declared type


def _check_member(member: tarfile.TarInfo, count: int, total: int) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise _RefusedError(f"member {member.name!r} leads outside the folder")
    if not (member.isreg() or member.isdir()) or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "a device, a pipe or a sparse file"
        raise _RefusedError(f"member {member.name!r} is {kind}")
    # Control characters, NUL and bytes that are not UTF-8 are not printable.
    if not path.name.isprintable() or len(path.name.encode()) > LONGEST_NAME:
        raise _RefusedError(f"member {member.name[:300]!r} has no name that a file can have")
    if member.size > LARGEST_MEMBER:
        raise _RefusedError(f"member {member.name!r} claims {member.size / 1e9:.1f} GB, no clip has that")
    if total > LARGEST_TOTAL or count > MOST_MEMBERS:
        raise _RefusedError(f"{count} members of {total / 1e9:.1f} GB up to {member.name!r}, more than any part has")


def _write(content: IO[bytes], size: int, target: Path, stop: threading.Event) -> bool:
    """Write one video; False if it is there already. _RefusedError if one of that name has other bytes."""
    part = partial_path(target)
    with as_disk_error(target):
        require_free_space(target.parent, size)
        file = part.open("wb")
    with file:
        while block := content.read(BLOCK):
            if stop.is_set():
                raise StopError
            with as_disk_error(target):
                file.write(block)
    with as_disk_error(target):
        if target.exists():
            if not same_content(part, target):
                raise _RefusedError(f"holds two different videos named {target.name!r}")
            part.unlink()
            return False
        commit_file(part, target)
        return True


def _check_end(stream: IO[bytes]) -> None:
    """Read on to the end, where gzip compares its checksum; a tar is followed by zeros alone."""
    while block := stream.read(BLOCK):
        if block.strip(b"\0"):
            raise _RefusedError("other data follows the end of the tar")
