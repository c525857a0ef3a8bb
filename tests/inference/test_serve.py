"""The page under real requests and in a real browser: what is refused, what is answered, and that it keeps running."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_media import write_disguised
from tests.inference.browser import Browser
from tests.inference.conftest import CLASSES, EVIL
from video_swinv2.data.media import IMAGE
from video_swinv2.errors import UsageError, UserError
from video_swinv2.inference import serve as serve_module
from video_swinv2.inference import web_app
from video_swinv2.inference.clip_summary import Limits
from video_swinv2.inference.predictor import OverTime, predict
from video_swinv2.inference.serve import open_server
from video_swinv2.inference.web_app import PageServer
from video_swinv2.inference.web_limits import CONNECTIONS_AT_ONCE

MAX_BYTES = 5 * 10**6
SILENCE_SECONDS = 2
GIVE_UP_SECONDS = 600


class Running:
    """A context manager that runs a server in a thread, and sends requests to it."""

    def __init__(self, server: PageServer) -> None:
        self.server, self.port = server, server.port
        self._thread = threading.Thread(target=server.run, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.stop()
        self._thread.join(30)
        assert not self._thread.is_alive(), "the server did not stop"

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()

    def post(self, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
        status, answer = self.ask("POST", "/predict", body, **headers)
        return status, json.loads(answer)

    def is_serving(self) -> bool:
        return self.ask("GET", "/")[0] == 200

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=600)

    def begin(self, length: int, *lines: str) -> socket.socket:
        """An upload of which only the header has been sent."""
        return self.send_header("POST /predict", f"Content-Length: {length}", *lines)

    def send_header(self, request: str, *lines: str) -> socket.socket:
        connection = self.connect()
        header = (f"{request} HTTP/1.1", f"Host: 127.0.0.1:{self.port}", *lines, "", "")
        connection.sendall("\r\n".join(header).encode())
        return connection


def read_to_end(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def ending_of(connection: socket.socket) -> bytes:
    """What the server sends before it closes the connection or resets it."""
    try:
        return read_to_end(connection)
    except ConnectionResetError:
        return b""


@pytest.fixture(scope="module")
def page(evil_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A page whose temporary files go to a folder of their own, which must be empty in the end."""
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        limits = Limits(MAX_BYTES, seconds=240.0, silence_seconds=SILENCE_SECONDS)
        with open_server(evil_model, port=0, top=6, device="cpu", limits=limits) as server, Running(server) as running:
            yield running
    assert [path for path in folder.rglob("*") if path.is_file()] == [], "nothing is kept"


def test_a_clip_gets_the_same_answer_as_from_predict(page: Running, evil_model: Path, changing: Path) -> None:
    status, answer = page.post(changing.read_bytes())
    assert status == 200
    # 33 frames after the first segment, shared by 11 more, are 3 each.
    assert len(answer["windows"]) == 12
    (expected,) = predict(evil_model, [changing], device="cpu", top=6, over_time=OverTime(every_seconds=0.12))
    assert answer["views"] == expected.views == "videoswin-4x3: 4 clips x 3 crops"
    assert [one["name"] for one in answer["answers"]] == [one.name for one in expected.answers]
    for ours, theirs in zip(answer["answers"], expected.answers, strict=True):
        assert ours["probability"] == pytest.approx(theirs.probability, abs=1e-6)
    for ours, moment in zip(answer["windows"], expected.segments, strict=True):
        assert (ours["start_seconds"], ours["end_seconds"]) == (moment.start_seconds, moment.end_seconds)
        named = {one["name"]: one["probability"] for one in ours["answers"]}
        assert named == pytest.approx({one.name: one.probability for one in moment.answers}, abs=1e-6)
        assert ours["shares"] == [named[one["name"]] for one in answer["answers"]]
        assert ours["film"].startswith("data:image/jpeg;base64,")
    assert answer["pictures"] == 40


