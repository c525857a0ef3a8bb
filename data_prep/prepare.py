"""The preparation of a data set: from a source in any known layout to checked videos and their lists.

plan       read the lists: which videos, in which split and class, and the target path of each     (sources.py)
sync       make the rows of prep.sqlite match the plan, and mark pending what must be redone       (state.py)
work       transcode the pending videos in parallel, recording each outcome as it arrives   (pool.py, transcode.py)
write      write dataset.json, SPLIT.csv and failed.csv from the rows                              (dataset.py)

It may be interrupted anywhere, even by kill -9, and resumes when it is run again: each step compares what exists with
what should exist, and does only the rest. state.py explains why no video is lost or half written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from sqlite3 import Row
from typing import Any

from pydantic import Field

from data_prep.dataset import FailedVideo, PreparedVideo, SplitContent, versions, write_dataset
from data_prep.executors import start_crew
from data_prep.groups import GroupRule
from data_prep.jobs import Outcome, TranscodeJob, TranscodeSettings, initial_limit_seconds, job_for_row, size_and_mtime
from data_prep.outcomes import REASONS, VideoCounts, add_counts, count_lost, outcome_counts, split_order
from data_prep.pool import Crew, Lost, each
from data_prep.preflight import PreflightReport, run_preflight, sample_size
from data_prep.shards import WorkShard, lock_dataset, lock_datasets, merge_shard_states
from data_prep.sources import plan_preparation
from data_prep.state import (
    GROUP_COLUMNS,
    RESTORE,
    STATE_NAME,
    PlannedVideo,
    PreparationState,
    evenly_spaced,
    group_of_row,
    is_damaged,
)
from data_prep.transcode import remove_partial_files, transcode_video
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import (
    check_class_names,
    commit_file,
    create_folder,
    partial_path,
    path_under,
    refuse_inside_source,
    sha256,
)
from video_swinv2.progress import track
from video_swinv2.records import Record, parse_json, parse_record

WORKER_MEMORY_GIB = 8.0  # the limit on the address space of each process that prepares videos
PREFLIGHT_FOLDER = ".preflight"
Log = Callable[[str], object]


@dataclass(frozen=True)
class PreparationReport:
    """How a run ended: the counts of outcomes by split."""

    counts: dict[str, VideoCounts]

    def failed_share(self) -> float:
        """The share of videos that are missing, broken or too short, of those listed and not excluded."""
        groups = [outcome_counts(counts) for counts in self.counts.values()]
        wanted = sum(group["listed"] - group["excluded"] for group in groups)
        return sum(count_lost(counts) for counts in self.counts.values()) / max(wanted, 1)


class Facts(Record):
    """What a state records about the preparation as a whole, and the lists are written from."""

    classes: list[str]
    settings: dict[str, Any]
    extra: list[str] = Field(default_factory=list)


def prepare(
    source: Path,
    out: Path,
    settings: TranscodeSettings,
    *,
    annotations: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    official_split: int = 1,
    groups: GroupRule | None = None,
    name: str | None = None,
    workers: int = 1,
    executor: str = "local",
    shard: WorkShard | None = None,
    retry_failed: Collection[str] | None = None,
    log: Log = print,
) -> PreparationReport:
    """Prepare every video that `source` lists and write the data set. With `shard`, only its videos and its state.

    `annotations`, `held_out`, `official_split` and `groups` are passed to `plan_preparation`. `retry_failed` gives the
    reasons of failure for which videos are tried again: () for all reasons, None to retry nothing. `log` is called with
    lines of progress to show. Raises UsageError for an invalid source, list or setting, and UserError if the machine,
    the disk, the cluster or another run prevents the work.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    _check_arguments(source, out, settings, retry_failed)
    plan = plan_preparation(source, annotations, held_out=held_out, official_split=official_split, groups=groups)
    videos = [video for video in plan.videos if shard is None or shard.holds(video.name)]
    create_folder(out, "OUT")
    # A shard has a state of its own, so that machines need not share a database.
    state_path = None if shard is None else shard.state_path(out)
    with lock_dataset(out, shard), PreparationState(out, create=True, path=state_path) as state:
        for note in plan.notes:
            log(note)
        _bring_up_to_date(state, out, videos, settings, shard, retry_failed, log)
        # Besides the rows, this is all that the lists are written from. It is stored in the state, and before the work
        # starts, because a merge of shards has nothing but their states to work with.
        state.set_fact("classes", json.dumps(plan.classes, allow_nan=False))
        state.set_fact("name", name or (source.name if source.is_dir() else source.stem))
        state.set_fact("settings", json.dumps(settings.record(), allow_nan=False))
        state.set_fact("extra", json.dumps(plan.extra, allow_nan=False))
        state.set_fact("listing", _hash_plan(plan.videos))
        if transcode_pending(state, out, settings, executor, workers, log):
            _remove_partial_files(out, videos, shard)  # those of workers that were killed during this run
        if shard is None:
            write_lists(state, out)
        else:
            log(f"shard {shard} is done; once all {shard.count} are: python -m data_prep merge {out}")
        return PreparationReport(state.counts_by_split())


