"""How far a preparation is, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
LINE_EVERY_SECONDS = 15.0


def track(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    """The items themselves, while their number, rate and remaining time are shown."""
    if sys.stderr.isatty():
        yield from _bar(items, title, total)
        return
    started = said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= LINE_EVERY_SECONDS or done == total:
            said = now
            rate = done / max(now - started, 1e-9)
            left = (total - done) / rate
            print(f"{title}: {done}/{total}, {rate:.1f} clips/s, {left:.0f} s left", file=sys.stderr, flush=True)


def _bar(items: Iterable[Item], title: str, total: int) -> Iterator[Item]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    started = time.monotonic()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, pace="")
        for done, item in enumerate(items, start=1):
            yield item
            bar.update(task, completed=done, pace=f"{done / max(time.monotonic() - started, 1e-9):.1f} clips/s")
