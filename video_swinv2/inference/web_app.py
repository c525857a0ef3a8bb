"""The web server of `serve`: a Starlette application, run by uvicorn with additional limits.

The page is meant for the user of this machine. The threats are mistakes of other programs, and other web sites that are
open in the user's browser. Only this machine can connect, because the socket is bound to 127.0.0.1. A foreign site that
resolves its own name to 127.0.0.1 (DNS rebinding) is recognised by the `Host` header, and one that posts here by the
`Origin` header. Every connection carries a single request, so a second one cannot be smuggled in. No file is ever
served, and no clip is kept: uploads go to a temporary file that has no name. Limits on connections are in
web_limits.py.
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

from video_swinv2.data.media import HEAD_BYTES, IMAGE, media_type_of_bytes, media_type_of_content
from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.inference.classifier import Classifier
from video_swinv2.inference.clip_summary import Limits, summarise_clip
from video_swinv2.inference.watching import UnexpectedFailureError
from video_swinv2.inference.web_forms import form_boundary, keep_first_part
from video_swinv2.inference.web_limits import ACCEPTED_AT_ONCE, LimitedProtocol, LimitedServer
from video_swinv2.pages import render

ADDRESS = "127.0.0.1"
HOSTS = frozenset({ADDRESS, "localhost"})
PAGE, PREDICT = "/", "/predict"
UPLOADS_AT_ONCE = 3  # one clip is being classified while the others arrive or wait
CLASSIFYING = "classify a clip"  # the name of the thread that does
LINGER_SECONDS = 2.0  # how long the rest of a refused request is read
# The port at the end of a Host header.
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
    """The server of one model's page; a context manager. Connections are accepted at once and answered by `run`."""

    def __init__(self, classifier: Classifier, port: int, limits: Limits) -> None:
        """port: 0 picks a free one. Raises OSError if the port cannot be used."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            # Allows a port whose last connections are still in TIME_WAIT, but not one that another program listens on.
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((ADDRESS, port))
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise
        self.address, self.port = self._socket.getsockname()
        # uvicorn as plain HTTP/1.1: no WebSockets, no start-up hooks, no logs, and no trust in forwarding headers.
        config = uvicorn.Config(
            make_app(classifier, limits),
            http=LimitedProtocol,
            ws="none",
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            proxy_headers=False,  # the address of a client is that of its connection
            server_header=False,
            access_log=False,  # what users look at is not recorded
            log_config=None,
            log_level="critical",  # `_report_failure` prints its own line
            backlog=ACCEPTED_AT_ONCE,
            timeout_keep_alive=limits.silence_seconds,
            timeout_graceful_shutdown=1,
        )
        self._server = LimitedServer(config)

    def __enter__(self) -> PageServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self._socket.close()

    def run(self) -> None:
        """Answer requests until `stop` or, in the main thread, Ctrl-C, which raises KeyboardInterrupt."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        """Make `run` return within about two seconds. May be called from any thread."""
        self._server.should_exit = True


def make_app(classifier: Classifier, limits: Limits) -> ASGIApp:
    """The application: `GET /` returns the page, `POST /predict` classifies the clip in the body of the request.

    Everything else is refused.
    """
    page = _Page(classifier, limits)
    app = Starlette(
        routes=[Route(PAGE, page.show), Route(PREDICT, page.predict, methods=["POST"])],
        middleware=[Middleware(_LocalOnly)],
        exception_handlers={
            HTTPException: _refuse,
            UserError: _refuse_clip,
            UnexpectedFailureError: _report_broken_clip,
            Exception: _report_failure,
        },
    )
    # `/predict/` is refused rather than redirected to `/predict`.
    app.router.redirect_slashes = False
    return app


class _LocalOnly:
    """Middleware that refuses requests under a foreign host name, and query strings, which no page here takes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = _PORT.sub("", Headers(scope=scope).get("host", "")).lower()
        if host not in HOSTS:
            # 421 is "Misdirected Request".
            await _Refusal(421, f"this page is served to {ADDRESS} and localhost only")(scope, receive, send)
        elif scope["query_string"]:
            await _Refusal(404, "there is no such page")(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Page:
    """The two endpoints: the page, and the classification of a clip."""

    def __init__(self, classifier: Classifier, limits: Limits) -> None:
        self._classifier, self._limits = classifier, limits
        self._html = _render_page(classifier, limits)
        self._wants_video = classifier.card.preprocessing.frames is not None
        # At most UPLOADS_AT_ONCE clips are held at a time, and the model classifies one of them.
        self._uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)
        self._model = asyncio.Lock()

    async def show(self, request: Request) -> Response:
        """Return the page; for HEAD, only its headers."""
        return Response(self._html, media_type="text/html", headers=_HEADERS)

    async def predict(self, request: Request) -> Response:
        """Classify the clip in the request. Returns the result of `summarise_clip` as JSON.

        The clip is the body of the request or, if that is a form, the first file in it.
        """
        started = time.monotonic()
        length = _check_upload(request.headers, self._limits)
        if self._uploads.locked():
            raise HTTPException(503, "busy with other clips; try again in a moment")
        # No `await` lies between the check and the acquisition, so this never waits for the semaphore. The temporary
        # file has no name: however this program ends, nothing of the clip is left on disk.
        async with self._uploads:
            with tempfile.TemporaryFile() as file:
                await self._receive(request, file, length)
                async with self._model:
                    descriptor = file.fileno()
                    result = await _in_thread(lambda: summarise_clip(self._classifier, descriptor, self._limits))
        print(f"serve: a clip of {result['seconds']:.1f} s in {time.monotonic() - started:.1f} s", file=sys.stderr)
        return JSONResponse(result, headers=_HEADERS)

    async def _receive(self, request: Request, file: BinaryIO, length: int) -> None:
        """Write the body to `file`. Raises HTTPException once it is known to be too slow, too short or no clip."""
        started = time.monotonic()
        boundary = _form_boundary(request.headers)
        head, received, more = b"", 0, True
        while more:
            # The pace at which an upload takes `upload_seconds`. One that drips is ended when it falls behind by more
            # than twice the limit on silence, and not only at the end of its time, because it takes up a place.
            pace_seconds = self._limits.upload_seconds * received / max(1, length)
            deadline = started + min(self._limits.upload_seconds, pace_seconds + 2 * self._limits.silence_seconds)
            chunk, more = await _next_chunk(request, self._limits.silence_seconds, deadline)
            file.write(chunk)
            received += len(chunk)
            if boundary is None and len(head) < HEAD_BYTES:
                head = (head + chunk)[:HEAD_BYTES]
                # The type is checked once, as soon as the head is complete or the whole of a tiny file is here.
                if len(head) == HEAD_BYTES or (head and received == length):
                    _check_is_media(head)
        # The body cannot be longer than its Content-Length, which the HTTP parser enforces.
        if received < length or not length:
            raise HTTPException(400, "the upload is incomplete" if length else "the file is empty")
        file.flush()
        if boundary is not None:
            await _in_thread(lambda: _unwrap(file, boundary))
        # Only the whole file tells an animated GIF, which is a video, from a still one.
        if self._wants_video and media_type_of_content(file) == IMAGE:
            raise HTTPException(415, "this is an image, but the model takes videos")


