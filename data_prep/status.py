"""What a preparation has come to, as a table or as JSON. Reads the state only, also while a run is at work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from data_prep.state import REASONS, SplitCount, State


def status(out: Path) -> dict[str, object]:
    """The counts by split, the failures by reason and the rate, ready for JSON. Raises UsageError."""
    with State(out) as state:
        counts = state.counts()
        rate = state.clips_per_second()
    return {
        "splits": {
            split: {"listed": c.listed, "ok": c.ok, "pending": c.pending, "failed": c.failed}
            for split, c in counts.items()
        },
        "clips_per_second": rate,
    }


def table(counts: Mapping[str, SplitCount]) -> str:
    """Splits by rows; columns listed, ok, pending, failed and one for each reason that occurs, then what these mean."""
    reasons = [reason for reason in REASONS if any(reason in count.failed for count in counts.values())]
    lines = [["split", "listed", "ok", "pending", "failed", *reasons]]
    for split, count in counts.items():
        numbers = [count.listed, count.ok, count.pending, sum(count.failed.values())]
        lines.append([split, *map(str, numbers), *(str(count.failed.get(reason, 0)) for reason in reasons)])
    if len(counts) > 1:
        sums = [sum(int(line[column]) for line in lines[1:]) for column in range(1, len(lines[0]))]
        lines.append(["all", *map(str, sums)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        "  ".join(cell.rjust(w) if n else cell.ljust(w) for n, (cell, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([*rows, *(f"  {reason}: {REASONS[reason]}" for reason in reasons)])
