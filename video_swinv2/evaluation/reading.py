"""Reading videos in worker processes, in fixed groups, so that a bad video costs nothing but itself.

Letters: G videos in a group, V views of each video, T frames, H W pixels of the crop.

A group is what the model is given at a time. It holds the same videos whatever the number of processes, and the rows of
a video that fails stay black, so that what the model computes for the other videos does not change by a bit.

A decoder can raise, crash its process or hang. `VideoGroups.read` turns an exception into a reason. A hung worker is
killed by its own alarm. After the death of a worker, `deliver_groups` reads the videos of the suspect groups again,
each in a process of its own, reports those that kill that process too as failed, and starts new workers for the rest.
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

from video_swinv2.data.decode import DecodeError, VideoReader, named_errors
from video_swinv2.data.display import MAX_PIXELS
from video_swinv2.data.images import is_image, read_entry
from video_swinv2.data.index import AnyEntry
from video_swinv2.data.workers import (
    FilesInHand,
    bounded_reading,
    is_worker_death,
    patience_seconds,
    start_loader,
)
from video_swinv2.errors import UserError
from video_swinv2.evaluation.protocols import Protocol, View
from video_swinv2.evaluation.views import cut_image, cut_views, view_shape
from video_swinv2.killable import KillableProcess, ProcessDiedError
from video_swinv2.weights.store import Preprocessing

_PREFETCH_GROUPS = 2  # groups that a worker reads ahead, each of which occupies shared memory
_GRACE_SECONDS = 30.0  # beyond the reader's own time limits, before a process that reads a video counts as hung


@dataclass(frozen=True)
class VideoRecord:
    """The outcome of reading one video or image: its views, or the reason why it failed.

    `position` is its place among the entries of the test. `stand_ins` is how many of the frames asked for were damaged
    and replaced by a neighbour.
    """

    position: int
    views: tuple[View, ...] = ()
    reason: str = ""
    stand_ins: int = 0


@dataclass(frozen=True)
class Group:
    """The videos of a group: pixels uint8 (G * V, 3, [T,] H, W), video after video, black where a video failed."""

    number: int
    pixels: Tensor
    videos: tuple[VideoRecord, ...]


class VideoGroups(Dataset[Group]):
    """The videos of a test in groups of `group_videos`, the last one possibly smaller; item i reads the i-th group.

    Several protocols share one decode of each video. Their views follow one another: all views of the first protocol,
    then all of the second, and so on.
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
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.entries = entries
        self.protocols = (protocol,) if isinstance(protocol, Protocol) else tuple(protocol)
        self.preprocessing = preprocessing
        self.group_videos = group_videos
        self.frame_order = frame_order
        self.seed = seed
        self.time_limit_seconds = time_limit_seconds
        self.max_pixels = max_pixels
        self.in_hand: FilesInHand | None = None
        """Set by `deliver_groups` before it starts workers: the position of the video that each of them is reading."""

    def __len__(self) -> int:
        return math.ceil(len(self.entries) / self.group_videos)

    def __getitem__(self, number: int) -> Group:
        # Only in a loader worker is reading limited by an alarm: in this process it would kill the whole test.
        read = self.read if get_worker_info() is None else self._read_in_worker
        return self.assemble(number, [read(position) for position in self.positions(number)])

    @property
    def patience_seconds(self) -> float:
        """How long reading one video may take before its process counts as hung and is killed."""
        return patience_seconds(self.time_limit_seconds, _GRACE_SECONDS)

    @property
    def views(self) -> int:
        """The number of views per video, of all protocols together."""
        return sum(protocol.views for protocol in self.protocols)

    def positions(self, number: int) -> range:
        """The positions in `entries` of the videos of a group."""
        first = number * self.group_videos
        return range(first, min(first + self.group_videos, len(self.entries)))

    def read(self, position: int) -> tuple[VideoRecord, Tensor | None]:
        """Read one video or image -> its record and its pixels, uint8 (V, 3, [T,] H, W).

        Never raises: any failure becomes the reason in the record, and there are no pixels then.
        """
        entry = self.entries[position]
        try:
            with named_errors(entry.path):
                return self._read(entry, position)
        except UserError as error:
            # The report shows the reason next to the path, so the path is not repeated in it.
            return VideoRecord(position, reason=str(error).removeprefix(f"{entry.path}: ")), None

    def _read(self, entry: AnyEntry, position: int) -> tuple[VideoRecord, Tensor]:
        if is_image(entry):
            if self.preprocessing.frames is not None:  # a list can name images among its videos
                raise DecodeError(f"{entry.path}: is an image, but the model takes clips", "not_video")
            picture = read_entry(entry, self.max_pixels)
            cut = [cut_image(picture, protocol, self.preprocessing) for protocol in self.protocols]
            views = tuple(view for _, views in cut for view in views)
            return VideoRecord(position, views), torch.cat([pixels for pixels, _ in cut])
        limit_seconds, max_pixels = self.time_limit_seconds, self.max_pixels
        with VideoReader(entry.path, time_limit_seconds=limit_seconds, max_pixels=max_pixels) as reader:
            pixels, views, stand_ins = cut_views(
                reader,
                self.protocols,
                self.preprocessing,
                frame_order=self.frame_order,
                seed=self.seed,
                name=entry.name,
            )
            return VideoRecord(position, views, stand_ins=stand_ins), pixels

    def assemble(self, number: int, videos: Sequence[tuple[VideoRecord, Tensor | None]]) -> Group:
        """Join the videos of a group: (V, 3, [T,] H, W) each -> (G * V, 3, [T,] H, W), zeros where a video failed."""
        shape = (self.views, *view_shape(self.preprocessing))
        parts = [torch.zeros(shape, dtype=torch.uint8) if part is None else part for _, part in videos]
        # A group of one video, as most are, is not copied: at 224 pixels that takes a seventh of the time of reading.
        pixels = parts[0] if len(parts) == 1 else torch.cat(parts)
        return Group(number, pixels, tuple(record for record, _ in videos))

    def _read_in_worker(self, position: int) -> tuple[VideoRecord, Tensor | None]:
        # The record survives the worker in shared memory: it is how `deliver_groups` finds the video that killed it.
        if self.in_hand is None:
            raise RuntimeError("VideoGroups are read in workers by `deliver_groups`")
        with self.in_hand.reading(position, self.patience_seconds):
            return self.read(position)


