"""Pages whose tables are made from measurements: what is between two markers is replaced."""

from __future__ import annotations

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def put_between(page: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """Replace what is between two markers of a page. Raises ValueError if they are not both there, in order."""
    before, first, rest = page.partition(begin)
    _, last, after = rest.partition(end)
    if not (first and last):
        raise ValueError(f"no {begin} followed by {end}")
    return f"{before}{begin}{text}{end}{after}"
