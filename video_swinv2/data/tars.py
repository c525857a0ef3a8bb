"""Reads the headers of tars that may be hostile, in time and memory that a header cannot multiply.

A long name, or an extended (pax) header, is stored as a member of its own in front of the member that it describes.
`tarfile` reads it whole and calls itself for the next header, so a chain of them ends in RecursionError. It searches
pax headers in quadratic time, and follows lists of holes of sparse files as far as they go. A negative size leads it
back to the same header, again and again. Here headers are read in a loop, and what no tar of samples needs is refused.
"""

from __future__ import annotations

import re
import tarfile

# Of all long names and extended headers in front of one member. A path has at most 4 KiB.
MAX_EXTENSION_BYTES = 1 << 16
MAX_SIZE = 1 << 60  # bytes of a file; offsets have 64 bits
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_RECORD_LENGTH = re.compile(rb"(\d{1,9}) ")
_SIZE = re.compile(rb"\d{1,18}")


class HostileTarError(tarfile.TarError):
    """A header contains what only a tar that was made to do harm has."""


class BoundedTarInfo(tarfile.TarInfo):
    """A member of a tar; given to `tarfile.open` as `tarinfo`, it makes reading bounded.

    Of extended headers, only the path and the size of a file are used. A sparse file, an impossible size and a name
    with a NUL are HostileTarErrors.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> BoundedTarInfo:
        """Read the next member, as `tarfile` does. Raises tarfile.TarError."""
        stream, encoding, errors = tar.fileobj, tar.encoding or "utf-8", tar.errors or "surrogateescape"
        assert stream is not None  # only a closed TarFile has none
        start = stream.tell()
        told: dict[str, bytes] = {}  # by the headers in front of the member
        while True:
            try:
                member = cls.frombuf(stream.read(tarfile.BLOCKSIZE), encoding, errors)
            except tarfile.HeaderError as error:
                if stream.tell() <= start + tarfile.BLOCKSIZE:
                    raise  # may be the end of the tar
                raise tarfile.ReadError(f"{error} behind a long name or an extended header") from error
            if member.type == tarfile.GNUTYPE_SPARSE:
                raise HostileTarError(f"member {member.name[:300]!r} is a sparse file")
            if not 0 <= member.size <= MAX_SIZE:
                raise HostileTarError(f"member {member.name[:300]!r} claims to have {member.size} bytes")
            if member.type not in (*_LONG_NAMES, *_PAX):
                break
            padded = _padded(member.size)
            if stream.tell() - start + padded > MAX_EXTENSION_BYTES:
                raise HostileTarError(
                    f"member {member.name[:300]!r} is a header that claims to have {member.size} bytes, of more than"
                    f" {MAX_EXTENSION_BYTES} for one file"
                )
            # The first of several counts, as for `tarfile`.
            told = _told_by(member.type, stream.read(padded)[: member.size]) | told
        return member._placed(tar, start, stream.tell(), told, encoding, errors)

    def _placed(
        self, tar: tarfile.TarFile, start: int, offset_data: int, told: dict[str, bytes], encoding: str, errors: str
    ) -> BoundedTarInfo:
        """Set the name and the size that were `told`, the offsets, and the offset of the next header in `tar`."""
        if "path" in told:
            self.name = told["path"].decode(encoding, errors)
        if "size" in told:
            if not _SIZE.fullmatch(told["size"]):
                raise HostileTarError(f"member {self.name[:300]!r} claims to have {told['size'][:50]!r} bytes")
            self.size = int(told["size"])
        if "\0" in self.name:
            raise HostileTarError(f"member {self.name[:300]!r} has an impossible file name")
        if self.isdir():
            self.name = self.name.rstrip("/")
        self.offset, self.offset_data = start, offset_data
        has_data = self.isreg() or self.type not in tarfile.SUPPORTED_TYPES
        tar.offset = offset_data + (_padded(self.size) if has_data else 0)
        return self


def _padded(size: int) -> int:
    """A size in bytes, rounded up to whole blocks."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _told_by(kind: bytes, data: bytes) -> dict[str, bytes]:
    """The path and the size that the data of a long name or an extended header give to the next member."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.partition(b"\0")[0]}
    # Long targets of links are not needed, and a global header has nothing that concerns a single file.
    if kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
        return {}
    records = _pax_records(data)
    if any(key.startswith(b"GNU.sparse.") for key in records):
        raise HostileTarError("an extended header describes a sparse file")
    return {key: records[key.encode()] for key in ("path", "size") if key.encode() in records}


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """The records of an extended header, each `LENGTH KEY=VALUE\\n`, where the length is that of the whole record."""
    records: dict[bytes, bytes] = {}
    place = 0
    while place < len(data):
        length = _RECORD_LENGTH.match(data, place)
        end = place + int(length[1]) if length else 0
        key, equals, value = data[length.end() if length else 0 : end].partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            raise tarfile.ReadError("damaged extended header")
        records[key] = value[:-1]
        place = end
    return records
