"""Files are complete or absent."""

import ast
import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from video_swinv2.errors import UserError
from video_swinv2.files import atomic_write, json_text, lock_file, partial_path, sha256, write_json


def test_a_failed_write_leaves_the_old_file_and_no_partial_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_write(path) as partial:
        partial.write_text("half \N{SNOWMAN}", encoding="ascii")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_file_appears_when_the_write_is_complete(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert partial == partial_path(path)
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_json(tmp_path / "none" / "a.json", {})


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


def test_a_lock_is_exclusive_unless_shared_and_is_released(tmp_path):
    path = tmp_path / ".lock"
    with lock_file(path, "busy"), pytest.raises(UserError, match="busy"), lock_file(path, "busy", shared=True):
        pass
    with lock_file(path, "busy", shared=True), lock_file(path, "busy", shared=True):
        pass
    with lock_file(path, "busy"):
        pass


LOCK_AND_FORK = """
import os, signal, sys, time
from pathlib import Path
from video_swinv2.files import lock_file
with lock_file(Path(sys.argv[1]), "busy"):
    if os.fork() == 0:
        # Printed by the child: only once it runs has it given up the lock.
        print("locked", flush=True)
        time.sleep(600)
    signal.pause()
"""


def test_a_dead_process_keeps_no_lock_whatever_its_children_do(tmp_path):
    path = tmp_path / ".lock"
    owner = subprocess.Popen([sys.executable, "-c", LOCK_AND_FORK, str(path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "locked\n"
    (child,) = Path(f"/proc/{owner.pid}/task/{owner.pid}/children").read_text().split()
    with pytest.raises(UserError, match="busy"), lock_file(path, "busy"):
        pass
    owner.kill()
    owner.wait()
    assert Path(f"/proc/{child}").exists()
    with lock_file(path, "busy"):
        pass
    os.kill(int(child), signal.SIGKILL)


def test_a_file_system_without_locks_is_used_and_noted(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with lock_file(tmp_path / ".lock", "busy"):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_json_has_null_for_a_number_that_is_not_finite(tmp_path):
    content = {"loss": math.nan, "rows": [(1.5, math.inf), {"low": -math.inf}], "n": 3, "on": True, "none": None}
    expected = {"loss": None, "rows": [[1.5, None], {"low": None}], "n": 3, "on": True, "none": None}
    write_json(tmp_path / "a.json", content)
    for text in (json_text(content), json_text(content, indent=1), (tmp_path / "a.json").read_text()):
        assert json.loads(text, parse_constant=pytest.fail) == expected


def test_no_file_of_ours_can_hold_nan():
    """Every call of json.dumps in the packages refuses numbers that are not finite; `json_text` writes null."""
    calls = []
    for room in ("video_swinv2", "data_prep"):
        for path in sorted((REPOSITORY / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dumps", "json.dump"):
                    strict = any(keyword.arg == "allow_nan" for keyword in node.keywords)
                    calls.append((f"{path.relative_to(REPOSITORY)}:{node.lineno}", strict))
    assert len(calls) > 10
    assert [place for place, strict in calls if not strict] == []
