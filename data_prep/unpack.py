"""Extract the videos of an untrusted tar archive. Only regular files are written, and only under their bare names.

A hostile tar may contain names outside the folder (absolute paths, `..`), links that redirect later members, devices,
sparse files that claim terabytes, or headers that make a reader allocate gigabytes (video_swinv2/data/tars.py), and a
gzip may expand a thousandfold. An archive of videos needs none of these, so each is refused before any byte of that
member is written.
The caller provides a folder for this archive alone and deletes it after any error, so nothing of a refused archive
remains.
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
from video_swinv2.data.media import VIDEO_SUFFIXES
from video_swinv2.data.tars import BoundedTarInfo, HostileTarError
from video_swinv2.errors import UserError
from video_swinv2.files import commit_file, partial_path, sha256

# The limits are far above Kinetics, whose archives hold a few thousand videos of ten seconds in a few gigabytes.
MAX_MEMBER_BYTES = 1 << 30
MAX_TOTAL_BYTES = 64 << 30
MAX_MEMBERS = 100_000
MAX_NAME_BYTES = 200
MAX_PADDING_BYTES = 64 << 20  # zeros at the end; programs fill up to a multiple of 10 KiB
BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Unpacked:
    """What an archive contained.

    `names` are the file names of its videos, `empty` is how many of these have 0 bytes, and `other` is the number of
    files that are not videos.
    """

    names: tuple[str, ...]
    empty: int
    other: int


class DamagedError(UserError):
    """The archive is damaged or incomplete; fetching it again may help."""


class _RefusedError(Exception):
    """The archive contains or claims something that has no place in an archive of videos."""


class _Header(BoundedTarInfo):
    """A tar header of which a damaged one is an error.

    After the first member, tarfile takes a damaged header for the end of the archive, and the members that follow would
    be lost silently.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        """Parse the 512 bytes of a header. Raises tarfile.ReadError if it is damaged."""
        if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):
            # Zeros are the regular end: tarfile raises EOFHeaderError and handles it.
            return super().frombuf(buf, encoding, errors)
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def archive_fault(path: Path) -> str:
    """What is wrong with a file that should be a tar, plain or gzipped; '' if it begins like one, whatever its name."""
    # 1f 8b begins every gzip; a tar header has "ustar" at byte 257.
    with path.open("rb") as file:
        start = file.read(512)
    if start[:2] == b"\x1f\x8b" or start[257:262] == b"ustar":
        return ""
    kind = "a web page or an error message" if start.lstrip()[:1] == b"<" else f"{path.stat().st_size} unknown bytes"
    return f"{kind}, not a tar archive"


def unpack(archive: Path, folder: Path, stop: threading.Event | None = None) -> Unpacked:
    """Extract every video of the archive into `folder`, directly and without its path. Other files are only counted.

    `folder` is created here, and the caller deletes it after any error. Folders inside the archive are not kept: they
    only repeat the class names, which come from the lists.

    Raises UserError for a name that is absolute or leads outside the folder, a link, a device, a sparse file, sizes or
    numbers beyond the limits, two different videos with the same file name, data after the end of the tar, or an
    archive without any video; DamagedError for an archive that is truncated or unreadable; DiskError; StopError.
    """
    stop = stop or threading.Event()
    with as_disk_error(folder):
        folder.mkdir(parents=True)
    names: list[str] = []
    empty = other = total = count = 0
    try:
        with _opened(archive) as stream, tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar:
            # Members are read, checked and written one at a time, in the order of the archive. Reading the list of all
            # members first (`getmembers`) would decompress the whole archive twice. Mode "r:" means without
            # compression, since _opened has already removed it.
            for member in tar:
                count, total = count + 1, total + member.size
                _check_member(member, count, total)
                name = PurePosixPath(member.name).name
                # Hidden files are skipped: macOS adds a "._NAME.mp4" with metadata for every NAME.mp4.
                video = not name.startswith(".") and PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES
                if member.isdir() or not video:
                    other += member.isreg()
                    continue
                content = tar.extractfile(member)
                if content is not None and _write(content, member.size, folder / name, stop):
                    names.append(name)
                    empty += member.size == 0
            _check_end(stream)
    except (_RefusedError, HostileTarError) as error:
        raise UserError(f"{archive}: {error}; nothing of it is used, replace or remove it") from error
    # EOFError, zlib.error and OSError (gzip.BadGzipFile) come from the decompression. Errors from writing have already
    # become DiskErrors.
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
    """Yield the uncompressed tar stream of an archive.

    The content decides whether it is gzipped, not the name: part_120.tar.gz of Kinetics-400 has been a plain tar.
    """
    with archive.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not is_gzip:
            yield file
            return
        with gzip.open(file, "rb") as stream:
            yield stream  # type: ignore[misc]  # GzipFile is a binary stream in everything but its declared type


def _check_member(member: tarfile.TarInfo, count: int, total: int) -> None:
    """Raise _RefusedError if a member may not be extracted.

    `count` (members) and `total` (bytes) are the sums up to and including this one.
    """
    path = PurePosixPath(member.name)
    # Such a name would be harmless here, because only its last part is used. But a publisher of videos has no reason to
    # use one, so the archive is not what it should be.
    if path.is_absolute() or ".." in path.parts:
        raise _RefusedError(f"member {member.name!r} leads outside the folder")
    if not (member.isreg() or member.isdir()):
        kind = "a link" if member.islnk() or member.issym() else "a device or a pipe"
        raise _RefusedError(f"member {member.name!r} is {kind}")
    # isprintable is False for control characters, NUL, and bytes that are not UTF-8.
    if not path.name.isprintable() or len(path.name.encode()) > MAX_NAME_BYTES:
        raise _RefusedError(f"member {member.name[:300]!r} has an impossible file name")
    # Sizes are checked as claimed in the header. tarfile never returns more bytes of a member than that.
    if member.size > MAX_MEMBER_BYTES:
        raise _RefusedError(
            f"member {member.name!r} claims to have {member.size / 1e9:.1f} GB, far more than any video"
        )
    if total > MAX_TOTAL_BYTES or count > MAX_MEMBERS:
        raise _RefusedError(
            f"{count} members with {total / 1e9:.1f} GB up to {member.name!r}, far more than any archive of Kinetics"
        )


def _write(content: IO[bytes], size: int, target: Path, stop: threading.Event) -> bool:
    """Write one video. Returns False if the same video is already there.

    Raises _RefusedError if a different video has that name, DiskError, StopError.
    """
    partial = partial_path(target)
    with as_disk_error(target):
        require_free_space(target.parent, size)
        file = partial.open("wb")
    with file:
        while block := content.read(BLOCK):
            if stop.is_set():
                raise StopError
            # Only the write is wrapped: an OSError from content.read means a damaged archive, not a full disk.
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
    """Read the rest of the stream and raise _RefusedError if it contains anything but zeros, or too many of them.

    A tar ends with blocks of zeros, which tarfile does not read to the end. gzip verifies its checksum only when it
    reaches the end of the stream, so a damaged archive could pass without this.
    """
    length = 0
    while block := stream.read(BLOCK):
        if block.strip(b"\0"):
            raise _RefusedError("has other data after the end of the tar")
        length += len(block)
        if length > MAX_PADDING_BYTES:
            raise _RefusedError(f"has more than {MAX_PADDING_BYTES} zeros after the end of the tar")
