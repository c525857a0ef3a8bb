"""Videos read in worker processes, in groups that are always the same, and a bad video that costs only itself.

G videos of a group, V views of each. A group is one batch for the model. It holds the same videos whatever the number
of processes, and a video that fails leaves its rows black: what the model computes for the others does not change by a
bit.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.multiprocessing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from video_swinv2.data.decode import VideoReader
from video_swinv2.data.images import read_image, read_member
from video_swinv2.data.index import Item, Member
from video_swinv2.errors import UserError
from video_swinv2.evaluation.protocols import Protocol, View
from video_swinv2.evaluation.splits import is_image
from video_swinv2.evaluation.views import cut_image, cut_views, view_shape
from video_swinv2.weights.store import Preprocessing

_PREFETCH_GROUPS = 2
# Opening, the size and the frames of a video each run against the reader's own clock.
_CLOCKS_PER_VIDEO = 3
_GRACE_SECONDS = 30.0
_WORKER_DIED = re.compile(r"DataLoader worker .*(exited unexpectedly|is killed by signal)")


@dataclass(frozen=True)
class VideoRecord:
    """What became of one video or image: its views, or why it failed. `stand_ins` frames were damaged and replaced."""

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
        entries: Sequence[Item],
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

    def __len__(self) -> int:
        return math.ceil(len(self.entries) / self.group_videos)

    def __getitem__(self, number: int) -> Group:
        read = self.read if get_worker_info() is None else self.read_or_die
        return self.assemble(number, [read(position) for position in self.positions(number)])

    @property
    def patience_seconds(self) -> float:
        """How long reading one video may take before its process is taken for hung."""
        return _CLOCKS_PER_VIDEO * self.time_limit_seconds + _GRACE_SECONDS

    @property
    def views(self) -> int:
        """Views of one video, of all protocols."""
        return sum(protocol.views for protocol in self.protocols)

    def positions(self, number: int) -> range:
        """Places in `entries` of the videos of a group."""
        first = number * self.group_videos
        return range(first, min(first + self.group_videos, len(self.entries)))

    def read(self, position: int) -> tuple[VideoRecord, Tensor | None]:
        """One video; whatever goes wrong with it becomes its reason."""
        entry = self.entries[position]
        try:
            if is_image(entry):
                picture = read_member(entry) if isinstance(entry, Member) else read_image(entry.path)
                seen = [cut_image(picture, protocol, self.preprocessing) for protocol in self.protocols]
                views = tuple(view for _, views in seen for view in views)
                return VideoRecord(position, views), torch.cat([pixels for pixels, _ in seen])
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

    def read_or_die(self, position: int) -> tuple[VideoRecord, Tensor | None]:
        """`read` for a process that may be lost: a decoder that hangs inside a library call is ended by an alarm."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, self.patience_seconds)
        try:
            return self.read(position)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def assemble(self, number: int, videos: Sequence[tuple[VideoRecord, Tensor | None]]) -> Group:
        """One tensor for the whole group."""
        shape = (len(videos), self.views, *view_shape(self.preprocessing))
        pixels = torch.zeros(shape, dtype=torch.uint8)
        for row, (_, part) in zip(pixels, videos, strict=True):
            if part is not None:
                row.copy_(part)
        return Group(number, pixels.flatten(0, 1), tuple(record for record, _ in videos))


def deliver_groups(
    groups: VideoGroups, numbers: Sequence[int], workers: int, deliver: Callable[[Group, float], None]
) -> float:
    """Read groups in worker processes (in this one for 0) and hand each over once, with the seconds waited until then.

    A worker that dies or hangs costs one video: those it may have had in hand are read again, each in a process of its
    own, and the one that kills its process too is handed over as failed. Returns the seconds spent waiting for reading.
    """
    done: set[int] = set()
    waited = 0.0
    while left := [number for number in numbers if number not in done]:
        at_once = min(workers, len(left))
        source = _in_workers(groups, left, at_once)
        try:
            while True:
                started = time.perf_counter()
                group = next(source, None)
                waited += time.perf_counter() - started
                if group is None:
                    break
                deliver(group, waited)
                done.add(group.number)
        except RuntimeError as error:
            # PyTorch raises it from a signal handler, so it may also come out of whatever `deliver` is doing.
            if not _WORKER_DIED.search(str(error)):
                raise
        del source  # ends the other workers now: while the loader lives its handler would raise again
        # Workers hold so many groups at most, and one more was handed out for the group that was being delivered.
        for number in [number for number in left if number not in done][: at_once * _PREFETCH_GROUPS + 1]:
            deliver(_read_apart(groups, number), waited)
            done.add(number)
    return waited


def videos_of_a_group(views: int, batch: int) -> int:
    """The fewest videos of `views` views each that fill nine tenths of their batches of `batch` views."""
    videos = 1
    while 10 * videos * views < 9 * batch * math.ceil(videos * views / batch):
        videos += 1
    return videos


def default_workers() -> int:
    """One reading process per core this process may use, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)


def _in_workers(groups: VideoGroups, numbers: Sequence[int], workers: int) -> Iterator[Group]:
    return iter(
        DataLoader(
            groups,
            batch_size=None,
            sampler=list(numbers),
            num_workers=workers,
            collate_fn=_as_read,  # type: ignore[arg-type]  # with batch_size None it is given one item, no list
            prefetch_factor=_PREFETCH_GROUPS if workers else None,
        )
    )


def _read_apart(groups: VideoGroups, number: int) -> Group:
    """A group whose every video is read in a process of its own, so that the one that kills its process is known."""
    return groups.assemble(number, [_read_in_own_process(groups, position) for position in groups.positions(number)])


def _read_in_own_process(groups: VideoGroups, position: int) -> tuple[VideoRecord, Tensor | None]:
    context = torch.multiprocessing.get_context()
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_read_and_send, args=(sending, groups, position), daemon=True)
    process.start()
    sending.close()
    try:
        record = receiving.recv()
        return record, None if record.reason else torch.from_numpy(receiving.recv())
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGALRM:
            reason = f"the decoder did not answer within {groups.patience_seconds:g} seconds"
        else:
            reason = f"the decoder crashed (exit code {process.exitcode})"
        return VideoRecord(position, reason=reason), None
    finally:
        process.kill()
        process.join()
        receiving.close()


def _read_and_send(sending: Connection, groups: VideoGroups, position: int) -> None:
    torch.set_num_threads(1)
    record, pixels = groups.read_or_die(position)
    with suppress(BrokenPipeError):
        sending.send(record)
        if pixels is not None:
            sending.send(pixels.numpy())


def _as_read(group: Group) -> Group:
    """No collation: a group is a batch already."""
    return group
