"""The state of a preparation: prep.sqlite, which records what is known about every listed video.

There is one row per listed video. Its status changes like this:

    (new row) --> pending --> ok          the prepared file is on disk and its sha256 is in the row
                     ^   `--> failed      `reason` and `detail` say why
                     |         |
                     `---------'          mark_pending: the settings or the source changed, the prepared file is gone
                                          or damaged, or --retry-failed asks for it
    ok <--> failed as `damaged`           `verify` found the prepared file damaged, or later intact again
    (new row) --> excluded                listed, but not to be prepared; may become pending if the lists change

A run can be killed at any moment, because of the order in which things are written:

1. A worker writes the video under a hidden name, syncs it to disk, and only then renames it to its target.
2. It then reports to the parent. Only the parent writes to prep.sqlite, in one committed transaction per video.

A run that is killed before the rename leaves a hidden partial file, which the next run deletes. A run that is killed
between the rename and the commit leaves a good file whose row is still pending, and the next run prepares that video
again. A row never says `ok` before its file is complete and on disk. So at most the videos in progress are prepared
twice, and none is lost.

The table of videos is called `clips`. A second table, `facts`, holds values that concern the whole preparation, such as
its settings. The SQL statements of sync_with_plan come after the class.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from data_prep.outcomes import VideoCounts, split_order
from video_swinv2.data.trees import check_split_name
from video_swinv2.errors import UsageError, UserError
from video_swinv2.files import path_under

Item = TypeVar("Item")

STATE_NAME = "prep.sqlite"
# To be incremented whenever the columns or indexes below change. It is stored in the file as SQLite's user_version, and
# older files are migrated when they are opened (_migrate). For that, a new column must be nullable or have a default,
# since SQLite cannot add any other to a table, and its definition must not contain a comma, at which COLUMNS is split.
SCHEMA_VERSION = 3
# `split` is where a video belongs now, `listed_split` is the split of its list, which differs after move_to_splits.
# `position` is its place in the list. `origin` is its group by its list or its name, and `given_group`, which takes
# precedence, the one that `split` was given; '' for none (group_of_row). The columns from source_size to
# duration_seconds, and `seconds`, are fields of jobs.Outcome; `settings_hash` and `versions` say with what the outcome
# was produced. `finished_at` is in seconds since the epoch.
COLUMNS = """
    split TEXT NOT NULL, listed_split TEXT NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL, label TEXT NOT NULL,
    source TEXT NOT NULL, target TEXT NOT NULL UNIQUE, origin TEXT NOT NULL DEFAULT '',
    given_group TEXT NOT NULL DEFAULT '', start_seconds REAL, end_seconds REAL,
    status TEXT NOT NULL DEFAULT 'pending', reason TEXT, detail TEXT,
    source_size INTEGER, source_mtime_ns INTEGER, source_sha256 TEXT, sha256 TEXT, frames INTEGER, fps REAL,
    height INTEGER, width INTEGER, codec TEXT, duration_seconds REAL, settings_hash TEXT, versions TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, seconds REAL, finished_at REAL
