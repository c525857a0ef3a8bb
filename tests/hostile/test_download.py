"""Downloading from servers that lie, drip or never end, and from folders whose notes were tampered with."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep import download as downloading
from data_prep import fetch as fetching
from data_prep import receive as receiving
from data_prep.cli import main
from data_prep.fetch import DiskError, StopError, fetch_file
from tests.conftest import REPOSITORY
from tests.data_prep.mirror import Server, kinetics400, serving
from tests.hostile.tampering import tampered
from tests.waiting import wait_until
from video_swinv2.errors import UserError

GIVE_UP_SECONDS = 30.0
CONTENT = bytes(range(256)) * 400
OK = b"HTTP/1.1 200 OK\r\n"
DIGITS = b"9" * 5000
BOMB = gzip.compress(bytes(50 << 20))
ESCAPES = b"\x1b]0;owned\x07\x1b[2J\x9b31m"
Answer = Callable[["RawServer", socket.socket], None]


class RawServer:
    """Answers each connection with the next of `answers`, the last of them again and again."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.sent = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}/part_0.tar"
        self.closed = threading.Event()

    def __enter__(self) -> RawServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._listener.close()

    def send(self, connection: socket.socket, content: bytes) -> None:
        connection.sendall(content)
        self.sent += len(content)

    def drip(self, connection: socket.socket, content: bytes) -> None:
        """A byte now and then, from the start again after the last, until the client is gone."""
        while True:
            for byte in content:
                self.send(connection, bytes([byte]))
                if self.closed.wait(0.05):
                    return

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16)
            self.requests.append(request)
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            answer(self, connection)


def sends(*parts: bytes) -> Answer:
    return lambda server, connection: [server.send(connection, part) for part in parts]  # type: ignore[return-value]


def whole(*lines: bytes, content: bytes = CONTENT) -> Answer:
    head = b"".join(line + b"\r\n" for line in lines)
    return sends(OK + head + b"Content-Length: %d\r\n\r\n" % len(content) + content)


def drips(start: bytes, again: bytes) -> Answer:
    def answer(server: RawServer, connection: socket.socket) -> None:
        server.send(connection, start)
        server.drip(connection, again)

    return answer


