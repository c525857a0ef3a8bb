"""A page on this machine to drop a clip on: the answers, how they go over time, the frames that were used.

Only programs on this machine reach it, and of the pages in its browser only ours: another site that has its name
resolved to this address is known by the name (`Host`), one that posts here by its origin. No file is ever served.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import tempfile
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, BinaryIO

from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.inference.classifier import Classifier, open_classifier
from video_swinv2.inference.media_types import HEAD_BYTES, IMAGE, VIDEO, media_type_of_bytes
from video_swinv2.inference.clip_summary import Limits, summarise_clip
from video_swinv2.inference.watching import start_forkserver
from video_swinv2.pages import render

ADDRESS = "127.0.0.1"
HOSTS = frozenset({ADDRESS, "localhost"})
PAGE, PREDICT = "/", "/predict"
UPLOADS_AT_ONCE = 3  # one is looked at, the others come in and wait
CONNECTIONS_AT_ONCE = 32
SILENCE_SECONDS = 15.0
LINGER_SECONDS = 2.0
_CHUNK = 1 << 20
_PORT = re.compile(r":\d{1,5}$")
_HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class _RefusalError(Exception):
    """A request that is answered with a status and one line of why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class PageServer(ThreadingHTTPServer):
    """The server of one model; `server_port` tells its port. Close it with `server_close`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, classifier: Classifier, port: int, limits: Limits) -> None:
        self.classifier, self.limits = classifier, limits
        self.page = _page(classifier, limits)
        self.wanted = IMAGE if classifier.card.preprocessing.frames is None else VIDEO
        self.uploads = threading.BoundedSemaphore(UPLOADS_AT_ONCE)
        self.model = threading.Lock()
        self._connections = threading.BoundedSemaphore(CONNECTIONS_AT_ONCE)
        super().__init__((ADDRESS, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """As the library does, for so many connections at once."""
        if not self._connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As the library does; then another connection may come."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A line for what nobody expected; somebody who goes away in the middle is no error."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"serve: {type(error).__name__}: {error}", file=sys.stderr, flush=True)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    protocol_version = "HTTP/1.1"  # for `Expect: 100-continue`, so that a refused upload need not be sent
    server_version, sys_version = "video-swinv2", ""
    timeout = SILENCE_SECONDS

    def do_GET(self) -> None:
        """The page; of HEAD, what is said of it."""
        try:
            self._check_host()
            if self.path != PAGE:
                raise _RefusalError(HTTPStatus.NOT_FOUND, "there is one page here, /")
        except _RefusalError as refusal:
            self._answer_refusal(refusal)
            return
        self._answer(HTTPStatus.OK, "text/html; charset=utf-8", self.server.page)

    def do_HEAD(self) -> None:
        """See GET."""
        self.do_GET()

    def do_POST(self) -> None:
        """A clip as the body of the request -> what `look` says of it, as JSON."""
        started = time.monotonic()
        try:
            result = self._predict(self._checked_length())
        except _RefusalError as refusal:
            self._answer_refusal(refusal)
            return
        self._answer(HTTPStatus.OK, "application/json", json.dumps(result).encode())
        print(f"serve: a clip of {result['seconds']:.1f} s in {time.monotonic() - started:.1f} s", file=sys.stderr)

    def handle_expect_100(self) -> bool:
        """Refuse before the body is sent."""
        try:
            self._checked_length()
        except _RefusalError as refusal:
            self._answer_refusal(refusal)
            return False
        return super().handle_expect_100()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who looked at what stays between the page and its user."""

    def _predict(self, length: int) -> dict[str, Any]:
        server = self.server
        if not server.uploads.acquire(blocking=False):
            raise _RefusalError(HTTPStatus.SERVICE_UNAVAILABLE, "busy with other clips; send it again in a moment")
        try:
            # Without a name from the start: whatever ends this program, nothing of the clip is left.
            with tempfile.TemporaryFile() as file:
                self._receive(file, length)
                with server.model:
                    return summarise_clip(server.classifier, file.fileno(), server.limits)
        except UserError as error:
            raise _RefusalError(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from error
        finally:
            server.uploads.release()

    def _check_host(self) -> None:
        host = _PORT.sub("", self.headers.get("Host", "")).lower()
        if host not in HOSTS:
            raise _RefusalError(HTTPStatus.MISDIRECTED_REQUEST, f"this page is served to {ADDRESS} and localhost only")

    def _checked_length(self) -> int:
        """The length of an upload that may be taken; _RefusalError, before a byte of it is read, for any other."""
        self._check_host()
        origin = self.headers.get("Origin")
        if origin is not None and origin != f"http://{self.headers.get('Host')}":
            raise _RefusalError(HTTPStatus.FORBIDDEN, "another site may not post here")
        if self.path != PREDICT:
            raise _RefusalError(HTTPStatus.NOT_FOUND, f"clips are posted to {PREDICT}")
        text = self.headers.get("Content-Length", "")
        if not text.isascii() or not text.isdecimal():
            raise _RefusalError(HTTPStatus.LENGTH_REQUIRED, "the length of the file must be told (Content-Length)")
        length, most = int(text), self.server.limits.upload_bytes
        if length > most:
            raise _RefusalError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                f"{length / 1e6:,.0f} MB are more than the {most / 1e6:,.0f} MB this page takes",
            )
        return length

    def _receive(self, file: BinaryIO, length: int) -> None:
        """The body into the file, and _RefusalError as soon as it is seen to be slow, short or no clip."""
        deadline = time.monotonic() + self.server.limits.upload_seconds
        head, left = b"", length
        while left:
            if time.monotonic() > deadline:
                raise _RefusalError(HTTPStatus.REQUEST_TIMEOUT, "the file came too slowly")
            try:
                # What is there, and not all that is asked for: drop after drop must not keep us from the clock.
                chunk = self.rfile.read1(min(_CHUNK, left))
            except TimeoutError:
                raise _RefusalError(HTTPStatus.REQUEST_TIMEOUT, "the file stopped coming") from None
            if not chunk:
                break
            file.write(chunk)
            left -= len(chunk)
            if len(head) < HEAD_BYTES:
                head = (head + chunk)[:HEAD_BYTES]
                if len(head) == HEAD_BYTES or not left:
                    self._check_kind(head)
        if left or not length:
            raise _RefusalError(HTTPStatus.BAD_REQUEST, "the file did not come whole" if left else "the file is empty")
        file.flush()

    def _check_kind(self, head: bytes) -> None:
        kind = media_type_of_bytes(head)
        if kind is None:
            raise _RefusalError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "This is neither a video nor an image.")
        if kind == IMAGE and self.server.wanted == VIDEO:
            raise _RefusalError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "This is an image, and the model takes videos.")

    def _answer_refusal(self, refusal: _RefusalError) -> None:
        self._answer(refusal.status, "application/json", json.dumps({"error": str(refusal)}).encode())

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.close_connection = True
        self.send_response(status)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()
        if status != HTTPStatus.OK:
            self._linger()

    def _linger(self) -> None:
        """Read on a moment: closing with bytes unread would take the answer away from who still sends."""
        deadline = time.monotonic() + LINGER_SECONDS
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(LINGER_SECONDS)
            while time.monotonic() < deadline and self.connection.recv(_CHUNK):
                pass


