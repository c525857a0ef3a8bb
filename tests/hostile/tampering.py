"""Every way to tamper with a JSON value: each key removed, and each key and list element replaced by a wrong value."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from video_swinv2.errors import UserError, error_line

DEEP: Any = 1
for _ in range(50):
    DEEP = {"a": [DEEP]}
WRONG: dict[str, Any] = {
    "null": None,
    "true": True,
    "negative": -1,
    "huge": 10**30,
    "large": 10**9,
    "fraction": 0.5,
    "NaN": float("nan"),
    "text": "../x\x1b[2J\n=1",
    "list": [],
    "object": {},
    "nested": [[["x"]]],
    "deep": DEEP,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every key, and of the first element of every list."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, below in inner:
        yield (*path, key)
        yield from places(below, (*path, key))


def tampered(value: Any, wrongs: dict[str, Any] = WRONG) -> Iterator[tuple[str, Any]]:
    """A description and a changed copy of a JSON value for every way to tamper with it."""
    for name, wrong in wrongs.items():
        yield f"{name} instead of all", wrong
    for path in places(value):
        for name, wrong in {"removed": None, **wrongs}.items():
            changed = copy.deepcopy(value)
            holder = changed
            for key in path[:-1]:
                holder = holder[key]
            if name == "removed":
                del holder[path[-1]]
            else:
                holder[path[-1]] = copy.deepcopy(wrong)
            yield f"{'.'.join(map(str, path))}: {name}", changed


def assert_no_faults(value: Any, read: Callable[[Any], object], named: str, refused: int = 0) -> None:
    """Let `read` read every tampered value: it refuses at least `refused` of them.

    It may read a value or raise a UserError of one line that contains `named`; anything else is a fault.
    """
    faults, number = [], 0
    for description, changed in tampered(value):
        try:
            read(changed)
        except UserError as error:
            number += 1
            line = error_line(error)
            if named not in line or not line.isprintable():
                faults.append(f"{description}: {error!r}")
        except Exception as error:
            faults.append(f"{description}: {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults[:20])
    assert number >= refused, f"only {number} were refused"
