"""The ledger of a download, archives.json: size and hash of every fetched file, and what was extracted from it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from video_swinv2.errors import UsageError
from video_swinv2.files import write_json
from video_swinv2.records import Record, read_record

LEDGER_NAME = "archives.json"
_Count = Annotated[int, Field(ge=0)]


class _LedgerEntry(Record):
    """What archives.json holds of a file: the fields of FetchedFile, and for an archive what was extracted from it."""

    address: str
    size: _Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    etag: str = ""
    last_modified: str = ""
    clips: _Count = 0
    empty: _Count = 0
    other: _Count = 0
    conflicts: list[str] = Field(default_factory=list)


class _LedgerContent(Record):
    """The content of archives.json; see DownloadLedger."""

    dataset: str
    files: dict[str, _LedgerEntry] = Field(default_factory=dict)
    replaced: dict[str, list[str]] = Field(default_factory=dict)


class DownloadLedger:
    """archives.json: size and hash of every fetched file, and what was extracted from it. Thread-safe.

    The JSON object has three keys. `dataset` is the version of Kinetics. `files` maps the path of a file below the
    download folder to its entry. `replaced` maps a split to the videos that the replacement archive has replaced.

    Raises UsageError if the folder holds another version of Kinetics, UserError if the ledger is not as it was written.
    """

    def __init__(self, folder: Path, dataset: str) -> None:
        self._path = folder / LEDGER_NAME
        self._lock = threading.Lock()
        self._content: dict[str, Any] = {"dataset": dataset, "files": {}, "replaced": {}}
        if self._path.exists():
            record = read_record(self._path, _LedgerContent, fix="restore or remove it")
            # Unset: `clips`, for example, is a key only of archives that have been extracted.
            self._content |= record.model_dump(exclude_unset=True)
        if self._content["dataset"] != dataset:
            problem = f"contains {self._content['dataset']}; give {dataset} a folder of its own"
            raise UsageError(f"{folder}: {problem}, since `prepare` finds videos by name")

    def entry(self, key: str) -> dict[str, Any]:
        """A copy of the entry of a file, given its path below the download folder; empty if there is none."""
        with self._lock:
            return dict(self._content["files"].get(key, {}))

    def update(self, key: str, **facts: object) -> None:
        """Add facts to the entry of a file. They are on disk when the call returns."""
        with self._lock:
            self._content["files"].setdefault(key, {}).update(facts)
            write_json(self._path, self._content)

    def forget(self, key: str) -> None:
        """Remove the entry of a file that turned out to be bad, so that its replacement may have another hash."""
        with self._lock:
            self._content["files"].pop(key, None)
            write_json(self._path, self._content)

    def replaced(self, split: str) -> list[str] | None:
        """The videos of the split that were replaced; None if the replacements of the split are still to be made."""
        names: list[str] | None = self._content["replaced"].get(split)
        return names

    def record_replaced(self, split: str, names: Sequence[str]) -> None:
        """Record which videos of a split were replaced, so that later runs do not replace them again."""
        with self._lock:
            self._content["replaced"][split] = list(names)
            write_json(self._path, self._content)
