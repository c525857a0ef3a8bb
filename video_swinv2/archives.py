"""Opens zip archives that cannot be larger than their file: checkpoints of torch, and the `.npz` files of NumPy.

Neither torch.save nor np.savez compresses. A file that does, or whose entries overlap, can be a thousand times as large
once it is read, so its table of contents is checked before any entry is.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_TABLE_BYTES = 16 * 2**20
"""Of a table of contents, which takes about 15 times as much memory: 150,000 entries with names of 60 characters."""
_BLOCK_BYTES = 2**20


class _SmallReads(io.BufferedReader):
    """A file that refuses to read more at once than a table of contents may have; `zipfile` reads that in one go."""

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file. `zipfile` reads without a size at the end of a file only."""
        if size is not None and size > MAX_TABLE_BYTES:
            raise ValueError(f"a table of contents of {size:,} bytes")
        return super().read(size)


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive of uncompressed entries that together are no larger than the file.

    Raises ValueError, or whatever else `zipfile` raises, for any other file: BadZipFile, RuntimeError and OSError, for
    example.
    """
    with _SmallReads(io.FileIO(path)) as file, zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        compressed = next((entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED), None)
        if compressed is not None:
            raise ValueError(f"{compressed.filename!r} in it is compressed, which could hide any size")
        declared, held = sum(entry.file_size for entry in entries), path.stat().st_size
        if declared > held:
            raise ValueError(f"its entries declare {declared:,} bytes, but the file has {held:,}")
        yield archive


def read_entry(archive: zipfile.ZipFile, name: str) -> bytearray:
    """The content of an entry of `open_archive`. Raises KeyError if there is none, and EOFError if it is cut off."""
    entry = archive.getinfo(name)
    content = bytearray(entry.file_size)
    with archive.open(entry) as stream, memoryview(content) as view:
        # In blocks, because `zipfile` makes a copy of what it reads.
        for start in range(0, len(content), _BLOCK_BYTES):
            block = stream.read(_BLOCK_BYTES)
            if len(block) != min(_BLOCK_BYTES, len(content) - start):
                raise EOFError(f"{name} is cut off")
            view[start : start + len(block)] = block
    return content
