"""The saved index of a source of images: what its folders or tar shards hold, listed once and memory-mapped since.

An index lies in the user's cache folder, never among the data: a folder of ours in a tree of class folders would be a
class to other tools, and a file of ours would change the time by which a changed folder is known. Every folder (every
tar) is listed with a stamp: its times of change and its size. Opening an index compares all stamps and lists anew what
differs, so it costs one `stat` a folder and is never out of date in silence. A folder changed within two seconds of
being listed gets no stamp and is listed again next time, since a second change may bear the same time.
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
from video_swinv2.files import atomic_write

FORMAT = "1"
SETTLED_SECONDS = 2.0  # the coarsest clock of a file system in use (FAT)
SAY_EVERY_SECONDS = 15.0
UNSETTLED = (0, 0, 0)
Stamp = tuple[int, ...]
T = TypeVar("T")


class OnDemand(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    def item(self, place: int) -> T:
        """The item at a place from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> T: ...
    @overload
    def __getitem__(self, place: slice) -> list[T]: ...
    def __getitem__(self, place: int | slice) -> T | list[T]:
        if isinstance(place, slice):
            return [self.item(i) for i in range(len(self))[place]]
        return self.item(range(len(self))[place])


def as_tensors(*arrays: NDArray[Any]) -> tuple[Tensor, ...]:
    """The arrays for a pickle: torch hands tensors to spawned workers in shared memory, and copies nothing.

    The sender has to keep them until the worker runs: with the last one that is freed its file handle is closed, which
    is passed on only after pickling.
    """
    return tuple(torch.from_numpy(array) for array in arrays)


class Names(OnDemand[str]):
    """Many names as two arrays: their bytes, each ended by NUL, and where they end. A million are two objects."""

    def __init__(self, text: Tensor, ends: Tensor) -> None:
        self.text: NDArray[np.uint8] = text.numpy()
        self.ends: NDArray[np.int64] = ends.numpy()

    def __reduce__(self) -> tuple[type[Names], tuple[Tensor, ...]]:
        self._sent = as_tensors(self.text, self.ends)
        return Names, self._sent

    @classmethod
    def of(cls, text: bytes | Iterable[str]) -> Names:
        """From names, or from their bytes with a NUL after each."""
        if not isinstance(text, bytes):
            text = b"".join(os.fsencode(name) + b"\0" for name in text)
        array = np.frombuffer(bytearray(text), dtype=np.uint8)
        return cls(torch.from_numpy(array), torch.from_numpy(np.flatnonzero(array == 0).astype(np.int64)))

    def __len__(self) -> int:
        return len(self.ends)

    def item(self, place: int) -> str:
        """The name at a place."""
        return os.fsdecode(self.bytes(place, place + 1)[:-1])

    def __iter__(self) -> Iterator[str]:
        return map(os.fsdecode, self.text.tobytes().split(b"\0")[:-1])

    def bytes(self, first: int, last: int) -> bytes:
        """The names `first` to `last` (exclusive), a NUL after each."""
        start = self.ends[first - 1] + 1 if first else 0
        stop = self.ends[last - 1] + 1 if last else 0
        return self.text[start:stop].tobytes()


@dataclass(frozen=True)
class Listing:
    """What one container, a folder or a tar, holds: NUL-ended `names`, `columns` of a number each; `about` is free."""

    container: str
    stamp: Stamp
    names: bytes
    columns: Mapping[str, NDArray[np.int64]]
    about: str = ""


