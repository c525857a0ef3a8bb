"""Reads torch checkpoints that contain objects, without executing or importing anything that they name.

`torch.load(weights_only=True)` refuses a file that holds a configuration object beside its tensors, and its allow-list
would need the class of that object to be imported. Here, every class and function that a pickle names is replaced by a
`Placeholder`, an empty class of ours, so the instructions of the pickle have nothing to call. Tensors are built
afterwards, from the arguments that were given to the placeholders of torch's own functions. In addition, a file that
tries to call any other function of Python or torch is refused, since nobody saves such a thing beside weights by
accident.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

    def find_class(self, module: str, name: str) -> _Name:
        """Return a new empty class that remembers the name, in place of what the name refers to."""
        # torch pickles with protocol 2, which writes the names of Python 2 (`__builtin__`). pickle itself translates
        # them with these tables.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return _Name("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage:
        """Read torch's reference to a storage: ("storage", class, key, device, number of elements)."""
        kind, storage, key, _, numel = pid
        if kind != "storage" or storage.origin not in DTYPES or not isinstance(key, str) or not isinstance(numel, int):
            raise pickle.UnpicklingError("unknown kind of tensor storage")
        return _Storage(DTYPES[storage.origin], key, numel)


class _Archive:
    """The zip file that `torch.save` writes: `NAME/data.pkl`, and an entry `NAME/data/KEY` for each storage."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        names = set(archive.namelist())
        # TorchScript archives have constants.pkl and code beside data.pkl, and their weights are not a plain pickle.
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1 or f"{roots[0]}/constants.pkl" in names:
            raise ValueError("not what torch.save writes; TorchScript is not read")
        self.root = roots[0]
        # The bytes of storages are read as they are, which is right only for the little-endian machines we run on.
        if f"{self.root}/byteorder" in names and self.entry("byteorder") != b"little":
            raise ValueError("written on a big-endian machine")
        # The storages read so far, so that tensors that share one in the file share it in memory too.
        self.storages: dict[str, bytearray] = {}
        # What each value was resolved to, by its id. The caller keeps all values alive, so no id occurs twice.
        self.done: dict[int, object] = {}

    def entry(self, name: str) -> bytes:
        """The bytes of an entry. Compressed ones, which torch never writes, are refused: they could be of any size."""
        info = self.archive.getinfo(f"{self.root}/{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed entry")
        return self.archive.read(info)

    def resolve(self, value: Any) -> Any:
        """Replace all placeholders in nested containers by tensors and dicts."""
        if not isinstance(value, Placeholder | dict | list | tuple) or isinstance(value, _Storage):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = value  # ends the recursion in a container that contains itself
            self.done[id(value)] = self._resolve(value)
        return self.done[id(value)]

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
        if storage.key not in self.storages:
            self.storages[storage.key] = bytearray(self.entry(f"data/{storage.key}"))
        flat = torch.frombuffer(self.storages[storage.key], dtype=storage.dtype, count=storage.numel)
        return flat.as_strided(size, stride, offset)  # raises for elements outside the storage


def read_inert(path: Path) -> object:
    """Read a checkpoint in torch's zip format, without executing anything; objects become dicts of their attributes.

    Raises CallRefusedError for a file that tries to run code. For a damaged or malicious file, any other Exception may
    come up, depending on which instruction fails.
    """
    with zipfile.ZipFile(path) as file:
        archive = _Archive(file)
        content = _Unpickler(io.BytesIO(archive.entry("data.pkl")), encoding="utf-8").load()
        return archive.resolve(content)
