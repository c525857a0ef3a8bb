"""Reads a torch checkpoint without executing anything it names, for training checkpoints that contain objects.

`torch.load(weights_only=True)` refuses a file that holds a configuration object beside its tensors, and an allow-list
would have to import that object's class. Here every class and function that a pickle names becomes a `Placeholder`, an
empty class of ours, so the pickle's instructions have nothing to call. Tensors are assembled afterwards, from the
arguments given to the placeholders of torch's own functions. Files that try to call into Python itself are refused on
top of that: nobody saves such a thing beside their weights.
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

# How ordinary objects of the standard library and torch are pickled: as a call with their value.
VALUES = {
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "collections.deque"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "_codecs.encode", "copyreg._reconstructor"),
    *("datetime.datetime", "datetime.timedelta", "datetime.date", "datetime.timezone", "decimal.Decimal"),
    *("builtins.set", "builtins.frozenset", "builtins.complex", "builtins.slice", "builtins.range"),
    *("builtins.bytearray", "torch.Size", "torch.device", TENSOR, PARAMETER),
}


class CallRefusedError(ValueError):
    """The file tries to call a function of Python or torch that no plain value is pickled with."""


class _Name(type):
    """A class or function named in the file. Calling it creates a placeholder, whatever the name."""

    origin = ""

    def __call__(cls, *arguments: object) -> Any:
        root = cls.origin.split(".")[0]
        if cls.origin not in VALUES and (root in sys.stdlib_module_names or root == "torch"):
            raise CallRefusedError(f"it would call {cls.origin}")
        return super().__call__(*arguments)


class Placeholder(metaclass=_Name):
    """Takes the place of an object or of a function's result, and keeps the plain data given to it.

    A pickle's instructions can reach nothing but these methods.
    """

    arguments: tuple[Any, ...]
    state: object
    items: dict[Any, Any]

    def __new__(cls, *arguments: object, **_: object) -> Placeholder:
        """Keep the arguments that the class or function would have been called with."""
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, None, {}
        return made

    def __call__(self, *_: object) -> None:
        """Refuse to call what a placeholder call would have returned."""
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
    dtype: torch.dtype
    key: str
    numel: int


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Name:
        """Look nothing up: return a new empty class that remembers the name."""
        # torch's pickle protocol writes Python 2 names; pickle itself translates them with these tables.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return _Name("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage:
        """torch's reference to a tensor's bytes: ("storage", class, key, device, number of elements)."""
        kind, storage, key, _, numel = pid
        if kind != "storage" or storage.origin not in DTYPES or not isinstance(key, str) or not isinstance(numel, int):
            raise pickle.UnpicklingError("unknown kind of tensor storage")
        return _Storage(DTYPES[storage.origin], key, numel)


class _Archive:
    """The zip file of `torch.save`: `NAME/data.pkl`, and one entry `NAME/data/KEY` per storage."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        names = set(archive.namelist())
        roots = [name.removesuffix("/data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1 or f"{roots[0]}/constants.pkl" in names:
            raise ValueError("not what torch.save writes; TorchScript is not read")
        self.root = roots[0]
        if f"{self.root}/byteorder" in names and self.entry("byteorder") != b"little":
            raise ValueError("written on a big-endian machine")
        self.storages: dict[str, bytearray] = {}
        self.done: dict[int, object] = {}

    def entry(self, name: str) -> bytes:
        """The bytes of an entry. torch never compresses, and a compressed entry could expand to any size."""
        info = self.archive.getinfo(f"{self.root}/{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed entry")
        return self.archive.read(info)

    def resolve(self, value: Any) -> Any:
        """Replace placeholders by tensors and dicts, everywhere in nested containers."""
        if not isinstance(value, Placeholder | dict | list | tuple) or isinstance(value, _Storage):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = value  # a container that contains itself ends the recursion here
            self.done[id(value)] = self._resolve(value)
        return self.done[id(value)]

    def _resolve(self, value: Placeholder | dict[Any, Any] | list[Any] | tuple[Any, ...]) -> object:
        if isinstance(value, dict):
            return {key: self.resolve(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.resolve(inner) for inner in value)
        origin = type(value).origin
        if origin == TENSOR:
            return self._tensor(*value.arguments[:4])
        if origin == PARAMETER:
            return self.resolve(value.arguments[0])
        if value.items or origin == "collections.OrderedDict":
            return self.resolve(value.items)  # a dict under another name, such as a yacs configuration
        return self.resolve(value.state) if isinstance(value.state, dict) else value

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        if not isinstance(storage, _Storage) or math.prod(size) > storage.numel:
            raise ValueError("a tensor larger than its storage")
        if storage.numel == 0:
            return torch.empty(0, dtype=storage.dtype).as_strided(size, stride)
        if storage.key not in self.storages:
            self.storages[storage.key] = bytearray(self.entry(f"data/{storage.key}"))
        flat = torch.frombuffer(self.storages[storage.key], dtype=storage.dtype, count=storage.numel)
        return flat.as_strided(size, stride, offset)  # raises for elements outside the storage


def read_inert(path: Path) -> object:
    """The content of a checkpoint in torch's zip format; objects with named attributes become dicts.

    Raises CallRefusedError for a file that tries to run code. A damaged or malicious file may raise any other
    Exception: its bytes decide which instruction fails.
    """
    with zipfile.ZipFile(path) as file:
        archive = _Archive(file)
        content = _Unpickler(io.BytesIO(archive.entry("data.pkl")), encoding="utf-8").load()
        return archive.resolve(content)
