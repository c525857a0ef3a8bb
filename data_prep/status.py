"""What a preparation has come to, as tables or as JSON. Reads the state only, also while runs are at work."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.outcomes import EXCLUDED, REASONS, VideoCounts, outcome_counts, split_order
from data_prep.state import STATE_NAME, PreparationState

RATE_WINDOW_SECONDS = 300.0
QUIET_SECONDS = 600.0  # nothing finished for so long: most likely no run is at work
LOST = ("missing", "broken", "too_short")
MOST_CLASSES = 10
SHARD_NAME = re.compile(r"(\d+)-of-(\d+)")


@dataclass(frozen=True)
class PreparationStatus:
    """Counts by split and by class, over all shards where there are any.

    `shards` is how many of how many have begun, `rate` clips per second over the last minutes of work, `last` when the
    newest outcome was written, in seconds of the epoch; all None where unknown.
    """

    splits: dict[str, VideoCounts]
    classes: dict[str, VideoCounts]
    shards: tuple[int, int] | None
    rate: float | None
    last: float | None

    @property
    def pending(self) -> int:
        """Videos still to do, as far as the shards that have begun know."""
        return sum(count.pending for count in self.splits.values())

    @property
    def seconds_left(self) -> float | None:
        """At the rate of the last minutes; None where that is unknown."""
        return self.pending / self.rate if self.rate else None


@contextlib.contextmanager
def open_states(out: Path) -> Iterator[list[PreparationState]]:
    """The state of the data set, or those of its shards as long as they are not merged. Raises UsageError."""
    shards = sorted((out / "shards").glob("*-of-*.sqlite"))
    with contextlib.ExitStack() as stack:
        if (out / STATE_NAME).is_file() or not shards:
            yield [stack.enter_context(PreparationState(out))]
        else:
            yield [stack.enter_context(PreparationState(out, path=path)) for path in shards]


def read_status(states: Sequence[PreparationState]) -> PreparationStatus:
    """What the states say together."""
    splits = _sum_by_name([state.counts_by_split() for state in states])
    last = max((when for state in states if (when := state.last_finished()) is not None), default=None)
    return PreparationStatus(
        splits={split: splits[split] for split in sorted(splits, key=split_order)},
        classes=_sum_by_name([state.counts_by_class() for state in states]),
        shards=_shards(states),
        rate=None if last is None else _rate(states, last),
        last=last,
    )


def as_json(now: PreparationStatus) -> dict[str, object]:
    """The standing for machines: the account of every split and class, and the reasons of what was not prepared."""
    return {
        "splits": {split: outcome_counts(count) | {"reasons": _reasons(count)} for split, count in now.splits.items()},
        "classes": {label: outcome_counts(count) for label, count in now.classes.items() if label},
        "shards": None if now.shards is None else {"begun": now.shards[0], "of": now.shards[1]},
        "clips_per_second": now.rate,
        "seconds_left": now.seconds_left,
        "last_finished_at": now.last,
    }


def as_text(now: PreparationStatus) -> str:
    """The standing for people: the account by split, how far it is, why videos failed, which classes lost most."""
    parts = [counts_table(now.splits), progress_line(now)]
    losers = worst_classes(now.classes)[:MOST_CLASSES]
    if losers:
        rows = [[label, str(lost), f"{ended}", f"{lost / ended:.1%}"] for label, lost, ended in losers]
        parts.append(_columns([["classes that lost most", "lost", "of", "share"], *rows]))
    return "\n\n".join(parts)


def counts_table(counts: Mapping[str, VideoCounts]) -> str:
    """The account of every split, and of all together; below it every reason that occurs, with what it means."""
    accounts = {split: outcome_counts(count) for split, count in counts.items()}
    if len(accounts) > 1:
        accounts["all"] = outcome_counts(total(counts.values()))
    words = list(next(iter(accounts.values()), {}))
    text = _columns([["split", *words], *([split, *map(str, sums.values())] for split, sums in accounts.items())])
    reasons = _reasons(total(counts.values()))
    if not reasons:
        return text
    meaning = REASONS | EXCLUDED
    lines = [["reason", "videos", ""]]
    lines += [[reason, str(n), meaning.get(reason, "")] for reason, n in reasons.items()]
    return f"{text}\n\n{_columns(lines, left=(0, 2))}"


def progress_line(now: PreparationStatus) -> str:
    """One line: how far it is, how fast, how long it will take."""
    sums = total(now.splits.values())
    done = sums.listed - sums.pending
    parts = [f"{done} of {sums.listed} done ({done / max(sums.listed, 1):.1%})"]
    if now.shards is not None:
        parts.append(f"{now.shards[0]} of {now.shards[1]} shards have begun")
    if now.rate is not None:
        parts.append(f"{now.rate:.2g} clips/s" if now.rate < 10 else f"{now.rate:.0f} clips/s")
    if now.pending and now.seconds_left is not None:
        parts.append(f"about {format_duration(now.seconds_left)} left")
    if now.pending and now.last is not None and time.time() - now.last > QUIET_SECONDS:
        parts.append(f"nothing finished for {format_duration(time.time() - now.last)}")
    return ", ".join(parts)


def format_duration(seconds: float) -> str:
    """Seconds as people say them: 40 s, 12 min, 3 h 20 min, 2 d 5 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def total(counts: Iterable[VideoCounts]) -> VideoCounts:
    """Counts added up."""
    every = list(counts)
    return VideoCounts(
        sum(count.listed for count in every),
        sum(count.ok for count in every),
        sum(count.pending for count in every),
        _sums(count.failed for count in every),
        _sums(count.excluded for count in every),
    )


def worst_classes(classes: Mapping[str, VideoCounts]) -> list[tuple[str, int, int]]:
    """(class, videos lost, videos of which it is known) of the classes that lost any, the largest share first."""
    found = []
    for label, count in classes.items():
        sums = outcome_counts(count)
        lost = sum(sums[word] for word in LOST)
        if lost and label:
            found.append((label, lost, lost + sums["ok"]))
    return sorted(found, key=lambda row: (-row[1] / row[2], -row[1], row[0]))


def _reasons(count: VideoCounts) -> dict[str, int]:
    """Reasons of failed and excluded videos, in the order in which they are documented."""
    known = count.failed | count.excluded
    order = {reason: place for place, reason in enumerate(REASONS | EXCLUDED)}
    return dict(sorted(known.items(), key=lambda item: order.get(item[0], len(order))))


def _sum_by_name(found: Sequence[Mapping[str, VideoCounts]]) -> dict[str, VideoCounts]:
    names = sorted({name for counts in found for name in counts})
    return {name: total([counts[name] for counts in found if name in counts]) for name in names}


def _sums(found: Iterable[dict[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for counts in found:
        for reason, n in counts.items():
            sums[reason] = sums.get(reason, 0) + n
    return sums


def _shards(states: Sequence[PreparationState]) -> tuple[int, int] | None:
    named = [match for state in states if (match := SHARD_NAME.fullmatch(state.path.stem))]
    return (len(named), int(named[0][2])) if named else None


def _rate(states: Sequence[PreparationState], last: float) -> float | None:
    found = [state.finished_since(last - RATE_WINDOW_SECONDS) for state in states]
    number, first = sum(n for n, _ in found), min(moment for n, moment in found if n)
    return (number - 1) / (last - first) if number > 1 and last > first else None


def _columns(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Lines of cells set in columns; those of `left` begin at the same place, the others end there."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    set_in = [
        [cell.ljust(width) if place in left else cell.rjust(width) for place, (cell, width) in
         enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]  # fmt: skip
    return "\n".join("  ".join(cells).rstrip() for cells in set_in)
