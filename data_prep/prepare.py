"""From a source in any known layout to a checked data set; may be interrupted anywhere and simply run again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from sqlite3 import Row

from data_prep import executors, shards
from data_prep.dataset import FailedVideo, PreparedVideo, SplitContent, versions, write_dataset
from data_prep.jobs import Outcome, TranscodeJob, TranscodeSettings, initial_limit_seconds, job_for_row, size_and_mtime
from data_prep.outcomes import REASONS, VideoCounts, outcome_counts, split_order
from data_prep.pool import Crew, Lost, each
from data_prep.preflight import PreflightReport, run_preflight, sample_size
from data_prep.shards import WorkShard
from data_prep.sources import plan_preparation
from data_prep.state import STATE_NAME, PlannedVideo, PreparationState
from data_prep.transcode import remove_partial_files, transcode_video
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import commit_file, partial_path
from video_swinv2.progress import track

MEMORY_GIB = 8.0
PREFLIGHT_FOLDER = ".preflight"
Say = Callable[[str], object]


@dataclass(frozen=True)
class PreparationReport:
    """How a run ended: counts by split."""

    counts: dict[str, VideoCounts]

    def failed_share(self) -> float:
        """Videos missing, broken or too short over those listed and wanted."""
        ends = [outcome_counts(count) for count in self.counts.values()]
        wanted = sum(end["listed"] - end["excluded"] for end in ends)
        return sum(end["missing"] + end["broken"] + end["too_short"] for end in ends) / max(wanted, 1)


def prepare(
    source: Path,
    out: Path,
    settings: TranscodeSettings,
    *,
    annotations: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    official_split: int = 1,
    name: str | None = None,
    workers: int = 1,
    executor: str = "local",
    shard: WorkShard | None = None,
    retry_failed: Collection[str] | None = None,
    say: Say = print,
) -> PreparationReport:
    """Prepare every video that `source` lists, or those of one shard, and write the data set (a shard: its state).

    `retry_failed` names reasons whose videos are tried again, () all of them; `say` is given lines to read meanwhile.
    Raises UsageError for a source or labels that make no sense, UserError where the machine, the disk, the cluster or
    another run is in the way.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    _check(source, out, settings, retry_failed)
    listed = plan_preparation(source, annotations, held_out=held_out, official_split=official_split)
    wanted = [item for item in listed.wanted if shard is None or shard.holds(item.name)]
    out.mkdir(parents=True, exist_ok=True)
    path = None if shard is None else shard.state_path(out)
    with shards.lock_dataset(out, shard), PreparationState(out, create=True, path=path) as state:
        for note in listed.notes:
            say(note)
        _bring_up_to_date(state, out, wanted, settings, shard, retry_failed, say)
        state.set_fact("classes", json.dumps(listed.classes))
        state.set_fact("name", name or (source.name if source.is_dir() else source.stem))
        state.set_fact("settings", json.dumps(settings.record()))
        state.set_fact("extra", json.dumps(listed.extra))
        state.set_fact("listing", _listing_hash(listed.wanted))
        if _work(state, out, settings, executor, workers, say):
            _sweep(out, wanted, shard)  # a process killed at work leaves its half file to us
        if shard is None:
            write_lists(state, out)
        else:
            say(f"shard {shard} is done; when all {shard.count} are: python -m data_prep merge {out}")
        return PreparationReport(state.counts_by_split())


