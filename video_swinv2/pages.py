"""Self-contained HTML pages: one look, everything escaped; a template lives beside the code that fills it."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

SHARED = ("page.html.j2", "parts.html.j2")


def render(package: str, template: str, values: dict[str, object]) -> bytes:
    """The page of a template of `package`, which extends page.html.j2; UTF-8.

    A name that is missing from `values` is an error. A file name may hold bytes that are no text; they become a mark.
    """

    def read(name: str) -> str:
        return files("video_swinv2" if name in SHARED else package).joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(read)
    )
    environment.filters["percent"] = _percent
    return environment.get_template(template).render(values).encode("utf-8", "replace")


def _percent(fraction: float, digits: int = 1) -> str:
    return f"{100 * fraction:.{digits}f}"
