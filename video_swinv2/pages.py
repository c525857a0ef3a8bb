"""Self-contained HTML pages: one look, everything escaped, and round tick marks for their plots.

A page's template lies beside the code that fills it and extends page.html.j2. The page is a single file: it loads
nothing and works offline.
"""

from __future__ import annotations

import base64
import hashlib
import math
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

SHARED_TEMPLATES = ("page.html.j2", "parts.html.j2")


@dataclass(frozen=True)
class TickMark:
    """A labelled mark on an axis; `position` is its distance from the start of the axis, 0 to 1."""

    text: str
    position: float


def tick_marks(low: float, high: float, unit: str = "", max_steps: int = 5) -> tuple[TickMark, ...]:
    """Marks at round numbers between `low` and `high`: the finest of 1, 2 or 5 x 10^n with at most `max_steps` steps.

    An axis of no length has a single mark in its middle.
    """
    finest_step = (high - low) / max_steps
    if finest_step <= 0:
        return (TickMark(f"{low:.6g}{unit}", 0.5),)
    power = 10.0 ** math.floor(math.log10(finest_step))
    # The tolerances keep a mark that rounding pushes just past an end, such as 0.3 / 0.1 = 2.9999999999999996.
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= finest_step * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(
        TickMark(f"{number * step:.6g}{unit}", min(1.0, max(0.0, (number * step - low) / (high - low))))
        for number in range(first, last + 1)
    )


def render(package: str, template: str, values: dict[str, object]) -> bytes:
    """Fill a template of `package` with `values`; the page in UTF-8. Raises jinja2.UndefinedError for a missing value.

    Values are escaped, so that a file name or a class name cannot add markup. A byte of a file name that is not valid
    UTF-8 is shown as a question mark. A page with a script includes it from a file of its own and allows only the
    digest of that file in its content security policy: no other script runs, whatever a name contains.
    """
    return _environment(package).get_template(template).render(values).encode("utf-8", "replace")


@cache
def _environment(package: str) -> Environment:
    """Templates of `package` and the shared ones; cached, because compiling them takes longer than filling them."""

    def read(name: str) -> str:
        home = "video_swinv2" if name in SHARED_TEMPLATES else package
        return files(home).joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(read)
    )
    environment.filters["percent"] = _percent
    environment.filters["digest"] = _digest
    return environment


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"


def _digest(script: str) -> str:
    """The hash source of a script, as a content security policy writes it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
