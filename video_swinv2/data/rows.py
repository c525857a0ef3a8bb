"""The rows of list files, in any of the ways that people write them.

A list is UTF-8 text with one video per line, and with or without a header that names its columns. Blank lines and
lines that begin with `#` are skipped, and white space around fields does not count.

With a header, fields are separated by commas, semicolons, tabs or blanks, and quoted as in CSV files.

Without a header, a line is a path, or a path and a label. The path ends where its quotes end or, without quotes, at the
suffix of a video or image. It may therefore contain blanks and commas. Without quotes or a suffix, the label has to be
a number, since nothing else tells where the path ends.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

from video_swinv2.data.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from video_swinv2.errors import UsageError
from video_swinv2.files import refuse_special_file

# The columns that are read, each with the names that people give it; the first one found counts.
COLUMN_NAMES = {
    "path": ("path", "video path", "file path", "filepath", "video", "file", "filename", "file name", "video name"),
    "label": ("label", "label name", "class", "class name", "action", "category", "target", "label id", "class id"),
    "split": ("split", "subset"),
    "group": ("group", "group id", "group name", "recording", "source video"),
    "youtube_id": ("youtube id",),  # with the two times: a list of Kinetics
    "time_start": ("time start",),
    "time_end": ("time end",),
}
KINETICS_COLUMNS = frozenset({"youtube_id", "time_start", "time_end"})
WANTED_HEADER = "path,label[,split][,group]"
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", " ": "blanks"}
NUMBER = re.compile(r"[+-]?[0-9]{1,18}(\.[0-9]*)?")
_SUFFIXES = "|".join(re.escape(suffix) for suffix in sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
MAX_LINE = 1 << 16  # characters; a path has at most 4,096 bytes
# The three ways to tell where a path ends; the rest of the line is empty or begins with a separator. A path with a
# suffix is taken as long as possible, since names such as `a.mp4 (copy).mp4` exist. Without a suffix, all numbers at
# the end of the line belong to the rest. They are matched from the end of the reversed line: looking for their
# beginning from the left takes quadratic time.
_QUOTED_PATH = re.compile(r"""(?P<quote>["'])(?P<path>.+?)(?P=quote)(?P<rest>[ \t,;].*|)""")
_PATH_WITH_SUFFIX = re.compile(rf"(?P<path>.*(?:{_SUFFIXES}))(?P<rest>[ \t,;].*|)", re.IGNORECASE)
_NUMBERS_REVERSED = re.compile(r"(?:(?:[0-9]*\.)?[0-9]{1,18}[+-]?[ \t,;]+(?=.))*")
_REST = re.compile(r" *(?P<separator>[,;\t]?)[ \t]*(?P<label>.*)")


class Numeral(str):
    """A label that is a number, as written: the name of a class if a class is called so, and otherwise an id."""

    __slots__ = ()

    def class_id(self, where: str) -> int:
        """The id of a class, from 0 on, or -1 for no label. Raises UsageError, beginning with `where`, for others."""
        number = float(self)
        if number < -1 or not number.is_integer():
            raise UsageError(f"{where}: label {self} is not the id of a class; ids are whole numbers from 0 on")
        return int(self.partition(".")[0])  # exact, where a float would be rounded


@dataclass(frozen=True)
class Header:
    """The first line of a list with named columns.

    `places` says where each column is, `separator` is the character between fields, and `ignored` holds the names of
    columns that are not read.
    """

    places: dict[str, int]
    width: int
    separator: str
    ignored: tuple[str, ...] = ()


def read_header(path: Path) -> Header | None:
    """The header of a list; None if its first line is a video.

    Raises UsageError if the list cannot be read, if its first line is neither a video nor a header that is understood,
    and if it has columns of which none is known to hold the labels.
    """
    numbered = ((number, line) for number, line in enumerate(_lines(path), start=1) if line.strip())
    (place, first), (_, second) = next(numbered, (1, "")), next(numbered, (1, ""))
    for separator in SEPARATORS:
        fields = [_plain_name(field) for field in next(csv.reader([first], delimiter=separator), [])]
        # The first line of a list without a header may well contain the word "video".
        if any(NUMBER.fullmatch(field) or _PATH_WITH_SUFFIX.fullmatch(field) for field in fields):
            continue
        places = {
            column: fields.index(known)
            for column, names in COLUMN_NAMES.items()
            if (known := next((name for name in names if name in fields), None)) is not None
        }
        kinetics = places.keys() >= KINETICS_COLUMNS
        if not (kinetics or "path" in places) or (separator == " " and len(places) < len(fields)):
            continue
        unknown = [field for place, field in enumerate(fields) if field and place not in places.values()]
        if unknown and "label" not in places and not kinetics:
            raise UsageError(
                f"{path}: no column is called label, class or category (found: {', '.join(fields)}; wanted: "
                f"{WANTED_HEADER}); rename the column of labels to `label`, or remove unknown columns if there is none"
            )
        return Header(places, len(fields), separator, tuple(unknown))
    if _is_unknown_header(first, second):
        raise UsageError(
            f"{path}, line {place}: {first.strip()[:500]!r} is neither a video nor a header that is understood; wanted "
            f"is the header {WANTED_HEADER}"
        )
    return None


def read_rows(path: Path, *columns: str) -> Iterator[tuple[int, list[str]]]:
    """The line number and the fields of `columns` for each video; '' for a column or field that does not exist.

    A list without a header has the columns path and label. Raises UsageError, naming the line, for one that cannot be
    understood.
    """
    header = read_header(path)
    if header is not None:
        yield from _rows_below(header, path, columns)
        return
    for number, line in enumerate(_lines(path), start=1):
        if text := line.strip():
            name, label = _path_and_label(text, f"{path}, line {number}")
            row = {"path": name, "label": label}
            yield number, [row.get(column, "") for column in columns]


def parse_label(text: str) -> str | None:
    """A label as written in a list: the name of a class, a Numeral, or None for no label."""
    return Numeral(text) if NUMBER.fullmatch(text) else text or None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a list, a comment as an empty line. Only "\\n", "\\r\\n" and "\\r" end a line.

    Names may contain the other characters at which `str.splitlines` divides, such as U+2028.
    """
    refuse_special_file(path)
    try:
        # "utf-8-sig" drops the byte order mark that Excel writes.
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from _without_comments(file, path)
    except (OSError, UnicodeDecodeError) as fault:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({fault}); check the path and the encoding") from fault


def _without_comments(file: TextIO, path: Path) -> Iterator[str]:
    lines = iter(partial(file.readline, MAX_LINE + 1), "")
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE or "\0" in line:
            what = "a NUL character" if "\0" in line else f"more than {MAX_LINE} characters"
            raise UsageError(f"{path}, line {number}: {what}; give a list of paths")
        yield "\n" if "#" in line and line.lstrip().startswith("#") else line


def _plain_name(column: str) -> str:
    """The name of a column in small letters with single blanks, as in COLUMN_NAMES."""
    return re.sub(r"[\s_-]+", " ", column.strip(' \t\r\n"')).casefold()


def _is_unknown_header(first: str, second: str) -> bool:
    """Whether the first of two lines names columns, of which none holds paths.

    Without a suffix and a number, a line can still be a video, such as `"clip" walk`. It is taken for a header if one
    of its fields is the name of a column, or if the next line is a video with a suffix and it is not.
    """
    if _is_video(first):
        return False
    fields = {_plain_name(field) for separator in SEPARATORS for field in first.split(separator)}
    known = {name for names in COLUMN_NAMES.values() for name in names}
    return bool(fields & known) or bool(_PATH_WITH_SUFFIX.fullmatch(re.sub("[\"']", "", second.strip())))


def _is_video(line: str) -> bool:
    """Whether a line has the suffix of a video or image, or ends in a number, which is then a label."""
    text = re.sub("[\"']", "", line.strip())
    last = re.split(r"[ \t,;]", text)[-1]
    return not text or bool(_PATH_WITH_SUFFIX.fullmatch(text) or NUMBER.fullmatch(last))


def _rows_below(header: Header, path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """The rows of a list with a header."""
    lines = _lines(path) if header.separator != " " else (line.strip() + "\n" for line in _lines(path))
    reader = csv.reader(lines, delimiter=header.separator, skipinitialspace=True)
    # Every row is padded below to at least one field more than the header. The place -1 of a column that does not exist
    # therefore selects an empty field.
    places = [header.places.get(column, -1) for column in columns]
    # Without blank lines, comments, and the rows of nothing but separators that spreadsheets leave at the end.
    rows = filter(any, ([field.strip() for field in fields] for fields in reader))
    try:
        next(rows)  # the header
        for fields in rows:
            if any(fields[header.width :]):
                what = SEPARATORS[header.separator]
                raise UsageError(f"{path}, line {reader.line_num}: too many fields; quote names that contain {what}")
            fields = [*fields[: header.width], *[""] * (header.width + 1 - len(fields))]
            yield reader.line_num, [fields[place] for place in places]
    except csv.Error as fault:
        raise UsageError(f"{path}, line {reader.line_num + 1}: cannot be read as CSV ({fault})") from fault


def _path_and_label(line: str, where: str) -> tuple[str, str]:
    """The path and the label ('' for none) of a line of a list without a header."""
    if match := _QUOTED_PATH.fullmatch(line):
        # CSV writes a quote within quotes twice.
        path, rest = match["path"].strip().replace(match["quote"] * 2, match["quote"]), match["rest"]
    elif match := _PATH_WITH_SUFFIX.fullmatch(line):
        path, rest = match["path"].strip(), match["rest"]
    else:
        end = len(line) - len(_NUMBERS_REVERSED.match(line[::-1])[0])  # type: ignore[index]  # it matches '' too
        path, rest = line[:end], line[end:]
        if not rest and re.search(r"[ \t,;]", line):
            raise UsageError(
                f"{where}: cannot tell the path from the label in {line[:500]!r}; a line is `path label` with a path "
                "that is quoted or ends in a suffix such as .mp4, or the list begins with a header such as `path,label`"
            )
    return path, _label(rest, path, where)


def _label(rest: str, path: str, where: str) -> str:
    """The label in what follows a path, without the separator and quotes; '' for none."""
    separator, text = _REST.fullmatch(rest).groups()  # type: ignore[union-attr]  # it matches every line
    numbers = re.split(r"[ \t,;]+", text.strip(" \t,;"))
    if len(numbers) > 1 and all(map(NUMBER.fullmatch, numbers)):
        raise UsageError(
            f"{where}: {len(numbers)} numbers after {path!r}, but one label is wanted; remove the number of frames or "
            "the further labels (folders of frames are not read; make videos of them)"
        )
    if not separator:  # separated by blanks, which the name of a class may contain
        return text.removeprefix('"').removesuffix('"').strip()
    label, *others = next(csv.reader([text], delimiter=separator), [""])
    if any(others):
        raise UsageError(f"{where}: too many fields; quote names that contain {SEPARATORS[separator]}")
    return label.strip()
