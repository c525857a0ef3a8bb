r"""Names and messages in a form that is safe to show: in a terminal, in a cell of a CSV file, and in Markdown.

A file name, a class name or a server's answer may contain anything: escape sequences that retitle or repaint the
terminal, line breaks that forge a line of output, a formula that a spreadsheet computes, or markup. Here, characters
that would not be shown as themselves are replaced with visible escapes such as `\x1b`. Backslashes are not doubled, so
escaping a text twice changes nothing more, but the original cannot always be recovered. JSON output has exact values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# Control characters (C0 with line breaks and tabs, DEL, and C1, in which terminals also find escape sequences), the
# line and paragraph separators, overrides of the writing direction, and lone surrogates, which stand for bytes that are
# not UTF-8 and cannot be printed.
_INVISIBLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# The first characters of a formula, with the full-width forms that some spreadsheets also take for them.
_FORMULA_STARTS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
# The characters that Markdown, a table or a formula in it may take for markup, and those that make links of plain
# addresses.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>#|~&$@]|:(?=//)|(?<=\bwww)\.", re.IGNORECASE)


def for_terminal(text: object) -> str:
    """The text on one line, with control characters and others that are not shown as themselves visibly escaped."""
    return _INVISIBLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def terminal_lines(lines: Iterable[object]) -> str:
    """Lines as one text, each of them as `for_terminal`: a line break in a name does not begin another line."""
    return "\n".join(map(for_terminal, lines))


def for_csv(text: object) -> str:
    """The text for a cell of a CSV that people open: as `for_terminal`, and no spreadsheet takes it for a formula.

    A text that could be one gets an apostrophe in front, with which spreadsheets mark a text. Therefore this is for
    output only (`predict --csv`, failed.csv, verify.csv). Lists that are read back keep their names as they are.
    """
    shown = for_terminal(text)
    # A lone sign is no formula. It is also the name of standard input.
    return f"'{shown}" if len(shown) > 1 and shown.startswith(_FORMULA_STARTS) else shown


def for_markdown(text: object) -> str:
    """The text on one line, escaped so that Markdown shows it unchanged, also in the cell of a table.

    White space of any kind, line breaks included, becomes a single space.
    """
    return _MARKUP.sub(r"\\\g<0>", for_terminal(" ".join(str(text).split())))