class Index:
    """All containers of a source and their entries, entry after entry in the order of the containers.

    `stamps` (containers, 3) int64; `starts` (containers + 1) int64, the first entry of each and the number of all;
    `about`, a word on each container; `names` and `columns`, a name and int64 numbers per entry.
    """

    def __init__(
        self,
        containers: Names,
        stamps: Tensor,
        starts: Tensor,
        about: Names,
        names: Names,
        columns: Mapping[str, Tensor],
    ) -> None:
        self.containers = containers
        self.stamps: NDArray[np.int64] = stamps.numpy()
        self.starts: NDArray[np.int64] = starts.numpy()
        self.about = about
        self.names = names
        self.columns: dict[str, NDArray[np.int64]] = {key: column.numpy() for key, column in columns.items()}

    def __reduce__(self) -> tuple[type[Index], tuple[object, ...]]:
        stamps, starts, *columns = self._sent = as_tensors(self.stamps, self.starts, *self.columns.values())
        named = dict(zip(self.columns, columns, strict=True))
        return Index, (self.containers, stamps, starts, self.about, self.names, named)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Entries per container."""
        return np.diff(self.starts)

    def container_of(self, entry: int) -> int:
        """The container that an entry lies in."""
        return int(self.starts.searchsorted(entry, side="right")) - 1

    def listing(self, container: int) -> Listing:
        """One container as it was listed."""
        first, last = self.starts[container : container + 2].tolist()
        columns = {key: column[first:last] for key, column in self.columns.items()}
        stamp, about = tuple(self.stamps[container].tolist()), self.about[container]
        return Listing(self.containers[container], stamp, self.names.bytes(first, last), columns, about)


Find = Callable[[Index | None], Iterator[Listing | int]]
"""Lists a source, given the index there was: new listings, and the numbers of the containers that have not changed."""


def stamp_of(path: Path) -> Stamp:
    """Times of change and size of a folder or file; UNSETTLED if it changed just now. Ask before listing it."""
    state = path.stat()
    latest = max(state.st_mtime_ns, state.st_ctime_ns)
    # The time of the inode too: contents can be changed and the other time set back, as copying tools do.
    settled = latest < time.time_ns() - int(SETTLED_SECONDS * 1e9)
    return (state.st_mtime_ns, state.st_ctime_ns, state.st_size) if settled else UNSETTLED


def name_hashes(names: Iterable[bytes]) -> NDArray[np.int64]:
    """32 bits of sha256 per name: a random order that is the same everywhere and for ever."""
    return np.fromiter((int.from_bytes(hashlib.sha256(name).digest()[:4], "big") for name in names), np.int64)


def open_index(kind: str, root: Path, key: str, find: Find) -> Index:
    """The up-to-date index of a source, made or mended if need be; processes that start together make it once.

    `kind` and `key` tell sources apart. Where the cache folder cannot be written, the index is made in memory.
    """
    identity = f"{kind}\n{root.absolute()}\n{root.stat().st_ino}\n{key}"
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache.startswith("~"):  # a user without a home, as containers have them
        cache = tempfile.gettempdir()
    path = Path(cache, "video-swinv2", "index", hashlib.sha256(os.fsencode(identity)).hexdigest()[:32])
    previous = _load(path)
    if previous is not None and _unchanged(find(previous), previous):
        return previous
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(_locked(path))
        except OSError as fault:
            print(f"{path}: cannot be written ({fault}), so {root} is listed at every start", file=sys.stderr)
            return _assemble(list(_said(find(None), root)), None)
        previous = _load(path)
        found = list(_said(find(previous), root))
        if previous is not None and _unchanged(found, previous):
            return previous
        index = _assemble(found, previous)
        try:
            _save(index, path)
        except UserError as fault:
            print(f"{fault}; {root} is listed at every start", file=sys.stderr)
            return index
        return _load(path) or index


def _unchanged(found: Iterable[Listing | int], previous: Index) -> bool:
    """Whether the containers are those there were; looks no further than the first that is not."""
    seen = -1
    for seen, item in enumerate(found):
        if item != seen:
            return False
    return seen + 1 == len(previous.containers)


def _said(found: Iterator[Listing | int], root: Path) -> Iterator[Listing | int]:
    """The listings themselves; a line now and then while they take long."""
    said, entries = time.monotonic(), 0
    for item in found:
        yield item
        entries += item.names.count(0) if isinstance(item, Listing) else 0
        if time.monotonic() - said > SAY_EVERY_SECONDS:
            said = time.monotonic()
            print(f"{root}: {entries} files indexed so far", file=sys.stderr, flush=True)


def _assemble(found: Sequence[Listing | int], previous: Index | None) -> Index:
    listings = [item if isinstance(item, Listing) else _kept(previous, item) for item in found]
    names = Names.of(b"".join(listing.names for listing in listings))
    counts = [listing.names.count(0) for listing in listings]
    keys = listings[0].columns if listings else ()
    return Index(
        Names.of(listing.container for listing in listings),
        torch.tensor([listing.stamp for listing in listings], dtype=torch.int64).reshape(-1, 3),
        torch.from_numpy(np.cumsum([0, *counts], dtype=np.int64)),
        Names.of(listing.about for listing in listings),
        names,
        {key: torch.from_numpy(np.concatenate([listing.columns[key] for listing in listings])) for key in keys},
    )


def _kept(previous: Index | None, container: int) -> Listing:
    if previous is None:
        raise ValueError("a container cannot be unchanged where there was no index")
    return previous.listing(container)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f"{path.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed
        yield


def _save(index: Index, path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {"stamps": index.stamps, "starts": index.starts}
    for word, names in (("containers", index.containers), ("about", index.about), ("names", index.names)):
        arrays |= {f"{word}.text": names.text, f"{word}.ends": names.ends}
    arrays |= {f"column.{key}": column for key, column in index.columns.items()}
    with atomic_write(path) as part:
        save_file(arrays, part, metadata={"format": FORMAT})


def _load(path: Path) -> Index | None:
    """The index of a file, its tensors mapped and not read; None where there is none, or it is of another format."""
    try:
        with safe_open(path, "pt") as file:
            if file.metadata() != {"format": FORMAT}:
                return None
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping
    except (OSError, SafetensorError):
        return None
    containers, about, names = (
        Names(tensors[f"{word}.text"], tensors[f"{word}.ends"]) for word in ("containers", "about", "names")
    )
    columns = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith("column.")}
    return Index(containers, tensors["stamps"], tensors["starts"], about, names, columns)


@dataclass(frozen=True)
class Member:
    """One image inside a tar: `size` bytes of `path` from `offset` on; the rest as in Entry."""

    name: str
    path: Path
    label: int
    offset: int
    size: int


Item = Entry | Member


class Indexed(OnDemand[Item]):
    """Entries of an index: those of `rows`, with a label each, -1 for none. Made into objects when asked for."""

    def __init__(self, root: Path, index: Index, rows: Tensor, labels: Tensor) -> None:
        self.root = root
        self.among = index
        self.rows: NDArray[np.int64] = rows.numpy()
        self.labels: NDArray[np.int32] = labels.numpy()

    def __reduce__(self) -> tuple[type[Indexed], tuple[object, ...]]:
        self._sent = as_tensors(self.rows, self.labels)
        return Indexed, (self.root, self.among, *self._sent)

    def __len__(self) -> int:
        return len(self.rows)

    def item(self, place: int) -> Item:
        """The entry at a place."""
        row, label = int(self.rows[place]), int(self.labels[place])
        container = self.among.containers[self.among.container_of(row)]
        name = self.among.names[row]
        shown = f"{container}/{name}" if container else name
        if "offset" not in self.among.columns:
            return Entry(shown, self.root / shown, label)
        offset, size = int(self.among.columns["offset"][row]), int(self.among.columns["size"][row])
        return Member(shown, self.root / container, label, offset, size)


class Listed(OnDemand[Item]):
    """The entries of a list, kept as `Indexed` ones are: loader workers share the bytes and copy no objects."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.names = Names.of(entry.name for entry in entries)
        self.paths = Names.of(str(entry.path) for entry in entries)
        self.labels = torch.tensor([entry.label for entry in entries], dtype=torch.int32)

    def __len__(self) -> int:
        return len(self.names)

    def item(self, place: int) -> Item:
        """The entry at a place."""
        return Entry(self.names[place], Path(self.paths[place]), int(self.labels[place]))
