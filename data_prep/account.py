"""The account of a split: every video that its list names ends in exactly one of a few words."""

from __future__ import annotations

from data_prep.state import SplitCount
from video_swinv2.errors import UserError

# Failures that tell of the copy or the list, not of a damaged file; every other reason is `broken`.
OWN_WORD = ("missing", "too_short")


def account(counts: SplitCount) -> dict[str, int]:
    """How many videos are listed, and of these how many are ok, missing, broken, too_short, excluded and pending.

    Raises UserError where the parts are not the whole: then the state is damaged, and no number of it can be trusted.
    """
    parts = {
        "ok": counts.ok,
        "missing": counts.failed.get("missing", 0),
        "broken": sum(count for reason, count in counts.failed.items() if reason not in OWN_WORD),
        "too_short": counts.failed.get("too_short", 0),
        "excluded": sum(counts.excluded.values()),
        "pending": counts.pending,
    }
    if sum(parts.values()) != counts.listed:
        words = ", ".join(f"{number} {word}" for word, number in parts.items())
        raise UserError(f"{counts.listed} videos are listed, but accounted for are {words}; prepare the data set again")
    return {"listed": counts.listed} | parts