def estimate_preparation(
    source: Path,
    out: Path,
    settings: TranscodeSettings,
    *,
    annotations: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    official_split: int = 1,
    groups: GroupRule | None = None,
    workers: int = 1,
    executor: str = "local",
) -> PreflightReport:
    """Estimate what preparing all of `source` would take, by preparing a sample.

    The sample is deleted afterwards. Nothing else is changed, except that the folder `out` and its lock file are
    created if they do not exist. Raises the same errors as `prepare`.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    _check_arguments(source, out, settings, None)
    plan = plan_preparation(source, annotations, held_out=held_out, official_split=official_split, groups=groups)
    videos = [video for video in plan.videos if not video.excluded]
    jobs = [
        TranscodeJob(index, Path(video.source), out / video.target, settings, video.start, video.end)
        for index, video in enumerate(evenly_spaced(videos, sample_size(len(videos), requested=True)))
    ]
    create_folder(out, "OUT")
    with lock_dataset(out), start_crew(executor, workers, initial_limit_seconds, WORKER_MEMORY_GIB) as crew:
        return run_preflight(
            crew, jobs, pending=len(videos), workers=crew.workers(), folder=path_under(out, PREFLIGHT_FOLDER)
        )


def merge(out: Path, others: Sequence[Path] = (), *, log: Log = print) -> PreparationReport:
    """Merge the shards prepared in `out` and in `others` into one data set in `out`.

    May be repeated: once the states are merged, only the lists are written again. Raises UserError, UsageError.
    """
    out, others = out.absolute(), [other.absolute() for other in others]
    for folder in (out, *others):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; name one in which shards were prepared")
    state_path, partial = out / STATE_NAME, partial_path(out / STATE_NAME)
    with lock_datasets([out, *others]):
        note = "the shards were merged before"
        if not state_path.is_file():
            # The merged state is built under a hidden name and renamed when it is complete. If it had its final name
            # from the start, an interrupted merge would leave an incomplete state that looks like a finished one. What
            # such a merge left is deleted first, together with SQLite's rollback journal.
            for leftover in (partial, partial.with_name(f"{partial.name}-journal")):
                leftover.unlink(missing_ok=True)
            with PreparationState(out, create=True, path=partial) as state:
                note = f"{merge_shard_states(state, out, others)} shards merged"
            commit_file(partial, state_path)
        with PreparationState(out) as state:
            if not state.get_fact("merged"):
                raise UserError(f"{out}: was prepared as a whole, so there is nothing to merge; name another folder")
            write_lists(state, out)
            log(note)
            return PreparationReport(state.counts_by_split())


def write_lists(state: PreparationState, out: Path) -> None:
    """Write dataset.json, the lists and failed.csv from the rows and facts of the state."""
    ok: dict[str, list[PreparedVideo]] = {}
    failed: dict[str, list[FailedVideo]] = {}
    for row in state.rows("ok", ("target", "label", "sha256", *GROUP_COLUMNS)):
        video = PreparedVideo(row["target"], row["label"], row["sha256"] or "", group_of_row(row))
        ok.setdefault(row["split"], []).append(video)
    for row in state.rows("failed", ("name", "reason", "detail")):
        failed.setdefault(row["split"], []).append(FailedVideo(row["name"], row["reason"], row["detail"] or ""))
    content = {
        split: SplitContent(ok.get(split, []), failed.get(split, []), sum(counts.excluded.values()))
        for split, counts in state.counts_by_split().items()
    }
    where = f"{state.path}: facts"
    texts = {key: state.get_fact(key) for key in Facts.model_fields}
    values = {key: parse_json(text, f"{where}: {key}", RESTORE) for key, text in texts.items() if text is not None}
    facts = parse_record(values, Facts, where, RESTORE)
    check_class_names(facts.classes, f"{where}: classes")
    write_dataset(
        out,
        name=state.get_fact("name") or out.name,
        classes=facts.classes,
        splits=dict(sorted(content.items(), key=lambda item: split_order(item[0]))),
        settings=facts.settings,
        extra=facts.extra,
    )


def damaged_rows(state: PreparationState, out: Path) -> list[Row]:
    """The rows of damaged files. Those whose file has been restored meanwhile become `ok` again and are left out."""
    columns = ("target", "source", "status", "reason", "sha256", "settings_hash")
    damaged = []
    for row in filter(is_damaged, list(state.rows("failed", columns))):
        path = path_under(out, row["target"])
        if path.is_file() and sha256(path) == row["sha256"]:
            state.mark_intact([row["target"]])
        else:
            damaged.append(row)
    return damaged


def _check_arguments(
    source: Path, out: Path, settings: TranscodeSettings, retry_failed: Collection[str] | None
) -> None:
    """Raises UsageError for arguments out of range, before anything is read or written."""
    if settings.short_side < 16 or settings.short_side % 2:
        raise UsageError(f"--short-side {settings.short_side}: must be even and at least 16")
    if settings.gop < 1:
        raise UsageError(f"--gop {settings.gop}: must be at least 1")
    if settings.fps is not None and not 0.1 <= settings.fps <= 1000:
        raise UsageError(f"--fps {settings.fps:g}: must be between 0.1 and 1000")
    if not 0 <= settings.min_seconds < float("inf"):
        raise UsageError(f"--min-seconds {settings.min_seconds:g}: must be a finite number of at least 0")
    for reason in retry_failed or ():
        if reason not in REASONS:
            raise UsageError(f"--retry-failed {reason}: unknown reason; must be one of {', '.join(REASONS)}")
    refuse_inside_source(out, [source])


def _hash_plan(videos: Sequence[PlannedVideo]) -> str:
    """A hash of the planned videos, which must be the same in all shards of a preparation.

    The paths of the sources are not part of it, because they may differ between machines.
    """
    digest = hashlib.sha256()
    for video in videos:
        facts = (video.split, str(video.position), video.name, video.label, video.group, video.excluded)
        digest.update(("\0".join(facts) + "\n").encode())
    return digest.hexdigest()


def _bring_up_to_date(
    state: PreparationState,
    out: Path,
    videos: Sequence[PlannedVideo],
    settings: TranscodeSettings,
    shard: WorkShard | None,
    retry_failed: Collection[str] | None,
    log: Log,
) -> None:
    """Make the state and the folder match the plan.

    Partial files of a killed run and videos that are no longer planned are deleted. Videos that must be prepared again
    become pending.
    """
    if removed := _remove_partial_files(out, videos, shard):
        log(f"removed {removed} partial files of an interrupted run")
    # Rows first, then files. If the run is killed between the two, files without a row are left, and `verify` reports
    # them. In the reverse order, rows could be left that refer to deleted files.
    unplanned = state.sync_with_plan(videos)
    for target in unplanned:
        path_under(out, target).unlink(missing_ok=True)
    if unplanned:
        log(f"removed {len(unplanned)} videos that are no longer listed")
    lost = sum(is_gone(row["source"]) for row in damaged_rows(state, out))
    if lost:
        log(f"{lost} damaged videos are left out: their sources are gone; restore either, and run again")
    # Pending rows need no check. The ids are collected first, so that each cause is one transaction and one message.
    ids_by_cause: dict[str, list[int]] = {}
    columns = ("status", "reason", "source", "source_size", "source_mtime_ns", "target", "settings_hash")
    settings_hash = settings.hash()
    for status in ("ok", "failed"):
        for row in state.rows(status, columns):
            if cause := _cause_to_redo(row, out, settings_hash, retry_failed):
                ids_by_cause.setdefault(cause, []).append(row["id"])
    for cause, ids in ids_by_cause.items():
        state.mark_pending(ids)
        log(f"{len(ids)} videos are prepared again: {cause}")


def _remove_partial_files(out: Path, videos: Sequence[PlannedVideo], shard: WorkShard | None) -> int:
    """Delete partial files; with `shard` only its own, since other shards may be writing to the same folder."""
    folder = path_under(out, "videos")
    if shard is None:
        return remove_partial_files(folder)
    ours = {video.target for video in videos}
    return remove_partial_files(folder, lambda target: target.relative_to(out).as_posix() in ours)


def is_gone(source: str) -> bool:
    """Whether there is no file at the path of a source."""
    return size_and_mtime(source) == (None, None)


def _cause_to_redo(row: Row, out: Path, settings_hash: str, retry_failed: Collection[str] | None) -> str | None:
    """Why a video with an outcome must be prepared again; None if its outcome is still valid."""
    if row["settings_hash"] != settings_hash:
        return "the settings have changed"
    ok, before = row["status"] == "ok", (row["source_size"], row["source_mtime_ns"])
    now = size_and_mtime(row["source"])
    # Sources are compared by size and time only: hashing all of them again would take too long. A source that was
    # deleted after its video was prepared is no reason: the prepared video is still good or, if it is damaged, might be
    # restored.
    if now != before and not ((ok or is_damaged(row)) and now == (None, None)):
        return "their sources have changed"
    if is_damaged(row) and now == before:
        return "verify found the prepared files damaged"
    if ok and not os.path.isfile(os.path.join(out, row["target"])):
        return "the prepared files are gone"
    if not ok and retry_failed is not None and (not retry_failed or row["reason"] in retry_failed):
        return "--retry-failed"
    return None


def transcode_pending(
    state: PreparationState, out: Path, settings: TranscodeSettings, executor: str, workers: int, log: Log
) -> int:
    """Prepare the pending videos; returns how many there were.

    Only this process writes to the state. It records every outcome in a transaction of its own as soon as it arrives.
    """
    pending = add_counts(state.counts_by_split().values()).pending
    if not pending:
        return 0
    # A generator: rows are read page by page while the work goes on, and jobs are made when the crew has room for them.
    jobs = (job_for_row(row, out, settings) for row in state.rows("pending"))
    made_with = {"settings_hash": settings.hash(), "versions": json.dumps(versions(), allow_nan=False)}
    with start_crew(executor, min(workers, pending), initial_limit_seconds, WORKER_MEMORY_GIB) as crew:
        estimate = _preflight_pending(crew, state, out, settings, pending)
        if estimate.trials:
            log(estimate.as_text())
        # Problems were looked for on this machine, and do not concern the machines of a cluster elsewhere.
        if estimate.problems and not executor.startswith("dask:"):
            raise UserError(estimate.problems[0])
        for job, outcome in track(each(crew, transcode_video, jobs), "prepare", pending, "clips"):
            # A lost process could not report on the source. Size and time are needed to notice later that the source
            # has been replaced and is worth another try.
            if isinstance(outcome, Lost):
                size, mtime_ns = size_and_mtime(job.source)
                outcome = Outcome(outcome.reason, outcome.detail, source_size=size, source_mtime_ns=mtime_ns)
            # The row stays pending. The exception also kills the jobs that are running.
            if outcome.reason == "disk":
                raise UserError(f"{job.target}: cannot be written ({outcome.detail}); fix that and run again to resume")
            status = {"status": "failed" if outcome.reason else "ok"}
            state.record_outcome(job.row_id, asdict(outcome) | made_with | status)
    return pending


def _preflight_pending(
    crew: Crew, state: PreparationState, out: Path, settings: TranscodeSettings, pending: int
) -> PreflightReport:
    """Check the machine and estimate the pending work.

    A sample is prepared only if it is small compared with the work, and only once for the same settings, so that runs
    that resume do not repeat it. Without a sample the report has problems but no estimate.
    """
    sampled = state.get_fact("sampled") == settings.hash()
    size = 0 if sampled else sample_size(pending, requested=False)
    jobs = [job_for_row(row, out, settings) for row in state.sample_rows(size)]
    # Named after the state file, because other shards may run their preflight in the same data set.
    folder = path_under(out, f"{PREFLIGHT_FOLDER}-{state.path.stem}")
    report = run_preflight(crew, jobs, pending=pending, workers=crew.workers(), folder=folder)
    if jobs and not report.problems:
        state.set_fact("sampled", settings.hash())
    return report
