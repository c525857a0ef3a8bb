"""Repairing a prepared data set: the videos that `verify` has found damaged are prepared again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from data_prep.jobs import TranscodeSettings
from data_prep.prepare import Log, damaged_rows, is_gone, transcode_pending, write_lists
from data_prep.shards import lock_dataset
from data_prep.state import RESTORE, PreparationState, is_damaged
from data_prep.transcode import remove_partial_files
from video_swinv2.errors import UserError
from video_swinv2.files import path_under
from video_swinv2.records import Record, parse_json, parse_record


class RecordedSettings(Record, extra="ignore"):
    """The settings in the facts of a state that can be chosen."""

    short_side: int
    gop: int
    fps: float | None
    copies: bool = Field(alias="copy")
    min_seconds: float


def _recorded_settings(state: PreparationState) -> TranscodeSettings:
    """The settings that a data set was prepared with. Raises UserError if they are not in its state."""
    where = f"{state.path}: facts: settings"
    found = parse_record(
        parse_json(state.get_fact("settings") or "{}", where, RESTORE), RecordedSettings, where, RESTORE
    )
    return TranscodeSettings(found.short_side, found.gop, found.fps, found.copies, found.min_seconds)


def repair_damaged(out: Path, names: Sequence[str], *, workers: int, log: Log = print) -> dict[str, str]:
    """Prepare the videos again that `verify` has recorded as damaged, if their sources are there; write the lists.

    Returns those of the files `names` (paths relative to the data set) that are still bad, each with the reason. Raises
    UserError if the data set was prepared in another form than this version makes.
    """
    out = out.absolute()
    with PreparationState(out) as state, lock_dataset(out):
        settings = _recorded_settings(state)
        damaged = damaged_rows(state, out)
        if any(row["settings_hash"] != settings.hash() for row in damaged):
            raise UserError(f"{out}: was prepared by another version; run `prepare` with its earlier arguments")
        state.mark_pending(row["id"] for row in damaged if not is_gone(row["source"]))
        if transcode_pending(state, out, settings, "local", workers, log):
            remove_partial_files(path_under(out, "videos"))
        write_lists(state, out)
        columns = ("target", "source", "status", "reason", "detail")
        wanted = set(names)
        rows = {row["target"]: row for row in state.rows(columns=columns) if row["target"] in wanted}
    left = {}
    for name in names:
        row = rows.get(name)
        if row is None:
            left[name] = "its source is unknown; remove it from the list"
        elif is_damaged(row):
            left[name] = f"its source {row['source']} is gone: restore either"
        elif row["status"] != "ok":
            left[name] = f"could not be prepared again ({row['reason']}: {row['detail']})"
    return left
