"""Reads JSON that may be damaged or hostile: one reader for all files of ours that are read back.

`json` itself fails in several ways: with RecursionError for deep nesting, ValueError for integers of more than 4,300
digits, UnicodeDecodeError for binary files. It also accepts NaN, and integers that no array or float can hold, on which
a later line would fail. Here all of these are one UserError that names the file. A `Record` also names the key.
"""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from video_swinv2.errors import UserError
from video_swinv2.files import name_unreadable

MAX_BYTES = 64 * 2**20
"""Of a JSON text. Parsed, it takes up to 25 times as much memory."""
MAX_DEPTH = 64
"""Of lists and objects within each other, far below Python's own limit: later code may recurse too."""
MIN_INTEGER, MAX_INTEGER = -(2**63), 2**63 - 1
FIX = "write, copy or download it again"


class Record(BaseModel):
    """Base of what a JSON file holds. Types are not converted: "3", 3.0 and true are not integers.

    JSON has lists only, so fields are `list` where the rest of the program has tuples. Unknown keys are refused, except
    by a subclass that is declared with `extra="ignore"` or `extra="allow"`.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_bytes(path: Path, max_bytes: int = MAX_BYTES, fix: str = FIX) -> bytes:
    """The content of a regular file of at most `max_bytes`. Raises UserError, ending with `fix`, for any other."""
    with name_unreadable(path, fix), path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UserError(f"{path}: is larger than the {max_bytes:,} bytes that are read; {fix}")
    return content


def parse_json(text: str | bytes, where: str, fix: str = FIX, max_bytes: int = MAX_BYTES) -> Any:
    """The value of a JSON text. Raises UserError, beginning with `where` and ending with `fix`, for a faulty one.

    Of equal keys in one object, the last counts. NaN and infinity, which older versions of this program wrote, are
    null, as `json_text` writes them now. Integers that do not fit into 64 bits and more than MAX_DEPTH lists and
    objects within each other are faults.
    """
    if len(text) > max_bytes:
        raise UserError(f"{where}: JSON of {len(text):,} characters, more than the {max_bytes:,} that are read; {fix}")
    try:
        value = _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8"))
        _check_depth(value)
    except RecursionError as error:
        raise UserError(f"{where}: JSON that is nested too deeply; {fix}") from error
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError
        raise UserError(f"{where}: not valid JSON ({error}); {fix}") from error
    return value


def read_json(path: Path, fix: str = FIX) -> Any:
    """The value in a JSON file. Raises UserError, naming the file, if it cannot be read or as `parse_json` does."""
    return parse_json(read_bytes(path, fix=fix), str(path), fix)


def parse_record(value: object, record_type: type[AnyRecord], where: str, fix: str = FIX) -> AnyRecord:
    """Validate a parsed JSON value. Raises UserError for the first faulty key: `where`, the key and what is wrong."""
    try:
        return record_type.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if not first["loc"]:
            raise UserError(f"{where}: not a JSON object; {fix}") from error
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {key}: {first['msg'][0].lower()}{first['msg'][1:]}; {fix}") from error


def read_record(path: Path, record_type: type[AnyRecord], fix: str = FIX) -> AnyRecord:
    """The record in a JSON file. Raises UserError as `read_json` and `parse_record` do."""
    return parse_record(read_json(path, fix), record_type, str(path), fix)


def _null(_: str) -> None:
    return None


def _integer(digits: str) -> int:
    # The length first: the conversion takes quadratic time.
    if len(digits) > 20 or not MIN_INTEGER <= int(digits) <= MAX_INTEGER:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise ValueError("a number that no float can hold")
    return number


_DECODER = json.JSONDecoder(parse_constant=_null, parse_int=_integer, parse_float=_finite)


def _check_depth(value: object) -> None:
    """Raise RecursionError if lists and objects are nested more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        if not inner:
            return
        level = list(chain.from_iterable(inner))
    raise RecursionError
