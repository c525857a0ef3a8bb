"""How far a test is: a bar on a terminal, a plain line now and then elsewhere; on stderr, stdout is for results."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_EVERY_SECONDS = 15.0


class Progress:
    """Counts videos and says the rate and the share of time spent waiting for decoding. Silent unless `shown`."""

    def __init__(self, title: str, total: int, *, shown: bool) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._shown = shown
        self._started = self._said = time.perf_counter()
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        if self._shown and sys.stderr.isatty():
            columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[pace]}"))
            self._bar = Bar(TextColumn(self._title), *columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=self._total, pace="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, videos: int, waited_seconds: float) -> None:
        """Count `videos` more; `waited_seconds` is the whole time spent waiting so far."""
        self._done += videos
        now = time.perf_counter()
        elapsed = max(now - self._started, 1e-9)
        pace = f"{self._done / elapsed:.1f} videos/s, {min(waited_seconds / elapsed, 1.0):.0%} waiting for decoding"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, pace=pace)
        elif self._shown and (now - self._said > LINE_EVERY_SECONDS or self._done == self._total):
            self._said = now
            print(f"{self._title}: {self._done}/{self._total} videos, {pace}", file=sys.stderr, flush=True)
