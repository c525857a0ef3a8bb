"""prep.sqlite: what is known about every video of a preparation. Only the parent process writes it, a row at a time."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from video_swinv2.errors import UsageError, UserError

STATE_NAME = "prep.sqlite"
REASONS = {
    "missing": "the source is not there",
    "empty": "the source has 0 bytes",
    "not_video": "no container FFmpeg knows, or no video in it",
    "no_frames": "a video without one frame that decodes",
    "decode_error": "fewer than nine in ten frames decode, or the source cannot be read",
    "timeout": "not done within a time far beyond its duration",
    "crashed": "the process died or ran out of memory",
    "encode_error": "the encoder refused it",
    "check_failed": "what was written did not read back as meant",
}
COLUMNS = """
    split TEXT NOT NULL, listed_split TEXT NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL, label TEXT NOT NULL,
    source TEXT NOT NULL, target TEXT NOT NULL UNIQUE, status TEXT NOT NULL DEFAULT 'pending', reason TEXT, detail TEXT,
    source_size INTEGER, source_mtime_ns INTEGER, source_sha256 TEXT, sha256 TEXT, frames INTEGER, fps REAL,
    height INTEGER, width INTEGER, codec TEXT, duration_seconds REAL, settings_hash TEXT, versions TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, seconds REAL, finished_at REAL
"""


@dataclass(frozen=True)
class Wanted:
    """A video that the listing asks for; `target` is the prepared file, relative to the data set."""

    split: str
    position: int
    name: str
    label: str
    source: str
    target: str


@dataclass(frozen=True)
class SplitCount:
    """Of one split: videos listed, and how many of them are ok, failed (by reason) and still pending."""

    listed: int
    ok: int
    pending: int
    failed: dict[str, int]


class State:
    """The open file; a context manager. A change survives a kill -9 as soon as its call has returned."""

    def __init__(self, out: Path, *, create: bool = False) -> None:
        self.path = out / STATE_NAME
        if not create and not self.path.is_file():
            raise UsageError(f"{out}: no {STATE_NAME}, so nothing was prepared here; run `prepare SRC {out}` first")
        try:
            self._db = sqlite3.connect(self.path, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            # A write-ahead log: readers (status) and the writer do not wait for each other, commits need no sync.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute(
                f"CREATE TABLE IF NOT EXISTS clips (id INTEGER PRIMARY KEY, {COLUMNS}, UNIQUE(listed_split, name))"
            )
            self._db.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        except sqlite3.Error as fault:
            raise UserError(f"{self.path}: {fault}; restore it or remove it to prepare afresh") from fault

    def __enter__(self) -> State:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def fact(self, key: str) -> str | None:
        """A remembered value of the whole preparation."""
        row = self._db.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row["value"])

    def remember(self, key: str, value: str) -> None:
        """Keep a value of the whole preparation."""
        self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def sync(self, wanted: Sequence[Wanted]) -> list[str]:
        """Make the rows those of the listing, in one transaction; returns the targets that are wanted no longer.

        A row whose source, label and target stay keeps what is known about it; any other starts as pending.
        """
        self._db.execute("BEGIN IMMEDIATE")
        known = {(row["listed_split"], row["name"]): row for row in self._db.execute("SELECT * FROM clips")}
        gone = {row["target"] for row in known.values()}
        # Moved out of the way first: targets are unique and may be exchanged between rows.
        self._db.execute("UPDATE clips SET target = 'old ' || id")
        for item in wanted:
            row = known.pop((item.split, item.name), None)
            gone.discard(item.target)
            if row is not None and (row["source"], row["target"]) == (item.source, item.target):
                change = "UPDATE clips SET position = ?, label = ?, target = ? WHERE id = ?"
                self._db.execute(change, (item.position, item.label, item.target, row["id"]))
                continue
            if row is not None:
                self._db.execute("DELETE FROM clips WHERE id = ?", (row["id"],))
            self._db.execute(
                "INSERT INTO clips (split, listed_split, position, name, label, source, target) VALUES (?,?,?,?,?,?,?)",
                (item.split, item.split, item.position, item.name, item.label, item.source, item.target),
            )
        self._db.executemany("DELETE FROM clips WHERE id = ?", [(row["id"],) for row in known.values()])
        self._db.execute("COMMIT")
        return sorted(gone)

    def rows(self, status: str | None = None) -> Iterator[sqlite3.Row]:
        """All rows, or those of one status, in the order listed."""
        where = "" if status is None else "WHERE status = ?"
        values = () if status is None else (status,)
        return iter(self._db.execute(f"SELECT * FROM clips {where} ORDER BY split, position", values).fetchall())

    def reset(self, ids: Iterable[int]) -> None:
        """Make rows pending again; their number of attempts stays."""
        self._db.execute("BEGIN IMMEDIATE")
        change = "UPDATE clips SET status = 'pending', reason = NULL, detail = NULL, sha256 = NULL WHERE id = ?"
        self._db.executemany(change, [(number,) for number in ids])
        self._db.execute("COMMIT")

    def finish(self, row: int, values: Mapping[str, Any]) -> None:
        """Write what became of a video: column names of the table to values."""
        known = dict(values) | {"finished_at": time.time()}
        columns = ", ".join(f"{column} = ?" for column in known)
        change = f"UPDATE clips SET {columns}, attempts = attempts + 1 WHERE id = ?"
        self._db.execute(change, (*known.values(), row))

    def move(self, split_of: Mapping[int, str]) -> None:
        """Put rows into other splits, all or none."""
        self._db.execute("BEGIN IMMEDIATE")
        self._db.executemany("UPDATE clips SET split = ? WHERE id = ?", [(s, row) for row, s in split_of.items()])
        self._db.execute("COMMIT")

    def counts(self) -> dict[str, SplitCount]:
        """Per split, train val test first, what became of its videos so far."""
        query = "SELECT split, status, reason, COUNT(*) AS n FROM clips GROUP BY split, status, reason"
        found: dict[str, dict[tuple[str, str | None], int]] = {}
        for row in self._db.execute(query):
            found.setdefault(row["split"], {})[row["status"], row["reason"]] = row["n"]
        return {split: _count(found[split]) for split in sorted(found, key=split_order)}

    def clips_per_second(self, window_seconds: float = 60.0) -> float | None:
        """The rate over the last minute of work, None before the second video."""
        last = self._db.execute("SELECT MAX(finished_at) AS t FROM clips").fetchone()["t"]
        if last is None:
            return None
        query = "SELECT COUNT(*) AS n, MIN(finished_at) AS t FROM clips WHERE finished_at > ?"
        row = self._db.execute(query, (last - window_seconds,)).fetchone()
        return (row["n"] - 1) / (last - row["t"]) if row["n"] > 1 and last > row["t"] else None


def split_order(split: str) -> tuple[int, str]:
    """Sorts train, val, test before any other split."""
    usual = ("train", "val", "test")
    return (usual.index(split) if split in usual else len(usual), split)


def _count(found: Mapping[tuple[str, str | None], int]) -> SplitCount:
    failed = {str(reason): n for (status, reason), n in sorted(found.items(), key=str) if status == "failed"}
    by_status = {status: n for (status, _), n in found.items() if status != "failed"}
    return SplitCount(sum(found.values()), by_status.get("ok", 0), by_status.get("pending", 0), failed)