def _check_is_media(head: bytes) -> None:
    """Refuse anything that is neither a video nor an image, judging by its first bytes.

    The most important case is a playlist, which would make FFmpeg open other files and addresses.
    """
    if media_type_of_bytes(head) is None:
        raise HTTPException(415, "this is neither a video nor an image")


def _form_boundary(headers: Headers) -> str | None:
    """The boundary of a form, or None for a clip that is sent as it is. Raises HTTPException for a form without one."""
    try:
        return form_boundary(headers.get("content-type", ""))
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def _unwrap(file: BinaryIO, boundary: str) -> None:
    """Replace the form in `file` by the clip in it. Raises HTTPException if there is none."""
    try:
        keep_first_part(file, boundary)
    except ValueError as error:
        raise HTTPException(400, f"{error}; send one file, as `curl -F clip=@FILE` does") from error
    file.seek(0)
    _check_is_media(file.read(HEAD_BYTES))


def _check_upload(headers: Headers, limits: Limits) -> int:
    """Check the headers of an upload, before any of its body is read, and return its length. Raises HTTPException.

    A client that sent `Expect: 100-continue` has not even started to send the body, since uvicorn answers with 100 only
    when the body is read.
    """
    # Browsers add Origin to every cross-site POST, and a site cannot change it. Other clients need not send it.
    origin = headers.get("origin")
    if origin is not None and origin != f"http://{headers.get('host')}":
        raise HTTPException(403, "other sites may not post here")
    text = headers.get("content-length", "")
    # A length in plain digits is required. With Transfer-Encoding as well, two parsers could disagree about where the
    # body ends, which is how requests are smuggled.
    if "transfer-encoding" in headers or not (text.isascii() and text.isdecimal()):
        raise HTTPException(411, "the request must give the length of the file (Content-Length)")
    length = int(text)
    if length > limits.upload_bytes:
        raise HTTPException(
            413, f"the clip has {length / 1e6:,.0f} MB, above the limit of {limits.upload_bytes / 1e6:,.0f} MB"
        )
    return length


