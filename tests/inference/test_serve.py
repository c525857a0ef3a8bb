"""The page under real requests and in a real browser: what is refused, what is answered, and that it serves on."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from tests.inference.browser import Browser
from tests.inference.conftest import CLASSES, EVIL
from video_swinv2.errors import UsageError, UserError
from video_swinv2.inference.clip_summary import Limits
from video_swinv2.inference.predictor import OverTime, predict
from video_swinv2.inference.serve import PageServer, _Handler, open_server

MOST = 5 * 10**6


class Running:
    """A server at work in a thread, and requests to it."""

    def __init__(self, server: PageServer) -> None:
        self.server, self.port = server, server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def post(self, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        status, answer = self.ask("POST", "/predict", body, **headers)
        return status, json.loads(answer)

    def is_serving(self) -> bool:
        return self.ask("GET", "/")[0] == 200

    def begin(self, length: int, *lines: str) -> socket.socket:
        """An upload of which only the head was sent."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        head = ("POST /predict HTTP/1.1", f"Host: 127.0.0.1:{self.port}", f"Content-Length: {length}", *lines, "", "")
        connection.sendall("\r\n".join(head).encode())
        return connection


@pytest.fixture(scope="module")
def page(evil_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With temporary files in a folder of its own, which has to stay empty."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setattr(_Handler, "timeout", 2.0)
        with open_server(evil_model, port=0, top=6, device="cpu", limits=Limits(MOST, seconds=240.0)) as server:
            yield Running(server)
            server.shutdown()
    assert [path for path in folder.rglob("*") if path.is_file()] == [], "nothing is kept"


def test_a_clip_is_answered_as_predict_does(page: Running, evil_model: Path, changing: Path) -> None:
    status, answer = page.post(changing.read_bytes())
    assert status == 200
    assert len(answer["windows"]) == 18  # a hop of 2 pictures: 34 pictures in 23 steps are 1.5 each
    (expected,) = predict(evil_model, [changing], device="cpu", top=6, over_time=OverTime(every_seconds=0.08))
    assert [one["name"] for one in answer["answers"]] == [one.name for one in expected.answers]
    for ours, theirs in zip(answer["answers"], expected.answers, strict=True):
        assert ours["probability"] == pytest.approx(theirs.probability, abs=1e-6)
    for ours, moment in zip(answer["windows"], expected.windows, strict=True):
        assert (ours["start_seconds"], ours["end_seconds"]) == (moment.start_seconds, moment.end_seconds)
        named = {one["name"]: one["probability"] for one in ours["answers"]}
        assert named == pytest.approx({one.name: one.probability for one in moment.answers}, abs=1e-6)
        assert ours["shares"] == [named[one["name"]] for one in answer["answers"]]
        assert ours["film"].startswith("data:image/jpeg;base64,")
    assert answer["pictures"] == 40


def test_ten_gigabytes_are_refused_before_they_are_sent(page: Running) -> None:
    """Whether the sender asks first, waits, or just sends."""
    started = time.monotonic()
    with page.begin(10**10, "Expect: 100-continue") as asking:
        assert asking.recv(1000).startswith(b"HTTP/1.1 413 ")
    block = bytes(1 << 20)
    with page.begin(10**10) as sending, pytest.raises(OSError, match=r"reset|[Bb]roken"):
        deque(map(sending.sendall, repeat(block, 9_000)), maxlen=0)
    with page.begin(10**10) as sending:
        sending.sendall(block)
        answer = b"".join(iter(lambda: sending.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"10,000 MB are more than the 5 MB this page takes" in answer
    assert time.monotonic() - started < 60
    assert page.is_serving()


def test_what_is_no_clip_is_refused(page: Running, outside_data: Path) -> None:
    assert page.post(b"hello\n" * 1000) == (415, {"error": "This is neither a video nor an image."})
    assert page.post(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")[0] == 415, "a playlist would read other files"
    assert page.post(b"\x89PNG\r\n\x1a\n" + bytes(1000))[0] == 415
    assert page.post(b"")[0] == 400
    for file in sorted((outside_data / "odd_clips" / "broken").iterdir()):
        status, answer = page.post(file.read_bytes())
        assert status in (200, 400, 413, 415, 422), (file, answer)
        assert ("error" in answer) == (status != 200)
    assert page.is_serving()


def test_the_file_that_hangs_decord_is_answered(page: Running, outside_data: Path) -> None:
    status, answer = page.post((outside_data / "odd_clips" / "ft__fixture2.mpg").read_bytes())
    assert status == 200
    assert answer["pictures"] > 400
    assert page.is_serving()


def test_a_decoder_past_its_time_is_killed(evil_model: Path, outside_data: Path) -> None:
    clip = (outside_data / "odd_clips" / "ft__fixture2.mpg").read_bytes()
    with open_server(evil_model, port=0, device="cpu", limits=Limits(seconds=0.05)) as server:
        running = Running(server)
        status, answer = running.post(clip)
        assert (status, answer["error"]) == (422, "The clip: took longer than 0.05 seconds; send a shorter one")
        assert running.is_serving()
        server.shutdown()
    with open_server(evil_model, port=0, device="cpu", limits=Limits(seconds=240.0, memory_bytes=1)) as server:
        running = Running(server)
        assert running.post(clip)[0] == 422, "memory"
        assert running.is_serving()
        server.shutdown()


def test_a_sender_that_is_slow_or_goes_away_hinders_nobody(page: Running, changing: Path) -> None:
    content = changing.read_bytes()
    with page.begin(len(content)) as slow, page.begin(len(content)) as gone:
        slow.sendall(content[:600])
        gone.sendall(content[:600])
        gone.shutdown(socket.SHUT_WR)
        assert page.is_serving()
        assert page.post(content)[0] == 200, "the third one"
        assert gone.recv(1000).startswith(b"HTTP/1.1 400 ")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
    with page.begin(len(content)), page.begin(len(content)), page.begin(len(content)):
        time.sleep(0.3)
        assert page.post(content)[0] == 503
    deadline = time.monotonic() + 30
    while page.post(content)[0] != 200:
        assert time.monotonic() < deadline


def test_other_sites_and_other_files_are_not_served(page: Running, changing: Path) -> None:
    content = changing.read_bytes()
    assert page.ask("GET", "/", Host="evil.example")[0] == 421, "a name that was made to point here"
    assert page.ask("GET", "/", Host=f"evil.example:{page.port}")[0] == 421
    assert page.ask("GET", "/", Host="127.0.0.1.evil.example")[0] == 421
    assert page.ask("GET", "/", Host=f"localhost:{page.port}")[0] == 200
    assert page.post(content, Host="evil.example")[0] == 421
    assert page.post(content, Origin="http://evil.example")[0] == 403
    assert page.post(content, Origin="null")[0] == 403
    assert page.post(content, Origin=f"http://127.0.0.1:{page.port}")[0] == 200
    for path in (
        "/../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "//etc/passwd",
        "/predict",
        "/?x",
        "file:///etc/passwd",
    ):
        status, answer = page.ask("GET", path)
        assert status == 404, path
        assert b"root:" not in answer
    assert page.ask("POST", "/", content)[0] == 404
    assert page.ask("PUT", "/predict", content)[0] == 501
    with page.begin(-1) as odd:
        assert odd.recv(1000).startswith(b"HTTP/1.1 411 ")
    assert page.server.server_address[0] == "127.0.0.1"


def test_what_the_page_says_of_itself(page: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", page.port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    body = answer.read().decode()
    assert answer.getheader("Cache-Control") == "no-store"
    assert answer.getheader("X-Frame-Options") == "DENY"
    assert "default-src 'none'" in body
    assert "connect-src 'self'" in body
    assert "up to 5 MB and 240 seconds" in body
    assert page.ask("HEAD", "/") == (200, b"")


def test_wrong_usage(evil_model: Path, page: Running) -> None:
    with pytest.raises(UserError, match=f"--port {page.port}: cannot be used"):
        open_server(evil_model, port=page.port)
    with pytest.raises(UsageError, match="--port 70000"):
        open_server(evil_model, port=70000)
    with pytest.raises(UsageError, match="limits"):
        open_server(evil_model, port=0, limits=Limits(seconds=0))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_in_a_browser(page: Running, changing: Path, tmp_path: Path) -> None:
    """A clip of an evil name dropped, for a class of an evil name: shown as text, nothing runs, nothing leaves."""
    clip = (
        tmp_path
        / """<img src=x onerror="alert(1)">'
.mp4"""
    )
    clip.write_bytes(changing.read_bytes())
    text = tmp_path / "notes.mp4"
    text.write_text("hello " * 100)
    home = f"http://127.0.0.1:{page.port}/"
    with Browser(tmp_path / "profile") as browser:
        for width, height in ((1200, 900), (390, 800)):
            browser.open(home, width, height)
            browser.drop(clip, 150, 150)
            browser.until("!document.getElementById('result').hidden")
            shown = browser.evaluate("document.getElementById('answers').innerText")
            assert EVIL in shown
            assert any(browser.evaluate("document.getElementById('first').innerText").startswith(c) for c in CLASSES)
            assert "onerror=" in browser.evaluate("document.getElementById('what').innerText")
            assert browser.evaluate("document.querySelectorAll('#films img').length") == 18
            assert browser.evaluate("[...document.querySelectorAll('#films img')].every((i) => i.naturalWidth > 100)")
            assert browser.evaluate("document.querySelectorAll('#chart polyline').length") == 6
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
            browser.evaluate("document.querySelectorAll('#films button')[3].click()")
            assert browser.evaluate("document.getElementById('told').innerText").startswith("0.2 s to 0.5 s: ")
            browser.drop(text, 150, 100)
            browser.until("!document.getElementById('fault').hidden")
            assert "neither a video nor an image" in browser.evaluate("document.getElementById('fault').innerText")
        refused = [one for one in browser.complaints if "415" in one]
        assert len(refused) == 2, "the browser's own note of each refused text file"
        assert browser.complaints == refused
        outside = [url for url in browser.requests if not url.startswith((home, "data:", f"blob:{home}"))]
        assert outside == []
