"""The web page of `serve`: a Starlette application, and uvicorn with the limits that it lacks.

The page is for the user of this machine, so the threats are other programs' mistakes and other web sites open in the
user's browser. Only this machine can connect (the socket is bound to 127.0.0.1). A foreign site that resolves its own
name to 127.0.0.1 (DNS rebinding) is recognised by the `Host` header, and one that posts here by the `Origin` header.
Every connection carries a single request, so there is no second one to smuggle in. No file is ever served, and
nothing of a clip is kept: it is written to a temporary file that has no name.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from video_swinv2.errors import UserError
from video_swinv2.inference.classifier import Classifier
from video_swinv2.inference.clip_summary import Limits, summarise_clip
from video_swinv2.inference.media_types import HEAD_BYTES, IMAGE, media_type_of_bytes
from video_swinv2.pages import render

ADDRESS = "127.0.0.1"
HOSTS = frozenset({ADDRESS, "localhost"})
PAGE, PREDICT = "/", "/predict"
UPLOADS_AT_ONCE = 3  # one is being classified while the others arrive or wait
CONNECTIONS_AT_ONCE = 32
LINGER_SECONDS = 2.0
_PORT = re.compile(r":\d{1,5}$")
_HEADERS = {
    "Cache-Control": "no-store",
    "Connection": "close",  # one request per connection
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_Result = TypeVar("_Result")


class PageServer:
    """The server of one model's page; a context manager. It listens from the start, and `run` answers."""

    def __init__(self, classifier: Classifier, port: int, limits: Limits) -> None:
        """port: 0 picks a free one. Raises OSError if the port cannot be used."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            # A port whose last connections are still in TIME_WAIT may be used again; one that is listened on may not.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((ADDRESS, port))
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise
        self.address, self.port = self._socket.getsockname()
        config = uvicorn.Config(
            make_app(classifier, limits),
            http=_LimitedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,  # nobody but the connection itself says where it comes from
            server_header=False,
            access_log=False,  # who looked at what stays between the page and its user
            log_config=None,
            log_level="critical",  # `_report_failure` prints its own line
            timeout_keep_alive=limits.silence_seconds,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)

    def __enter__(self) -> PageServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._socket.close()

    def run(self) -> None:
        """Answer requests until `stop` or, in the main thread, until Ctrl-C, which raises KeyboardInterrupt."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Make `run` return, within about two seconds; callable from any thread."""
        self._server.should_exit = True


def make_app(classifier: Classifier, limits: Limits) -> ASGIApp:
    """The application: `GET /` is the page, `POST /predict` classifies the clip in the body, all else is refused."""
    page = _Page(classifier, limits)
    app = Starlette(
        routes=[Route(PAGE, page.show), Route(PREDICT, page.predict, methods=["POST"])],
        middleware=[Middleware(_LocalOnly)],
        exception_handlers={HTTPException: _refuse, UserError: _refuse_clip, Exception: _report_failure},
    )
    app.router.redirect_slashes = False
    return app


