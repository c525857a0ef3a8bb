"""A torch checkpoint read without running anything that it names: for training checkpoints with objects in them.

`torch.load(weights_only=True)` refuses a file that holds a configuration object beside its tensors. Here every class
and function that a pickle names becomes a `Placeholder`, an empty class of ours, so that its instructions have nothing
to call. Tensors are put together afterwards, from the numbers that stood beside the names of torch's own functions.
Files that mean to call into Python itself are refused as well: nobody saves such a thing beside his weights.
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

# What ordinary objects of the standard library, numpy and torch are written as: a call with their value.
VALUES = {
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "collections.deque"),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib.PureWindowsPath"),
    *("pathlib._local.PosixPath", "pathlib._local.WindowsPath", "_codecs.encode", "copyreg._reconstructor"),
    *("datetime.datetime", "datetime.timedelta", "datetime.date", "datetime.timezone", "decimal.Decimal"),
    *("builtins.set", "builtins.frozenset", "builtins.complex", "builtins.slice", "builtins.range"),
    *("builtins.bytearray", "torch.Size", "torch.device", TENSOR, PARAMETER),
}


class CallRefusedError(ValueError):
    """The file means to call a function of Python or torch that no plain value is written with."""


class _Name(type):
    """A name in the file; a call of it makes a placeholder, whatever the name."""

    origin = ""

    def __call__(cls, *arguments: object) -> Any:
        root = cls.origin.split(".")[0]
        if cls.origin not in VALUES and (root in sys.stdlib_module_names or root == "torch"):
            raise CallRefusedError(f"it would call {cls.origin}")
        return super().__call__(*arguments)


class Placeholder(metaclass=_Name):
    """Stands where a file has an object of a class or the result of a function; keeps the plain data given to it.

    These methods are all that the instructions of a pickle can reach.
    """

    arguments: tuple[Any, ...]
    state: object
    items: dict[Any, Any]

    def __new__(cls, *arguments: object, **_: object) -> Placeholder:
        """Keep what the class or function would have been called with."""
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, None, {}
        return made

    def __call__(self, *_: object) -> None:
        """What a refused or unknown call would have returned is not called either."""
        raise CallRefusedError(f"it would call what {type(self).origin} returns")

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def append(self, value: object) -> None:
        """Take one element of a list-like object."""
        self.items[len(self.items)] = value

    add = append


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    numel: int


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Name:
        """Never looks anything up: a new empty class that remembers the name."""
        # Torch's pickle protocol writes names of Python 2, and this is what pickle itself reads them with.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return _Name("Placeholder", (Placeholder,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> _Storage:
        """Torch's reference to a tensor's bytes: ("storage", class, key, device, number of elements)."""
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
        """The bytes of an entry; torch never compresses, and what is compressed could be of any size."""
        info = self.archive.getinfo(f"{self.root}/{name}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a compressed entry")
        return self.archive.read(info)

    def resolve(self, value: Any) -> Any:
        """Placeholders to tensors and dicts, everywhere in nested containers."""
        if not isinstance(value, Placeholder | dict | list | tuple) or isinstance(value, _Storage):
            return value
        if id(value) not in self.done:
            self.done[id(value)] = value  # something that contains itself ends here
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
            return self.resolve(value.items)  # a dict of another name, such as a yacs configuration
        return self.resolve(value.state) if isinstance(value.state, dict) else value

    def _tensor(self, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        if not isinstance(storage, _Storage) or math.prod(size) > storage.numel:
            raise ValueError("a tensor larger than its storage")
        if storage.numel == 0:
            return torch.empty(0, dtype=storage.dtype).as_strided(size, stride)
        if storage.key not in self.storages:
            self.storages[storage.key] = bytearray(self.entry(f"data/{storage.key}"))
        flat = torch.frombuffer(self.storages[storage.key], dtype=storage.dtype, count=storage.numel)
        return flat.as_strided(size, stride, offset)  # refuses what lies outside of the storage


def read_inert(path: Path) -> object:
    """The content of a checkpoint in torch's zip format; objects with named data are dicts, others placeholders.

    Raises CallRefusedError for a file that means to run code, some other Exception where it is damaged or built to
    harm: its bytes choose which instruction fails.
    """
    with zipfile.ZipFile(path) as file:
        archive = _Archive(file)
        content = _Unpickler(io.BytesIO(archive.entry("data.pkl")), encoding="utf-8").load()
        return archive.resolve(content)
