"""Plain YAML: text, numbers, booleans, lists and mappings, read within limits and written so that it reads back.

Of YAML's language this leaves out what a configuration does not need and a hostile file can misuse: aliases, a few
lines of which stand for billions of values, explicit tags, and keys that are no text. Two things are as in YAML 1.2: a
number may be written 5e8 or 1e-3 (in YAML 1.1, these are text), and a key that occurs twice in a mapping is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

MAX_BYTES = 2**18
"""Of a file. The recipes of this repository have about 3,000 bytes; YAML is parsed at about 100,000 a second."""
MAX_DEPTH = 20
"""Of lists and mappings within each other, far below Python's own limit."""
MAX_DIGITS = 1000
"""Of a whole number, below the 4,300 from which on Python refuses to convert it to text, as messages do."""

_FLOAT_TAG = "tag:yaml.org,2002:float"
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)$")


def _fault(what: str, mark: Any) -> yaml.MarkedYAMLError:
    """The error to raise for `what` is not plain YAML, at the place `mark` of the text."""
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without aliases, tags and deep nesting."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Turn the next value, with all that it contains, into a node."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _fault("an alias; write the value itself", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _fault("an explicit tag; remove it", event.start_mark)
        if self._depth > MAX_DEPTH:
            raise _fault("nested too deeply", event.start_mark)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Turn a node into a dictionary, whose keys are text and different from each other."""
        names = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, str):
                raise _fault("a key that is no text", key.start_mark)
            if name in names:
                raise _fault(f"the key {name} twice", key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Turn a node into a whole number."""
        if len(node.value) > MAX_DIGITS:
            raise _fault("a number of too many digits", node.start_mark)
        return super().construct_yaml_int(node)


class _Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper without aliases, which puts quotes around a text that `_Loader` takes for a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write a value that occurs twice twice."""
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(_FLOAT_TAG, _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError, saying where and why in one line, if it is not plain YAML."""
    try:
        # The loader is a subclass of the safe one.
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates such as 2024-99-99
        raise ValueError(" ".join(str(error).split())) from error


def dump_yaml(value: object) -> str:
    """Plain data as YAML text, from which `parse_yaml` reads equal data."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=None)
    return text
