"""Check that the videos of a prepared data set have not changed since they were prepared.

There are three levels:

    header   opens each file and compares its index with the record: stream, size, number of frames, and whether the
             file is long enough for its last frame. Reads a few kB per file, and misses damage inside the frames.
    full     header, then decodes every frame and compares their number and duration. Misses damage that still decodes.
    hash     header, then compares the sha256 of each file with the record, and the fingerprint of each split with
             dataset.json. Finds every changed byte. It does not decode, since `prepare` has compared each file with
             what the encoder made.

Findings are saved in verify.sqlite while the check runs, so an interrupted check can be resumed. At the end, damaged
files are recorded in prep.sqlite, where their rows are no longer `ok`: the next `prepare` makes them again.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple

import av

from data_prep.dataset import csv_text, write_text
from data_prep.findings import FAULTS, Finding, VerifyLedger
from data_prep.jobs import encode_limit_seconds, index_limit_seconds
from data_prep.pool import Allow, Lost, run_jobs
from data_prep.repair import repair_damaged
from data_prep.state import STATE_NAME, PreparationState, is_damaged
from video_swinv2.data.decode import DecodeError, VideoReader, named_errors, one_line, open_container
from video_swinv2.data.groups import group_of, notes_on_shared_groups
from video_swinv2.data.manifest import DatasetRecord, content_fingerprint, read_dataset_record
from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import for_csv, terminal_lines
from video_swinv2.files import path_under, refuse_special_file, sha256
from video_swinv2.progress import track

LEVELS = {
    "header": "each file opens and its index is right: seconds for thousands of files",
    "full": "header, and every frame decodes, as many and as long as written",
    "hash": "header, and the sha256 is that of the file written: the only level that finds a flipped bit",
}
# Columns of prep.sqlite, in the order of the fields of ExpectedFile.
COLUMNS = ("frames", "height", "width", "duration_seconds", "sha256")
VERIFY_STATE_NAME = "verify.sqlite"
WORKER_MEMORY_GIB = 8.0


@dataclass(frozen=True)
class ExpectedFile:
    """What the preparation recorded about a file. A field is None if it is unknown and is then not compared.

    `height` and `width` are in pixels; `sha256` is hexadecimal.
    """

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    duration_seconds: float | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class FileCheck:
    """A file to check at a level. `name` is its path in the list, relative to the data set; `path` is absolute."""

    name: str
    path: Path
    level: str
    expected: ExpectedFile


@dataclass(frozen=True)
class VerifyResult:
    """The result for a data set.

    `checked` is the number of files checked, `before` of them by an earlier, interrupted run. `bad` holds the findings
    about bad lists and files, and `extra` the paths of files on disk that no list names. `repaired` names the lists and
    files that were bad and have been made again; they are not in `bad`. `notes` are remarks for the user.
    """

    level: str
    checked: int
    before: int
    bad: tuple[Finding, ...]
    extra: tuple[str, ...]
    repaired: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The result as JSON-compatible values; of each bad file the path, the reason and the detail."""
        bad = [{"path": item.name, "reason": item.reason, "detail": item.detail} for item in self.bad]
        return asdict(self) | {"bad": bad}


