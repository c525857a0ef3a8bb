"""The cached index of an image source: the contents of its folders or tar shards, listed once and then memory-mapped.

A *container* is a folder or a tar. An index holds the containers of a source, and the images in each of them, as a
handful of arrays, so that millions of entries are a few objects, which loader workers share.

The index is kept in the user's cache folder, never among the data: other tools would take a folder of ours in a tree of
class folders for a class, and writing a file there would change the modification times that changes are detected by.

Every container is stored with a stamp: its times of change and its size. Opening an index compares all stamps and lists
only the containers whose stamp differs, so it costs one `stat` per container, and an index is never silently out of
date. A container that changed within the two seconds before it was listed gets no valid stamp and is listed again next
time, because a later change within the resolution of the clock could leave the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from video_swinv2.data.manifest import Entry
from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.files import atomic_write

FORMAT = "1"
SETTLED_SECONDS = 2.0  # the coarsest time resolution of any file system in use (FAT)
REPORT_EVERY_SECONDS = 15.0
UNSETTLED = (0, 0, 0)  # the stamp of a container that changed just now; it never counts as equal to another stamp
ChangeStamp = tuple[int, ...]
T = TypeVar("T")


class LazySequence(Sequence[T]):
    """A sequence that creates its items on access. A subclass implements `__len__` and `item`."""

    def item(self, place: int) -> T:
        """The item at position `place`, from 0 to len - 1."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.item(i) for i in range(len(self))[place]]
        return self.item(range(len(self))[place])  # `range` resolves negative indices and raises IndexError


def as_tensors(*arrays: NDArray[Any]) -> tuple[Tensor, ...]:
    """Wrap arrays as tensors for pickling: torch sends tensors to spawned workers through shared memory, uncopied.

    The caller has to keep the returned tensors until the worker runs. Once the last reference is gone, the file handle
    of the shared memory is closed, but the worker receives the handle only after pickling. The `__reduce__` methods of
    this file therefore store them in `self._sent`.
    """
    return tuple(torch.from_numpy(array) for array in arrays)


class NameTable(LazySequence[str]):
    """A list of names stored in two arrays, so that a million names are two objects.

    Attributes:
        text: uint8 (bytes,), the encoded names, each followed by NUL, which no file name contains.
        ends: int64 (names,), the position of each NUL in `text`.
    """

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        self.text: NDArray[np.uint8] = text.numpy()
        self.ends: NDArray[np.int64] = ends.numpy()

    def __reduce__(self) -> tuple[type[NameTable], tuple[Tensor, ...]]:
        self._sent = as_tensors(self.text, self.ends)
        return NameTable, self._sent

    @classmethod
    def from_names(cls, text: bytes | Iterable[str]) -> NameTable:
        """Build a table from names, or from their encoded bytes with a NUL after each name."""
        if not isinstance(text, bytes):
            # fsencode keeps names that are not valid UTF-8 intact, as surrogate escapes.
            text = b"".join(os.fsencode(name) + b"\0" for name in text)
        array = np.frombuffer(bytearray(text), dtype=np.uint8)
        return cls(torch.from_numpy(array), torch.from_numpy(np.flatnonzero(array == 0).astype(np.int64)))

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, place: int) -> str:
        """The name at position `place`."""
        return os.fsdecode(self.bytes(place, place + 1)[:-1])

    def __iter__(self) -> Iterator[str]:
        # Much faster than one `item` at a time. The text ends with NUL, so the last piece of the split is empty.
        return map(os.fsdecode, self.text.tobytes().split(b"\0")[:-1])

    def bytes(self, first: int, last: int) -> bytes:
        """The encoded names from `first` to `last` (exclusive), each followed by NUL."""
        start = self.ends[first - 1] + 1 if first else 0
        stop = self.ends[last - 1] + 1 if last else 0
        return self.text[start:stop].tobytes()


@dataclass(frozen=True)
class ContainerContents:
    """The listing of one folder or tar.

    Attributes:
        container: its path relative to the root of the source; '' for the root.
        stamp: its `change_stamp` from before it was listed.
        names: the names of the images in it, each followed by NUL.
        columns: int64 (names,) each: numbers that are stored per image, such as `hash`, `offset`, `size` or `label`.
        about: a note on the container: a file of another kind for folders, JSON with labels and damage for tars.
    """

    container: str
    stamp: ChangeStamp
    names: bytes
    columns: Mapping[str, NDArray[np.int64]]
    about: str = ""


