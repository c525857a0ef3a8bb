"""Files that are whole or not there: written under a hidden name, synced, renamed; and the hash to know them by."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from video_swinv2.errors import UserError

PART_SUFFIX = ".part"


def part_of(path: Path) -> Path:
    """The hidden name beside `path` under which it is written until it is whole."""
    return path.with_name(f".{path.name}{PART_SUFFIX}")


def keep(part: Path, path: Path) -> None:
    """Give a whole file its name; after this neither a crash nor a power cut can leave half of it."""
    sync(part)
    os.replace(part, path)
    sync(path.parent)  # the name too, or a row that claims the file could outlive it


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """The hidden name to write to; it becomes `path` when the block ends well and is removed when it does not.

    UserError naming `path` if the disk refuses.
    """
    part = part_of(path)
    try:
        yield part
        keep(part, path)
    except OSError as error:
        fault = error.strerror or str(error)
        raise UserError(f"{path}: cannot be written ({fault}); free space or choose another folder") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(path: Path, busy: str, *, shared: bool = False) -> Iterator[None]:
    """Keep the lock file `path` for this process, or with others that share it. UserError(busy) if another has it."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(busy) from error
        yield


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a small JSON file, complete or not at all."""
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of the bytes of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
