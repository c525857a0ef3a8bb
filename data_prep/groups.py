"""Groups that the user gives beside the lists: in a file, or by a regular expression over the paths of the videos."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from video_swinv2.data.rows import read_header, read_rows
from video_swinv2.errors import UsageError


@dataclass(frozen=True)
class GroupRule:
    """The options --groups and --group-regex, of which at most one is given.

    `file` is a list with the columns path and group. `regex` is searched for in the path of each video: its group is
    what the first pair of parentheses matches or, without any, the whole match.
    """

    file: Path | None = None
    regex: str | None = None

    def apply(self, videos: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
        """The group of each video, '' where the rule gives none, and remarks for the user.

        videos: the paths that each video is known by; the regular expression is searched for in the first.

        Raises UsageError for an option that cannot be understood or that fits none of the videos.
        """
        if self.file is not None:
            known, option = _read_groups(self.file), f"--groups {self.file}"
            groups = [
                next((known[path] for path in map(os.path.normpath, paths) if path in known), "") for paths in videos
            ]
        elif self.regex is not None:
            option = f"--group-regex {self.regex}"
            groups = _find_groups(self.regex, (paths[0] for paths in videos), option)
        else:
            return [""] * len(videos), []
        without = [paths[0] for paths, group in zip(videos, groups, strict=True) if not group]
        if len(without) == len(videos):
            raise UsageError(
                f"{option}: gives none of the {len(videos)} videos a group; their paths are like {without[0]!r}"
            )
        notes = [f"{option}: gives {len(without)} videos no group, such as {without[0]!r}"] if without else []
        return groups, notes


def _read_groups(path: Path) -> dict[str, str]:
    """The group of each path of a list. Raises UsageError, naming the line, for one that cannot be understood."""
    header = read_header(path)
    if header is None or not header.places.keys() >= {"path", "group"}:
        raise UsageError(f"{path}: needs the header path,group")
    groups: dict[str, str] = {}
    for number, (listed, group) in read_rows(path, "path", "group"):
        if not listed:
            raise UsageError(f"{path}, line {number}: has no path; add it or remove the line")
        if groups.setdefault(os.path.normpath(listed), group) != group:
            raise UsageError(f"{path}, line {number}: {listed!r} has two groups; remove one of the lines")
    return groups


def _find_groups(regex: str, paths: Iterable[str], option: str) -> list[str]:
    """What the regular expression finds in each path, '' for nothing. Raises UsageError if it is not valid."""
    try:
        pattern = re.compile(regex)
    except re.error as error:
        raise UsageError(f"{option}: is not a regular expression ({error})") from error
    part = min(pattern.groups, 1)
    return [(match[part] or "") if (match := pattern.search(path)) else "" for path in paths]