def form(clip: bytes, boundary: str = "x-1", head: str = 'Content-Disposition: form-data; name="clip"\r\n') -> bytes:
    """A clip as the only part of a form, as curl sends it."""
    return f"--{boundary}\r\n{head}\r\n".encode() + clip + f"\r\n--{boundary}--\r\n".encode()


def test_a_form_gets_the_answer_of_the_clip_in_it(page: Running, changing: Path) -> None:
    """As sent by hand and, where it is installed, by `curl -F`, as the documentation says."""
    clip, form_type = changing.read_bytes(), {"Content-Type": 'multipart/form-data; boundary="x-1"'}
    status, expected = page.post(clip)
    other = form(clip)[: -len("--x-1--\r\n")] + form(b"5", head='Content-Disposition: form-data; name="top"\r\n')
    for body in (form(clip), form(clip, head=""), other):
        status, answer = page.post(body, **form_type)
        assert (status, answer["answers"], answer["pictures"]) == (200, expected["answers"], 40)
    if shutil.which("curl"):
        command = ["curl", "-s", "-F", f"clip=@{changing}", f"http://127.0.0.1:{page.port}/predict"]
        sent = subprocess.run(command, capture_output=True, check=True, timeout=GIVE_UP_SECONDS)
        assert json.loads(sent.stdout)["answers"] == expected["answers"]


def test_forms_without_a_clip_are_refused(page: Running, changing: Path) -> None:
    clip = changing.read_bytes()
    form_type = "multipart/form-data; boundary=x-1"
    for body, content_type, status, reason in (
        (form(clip), "multipart/form-data", 400, "the form has no valid boundary"),
        (form(clip), "multipart/form-data; boundary=" + 71 * "x", 400, "the form has no valid boundary"),
        (form(clip, "y"), form_type, 400, "the form does not begin with a file"),
        (clip, form_type, 400, "the form does not begin with a file"),
        (form(clip, head="A: " + 9000 * "a" + "\r\n"), form_type, 400, "the form does not begin with a file"),
        (form(clip)[:-20], form_type, 400, "the form is incomplete"),
        (form(b"hello " * 100), form_type, 415, "this is neither a video nor an image"),
        (form(b""), form_type, 415, "this is neither a video nor an image"),
    ):
        found, answer = page.post(body, **{"Content-Type": content_type})
        assert (found, answer["error"].split(";")[0]) == (status, reason)
    assert page.is_serving()


def test_ten_gigabytes_are_refused_before_they_are_sent(page: Running) -> None:
    """Whether the client asks first, sends without reading the response, or sends and then reads it."""
    with page.begin(10**10, "Expect: 100-continue") as asking:
        assert asking.recv(1000).startswith(b"HTTP/1.1 413 ")
    block = bytes(1 << 20)
    with page.begin(10**10) as sending, pytest.raises(OSError, match=r"reset|[Bb]roken"):
        deque(map(sending.sendall, repeat(block, 9_000)), maxlen=0)
    with page.begin(10**10) as sending:
        sending.sendall(block)
        answer = read_to_end(sending)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"10,000 MB, above the limit of 5 MB" in answer
    assert page.is_serving()


def test_other_files_than_clips_are_refused(
    page: Running, tmp_path: Path, write_video: Callable[..., Path], outside_data: Path
) -> None:
    assert page.post(b"hello\n" * 1000) == (415, {"error": "this is neither a video nor an image"})
    assert page.post(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")[0] == 415, (
        "a playlist could make FFmpeg read other files"
    )
    assert page.post(b"\x89PNG\r\n\x1a\n" + bytes(1000))[0] == 415
    image = (415, {"error": "this is an image, but the model takes videos"})
    kinds = write_disguised(tmp_path, write_video)
    assert {name: page.post((tmp_path / name).read_bytes()) == image for name in kinds} == {
        name: kind == IMAGE for name, kind in kinds.items()
    }
    status, answer = page.post((tmp_path / "animated.gif").read_bytes())
    assert (status, answer["pictures"]) == (200, 12)
    assert page.post(b"")[0] == 400
    for file in sorted((outside_data / "odd_clips" / "broken").iterdir()):
        status, answer = page.post(file.read_bytes())
        assert status in (200, 400, 413, 415, 422), (file, answer)
        assert ("error" in answer) == (status != 200)
    assert page.is_serving()


