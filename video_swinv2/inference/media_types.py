"""Finds the videos or images in folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from video_swinv2.data.media import media_type_of
from video_swinv2.data.trees import files_below
from video_swinv2.errors import UsageError


def find_media_files(paths: Sequence[Path], wanted: str) -> list[tuple[Path, str | None]]:
    """Expand folders into the files of media type `wanted` inside them, sorted. Returns pairs (file, media type).

    A file that is given by name is always returned, with its media type or None. Raises UsageError for a folder without
    a file of the wanted type, and UserError for a folder that cannot be read.
    """
    found: list[tuple[Path, str | None]] = []
    for path in paths:
        if not path.is_dir():
            found.append((path, media_type_of(path)))
            continue
        inside = [file for name in files_below(path) if media_type_of(file := path / name) == wanted]
        if not inside:
            raise UsageError(f"{path}: no {wanted} in this folder; this model takes {wanted}s")
        found += [(file, wanted) for file in inside]
    return found
