"""One file from a server that drops connections, lies or changes the file: complete and right, or a one-line error."""

from __future__ import annotations

import hashlib
import os
import socket
import threading

import pytest

from data_prep import fetch as fetching
from data_prep.fetch import AbsentError, DiskError, StopError, fetch_file
from data_prep.unpack import archive_fault
from tests.data_prep.mirror import (
    busy,
    changed,
    cut_off,
    dropped,
    falsified,
    from_the_start,
    noise,
    other_mark,
    short,
    too_long,
    unsatisfiable,
    wrong_range,
)
from video_swinv2.errors import UserError


@pytest.mark.parametrize(
    ("faults", "attempts"),
    [
        ([short], 2),
        ([dropped, dropped, short], 4),
        ([busy, short, busy], 4),
        ([short, from_the_start], 2),
        ([short, wrong_range], 3),
        ([short, unsatisfiable], 3),
        ([short, other_mark], 3),
        ([short, changed], 2),
    ],
)
def test_transient_errors_are_survived(server, tmp_path, faults, attempts):
    path, content = "400/train/part_0.tar.gz", noise(300_000)
    server.files[path], server.faults[path] = content, list(faults)
    target = tmp_path / "a.tar.gz"
    fetched = fetch_file(f"{server.base}/{path}", target, find_fault=lambda path: "")
    content = server.files[path]
    assert target.read_bytes() == content
    assert (fetched.size, fetched.sha256) == (300_000, hashlib.sha256(content).hexdigest())
    assert os.listdir(tmp_path) == ["a.tar.gz"]
    assert len(server.asked) == attempts
    if not {from_the_start, wrong_range, unsatisfiable, other_mark, changed} & set(faults):
        assert server.sent <= 300_000 + fetching.BLOCK * faults.count(
            dropped
        )  # nothing is sent twice except what a reset loses


def test_permanent_errors_name_the_address(server, tmp_path):
    path, target = "400/train/part_0.tar.gz", tmp_path / "a.tar.gz"
    for content, faults, error, words in (
        (b"", [], AbsentError, "the server answered 403 Forbidden"),
        (b"", [lambda h, c: h.head(404, 0)], AbsentError, "the server answered 404 Not Found"),
        (noise(90_000), [busy] * 99, UserError, f"gave up after {fetching.MAX_ATTEMPTS} attempts without progress"),
        (noise(90_000), [short, too_long], UserError, "sent more than the 90000 bytes announced"),
        (noise(90_000), [falsified], UserError, "its MD5 is not"),
        (noise(90_000), [cut_off], UserError, "its MD5 is not"),
        (noise(90_000), [lambda h, c: h.head(200, 1 << 60)], DiskError, "GB more are needed"),
        (b"<html>sign in</html>", [], UserError, "a web page or an error message, not a tar archive"),
    ):
        server.asked.clear()
        server.files[path], server.faults[path] = content, list(faults)
        with pytest.raises(error) as caught:
            fetch_file(f"{server.base}/{path}", target, find_fault=archive_fault)
        assert words in str(caught.value)
        assert str(tmp_path if error is DiskError else f"{server.base}/{path}") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(server.asked) == {busy: fetching.MAX_ATTEMPTS, short: 2}.get((faults or [None])[0], 1)
        assert not target.exists()
        for left in tmp_path.iterdir():
            left.unlink()


def test_attempts_with_progress_do_not_count(server, tmp_path, monkeypatch):
    monkeypatch.setattr(fetching, "PROGRESS_BYTES", 40_000)
    path = "400/train/part_0.tar.gz"
    server.files[path], server.faults[path] = noise(1_000_000), [short] * 24
    fetch_file(f"{server.base}/{path}", tmp_path / "a", find_fault=lambda path: "")
    assert (tmp_path / "a").read_bytes() == server.files[path]
    assert server.sent == 1_000_000
    # A server that drops connections and cannot resume sends the same bytes every time.
    server.faults[path] = [lambda h, c: (h.head(200, len(c)), h.body(c[:100_000]))] * 99
    server.asked.clear()
    with pytest.raises(UserError, match="gave up after 8 attempts without progress"):
        fetch_file(f"{server.base}/{path}", tmp_path / "b", find_fault=lambda path: "")
    assert len(server.asked) == fetching.MAX_ATTEMPTS
    assert {span for _, span in server.asked} == {None}


def test_an_unreachable_server_and_a_stop_during_a_pause(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/a"
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    with pytest.raises(StopError):
        fetch_file(address, tmp_path / "a", find_fault=lambda path: "", stop=stop)
    monkeypatch.setattr(fetching, "FIRST_PAUSE_SECONDS", 0.001)
    with pytest.raises(UserError, match=r"^http://127\.0\.0\.1:\d+/a: .*[Rr]efused"):
        fetch_file(address, tmp_path / "a", find_fault=lambda path: "")
