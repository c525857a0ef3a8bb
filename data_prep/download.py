"""Download Kinetics: lists and archives, and extract the videos. Can be interrupted anywhere; the next call resumes.

    TO/archives/...            every file as it was fetched
    TO/archives.json           the ledger: size and sha256 of every file when it was fetched, and what was extracted
    TO/.unpacked-.../          an archive being extracted; discarded if interrupted
    TO/SPLIT/NAME.mp4          the videos, moved here once their archive is completely extracted
    TO/annotations/SPLIT.csv   the lists; together with the videos this is what `prepare` reads

An archive is done when the ledger has its `clips`. That entry is written after its videos have been moved and synced,
so an archive interrupted earlier is extracted again. Nobody publishes checksums of Kinetics, so the ledger is what
later runs are checked against.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from data_prep import cvdf
from data_prep.cvdf import Archive
from data_prep.fetch import AbsentError, DiskError, StopError, as_disk_error, fetch_file, is_url
from data_prep.unpack import DamagedError, archive_fault, same_content, unpack
from video_swinv2.data.lists import SPLITS
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import lock_file, sync_to_disk, write_json
from video_swinv2.progress import Progress

LEDGER_NAME = "archives.json"
LOCK_NAME = ".download.lock"
EXTRACTION_PREFIX = ".unpacked-"
SUMS_NAME = "SHA256SUMS"


@dataclass(frozen=True)
class DownloadReport:
    """One line per split, and remarks."""

    lines: tuple[str, ...]
    notes: tuple[str, ...]


class DownloadLedger:
    """archives.json: what every file was when it was fetched, and what was extracted from it. Thread-safe."""

    def __init__(self, folder: Path, dataset: str) -> None:
        self._path = folder / LEDGER_NAME
        self._lock = threading.Lock()
        self._content: dict[str, Any] = {"dataset": dataset, "files": {}, "replaced": {}}
        if self._path.exists():
            try:
                self._content |= json.loads(self._path.read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{self._path}: cannot be read as JSON ({error}); restore or remove it") from error
        if self._content["dataset"] != dataset:
            problem = f"contains {self._content['dataset']}; give {dataset} a folder of its own"
            raise UsageError(f"{folder}: {problem}, since `prepare` finds videos by name")

    def entry(self, key: str) -> dict[str, Any]:
        """What is known of a file, by its path below the folder; empty if nothing."""
        with self._lock:
            return dict(self._content["files"].get(key, {}))

    def update(self, key: str, **facts: object) -> None:
        """Record more about a file."""
        with self._lock:
            self._content["files"].setdefault(key, {}).update(facts)
            write_json(self._path, self._content)

    def forget(self, key: str) -> None:
        """Remove the entry of a file that turned out to be bad, so that its successor is not compared with it."""
        with self._lock:
            self._content["files"].pop(key, None)
            write_json(self._path, self._content)

    def replaced(self, split: str) -> list[str] | None:
        """The videos of the split that were replaced; None if that has not been done yet."""
        names: list[str] | None = self._content["replaced"].get(split)
        return names

    def record_replaced(self, split: str, names: Sequence[str]) -> None:
        """Record which videos were replaced."""
        with self._lock:
            self._content["replaced"][split] = list(names)
            write_json(self._path, self._content)


def download(
    dataset: str,
    splits: Sequence[str],
    to: Path,
    *,
    source: str = cvdf.BASE_URL,
    workers: int = 4,
    extract: bool = True,
    delete_archives: bool = False,
) -> DownloadReport:
    """Download splits of a version of Kinetics to `to`, resuming where an earlier call stopped.

    `source` is a URL or a folder with CVDF's layout; `workers` archives are downloaded at the same time. An archive
    that fails does not stop the others; the UserError comes at the end. If two archives of a split have different
    videos under one name, the one that is there first stays, and the other is recorded as a conflict.
    """
    if not extract and delete_archives:
        raise UsageError("--delete-archives: with --no-extract nothing would remain; omit one of them")
    chosen = [split for split in SPLITS if split in splits]
    to = Path(to).absolute()
    with as_disk_error(to):
        to.mkdir(parents=True, exist_ok=True)
    with _lock(to):
        run = _Download(dataset, to, _source(source), extract=extract, delete_archives=delete_archives)
        return run.run(chosen, workers)


class _Download:
    """One call of `download`: its options and counters, shared by the worker threads."""

    def __init__(self, dataset: str, to: Path, source: str, *, extract: bool, delete_archives: bool) -> None:
        self.dataset = cvdf.VERSIONS[dataset]
        self.to = to
        self.source = source
        self.extract = extract
        self.delete_archives = delete_archives
        self.ledger = DownloadLedger(to, dataset)
        self.stop = threading.Event()
        self.moving_lock, self.counting_lock = threading.Lock(), threading.Lock()
        self.sums: dict[str, dict[str, str]] = {}
        self.bytes_moved = 0
        self.notes: list[str] = []
        self.failures: dict[str, str] = {}

    def run(self, splits: Sequence[str], workers: int) -> DownloadReport:
        """Download all of it. Raises as `download`."""
        for leftover in self.to.glob(f"{EXTRACTION_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        # All lists before all archives: what is wrong with a list shows at once, not after hours of downloading.
        archives = [archive for split in splits for archive in self._listed(split)]
        self._work([archive for archive in archives if not self._done(archive)], len(archives), workers)
        if self.dataset.replacement:
            # Replacements are made once per split, over all of its videos; a split with a failed archive has to wait.
            broken = {archive.split for archive in archives if archive.key in self.failures}
            with self._count_failure(self.dataset.replacement):
                self._replace([split for split in splits if split not in broken])
        if self.failures:
            first = next(iter(self.failures.values()))
            raise UserError(f"{len(self.failures)} of the archives failed ({len(archives)} in all); the first: {first}")
        return DownloadReport(tuple(self._line(split, archives) for split in splits), tuple(self.notes))

    def _listed(self, split: str) -> list[Archive]:
        """Fetch the annotations and the list of archives of a split; returns the archives."""
        name, folder = self.dataset.annotations[split], self.dataset.folder
        self._fetch(f"{folder}/annotations/{name}", f"archives/annotations/{name}", cvdf.text_fault)
        with as_disk_error(self.to):
            note = cvdf.write_list(self.to / "archives/annotations" / name, self._list(split), split)
        self.notes += [note] if note else []
        name = f"{self.dataset.prefix}_{split}_path.txt"
        self._fetch(f"{folder}/{split}/{name}", f"archives/{split}/{name}", cvdf.text_fault)
        archives = cvdf.read_part_list(self.to / "archives" / split / name, split, f"{folder}/{split}")
        for archive in archives:
            self._sums_beside(archive.path, archive.key)  # now, once, rather than in every thread
        return archives

    def _list(self, split: str) -> Path:
        return self.to / "annotations" / f"{split}.csv"

    def _done(self, archive: Archive) -> bool:
        """Whether nothing is left to do for an archive. Once it is extracted, its videos are not checked again."""
        if not self.extract or "clips" not in self.ledger.entry(archive.key):
            return False
        if self.delete_archives:
            (self.to / archive.key).unlink(missing_ok=True)
        return True

    def _work(self, archives: list[Archive], total: int, workers: int) -> None:
        done = total - len(archives)
        with (
            Progress("download", total, unit="archives", shown=bool(archives), done=done) as progress,
            ThreadPoolExecutor(workers) as pool,
        ):
            waiting = {pool.submit(self._one, archive): archive for archive in archives}
            try:
                while waiting:
                    # The timeout keeps the number of bytes in the progress line current.
                    ended, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                    for future in ended:
                        with self._count_failure(waiting.pop(future).key):
                            future.result()
                    progress.advance(len(ended), note=f"{self.bytes_moved / 1e9:.2f} GB fetched")
            except BaseException:
                # The workers notice at the next block; leaving the pool waits for them.
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    @contextlib.contextmanager
    def _count_failure(self, key: str) -> Iterator[None]:
        """Report and count the failure of one archive. A DiskError ends the whole download instead."""
        try:
            yield
        except DiskError:
            raise
        except UserError as error:
            self.failures[key] = str(error)
            print(error, file=sys.stderr, flush=True)

    def _one(self, archive: Archive) -> None:
        """Fetch an archive and move its videos into the folder of the split. Runs in a worker thread."""
        if self.stop.is_set():
            raise StopError
        self._fetch(archive.path, archive.key, archive_fault)
        if not self.extract:
            return
        home = self.to / archive.split
        with self._unpacked(archive.key) as (extracted, names, facts), self.moving_lock, as_disk_error(home):
            home.mkdir(exist_ok=True)
            # If a run is killed here, the next one extracts the archive again and moves the same files once more.
            conflicts = [name for name in names if not _move_unless_different(extracted / name, home / name)]
            sync_to_disk(home)
        self.ledger.update(archive.key, **facts, conflicts=conflicts)
        if self.delete_archives:
            (self.to / archive.key).unlink(missing_ok=True)

    def _replace(self, splits: Sequence[str]) -> None:
        """Replace broken videos by those published later. Replacements for other splits wait for their download."""
        key = f"archives/{self.dataset.replacement}"
        todo = [split for split in splits if self.ledger.replaced(split) is None]
        if not todo:
            return
        self._fetch(f"{self.dataset.folder}/{self.dataset.replacement}", key, archive_fault)
        if not self.extract:
            return
        with self._unpacked(key) as (extracted, names, facts):
            self.ledger.update(key, **facts)
            for split in todo:
                home, listed = self.to / split, cvdf.listed_clips(self._list(split), split)
                # One archive holds the replacements of all splits; the lists and existing files show which belong here.
                chosen = [name for name in names if Path(name).stem in listed or (home / name).exists()]
                with as_disk_error(home):
                    for name in chosen:
                        os.replace(extracted / name, home / name)
                    sync_to_disk(home)
                self.ledger.record_replaced(split, chosen)
        if self.delete_archives:
            (self.to / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _unpacked(self, key: str) -> Iterator[tuple[Path, tuple[str, ...], dict[str, int]]]:
        """Extract an archive: yields a folder, the names of the videos in it, counts. Deletes the folder at the end."""
        folder = self.to / f"{EXTRACTION_PREFIX}{key.replace('/', '-')}"
        try:
            content = unpack(self.to / key, folder, self.stop)
            counts = {"clips": len(content.names), "empty": content.empty, "other": content.other}
            yield folder, content.names, counts
        except UserError as error:
            if not isinstance(error, DiskError):
                self.ledger.forget(key)
            if isinstance(error, DamagedError):  # to be fetched again; any other stays, for the user to look at
                (self.to / key).unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _fetch(self, path: str, key: str, find_fault: Callable[[Path], str]) -> None:
        """Fetch one file of the source, or check the one that is already there, and record what it is."""
        known, name = self.ledger.entry(key), Path(key).name
        expected = known.get("sha256") or self._sums_beside(path, key).get(name, "")
        target = self.to / key
        fetched = fetch_file(
            self._address(path),
            target,
            find_fault=find_fault,
            sha256=expected,
            stop=self.stop,
            on_bytes=self._count_bytes,
        )
        if not known:
            self.ledger.update(key, **asdict(fetched))

    def _sums_beside(self, path: str, key: str) -> dict[str, str]:
        """The checksums (SHA256SUMS) of a folder of the source, if a mirror has published any."""
        folder = path.rpartition("/")[0]
        if folder not in self.sums:
            target = (self.to / key).with_name(SUMS_NAME)
            try:
                fetch_file(self._address(f"{folder}/{SUMS_NAME}"), target, find_fault=cvdf.text_fault, stop=self.stop)
                self.sums[folder] = cvdf.read_sums(target)
            except AbsentError:
                self.sums[folder] = {}
        return self.sums[folder]

    def _address(self, path: str) -> str:
        return f"{self.source}/{path}" if is_url(self.source) else str(Path(self.source, unquote(path)))

    def _count_bytes(self, size: int) -> None:
        with self.counting_lock:
            self.bytes_moved += size

    def _line(self, split: str, archives: Sequence[Archive]) -> str:
        entries = [self.ledger.entry(archive.key) for archive in archives if archive.split == split]
        if not self.extract:
            return f"{split}: {len(entries)} archives, {sum(entry['size'] for entry in entries) / 1e9:.2f} GB"
        clips, empty, other = (sum(entry[key] for entry in entries) for key in ("clips", "empty", "other"))
        text = f"{split}: {len(entries)} archives, {clips} videos, {empty} of them empty"
        replaced, conflicts = self.ledger.replaced(split), [name for entry in entries for name in entry["conflicts"]]
        text += f", {len(replaced)} replaced" if replaced is not None else ""
        text += f", {other} other files ignored" if other else ""
        return text + (
            f", {len(conflicts)} already there with different bytes (see {LEDGER_NAME})" if conflicts else ""
        )


def _move_unless_different(source: Path, target: Path) -> bool:
    """Move a video to its target. False if a different video is already there, which then stays."""
    if target.exists() and not same_content(source, target):
        return False
    os.replace(source, target)
    return True


def _source(text: str) -> str:
    """A base URL without a slash at the end, or the path of a folder. Raises UsageError."""
    if is_url(text):
        return text.rstrip("/")
    folder = Path(unquote(urlsplit(text).path) if text.startswith("file:") else text).absolute()
    if not folder.is_dir():
        raise UsageError(f"--source {text}: neither a URL (https://...) nor a folder; give a mirror of {cvdf.BASE_URL}")
    return str(folder)


@contextlib.contextmanager
def _lock(to: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        with as_disk_error(to):
            stack.enter_context(
                lock_file(to / LOCK_NAME, f"{to}: another run is downloading here; wait for it or stop it")
            )
        yield
