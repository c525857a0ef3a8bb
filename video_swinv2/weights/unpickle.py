"""Reads torch checkpoints without executing or importing anything that they name, in memory bounded by their size.

`torch.load(weights_only=True)` refuses a file that holds a configuration object beside its tensors, and its allow-list
would need the class of that object to be imported. It also allocates whatever a file declares. Here, every class and
function that a pickle names is replaced by a `Placeholder`, an empty class of ours, so the instructions of the pickle
have nothing to call. Tensors are built afterwards, from the arguments that were given to the placeholders of torch's
own functions. In addition, a file that tries to call any other function of Python or torch is refused, since nobody
saves such a thing beside weights by accident.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from video_swinv2.archives import open_archive, read_entry
from video_swinv2.weights import pickle_check

# The storage classes that torch's pickles name, one per dtype.
DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETER = "torch._utils._rebuild_parameter"
MAX_NAMES = 5000
"""Different classes and functions that a pickle names. An ordinary checkpoint has fewer than 20."""
MAX_NAME_CHARACTERS = 500
OLD_START = [0x1950A86A20F9469CFC6C, 1001]
"""The magic number and the version of the format of torch before 1.6."""

# Functions and classes that appear in pickles of ordinary values of the standard library and torch, which are pickled
# as a call with their value. They are replaced by placeholders as well, but do not cause the file to be refused.
VALUES = {
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "collections.deque"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "_codecs.encode", "copyreg._reconstructor"),
    *("datetime.datetime", "datetime.timedelta", "datetime.date", "datetime.timezone", "decimal.Decimal"),
    *("builtins.set", "builtins.frozenset", "builtins.complex", "builtins.slice", "builtins.range"),
    *("builtins.bytearray", "torch.Size", "torch.device", TENSOR, PARAMETER),
}


class CallRefusedError(ValueError):
    """The file tries to call a function of Python or torch that does not occur in the pickle of a plain value."""


class _Name(type):
    """The type of the classes that replace what a file names. Calling one creates a placeholder, whatever the name.

    The pickle instruction REDUCE calls the class, and so comes through `__call__` below. NEWOBJ uses `__new__` directly
    and is not checked here, but creates a harmless placeholder all the same.
    """

    origin = ""
    """The name in the file, `module.name`."""

    def __call__(cls, *arguments: object) -> Any:
        root = cls.origin.split(".")[0]
        if cls.origin not in VALUES and (root in sys.stdlib_module_names or root == "torch"):
            raise CallRefusedError(f"it would call {cls.origin}")
        return super().__call__(*arguments)


class Placeholder(metaclass=_Name):
    """Stands in for an object or the result of a function, and keeps the data that was given to it.

    These methods are all that the instructions of a pickle can reach: REDUCE and NEWOBJ `__new__`, BUILD
    `__setstate__`, SETITEMS `__setitem__`, APPENDS `append`, ADDITEMS `add`.
    """

    arguments: tuple[Any, ...]
    state: object
    items: dict[Any, Any]

    def __new__(cls, *arguments: object, **_: object) -> Placeholder:
        """Keep the positional arguments that the class or function would have been called with."""
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, None, {}
        return made

    def __call__(self, *_: object) -> None:
        """Refuse to call the result of another call, which no pickle of plain values does."""
        raise CallRefusedError(f"it would call what {type(self).origin} returns")

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def append(self, value: object) -> None:
        """Add one element of a list-like object."""
        self.items[len(self.items)] = value

    add = append


class _Storage(NamedTuple):
    """A reference to the bytes of a tensor: dtype, name of the zip entry, number of elements."""

    dtype: torch.dtype
    key: str
    numel: int


class _Unpickler(pickle.Unpickler):
    """An unpickler that looks up no names. `find_class` is the only way from a pickle to Python's modules."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._stream = stream
        self._classes: dict[tuple[str, str], _Name] = {}
        self.storages: dict[str, _Storage] = {}
        """Those that the pickle refers to, by their keys."""

    def load_checked(self) -> Any:
        """Check the pickle at the position of the stream and read it; the stream is then behind it."""
        pickle_check.check_pickle(self._stream)
        return self.load()

    def find_class(self, module: str, name: str) -> _Name:
        """Return an empty class that remembers the name, in place of what the name refers to."""
        # torch pickles with protocol 2, which writes the names of Python 2 (`__builtin__`). pickle itself translates
        # them with these tables.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if (module, name) not in self._classes:
            # Each class takes about 1 KB.
            if len(self._classes) >= MAX_NAMES or len(module) + len(name) > MAX_NAME_CHARACTERS:
                raise pickle.UnpicklingError("names of implausible number or length")
            self._classes[module, name] = _Name("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})
        return self._classes[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """Read torch's reference to a storage: ("storage", class, key, device, number of elements).

        Files older than torch 1.6 add a view of a storage, which is None in all that were written since torch 0.4.
        """
        kind, storage, key, _, numel, *view = pid
        if kind != "storage" or storage.origin not in DTYPES or not isinstance(key, str) or not isinstance(numel, int):
            raise pickle.UnpicklingError("unknown kind of tensor storage")
        if numel < 0 or view not in ([], [None]):
            raise pickle.UnpicklingError("unknown kind of tensor storage")
        self.storages[key] = _Storage(DTYPES[storage.origin], key, numel)
        return self.storages[key]


class _ZipFile:
    """The zip file that `torch.save` writes: `NAME/data.pkl`, and an entry `NAME/data/KEY` for each storage."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        names = set(archive.namelist())
        # TorchScript archives have constants.pkl and code beside data.pkl, and their weights are not a plain pickle.
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1 or f"{roots[0]}/constants.pkl" in names:
            raise ValueError("not what torch.save writes; TorchScript is not read")
        self._root = roots[0]
        # The bytes of storages are read as they are, which is right only for the little-endian machines we run on.
        if f"{self._root}/byteorder" in names and self._entry("byteorder") != b"little":
            raise ValueError("written on a big-endian machine")
        self.content = _Unpickler(io.BytesIO(self._entry("data.pkl"))).load_checked()

    def read(self, storage: _Storage) -> bytearray:
        """The bytes of a storage."""
        return self._entry(f"data/{storage.key}")

    def _entry(self, name: str) -> bytearray:
        return read_entry(self._archive, f"{self._root}/{name}")


class _OldFile:
    """A file of `torch.save` before torch 1.6, which is not a zip file.

    It begins with five pickles: a magic number, the version of the format, facts about the machine, the content, and
    the keys of the storages. The storages follow in the order of the keys, each as a number of elements (int64) and the
    elements.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, size = file, os.fstat(file.fileno()).st_size
        pickles = io.BytesIO(file.read(pickle_check.MAX_BYTES))
        if [_Unpickler(pickles).load_checked() for _ in OLD_START] != OLD_START:
            raise ValueError("not what torch.save writes")
        if not _Unpickler(pickles).load_checked()["little_endian"]:
            raise ValueError("written on a big-endian machine")
        unpickler = _Unpickler(pickles)
        self.content = unpickler.load_checked()
        # key -> the place of its first element in the file, and the number of bytes.
        self._places: dict[str, tuple[int, int]] = {}
        keys, start = _Unpickler(pickles).load_checked(), pickles.tell()
        for key in keys:
            storage = unpickler.storages[key]
            length = storage.numel * storage.dtype.itemsize
            file.seek(start)
            if file.read(8) != struct.pack("<q", storage.numel) or start + 8 + length > size:
                raise ValueError("a storage that is cut off, or of another length than its tensors")
            self._places[key] = start + 8, length
            start += 8 + length

    def read(self, storage: _Storage) -> bytearray:
        """The bytes of a storage. Raises KeyError if the file has none."""
        start, length = self._places[storage.key]
        content = bytearray(length)
        self._file.seek(start)
        if self._file.readinto(content) != length:  # type: ignore[attr-defined]  # a buffered file has it
            raise EOFError("a storage is cut off")
        return content


class _Resolver:
    """Turns what was unpickled into tensors and plain values. `read` returns the bytes of a storage."""

    def __init__(self, read: Callable[[_Storage], bytearray]) -> None:
        self._read = read
        # The storages read so far, so that tensors that share one in the file share it in memory too.
        self._storages: dict[str, bytearray] = {}
        # What each value was resolved to, by its id. The caller keeps all values alive, so no id occurs twice.
        self._done: dict[int, object] = {}

    def resolve(self, value: Any) -> Any:
        """Replace all placeholders in nested containers by tensors and dicts."""
        if not isinstance(value, Placeholder | dict | list | tuple) or isinstance(value, _Storage):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = value  # ends the recursion in a container that contains itself
            self._done[id(value)] = self._resolve(value)
        return self._done[id(value)]

    def _resolve(self, value: Placeholder | dict[Any, Any] | list[Any] | tuple[Any, ...]) -> object:
        if isinstance(value, dict):
            return {key: self.resolve(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.resolve(inner) for inner in value)
        origin = type(value).origin
        # Arguments of `_rebuild_tensor_v2`: storage, offset, size, stride, requires_grad, hooks. Those of
        # `_rebuild_parameter` begin with the tensor.
        if origin == TENSOR:
            return self._tensor(*value.arguments[:4])
        if origin == PARAMETER:
            return self.resolve(value.arguments[0])
        if value.items or origin == "collections.OrderedDict":
            return self.resolve(value.items)  # a dict under another name, such as a yacs configuration
        return self.resolve(value.state) if isinstance(value.state, dict) else value

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        """A view of a storage; offset and stride count elements. ValueError or RuntimeError if it does not fit."""
        # A stride of 0 would allow a tensor of any size on a small storage, and so exhaust memory when it is copied.
        if not isinstance(storage, _Storage) or math.prod(size) > storage.numel:
            raise ValueError("a tensor larger than its storage")
        if storage.numel == 0:  # `frombuffer` refuses an empty buffer
            return torch.empty(0, dtype=storage.dtype).as_strided(size, stride)
        if storage.key not in self._storages:
            self._storages[storage.key] = self._read(storage)
        flat = torch.frombuffer(self._storages[storage.key], dtype=storage.dtype, count=storage.numel)
        return flat.as_strided(size, stride, offset)  # raises for elements outside the storage


def read_inert(path: Path) -> object:
    """Read a file of `torch.save`, without executing anything; objects become dicts of their attributes.

    Raises CallRefusedError for a file that tries to run code. For a damaged or malicious file, any other Exception may
    come up, depending on which instruction fails.
    """
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip:
        with open_archive(path) as archive:
            source: _ZipFile | _OldFile = _ZipFile(archive)
            return _Resolver(source.read).resolve(source.content)
    with path.open("rb") as file:
        source = _OldFile(file)
        return _Resolver(source.read).resolve(source.content)