async def _next_chunk(request: Request, silence_seconds: float, deadline: float) -> tuple[bytes, bool]:
    """The next bytes of the body, and whether more will follow. Raises HTTPException if they do not arrive in time.

    Both limits are needed. The limit on silence detects a stalled sender, and the deadline detects a sender that keeps
    sending a few bytes now and then.
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
    """Run `work` in a daemon thread and return its result.

    Unlike the threads of asyncio's pool, a daemon thread does not delay the exit after Ctrl-C.
    """
    future: concurrent.futures.Future[_Result] = concurrent.futures.Future()
    future.set_running_or_notify_cancel()  # it can no longer be cancelled, so `set_result` cannot fail

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again in the waiting coroutine
            future.set_exception(error)

    threading.Thread(target=run, name=CLASSIFYING, daemon=True).start()
    return await asyncio.wrap_future(future)


class _Refusal(JSONResponse):
    """An error response with one line of explanation, which also reads and drops the rest of the request for a moment.

    Closing a connection with unread bytes resets it, which can destroy a response that is still on its way to a client
    that is still sending. The response is therefore sent in full first. Its final, empty part, which closes the
    connection, follows when the request has been read or LINGER_SECONDS have passed.
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
    """Read and discard until the body or the connection ends."""
    while (await receive()).get("more_body", False):
        pass


async def _refuse(request: Request, error: Exception) -> Response:
    """The response to an HTTPException, whether raised here or by Starlette for an unknown path or method."""
    if not isinstance(error, HTTPException):
        raise TypeError(f"not an HTTPException: {error!r}")
    # Starlette's 405 means a known path with an unsuitable method: either that of the other path, or one that does not
    # exist here at all.
    if error.status_code == 405:
        known = request.method in ("GET", "HEAD", "POST")
        return _Refusal(404 if known else 501, f"get {PAGE}, or post a clip to {PREDICT}")
    return _Refusal(error.status_code, error.detail)


async def _refuse_clip(request: Request, error: Exception) -> Response:
    """The response to a clip that cannot be read within the limits."""
    return _Refusal(422, str(error))


async def _report_broken_clip(request: Request, error: Exception) -> Response:
    """The response to a clip on which the decoder failed with an exception of a library, which visitors do not see."""
    print(f"serve: {for_terminal(error)}", file=sys.stderr, flush=True)
    return _Refusal(422, "the clip cannot be decoded; see the terminal in which the page was started")


async def _report_failure(request: Request, error: Exception) -> Response:
    """The response to an unexpected exception, which is printed to the terminal in one line; the server continues."""
    print(f"serve: {type(error).__name__}: {for_terminal(error)}", file=sys.stderr, flush=True)
    return _Refusal(500, "the clip could not be classified; see the terminal in which the page was started")


def _render_page(classifier: Classifier, limits: Limits) -> bytes:
    """The page as HTML. `settings` is read by the script in it."""
    card = classifier.card
    values: dict[str, Any] = {
        "name": card.architecture["name"],
        "classes": len(card.classes),
        "preprocessing": card.preprocessing,
        "limits": limits,
        "settings": {"path": PREDICT, "most_bytes": limits.upload_bytes},
    }
    return render("video_swinv2.inference", "serve.html.j2", values)