class MismatchError(UserError):
    """A file is not what it should be; `reason` is a key of FAULTS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


class ListedFile(NamedTuple):
    """A line of a list: the path of a file relative to the data set, its split, class name and group ('' for none)."""

    split: str
    name: str
    label: str
    group: str


def verify(out: Path, level: str, *, workers: int, repair: bool = False) -> VerifyResult:
    """Check every file in the lists of the data set `out`, write the bad ones to verify.csv, and record them.

    With `repair`, bad files whose sources are still there are prepared again, and the lists are written again.

    If the last run of the same level was interrupted, files that it checked are skipped as long as their size and
    modification time are unchanged. After a run that finished, everything is checked again. Raises UsageError if `out`
    is not a prepared data set, UserError if a record cannot be read or written.
    """
    out = out.absolute()
    if not (out / "dataset.json").is_file():
        raise UsageError(f"{out}: no dataset.json, so this is not a prepared data set; run `prepare SRC {out}` first")
    record = read_dataset_record(out)
    rows, bad_lists = _listed(out, record)
    # A data set may have been copied without prep.sqlite. The size, frames and hash of each file are then unknown, but
    # form, truncation and decoding are still checked, and at level hash the fingerprint of each split.
    expected = _expected(out)
    checks = [FileCheck(row.name, out / row.name, level, expected.get(row.name, ExpectedFile())) for row in rows]
    found: dict[str, Finding] = {}
    with VerifyLedger(path_under(out, VERIFY_STATE_NAME), level) as ledger:
        known = ledger.begin()
        found = {
            check.name: finding
            for check in checks
            if (finding := known.get(check.name)) and _untouched(check.path, finding)
        }
        before = len(found)
        todo = [check for check in checks if check.name not in found]
        # In processes that can be killed: a damaged file may make FFmpeg hang, crash or allocate all memory.
        done = run_jobs(
            check_file, todo, workers=workers, seconds_for=_time_limit_seconds, memory_gib=WORKER_MEMORY_GIB
        )
        for check, outcome in track(done, f"verify {level}", len(todo), "files"):
            if isinstance(outcome, Lost):  # the process hung or died on this file, which is a finding as well
                outcome = Finding(check.name, outcome.reason, outcome.detail, *_stat(check.path))
            found[check.name] = outcome
            ledger.write(outcome)
        ledger.end()
    bad = [found[row.name] for row in rows if found[row.name].reason]  # in list order, not in the order of completion
    # The fingerprint is compared only if nothing else is wrong: any bad file or list changes it too, so that a second
    # finding would say nothing new.
    if level == "hash" and not bad and not bad_lists:
        bad_lists = _wrong_fingerprints(rows, found, record)
    if expected:
        _record_damage(out, found, intact=level == "hash")
    repaired: list[str] = []
    if repair:
        left = repair_damaged(out, [item.name for item in bad], workers=workers, log=lambda _: None)
        repaired = [item.name for item in (*bad_lists, *bad) if item.name not in left]
        remaining = [(item, left[item.name]) for item in bad if item.name in left]
        bad = [replace(item, detail="; ".join(filter(None, (item.detail, why)))) for item, why in remaining]
        bad_lists = []
    groups = {split: {row.group for row in rows if row.split == split} for split in record.splits}
    verified = VerifyResult(
        level,
        len(checks),
        before,
        (*bad_lists, *bad),
        tuple(_extra(out, found)),
        tuple(repaired),
        tuple(notes_on_shared_groups("train", groups)),
    )
    _write_bad(out / "verify.csv", verified)
    return verified


def as_text(result: VerifyResult, out: Path) -> str:
    """The result as text: the number of files, the first ten bad ones, and what to do about them."""
    before = f", {result.before} of them by an earlier run" if result.before else ""
    found = f"{len(result.bad) + len(result.repaired)} bad"
    if result.repaired:
        found += f", {len(result.repaired)} of them repaired"
    lines = [f"{out}: {result.checked} files checked ({result.level}){before}, {found}"]
    for item in result.bad[:10]:
        lines.append(f"  {item.name}: {item.reason}: {item.detail or FAULTS[item.reason]}")
    if result.bad:
        advice = "`prepare` with its earlier arguments, or `verify --repair`, makes them again from their sources"
        lines.append(f"{out / 'verify.csv'} lists all {len(result.bad)}; {advice}")
    if result.extra:
        names = ", ".join(result.extra[:5]) + (" ..." if len(result.extra) > 5 else "")
        lines.append(f"{len(result.extra)} files on no list: {names}")
    lines += result.notes
    return terminal_lines(lines)


def check_file(check: FileCheck, allow: Allow) -> Finding:
    """Check one file, in a worker process. Errors become findings; nothing is raised for a bad file.

    `allow` extends the time limit of the job (see pool.py).
    """
    size, mtime_ns = _stat(check.path)
    digest = None
    try:
        with named_errors(check.path):
            _check_header(check.path, size, check.expected)
            if check.level == "full":
                _check_frames(check.path, check.expected, allow)
            if check.level == "hash":
                digest = sha256(check.path)  # recorded even if no hash is expected, since the fingerprint needs it
                if check.expected.sha256 not in (None, digest):
                    written = check.expected.sha256[:12]
                    raise MismatchError("hash", f"sha256 is {digest[:12]}..., {written}... was written")
    except MismatchError as error:
        return Finding(check.name, error.reason, error.detail, size, mtime_ns, digest)
    except DecodeError as error:
        # The message is "PATH: what is wrong", and the finding already has the path.
        return Finding(check.name, error.reason, str(error).partition(": ")[2], size, mtime_ns)
    return Finding(check.name, "", "", size, mtime_ns, digest)


def _check_header(path: Path, size: int | None, expected: ExpectedFile) -> None:
    """Check the index of a file without decoding anything. `size` is in bytes, None if absent. Raises MismatchError."""
    if size is None:
        raise MismatchError("missing", "")
    if not size:
        raise MismatchError("empty", "")
    try:
        container = open_container(str(path.absolute()))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise MismatchError("not_video", one_line(error)) from error
    with container:
        # Exactly one stream: the prepared form has neither sound nor subtitles.
        # A damaged header may name a codec that FFmpeg does not know; there is no codec_context then.
        kinds = [f"{stream.type} {getattr(stream.codec_context, 'name', 'unknown')}" for stream in container.streams]
        if kinds != ["video h264"]:
            raise MismatchError("form", f"contains {', '.join(kinds) or 'no stream'}")
        stream = container.streams.video[0]
        picture = stream.codec_context
        if picture.pix_fmt != "yuv420p":
            raise MismatchError("form", f"pictures are {picture.pix_fmt}")
        for reason, found, recorded in (
            ("size", (picture.height, picture.width), (expected.height, expected.width)),
            ("frames", stream.frames, expected.frames),
        ):
            if recorded not in (None, (None, None), found):
                raise MismatchError(reason, f"{found} in the index, {recorded} written")
        # In the prepared form the index comes first, so a truncated file still has all of it and opens normally. The
        # index then points beyond the end of the file. `pos` is the byte offset of a frame.
        end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
        if not end or end > size:
            raise MismatchError("cut_short", f"{size} bytes, but the last frame ends at {end}")


def _check_frames(path: Path, expected: ExpectedFile, allow: Allow) -> None:
    """Decode every frame, and compare their number and the duration. Raises MismatchError, DecodeError."""
    # The reader's own time limit is turned off, since the pool kills this process if it takes too long.
    with VideoReader(path, time_limit_seconds=float("inf")) as reader:
        # `times` are the times at which frames appear, so the display time of the last frame is added.
        duration = float(reader.times[-1] - reader.times[0]) + 1 / reader.fps
        # The frames are known now, so the job can be given a time limit that fits.
        allow(encode_limit_seconds(_stat(path)[0] or 0, len(reader), prod(reader.size)))
        decoded = sum(1 for _ in reader.sequence())
        if decoded != len(reader):
            raise MismatchError("decode_error", f"{decoded} of {len(reader)} frames decode")
        if expected.frames not in (None, decoded):
            raise MismatchError("frames", f"{decoded} frames decode, {expected.frames} written")
        # Cutting a segment or converting to a constant rate may shift each end by one frame, hence two frames. The
        # remaining 0.01 s cover the rounding of times.
        if expected.duration_seconds is not None and abs(duration - expected.duration_seconds) > 2 / reader.fps + 0.01:
            raise MismatchError("duration", f"{duration:.3f} s, {expected.duration_seconds:.3f} s written")


def _listed(out: Path, record: DatasetRecord) -> tuple[list[ListedFile], list[Finding]]:
    """Read SPLIT.csv of every split. Returns every file, and a finding for each bad list.

    A list is bad if it was removed, cannot be read, or has changed since the preparation.
    """
    rows: list[ListedFile] = []
    bad = []
    for split, known in record.splits.items():
        path = out / f"{split}.csv"
        refuse_special_file(path)
        try:
            data = path.read_bytes()
            lines = csv.DictReader(io.StringIO(data.decode(), newline=""))
            listed = [(line["path"], line["label"], line.get("group") or "") for line in lines]
            if any(not name or "\0" in name or label is None for name, label, _ in listed):
                raise ValueError("a line without a path or a label, or with a NUL")
            rows += (ListedFile(split, name, label, group_of(name, label, group)) for name, label, group in listed)
        except (OSError, ValueError, KeyError, csv.Error) as error:
            bad.append(Finding(path.name, "list", f"cannot be read ({type(error).__name__}: {error})"))
            continue
        # A changed list is reported, and the files that it names now are checked all the same.
        if known.list_sha256 not in (None, hashlib.sha256(data).hexdigest()):
            bad.append(Finding(path.name, "list", "was changed since the preparation"))
    return rows, bad


def _expected(out: Path) -> dict[str, ExpectedFile]:
    """What prep.sqlite records about each prepared video, by its path in the list; empty if there is no prep.sqlite."""
    if not (out / STATE_NAME).is_file():
        return {}
    with PreparationState(out) as state:
        return {
            row["target"]: ExpectedFile(*(row[column] for column in COLUMNS))
            for row in state.rows(columns=("target", "status", "reason", *COLUMNS))
            if row["status"] == "ok" or is_damaged(row)
        }


def _record_damage(out: Path, found: Mapping[str, Finding], intact: bool) -> None:
    """Record in prep.sqlite which files are damaged and, if the check proves it, which are `intact` (again)."""
    details = {item.name: f"{item.reason}: {item.detail}".rstrip(": ") for item in found.values() if item.reason}
    with PreparationState(out) as state:
        known = {row["target"] for row in state.rows("failed", ("target", "status", "reason")) if is_damaged(row)}
        if details.keys() - known:
            state.mark_damaged(details)
        if intact and (restored := known & found.keys() - details.keys()):
            state.mark_intact(restored)


def _wrong_fingerprints(rows: Sequence[ListedFile], found: dict[str, Finding], record: DatasetRecord) -> list[Finding]:
    """A finding for each split whose content does not match its fingerprint in dataset.json.

    Without prep.sqlite, this is the only check of the bytes.
    """
    wrong = []
    for split, known in record.splits.items():
        content = [(row.name, row.label, found[row.name].sha256 or "") for row in rows if row.split == split]
        if known.fingerprint not in (None, content_fingerprint(content)):
            wrong.append(Finding(f"{split}.csv", "fingerprint", FAULTS["fingerprint"]))
    return wrong


def _write_bad(path: Path, verified: VerifyResult) -> None:
    """Write verify.csv, also if nothing is bad, so that no result of an earlier run remains."""
    rows = [tuple(map(for_csv, (item.name, verified.level, item.reason, item.detail))) for item in verified.bad]
    write_text(path, csv_text(("path", "level", "reason", "detail"), rows))


def _extra(out: Path, listed: dict[str, Finding]) -> Iterator[str]:
    """The paths of all files below videos/ that no list names, sorted by folder."""
    for parent, folders, files in os.walk(out / "videos"):
        folders.sort()  # in place: os.walk visits the folders in this order
        for name in sorted(files):
            path = Path(parent, name).relative_to(out).as_posix()
            if path not in listed:
                yield path


def _stat(path: Path) -> tuple[int | None, int | None]:
    """(size in bytes, mtime in ns) of a regular file; (None, None) if there is none."""
    # A named pipe counts as missing, since opening it would block forever.
    try:
        status = path.stat()
    except OSError:
        return None, None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (None, None)


def _untouched(path: Path, before: Finding) -> bool:
    """Whether a file has the size and mtime that it had when it was checked. A missing file is always checked again."""
    size, mtime_ns = _stat(path)
    return size is not None and (size, mtime_ns) == (before.size, before.mtime_ns)


def _time_limit_seconds(check: FileCheck) -> float:
    """The time limit of a job, by the size of its file. Level full replaces it once the frames are known."""
    return index_limit_seconds(_stat(check.path)[0] or 0)
