"""Shows the progress of long work on stderr: a bar on a terminal, otherwise a plain line every 15 seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from video_swinv2.escaping import for_terminal

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 15.0


class Progress:
    """Counts finished items and shows their rate and the share of time spent waiting for data.

    shown: whether to show anything, usually only on rank 0.
    done: number of items that were finished before, for example by an interrupted run. They count as progress, but not
    in the rate.
    """

    def __init__(self, title: str, total: int, *, unit: str, shown: bool, done: int = 0) -> None:
        self._title = for_terminal(title)
        self._total = total
        self._unit = unit
        self._done = self._done_at_start = done
        self._shown = shown
        self._started_at = self._last_line_at = time.perf_counter()
        self._bar: Bar | None = None
        self._bar_id = TaskID(0)

    def __enter__(self) -> Progress:
        # Only a terminal can redraw a line; in a log file a bar would become thousands of lines.
        if self._shown and sys.stderr.isatty():
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[pace]}", markup=False),
            )
            self._bar = Bar(TextColumn("{task.description}", markup=False), *columns, console=Console(stderr=True))
            self._bar_id = self._bar.add_task(self._title, total=self._total, completed=self._done, pace="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, items: int, waited_seconds: float | None = None, note: str = "") -> None:
        """Count `items` more finished items.

        waited_seconds: the time spent waiting for data since the start, not since the last call.
        note: text that is shown after the rate.
        """
        self._done += items
        now = time.perf_counter()
        elapsed = max(now - self._started_at, 1e-9)  # never 0, because it is divided by
        # Without the items of an earlier run, which took no time in this one.
        rate = (self._done - self._done_at_start) / elapsed
        waiting = "" if waited_seconds is None else f", {min(waited_seconds / elapsed, 1.0):.0%} waiting for data"
        pace = f"{rate:.1f} {self._unit}/s{waiting}{', ' if note else ''}{note}"
        if self._bar is not None:
            self._bar.update(self._bar_id, completed=self._done, pace=pace)
        # Without a terminal, as in a job's log file: a line at intervals, and one at the end.
        elif self._shown and (now - self._last_line_at > LINE_EVERY_SECONDS or self._done >= self._total):
            self._last_line_at = now
            left = (self._total - self._done) / rate if rate else 0.0
            print(
                f"{self._title}: {self._done}/{self._total} {self._unit}, {pace}, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def track(items: Iterable[Item], title: str, total: int, unit: str) -> Iterator[Item]:
    """Yield the items, and show how many of `total` have been processed by the caller."""
    with Progress(title, total, unit=unit, shown=True) as progress:
        for item in items:
            yield item
            progress.advance(1)