def endless(start: bytes, block: bytes, most: int = 64 << 20) -> Answer:
    """A body without an end, which stops after `most` bytes for the sake of a client that does not."""

    def answer(server: RawServer, connection: socket.socket) -> None:
        server.send(connection, start)
        while server.sent < most:
            server.send(connection, block)

    return answer


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(fetching, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(fetching, "MAX_PAUSE_SECONDS", 0.01)


@pytest.fixture
def mirror() -> Iterator[Server]:
    with serving() as server:
        yield server


def fetch(server: RawServer, target: Path, **options: Any) -> bytes:
    fetch_file(server.address, target, find_fault=lambda path: "", **options)
    return target.read_bytes()


def falls_silent(server: RawServer, connection: socket.socket) -> None:
    server.send(connection, b"H")
    server.closed.wait()


DRIPS: dict[str, Answer] = {
    "nothing": falls_silent,
    "status": drips(b"HTTP/1.1 200 ", b"x"),
    "header": drips(OK + b"X: ", b"x"),
    "headers": drips(OK, b"A: b\r\n"),
    "continue": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": drips(OK + b"Content-Length: 1000000\r\n\r\n", b"x"),
    "chunk length": drips(OK + b"Transfer-Encoding: chunked\r\n\r\n5;", b"x"),
    "trailer": drips(OK + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n", b"A: b\r\n"),
}


def receivers() -> int:
    """How many threads are receiving a file."""
    return [thread.name for thread in threading.enumerate()].count(receiving.RECEIVING)


@pytest.mark.parametrize("way", DRIPS)
def test_a_server_that_drips_does_not_delay_a_stop(tmp_path: Path, way: str) -> None:
    stop, ended, before = threading.Event(), [], receivers()

    def work() -> None:
        with pytest.raises(StopError):
            fetch(server, tmp_path / "a", stop=stop)
        ended.append(True)

    with RawServer(DRIPS[way]) as server:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        wait_until(lambda: server.sent > 0, GIVE_UP_SECONDS)
        time.sleep(0.2)  # until the client waits for more
        stop.set()
        thread.join(GIVE_UP_SECONDS / 2)
        assert ended == [True]
        # A thread that waits for a header cannot be woken up, and ends with the program. Any other ends now.
        if way in ("body", "chunk length", "trailer"):
            wait_until(lambda: receivers() <= before, GIVE_UP_SECONDS)


def test_ctrl_c_ends_the_program_while_a_header_drips(tmp_path: Path) -> None:
    with RawServer(DRIPS["header"]) as server:
        command = [sys.executable, "-m", "data_prep", "download", "kinetics400", "--split", "val"]
        command += ["--to", str(tmp_path), "--source", server.address.rpartition("/")[0]]
        process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
        while not server.sent:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=GIVE_UP_SECONDS)
    assert process.returncode == 1
    assert error.splitlines()[-1] == "error: interrupted; run the same command again to resume"


@pytest.mark.parametrize("way", [way for way in DRIPS if way != "nothing"])
def test_a_server_that_drips_is_given_up(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "HEADER_SECONDS", 0.2)
    monkeypatch.setattr(receiving, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(receiving, "STOP_SECONDS", 0.05)
    monkeypatch.setattr(fetching, "MAX_ATTEMPTS", 3)
    with RawServer(DRIPS[way]) as server, pytest.raises(UserError, match=r"gave up after 3 attempts") as caught:
        fetch(server, tmp_path / "a")
    assert len(server.requests) == fetching.MAX_ATTEMPTS
    assert server.address in str(caught.value)


def test_a_thread_that_cannot_start_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start, failed = threading.Thread.start, []

    def fail_once(thread: threading.Thread) -> None:
        if thread.name == receiving.RECEIVING and not failed:
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    with RawServer(whole()) as server:
        assert fetch(server, tmp_path / "a") == CONTENT
    assert f"{server.address}: can't start new thread; trying again" in capsys.readouterr().err


def test_a_slow_but_steady_server_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deadline moves with what has arrived, even if the whole takes longer."""
    monkeypatch.setattr(receiving, "SLOW_SECONDS", 1.0)
    monkeypatch.setattr(receiving, "SLOW_BYTES", 1000)

    def steady(server: RawServer, connection: socket.socket) -> None:
        server.send(connection, OK + b"Content-Length: 15000\r\n\r\n")
        for _ in range(15):
            server.send(connection, bytes(1000))
            server.closed.wait(0.1)

    with RawServer(steady) as server:
        assert fetch(server, tmp_path / "a") == bytes(15000)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answers",
    [
        [sends(OK + b"Content-Length: " + DIGITS + b"\r\n\r\n" + CONTENT)],
        [sends(OK + b"Content-Length: -5\r\n\r\n" + CONTENT)],
        [sends(b"HTTP/1.1 503 Busy\r\nRetry-After: " + DIGITS + b"\r\n\r\n"), whole()],
        [sends(b"HTTP/1.1 503 Busy\r\nRetry-After: 1000000000\r\n\r\n"), whole()],
        [sends(b"HTTP/1.1 503 Busy\r\nRetry-After: Fri, 31 Dec 9999 23:59:59 GMT\r\n\r\n"), whole()],
        [sends(b"HTTP/1.1 " + DIGITS + b" OK\r\n\r\n"), whole()],
        [sends(OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"g" * 5000 + b"\r\n"), whole()],
        [sends(OK + b"A: b\r\n" * 5000 + b"\r\n"), whole()],
        [sends(OK + b"A: " + b"b" * 100_000 + b"\r\n\r\n"), whole()],
        [whole(b'ETag: "' + b"x" * 5000 + b'"')],
        [whole(b'ETag: "' + ESCAPES + b'"', b"Last-Modified: never" + ESCAPES)],
        [whole(b"Content-Encoding: gzip", content=BOMB)],
    ],
)
def test_senseless_headers_change_nothing(tmp_path: Path, answers: list[Answer]) -> None:
    with RawServer(*answers) as server:
        got = fetch(server, tmp_path / "a")
    assert got in (CONTENT, BOMB)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("etag", [b'"a' + ESCAPES + b'"', b'"' + b"x" * 5000 + b'"'])
def test_a_senseless_mark_does_not_spoil_the_next_attempt(tmp_path: Path, etag: bytes) -> None:
    """It would be sent back in the request for the rest."""
    short = sends(OK + b"ETag: " + etag + b"\r\nContent-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT[:50_000])
    with RawServer(short, whole()) as server:
        assert fetch(server, tmp_path / "a") == CONTENT
    assert b"If-Range" not in server.requests[1]


@pytest.mark.parametrize(
    "span", [b"bytes 50000-0/" + DIGITS, b"bytes " + DIGITS + b"-1/2", b"bytes 50000-/5", b"", ESCAPES, b"bytes */*"]
)
def test_a_senseless_range_starts_over(tmp_path: Path, span: bytes) -> None:
    mark = b'ETag: "a"\r\n'
    short = sends(OK + mark + b"Content-Length: %d\r\n\r\n" % len(CONTENT) + CONTENT[:50_000])
    odd = sends(b"HTTP/1.1 206 Partial\r\n" + mark + b"Content-Range: " + span + b"\r\n\r\nnonsense")
    with RawServer(short, odd, whole()) as server:
        assert fetch(server, tmp_path / "a") == CONTENT
    assert b"Range: bytes=50000-" in server.requests[1]


def test_a_file_of_unknown_size_has_a_ceiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for head in (OK + b"\r\n", OK + b"Content-Length: " + DIGITS + b"\r\n\r\n"):
        with RawServer(endless(head, bytes(1 << 16))) as server:
            with pytest.raises(UserError, match=r"sent more than the 1000000 bytes allowed; try another source"):
                fetch(server, tmp_path / "a", max_bytes=1_000_000)
            assert os.listdir(tmp_path) == []
    with RawServer(whole()) as server, pytest.raises(UserError, match=r"has 102400 bytes, above the limit of 100000;"):
        fetch(server, tmp_path / "a", max_bytes=100_000)
    # Without a limit of its own, the free disk is the limit.
    monkeypatch.setattr(fetching, "RESERVE_BYTES", shutil.disk_usage(tmp_path).free + (1 << 40))
    chunk = b"8000\r\n" + bytes(0x8000) + b"\r\n"
    with RawServer(endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", chunk)) as server:
        with pytest.raises(DiskError, match=r"whose size is not announced, has left less than .* GB free") as caught:
            fetch(server, tmp_path / "a")
        assert str(tmp_path) in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_the_words_of_a_server_are_escaped_and_cut(tmp_path: Path) -> None:
    for answer in (
        sends(b"HTTP/1.1 404 " + ESCAPES + b"x" * 50_000 + b"\r\n\r\n"),
        sends(b"HTTP/1.1 " + ESCAPES + b"x" * 50_000 + b"\r\n\r\n"),
        sends(b"HTTP/1.1 302 Found\r\nLocation: http://" + ESCAPES + b"x" * 50_000 + b"\r\n\r\n"),
        sends(b"HTTP/1.1 302 Found\r\nLocation: file:///" + ESCAPES + b"x" * 50_000 + b"\r\n\r\n"),
    ):
        with RawServer(answer) as server, pytest.raises(UserError) as caught:
            fetch(server, tmp_path / "a")
        assert str(caught.value).isprintable(), caught.value
        assert server.address in str(caught.value)
        assert len(str(caught.value)) < 500


def test_redirects_lead_to_web_addresses_and_end(tmp_path: Path) -> None:
    def redirect(target: bytes) -> bytes:
        return b"HTTP/1.1 302 Found\r\nLocation: " + target + b"\r\n"

    for target, words in (
        (b"file:///etc/passwd", "redirects to 'file:///etc/passwd', which is no web address"),
        (b"ftp://localhost/a", "which is no web address"),
        (b"/part_0.tar", "redirects more than 10 times"),
        (b"http://[::1", "check the source"),
        (b"http://\xff\xfe/", "check the source"),
    ):
        with RawServer(sends(redirect(target) + b"Content-Length: 0\r\n\r\n")) as server:
            with pytest.raises(UserError, match=words):
                fetch(server, tmp_path / "a")
            assert len(server.requests) <= 11
    with RawServer(sends(redirect(b"/other") + b"Content-Length: 0\r\n\r\n"), whole()) as server:
        assert fetch(server, tmp_path / "a") == CONTENT
    assert server.requests[1].startswith(b"GET /other ")


def test_the_body_of_a_redirect_is_not_read(tmp_path: Path) -> None:
    start = b"HTTP/1.1 302 Found\r\nLocation: /other\r\n\r\n"
    with RawServer(endless(start, bytes(1 << 16)), whole()) as server:
        assert fetch(server, tmp_path / "a") == CONTENT
        assert server.sent < 32 << 20, "what fits into the buffers of the sockets"


NOTES = {
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "list": b"[]",
    "empty": b"",
    "binary": bytes(range(256)),
    "digits": b'{"size": ' + DIGITS + b"}",
}


@pytest.mark.parametrize("note", [*NOTES, *(f"{key} {value}" for key in ("size", "etag", "md5") for value in range(6))])
def test_a_tampered_note_is_as_none(tmp_path: Path, note: str) -> None:
    with RawServer(whole(b'ETag: "a"')) as server:
        honest = {"address": server.address, "size": len(CONTENT), "etag": '"a"', "last_modified": "", "md5": ""}
        if note in NOTES:
            content = NOTES[note]
        else:
            key, number = note.split()
            odd: list[object] = ["\N{SNOWMAN}", '"\r\nX: y"', 1.5, [], {"a": 1}, -5]
            content = json.dumps(honest | {key: odd[int(number)]}).encode()
        (tmp_path / ".a.part").write_bytes(b"other bytes")
        (tmp_path / ".a.part.json").write_bytes(content)
        assert fetch(server, tmp_path / "a") == CONTENT
    assert b"Range" not in server.requests[0]
    assert os.listdir(tmp_path) == ["a"]


def test_a_source_that_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(UserError, match=f"{name}: is a device, a pipe or a socket"):
            fetch_file(str(tmp_path / name), tmp_path / "a", find_fault=lambda path: "")


def test_lists_have_a_ceiling(
    mirror: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downloading, "MAX_LIST_BYTES", 400)
    for name in ("400/annotations/val.csv", "400/val/k400_val_path.txt", "400/val/SHA256SUMS"):
        mirror.files, _ = kinetics400(10)
        mirror.files[name] = mirror.files.get(name, b"") + b"\n" * 401
        to = tmp_path / name.rpartition("/")[2]
        assert main(["download", "kinetics400", "--to", str(to), "--source", mirror.base, "--split", "val"]) == 1
        error = capsys.readouterr().err
        assert f"/{name}: has " in error
        assert error.endswith("bytes, above the limit of 400; try another source\n")


def test_a_tampered_ledger_is_one_line(
    mirror: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror.files, _ = kinetics400(10)
    command = ["download", "kinetics400", "--to", str(tmp_path), "--source", mirror.base, "--split", "val"]
    assert main(command) == 0
    ledger = tmp_path / "archives.json"
    honest = json.loads(ledger.read_text())
    key = "archives/val/part_0.tar.gz"
    # The first entry and that of an archive: the others have the same fields.
    honest["files"] = {name: honest["files"][name] for name in (key, min(honest["files"]))}
    wrongs = {repr(one): one for one in (None, -1, 1.5, "\x1b", [], [1], {}, {"a": 1}, True, 10**30)}
    odd = [json.dumps(one).encode() for _, one in tampered(honest, wrongs)] + [*NOTES.values(), b"null", b"[]", b"3"]
    refused = 0
    for content in odd:
        capsys.readouterr()
        ledger.write_bytes(content)
        code = main(command)
        *_, error = capsys.readouterr().err.splitlines() or [""]
        assert code in (0, 1, 2), content
        assert error.startswith("error: ") == (code != 0), content
        assert error.isprintable(), content
        refused += str(ledger) in error
    assert refused > len(odd) / 2
