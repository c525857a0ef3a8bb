"""What `verify` finds, and verify.sqlite, which holds the findings of a run that may be interrupted and resumed."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from video_swinv2.errors import UserError

# What can be wrong with a file or, for the last two, with a list. The words are written to verify.csv; the texts are
# shown beside them.
FAULTS = {
    "missing": "listed, but there is no file",
    "empty": "has 0 bytes",
    "not_video": "FFmpeg cannot open it",
    "form": "not a single H.264 stream with 4:2:0 pictures",
    "size": "height or width differ from those written",
    "frames": "the number of frames differs from that written",
    "cut_short": "the file ends before its last frame",
    "no_frames": "no frame decodes",
    "decode_error": "not every frame decodes",
    "duration": "the duration differs from that written",
    "hash": "the bytes differ from those written",
    "timeout": "not read within a time limit far beyond its duration",
    "crashed": "the process reading it died",
    "list": "a list was removed or changed since the preparation",
    "fingerprint": "some file of the split has changed since the preparation",
}
SAVE_EVERY_SECONDS = 1.0


@dataclass(frozen=True)
class Finding:
    """The result for one file, and a row of verify.sqlite.

    `reason` is '' if nothing is wrong, otherwise a key of FAULTS. `size` (in bytes) and `mtime_ns` identify the version
    of the file that was checked; both are None if there is no file. `sha256` is set at level hash only.
    """

    name: str
    reason: str = ""
    detail: str = ""
    size: int | None = None
    mtime_ns: int | None = None
    sha256: str | None = None


class VerifyLedger:
    """verify.sqlite: the findings so far, by file and level, from which an interrupted run can be resumed.

    A context manager for one run at one level. Findings are committed about once per second and at the end, also after
    Ctrl-C. Those that a crash loses are checked again. The table `ended` holds the levels whose last run finished:

        begin, level not in `ended`   the last run was interrupted: its findings are kept
        begin, level in `ended`       its findings are deleted, and so is the entry in `ended`
        end                           the level is added to `ended`, in the same transaction as the last findings
    """

    def __init__(self, path: Path, level: str) -> None:
        self._path, self._level = path, level
        self._saved = time.monotonic()

    def __enter__(self) -> VerifyLedger:
        try:
            # isolation_level=None: BEGIN and COMMIT are executed explicitly below.
            self._db = sqlite3.connect(self._path, isolation_level=None)
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS files (path TEXT, level TEXT, reason TEXT, detail TEXT, size INTEGER,"
                " mtime_ns INTEGER, sha256 TEXT, PRIMARY KEY (path, level))"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS ended (level TEXT PRIMARY KEY)")
        except sqlite3.Error as error:
            raise self._error(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Commit even after an error or Ctrl-C: every finding in the open transaction is complete.
        try:
            if self._db.in_transaction:
                self._db.execute("COMMIT")
        except sqlite3.Error as commit_error:
            raise self._error(commit_error) from error
        finally:
            self._db.close()
        if isinstance(error, sqlite3.Error):
            raise self._error(error) from error

    def _error(self, error: Exception) -> UserError:
        """The error for the user in place of one of SQLite."""
        return UserError(f"{self._path}: {error}; make its folder writable, or remove the file if it is damaged")

    def begin(self) -> dict[str, Finding]:
        """Start a run. Returns the findings of an interrupted run by name; those of a finished run are deleted."""
        self._db.execute("BEGIN IMMEDIATE")
        if self._db.execute("SELECT 1 FROM ended WHERE level = ?", (self._level,)).fetchone():
            self._db.execute("DELETE FROM files WHERE level = ?", (self._level,))
            self._db.execute("DELETE FROM ended WHERE level = ?", (self._level,))
        self._db.execute("COMMIT")
        query = "SELECT path, reason, detail, size, mtime_ns, sha256 FROM files WHERE level = ?"
        findings = (Finding(*row) for row in self._db.execute(query, (self._level,)))
        # Whatever else the file may hold by accident or design: that file is checked again.
        return {finding.name: finding for finding in findings if _is_finding(finding)}

    def write(self, found: Finding) -> None:
        """Record a finding. It is on disk after the next commit, about a second later."""
        # One transaction spans the findings of a second: a commit for each file would take longer than checking its
        # header.
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
        row = (found.name, self._level, found.reason, found.detail, found.size, found.mtime_ns, found.sha256)
        self._db.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        if time.monotonic() > self._saved + SAVE_EVERY_SECONDS:
            self._db.execute("COMMIT")
            self._saved = time.monotonic()

    def end(self) -> None:
        """Mark the run as finished, so that the next one checks everything again."""
        self._db.execute("INSERT OR REPLACE INTO ended VALUES (?)", (self._level,))


def _is_finding(row: Finding) -> bool:
    """Whether the values of a row of verify.sqlite are those of a finding. SQLite stores any type in any column."""
    texts = (row.name, row.detail, row.sha256 or "")
    return all(isinstance(text, str) for text in texts) and (row.reason == "" or row.reason in FAULTS)
