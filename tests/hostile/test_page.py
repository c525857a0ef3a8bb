"""The page under clients that are slow, silent, many or gone, and under a machine that has no threads or disk left."""

from __future__ import annotations

import os
import random
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe, resource_sharer
from pathlib import Path

import h11
import pytest
import torch

from tests.inference.conftest import evil_model  # noqa: F401 - a fixture
from tests.inference.test_serve import Running, ending_of, read_to_end
from tests.waiting import wait_until
from video_swinv2.data.decode import named_errors
from video_swinv2.errors import UserError
from video_swinv2.inference import watching, web_app
from video_swinv2.inference.clip_summary import Limits
from video_swinv2.inference.serve import open_server
from video_swinv2.inference.watching import UnexpectedFailureError, WatchRequest
from video_swinv2.inference.web_app import CLASSIFYING, UPLOADS_AT_ONCE
from video_swinv2.inference.web_limits import CONNECTIONS_AT_ONCE
from video_swinv2.memory import kernel_bytes

GIVE_UP_SECONDS = 120.0
MIB = 2**20
HEADER = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Long: "
# An MP4 by its first bytes, which is all that the page looks at before an upload is complete.
MP4_HEAD = b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"


@pytest.fixture(scope="module")
def page(evil_model: Path) -> Iterator[Running]:  # noqa: F811
    """A page on which no deadline helps a test: clients may be silent for longer than the test takes."""
    limits = Limits(2 * MIB, upload_seconds=600.0, seconds=240.0, silence_seconds=600)
    with open_server(evil_model, port=0, device="cpu", limits=limits) as server, Running(server) as running:
        yield running


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory, write_video: Callable[..., Path]) -> bytes:
    pixels = torch.randint(0, 256, (12, 48, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return write_video(tmp_path_factory.mktemp("clip") / "clip.mp4", pixels.numpy()).read_bytes()


def settle(page: Running) -> None:
    """Wait until the server has finished with every connection and every clip."""
    state = page.server._server.server_state
    wait_until(lambda: not state.connections and not state.tasks, GIVE_UP_SECONDS)
    wait_until(lambda: CLASSIFYING not in [thread.name for thread in threading.enumerate()], GIVE_UP_SECONDS)


class Drips:
    """A context manager: `count` connections that send a byte of their header now and then, and never its end."""

    def __init__(self, page: Running, count: int) -> None:
        self.connections = [page.connect() for _ in range(count)]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._drip, daemon=True)

    def __enter__(self) -> Drips:
        for connection in self.connections:
            self._send(connection, HEADER)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for connection in self.connections:
            connection.close()

    def _drip(self) -> None:
        while not self._stop.wait(0.05):
            for connection in self.connections:
                self._send(connection, b"x")

    @staticmethod
    def _send(connection: socket.socket, content: bytes) -> None:
        with suppress(OSError):  # the server may have closed it
            connection.sendall(content)


def test_the_oldest_silent_connection_gives_way(page: Running) -> None:
    with Drips(page, 2 * CONNECTIONS_AT_ONCE) as drips:
        assert all(page.is_serving() for _ in range(5))
        assert {ending_of(one) for one in drips.connections[:CONNECTIONS_AT_ONCE]} == {b""}
    settle(page)


def test_an_upload_is_not_closed_for_others(page: Running, clip: bytes) -> None:
    """Nor are clients that do not read the end of their refusal, which give way like the silent ones."""
    with page.begin(len(clip)) as upload:
        upload.sendall(clip[:1000])
        with Drips(page, 2 * CONNECTIONS_AT_ONCE):
            assert page.is_serving()
            unread = [page.begin(2 * 10**9) for _ in range(CONNECTIONS_AT_ONCE)]
            assert page.is_serving()
            upload.sendall(clip[1000:])
            assert read_to_end(upload).startswith(b"HTTP/1.1 200 ")
    for connection in unread:
        connection.close()
    settle(page)


def test_drops_do_not_extend_the_deadline_of_a_header(evil_model: Path) -> None:  # noqa: F811
    limits = Limits(silence_seconds=1)
    with (
        open_server(evil_model, port=0, device="cpu", limits=limits) as server,
        Running(server) as running,
        Drips(running, 3) as drips,
    ):
        assert {ending_of(one) for one in drips.connections} == {b""}


def test_an_upload_that_drips_loses_its_place_long_before_its_time_is_up(evil_model: Path) -> None:  # noqa: F811
    limits = Limits(upload_seconds=600.0, silence_seconds=1)
    with open_server(evil_model, port=0, device="cpu", limits=limits) as server, Running(server) as running:
        with running.begin(MIB) as dripping:
            dripping.settimeout(0.1)
            dripping.sendall(MP4_HEAD)
            answer, deadline = b"", time.monotonic() + GIVE_UP_SECONDS / 4
            while not answer and time.monotonic() < deadline:
                dripping.sendall(b"x")
                with suppress(TimeoutError):
                    answer = dripping.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        # A sender that is silent for longer at a time, but not slow.
        with running.begin(MIB) as pausing:
            pausing.sendall(MP4_HEAD + bytes(MIB // 2))
            time.sleep(0.7)
            pausing.sendall(bytes(MIB // 2 - len(MP4_HEAD)))
            assert read_to_end(pausing).startswith(b"HTTP/1.1 422 ")


@pytest.mark.parametrize("number", [1, 2])
def test_a_thread_that_cannot_start_costs_one_answer(
    page: Running, clip: bytes, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first thread that a clip needs, or the second, if there is one."""
    resource_sharer.stop()
    start, left = threading.Thread.start, [number]

    def fail_once(thread: threading.Thread) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail_once)
        status, answer = page.post(clip)
    assert status in (200, 500)
    assert "thread" not in answer.get("error", "")
    for _ in range(UPLOADS_AT_ONCE + 1):
        assert page.post(clip)[0] == 200, "no place is lost"


def test_a_clip_that_lies_about_its_length_buys_no_segments(page: Running, write_video: Callable[..., Path]) -> None:
    """300 frames that claim to last a millisecond; one segment per frame would be 294 of them."""
    pixels = torch.randint(0, 256, (300, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as folder:
        content = write_video(Path(folder) / "clip.mkv", pixels.numpy()).read_bytes()
    # Matroska's element Duration (0x4489), a double in milliseconds, of 8 bytes (0x88).
    lying, times = re.subn(rb"\x44\x89\x88.{8}", b"\x44\x89\x88" + struct.pack(">d", 1.0), content, flags=re.DOTALL)
    assert times == 1
    status, answer = page.post(lying)
    assert (status, answer["pictures"]) == (200, 300)
    assert len(answer["windows"]) <= Limits().segments + 1


def test_a_full_disk_is_one_plain_answer(
    page: Running, clip: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", lambda: Path("/dev/full").open("w+b"))  # noqa: SIM115 - closed by the page
        status, answer = page.post(clip)
    assert (status, "terminal" in answer["error"]) == (500, True)
    assert "No space left on device" in capsys.readouterr().err
    assert page.post(clip)[0] == 200


@pytest.mark.parametrize("h11_digits", [20, 10**6])
@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: " + "9" * 4301,),
        ("Content-Length: " + "0" * 4301 + "5",),
        ("Content-Length: " + "9" * 60_000,),
        ("Content-Length: +5",),
        ("Content-Length: -5",),
        ("Content-Length: 0x10",),
        ("Content-Length: 5 5",),
        ("Content-Length: \N{SUPERSCRIPT TWO}",),
        ("Content-Length: 5", "Content-Length: 05"),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip, chunked",),
        ("Upgrade: websocket", "Connection: upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAAA"),
    ],
    ids=lambda lines: lines[0][:30] if isinstance(lines, tuple) else str(lines),
)
def test_every_senseless_length_is_answered(
    page: Running, lines: tuple[str, ...], h11_digits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by versions of h11 that do not limit the digits themselves, as those before 0.16."""
    monkeypatch.setattr(h11._headers, "CONTENT_LENGTH_MAX_DIGITS", h11_digits)
    with page.send_header("POST /predict", *lines) as odd:
        assert odd.recv(9) == b"HTTP/1.1 "
        assert odd.recv(1) == b"4"


def test_a_body_that_breaks_off_in_nonsense_is_not_printed(
    page: Running, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Before the page has answered, and after it has."""
    for path, status in (("/predict", b"411 "), ("/nowhere", b"404 ")):
        with page.send_header(f"POST {path}", "Transfer-Encoding: chunked") as odd:
            assert odd.recv(13)[9:] == status
            odd.sendall(b"5\r\nhello\r\nno number\r\n")
            assert read_to_end(odd).count(b"HTTP/1.1 ") == 0
        with page.send_header(f"POST {path}", "Transfer-Encoding: chunked\r\n\r\nno number") as odd:
            assert read_to_end(odd).count(b"HTTP/1.1 ") == 1
    settle(page)
    assert capfd.readouterr().err == ""
    assert caplog.records == []


def test_a_model_that_is_too_slow_ends_at_the_limit(clip: bytes) -> None:
    """Although the next segment is always there: the decoder is far ahead of the model."""

    request = WatchRequest("The clip", 4, 1, (32, 32), every_seconds=0.04, ahead=100)
    with tempfile.TemporaryFile() as file:
        file.write(clip)
        file.flush()
        with watching.Watcher(request, descriptor=file.fileno(), limit_seconds=GIVE_UP_SECONDS) as watcher:
            segments = iter(watcher)
            next(segments)
            watcher._deadline = time.monotonic()  # the model has taken all the time
            with pytest.raises(UserError, match="took longer than"):
                next(segments)


def test_the_text_of_an_exception_stays_in_the_terminal(
    page: Running, clip: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secret = "'NoneType' object has no attribute 'width'"

    def fail_inside(*_: object) -> None:
        raise UnexpectedFailureError(f"The clip: cannot be decoded (AttributeError: {secret}\x1b[2J)")

    monkeypatch.setattr(web_app, "summarise_clip", fail_inside)
    status, answer = page.post(clip)
    assert (status, answer["error"]) == (
        422,
        "the clip cannot be decoded; see the terminal in which the page was started",
    )
    shown = capsys.readouterr().err
    assert secret in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    ("fault", "unexpected"),
    [
        (AttributeError("'NoneType' object has no attribute 'width'"), True),
        (OverflowError("Python int too large"), True),
        (OSError(22, "Invalid argument"), False),
        (MemoryError(), False),
        (UserError("The clip: no video stream"), False),
    ],
)
def test_what_the_decoder_raises_is_told_apart(
    fault: Exception, unexpected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception of a library inside and outside of the reader's own net."""

    def fail(*_: object, **__: object) -> None:
        raise fault

    def fail_in_net(*_: object, **__: object) -> None:
        with named_errors("The clip"):
            raise fault

    for way in (fail, fail_in_net):
        monkeypatch.setattr(watching, "FrameStream", way)
        ours, theirs = Pipe()
        watching._watch(theirs, WatchRequest("The clip", 4, 1, (32, 32)), 0)
        assert ours.recv() is None
        failed = ours.recv()
        assert failed.message.startswith("The clip: ")
        assert failed.unexpected == unexpected


def test_threads_descriptors_and_memory_stay_flat(page: Running, clip: bytes) -> None:
    """After 64 dripping connections, 1,000 requests and 200 aborted uploads of 1 MiB, all at once."""
    names = random.Random(0)
    assert page.post(clip)[0] == 200  # whatever is loaded only once is there
    settle(page)
    before = threads(), descriptors(), resident_bytes()
    with Drips(page, 64):
        for number in range(1000):
            if number % 5 == 0:
                abort_upload(page, names.randrange(MIB // 2, MIB))
            assert page.is_serving()
    settle(page)
    assert (threads(), descriptors()) == before[:2]
    # The uploads together had 150 MiB, and the pages sent 18 MiB. Neither may be kept. Some memory that was freed stays
    # with the allocator.
    assert resident_bytes() - before[2] < 12 * MIB
    assert page.post(clip)[0] == 200


def abort_upload(page: Running, size: int) -> None:
    """Send the first part of an upload and reset the connection."""
    with page.begin(2 * MIB) as upload:
        with suppress(OSError):  # the page may have refused it, being busy with others
            upload.sendall(MP4_HEAD + bytes(size))
        upload.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_bytes() -> int:
    found = kernel_bytes("VmRSS")
    assert found is not None
    return found
