"""Files on disk: places that cannot be written, atomic writes, lock files, content hashes, and lists of class names.

A reader never sees half a file, even after a crash or a power cut: the content is written to a hidden partial file in
the same folder, forced to the disk, and only then renamed to its final name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import for_terminal

PARTIAL_SUFFIX = ".part"
_HASH_BLOCK_BYTES = 1 << 20
_locked: set[int] = set()
"""Descriptors of the files that this process has locked."""


@contextlib.contextmanager
def name_unwritable(path: Path, fix: str = "free space or choose another folder") -> Iterator[None]:
    """Turn an OSError of the block, which writes to `path`, into a UserError that names the path, and how to fix it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {fix}") from error


@contextlib.contextmanager
def name_unreadable(path: Path, fix: str = "make it readable, or name another file") -> Iterator[None]:
    """Turn an OSError of the block, which reads `path`, into a UserError that names the path, and how to fix it.

    The block is not entered if `path` is a special file (see `refuse_special_file`).
    """
    try:
        refuse_special_file(path)
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); {fix}") from error


def refuse_special_file(path: Path) -> None:
    """Raise UsageError if `path`, which is about to be read, is a device, a pipe or a socket, or a link to one.

    A device such as /dev/zero has no end, and opening a pipe waits for somebody to write to it. A path that does not
    exist or cannot be looked at is left to whoever opens it.
    """
    with contextlib.suppress(OSError):
        if stat.S_IFMT(path.stat().st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise UsageError(f"{path}: is a device, a pipe or a socket; name a regular file")


def create_folder(path: Path, option: str = "folder") -> None:
    """Create a folder and those above it, unless they exist. Raises UserError naming `path` if that is impossible.

    option: what the user changes to choose another folder, such as "--out".
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create the folder ({error.strerror}); choose another {option}") from error


def refuse_inside_source(out: Path, sources: Iterable[str | os.PathLike[str]]) -> None:
    """Raise UsageError if `out`, to which files will be written, is one of the folders `sources` or inside one.

    The next run would otherwise take its files for samples.
    """
    for source in map(Path, sources):
        # Resolved, because a link may lead into the source.
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UsageError(f"{out}: is inside the source {source}; choose a folder outside it")


def path_under(root: Path, name: str, where: str = "") -> Path:
    """The path `root/name`, to be written or deleted. Raises UserError, beginning with `where`, if it leaves `root`.

    name: a relative path that was read from a file, and so may be anything. It leaves `root` if it is absolute,
    contains `..`, or passes through a symbolic link that leads outside. `root` itself may be reached through links.
    where: what the name was read from; by default `root`.
    """
    where = where or str(root)
    parts = PurePath(name).parts
    if not parts or parts[0].startswith("/") or ".." in parts or "\0" in name:
        raise UserError(f"{where}: {name[:200]!r} is not a path inside {root}; correct or remove it")
    path = root / name
    # The last part counts as well: opening a file for writing follows a link, even one that leads nowhere yet.
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{where}: {name[:200]!r} leads out of {root} through a symbolic link; remove the link")
    return path


def partial_path(path: Path) -> Path:
    """The hidden file next to `path` to which its content is written first, `.NAME.part`.

    It is in the same folder, and therefore on the same file system, because only there the final rename is atomic.
    """
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def commit_file(partial: Path, path: Path) -> None:
    """Rename the complete file `partial` to `path`, replacing what is there, so that it survives a power cut."""
    # The order matters. The content is synced first, because the rename may reach the disk before the data does, and a
    # power cut would then leave an empty file under the final name.
    sync_to_disk(partial)
    os.replace(partial, path)  # atomic
    # Otherwise a power cut could undo the rename, while a database row that was written later and refers to the file
    # survives.
    sync_to_disk(path.parent)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a partial path to write to. It replaces `path` if the block succeeds and is deleted if it fails.

    Raises UserError naming `path` if the file cannot be written. Other exceptions of the block pass through.
    """
    partial = partial_path(path)
    try:
        with name_unwritable(path):
            if path.is_dir():  # found now, not by the rename after all the work
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            # A killed run may have left a file there, or somebody a link, which the block would follow.
            partial.unlink(missing_ok=True)
            yield partial
            commit_file(partial, path)
    finally:
        # Deletes what a failed block has written. After a success the partial file no longer exists.
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_file(path: Path, busy: str, *, shared: bool = False) -> Iterator[None]:
    """Lock the file `path` inside the context, exclusively, or shared with other processes that lock it as shared.

    Raises UserError with the message `busy` at once if another process holds a conflicting lock, and naming the file if
    it cannot be written. The kernel releases the lock when the process ends in whatever way, so a killed process leaves
    no stale lock. The file itself stays. On a file system without locks, a note is printed and the work goes on.
    """
    if path.is_symlink():  # opening it would create or change a file elsewhere
        raise UserError(f"{path}: is a symbolic link; remove it")
    # Opened for appending, which creates the file if necessary and never truncates it. Closing it releases the lock.
    with name_unwritable(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    _locked.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError as error:  # some network file systems are mounted without locks
            note = f"note: {path}: cannot be locked ({error.strerror}); start nothing else here"
            print(for_terminal(note), file=sys.stderr)
        yield
    finally:
        _locked.discard(descriptor)
        os.close(descriptor)


def _close_inherited_locks() -> None:
    """In a forked child: give up the parent's locks.

    A child shares them, so a loader worker that outlives a killed parent for a moment would keep its folder locked.
    """
    for descriptor in _locked:
        os.close(descriptor)
    _locked.clear()


os.register_at_fork(after_in_child=_close_inherited_locks)


def json_text(content: object, *, indent: int | None = None, ascii_only: bool = True) -> str:
    """JSON in which a number that is not finite is null: JSON has neither NaN nor infinity, and few readers take them.

    Everything that may hold a measured number is written with this function.
    """
    return json.dumps(_finite(content), indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def _finite(content: object) -> object:
    """`content` with None in place of every float that is not finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, (list, tuple)) else content


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a small JSON file atomically. Raises UserError if it cannot be written."""
    with atomic_write(path) as partial:
        # A lone surrogate stands for a byte of a name that is not UTF-8. It becomes the escape that JSON has for it.
        text = json_text(content, indent=2, ascii_only=False) + "\n"
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def sync_to_disk(path: Path) -> None:
    """Force the content of a file, or the list of entries of a folder, from the kernel's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of the content of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_text_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, without a byte order mark. Raises UsageError if it cannot be read.

    Only line breaks end a line. `str.splitlines` would also divide names that contain, for example, U+2028.
    """
    refuse_special_file(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # with "\r\n" and "\r" turned into "\n"
        if "\0" in text:
            raise ValueError("it contains a NUL character")
        return text.removesuffix("\n").split("\n") if text else []
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({error}); check the path and the encoding") from error


def check_class_names(names: Sequence[str], where: str) -> None:
    """Raise UsageError, beginning with `where`, if a class name occurs twice or is a folder's that is not UTF-8."""
    # Python represents bytes that are not UTF-8 as lone surrogates, which no file of ours could store.
    undecodable = [name for name in names if not name.isascii() and re.search("[\ud800-\udfff]", name)]
    if undecodable:
        raise UsageError(f"{where}: class {undecodable[0]!a} is not valid UTF-8; rename its folder")
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise UsageError(f"{where}: class {repeated[0]!r} is listed twice; every class needs its own name")


def read_class_list(path: Path) -> tuple[str, ...]:
    """The class names in a text file with one name per line, in the order of the file. Blank lines are skipped.

    Raises UsageError if the file cannot be read or names a class twice.
    """
    names = tuple(line.strip() for line in read_text_lines(path) if line.strip())
    check_class_names(names, str(path))
    return names
