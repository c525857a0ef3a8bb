"""The finished parts of a test, kept so that a test that was killed goes on, and joined when all are there.

A shard is some groups of videos that are always the same, whatever the number of processes. G videos, V views of each,
K classes.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from video_swinv2.errors import UserError
from video_swinv2.report.scores import read_arrays, write_arrays

MAX_PARTS = 256
"""A killed process has to do at most one shard again; more of them are more files to sync and to read."""


@dataclass(frozen=True)
class ScoredVideos:
    """What is known of some videos: `videos` (places in the list), a row of each other field for each.

    logits: (G, V, K) float16. views: (G, V, 5) int32. seconds: (spent, of them waiting for the reading). strips: places
    (M, 2) of (video, view) and the JPEG of each, one after the other, `strip_bytes` long.
    """

    videos: NDArray[np.int64]
    logits: NDArray[np.float16]
    views: NDArray[np.int32]
    stand_ins: NDArray[np.int32]
    reasons: NDArray[np.str_]
    seconds: NDArray[np.float64]
    strip_places: NDArray[np.int64]
    strip_bytes: NDArray[np.int64]
    strips: NDArray[np.uint8]

    def pictures(self) -> dict[tuple[int, int], NDArray[np.uint8]]:
        """The JPEGs by (video, view)."""
        parts = np.split(self.strips, np.cumsum(self.strip_bytes)[:-1])
        return {(video, view): part for (video, view), part in zip(self.strip_places.tolist(), parts, strict=False)}


class PartFolder:
    """The shards of one test in `out`/shards; `identity` is of everything that its scores depend on."""

    def __init__(self, out: Path, identity: dict[str, Any], groups: int) -> None:
        text = json.dumps(identity, sort_keys=True)
        self._parent = out / "shards"
        self._folder = self._parent / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._groups = groups
        self._size = math.ceil(groups / MAX_PARTS)

    def open(self) -> list[int]:
        """Make the folder, remove what other tests left beside it, and tell which shards are still to be done."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for other in self._parent.iterdir():
                if other != self._folder:
                    shutil.rmtree(other) if other.is_dir() else other.unlink()
        except OSError as error:
            raise UserError(
                f"{self._parent.parent}: cannot be made a folder ({error.strerror}); choose another --out"
            ) from error
        return [number for number in range(self.number) if not self._path(number).is_file()]

    @property
    def number(self) -> int:
        """How many shards there are."""
        return math.ceil(self._groups / self._size)

    def groups(self, number: int) -> range:
        """The groups of a shard."""
        return range(number * self._size, min((number + 1) * self._size, self._groups))

    def shard_of(self, group: int) -> int:
        """The shard that a group belongs to."""
        return group // self._size

    def save(self, number: int, share: ScoredVideos) -> None:
        """Keep a finished shard, whole or not at all."""
        write_arrays(self._path(number), {name: getattr(share, name) for name in ScoredVideos.__dataclass_fields__})

    def join(self, videos: int) -> ScoredVideos:
        """All shards as one, in the order of the list of `videos` videos; see `join_scored_videos`."""
        mend = "`out` must be a folder that all processes share; run the test again"
        arrays = [read_arrays(self._path(number), mend) for number in range(self.number)]
        return join_scored_videos([ScoredVideos(**parts) for parts in arrays], videos)

    def remove(self) -> None:
        """Forget the shards of a test that is done."""
        shutil.rmtree(self._parent)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:05d}.npz"


def join_scored_videos(shares: Sequence[ScoredVideos], n: int) -> ScoredVideos:
    """The rows of all shares in the order of the list of `n` videos; UserError unless each (video, view) is there once.

    Raises UserError also where shares have other numbers of views.
    """
    shapes = {(share.logits.shape[1:], share.views.shape[1]) for share in shares}
    if len(shapes) > 1:
        raise UserError(f"shares have views and classes {sorted(shapes)}, not the same; run the test again")
    videos = np.concatenate([share.videos for share in shares])
    times = np.bincount(videos, minlength=n)
    if times.size != n or (times != 1).any():
        missing, twice = int((times == 0).sum()), int((times > 1).sum())
        raise UserError(f"of {n} videos {missing} were not scored and {twice} more than once; run the test again")
    order = np.argsort(videos)
    ordered = {
        name: np.concatenate([getattr(share, name) for share in shares])[order]
        for name in ("videos", "logits", "views", "stand_ins", "reasons")
    }
    after_each_other = {
        name: np.concatenate([getattr(share, name) for share in shares])
        for name in ("strip_places", "strip_bytes", "strips")
    }
    return ScoredVideos(**ordered, **after_each_other, seconds=np.sum([share.seconds for share in shares], axis=0))