def test_a_file_that_hangs_decord_is_classified(page: Running, outside_data: Path) -> None:
    status, answer = page.post((outside_data / "odd_clips" / "ft__fixture2.mpg").read_bytes())
    assert status == 200
    assert answer["pictures"] > 400
    assert page.is_serving()


def test_a_decoder_beyond_its_limits_is_killed(evil_model: Path, outside_data: Path) -> None:
    clip = (outside_data / "odd_clips" / "ft__fixture2.mpg").read_bytes()
    limits = Limits(seconds=0.05)
    with open_server(evil_model, port=0, device="cpu", limits=limits) as server, Running(server) as running:
        status, answer = running.post(clip)
        assert (status, answer["error"]) == (422, "The clip: took longer than 0.05 seconds; send a shorter one")
        assert running.is_serving()
    limits = Limits(seconds=240.0, memory_bytes=1)
    with open_server(evil_model, port=0, device="cpu", limits=limits) as server, Running(server) as running:
        assert running.post(clip)[0] == 422, "memory"
        assert running.is_serving()


def test_slow_and_broken_uploads_do_not_block_others(page: Running, changing: Path) -> None:
    content = changing.read_bytes()
    with page.begin(len(content)) as slow, page.begin(len(content)) as gone:
        slow.sendall(content[:600])
        gone.sendall(content[:600])
        gone.shutdown(socket.SHUT_WR)
        assert page.is_serving()
        assert page.post(content)[0] == 200, "the third upload"
        assert gone.recv(1000).startswith(b"HTTP/1.1 400 ")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
    with page.begin(len(content)), page.begin(len(content)), page.begin(len(content)):
        time.sleep(0.3)
        assert page.post(content)[0] == 503
    deadline = time.monotonic() + 600
    while page.post(content)[0] != 200:
        assert time.monotonic() < deadline


def test_other_sites_and_other_files_are_not_served(page: Running, changing: Path) -> None:
    content = changing.read_bytes()
    assert page.ask("GET", "/", Host="evil.example")[0] == 421, "DNS rebinding"
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
    with page.send_header("POST /predict") as odd:
        assert odd.recv(1000).startswith(b"HTTP/1.1 411 "), "no length"
    assert page.server.address == "127.0.0.1"
    assert page.server._socket.getsockname()[0] == "127.0.0.1"