"""
DEFINITIONS = [text.split() for text in COLUMNS.split(",")]
COLUMN_TYPES = {"id": "INTEGER"} | {column: kind for column, kind, *_ in DEFINITIONS}
# What must be true of a column. The file may have been damaged or made by somebody else, and its rows are trusted with
# paths and numbers. SQLite itself takes the type of a column for a preference, and stores any other value as well.
RULES = (
    *(
        (name, f"typeof({name}) = '{kind.lower()}'" + ("" if "NOT" in rest else f" OR {name} IS NULL"))
        for name, kind, *rest in DEFINITIONS
    ),
    ("id", "id > 0"),
    ("position", "position >= 0"),
    ("target", "target GLOB 'videos/?*' AND '/' || target || '/' NOT GLOB '*/../*'"),
    ("status", "status IN ('pending', 'ok', 'failed', 'excluded')"),
    ("finished_at", "finished_at BETWEEN 0 AND 1e11"),  # until the year 5138
    # Of a video that has failed, numbers may be whatever its file claims.
    *(
        (name, f"status <> 'ok' OR {name} BETWEEN 0 AND 1e15")
        for name in ("source_size", "frames", "fps", "height", "width", "duration_seconds", "seconds")
    ),
)
RESTORE = "restore it, or remove it to prepare from scratch"
# Each index serves queries of the class below: rows(), rows(status), _counts_by() and outcomes().
INDEXES = {
    "clips_in_order": "split, position",
    "clips_by_status": "status, split, position",
    "clips_account": "split, label, status, reason",  # has all columns of the query, so the table is not read
    "clips_finished": "finished_at, status",
}
DAMAGED = "damaged"  # a key of outcomes.REASONS
GROUP_COLUMNS = ("origin", "given_group")
PAGE_ROWS = 1000
BUSY_SECONDS = 60.0  # how long to wait for a lock that another process holds, such as `status`
CACHE_KIB = 32 * 1024  # with SQLite's default of 2 MiB, syncing a Kinetics-sized list takes 1.5 times as long


@dataclass(frozen=True)
class PlannedVideo:
    """A video that the lists name, and where its prepared file belongs.

    `source` is an absolute path, `target` is relative to the data set. `position` is its place in the list of `split`.
    `group` is what its list says or the video it was cut from, such as a YouTube id; '' if unknown. `start` and `end`,
    in seconds, bound the segment of the source to cut out; None for the whole source. `excluded` is the reason why the
    video is listed but not to be prepared; '' if it is to be prepared.
    """

    split: str
    position: int
    name: str
    label: str
    source: str
    target: str
    group: str = ""
    start: float | None = None
    end: float | None = None
    excluded: str = ""


class PreparationState:
    """An open prep.sqlite; a context manager. A change survives kill -9 and power loss once its call has returned.

    `path` is the file if it is not OUT/prep.sqlite, as for a shard. With `create`, the file is created if it does not
    exist; without, that raises UsageError. Every method raises UserError, naming the file, if SQLite cannot read or
    write it. Opening it also raises UserError if it holds what no preparation has written.
    """

    def __init__(self, out: Path, *, create: bool = False, path: Path | None = None) -> None:
        self.path = path or path_under(out, STATE_NAME)
        if not create and not self.path.is_file():
            raise self._nothing_prepared(out)
        with self._sqlite_errors():
            # isolation_level=None: we write BEGIN and COMMIT ourselves (see _transaction).
            self._db = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            # synchronous=FULL: a commit is on disk when the call returns. The video has been synced and renamed before
            # its row is written, so it is on disk before the row that refers to it. Should a file system lose only the
            # rename, the next run notices that the file is missing and prepares the video again.
            self._db.execute("PRAGMA synchronous=FULL")
            # A rollback journal rather than a write-ahead log (WAL). WAL keeps its index in shared memory, so `status`
            # on another machine of a cluster would misread the file or even damage it. With a rollback journal, a
            # transaction is committed by deleting the journal.
            self._db.execute("PRAGMA journal_mode=DELETE")
            # Negative numbers are KiB, positive ones would be pages. Temporary tables have a cache of their own.
            for cache in ("cache_size", "temp.cache_size"):
                self._db.execute(f"PRAGMA {cache}={-CACHE_KIB}")
            try:
                if not self._migrate(create):
                    raise self._nothing_prepared(out)
                self._check_schema()
                self._check_rows()
            except BaseException:
                self._db.close()
                raise

    def __enter__(self) -> PreparationState:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    def _nothing_prepared(self, out: Path) -> UsageError:
        return UsageError(f"{out}: no {self.path.name}, so nothing was prepared here; run `prepare SRC {out}` first")

    def _migrate(self, create: bool) -> bool:
        """Create the tables, or add what an older schema lacks.

        Returns False, and changes nothing, if there are no tables and `create` is False.
        """
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version == SCHEMA_VERSION:
            return True
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{self.path}: written by a newer version of video-swinv2; use that version, or a new folder"
            )
        # In one transaction, so a run that is killed here leaves the old schema with its old version.
        with self._transaction():
            known = {row["name"] for row in self._db.execute("PRAGMA table_info(clips)")}
            if not known and not create:
                return False
            self._db.execute(
                f"CREATE TABLE IF NOT EXISTS clips (id INTEGER PRIMARY KEY, {COLUMNS}, UNIQUE(listed_split, name))"
            )
            for column, *rest in DEFINITIONS:
                if known and column not in known:
                    self._db.execute(f"ALTER TABLE clips ADD COLUMN {column} {' '.join(rest)}")
            for name, columns in INDEXES.items():
                self._db.execute(f"CREATE INDEX IF NOT EXISTS {name} ON clips ({columns})")
            self._db.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        return True

    def _check_schema(self) -> None:
        """Raise UserError unless the tables and their columns are those that _migrate creates, and nothing is added."""
        # A trigger or a view could run any statement in the place of ours.
        others = "SELECT name FROM sqlite_master WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%'"
        if found := self._db.execute(others).fetchone():
            raise UserError(f"{self.path}: contains {found['name'][:60]!r}, which no preparation makes; {RESTORE}")
        wanted = {"clips": COLUMN_TYPES, "facts": {"key": "TEXT", "value": "TEXT"}}
        for table, columns in wanted.items():
            if {row["name"]: row["type"] for row in self._db.execute(f"PRAGMA table_xinfo({table})")} != columns:
                raise UserError(f"{self.path}: its table {table} is not that of a preparation; {RESTORE}")

    def _check_rows(self) -> None:
        """Raise UserError, naming row and column, for a value that no preparation has written."""
        # A single pass over the table, which takes a second for Kinetics. CASE gives the first column at fault.
        # A condition that is NULL, because the value is, counts as met.
        faults = " ".join(f"WHEN NOT ({rule}) THEN '{column}'" for column, rule in RULES)
        bad = self._db.execute(f"SELECT id, CASE {faults} END AS fault FROM clips WHERE fault IS NOT NULL").fetchone()
        if bad:
            raise UserError(f"{self.path}: row {bad['id']}: impossible value in column {bad['fault']}; {RESTORE}")
        for column in ("split", "listed_split"):
            for (split,) in self._db.execute(f"SELECT DISTINCT {column} FROM clips").fetchall():
                check_split_name(split, str(self.path))

    @contextlib.contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        """Turn an SQLite error inside the context into a one-line UserError that says what to do."""
        # Most of these cases have the same exception class, so they are told apart by the message.
        try:
            yield
        except sqlite3.Error as error:
            message = str(error)
            advice = RESTORE
            if "full" in message or "I/O" in message:
                advice = "free disk space or repair the disk, then run again to resume"
            elif "locked" in message:
                advice = "another program keeps it locked; wait for that program or stop it"
            elif "readonly" in message or "unable to open" in message:
                advice = "make it and its folder writable"
            raise UserError(f"{self.path}: {message}; {advice}") from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """Everything done inside the context is committed together, or not at all if it raises."""
        # IMMEDIATE takes the write lock at once, waiting for it if need be. A plain BEGIN would take it at the first
        # write, when SQLite may refuse to wait because another process is writing too.
        with self._sqlite_errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                # If the disk was full, SQLite has rolled back by itself, and a second ROLLBACK is an error.
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _select(self, query: str, values: Sequence[object] = ()) -> list[sqlite3.Row]:
        """All rows at once: a query that is still open would hold a read lock, and a run could not commit meanwhile."""
        with self._sqlite_errors():
            return self._db.execute(query, values).fetchall()

    def get_fact(self, key: str) -> str | None:
        """A stored value that concerns the whole preparation, such as its settings; None if it was never set."""
        rows = self._select("SELECT value FROM facts WHERE key = ?", (key,))
        return str(rows[0]["value"]) if rows else None

    def set_fact(self, key: str, value: str) -> None:
        """Store a value that concerns the whole preparation."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, value))

    def sync_with_plan(self, planned: Iterable[PlannedVideo]) -> list[str]:
        """Make the rows match the planned videos, in one transaction.

        A row keeps its outcome as long as its source, segment and target stay the same. Every other row becomes pending
        or excluded. Rows of videos that are no longer listed are deleted. A row that `move_to_splits` has moved to
        another split stays there. Returns the targets that are no longer planned, so that their files can be deleted.
        """
        # Kinetics has 650,000 rows, so this is not done row by row: the planned videos go into a temporary table, and
        # four statements compare it with `clips`.
        with self._transaction():
            self._db.execute(CREATE_PLANNED)
            self._db.executemany(
                f"INSERT INTO listing VALUES ({', '.join('?' * 10)})",
                (
                    (v.split, v.position, v.name, v.label, v.source, v.target, v.group, v.start, v.end, v.excluded)
                    for v in planned
                ),
            )
            # The index is built once all rows are in, which takes half as long as updating it with every insert.
            self._db.execute("CREATE UNIQUE INDEX temp.listed ON listing (split, name)")
            # The order matters: targets must be asked for before rows are deleted, and rows whose outcome is no longer
            # valid must be reset before the last statement copies the planned values into them.
            unplanned = self._db.execute(SELECT_UNPLANNED_TARGETS).fetchall()
            for change in (DELETE_UNPLANNED, RESET_CHANGED, INSERT_OR_UPDATE):
                self._db.execute(change)
            self._db.execute("DROP TABLE listing")
        return [row["target"] for row in unplanned]

    def rows(self, status: str | None = None, columns: Sequence[str] = ("*",)) -> Iterator[sqlite3.Row]:
        """Yield all rows, or those with one status, in list order. They have `columns` and always id, split, position.

        Rows are read one page at a time. So memory does not grow with the list, and rows may be written during the
        iteration. A row that acquires the status after the iteration has passed it is not visited.
        """
        # Each page starts after the last row of the one before (keyset pagination). With OFFSET, SQLite would count off
        # all earlier rows for every page, and rows whose status has changed meanwhile would shift the pages.
        chosen = ", ".join(dict.fromkeys(("id", "split", "position", *columns)))
        where = "(split, position, id) > (?, ?, ?)" + ("" if status is None else " AND status = ?")
        query = f"SELECT {chosen} FROM clips WHERE {where} ORDER BY split, position, id LIMIT {PAGE_ROWS}"
        last: tuple[str, int, int] = ("", -1, -1)
        while page := self._select(query, last if status is None else (*last, status)):
            yield from page
            last = (page[-1]["split"], page[-1]["position"], page[-1]["id"])

    def sample_rows(self, max_rows: int, status: str = "pending") -> list[sqlite3.Row]:
        """At most `max_rows` of the rows with a status, evenly spaced over the list."""
        query = "SELECT id FROM clips WHERE status = ? ORDER BY split, position, id"
        return self._rows_among([row["id"] for row in self._select(query, (status,))], max_rows)

    def sample_class(self, splits: Iterable[str], label: str, max_rows: int) -> list[sqlite3.Row]:
        """At most `max_rows` of the prepared videos of a class, evenly spaced over its rows in `splits`."""
        # The index clips_account answers this query by itself, so only the rows of the class are looked at.
        query = "SELECT id FROM clips WHERE split = ? AND label = ? AND status = 'ok'"
        ids = [row["id"] for split in splits for row in self._select(query, (split, label))]
        return self._rows_among(ids, max_rows)

    def _rows_among(self, ids: Sequence[int], max_rows: int) -> list[sqlite3.Row]:
        """The rows with at most `max_rows` of the ids, evenly spaced."""
        chosen = evenly_spaced(ids, min(max_rows, len(ids)))
        # A row may have been deleted meanwhile by a run that is active.
        return [row for row_id in chosen for row in self._select("SELECT * FROM clips WHERE id = ?", (row_id,))]

    def mark_pending(self, ids: Iterable[int]) -> None:
        """Make rows pending again. Their number of attempts is kept."""
        change = "UPDATE clips SET status = 'pending', reason = NULL, detail = NULL, sha256 = NULL WHERE id = ?"
        with self._transaction():
            self._db.executemany(change, ((row_id,) for row_id in ids))

    def mark_damaged(self, details: Mapping[str, str]) -> None:
        """Record that prepared files are damaged. details: what is wrong, by target.

        What is known about a file is kept, so that it can be recognised if it is restored.
        """
        change = "UPDATE clips SET status = 'failed', reason = ?, detail = ? WHERE target = ? AND status = 'ok'"
        with self._transaction():
            self._db.executemany(change, ((DAMAGED, detail, target) for target, detail in details.items()))

    def mark_intact(self, targets: Iterable[str]) -> None:
        """Record that files, given by target, are those that were prepared, in case they were recorded as damaged."""
        change = "UPDATE clips SET status = 'ok', reason = NULL, detail = NULL WHERE target = ? AND reason = ?"
        with self._transaction():
            self._db.executemany(change, ((target, DAMAGED) for target in targets))

    def record_outcome(self, row_id: int, values: Mapping[str, Any]) -> None:
        """Record the outcome of an attempt, with the current time. `values` maps column names to values."""
        known = dict(values) | {"finished_at": time.time()}
        columns = ", ".join(f"{column} = ?" for column in known)
        with self._transaction():
            change = f"UPDATE clips SET {columns}, attempts = attempts + 1 WHERE id = ?"
            self._db.execute(change, (*known.values(), row_id))

    def add_rows(self, rows: Iterable[sqlite3.Row]) -> None:
        """Add complete rows of other states unchanged, except for their ids: all of them, or none if that fails.

        Raises UserError if one of the videos has a row already.
        """
        with self._transaction():
            for row in rows:
                known = {key: row[key] for key in row.keys() if key != "id"}  # noqa: SIM118 - a Row iterates its values
                values = ", ".join("?" * len(known))
                self._db.execute(f"INSERT INTO clips ({', '.join(known)}) VALUES ({values})", tuple(known.values()))

    def give_groups(self, group_of: Mapping[int, str]) -> None:
        """Give rows, by their id, groups that take precedence over those of the lists."""
        with self._transaction():
            change = "UPDATE clips SET given_group = ? WHERE id = ?"
            self._db.executemany(change, ((group, row) for row, group in group_of.items()))

    def move_to_splits(self, split_of: Mapping[int, str]) -> None:
        """Move rows to other splits, given by row id: all of them, or none if that fails. Their files stay in place."""
        with self._transaction():
            self._db.executemany("UPDATE clips SET split = ? WHERE id = ?", ((s, row) for row, s in split_of.items()))

    def counts_by_split(self) -> dict[str, VideoCounts]:
        """The outcomes so far by split, with train, val and test first."""
        found = self._counts_by("split")
        return {split: found[split] for split in sorted(found, key=split_order)}

    def counts_by_class(self) -> dict[str, VideoCounts]:
        """The outcomes so far by class, over all splits. '' is the class of videos without a label."""
        return self._counts_by("label")

    def _counts_by(self, key: str) -> dict[str, VideoCounts]:
        """The outcomes by the column `key`, which is split or label."""
        # The index clips_account has all columns of this query and is in its order, so that a single pass over it is
        # enough, which takes 0.25 s for Kinetics. What belongs to the same key is added up below.
        query = "SELECT split, label, status, reason, COUNT(*) AS n FROM clips GROUP BY split, label, status, reason"
        found: dict[str, dict[tuple[str, str], int]] = {}
        for row in self._select(query):
            sums = found.setdefault(row[key], {})
            outcome = (row["status"], row["reason"] or "")
            sums[outcome] = sums.get(outcome, 0) + row["n"]
        return {name: _as_counts(sums) for name, sums in found.items()}

    def last_finished(self) -> float | None:
        """When the latest outcome was recorded, in seconds since the epoch; None if there is none yet."""
        when = self._select("SELECT MAX(finished_at) AS t FROM clips")[0]["t"]
        return None if when is None else float(when)

    def finished_since(self, moment: float) -> tuple[int, float]:
        """The number of outcomes recorded after `moment`, and when the first of them was (`moment` if there are none).

        Times are in seconds since the epoch.
        """
        row = self._select("SELECT COUNT(*) AS n, MIN(finished_at) AS t FROM clips WHERE finished_at > ?", (moment,))[0]
        return row["n"], moment if row["t"] is None else row["t"]

    def outcomes(self) -> Iterator[tuple[float, bool]]:
        """(seconds since the epoch, whether it was prepared) of every finished video, in the order they finished."""
        # The unary plus keeps SQLite from using the index by status. It uses clips_finished instead, which is in the
        # order wanted, so nothing has to be sorted.
        where = "finished_at > 0 AND +status IN ('ok', 'failed')"
        query = f"SELECT finished_at, status FROM clips WHERE {where} ORDER BY finished_at"
        return ((row["finished_at"], row["status"] == "ok") for row in self._select(query))

    def measurements(self, columns: Sequence[str]) -> Iterator[tuple[float | None, ...]]:
        """The values of numeric columns for every prepared video, in no particular order."""
        return map(tuple, self._select(f"SELECT {', '.join(columns)} FROM clips WHERE status = 'ok'"))


