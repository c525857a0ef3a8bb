"""Self-contained HTML pages: one look, everything escaped; a template lives beside the code that fills it."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

SHARED = ("page.html.j2", "parts.html.j2")


def render(package: str, template: str, values: dict[str, object]) -> bytes:
    """The page of a template of `package`, which extends page.html.j2; UTF-8.

    A name that is missing from `values` is an error. A file name may hold bytes that are no text; they become a mark.
    A page with a script names its digest in the page's policy, so that no other script runs whatever a name contains:
    both include the same file of its own.
    """
    return _environment(package).get_template(template).render(values).encode("utf-8", "replace")


@cache
def _environment(package: str) -> Environment:
    """Templates of a package and the shared ones; kept, for compiling them takes longer than filling them."""

    def read(name: str) -> str:
        return files("video_swinv2" if name in SHARED else package).joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(read)
    )
    environment.filters["percent"] = _percent
    environment.filters["digest"] = _digest
    return environment


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"


def _digest(script: str) -> str:
    """What a content security policy calls a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
