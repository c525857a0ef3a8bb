"""Kinetics brought here: lists, archives, the clips out of them; told to stop anywhere, the next call goes on.

Nobody publishes checksums: what was fetched is written down (archives.json) and held against that ever after.
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
ASIDE = ".unpacked-"
SUMS_NAME = "SHA256SUMS"


@dataclass(frozen=True)
class DownloadReport:
    """A line for every split, and what else there is to tell."""

    lines: tuple[str, ...]
    notes: tuple[str, ...]


class DownloadLedger:
    """archives.json: what every file was when it was fetched, and what came out of it. Safe to use from threads."""

    def __init__(self, folder: Path, dataset: str) -> None:
        self._path = folder / LEDGER_NAME
        self._lock = threading.Lock()
        self._content: dict[str, Any] = {"dataset": dataset, "files": {}, "replaced": {}}
        if self._path.exists():
            try:
                self._content |= json.loads(self._path.read_text(encoding="utf-8"))
            except (OSError, ValueError, TypeError) as fault:
                raise UserError(f"{self._path}: not readable as JSON ({fault}); restore or remove it") from fault
        if self._content["dataset"] != dataset:
            text = f"holds {self._content['dataset']}; give {dataset} a folder of its own"
            raise UsageError(f"{folder}: {text}, prepare tells clips by their names")

    def of(self, key: str) -> dict[str, Any]:
        """What is known of a file, by its path below the folder."""
        with self._lock:
            return dict(self._content["files"].get(key, {}))

    def note(self, key: str, **facts: object) -> None:
        """Write down more about a file."""
        with self._lock:
            self._content["files"].setdefault(key, {}).update(facts)
            write_json(self._path, self._content)

    def forget(self, key: str) -> None:
        """Hold a file against nothing any more: what was fetched is no good."""
        with self._lock:
            self._content["files"].pop(key, None)
            write_json(self._path, self._content)

    def replaced(self, split: str) -> list[str] | None:
        """The clips of the split that were replaced; None if this was not done yet."""
        names: list[str] | None = self._content["replaced"].get(split)
        return names

    def note_replaced(self, split: str, names: Sequence[str]) -> None:
        """Write down which clips were replaced."""
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
    """Bring splits of a Kinetics version to `to`, going on where an earlier call stopped.

    Makes what `prepare` reads, `to/SPLIT/NAME.mp4` and `to/annotations/SPLIT.csv`; `to/archives/`, all that was fetched
    as it came; and `to/archives.json`. `source` is a URL or a folder that stands for CVDF's. An archive that cannot be
    had does not keep the others from coming: UserError in the end. Where two archives of a split have other bytes under
    one name, the clip that is there first stays and the other is noted as a conflict.
    """
    if not extract and delete_archives:
        raise UsageError("--delete-archives: would leave nothing with --no-extract; leave out one of them")
    chosen = [split for split in SPLITS if split in splits]
    to = Path(to).absolute()
    with as_disk_error(to):
        to.mkdir(parents=True, exist_ok=True)
    with _lock(to):
        run = _Download(dataset, to, _source(source), extract=extract, delete_archives=delete_archives)
        return run.run(chosen, workers)


class _Download:
    """One call of `download`."""

    def __init__(self, dataset: str, to: Path, source: str, *, extract: bool, delete_archives: bool) -> None:
        self.dataset = cvdf.VERSIONS[dataset]
        self.to = to
        self.source = source
        self.extract = extract
        self.delete_archives = delete_archives
        self.ledger = DownloadLedger(to, dataset)
        self.stop = threading.Event()
        self.placing, self.counting = threading.Lock(), threading.Lock()
        self.sums: dict[str, dict[str, str]] = {}
        self.bytes_moved = 0
        self.notes: list[str] = []
        self.failures: dict[str, str] = {}

    def run(self, splits: Sequence[str], workers: int) -> DownloadReport:
        """All of it; raises what `download` says."""
        for aside in self.to.glob(f"{ASIDE}*"):
            shutil.rmtree(aside, ignore_errors=True)
        archives = [archive for split in splits for archive in self._listed(split)]
        self._work([archive for archive in archives if not self._done(archive)], len(archives), workers)
        if self.dataset.replacement:
            broken = {archive.split for archive in archives if archive.key in self.failures}
            with self._counted(self.dataset.replacement):
                self._replace([split for split in splits if split not in broken])
        if self.failures:
            first = next(iter(self.failures.values()))
            raise UserError(f"{len(self.failures)} of the archives failed ({len(archives)} in all); the first: {first}")
        return DownloadReport(tuple(self._line(split, archives) for split in splits), tuple(self.notes))

    def _listed(self, split: str) -> list[Archive]:
        """The archives of a split, after its annotations were brought here."""
        name, folder = self.dataset.annotations[split], self.dataset.folder
        self._fetch(f"{folder}/annotations/{name}", f"archives/annotations/{name}", cvdf.text_fault)
        with as_disk_error(self.to):
            note = cvdf.write_list(self.to / "archives/annotations" / name, self._list(split), split)
        self.notes += [note] if note else []
        name = f"{self.dataset.prefix}_{split}_path.txt"
        self._fetch(f"{folder}/{split}/{name}", f"archives/{split}/{name}", cvdf.text_fault)
        archives = cvdf.read_part_list(self.to / "archives" / split / name, split, f"{folder}/{split}")
        for archive in archives:
            self._sums_beside(archive.path, archive.key)  # here, once, and not by every thread
        return archives

    def _list(self, split: str) -> Path:
        return self.to / "annotations" / f"{split}.csv"

    def _done(self, archive: Archive) -> bool:
        """True if nothing is left to do: what came out of an archive is not asked for again."""
        if not self.extract or "clips" not in self.ledger.of(archive.key):
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
                    ended, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                    for future in ended:
                        with self._counted(waiting.pop(future).key):
                            future.result()
                    progress.advance(len(ended), note=f"{self.bytes_moved / 1e9:.2f} GB fetched")
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    @contextlib.contextmanager
    def _counted(self, key: str) -> Iterator[None]:
        """An archive that fails is said and counted; a disk that refuses ends everything."""
        try:
            yield
        except DiskError:
            raise
        except UserError as fault:
            self.failures[key] = str(fault)
            print(fault, file=sys.stderr, flush=True)

    def _one(self, archive: Archive) -> None:
        """Fetch an archive and put its clips into the folder of the split."""
        if self.stop.is_set():
            raise StopError
        self._fetch(archive.path, archive.key, archive_fault)
        if not self.extract:
            return
        home = self.to / archive.split
        with self._unpacked(archive.key) as (aside, names, facts), self.placing, as_disk_error(home):
            home.mkdir(exist_ok=True)
            conflicts = [name for name in names if not _place(aside / name, home / name)]
            sync_to_disk(home)
        self.ledger.note(archive.key, **facts, conflicts=conflicts)
        if self.delete_archives:
            (self.to / archive.key).unlink(missing_ok=True)

    def _replace(self, splits: Sequence[str]) -> None:
        """Let the replacements of broken clips take their place; those of other splits are left for when they come."""
        key = f"archives/{self.dataset.replacement}"
        todo = [split for split in splits if self.ledger.replaced(split) is None]
        if not todo:
            return
        self._fetch(f"{self.dataset.folder}/{self.dataset.replacement}", key, archive_fault)
        if not self.extract:
            return
        with self._unpacked(key) as (aside, names, facts):
            self.ledger.note(key, **facts)
            for split in todo:
                home, listed = self.to / split, cvdf.listed_clips(self._list(split), split)
                chosen = [name for name in names if Path(name).stem in listed or (home / name).exists()]
                with as_disk_error(home):
                    for name in chosen:
                        os.replace(aside / name, home / name)
                    sync_to_disk(home)
                self.ledger.note_replaced(split, chosen)
        if self.delete_archives:
            (self.to / key).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _unpacked(self, key: str) -> Iterator[tuple[Path, tuple[str, ...], dict[str, int]]]:
        """The videos of an archive in a folder of their own, their names and counts; what is left there is removed."""
        aside = self.to / f"{ASIDE}{key.replace('/', '-')}"
        try:
            held = unpack(self.to / key, aside, self.stop)
            yield aside, held.names, {"clips": len(held.names), "empty": held.empty, "other": held.other}
        except UserError as fault:
            if not isinstance(fault, DiskError):
                self.ledger.forget(key)  # what was written down is no good to hold the next one against
            if isinstance(fault, DamagedError):
                (self.to / key).unlink(missing_ok=True)
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _fetch(self, path: str, key: str, find_fault: Callable[[Path], str]) -> None:
        """Bring one file below the source here, or check the one that is here, and write down what it was."""
        known, name = self.ledger.of(key), Path(key).name
        expected = known.get("sha256") or self._sums_beside(path, key).get(name, "")
        target = self.to / key
        fetched = fetch_file(
            self._address(path), target, find_fault=find_fault, sha256=expected, stop=self.stop, moved=self._moved
        )
        if not known:
            self.ledger.note(key, **asdict(fetched))

    def _sums_beside(self, path: str, key: str) -> dict[str, str]:
        """Published checksums of a folder of the source, where there are any."""
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

    def _moved(self, size: int) -> None:
        with self.counting:
            self.bytes_moved += size

    def _line(self, split: str, archives: Sequence[Archive]) -> str:
        entries = [self.ledger.of(archive.key) for archive in archives if archive.split == split]
        if not self.extract:
            return f"{split}: {len(entries)} archives, {sum(entry['size'] for entry in entries) / 1e9:.2f} GB"
        clips, empty, other = (sum(entry[key] for entry in entries) for key in ("clips", "empty", "other"))
        text = f"{split}: {len(entries)} archives, {clips} clips, {empty} of them of 0 bytes"
        replaced, conflicts = self.ledger.replaced(split), [name for entry in entries for name in entry["conflicts"]]
        text += f", {len(replaced)} replaced" if replaced is not None else ""
        text += f", {other} other files left out" if other else ""
        return text + (f", {len(conflicts)} there before with other bytes ({LEDGER_NAME})" if conflicts else "")


def _place(source: Path, target: Path) -> bool:
    """Give a clip its name; False if there is another with that name already, which stays."""
    if target.exists() and not same_content(source, target):
        return False
    os.replace(source, target)
    return True


def _source(text: str) -> str:
    """A base URL without its last slash, or the path of a folder. UsageError."""
    if is_url(text):
        return text.rstrip("/")
    folder = Path(unquote(urlsplit(text).path) if text.startswith("file:") else text).absolute()
    if not folder.is_dir():
        raise UsageError(f"--source {text}: neither a URL (https://...) nor a folder; it stands for {cvdf.BASE_URL}")
    return str(folder)


@contextlib.contextmanager
def _lock(to: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        with as_disk_error(to):
            held.enter_context(
                lock_file(to / LOCK_NAME, f"{to}: another run is downloading here; wait for it or stop it")
            )
        yield