def serve(
    model_path: Path | str,
    *,
    port: int = 8000,
    top: int = 5,
    limits: Limits | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Serve the page of a model until Ctrl-C. port: 0 takes a free one; the address is printed."""
    with open_server(model_path, port=port, top=top, limits=limits, device=device, precision=precision) as server:
        print(f"http://{ADDRESS}:{server.server_port}/ is ready; Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def open_server(
    model_path: Path | str,
    *,
    port: int,
    top: int = 5,
    limits: Limits | None = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> PageServer:
    """A server that is listening. Raises UsageError for limits and ports that cannot be, UserError for one in use."""
    limits = limits or Limits()
    if not 0 <= port < 2**16:
        raise UsageError(f"--port {port}: give a number from 0 to 65535")
    if limits.upload_bytes < 1 or not limits.seconds > 0:
        raise UsageError("the limits of size and time must be more than 0")
    classifier = open_classifier(model_path, top=top, device=device, precision=precision)
    start_forkserver()
    try:
        return PageServer(classifier, port, limits)
    except OSError as error:
        raise UserError(f"--port {port}: cannot be used ({error.strerror}); give another, or 0 for any") from error


def _page(classifier: Classifier, limits: Limits) -> bytes:
    card = classifier.card
    values: dict[str, object] = {
        "name": card.architecture["name"],
        "classes": len(card.classes),
        "preprocessing": card.preprocessing,
        "limits": limits,
        "settings": {"path": PREDICT, "most_bytes": limits.upload_bytes},
    }
    return render("video_swinv2.inference", "serve.html.j2", values)
