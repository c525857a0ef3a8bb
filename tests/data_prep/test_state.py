"""The state: a kill loses nothing, nothing outdated is kept, and the cost per video does not grow with the list."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import data_prep.state as module
from data_prep.outcomes import EXCLUDED, REASONS
from data_prep.state import PlannedVideo, PreparationState
from tests.conftest import REPOSITORY
from video_swinv2.errors import UsageError, UserError


def listing(count: int, split: str = "train") -> list[PlannedVideo]:
    return [
        PlannedVideo(split, n, f"a/{n}.mp4", f"class {n % 7}", f"/raw/a/{n}.mp4", f"videos/{split}/{n}.mp4", f"id{n}")
        for n in range(count)
    ]


def by_name(state: PreparationState) -> dict[str, dict[str, object]]:
    return {row["name"]: dict(row) for row in state.rows()}


def in_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)


def test_planned_videos_are_stored(tmp_path: Path) -> None:
    cut = replace(listing(1)[0], start=1.5, end=11.5, group="-_abc")
    with PreparationState(tmp_path, create=True) as state:
        assert state.sync_with_plan([cut, replace(listing(2)[1], excluded="duplicate")]) == []
        rows = by_name(state)
        assert (rows["a/0.mp4"]["origin"], rows["a/0.mp4"]["start_seconds"], rows["a/0.mp4"]["end_seconds"]) == (
            "-_abc", 1.5, 11.5,
        )  # fmt: skip
        assert (rows["a/0.mp4"]["status"], rows["a/0.mp4"]["reason"]) == ("pending", None)
        assert (rows["a/1.mp4"]["status"], rows["a/1.mp4"]["reason"]) == ("excluded", "duplicate")
        count = state.counts_by_split()["train"]
        assert (count.listed, count.ok, count.pending, count.failed, count.excluded) == (2, 0, 1, {}, {"duplicate": 1})
    assert not set(REASONS) & set(EXCLUDED)


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({}, True),
        ({"position": 9}, True),
        ({"label": "other"}, True),
        ({"group": "other"}, True),
        ({"source": "/raw/b.mp4"}, False),
        ({"target": "videos/train/b.mp4"}, False),
        ({"start": 2.0}, False),
        ({"end": 3.0}, False),
    ],
)
def test_a_row_whose_source_segment_or_target_changed_becomes_pending(
    tmp_path: Path, change: dict[str, object], kept: bool
) -> None:
    first, second = listing(2)
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan([first, second])
        state.record_outcome(1, {"status": "ok", "sha256": "ab"})
        gone = state.sync_with_plan([replace(first, **change), second])  # type: ignore[arg-type]  # fields of PlannedVideo by name
        row = by_name(state)["a/0.mp4"]
    assert gone == (["videos/train/0.mp4"] if "target" in change else [])
    assert (row["status"], row["sha256"], row["attempts"]) == (("ok", "ab", 1) if kept else ("pending", None, 1))
    names = {"start": "start_seconds", "end": "end_seconds", "group": "origin"}
    for key, value in change.items():
        assert row[names.get(key, key)] == value


def test_excluded_rows_come_and_go(tmp_path: Path) -> None:
    first, second = listing(2)
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan([first, second])
        state.record_outcome(1, {"status": "ok", "sha256": "ab"})
        assert state.sync_with_plan([replace(first, excluded="duplicate"), second]) == [first.target], "its file goes"
        assert by_name(state)[first.name]["status"] == "excluded"
        assert by_name(state)[first.name]["sha256"] is None
        assert state.sync_with_plan([replace(first, excluded="duplicate"), second]) == []
        assert state.sync_with_plan([first, second]) == []
        assert by_name(state)[first.name]["status"] == "pending"
        assert by_name(state)[first.name]["reason"] is None
        assert state.sync_with_plan([second]) == [first.target]
        assert list(by_name(state)) == [second.name]


def test_targets_may_be_exchanged_and_a_split_choice_stays(tmp_path: Path) -> None:
    first, second = listing(2)
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan([first, second])
        state.move_to_splits({2: "val"})
        state.sync_with_plan([replace(first, target=second.target), replace(second, target=first.target)])
        rows = by_name(state)
        assert [rows[item.name]["target"] for item in (first, second)] == [second.target, first.target]
        assert [rows[item.name]["split"] for item in (first, second)] == ["train", "val"]


def test_a_listing_with_an_error_changes_nothing(tmp_path: Path) -> None:
    first, second = listing(2)
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan([first])
        with pytest.raises(UserError, match=r"prep\.sqlite: UNIQUE"):
            state.sync_with_plan([second, replace(second, name="c", label="x")])  # two videos with one target
        assert list(by_name(state)) == [first.name]
        state.sync_with_plan([second])


def test_rows_are_read_in_pages_and_may_be_written_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAGE_ROWS", 7)
    wanted = listing(50) + listing(30, "test")
    shuffled = random.Random(0).sample(wanted, len(wanted))
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(shuffled)
        assert [(row["split"], row["position"]) for row in state.rows()] == sorted(
            (w.split, w.position) for w in wanted
        )
        seen = []
        for row in state.rows("pending", ("name",)):
            assert set(row.keys()) == {"id", "split", "position", "name"}
            seen.append((row["split"], row["position"]))
            state.record_outcome(row["id"], {"status": "failed", "reason": "empty"})
        assert seen == sorted((w.split, w.position) for w in wanted), "each once, though each left the status"
        assert list(state.rows("pending")) == []
        assert len(list(state.rows("failed"))) == 80


def test_a_sample_is_spread_over_the_list(tmp_path: Path) -> None:
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(listing(100))
        assert [row["position"] for row in state.sample_rows(4)] == [12, 37, 62, 87]
        assert [row["position"] for row in state.sample_rows(200)] == list(range(100))
        assert state.sample_rows(4, "ok") == []


def test_rows_of_other_states_are_added_unchanged(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}-of-2.sqlite" for n in range(2)]
    wanted = listing(6)
    for place, path in enumerate(paths):
        with PreparationState(tmp_path, create=True, path=path) as part:
            part.sync_with_plan(wanted[place::2])
            part.record_outcome(1, {"status": "failed", "reason": "empty", "detail": "x"})
    with PreparationState(tmp_path, create=True) as state:
        for path in paths:
            with PreparationState(tmp_path, path=path) as part:
                state.add_rows(part.rows())
        with PreparationState(tmp_path, path=paths[0]) as part:
            before = by_name(part)["a/0.mp4"]
            with pytest.raises(UserError, match="UNIQUE"):
                state.add_rows(part.rows())
        assert {key: value for key, value in by_name(state)["a/0.mp4"].items() if key != "id"} == {
            key: value for key, value in before.items() if key != "id"
        }
        assert state.counts_by_split()["train"].failed == {"empty": 2}
        assert len(by_name(state)) == 6


def test_counts_by_split_and_class(tmp_path: Path) -> None:
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan([*listing(14, "test"), *listing(7)])
        for row, reason in ((1, "empty"), (2, "missing"), (8, "empty")):
            state.record_outcome(row, {"status": "failed", "reason": reason})
        state.record_outcome(3, {"status": "ok"})
        assert list(state.counts_by_split()) == ["train", "test"]
        classes = state.counts_by_class()
    assert sum(count.listed for count in classes.values()) == 21
    assert {label: count.listed for label, count in classes.items()} == {f"class {n}": 3 for n in range(7)}
    assert sum(sum(count.failed.values()) for count in classes.values()) == 3
    assert sum(count.ok for count in classes.values()) == 1


def test_cost_of_a_finished_video_does_not_grow_with_the_list(tmp_path: Path) -> None:
    """Counted in steps of SQLite's virtual machine, which do not depend on the clock."""

    def steps(count: int, action: Callable[[PreparationState], object]) -> int:
        folder = tmp_path / str(count)
        folder.mkdir(exist_ok=True)
        ran = 0

        def tick() -> int:
            nonlocal ran
            ran += 1
            return 0

        with PreparationState(folder, create=True) as state:
            if not state.counts_by_split():
                state.sync_with_plan(listing(count))
            state._db.set_progress_handler(tick, 1)
            action(state)
        return ran

    def finish(state: PreparationState) -> None:
        state.record_outcome(101, {"status": "failed", "reason": "empty", "detail": "x"})

    def first_pending(state: PreparationState) -> None:
        next(iter(state.rows("pending", ("target",))))

    def rate(state: PreparationState) -> None:
        state.finished_since((state.last_finished() or 0.0) - 60)

    for action in (finish, first_pending, rate):
        small, large = (steps(count, action) for count in (1500, 15000))
        assert 0 < large <= small + 20, action.__name__