def estimate_preparation(
    source: Path,
    out: Path,
    settings: TranscodeSettings,
    *,
    annotations: Sequence[Path] = (),
    held_out: Sequence[Path] = (),
    official_split: int = 1,
    workers: int = 1,
    executor: str = "local",
) -> PreflightReport:
    """What preparing all of it would come to, by a sample that is made and removed; nothing else is touched.

    Raises as `prepare`.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    _check(source, out, settings, None)
    listed = plan_preparation(source, annotations, held_out=held_out, official_split=official_split)
    wanted = [item for item in listed.wanted if not item.excluded]
    count = sample_size(len(wanted), asked=True)
    chosen = [wanted[(2 * place + 1) * len(wanted) // (2 * count)] for place in range(count)]
    tasks = [
        TranscodeJob(place, Path(item.source), out / item.target, settings, item.start, item.end)
        for place, item in enumerate(chosen)
    ]
    out.mkdir(parents=True, exist_ok=True)
    with shards.lock_dataset(out), executors.start_crew(executor, workers, initial_limit_seconds, MEMORY_GIB) as crew:
        return run_preflight(crew, tasks, pending=len(wanted), workers=crew.workers(), folder=out / PREFLIGHT_FOLDER)


def merge(out: Path, others: Sequence[Path] = (), *, say: Say = print) -> PreparationReport:
    """Make one data set in `out` of the shards prepared there and in `others`. Raises UserError, UsageError."""
    out, others = out.absolute(), [other.absolute() for other in others]
    for folder in (out, *others):
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such folder; name one in which shards were prepared")
    whole, part = out / STATE_NAME, partial_path(out / STATE_NAME)
    with shards.lock_datasets([out, *others]):
        note = "the shards were merged before"
        if not whole.is_file():  # which it becomes when all is in it, so that no later run takes half of it for all
            for left in (part, part.with_name(f"{part.name}-journal")):
                left.unlink(missing_ok=True)
            with PreparationState(out, create=True, path=part) as state:
                note = f"{shards.merge_shard_states(state, out, others)} shards merged"
            commit_file(part, whole)
        with PreparationState(out) as state:
            if not state.get_fact("merged"):
                raise UserError(f"{out}: was prepared as a whole, there is nothing to merge; give another folder")
            write_lists(state, out)
            say(note)
            return PreparationReport(state.counts_by_split())


def write_lists(state: PreparationState, out: Path) -> None:
    """dataset.json, the lists and failed.csv from what the state knows."""
    ok: dict[str, list[PreparedVideo]] = {}
    failed: dict[str, list[FailedVideo]] = {}
    for row in state.rows("ok", ("target", "label", "sha256")):
        ok.setdefault(row["split"], []).append(PreparedVideo(row["target"], row["label"], row["sha256"]))
    for row in state.rows("failed", ("name", "reason", "detail")):
        failed.setdefault(row["split"], []).append(FailedVideo(row["name"], row["reason"], row["detail"] or ""))
    content = {
        split: SplitContent(ok.get(split, []), failed.get(split, []), sum(count.excluded.values()))
        for split, count in state.counts_by_split().items()
    }
    facts = {key: json.loads(state.get_fact(key) or "null") for key in ("classes", "settings", "extra")}
    write_dataset(
        out,
        name=state.get_fact("name") or out.name,
        classes=facts["classes"],
        splits=dict(sorted(content.items(), key=lambda item: split_order(item[0]))),
        settings=facts["settings"],
        extra=facts["extra"] or (),
    )


def _check(source: Path, out: Path, settings: TranscodeSettings, retry_failed: Collection[str] | None) -> None:
    if settings.short_side < 16 or settings.short_side % 2:
        raise UsageError(f"--short-side {settings.short_side}: must be even and at least 16")
    if settings.gop < 1:
        raise UsageError(f"--gop {settings.gop}: must be at least 1")
    if settings.fps is not None and not 0.1 <= settings.fps <= 1000:
        raise UsageError(f"--fps {settings.fps:g}: must lie between 0.1 and 1000")
    if not 0 <= settings.min_seconds < float("inf"):
        raise UsageError(f"--min-seconds {settings.min_seconds:g}: must not be negative")
    for reason in retry_failed or ():
        if reason not in REASONS:
            raise UsageError(f"--retry-failed {reason}: is no reason; known are {', '.join(REASONS)}")
    if source.is_dir() and (out == source or source in out.parents):
        raise UsageError(f"{out}: lies inside the source {source}; give a folder outside it")


def _listing_hash(wanted: Sequence[PlannedVideo]) -> str:
    """What all shards of one preparation share; where the sources lie may differ from machine to machine."""
    digest = hashlib.sha256()
    for item in wanted:
        digest.update(f"{item.split}\0{item.position}\0{item.name}\0{item.label}\0{item.excluded}\n".encode())
    return digest.hexdigest()


def _bring_up_to_date(
    state: PreparationState,
    out: Path,
    wanted: Sequence[PlannedVideo],
    settings: TranscodeSettings,
    shard: WorkShard | None,
    retry_failed: Collection[str] | None,
    say: Say,
) -> None:
    """Make the state that of the listing, and pending what has to be done again."""
    if swept := _sweep(out, wanted, shard):
        say(f"{swept} half-written files of an interrupted run removed")
    gone = state.sync_with_plan(wanted)
    for target in gone:
        (out / target).unlink(missing_ok=True)
    if gone:
        say(f"{len(gone)} videos are no longer listed: removed")
    again: dict[str, list[int]] = {}
    known = ("status", "reason", "source", "source_size", "source_mtime_ns", "target", "settings_hash")
    form = settings.hash()
    for status in ("ok", "failed"):
        for row in state.rows(status, known):
            if why := _why_again(row, out, form, retry_failed):
                again.setdefault(why, []).append(row["id"])
    for why, ids in again.items():
        state.mark_pending(ids)
        say(f"{len(ids)} videos are prepared again: {why}")


def _sweep(out: Path, wanted: Sequence[PlannedVideo], shard: WorkShard | None) -> int:
    """Remove half-written files; of a shard its own, since others may be at work in the same folder."""
    if shard is None:
        return remove_partial_files(out / "videos")
    ours = {item.target for item in wanted}
    return remove_partial_files(out / "videos", lambda target: target.relative_to(out).as_posix() in ours)


def _why_again(row: Row, out: Path, form: str, retry_failed: Collection[str] | None) -> str | None:
    if row["settings_hash"] != form:
        return "the settings have changed"
    ok, before = row["status"] == "ok", (row["source_size"], row["source_mtime_ns"])
    now = size_and_mtime(row["source"])
    # A source that went away after its video was made takes nothing from the video.
    if now != before and not (ok and now == (None, None)):
        return "their sources have changed"
    if ok and not os.path.isfile(os.path.join(out, row["target"])):
        return "the prepared files are gone"
    if not ok and retry_failed is not None and (not retry_failed or row["reason"] in retry_failed):
        return "--retry-failed"
    return None


def _work(
    state: PreparationState, out: Path, settings: TranscodeSettings, executor: str, workers: int, say: Say
) -> int:
    """Prepare what is pending; how many that was. Only this process writes the state, a row at a time as they end."""
    pending = sum(count.pending for count in state.counts_by_split().values())
    if not pending:
        return 0
    tasks = (job_for_row(row, out, settings) for row in state.rows("pending"))
    mark = {"settings_hash": settings.hash(), "versions": json.dumps(versions())}
    with executors.start_crew(executor, min(workers, pending), initial_limit_seconds, MEMORY_GIB) as crew:
        ahead = _look_at_pending(crew, state, out, settings, pending)
        if ahead.trials:
            say(ahead.as_text())
        if ahead.problems and not executor.startswith("dask:"):  # of another machine's memory we know nothing
            raise UserError(ahead.problems[0])
        for task, outcome in track(each(crew, transcode_video, tasks), "prepare", pending, "clips"):
            if isinstance(outcome, Lost):
                size, changed = size_and_mtime(task.source)
                outcome = Outcome(outcome.reason, outcome.detail, source_size=size, source_mtime_ns=changed)
            if outcome.reason == "disk":
                raise UserError(
                    f"{task.target}: cannot be written ({outcome.detail}); mend that and run again to go on"
                )
            state.record_outcome(task.row_id, asdict(outcome) | mark | {"status": "failed" if outcome.reason else "ok"})
    return pending


def _look_at_pending(
    crew: Crew, state: PreparationState, out: Path, settings: TranscodeSettings, pending: int
) -> PreflightReport:
    """What the rest will come to. A sample is made once, and only where it is small beside the rest."""
    seen = state.get_fact("sampled") == settings.hash()
    size = 0 if seen else sample_size(pending, asked=False)
    tasks = [job_for_row(row, out, settings) for row in state.sample_rows(size)]
    # A shard's own folder: others may look ahead in the same place.
    folder = out / f"{PREFLIGHT_FOLDER}-{state.path.stem}"
    found = run_preflight(crew, tasks, pending=pending, workers=crew.workers(), folder=folder)
    if tasks and not found.problems:
        state.set_fact("sampled", settings.hash())
    return found