# The statements of sync_with_plan. `listing` is a temporary table of the planned videos, in which (split, name) is
# unique. In `clips` the same pair is (listed_split, name), because move_to_splits may have changed `split`.
CREATE_PLANNED = """
    CREATE TEMP TABLE listing (split TEXT, position INTEGER, name TEXT, label TEXT, source TEXT, target TEXT,
    origin TEXT, start_seconds REAL, end_seconds REAL, excluded TEXT)
"""
# The files to delete: those of videos that are no longer listed, and of videos that were prepared and are now excluded.
# Rows that are excluded already have no file.
SELECT_UNPLANNED_TARGETS = """
    SELECT target FROM clips WHERE target NOT IN (SELECT target FROM listing WHERE excluded = '')
    AND status <> 'excluded' ORDER BY target
"""
DELETE_UNPLANNED = """
    DELETE FROM clips WHERE NOT EXISTS
    (SELECT 1 FROM listing l WHERE l.split = listed_split AND l.name = clips.name)
"""
# Resets rows whose outcome is no longer valid: the source, segment or target has changed, or the video was excluded and
# now is not, or the reverse. Start and end are compared with IS because NULL = NULL is not true in SQL. Targets are
# UNIQUE, and two rows may exchange theirs, so the old targets are first replaced by 'old ID'.
RESET_CHANGED = """
    UPDATE clips SET status = 'pending', reason = NULL, detail = NULL, sha256 = NULL, target = 'old ' || id
    WHERE NOT EXISTS (
        SELECT 1 FROM listing l WHERE l.split = listed_split AND l.name = clips.name AND l.source = clips.source
        AND l.target = clips.target AND l.start_seconds IS clips.start_seconds AND l.end_seconds IS clips.end_seconds
        AND (l.excluded <> '') = (clips.status = 'excluded')
    )
"""
# Inserts new rows and updates existing ones (an "upsert"). `excluded` means two things here: in the SELECT it is the
# column of `listing`; after ON CONFLICT it is SQLite's name for the row that could not be inserted, so that
# `excluded.status` is the status that row would have had. `WHERE true` is needed because SQLite would otherwise read ON
# as the condition of a join. The last WHERE skips rows in which nothing changes, since writing all of them would take
# most of the time.
INSERT_OR_UPDATE = """
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


def is_damaged(row: sqlite3.Row) -> bool:
    """Whether a video was prepared, but its file was found damaged later. The row needs the columns status, reason."""
    return bool(row["status"] == "failed" and row["reason"] == DAMAGED)


def group_of_row(row: sqlite3.Row) -> str:
    """The group of a video; '' if unknown. The row needs the columns GROUP_COLUMNS."""
    return str(row["given_group"] or row["origin"])


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, evenly spaced: the middle one of each of `count` equal parts."""
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def _as_counts(found: Mapping[tuple[str, str], int]) -> VideoCounts:
    """Numbers of videos by (status, reason) -> VideoCounts."""
    # Rows that are ok or pending have no reason, so each of these statuses occurs in a single key.
    by_reason = {
        kind: {reason: n for (status, reason), n in sorted(found.items()) if status == kind}
        for kind in ("failed", "excluded")
    }
    by_status = {status: n for (status, _), n in found.items()}
    return VideoCounts(
        listed=sum(found.values()),
        ok=by_status.get("ok", 0),
        pending=by_status.get("pending", 0),
        failed=by_reason["failed"],
        excluded=by_reason["excluded"],
    )
