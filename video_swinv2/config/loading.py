"""Reads a configuration from a YAML file and `key.sub=value` overrides, and explains mistakes in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from video_swinv2.config.engine import EngineConfig
from video_swinv2.config.plain_yaml import MAX_BYTES, dump_yaml, parse_yaml
from video_swinv2.config.schema import (
    SOURCE_TAGS,
    AugmentConfig,
    Config,
    DataConfig,
    DetectionConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    SegmentationConfig,
    WeightedSource,
)
from video_swinv2.errors import UsageError, nearest_key
from video_swinv2.files import refuse_special_file

# The keys of `Config` that are sections with keys of their own.
SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "optim": OptimConfig,
    "augment": AugmentConfig,
    "mask": MaskConfig,
    "segmentation": SegmentationConfig,
    "detection": DetectionConfig,
    "engine": EngineConfig,
}
MAX_PARTS = 8  # of a dotted key; no key has as many
MAX_SHOWN = 200  # characters of an invalid value


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML) and check every key.

    Raises UsageError naming the first faulty key and, if it does not exist, a key that is near.
    """
    path = Path(path)
    refuse_special_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: has more than {MAX_BYTES:,} bytes; give a configuration")
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except ValueError as error:  # also UnicodeDecodeError
        raise UsageError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path}: contains no keys; see configs/ for examples")
    for override in overrides:
        apply_override(values, override)
    return validate_config(values, str(path))


def parse_override(override: str) -> tuple[str, Any]:
    """The key and the value of `key.sub=value`, whose value is YAML. Raises UsageError if it is none."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override}: write an override as key.sub=value")
    try:
        return key, parse_yaml(text)
    except ValueError as error:
        raise UsageError(f"{key}: the value is not valid YAML ({error})") from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.sub=value` in the nested dictionary `values`; raises UsageError if that is not possible.

    The key is not checked here. `validate_config` checks keys from files and overrides alike.
    """
    key, value = parse_override(override)
    # Descend to the dictionary that contains the last part, creating sections that the file does not have.
    *parents, last = key.split(".", maxsplit=MAX_PARTS)
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"{override}: {parent} is a value and has no keys below it")
    values[last] = value


def validate_config(values: Mapping[str, Any], origin: str) -> Config:
    """Convert nested plain data to a Config. Raises UsageError for the first mistake, in one line naming ``origin``."""
    try:
        return TypeAdapter(Config).validate_python(dict(values))
    except ValidationError as error:
        raise UsageError(f"{origin}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """One line in terms of the configuration's keys, for the first of pydantic's errors or for all missing keys.

    An unknown key comes first, because a misspelt one makes the right one missing.
    """
    faults = error.errors()
    for fault in faults:
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            key = ".".join(_names(fault))
            # A data source of a mixture has keys of its own, below its position in the list.
            of_source = [f"{key.rpartition('.')[0]}.{field.name}" for field in dataclasses.fields(WeightedSource)]
            near = nearest_key(key, of_source if key.startswith("data.source.") else [*known_keys(), *SECTIONS])
            fix = f"did you mean {near}?" if near else "`video-swinv2 config` lists all keys"
            return f"unknown key {key}; {fix}"
    first = faults[0]
    if first["type"] == "missing":
        return _missing([fault for fault in faults if fault["type"] == "missing"])
    # pydantic inserts into a key's path the branch of a union that it tried (int, tuple[...]) and positions in lists.
    # Remove both, because they are not keys that users know.
    shown = (name for name in _names(first) if name.isidentifier() and name not in ("int", "str", "float", "none"))
    return invalid_value(".".join(shown), first)


def _names(fault: ErrorDetails) -> list[str]:
    """The parts of the key that pydantic reports, without the branches of a data source."""
    return [str(part) for part in fault["loc"] if part not in SOURCE_TAGS]


def _missing(faults: Sequence[ErrorDetails]) -> str:
    """One line for all keys that are missing, with those of sections that are missing as a whole."""
    keys: list[str] = []
    for fault in faults:
        key = ".".join(_names(fault))
        keys += [f"{key}.{name}" for name in _required(SECTIONS[key])] if key in SECTIONS else [key]
    if len(keys) == 1:
        return f"{keys[0]} is missing; add it to the file or as {keys[0]}=..."
    return (
        f"{', '.join(keys)} are missing; add them to the file or as {keys[0]}=... (`video-swinv2 config` explains them)"
    )


def _required(section: type) -> list[str]:
    """The keys of a section that have no default."""
    return [
        field.name
        for field in dataclasses.fields(section)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]


def invalid_value(key: str, fault: ErrorDetails) -> str:
    """One line for a value that pydantic has found to be invalid."""
    # pydantic's messages begin with a capital letter, but this one follows a colon. To those of our own validators it
    # adds the type of the exception.
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: invalid value {_excerpt(fault['input'])}: {message[0].lower()}{message[1:]}"


def _excerpt(value: object) -> str:
    """A value as it is written in Python, of which a long one is shown in part."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def known_keys(section: type = Config, prefix: str = "") -> Iterator[str]:
    """Every key of a configuration in dotted form, such as `optim.lr`; sections themselves are not included."""
    for field in dataclasses.fields(section):
        inner = SECTIONS.get(field.name) if section is Config else None
        yield from known_keys(inner, f"{field.name}.") if inner else [prefix + field.name]


def plain_values(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of JSON values, with every default."""
    values: dict[str, Any] = TypeAdapter(Config).dump_python(config, mode="json")
    return values


def to_yaml(config: Config) -> str:
    """The configuration as YAML, with every default written out. `load_config` reads equal values back from it."""
    return dump_yaml(plain_values(config))
