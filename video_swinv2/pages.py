"""Renders self-contained HTML pages from templates, and places round tick marks on the axes of their plots.

The template of a page is stored next to the code that fills it, and extends page.html.j2, which gives all pages the
same look. A page is a single file that loads nothing else and works offline.
"""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from video_swinv2.progress import duration_text

# Templates that belong to no page in particular; they are stored next to this file.
SHARED_TEMPLATES = ("page.html.j2", "parts.html.j2")


@dataclass(frozen=True)
class TickMark:
    """A labelled mark on an axis. `position` goes from 0 at the start of the axis to 1 at its end."""

    text: str
    position: float


def tick_marks(low: float, high: float, unit: str = "", max_steps: int = 5) -> tuple[TickMark, ...]:
    """Tick marks at round numbers between `low` and `high`.

    The distance between marks is the smallest number of the form 1, 2 or 5 x 10^n with which at most `max_steps` steps
    fit on the axis. An axis of zero length has a single mark in its middle.
    """
    finest_step = (high - low) / max_steps
    if finest_step <= 0:
        return (TickMark(f"{low:.6g}{unit}", 0.5),)
    # The power of ten at or below the finest step allowed. The step is the first of 1, 2, 5 and 10 times that power
    # which is not finer.
    power = 10.0 ** math.floor(math.log10(finest_step))
    # The tolerances keep marks that rounding would move just past an end, as in 0.3 / 0.1 = 2.9999999999999996.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= finest_step * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(
        TickMark(f"{number * step:.6g}{unit}", min(1.0, max(0.0, (number * step - low) / (high - low))))
        for number in range(first, last + 1)
    )


def render(package: str, template: str, values: dict[str, object]) -> bytes:
    """Fill a template of `package` with `values` and return the page in UTF-8.

    Values are escaped, so a file name or a class name cannot add markup. The page's content security policy allows only
    the style sheet and the script of its template, by their digests: no other script runs, whatever a name contains.
    Raises jinja2.UndefinedError if a value is missing.
    """
    # "replace": a byte of a file name that is not valid UTF-8 has become a surrogate, and is shown as a question mark.

    return _environment(package).get_template(template).render(values).encode("utf-8", "replace")


@cache
def _environment(package: str) -> Environment:
    """The jinja2 environment with the templates of `package` and the shared ones.

    Cached, because compiling templates takes longer than filling them.
    """

    def read(name: str) -> str:
        home = "video_swinv2" if name in SHARED_TEMPLATES else package
        return files(home).joinpath(name).read_text(encoding="utf-8")

    # StrictUndefined raises an error for a missing value, which jinja2 would otherwise render as nothing. The two block
    # options keep lines that contain only a tag out of the page.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(read)
    )
    environment.filters["percent"] = _percent
    environment.filters["duration"] = duration_text
    environment.filters["digest"] = _digest
    return environment


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"


def _digest(text: str) -> str:
    """The digest of a script or style sheet as a content security policy has it: sha256- and the hash in base64."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