def test_every_query_of_a_run_has_its_index(tmp_path: Path) -> None:
    asked = []
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(listing(3))
        state._db.set_trace_callback(asked.append)
        list(state.rows())
        list(state.rows("pending", ("target",)))
        state.counts_by_split()
        state.counts_by_class()
        state.record_outcome(1, {"status": "ok"})
        state.last_finished()
        state.finished_since(0.0)
        list(state.outcomes())
        state._db.set_trace_callback(None)
        plans = {}
        for query in asked:
            if query.startswith(("SELECT", "UPDATE")):
                plan = [row[3] for row in state._db.execute(f"EXPLAIN QUERY PLAN {query}")]
                plans[query] = plan
    assert len(plans) >= 7
    for query, plan in plans.items():
        assert plan, query
        for step in plan:
            assert "USING" in step, f"reads the whole table: {query}"
            assert "TEMP B-TREE" not in step, f"sorts: {query}"


def test_a_finished_video_survives_kill_minus_nine(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from data_prep.state import PreparationState, PlannedVideo
with PreparationState(Path(sys.argv[1]), create=True) as state:
    state.sync_with_plan([PlannedVideo("train", n, str(n), "", str(n), f"videos/{n}") for n in range(5000)])
    state.record_outcome(7, {"status": "ok"})
    with state._transaction():
        state._db.execute("UPDATE clips SET status = 'ok'")
        os.kill(os.getpid(), signal.SIGKILL)
"""
    assert in_process(code, tmp_path).returncode == -signal.SIGKILL
    assert (tmp_path / "prep.sqlite-journal").exists(), "killed in the middle"
    with PreparationState(tmp_path) as state:
        assert state._db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert [row["id"] for row in state.rows("ok")] == [7]
        assert state.counts_by_split()["train"].pending == 4999


def test_a_commit_is_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    with PreparationState(tmp_path, create=True) as state:
        assert state._db.execute("PRAGMA synchronous").fetchone()[0] == 2  # FULL
        assert state._db.execute("PRAGMA journal_mode").fetchone()[0] == "delete"


def test_another_process_reads_while_one_writes(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from data_prep.state import PreparationState
with PreparationState(Path(sys.argv[1])) as state:
    for _ in range(10):
        print(state.counts_by_split()["train"].listed, len(list(state.rows(None, ("name",)))))
"""
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(listing(300))
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as reader:
            written = 0
            while reader.poll() is None:
                state.record_outcome(1 + written % 300, {"status": "ok"})
                written += 1
                time.sleep(0.005)  # a writer that never pauses would starve the reader
            assert reader.stdout is not None
            assert set(reader.stdout.read().split("\n")) == {"300 300", ""}
            assert reader.returncode == 0
    assert written > 1


OLD_COLUMNS = """
    split TEXT NOT NULL, listed_split TEXT NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL, label TEXT NOT NULL,
    source TEXT NOT NULL, target TEXT NOT NULL UNIQUE, status TEXT NOT NULL DEFAULT 'pending', reason TEXT, detail TEXT,
    source_size INTEGER, source_mtime_ns INTEGER, source_sha256 TEXT, sha256 TEXT, frames INTEGER, fps REAL,
    height INTEGER, width INTEGER, codec TEXT, duration_seconds REAL, settings_hash TEXT, versions TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, seconds REAL, finished_at REAL
"""


def test_an_older_schema_is_migrated(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "prep.sqlite") as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"CREATE TABLE clips (id INTEGER PRIMARY KEY, {OLD_COLUMNS}, UNIQUE(listed_split, name))")
        db.execute("CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
        db.execute(
            "INSERT INTO clips (split, listed_split, position, name, label, source, target, status, sha256)"
            " VALUES ('train', 'train', 0, 'a/0.mp4', 'class 0', '/raw/a/0.mp4', 'videos/train/0.mp4', 'ok', 'ab')"
        )
    db.close()
    with PreparationState(tmp_path) as state:
        assert state.counts_by_split()["train"].ok == 1
        assert state.sync_with_plan(listing(1)) == []
        row = by_name(state)["a/0.mp4"]
    assert (row["status"], row["sha256"], row["origin"], row["start_seconds"]) == ("ok", "ab", "id0", None)
    assert row["given_group"] == ""
    with (
        PreparationState(tmp_path, create=True, path=tmp_path / "new.sqlite") as fresh,
        PreparationState(tmp_path) as old,
    ):
        of = [{tuple(row[1:5]) for row in s._db.execute("PRAGMA table_info(clips)")} for s in (fresh, old)]
    assert of[0] == of[1]


def test_unusable_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "prep.sqlite"
    with pytest.raises(UsageError, match="run `prepare SRC"):
        PreparationState(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UsageError, match="nothing was prepared here"):
        PreparationState(tmp_path)
    path.write_bytes(b"SQLite format 3\0" + os.urandom(4096))
    with pytest.raises(UserError, match=r"prep\.sqlite: .*; restore it, or remove it") as caught:
        PreparationState(tmp_path)
    assert "\n" not in str(caught.value)
    path.unlink()
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(listing(2000))
        state._db.execute("PRAGMA user_version = 99")
    with pytest.raises(UserError, match="newer version"):
        PreparationState(tmp_path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    with path.open("r+b") as file:  # a page in the middle is overwritten
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff" * 50_000)
    with pytest.raises(UserError, match=r"malformed; restore it"):
        PreparationState(tmp_path)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    with PreparationState(tmp_path, create=True) as state:
        state.sync_with_plan(listing(10))
        pages = state._db.execute("PRAGMA page_count").fetchone()[0]
        state._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(UserError, match=r"full; free disk space"):
            state.sync_with_plan(listing(3000))
        assert len(by_name(state)) == 10
        state._db.execute("PRAGMA max_page_count = 100000")
        state.sync_with_plan(listing(3000))
        assert len(by_name(state)) == 3000