def test_requests_that_could_hide_another_are_refused(page: Running) -> None:
    """Lengths that two programs may read differently, and a second request behind the first."""
    for lines in (
        ("Content-Length: -1",),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: 5, 6",),
        ("Content-Length: 5", "Host: evil.example"),
    ):
        with page.send_header("POST /predict", *lines) as odd:
            assert odd.recv(1000).startswith(b"HTTP/1.1 400 "), lines
    for lines in (("Transfer-Encoding: chunked",), ("Transfer-Encoding: chunked", "Content-Length: 5")):
        with page.send_header("POST /predict", *lines) as odd:
            assert odd.recv(1000).startswith(b"HTTP/1.1 411 "), lines
    with page.begin(5) as pair:
        pair.sendall(b"helloGET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert read_to_end(pair).count(b"HTTP/1.1 ") == 1, "the connection ends with the first request"
    assert page.is_serving()


def test_idle_connections_do_not_block_the_page(page: Running) -> None:
    idle = [page.connect() for _ in range(CONNECTIONS_AT_ONCE)]
    try:
        time.sleep(0.3)  # until the server has accepted them
        assert page.is_serving(), "the oldest connection gives way"
        idle[1].sendall(b"GET / HTTP/1.1\r\nHost: ")
        started = time.monotonic()
        assert [ending_of(connection) for connection in idle] == [b""] * len(idle)
        assert time.monotonic() - started < SILENCE_SECONDS + 5
    finally:
        for connection in idle:
            connection.close()
    assert page.is_serving()


def test_a_client_that_does_not_read_is_cut_off(evil_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a response that does not fit in the buffers of the sockets."""
    monkeypatch.setattr(web_app, "render", lambda *_: bytes(50 * 10**6))
    limits = Limits(silence_seconds=1)
    with (
        open_server(evil_model, port=0, device="cpu", limits=limits) as server,
        Running(server) as running,
        running.send_header("GET /") as idle,
    ):
        assert idle.recv(1) == b"H"
        deadline = time.monotonic() + 600
        while server._server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_defect_is_answered_and_reported_in_one_line(
    page: Running, changing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(web_app, "summarise_clip", fail)
    status, answer = page.post(changing.read_bytes())
    assert status == 500
    assert "terminal" in answer["error"]
    assert capsys.readouterr().err == "serve: ZeroDivisionError: a defect\n"
    assert page.is_serving()


def test_headers_and_policy_of_the_page(page: Running) -> None:
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


def test_missing_packages_are_one_line(evil_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_module.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    with pytest.raises(UserError, match=r"uvicorn not installed; pip install 'video-swinv2\[serve\]'"):
        open_server(evil_model, port=0)


def test_ctrl_c_ends_it(evil_model: Path) -> None:
    """Also while a client is in the middle of an upload."""
    command = [sys.executable, "-m", "video_swinv2", "serve", str(evil_model), "--port", "0"]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    port = int(serving.stdout.readline().split("http://127.0.0.1:")[1].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), timeout=600) as uploading:
        uploading.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhello")
        time.sleep(0.5)
        serving.send_signal(signal.SIGINT)
        _, errors = serving.communicate(timeout=600)
    assert serving.returncode == 0
    assert errors == f"serve: loading {evil_model}\n"


def top_of_scale(browser: Browser) -> float:
    """The largest percentage beside the grid lines of the chart."""
    labels = browser.evaluate("[...document.querySelectorAll('#chart text')].map((one) => one.textContent)")
    return max(float(label.removesuffix(" %")) for label in labels if label.endswith(" %"))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
def test_in_a_browser(page: Running, changing: Path, tmp_path: Path) -> None:
    """Hostile names of a clip and of a class are shown as text; none of it runs, and nothing leaves the page."""
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
            assert browser.evaluate("document.querySelectorAll('#films img').length") == 12
            assert browser.evaluate("[...document.querySelectorAll('#films img')].every((i) => i.naturalWidth > 100)")
            assert browser.evaluate("document.querySelectorAll('#chart polyline').length") == 6
            assert "videoswin-4x3: 4 clips x 3 crops" in browser.evaluate("document.getElementById('what').innerText")
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "no horizontal scrolling"
            most = browser.evaluate("Math.max(...result.windows.flatMap((one) => one.shares))")
            assert top_of_scale(browser) == next(100 * top for top in (0.2, 0.5, 1.0) if most <= top)
            # As of a model of 400 classes that is certain of none.
            browser.evaluate(
                "result.windows.forEach((one) => { one.shares = one.shares.map((p) => p / 50); }); chart()"
            )
            assert top_of_scale(browser) == next(100 * top for top in (0.01, 0.02) if most / 50 <= top)
            browser.evaluate("document.querySelectorAll('#films button')[3].click()")
            assert browser.evaluate("document.getElementById('moment').innerText").startswith("0.4 s to 0.6 s: ")
            browser.drop(text, 150, 100)
            browser.until("!document.getElementById('fault').hidden")
            assert "neither a video nor an image" in browser.evaluate("document.getElementById('fault').innerText")
        refused = [one for one in browser.complaints if "415" in one]
        assert len(refused) == 2, "the browser's own message about each refused text file"
        assert browser.complaints == refused
        outside = [url for url in browser.requests if not url.startswith((home, "data:", f"blob:{home}"))]
        assert outside == []
