"""What `predict` does with a model for images, such as a segmenter: an answer for each image of files and folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from video_swinv2.data.decode import DecodeError
from video_swinv2.data.media import IMAGE
from video_swinv2.distributed.collectives import gather_shares
from video_swinv2.distributed.world import World
from video_swinv2.inference.predictor import find_sources, unreadable_reason

T = TypeVar("T")


class ImageSources:
    """The images of `sources`, which are files and folders. Raises UsageError for a folder without an image."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._found = find_sources(sources, IMAGE)

    @property
    def paths(self) -> list[str]:
        """Of the images, in their order."""
        return [name for name, _ in self._found]

    def answers(self, answer: Callable[[int, str], T], failed: Callable[[str, str], T], world: World) -> list[T]:
        """An answer for each image, in their order, on every process; processes share the images.

        answer: takes the number of an image and its path. failed: takes the path of an image that cannot be read, also
        one that `answer` raises DecodeError for, and why.
        """
        mine: dict[int, T] = {}
        for number in range(world.rank, len(self._found), world.size):
            path, media_type = self._found[number]
            error = unreadable_reason(Path(path), media_type, IMAGE)
            try:
                mine[number] = failed(path, error) if error else answer(number, path)
            except DecodeError as fault:
                mine[number] = failed(path, str(fault))
        together: dict[int, T] = {}
        for share in gather_shares(world, mine):
            together |= share
        return [together[number] for number in range(len(self._found))]