class FileIndex:
    """All containers of a source and their entries, the entries in the order of their containers.

    Attributes:
        containers, stamps, about: one name, stamp (int64 (containers, 3)) and note per container.
        starts: int64 (containers + 1,); container i holds the entries from starts[i] to starts[i + 1] (exclusive).
        names, columns: one name per entry, and arrays int64 (entries,) of numbers per entry.
    """

    def __init__(
        self,
        containers: NameTable,
        stamps: Tensor,
        starts: Tensor,
        about: NameTable,
        names: NameTable,
        columns: Mapping[str, Tensor],
    ) -> None:
        self.containers = containers
        self.stamps: NDArray[np.int64] = stamps.numpy()
        self.starts: NDArray[np.int64] = starts.numpy()
        self.about = about
        self.names = names
        self.columns: dict[str, NDArray[np.int64]] = {key: column.numpy() for key, column in columns.items()}

    def __reduce__(self) -> tuple[type[FileIndex], tuple[object, ...]]:
        stamps, starts, *columns = self._sent = as_tensors(self.stamps, self.starts, *self.columns.values())
        named = dict(zip(self.columns, columns, strict=True))
        return FileIndex, (self.containers, stamps, starts, self.about, self.names, named)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def counts(self) -> NDArray[np.int64]:
        """The number of entries in each container, int64 (containers,)."""
        return np.diff(self.starts)

    def container_of(self, entry: int) -> int:
        """The number of the container that holds an entry."""
        return int(self.starts.searchsorted(entry, side="right")) - 1

    def contents(self, container: int) -> ContainerContents:
        """The listing of one container, as it went into the index."""
        first, last = self.starts[container : container + 2].tolist()
        columns = {key: column[first:last] for key, column in self.columns.items()}
        stamp, about = tuple(self.stamps[container].tolist()), self.about[container]
        return ContainerContents(self.containers[container], stamp, self.names.bytes(first, last), columns, about)


ScanSource = Callable[[FileIndex | None], Iterator[ContainerContents | int]]
"""A function that lists a source. Given the previous index or None, it yields one item per container, in a fixed order:
the contents of a container that is new or has changed, or the number in the previous index of one that has not."""


def change_stamp(path: Path) -> ChangeStamp:
    """Modification time, inode change time (both in ns) and size of a folder or file; UNSETTLED if it just changed.

    Call it before listing the container, so that a change during the listing is noticed next time.
    """
    state = path.stat()
    latest = max(state.st_mtime_ns, state.st_ctime_ns)
    # Both times, because tools that copy files set the modification time back, but nothing can set the inode's.
    settled = latest < time.time_ns() - int(SETTLED_SECONDS * 1e9)
    return (state.st_mtime_ns, state.st_ctime_ns, state.st_size) if settled else UNSETTLED


def name_hashes(names: Iterable[bytes]) -> NDArray[np.int64]:
    """The first 32 bits of each name's sha256, int64 (names,): a random order that is the same on every machine."""
    return np.fromiter((int.from_bytes(hashlib.sha256(name).digest()[:4], "big") for name in names), np.int64)


# How an index stays correct. Readers take no lock. A writer holds the lock from the second check to the replacement of
# the file, so a source is listed in full by one process at a time. A process that dies in between leaves the old file
# as it was, since `atomic_write` renames a complete file into place, and the kernel releases its lock.
def open_index(kind: str, root: Path, key: str, scan: ScanSource) -> FileIndex:
    """Open the index of a source, and create or update it first if necessary.

    Of several processes that start together, one does the work and the others wait for it. `kind` and `key` distinguish
    sources with the same root. If the cache folder cannot be written, the index is built in memory and not saved.
    """
    path = _index_path(kind, root, key)
    previous = _load(path)
    # No lock is needed up to here: an index file is always replaced as a whole, so what was read is complete. Usually
    # nothing has changed, and this is all.
    if previous is not None and _unchanged(scan(previous), previous):
        return previous
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(path))
        except OSError as fault:
            # A read-only or full home directory costs time at each start, but is no reason to fail.
            _report(f"{path}: cannot be written ({fault}), so {root} is listed again at every start")
            return _assemble(list(_with_progress(scan(None), root)), None)
        # Another process may have updated the index while this one waited for the lock, so load it again.
        previous = _load(path)
        found = list(_with_progress(scan(previous), root))
        if previous is not None and _unchanged(found, previous):
            return previous
        index = _assemble(found, previous)
        try:
            _save(index, path)
        except UserError as fault:
            _report(f"{fault}; {root} is listed again at every start")
            return index
        return _load(path) or index  # reloaded because the saved one is memory-mapped, and so shared by processes


def _index_path(kind: str, root: Path, key: str) -> Path:
    # The inode is included because another folder that is mounted or moved to the same path is another source.
    identity = f"{kind}\n{root.absolute()}\n{root.stat().st_ino}\n{key}"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # `expanduser` changes nothing for a user without a home directory, as in containers
        cache = tempfile.gettempdir()
    return Path(cache, "video-swinv2", "index", hashlib.sha256(os.fsencode(identity)).hexdigest()[:32])


def _unchanged(found: Iterable[ContainerContents | int], previous: FileIndex) -> bool:
    """Whether the containers found are exactly those of `previous`, in order. Stops at the first difference."""
    number = -1
    # An unchanged source yields 0, 1, 2, ... up to the last container of `previous`.
    for number, item in enumerate(found):
        if item != number:
            return False
    return number + 1 == len(previous.containers)


