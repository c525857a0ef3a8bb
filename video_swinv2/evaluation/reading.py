"""Videos read in worker processes, in groups that are always the same, so that a bad video costs only itself.

Letters: G videos in a group, V views of each video, T frames, H W pixels of the crop.

A group is one batch for the model. It holds the same videos whatever the number of processes, and a video that fails
leaves its rows black, so what the model computes for the others does not change by a bit.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from video_swinv2.data.decode import VideoReader
from video_swinv2.data.images import read_image, read_tar_member
from video_swinv2.data.index import AnyEntry, TarMember
from video_swinv2.data.workers import (
    FilesInHand,
    is_worker_death,
    killing_alarm,
    patience_seconds,
    start_loader,
)
from video_swinv2.errors import UserError
from video_swinv2.evaluation.protocols import Protocol, View
from video_swinv2.evaluation.splits import is_image
from video_swinv2.evaluation.views import cut_image, cut_views, view_shape
from video_swinv2.killable import KillableProcess, ProcessDiedError
from video_swinv2.weights.store import Preprocessing

_PREFETCH_GROUPS = 2
_GRACE_SECONDS = 30.0


@dataclass(frozen=True)
class VideoRecord:
    """The outcome of reading one video or image: its views, or the reason why it failed.

    `position` is its place among the entries of the test; `stand_ins` frames were damaged and replaced by neighbours.
    """

    position: int
    views: tuple[View, ...] = ()
    reason: str = ""
    stand_ins: int = 0


@dataclass(frozen=True)
class Group:
    """One batch: pixels uint8 (G * V, 3, [T,] H, W), video after video; black where the video failed."""

    number: int
    pixels: Tensor
    videos: tuple[VideoRecord, ...]


class VideoGroups(Dataset[Group]):
    """The videos of a test in groups of `group_videos`; item i reads the i-th group.

    The views of several protocols follow one another, all from one decode of the video.
    """

    def __init__(
        self,
        entries: Sequence[AnyEntry],
        protocol: Protocol | Sequence[Protocol],
        preprocessing: Preprocessing,
        *,
        group_videos: int,
        frame_order: str,
        seed: int,
        time_limit_seconds: float,
    ) -> None:
        self.entries = entries
        self.protocols = (protocol,) if isinstance(protocol, Protocol) else tuple(protocol)
        self.preprocessing = preprocessing
        self.group_videos = group_videos
        self.frame_order = frame_order
        self.seed = seed
        self.time_limit_seconds = time_limit_seconds
        self.in_hand: FilesInHand | None = None
        """Set by `deliver_groups` for its workers: the position of the video that each of them is reading."""

    def __len__(self) -> int:
        return math.ceil(len(self.entries) / self.group_videos)

    def __getitem__(self, number: int) -> Group:
        read = self.read if get_worker_info() is None else self._read_in_worker
        return self.assemble(number, [read(position) for position in self.positions(number)])

    @property
    def patience_seconds(self) -> float:
        """How long reading one video may take before its process counts as hung."""
        return patience_seconds(self.time_limit_seconds, _GRACE_SECONDS)

    @property
    def views(self) -> int:
        """Views of one video, of all protocols."""
        return sum(protocol.views for protocol in self.protocols)

    def positions(self, number: int) -> range:
        """Positions in `entries` of the videos of a group."""
        first = number * self.group_videos
        return range(first, min(first + self.group_videos, len(self.entries)))

    def read(self, position: int) -> tuple[VideoRecord, Tensor | None]:
        """Read one video: its record and pixels uint8 (V, 3, [T,] H, W). Any failure becomes the record's reason."""
        entry = self.entries[position]
        try:
            if is_image(entry):
                picture = read_tar_member(entry) if isinstance(entry, TarMember) else read_image(entry.path)
                cut = [cut_image(picture, protocol, self.preprocessing) for protocol in self.protocols]
                views = tuple(view for _, views in cut for view in views)
                return VideoRecord(position, views), torch.cat([pixels for pixels, _ in cut])
            with VideoReader(entry.path, time_limit_seconds=self.time_limit_seconds) as reader:
                pixels, views, stand_ins = cut_views(
                    reader,
                    self.protocols,
                    self.preprocessing,
                    frame_order=self.frame_order,
                    seed=self.seed,
                    name=entry.name,
                )
                return VideoRecord(position, views, stand_ins=stand_ins), pixels
        except UserError as error:
            return VideoRecord(position, reason=str(error).removeprefix(f"{entry.path}: ")), None
        except Exception as error:  # a test of hours must not end at one file, whatever a decoder throws
            return VideoRecord(position, reason=f"{type(error).__name__}: {error}"), None

    def assemble(self, number: int, videos: Sequence[tuple[VideoRecord, Tensor | None]]) -> Group:
        """Stack the videos of a group: (V, 3, [T,] H, W) each -> (G * V, 3, [T,] H, W)."""
        shape = (len(videos), self.views, *view_shape(self.preprocessing))
        pixels = torch.zeros(shape, dtype=torch.uint8)
        for row, (_, part) in zip(pixels, videos, strict=True):
            if part is not None:
                row.copy_(part)
        return Group(number, pixels.flatten(0, 1), tuple(record for record, _ in videos))

    def _read_in_worker(self, position: int) -> tuple[VideoRecord, Tensor | None]:
        if self.in_hand is None:
            raise RuntimeError("VideoGroups are read in workers by `deliver_groups`")
        with self.in_hand.reading(position, self.patience_seconds):
            return self.read(position)


