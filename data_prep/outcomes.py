"""The possible outcomes of a listed video, and counts of them.

Every video that a list names is in exactly one of these groups: ok, missing, broken, too_short, excluded, or pending if
it has not been prepared yet. The groups always add up to the number of listed videos, so no video can disappear from a
report unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from video_swinv2.errors import UserError

# Why a video failed. The keys are stored in prep.sqlite and failed.csv, and are the values of --retry-failed. The texts
# explain them to the user. Reports show the reasons in this order.
REASONS = {
    "missing": "the source file does not exist",
    "empty": "the source file has 0 bytes",
    "not_video": "FFmpeg does not recognise the container, or it has no video stream",
    "no_frames": "a video stream in which no frame decodes",
    "hdr": "HDR video (PQ or HLG), which has to be converted to BT.709 first",
    "decode_error": "fewer than nine in ten frames decode, or the source cannot be read",
    "too_short": "shorter than --min-seconds, or than its segment requires",
    "timeout": "not finished within a time limit far beyond its duration",
    "crashed": "the worker process died or ran out of memory",
    "encode_error": "the encoder rejected it",
    "check_failed": "the written file did not read back as intended",
    "damaged": "the prepared file has changed since, as `verify` found; the next run prepares it again",
}
# Why a listed video is not prepared at all. The keys are stored in prep.sqlite.
EXCLUDED = {"duplicate": "the same video is in another list or split"}
# Groups of their own in reports: these two say something about the user's copy or the list, not about the file. All
# other reasons are counted together as "broken".
REPORTED_SEPARATELY = ("missing", "too_short")
# The groups of videos that were to be prepared but are not in the data set.
LOST = ("missing", "broken", "too_short")


@dataclass(frozen=True)
class VideoCounts:
    """The number of listed videos, and how many of them are ok, pending, failed and excluded.

    `failed` and `excluded` are counts by reason (keys of REASONS and EXCLUDED).
    """

    listed: int
    ok: int
    pending: int
    failed: dict[str, int]
    excluded: dict[str, int] = field(default_factory=dict)


def outcome_counts(counts: VideoCounts) -> dict[str, int]:
    """The number of videos by group: "listed", then ok, missing, broken, too_short, excluded and pending.

    Raises UserError if the groups do not add up to the number listed. The state is then damaged, and none of its
    numbers can be trusted.
    """
    groups = {
        "ok": counts.ok,
        "missing": counts.failed.get("missing", 0),
        "broken": sum(count for reason, count in counts.failed.items() if reason not in REPORTED_SEPARATELY),
        "too_short": counts.failed.get("too_short", 0),
        "excluded": sum(counts.excluded.values()),
        "pending": counts.pending,
    }
    if sum(groups.values()) != counts.listed:
        found = ", ".join(f"{number} {group}" for group, number in groups.items())
        raise UserError(f"{counts.listed} videos are listed, but the state counts {found}; prepare the data set again")
    return {"listed": counts.listed} | groups


def count_lost(counts: VideoCounts) -> int:
    """The number of videos that were to be prepared but are missing, broken or too short."""
    groups = outcome_counts(counts)
    return sum(groups[group] for group in LOST)


def add_counts(counts: Iterable[VideoCounts]) -> VideoCounts:
    """The sum of several counts, for example of all splits, or of one split in all shards."""
    terms = list(counts)
    return VideoCounts(
        listed=sum(term.listed for term in terms),
        ok=sum(term.ok for term in terms),
        pending=sum(term.pending for term in terms),
        failed=_add_by_reason(term.failed for term in terms),
        excluded=_add_by_reason(term.excluded for term in terms),
    )


def sort_by_reason(counts: VideoCounts) -> dict[str, int]:
    """The numbers of failed and excluded videos by reason, in the order of REASONS and EXCLUDED."""
    # A state written by another version may have reasons that are unknown here; these come last.
    known = counts.failed | counts.excluded
    order = {reason: index for index, reason in enumerate(REASONS | EXCLUDED)}
    return dict(sorted(known.items(), key=lambda item: order.get(item[0], len(order))))


def split_order(split: str) -> tuple[int, str]:
    """A sort key for split names: train, val and test first, then all others in alphabetical order."""
    usual = ("train", "val", "test")
    return (usual.index(split) if split in usual else len(usual), split)


def _add_by_reason(terms: Iterable[dict[str, int]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for counts in terms:
        for reason, count in counts.items():
            sums[reason] = sums.get(reason, 0) + count
    return sums
