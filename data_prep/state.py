"""prep.sqlite: what is known about every video of a preparation. Only the parent process writes it, a row at a time."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from data_prep.outcomes import VideoCounts, split_order
from video_swinv2.errors import UsageError, UserError

STATE_NAME = "prep.sqlite"
# Raised with the columns or indexes below; kept in the file as SQLite's user_version.
FORM = 2
COLUMNS = """
    split TEXT NOT NULL, listed_split TEXT NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL, label TEXT NOT NULL,
    source TEXT NOT NULL, target TEXT NOT NULL UNIQUE, origin TEXT NOT NULL DEFAULT '',
    start_seconds REAL, end_seconds REAL, status TEXT NOT NULL DEFAULT 'pending', reason TEXT, detail TEXT,
    source_size INTEGER, source_mtime_ns INTEGER, source_sha256 TEXT, sha256 TEXT, frames INTEGER, fps REAL,
    height INTEGER, width INTEGER, codec TEXT, duration_seconds REAL, settings_hash TEXT, versions TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, seconds REAL, finished_at REAL
"""
INDEXES = {
    "clips_in_order": "split, position",
    "clips_by_status": "status, split, position",
    "clips_account": "split, label, status, reason",  # all that `counts` and `classes` read
    "clips_finished": "finished_at, status",
}
PAGE_ROWS = 1000
BUSY_SECONDS = 60.0
CACHE_KIB = 32 * 1024  # with SQLite's own 2 MiB the sync of a Kinetics-sized list takes half as long again


@dataclass(frozen=True)
class PlannedVideo:
    """A video that the listing asks for; `target` is the prepared file, relative to the data set.

    `origin` names the video it was cut from ('' where unknown): a YouTube id, a UCF101 group. `start` and `end`, in
    seconds, are the part of the source to cut out; None for all of it. `excluded` says why it is not wanted after all.
    """

    split: str
    position: int
    name: str
    label: str
    source: str
    target: str
    origin: str = ""
    start: float | None = None
    end: float | None = None
    excluded: str = ""


class PreparationState:
    """The open file; a context manager. A change survives a kill -9, and a power cut, as soon as its call has returned.

    `path` is for the state of a shard, which lies elsewhere. Every call raises UserError, naming the file, where SQLite
    cannot read or write it.
    """

    def __init__(self, out: Path, *, create: bool = False, path: Path | None = None) -> None:
        self.path = path or out / STATE_NAME
        if not create and not self.path.is_file():
            raise self._nothing_here(out)
        with self._faults():
            self._db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            # A rollback journal, not a write-ahead log: a log is shared through memory, so that a `status` on another
            # machine of a cluster would misread or even damage it. Deleting the journal is the commit.
            # FULL: a commit is on the disk when the call returns. A worker has synced the video and given it its name
            # before it reports it, so that the video is on the disk before the row that claims it; should a file system
            # lose the new name alone, the next run misses the file and makes it again.
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA journal_mode=DELETE")
            for cache in ("cache_size", "temp.cache_size"):
                self._db.execute(f"PRAGMA {cache}={-CACHE_KIB}")
            ready = self._bring_up_to_date(create)
        if not ready:
            self._db.close()
            raise self._nothing_here(out)

    def __enter__(self) -> PreparationState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def _nothing_here(self, out: Path) -> UsageError:
        return UsageError(f"{out}: no {self.path.name}, so nothing was prepared here; run `prepare SRC {out}` first")

    def _bring_up_to_date(self, create: bool) -> bool:
        """Make the tables, or add what a state of an older form lacks; False where there are none and none to make."""
        form = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if form == FORM:
            return True
        if form > FORM:
            raise UserError(f"{self.path}: made by a newer version of this program; use that version, or a new folder")
        with self._change():
            known = {row["name"] for row in self._db.execute("PRAGMA table_info(clips)")}
            if not known and not create:
                return False
            self._db.execute(
                f"CREATE TABLE IF NOT EXISTS clips (id INTEGER PRIMARY KEY, {COLUMNS}, UNIQUE(listed_split, name))"
            )
            for column in (text.strip() for text in COLUMNS.split(",")):
                if known and column.split()[0] not in known:
                    self._db.execute(f"ALTER TABLE clips ADD COLUMN {column}")
            for name, columns in INDEXES.items():
                self._db.execute(f"CREATE INDEX IF NOT EXISTS {name} ON clips ({columns})")
            self._db.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(f"PRAGMA user_version = {FORM}")
        return True

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """What SQLite has to complain of, as one line that says what to do."""
        try:
            yield
        except sqlite3.Error as fault:
            words = str(fault)
            mend = "restore it, or remove it to prepare afresh"
            if "full" in words or "I/O" in words:
                mend = "free space or mend the disk, then run again to go on"
            elif "locked" in words:
                mend = "another program keeps it locked; wait for that or stop it"
            elif "readonly" in words or "unable to open" in words:
                mend = "it and its folder must be writable"
            raise UserError(f"{self.path}: {words}; {mend}") from fault

    @contextlib.contextmanager
    def _change(self) -> Iterator[None]:
        """One transaction: all of what is done in the block, or nothing."""
        with self._faults():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back by itself when the disk was full
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _select(self, query: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        with self._faults():
            return self._db.execute(query, values).fetchall()

    def fact(self, key: str) -> str | None:
        """A remembered value of the whole preparation."""
        rows = self._select("SELECT value FROM facts WHERE key = ?", (key,))
        return str(rows[0]["value"]) if rows else None

    def remember(self, key: str, value: str) -> None:
        """Keep a value of the whole preparation."""
        with self._change():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def sync(self, wanted: Iterable[PlannedVideo]) -> list[str]:
        """Make the rows those of the listing, in one transaction; returns the targets that are wanted no longer.

        A row keeps what is known about it while its source, its part of it and its target stay; any other starts as
        pending, an excluded one as excluded. A row keeps its place in a split made by `move`.
        """
        with self._change():
            self._db.execute(LISTING)
            self._db.executemany(
                f"INSERT INTO listing VALUES ({', '.join('?' * 10)})",
                (
                    (w.split, w.position, w.name, w.label, w.source, w.target, w.origin, w.start, w.end, w.excluded)
                    for w in wanted
                ),
            )
            # After the rows, which takes half the time of an index that grows with them.
            self._db.execute("CREATE UNIQUE INDEX temp.listed ON listing (split, name)")
            gone = self._db.execute(GONE).fetchall()
            for change in (DROP, START_AFRESH, TAKE_OVER):
                self._db.execute(change)
            self._db.execute("DROP TABLE listing")
        return [row["target"] for row in gone]

    def rows(self, status: str | None = None, columns: Sequence[str] = ("*",)) -> Iterator[sqlite3.Row]:
        """All rows, or those of one status, in the order listed, with the `columns` asked for and id, split, position.

        Read a page at a time: memory does not grow with the list and rows may be written in between. A row that gets
        the status while the iteration is past it is not visited.
        """
        chosen = ", ".join(dict.fromkeys(("id", "split", "position", *columns)))
        where = "(split, position, id) > (?, ?, ?)" + ("" if status is None else " AND status = ?")
        query = f"SELECT {chosen} FROM clips WHERE {where} ORDER BY split, position, id LIMIT {PAGE_ROWS}"
        last: tuple[str, int, int] = ("", -1, -1)
        while page := self._select(query, last if status is None else (*last, status)):
            yield from page
            last = (page[-1]["split"], page[-1]["position"], page[-1]["id"])

    def sample(self, most: int, status: str = "pending") -> list[sqlite3.Row]:
        """At most so many rows of a status, evenly spread over the list."""
        query = "SELECT id FROM clips WHERE status = ? ORDER BY split, position, id"
        ids = [row["id"] for row in self._select(query, (status,))]
        count = min(most, len(ids))
        chosen = [ids[(2 * place + 1) * len(ids) // (2 * count)] for place in range(count)]
        return [self._select("SELECT * FROM clips WHERE id = ?", (number,))[0] for number in chosen]

    def reset(self, ids: Iterable[int]) -> None:
        """Make rows pending again; their number of attempts stays."""
        change = "UPDATE clips SET status = 'pending', reason = NULL, detail = NULL, sha256 = NULL WHERE id = ?"
        with self._change():
            self._db.executemany(change, ((number,) for number in ids))

    def finish(self, row: int, values: Mapping[str, Any]) -> None:
        """Write what became of a video: column names of the table to values."""
        known = dict(values) | {"finished_at": time.time()}
        columns = ", ".join(f"{column} = ?" for column in known)
        with self._change():
            change = f"UPDATE clips SET {columns}, attempts = attempts + 1 WHERE id = ?"
            self._db.execute(change, (*known.values(), row))

    def adopt(self, rows: Iterable[sqlite3.Row]) -> None:
        """Add whole rows of other states as they are, all or none. UserError for one that is here already."""
        with self._change():
            for row in rows:
                known = {key: row[key] for key in row.keys() if key != "id"}  # noqa: SIM118 - a Row iterates its values
                places = ", ".join("?" * len(known))
                self._db.execute(f"INSERT INTO clips ({', '.join(known)}) VALUES ({places})", tuple(known.values()))

    def move(self, split_of: Mapping[int, str]) -> None:
        """Put rows into other splits, all or none."""
        with self._change():
            self._db.executemany("UPDATE clips SET split = ? WHERE id = ?", ((s, row) for row, s in split_of.items()))

    def counts(self) -> dict[str, VideoCounts]:
        """Per split, train val test first, what became of its videos so far."""
        found = self._account("split")
        return {split: found[split] for split in sorted(found, key=split_order)}

    def classes(self) -> dict[str, VideoCounts]:
        """Per class, over all splits, what became of its videos so far."""
        return self._account("label")

    def _account(self, key: str) -> dict[str, VideoCounts]:
        """One pass over an index that holds all it needs, in its own order: a quarter of a second for Kinetics."""
        query = "SELECT split, label, status, reason, COUNT(*) AS n FROM clips GROUP BY split, label, status, reason"
        found: dict[str, dict[tuple[str, str], int]] = {}
        for row in self._select(query):
            sums = found.setdefault(row[key], {})
            what = (row["status"], row["reason"] or "")
            sums[what] = sums.get(what, 0) + row["n"]
        return {name: _count(sums) for name, sums in found.items()}

    def last_finished(self) -> float | None:
        """When the newest outcome was written, in seconds of the epoch."""
        when = self._select("SELECT MAX(finished_at) AS t FROM clips")[0]["t"]
        return None if when is None else float(when)

    def finished_since(self, moment: float) -> tuple[int, float]:
        """How many outcomes were written after `moment`, and when the first of them was (`moment` if none)."""
        row = self._select("SELECT COUNT(*) AS n, MIN(finished_at) AS t FROM clips WHERE finished_at > ?", (moment,))[0]
        return row["n"], moment if row["t"] is None else row["t"]

    def outcomes(self) -> Iterator[tuple[float, bool]]:
        """(when, whether it was prepared) of every video whose outcome is known, in the order they ended."""
        # The plus keeps SQLite from the index by status, after which it would have to sort.
        where = "finished_at > 0 AND +status IN ('ok', 'failed')"
        query = f"SELECT finished_at, status FROM clips WHERE {where} ORDER BY finished_at"
        return ((row["finished_at"], row["status"] == "ok") for row in self._select(query))

    def measures(self, columns: Sequence[str]) -> Iterator[tuple[float | None, ...]]:
        """Columns of numbers of the videos that were prepared, in no order."""
        return map(tuple, self._select(f"SELECT {', '.join(columns)} FROM clips WHERE status = 'ok'"))


LISTING = """
    CREATE TEMP TABLE listing (split TEXT, position INTEGER, name TEXT, label TEXT, source TEXT, target TEXT,
    origin TEXT, start_seconds REAL, end_seconds REAL, excluded TEXT)
