"""Download Kinetics: fetch its lists and archives and extract the videos. An interrupted download can be resumed.

    TO/archives/...            every file exactly as fetched
    TO/archives.json           the ledger: size and sha256 of every file when it was fetched, and what was extracted
    TO/.unpacked-.../          the content of an archive while it is being extracted; discarded after an interruption
    TO/SPLIT/NAME.mp4          the videos, moved here once their archive has been extracted completely
    TO/annotations/SPLIT.csv   the lists; `prepare` reads these together with the videos

An archive goes through these states, each of which is on disk before the next begins:

    fetched      complete under TO/archives and checked; a partial file is resumed by fetch.py
    recorded     its size and sha256 are in the ledger
    extracted    all of its videos are below TO/.unpacked-...
    moved        its videos are in TO/SPLIT, synced to disk
    done         the ledger has its number of videos (`clips`); only now --delete-archives may delete the archive

If a run is killed before an archive is done, the next run extracts the archive again and moves the same files again.

CVDF publishes no checksums of Kinetics. The ledger therefore records those of the first download, and later runs are
checked against it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_prep import cvdf
from data_prep.cvdf import Archive
from data_prep.fetch import AbsentError, DiskError, StopError, as_disk_error, fetch_file, is_url
from data_prep.ledger import LEDGER_NAME, DownloadLedger
from data_prep.unpack import DamagedError, archive_fault, same_content, unpack
from video_swinv2.data.lists import SPLITS
from video_swinv2.errors import UsageError, UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.files import create_folder, lock_file, sync_to_disk
from video_swinv2.progress import Progress

LOCK_NAME = ".download.lock"
EXTRACTION_PREFIX = ".unpacked-"
SUMS_NAME = "SHA256SUMS"
MAX_LIST_BYTES = 200 * 10**6  # of a list or SHA256SUMS, which are read into memory; a million lines have about 60 MB


@dataclass(frozen=True)
class DownloadReport:
    """What a download has done: one line of text per split, and remarks for the user."""

    lines: tuple[str, ...]
    notes: tuple[str, ...]


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
    """Download splits of a version of Kinetics to the folder `to`, resuming where an earlier call stopped.

    `dataset` is a key of cvdf.VERSIONS. `source` is a URL or a folder with CVDF's layout. `workers` archives are
    downloaded at the same time. `delete_archives` deletes each archive after its videos have been extracted.

    An archive that fails does not stop the others, and the UserError is raised at the end. A DiskError stops the
    download at once. If two archives of a split contain different videos under one name, the one that is moved first
    stays, and the other is recorded in the ledger as a conflict. Raises UsageError for impossible arguments.
    """
    if not extract and delete_archives:
        raise UsageError("--delete-archives: with --no-extract nothing would remain; omit one of them")
    chosen = [split for split in SPLITS if split in splits]
    to = Path(to).absolute()
    create_folder(to, "--to")
    with _lock(to):
        run = _Download(dataset, to, _source(source), extract=extract, delete_archives=delete_archives)
        return run.run(chosen, workers)


class _Download:
    """One call of `download`: its options and its counters, which all worker threads share.

    The main thread fetches the lists, starts one task per archive, and collects the failures. The worker threads fetch
    and extract. Threads are enough, because the time is spent in the network, the disk, zlib and hashing, which release
    the interpreter lock.
    """

    def __init__(self, dataset: str, to: Path, source: str, *, extract: bool, delete_archives: bool) -> None:
        self.dataset = cvdf.VERSIONS[dataset]
        self.to = to
        self.source = source
        self.extract = extract
        self.delete_archives = delete_archives
        self.ledger = DownloadLedger(to, dataset)
        self.stop = threading.Event()
        # moving_lock: two archives may contain the same video, so comparing and moving must be one step.
        self.moving_lock, self.counting_lock = threading.Lock(), threading.Lock()
        self.sums: dict[str, dict[str, str]] = {}  # published checksums: sha256 by file name, for each folder
        self.bytes_moved = 0  # received in this call, for the progress line
        self.notes: list[str] = []
        self.failures: dict[str, str] = {}  # error message by archive

    def run(self, splits: Sequence[str], workers: int) -> DownloadReport:
        """Download the given splits. Raises the errors of `download`."""
        # Extractions that a killed run has left behind. The lock on the folder ensures that nobody is writing them.
        for leftover in self.to.glob(f"{EXTRACTION_PREFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        # Read the lists of all splits before fetching any archive: an error in a list is then reported at once instead
        # of after hours of downloading.
        archives = [archive for split in splits for archive in self._listed(split)]
        self._work([archive for archive in archives if not self._done(archive)], len(archives), workers)
        if self.dataset.replacement:
            # Replacements are made only once per split, after all of its archives: an archive extracted later would
            # conflict with the replaced videos. A split with a failed archive therefore has to wait for the next run.
            broken = {archive.split for archive in archives if archive.key in self.failures}
            with self._count_failure(self.dataset.replacement):
                self._replace([split for split in splits if split not in broken])
        if self.failures:
            first = next(iter(self.failures.values()))
            raise UserError(f"{len(self.failures)} of the archives failed ({len(archives)} in all); the first: {first}")
        return DownloadReport(tuple(self._line(split, archives) for split in splits), tuple(self.notes))

    def _listed(self, split: str) -> list[Archive]:
        """Fetch the annotations and the list of archives of a split, and write SPLIT.csv. Returns the archives."""
        name, folder = self.dataset.annotations[split], self.dataset.folder
        self._fetch(f"{folder}/annotations/{name}", f"archives/annotations/{name}", cvdf.text_fault, MAX_LIST_BYTES)
        with as_disk_error(self.to):
            note = cvdf.write_list(self.to / "archives/annotations" / name, self._list(split), split)
        self.notes += [note] if note else []
        name = f"{self.dataset.prefix}_{split}_path.txt"
        self._fetch(f"{folder}/{split}/{name}", f"archives/{split}/{name}", cvdf.text_fault, MAX_LIST_BYTES)
        archives = cvdf.read_part_list(self.to / "archives" / split / name, split, f"{folder}/{split}")
        for archive in archives:
            # Fills self.sums before the threads start, so that they only read it and never fetch the same file twice.
            self._sums_beside(archive.path, archive.key)
        return archives

    def _list(self, split: str) -> Path:
        """The path of the list that `prepare` reads."""
        return self.to / "annotations" / f"{split}.csv"

    def _done(self, archive: Archive) -> bool:
        """Whether an archive needs no more work. The videos of a finished archive are not checked again.

        With --no-extract no archive counts as done here: `fetch_file` checks the hash of each one that exists.
        """
        if not self.extract or "clips" not in self.ledger.entry(archive.key):
            return False
        # The earlier run may have been killed before it could delete the archive, or was told to keep it.
        if self.delete_archives:
            (self.to / archive.key).unlink(missing_ok=True)
        return True

    def _work(self, archives: list[Archive], total: int, workers: int) -> None:
        """Fetch and extract the archives in worker threads, and show the progress. `total` includes those done before.

        Failures of single archives are collected in self.failures; any other exception stops all threads.
        """
        done = total - len(archives)
        with (
            Progress("download", total, unit="archives", shown=bool(archives), done=done) as progress,
            ThreadPoolExecutor(workers) as pool,
        ):
            waiting = {pool.submit(self._one, archive): archive for archive in archives}
            try:
                while waiting:
                    # With the timeout the progress line is updated every second, even if no archive has finished.
                    ended, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                    for future in ended:
                        with self._count_failure(waiting.pop(future).key):
                            future.result()
                    progress.advance(len(ended), note=f"{self.bytes_moved / 1e9:.2f} GB fetched")
            except BaseException:
                # Also for Ctrl-C. The workers check `stop` at every block, and leaving the pool waits for them, so that
                # no thread is writing any more when the lock on the folder is released.
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    @contextlib.contextmanager
    def _count_failure(self, key: str) -> Iterator[None]:
        """Print and record a UserError of one archive. A DiskError is raised, since every archive would fail."""
        try:
            yield
        except DiskError:
            raise
        except UserError as error:
            self.failures[key] = str(error)
            print(for_terminal(error), file=sys.stderr, flush=True)

    def _one(self, archive: Archive) -> None:
        """Fetch an archive, extract it, and move its videos into the folder of the split. Runs in a worker thread."""
        if self.stop.is_set():
            raise StopError
        self._fetch(archive.path, archive.key, archive_fault)
        if not self.extract:
            return
        home = self.to / archive.split
        with self._unpacked(archive.key) as (extracted, names, facts), self.moving_lock, as_disk_error(home):
            home.mkdir(exist_ok=True)
            # Extracted beside the folder of the split and moved by renaming, so that a video is either complete or
            # absent there. If the run is killed during the loop, the next one extracts the archive again: a video that
            # has already been moved is then found with the same content and replaced by its copy.
            conflicts = [name for name in names if not _move_unless_different(extracted / name, home / name)]
            sync_to_disk(home)
        # Only after the sync: the ledger must not claim videos that a power failure could still take away.
        self.ledger.update(archive.key, **facts, conflicts=conflicts)
        if self.delete_archives:
            (self.to / archive.key).unlink(missing_ok=True)

    def _replace(self, splits: Sequence[str]) -> None:
        """Replace broken videos of the given splits by the versions that were published later.

        Videos of other splits in the same archive are ignored until their split is downloaded.
        """
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
                # The archive does not say which split a video belongs to. It belongs to this one if its list names the
                # video, which may have been missing from the archives, or if the video is there.
                chosen = [name for name in names if Path(name).stem in listed or (home / name).exists()]
                with as_disk_error(home):
                    # After an interruption the whole split is done again; replacing a video twice changes nothing.
                    for name in chosen:
                        os.replace(extracted / name, home / name)
                    sync_to_disk(home)
                self.ledger.record_replaced(split, chosen)
        if self.delete_archives:
            (self.to / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _unpacked(self, key: str) -> Iterator[tuple[Path, tuple[str, ...], dict[str, int]]]:
        """Extract an archive into a folder of its own, which is deleted at the end of the context.

        Yields the folder, the names of the videos in it, and the counts for the ledger: `clips` (videos), `empty`
        (videos with 0 bytes) and `other` (files that are not videos).
        """
        folder = self.to / f"{EXTRACTION_PREFIX}{key.replace('/', '-')}"
        try:
            content = unpack(self.to / key, folder, self.stop)
            counts = {"clips": len(content.names), "empty": content.empty, "other": content.other}
            yield folder, content.names, counts
        except UserError as error:
            # A full disk says nothing against the archive. Otherwise its recorded hash is that of a bad file.
            if not isinstance(error, DiskError):
                self.ledger.forget(key)
            if isinstance(error, DamagedError):  # the next run fetches it again; a refused archive stays for inspection
                (self.to / key).unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _fetch(self, path: str, key: str, find_fault: Callable[[Path], str], max_bytes: int | None = None) -> None:
        """Fetch one file of the source, or check the one that is already there, and record its size and hashes.

        `path` is relative to the source, `key` to the download folder. The rest is as in `fetch_file`.
        """
        known, name = self.ledger.entry(key), Path(key).name
        # What this folder received before is the stricter reference: the files of a mirror may change.
        expected = known.get("sha256") or self._sums_beside(path, key).get(name, "")
        target = self.to / key
        fetched = fetch_file(
            self._address(path),
            target,
            find_fault=find_fault,
            sha256=expected,
            max_bytes=max_bytes,
            stop=self.stop,
            on_bytes=self._count_bytes,
        )
        if not known:
            self.ledger.update(key, **asdict(fetched))

    def _sums_beside(self, path: str, key: str) -> dict[str, str]:
        """The published checksums of the folder that holds `path`: sha256 by file name, empty if there are none.

        They are read from the file SHA256SUMS, which CVDF itself does not have but a mirror may add.
        """
        folder = path.rpartition("/")[0]
        if folder not in self.sums:
            target = (self.to / key).with_name(SUMS_NAME)
            try:
                fetch_file(
                    self._address(f"{folder}/{SUMS_NAME}"),
                    target,
                    find_fault=cvdf.text_fault,
                    max_bytes=MAX_LIST_BYTES,
                    stop=self.stop,
                )
                self.sums[folder] = cvdf.read_sums(target)
            except AbsentError:
                self.sums[folder] = {}
        return self.sums[folder]

    def _address(self, path: str) -> str:
        # Paths are percent-encoded, as the lists spell them. A URL needs them like that; a file system does not.
        return f"{self.source}/{path}" if is_url(self.source) else str(Path(self.source, unquote(path)))

    def _count_bytes(self, size: int) -> None:
        with self.counting_lock:
            self.bytes_moved += size

    def _line(self, split: str, archives: Sequence[Archive]) -> str:
        """The line of a split in the report, from the ledger, so that it covers what earlier runs have done."""
        entries = [self.ledger.entry(archive.key) for archive in archives if archive.split == split]
        if not self.extract:
            return f"{split}: {len(entries)} archives, {sum(entry['size'] for entry in entries) / 1e9:.2f} GB"
        clips, empty, other = (sum(entry.get(key, 0) for entry in entries) for key in ("clips", "empty", "other"))
        text = f"{split}: {len(entries)} archives, {clips} videos, {empty} of them empty"
        replaced, conflicts = (
            self.ledger.replaced(split),
            [name for entry in entries for name in entry.get("conflicts", ())],
        )
        text += f", {len(replaced)} replaced" if replaced is not None else ""
        text += f", {other} other files ignored" if other else ""
        return text + (
            f", {len(conflicts)} already there with different bytes (see {LEDGER_NAME})" if conflicts else ""
        )


def _move_unless_different(source: Path, target: Path) -> bool:
    """Move a video to its target. If a different video is already there, leave it alone and return False."""
    if target.exists() and not same_content(source, target):
        return False
    os.replace(source, target)
    return True


def _source(text: str) -> str:
    """The value of --source as a base URL without a trailing slash, or as an absolute path. Raises UsageError.

    A folder may also be given as a `file:` URL, whose path is percent-encoded.
    """
    if is_url(text):
        return text.rstrip("/")
    folder = Path(unquote(urlsplit(text).path) if text.startswith("file:") else text).absolute()
    if not folder.is_dir():
        raise UsageError(f"--source {text}: neither a URL (https://...) nor a folder; give a mirror of {cvdf.BASE_URL}")
    return str(folder)


@contextlib.contextmanager
def _lock(to: Path) -> Iterator[None]:
    """Reserve the download folder for this run. Raises UserError if another run holds it."""
    with lock_file(to / LOCK_NAME, f"{to}: another run is downloading here; wait for it or stop it"):
        yield
