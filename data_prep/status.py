"""The status of a preparation, as tables for people and as JSON for programs.

It is read from the state alone, so it can be asked for at any time, also while runs are active elsewhere.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from data_prep.outcomes import (
    EXCLUDED,
    REASONS,
    VideoCounts,
    add_counts,
    count_lost,
    outcome_counts,
    sort_by_reason,
    split_order,
)
from data_prep.shards import SHARD_STATE_FILE, shard_state_paths
from data_prep.state import STATE_NAME, PreparationState
from video_swinv2.escaping import for_terminal

RATE_WINDOW_SECONDS = 300.0  # the rate is an average over this long before the latest outcome
QUIET_SECONDS = 600.0  # if nothing has finished for this long, most likely no run is active
MAX_CLASSES = 10  # of those that lost most, in the text


@dataclass(frozen=True)
class PreparationStatus:
    """Counts by split and by class, added up over all shards if there are any.

    `shards` is (number begun, number in all), or None if the data set is not prepared in shards. `rate` is in videos
    per second over the last minutes of work. `last` is when the latest outcome was recorded, in seconds since the
    epoch. These two are None if they are unknown.
    """

    splits: dict[str, VideoCounts]
    classes: dict[str, VideoCounts]
    shards: tuple[int, int] | None
    rate: float | None
    last: float | None

    @property
    def pending(self) -> int:
        """Videos still to be prepared. Shards that have not begun have no state, so theirs are not included."""
        return sum(counts.pending for counts in self.splits.values())

    @property
    def seconds_left(self) -> float | None:
        """The remaining time in seconds at the current rate; None if the rate is unknown."""
        return self.pending / self.rate if self.rate else None


@contextlib.contextmanager
def open_states(out: Path) -> Iterator[list[PreparationState]]:
    """Open the state of the data set, or those of its shards until they are merged. Raises UsageError without any."""
    shards = shard_state_paths(out)
    with contextlib.ExitStack() as stack:
        if (out / STATE_NAME).is_file() or not shards:
            yield [stack.enter_context(PreparationState(out))]
        else:
            yield [stack.enter_context(PreparationState(out, path=path)) for path in shards]


def read_status(states: Sequence[PreparationState]) -> PreparationStatus:
    """The status of a preparation, from its state or from the states of its shards."""
    splits = _add_by_name([state.counts_by_split() for state in states])
    # The latest outcome in any of the states. A state without outcomes gives None.
    last = max((when for state in states if (when := state.last_finished()) is not None), default=None)
    return PreparationStatus(
        splits={split: splits[split] for split in sorted(splits, key=split_order)},
        classes=_add_by_name([state.counts_by_class() for state in states]),
        shards=_count_shards(states),
        rate=None if last is None else _rate(states, last),
        last=last,
    )


def as_json(status: PreparationStatus) -> dict[str, object]:
    """The status for programs: the outcomes by split and by class, and why videos were not prepared.

    Videos without a label are counted in their split, but not as a class.
    """
    return {
        "splits": {
            split: outcome_counts(counts) | {"reasons": sort_by_reason(counts)}
            for split, counts in status.splits.items()
        },
        "classes": {label: outcome_counts(counts) for label, counts in status.classes.items() if label},
        "shards": None if status.shards is None else {"begun": status.shards[0], "of": status.shards[1]},
        "clips_per_second": status.rate,
        "seconds_left": status.seconds_left,
        "last_finished_at": status.last,
    }


def as_text(status: PreparationStatus) -> str:
    """The status for people: outcomes by split, reasons of failures, progress, and the classes that lost most."""
    parts = [counts_table(status.splits), progress_line(status)]
    if worst := worst_classes(status.classes)[:MAX_CLASSES]:
        rows = [[label, str(lost), f"{finished}", f"{lost / finished:.1%}"] for label, lost, finished in worst]
        parts.append(_format_table(["classes that lost most", "lost", "of", "share"], rows))
    return "\n\n".join(parts)


def counts_table(counts: Mapping[str, VideoCounts]) -> str:
    """A table of outcomes by split, with a row for all splits together, and one of the reasons and their meanings."""
    total = add_counts(counts.values())
    groups = {split: outcome_counts(count) for split, count in counts.items()}
    if len(groups) > 1:
        groups["all"] = outcome_counts(total)
    header = ["split", *next(iter(groups.values()), {})]
    text = _format_table(header, [[split, *map(str, numbers.values())] for split, numbers in groups.items()])
    reasons = sort_by_reason(total)
    if not reasons:
        return text
    meaning = REASONS | EXCLUDED
    rows = [[reason, str(number), meaning.get(reason, "")] for reason, number in reasons.items()]
    return f"{text}\n\n{_format_table(['reason', 'videos', ''], rows, left=(0, 2))}"


def progress_line(status: PreparationStatus) -> str:
    """One line that says how much is done, how fast, and how long the rest will take."""
    total = add_counts(status.splits.values())
    done = total.listed - total.pending
    parts = [f"{done} of {total.listed} done ({done / max(total.listed, 1):.1%})"]
    if status.shards is not None:
        parts.append(f"{status.shards[0]} of {status.shards[1]} shards have begun")
    if status.rate is not None:
        parts.append(f"{status.rate:.2g} videos/s" if status.rate < 10 else f"{status.rate:.0f} videos/s")
    if status.pending and status.seconds_left is not None:
        parts.append(f"about {format_duration(status.seconds_left)} left")
    if status.pending and status.last is not None and time.time() - status.last > QUIET_SECONDS:
        parts.append(f"nothing finished for {format_duration(time.time() - status.last)}")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Seconds as text in suitable units: 40 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def worst_classes(classes: Mapping[str, VideoCounts]) -> list[tuple[str, int, int]]:
    """(class, videos lost, videos finished) of the classes that lost any, the largest share first.

    Finished are those that were prepared or lost; pending and excluded videos say nothing about a class.
    """
    found = []
    for label, counts in classes.items():
        lost = count_lost(counts)
        if lost and label:
            found.append((label, lost, lost + counts.ok))
    return sorted(found, key=lambda row: (-row[1] / row[2], -row[1], row[0]))


def _add_by_name(found: Sequence[Mapping[str, VideoCounts]]) -> dict[str, VideoCounts]:
    """Add the counts of several states by split or class. A shard need not have videos of each."""
    names = sorted({name for counts in found for name in counts})
    return {name: add_counts(counts[name] for counts in found if name in counts) for name in names}


def _count_shards(states: Sequence[PreparationState]) -> tuple[int, int] | None:
    """(shards begun, shards in all), by the file names I-of-N of the states; None if they are not those of shards."""
    names = [match for state in states if (match := SHARD_STATE_FILE.fullmatch(state.path.name))]
    return (len(names), int(names[0]["count"])) if names else None


def _rate(states: Sequence[PreparationState], last: float) -> float | None:
    """Videos per second in the window before `last`, the latest outcome of all; None if there are too few.

    n outcomes have n - 1 intervals between them.
    """
    # The window ends at the latest outcome, not now: after a run has stopped, its rate is still the best estimate.
    found = [state.finished_since(last - RATE_WINDOW_SECONDS) for state in states]
    number, first = sum(n for n, _ in found), min(moment for n, moment in found if n)
    return (number - 1) / (last - first) if number > 1 and last > first else None


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """A plain table. The columns whose indices are in `left` are aligned to the left, the others to the right.

    The text is the same with and without a terminal, because it is also read by scripts and piped through `less`. Hence
    no colours, and a width at which rich neither wraps nor cuts anything.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, title in enumerate(header):
        table.add_column(Text(title), justify="left" if index in left else "right", no_wrap=True)
    for row in rows:
        # Text, because a plain string would be markup, in which [brackets] are tags.
        table.add_row(*(Text(for_terminal(cell)) for cell in row))
    text = io.StringIO()
    Console(file=text, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
