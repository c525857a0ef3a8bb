"""From a source in any known layout to a checked data set; may be interrupted anywhere and simply run again."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.clip import Outcome, Task, prepare_clip, seconds_to_index, sweep
from data_prep.dataset import Failed, Listed, SplitContent, versions, write_dataset
from data_prep.encode import H264
from data_prep.pool import Lost, run_jobs
from data_prep.state import SplitCount, State, Wanted, split_order
from video_swinv2.data.manifest import find_splits, read_manifest
from video_swinv2.errors import UsageError, UserError
from video_swinv2.progress import track

# Raised when the same settings would give other bytes; part of what decides whether an old output still counts.
FORM = 1
MEMORY_GIB = 8.0
LOCK_NAME = ".prep.lock"
LONGEST_NAME = 150


@dataclass(frozen=True)
class Settings:
    """How every video of the data set is made."""

    short_side: int = 320
    gop: int = 16

    def record(self) -> dict[str, object]:
        """All that decides the form of an output, for dataset.json."""
        return {"made_by": "prepare", "form": FORM, "short_side": self.short_side, **asdict(H264(gop=self.gop))}

    def hash(self) -> str:
        """sha256 of the record."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Report:
    """How a run ended: counts by split, and what it found changed since the run before."""

    counts: dict[str, SplitCount]
    notes: tuple[str, ...]

    def failed_share(self) -> float:
        """Failed videos over listed ones."""
        listed = sum(count.listed for count in self.counts.values())
        return sum(sum(count.failed.values()) for count in self.counts.values()) / max(listed, 1)


def prepare(
    source: Path,
    out: Path,
    settings: Settings,
    *,
    annotations: Path | None = None,
    name: str | None = None,
    workers: int = 1,
    retry_failed: bool = False,
) -> Report:
    """Prepare every video that `source` lists and write the data set.

    Raises UsageError for a source or labels that make no sense, UserError where the disk or another run is in the way.
    """
    source, out = Path(source).absolute(), Path(out).absolute()
    _check(source, out, settings)
    classes, wanted = plan(source, annotations)
    out.mkdir(parents=True, exist_ok=True)
    with _lock(out), State(out, create=True) as state:
        notes = _bring_up_to_date(state, out, wanted, settings, retry_failed=retry_failed)
        state.remember("classes", json.dumps(classes))
        state.remember("name", name or (source.name if source.is_dir() else source.stem))
        state.remember("settings", json.dumps(settings.record()))
        _work(state, out, settings, workers)
        write_lists(state, out)
        return Report(state.counts(), tuple(notes))


def plan(source: Path, annotations: Path | None) -> tuple[list[str], list[Wanted]]:
    """The ordered classes, and every video with the place it will have. Raises UsageError."""
    splits = find_splits(source, annotations)
    manifests = [read_manifest(source, split, annotations=annotations) for split in splits]
    if not manifests:
        raise UsageError(f"{source}: no videos found; give a folder of videos, lists or a CSV")
    classes = manifests[0].classes
    wanted: list[Wanted] = []
    folders = _distinct_names(classes)
    for manifest in manifests:
        names = [entry.name for entry in manifest.entries]
        labels = ["" if entry.label < 0 else classes[entry.label] for entry in manifest.entries]
        homes = [
            f"videos/{manifest.split}/{folders[label]}/" if label else f"videos/{manifest.split}/" for label in labels
        ]
        files = _file_names(names, homes)
        for place, (entry, label, home) in enumerate(zip(manifest.entries, labels, homes, strict=True)):
            _refuse_undecodable_name(entry.path)
            target = f"{home}{files[place]}.mp4"
            wanted.append(Wanted(manifest.split, place, entry.name, label, str(entry.path), target))
    return list(classes), wanted


def write_lists(state: State, out: Path) -> None:
    """dataset.json, the lists and failed.csv from what the state knows."""
    splits: dict[str, tuple[list[Listed], list[Failed]]] = {}
    for row in state.rows():
        ok, failed = splits.setdefault(row["split"], ([], []))
        if row["status"] == "ok":
            ok.append(Listed(row["target"], row["label"], row["sha256"]))
        elif row["status"] == "failed":
            failed.append(Failed(row["name"], row["reason"], row["detail"] or ""))
    content = {split: SplitContent(*splits[split]) for split in sorted(splits, key=split_order)}
    classes, settings = (json.loads(state.fact(key) or "null") for key in ("classes", "settings"))
    write_dataset(out, name=state.fact("name") or out.name, classes=classes, splits=content, settings=settings)


def _check(source: Path, out: Path, settings: Settings) -> None:
    if settings.short_side < 16 or settings.short_side % 2:
        raise UsageError(f"--short-side {settings.short_side}: must be even and at least 16")
    if settings.gop < 1:
        raise UsageError(f"--gop {settings.gop}: must be at least 1")
    if source.is_dir() and (out == source or source in out.parents):
        raise UsageError(f"{out}: lies inside the source {source}; give a folder outside it")


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    with (out / LOCK_NAME).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            raise UserError(f"{out}: another run is preparing this data set; wait for it or stop it") from fault
        yield