class _LimitedProtocol(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with limits on connections, on a late request and on a response nobody reads.

    Without these a few idle connections could block the page for good. `timeout_keep_alive`, which uvicorn applies
    between requests only, is the limit on silence here.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection if there is room for it, and expect a request."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS_AT_ONCE:
            transport.abort()
            return
        self.loop.call_later(self.config.timeout_keep_alive, self._close_without_request)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client has sent all it will send, but may still read: True keeps the connection open for the response.

        If the body is incomplete, the application sees it end early and refuses it as too short.
        """
        if self.cycle is None:
            return False
        self.cycle.more_body = False
        self.cycle.message_event.set()
        return not self.cycle.response_complete

    def on_response_complete(self) -> None:
        """The response is in the buffer: whoever does not fetch it from there in time loses it."""
        super().on_response_complete()
        self.loop.call_later(self.config.timeout_keep_alive, self.transport.abort)

    def _close_without_request(self) -> None:
        if self.cycle is None:  # the header of a request has not arrived in full
            self.transport.abort()


class _LocalOnly:
    """Middleware that refuses requests made under another host name, and any query string: no page here takes one."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _PORT.sub("", Headers(scope=scope).get("host", "")).lower()
        if host not in HOSTS:
            await _Refusal(421, f"this page is served to {ADDRESS} and localhost only")(scope, receive, send)
        elif scope["query_string"]:
            await _Refusal(404, "there is no such page")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Page:
    """The two things that can be asked for: the page, and what the model says about a clip."""

    def __init__(self, classifier: Classifier, limits: Limits) -> None:
        self._classifier, self._limits = classifier, limits
        self._html = _render_page(classifier, limits)
        self._wants_video = classifier.card.preprocessing.frames is not None
        self._uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self._model = asyncio.Lock()

    async def show(self, request: Request) -> Response:
        """The page; without its content for HEAD."""
        return Response(self._html, media_type="text/html", headers=_HEADERS)

    async def predict(self, request: Request) -> Response:
        """The body of the request is a clip; the answer is what `summarise_clip` says about it, as JSON."""
        started = time.monotonic()
        length = _check_upload(request.headers, self._limits)
        if self._uploads.locked():
            raise HTTPException(503, "busy with other clips; try again in a moment")
        # A temporary file without a name: however this program ends, nothing of the clip is left.
        async with self._uploads:
            with tempfile.TemporaryFile() as file:
                await self._receive(request, file, length)
                async with self._model:
                    descriptor = file.fileno()
                    result = await _in_thread(lambda: summarise_clip(self._classifier, descriptor, self._limits))
        print(f"serve: a clip of {result['seconds']:.1f} s in {time.monotonic() - started:.1f} s", file=sys.stderr)
        return JSONResponse(result, headers=_HEADERS)

    async def _receive(self, request: Request, file: BinaryIO, length: int) -> None:
        """Write the body to `file`. HTTPException as soon as it turns out to be slow, short or not a clip."""
        deadline = time.monotonic() + self._limits.upload_seconds
        head, received, more = b"", 0, True
        while more:
            chunk, more = await _next_chunk(request, self._limits.silence_seconds, deadline)
            file.write(chunk)
            received += len(chunk)
            if len(head) < HEAD_BYTES:
                head = (head + chunk)[:HEAD_BYTES]
                if len(head) == HEAD_BYTES or (head and received == length):
                    self._check_media_type(head)
        if received < length or not length:
            raise HTTPException(400, "the upload is incomplete" if length else "the file is empty")
        file.flush()

    def _check_media_type(self, head: bytes) -> None:
        """Refuse by the first bytes whatever is not a clip, a playlist above all: it would make FFmpeg open others."""
        media_type = media_type_of_bytes(head)
        if media_type is None:
            raise HTTPException(415, "This is neither a video nor an image.")
        if media_type == IMAGE and self._wants_video:
            raise HTTPException(415, "This is an image, but the model takes videos.")


def _check_upload(headers: Headers, limits: Limits) -> int:
    """The length of an upload, checked before a byte of it is read: the server answers `Expect: 100-continue` later."""
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{headers.get('host')}":
        raise HTTPException(403, "other sites may not post here")
    text = headers.get("content-length", "")
    # With both headers the two ends of a proxy may disagree about where the body ends.
    if "transfer-encoding" in headers or not (text.isascii() and text.isdecimal()):
        raise HTTPException(411, "the request must give the length of the file (Content-Length)")
    length = int(text)
    if length > limits.upload_bytes:
        raise HTTPException(413, f"{length / 1e6:,.0f} MB exceed the limit of {limits.upload_bytes / 1e6:,.0f} MB")
    return length


async def _next_chunk(request: Request, silence_seconds: float, deadline: float) -> tuple[bytes, bool]:
    """The next bytes of the body, and whether more will follow. HTTPException if they do not arrive in time.

    Both clocks are needed: silence finds a stalled sender soon, the deadline one that sends a byte now and then.
    """
    left = deadline - time.monotonic()
    try:
        message = await asyncio.wait_for(request.receive(), max(0.0, min(silence_seconds, left)))
    except asyncio.TimeoutError:
        raise HTTPException(408, "the upload stalled" if left > silence_seconds else "the upload is too slow") from None
    if message["type"] == "http.disconnect":
        raise HTTPException(400, "the upload is incomplete")
    return message.get("body", b""), message.get("more_body", False)


async def _in_thread(work: Callable[[], _Result]) -> _Result:
    """Run `work` in a daemon thread, which, unlike those of asyncio's pool, does not delay the end at Ctrl-C."""
    future: concurrent.futures.Future[_Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # from here on nobody can cancel it, and its result has a place to go

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # handed to the coroutine that waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return await asyncio.wrap_future(future)


class _Refusal(JSONResponse):
    """An error status with one line that says why; then, for a moment, the rest of the request is read and dropped.

    Closing a connection with unread bytes resets it, which can destroy the response on its way to a client that is
    still sending. So the response goes out in full first, and the end of it, which closes, only afterwards.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__({"error": reason}, status, headers=_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drop_body(receive), LINGER_SECONDS)
        await send({"type": "http.response.body", "body": b""})


async def _drop_body(receive: Receive) -> None:
    """Read until the body or the connection ends."""
    while (await receive()).get("more_body", False):
        pass


async def _refuse(request: Request, error: Exception) -> Response:
    """The response to an HTTPException of ours, and to Starlette's for a path or method that does not exist."""
    if not isinstance(error, HTTPException):
        raise TypeError(f"not an HTTPException: {error!r}")
    if error.status_code == 405:  # a known path asked for with the method of the other, or a method nobody implements
        known = request.method in ("GET", "HEAD", "POST")
        return _Refusal(404 if known else 501, f"get {PAGE}, or post a clip to {PREDICT}")
    return _Refusal(error.status_code, error.detail)


async def _refuse_clip(request: Request, error: Exception) -> Response:
    """The response to a clip that cannot be read within the limits."""
    return _Refusal(422, str(error))


async def _report_failure(request: Request, error: Exception) -> Response:
    """A defect of ours: one line for the user of the terminal; the page keeps running."""
    print(f"serve: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    return _Refusal(500, "the clip could not be classified; see the terminal in which the page was started")


def _render_page(classifier: Classifier, limits: Limits) -> bytes:
    card = classifier.card
    values: dict[str, Any] = {
        "name": card.architecture["name"],
        "classes": len(card.classes),
        "preprocessing": card.preprocessing,
        "limits": limits,
        "settings": {"path": PREDICT, "most_bytes": limits.upload_bytes},
    }
    return render("video_swinv2.inference", "serve.html.j2", values)
