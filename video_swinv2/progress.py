"""Shows the progress of long work on stderr: a bar on a terminal, otherwise a plain line every 15 seconds."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from video_swinv2.escaping import for_terminal

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 15.0
LINE_WIDTH = 80
BAR_WIDTH = 12


class Progress:
    """Counts finished items and shows their share, the time left, their rate and the share of time waiting for data.

    What does not fit on one line is left out, the least important first.

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
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=BAR_WIDTH),
                TextColumn("{task.fields[figures]}", markup=False),
                console=Console(stderr=True),
            )
            self._bar_id = self._bar.add_task(self._title, total=self._total, completed=self._done, figures="")
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
        note: text that is shown after the time left, such as the loss.
        """
        self._done += items
        now = time.perf_counter()
        elapsed = max(now - self._started_at, 1e-9)  # never 0, because it is divided by
        # Without the items of an earlier run, which took no time in this one.
        rate = (self._done - self._done_at_start) / elapsed
        figures = [
            f"{100 * self._done // self._total if self._total else 100} %",  # rounded down: 100 % is the end
            f"{duration_text(math.ceil((self._total - self._done) / rate))} left"
            if rate and self._done < self._total
            else "",
            for_terminal(note),
            f"{rate:.1f} {self._unit}/s",
            "" if waited_seconds is None else f"{100 * min(waited_seconds / elapsed, 1.0):.0f} % waiting for data",
            f"{self._done} of {self._total}",
        ]
        if self._bar is not None:
            # The bar has a space at each side.
            width = self._bar.console.width - len(self._title) - BAR_WIDTH - 2
            self._bar.update(self._bar_id, completed=self._done, figures=fitting(figures, width))
        # Without a terminal, as in a job's log file: a line at intervals, and one at the end.
        elif self._shown and (now - self._last_line_at > LINE_EVERY_SECONDS or self._done >= self._total):
            self._last_line_at = now
            figures_text = fitting(figures, LINE_WIDTH - len(f"{self._title}: "))
            print(f"{self._title}: {figures_text}", file=sys.stderr, flush=True)


def fitting(parts: Sequence[str], width: int) -> str:
    """The parts, joined by commas, as many of them from the first on as `width` characters hold; at least one.

    Empty parts are left out.
    """
    first, *others = filter(None, parts)
    text = first
    for part in others:
        if len(text) + len(", ") + len(part) > width:
            break
        text = f"{text}, {part}"
    return text


def duration_text(seconds: float) -> str:
    """A time in its two largest units, such as `2 min 39 s`, `3 h 5 min` or `4 d 2 h`; below a minute `12.3 s`."""
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    units = (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1))
    unit, size, part, part_size = next(row for row in units if whole >= row[1])
    return f"{whole // size:,} {unit} {whole % size // part_size} {part}"


def track(items: Iterable[Item], title: str, total: int, unit: str) -> Iterator[Item]:
    """Yield the items, and show how many of `total` have been processed by the caller."""
    with Progress(title, total, unit=unit, shown=True) as progress:
        for item in items:
            yield item
            progress.advance(1)