def deliver_groups(
    groups: VideoGroups, numbers: Sequence[int], workers: int, deliver: Callable[[Group, float], None]
) -> float:
    """Read groups in `workers` processes (0: in this one) and call `deliver(group, seconds waited so far)` for each.

    Groups arrive in the order of `numbers` unless a worker dies or hangs. Then each video of the group that it was
    reading is read again in a process of its own, and a video that kills that process too is delivered as failed. Such
    a group is delivered before earlier ones that are still missing. `deliver` may be called twice with the same group
    and must be safe to repeat. Returns the seconds spent waiting for reading.
    """
    done: set[int] = set()
    waited = 0.0
    # Each pass starts a loader for the groups that are left. The pass ends when all are delivered or a worker dies,
    # which ends the loader; the suspect groups are then read apart, and the next pass takes the rest. Every pass
    # delivers at least one group, so the loop ends.
    while left := [number for number in numbers if number not in done]:
        at_once = min(workers, len(left))
        groups.in_hand = FilesInHand(at_once) if at_once else None
        # Groups are batches already, so each "batch" of the loader has a single address, the number of its group.
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
            # The error may also come out of `deliver`: PyTorch has a signal handler that raises inside whatever the
            # main thread is doing when a worker dies. `start_loader` removes it, but a loader elsewhere in this process
            # may have left it in place. The interrupted group is then delivered again.
            if not is_worker_death(error, groups.in_hand):
                raise
            # Before `del source`, which ends the other workers and makes them look dead too.
            undelivered = [number for number in left if number not in done]
            suspects = _suspect_groups(groups, undelivered, at_once)
        del source  # ends the other workers
        for number in suspects:
            deliver(_read_group_apart(groups, number), waited)
            done.add(number)
    return waited


def videos_per_group(views: int, batch: int) -> int:
    """The smallest number of videos, of `views` views each, that fill their batches of `batch` views to nine tenths.

    Example: 12 views fill a batch of 12 with 1 video. 5 views and batches of 12 take 7 videos: 35 views in 3 batches.
    """
    videos = 1
    # In integers: the videos need ceil(videos * views / batch) batches, which have room for that times `batch` views.
    while 10 * videos * views < 9 * batch * math.ceil(videos * views / batch):
        videos += 1
    return videos


def default_workers() -> int:
    """One reading process per core that this process may use, at most 8."""
    # sched_getaffinity, where there is one, respects taskset and Slurm; cpu_count is all cores of the machine.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _suspect_groups(groups: VideoGroups, undelivered: Sequence[int], workers: int) -> list[int]:
    """The groups that dead workers were reading, at least one of them, so that every restart makes progress."""
    in_hand = [] if groups.in_hand is None else groups.in_hand.abandoned()
    read = {file.number // groups.group_videos for file in in_hand}
    # A worker that dies between two videos, for example because /dev/shm is full, leaves no trace. Then every group
    # that a worker may hold is suspect: the prefetched ones, and one more, handed out while another was delivered.
    return [number for number in undelivered if number in read] or list(undelivered[: workers * _PREFETCH_GROUPS + 1])


def _read_group_apart(groups: VideoGroups, number: int) -> Group:
    """Read each video of a group in a process of its own, which tells which of them kills its process."""
    return groups.assemble(number, [_read_apart(groups, position) for position in groups.positions(number)])


def _read_apart(groups: VideoGroups, position: int) -> tuple[VideoRecord, Tensor | None]:
    """`VideoGroups.read` in a process of its own. If the process dies, the video counts as failed."""
    # On Linux fork, which starts at once; a fresh interpreter would import torch again for each video.
    process = KillableProcess(_read_and_send, groups, position, method="fork" if sys.platform == "linux" else "spawn")
    try:
        record: VideoRecord = process.receive()
        return record, None if record.reason else torch.from_numpy(process.receive())
    except ProcessDiedError as death:
        # SIGALRM is the alarm of `killing_alarm`: the decoder hung. Any other end counts as a crash.
        if death.exit_code == -signal.SIGALRM:
            reason = f"the decoder did not answer within {groups.patience_seconds:g} seconds"
        else:
            reason = f"the decoder crashed ({death})"
        return VideoRecord(position, reason=reason), None
    finally:
        process.end()


def _read_and_send(pipe: Connection, groups: VideoGroups, position: int) -> None:
    """What the process of `_read_apart` does: send the record and, if there are any, the pixels.

    Pixels are sent as an array. A tensor would travel through shared memory, which may be what ran out.
    """
    # As PyTorch does in its loader workers: a pool of OpenMP threads does not survive a fork and may hang.
    torch.set_num_threads(1)
    with bounded_reading(groups.patience_seconds):
        record, pixels = groups.read(position)
    pipe.send(record)
    if pixels is not None:
        pipe.send(pixels.numpy())


def _only_group(groups: list[Group]) -> Group:
    """The loader's collate function: the only element of its list is a group, which is a batch already."""
    return groups[0]
