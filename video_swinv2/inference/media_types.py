"""Finds the videos or images in folders, and reads the views of either.

Letters: V views, T frames, H W pixels of the crop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from video_swinv2.data.media import media_type_of
from video_swinv2.data.trees import files_below
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.protocols import Protocol
from video_swinv2.evaluation.views import read_video_or_image
from video_swinv2.weights.store import Preprocessing


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


def read_file_views(
    path: Path, protocol: Protocol, preprocessing: Preprocessing, *, time_limit_seconds: float = 60.0
) -> Tensor:
    """All views of a video, or the crops of an image: uint8 (V, 3, [T,] H, W), the same pixels as a test reads.

    An image has the axis T only if it is read for clips of one frame. Raises DecodeError for a file that cannot be
    read.
    """
    pixels, _ = read_video_or_image(path, protocol, preprocessing, time_limit_seconds=time_limit_seconds)
    return pixels.unsqueeze(2) if preprocessing.frames is not None and pixels.ndim == 4 else pixels