def _with_progress(found: Iterator[ContainerContents | int], root: Path) -> Iterator[ContainerContents | int]:
    """Pass the items on, and print a line every REPORT_EVERY_SECONDS."""
    reported, entries = time.monotonic(), 0
    for item in found:
        yield item
        entries += item.names.count(0) if isinstance(item, ContainerContents) else 0
        if time.monotonic() - reported > REPORT_EVERY_SECONDS:
            reported = time.monotonic()
            _report(f"{root}: {entries} files indexed so far")


def _report(text: str) -> None:
    print(for_terminal(text), file=sys.stderr, flush=True)


def _assemble(found: Sequence[ContainerContents | int], previous: FileIndex | None) -> FileIndex:
    """Concatenate all containers, new ones as listed and unchanged ones copied from the previous index."""
    contents = [item if isinstance(item, ContainerContents) else _unchanged_contents(previous, item) for item in found]
    counts = [one.names.count(0) for one in contents]  # each name ends with NUL, so this counts names
    keys = contents[0].columns if contents else ()
    return FileIndex(
        NameTable.from_names(one.container for one in contents),
        torch.tensor([one.stamp for one in contents], dtype=torch.int64).reshape(-1, 3),
        torch.from_numpy(np.cumsum([0, *counts], dtype=np.int64)),
        NameTable.from_names(one.about for one in contents),
        NameTable.from_names(b"".join(one.names for one in contents)),
        {key: torch.from_numpy(np.concatenate([one.columns[key] for one in contents])) for key in keys},
    )


def _unchanged_contents(previous: FileIndex | None, container: int) -> ContainerContents:
    if previous is None:
        raise ValueError("a container cannot be unchanged if there was no index")
    return previous.contents(container)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of an index file. The lock is a file beside it, since the index file itself gets replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file is closed, also by the death of the process
        yield


def _save(index: FileIndex, path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {"stamps": index.stamps, "starts": index.starts}
    for key, names in (("containers", index.containers), ("about", index.about), ("names", index.names)):
        arrays |= {f"{key}.text": names.text, f"{key}.ends": names.ends}
    arrays |= {f"column.{key}": column for key, column in index.columns.items()}
    with atomic_write(path) as partial:
        save_file(arrays, partial, metadata={"format": FORMAT})


def _load(path: Path) -> FileIndex | None:
    """Open a saved index, memory-mapped; None if the file is missing, damaged or of another FORMAT."""
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() != {"format": FORMAT}:
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping
    except (OSError, SafetensorError):
        return None
    containers, about, names = (
        NameTable(tensors[f"{key}.text"], tensors[f"{key}.ends"]) for key in ("containers", "about", "names")
    )
    columns = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith("column.")}
    return FileIndex(containers, tensors["stamps"], tensors["starts"], about, names, columns)


@dataclass(frozen=True)
class TarMember:
    """One image in a tar: `size` bytes at `offset` of the file `path`; `name`, `label` and `group` as in Entry."""

    name: str
    path: Path
    label: int
    offset: int
    size: int
    group: str = ""


AnyEntry = Entry | TarMember


class IndexedEntries(LazySequence[AnyEntry]):
    """A selection of the entries of an index, which become objects only on access.

    Args:
        root: the folder that the names of the index are relative to.
        rows: the entry numbers of the selection, int64 (n,).
        labels: int32 (n,), -1 for no label.
    """

    def __init__(self, root: Path, index: FileIndex, rows: Tensor, labels: Tensor) -> None:
        self.root = root
        self.file_index = index
        self.rows: NDArray[np.int64] = rows.numpy()
        self.labels: NDArray[np.int32] = labels.numpy()

    def __reduce__(self) -> tuple[type[IndexedEntries], tuple[object, ...]]:
        self._sent = as_tensors(self.rows, self.labels)
        return IndexedEntries, (self.root, self.file_index, *self._sent)

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, place: int) -> AnyEntry:
        """The entry at position `place`."""
        row, label = int(self.rows[place]), int(self.labels[place])
        container = self.file_index.containers[self.file_index.container_of(row)]
        name = self.file_index.names[row]
        shown = f"{container}/{name}" if container else name
        if "offset" not in self.file_index.columns:  # containers are folders, and an entry is a file of its own
            return Entry(shown, os.path.join(self.root, shown), label)
        offset, size = int(self.file_index.columns["offset"][row]), int(self.file_index.columns["size"][row])
        return TarMember(shown, self.root / container, label, offset, size)


class CompactEntries(LazySequence[AnyEntry]):
    """The entries of a list in a few arrays, like `IndexedEntries`, so that loader workers share them."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.names = NameTable.from_names(entry.name for entry in entries)
        self.paths = NameTable.from_names(entry.location for entry in entries)
        self.labels = torch.tensor([entry.label for entry in entries], dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.names)

    def item(self, place: int) -> AnyEntry:
        """The entry at position `place`."""
        return Entry(self.names[place], self.paths[place], int(self.labels[place]))


def compact_entries(entries: Sequence[Entry]) -> Sequence[AnyEntry]:
    """The same entries in arrays that loader workers share.

    A list of Python objects would be copied into each worker, even a forked one: every access writes to the reference
    counts, and so copies the memory page.
    """
    return entries if isinstance(entries, (IndexedEntries, CompactEntries)) else CompactEntries(entries)