def deliver_groups(
    groups: VideoGroups, numbers: Sequence[int], workers: int, deliver: Callable[[Group, float], None]
) -> float:
    """Read groups in `workers` processes (0: in this one) and call `deliver(group, seconds waited so far)` for each.

    A worker that dies or hangs costs at most one video. Each video of its group is read again in a process of its own,
    and the one that kills that process too is delivered as failed. Returns the seconds spent waiting for reading.
    """
    done: set[int] = set()
    waited = 0.0
    while left := [number for number in numbers if number not in done]:
        at_once = min(workers, len(left))
        groups.in_hand = FilesInHand(at_once) if at_once else None
        source = start_loader(
            groups, [[number] for number in left], _only_group, workers=at_once, prefetch=_PREFETCH_GROUPS
        )
        suspects: list[int] = []
        try:
            while True:
                started = time.perf_counter()
                group = next(source, None)
                waited += time.perf_counter() - started
                if group is None:
                    break
                deliver(group, waited)
                done.add(group.number)
        except (RuntimeError, EOFError, OSError) as error:
            # A death may also come out of `deliver`: if a loader elsewhere in this process has left PyTorch's signal
            # handler in place, it raises whatever the main thread is doing. That group is then delivered again.
            if not is_worker_death(error, groups.in_hand):
                raise
            undelivered = [number for number in left if number not in done]
            suspects = _suspect_groups(groups, undelivered, at_once)
        del source  # ends the other workers
        for number in suspects:
            deliver(_read_group_apart(groups, number), waited)
            done.add(number)
    return waited


def videos_per_group(views: int, batch: int) -> int:
    """The fewest videos of `views` views each that fill nine tenths of their batches of `batch` views."""
    videos = 1
    while 10 * videos * views < 9 * batch * math.ceil(videos * views / batch):
        videos += 1
    return videos


def default_workers() -> int:
    """One reading process per core this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _suspect_groups(groups: VideoGroups, undelivered: Sequence[int], workers: int) -> list[int]:
    """The groups that dead workers were reading; there is at least one, so every restart makes progress."""
    in_hand = [] if groups.in_hand is None else groups.in_hand.abandoned()
    read = {file.number // groups.group_videos for file in in_hand}
    # A worker that dies between two videos, of a full /dev/shm for example, leaves no trace. Then every group that a
    # worker may hold is suspect: the prefetched ones, and one more that was handed out while another was delivered.
    return [number for number in undelivered if number in read] or list(undelivered[: workers * _PREFETCH_GROUPS + 1])


def _read_group_apart(groups: VideoGroups, number: int) -> Group:
    """A group whose every video is read in a process of its own, so that the one that kills its process is known."""
    return groups.assemble(number, [_read_apart(groups, position) for position in groups.positions(number)])


def _read_apart(groups: VideoGroups, position: int) -> tuple[VideoRecord, Tensor | None]:
    """`VideoGroups.read` in a process of its own; its death is the video's failure."""
    process = KillableProcess(_read_and_send, groups, position, method="fork" if sys.platform == "linux" else "spawn")
    try:
        record: VideoRecord = process.receive()
        return record, None if record.reason else torch.from_numpy(process.receive())
    except ProcessDiedError as death:
        if death.exit_code == -signal.SIGALRM:
            reason = f"the decoder did not answer within {groups.patience_seconds:g} seconds"
        else:
            reason = f"the decoder crashed ({death})"
        return VideoRecord(position, reason=reason), None
    finally:
        process.end()


def _read_and_send(pipe: Connection, groups: VideoGroups, position: int) -> None:
    """The process of `_read_apart`. Pixels go through the pipe as an array: a tensor would take shared memory."""
    torch.set_num_threads(1)
    with killing_alarm(groups.patience_seconds):
        record, pixels = groups.read(position)
    pipe.send(record)
    if pixels is not None:
        pipe.send(pixels.numpy())


def _only_group(groups: list[Group]) -> Group:
    """Collation of a list of one group, which is a batch already."""
    return groups[0]
