"""A description of every key of a configuration, for people and, as a JSON schema, for editors."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from video_swinv2.config.loading import SECTIONS
from video_swinv2.config.schema import Config
from video_swinv2.files import json_text

WIDTH = 100  # columns, on terminals and in files alike
KINDS = {
    "boolean": "true | false",
    "integer": "whole number",
    "number": "number",
    "object": "mapping",
    "string": "text",
}


@dataclass(frozen=True)
class Setting:
    """A key of the configuration in dotted form.

    values: what may be given, in words. default: as YAML; None if the key is required. meaning: with its unit.
    """

    key: str
    values: str
    default: str | None
    meaning: str


def config_schema() -> dict[str, Any]:
    """The JSON schema of a configuration file, with the descriptions of all keys."""
    return TypeAdapter(Config).json_schema()


def settings() -> tuple[Setting, ...]:
    """Every key of a configuration: first those of the run, then those of each section."""
    schema = config_schema()
    named = schema["$defs"]
    found = list(_settings_of(schema, "", named))
    for name, section in SECTIONS.items():
        found += _settings_of(named[section.__name__], f"{name}.", named)
    return tuple(found)


def settings_text() -> str:
    """All keys as text: default, possible values and meaning of each."""
    blocks = []
    for setting in settings():
        default = "required" if setting.default is None else setting.default
        head = textwrap.fill(f"{setting.key}: {default}  ({setting.values})", WIDTH, subsequent_indent="    ")
        blocks.append(f"{head}\n{textwrap.indent(textwrap.fill(setting.meaning, WIDTH - 4), '    ')}")
    return "\n".join(blocks)


def _settings_of(schema: Mapping[str, Any], prefix: str, named: Mapping[str, Any]) -> Iterator[Setting]:
    """The keys of one section. named: the schemas of the sections and of other values with a name."""
    for key, value in schema["properties"].items():
        if prefix or key not in SECTIONS:
            # Only keys that a factory gives their value, an empty one, are neither required nor have a default.
            default = json_text(value["default"]) if "default" in value else "{}"
            required = key in schema.get("required", ())
            meaning = " ".join(value.get("description", "").split())
            yield Setting(prefix + key, _values(value, named), None if required else default, meaning)


def _values(schema: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    """The values that a part of a JSON schema allows, in words."""
    if "$ref" in schema:
        keys = named[schema["$ref"].rpartition("/")[2]]["properties"]
        return "{" + ", ".join(f"{key}: ..." for key in keys) + "}"
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if choices := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(_values(choice, named) for choice in choices if choice.get("type") != "null")
    if schema["type"] == "array":
        if "prefixItems" in schema:
            return "[" + ", ".join(_values(item, named) for item in schema["prefixItems"]) + "]"
        return f"[{_values(schema['items'], named)}, ...]"
    return KINDS[schema["type"]] + _bounds(schema)


def _bounds(schema: Mapping[str, Any]) -> str:
    """The bounds of a number in words, such as " from 0 to 1"; '' for anything without bounds."""
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {schema[bound]:,}" for bound, word in words.items() if bound in schema)