"""
# A video that was made and is excluded now goes as well.
GONE = """
    SELECT target FROM clips WHERE target NOT IN (SELECT target FROM listing WHERE excluded = '')
    AND status <> 'excluded' ORDER BY target
"""
DROP = """
    DELETE FROM clips WHERE NOT EXISTS
    (SELECT 1 FROM listing l WHERE l.split = listed_split AND l.name = clips.name)
"""
# Compared with IS: no start or end is NULL, which equals nothing. The targets are moved out of the way: they are unique
# and may be exchanged between rows.
START_AFRESH = """
    UPDATE clips SET status = 'pending', reason = NULL, detail = NULL, sha256 = NULL, target = 'old ' || id
    WHERE NOT EXISTS (
        SELECT 1 FROM listing l WHERE l.split = listed_split AND l.name = clips.name AND l.source = clips.source
        AND l.target = clips.target AND l.start_seconds IS clips.start_seconds AND l.end_seconds IS clips.end_seconds
        AND (l.excluded <> '') = (clips.status = 'excluded')
    )
"""
TAKE_OVER = """
    INSERT INTO clips
        (split, listed_split, position, name, label, source, target, origin, start_seconds, end_seconds, status, reason)
    SELECT split, split, position, name, label, source, target, origin, start_seconds, end_seconds,
        CASE excluded WHEN '' THEN 'pending' ELSE 'excluded' END, NULLIF(excluded, '')
    FROM listing WHERE true
    ON CONFLICT (listed_split, name) DO UPDATE SET
        position = excluded.position, label = excluded.label, source = excluded.source, target = excluded.target,
        origin = excluded.origin, start_seconds = excluded.start_seconds, end_seconds = excluded.end_seconds,
        status = CASE excluded.status WHEN 'excluded' THEN 'excluded' ELSE clips.status END,
        reason = CASE excluded.status WHEN 'excluded' THEN excluded.reason ELSE clips.reason END
    WHERE excluded.status = 'excluded' OR (clips.position, clips.label, clips.target, clips.origin)
        IS NOT (excluded.position, excluded.label, excluded.target, excluded.origin)
"""


def _count(found: Mapping[tuple[str, str], int]) -> VideoCounts:
    by_reason = {
        kind: {reason: n for (status, reason), n in sorted(found.items()) if status == kind}
        for kind in ("failed", "excluded")
    }
    simple = {status: n for (status, _), n in found.items()}
    return VideoCounts(
        sum(found.values()), simple.get("ok", 0), simple.get("pending", 0), by_reason["failed"], by_reason["excluded"]
    )