def _bring_up_to_date(
    state: State, out: Path, wanted: list[Wanted], settings: Settings, *, retry_failed: bool
) -> list[str]:
    """Make the state that of the listing and decide what has to be done again; returns what to tell."""
    notes = []
    swept = sweep(out / "videos")
    if swept:
        notes.append(f"{swept} half-written files of an interrupted run removed")
    gone = state.sync(wanted)
    for target in gone:
        (out / target).unlink(missing_ok=True)
    if gone:
        notes.append(f"{len(gone)} videos are no longer listed: removed")
    again: dict[str, list[int]] = {}
    for row in state.rows():
        why = _why_again(row, out, settings.hash(), retry_failed)
        if why:
            again.setdefault(why, []).append(row["id"])
    for why, ids in again.items():
        state.reset(ids)
        notes.append(f"{len(ids)} videos are prepared again: {why}")
    return notes


def _why_again(row: object, out: Path, settings_hash: str, retry_failed: bool) -> str | None:
    known = dict(row)  # type: ignore[call-overload]  # sqlite3.Row, which dict() takes
    if known["status"] == "pending":
        return None
    if known["settings_hash"] != settings_hash:
        return "the settings have changed"
    source = Path(known["source"])
    status = source.stat() if source.exists() else None
    size, changed = (status.st_size, status.st_mtime_ns) if status else (None, None)
    # A source that went away after its video was made takes nothing from the video.
    if (status or known["status"] == "failed") and (size, changed) != (known["source_size"], known["source_mtime_ns"]):
        return "their sources have changed"
    if known["status"] == "ok" and not (out / known["target"]).is_file():
        return "the prepared files are gone"
    if known["status"] == "failed" and retry_failed:
        return "--retry-failed"
    return None


def _work(state: State, out: Path, settings: Settings, workers: int) -> None:
    encoding = H264(gop=settings.gop)
    tasks = [
        Task(row["id"], Path(row["source"]), out / row["target"], settings.short_side, encoding)
        for row in state.rows("pending")
    ]
    for folder in dict.fromkeys(task.target.parent for task in tasks):
        folder.mkdir(parents=True, exist_ok=True)
    mark = {"settings_hash": settings.hash(), "versions": json.dumps(versions())}
    done = run_jobs(prepare_clip, tasks, workers=workers, seconds_for=_seconds_for, memory_gib=MEMORY_GIB)
    for task, outcome in track(done, "prepare", len(tasks), "clips"):
        if isinstance(outcome, Lost):
            outcome = _of_lost(task, outcome)
        if outcome.reason == "disk":
            raise UserError(f"{task.target}: cannot be written ({outcome.detail}); mend that and run again to go on")
        state.finish(task.row, asdict(outcome) | mark | {"status": "failed" if outcome.reason else "ok"})


def _seconds_for(task: Task) -> float:
    return seconds_to_index(task.source.stat().st_size if task.source.is_file() else 0)


def _of_lost(task: Task, lost: Lost) -> Outcome:
    status = task.source.stat() if task.source.exists() else None
    size, changed = (status.st_size, status.st_mtime_ns) if status else (None, None)
    return Outcome(reason=lost.reason, detail=lost.detail, source_size=size, source_mtime_ns=changed)


def _distinct_names(names: tuple[str, ...]) -> dict[str, str]:
    """A folder name for each class name, itself wherever a file system allows it."""
    safe = {name: _safe(name) for name in names}
    taken = Counter(folder.casefold() for folder in safe.values())
    return {name: folder if taken[folder.casefold()] == 1 else _marked(folder, name) for name, folder in safe.items()}


def _file_names(names: list[str], homes: list[str]) -> list[str]:
    """A file name (no suffix) for each video, its own unless two would meet in one folder."""
    stems = [_safe(Path(name).stem) for name in names]
    taken = Counter((home, stem.casefold()) for home, stem in zip(homes, stems, strict=True))
    return [
        stem if taken[home, stem.casefold()] == 1 else _marked(stem, name)
        for name, home, stem in zip(names, homes, stems, strict=True)
    ]


def _safe(name: str) -> str:
    """A name without separators, control characters and a leading dot, short enough for a file system."""
    plain = re.sub(r"[/\\\x00-\x1f\x7f]", "_", name)
    plain = re.sub(r"^\.", "_", plain) or "_"
    return (
        plain
        if len(plain.encode()) <= LONGEST_NAME
        else _marked(plain.encode()[:LONGEST_NAME].decode("utf-8", "ignore"), name)
    )


def _marked(name: str, whole: str) -> str:
    return f"{name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _refuse_undecodable_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as fault:
        raise UsageError(f"{str(path)!a}: the file name is not UTF-8; rename it") from fault
