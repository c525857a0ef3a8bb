"""Receives the response to an HTTP request in a thread of its own, so that no server decides how long anybody waits.

A read timeout limits only the silence between two bytes. A server that sends a byte now and then, in a header, in the
length of a chunk or in the body, keeps a blocking call busy for ever; so does a list of name servers that do not
answer. Here a thread makes the blocking calls and hands over what it receives. The caller looks at the clock and at
`stop` all the while, and leaves the thread behind when it has waited long enough.

Redirects are followed here, too, because requests reads the body of each of them into memory, however large it is.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator
from urllib.parse import urljoin

import requests
import urllib3

from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without receiving a byte
HEADER_SECONDS = 60.0  # for the whole header, with all redirects
# A server that sends less than this in this time is treated as a silent one.
SLOW_BYTES, SLOW_SECONDS = 1 << 16, 120.0
STOP_SECONDS = 0.2  # how often `stop` is looked at
RECEIVING = "receive a file"  # the name of the threads that do
MAX_REDIRECTS = 10
MAX_TEXT = 200  # characters of a server's own words, in errors
BLOCK = 1 << 16  # bytes received at a time, if they are there
WAITING_BLOCKS = 4  # received before the caller takes them; at most this much is lost when a download is interrupted


class StopError(Exception):
    """The caller has asked for the work to stop, by setting `stop`."""


class TransientError(Exception):
    """A failure that may not happen again; `wait_seconds` is how long the server asks us to wait, 0 if it does not."""

    def __init__(self, text: str, wait_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.wait_seconds = wait_seconds


@contextlib.contextmanager
def receive(
    address: str, headers: dict[str, str], stop: threading.Event
) -> Iterator[tuple[requests.Response, Iterator[bytes]]]:
    """Send a GET request. Yields the response, and its body in blocks of at most BLOCK bytes, exactly as sent.

    Raises TransientError if the connection fails or is too slow, StopError when `stop` is set, and UserError, naming
    the address, for what another attempt would not change. So does the iterator over the blocks.
    """
    reception = _Reception(address, headers, stop)
    try:
        yield reception.response(), reception.blocks()
    finally:
        reception.leave()


def is_url(address: str) -> bool:
    """Whether an address is an HTTP or HTTPS URL rather than a path."""
    return address.startswith(("http://", "https://"))


class _Reception:
    """A request whose blocking calls are made by a thread. Its methods are for the caller's thread."""

    def __init__(self, address: str, headers: dict[str, str], stop: threading.Event) -> None:
        self._address, self._headers, self._stop = address, headers, stop
        self._received: queue.Queue[requests.Response | bytes | Exception] = queue.Queue(WAITING_BLOCKS)
        self._left = threading.Event()
        self._response: requests.Response | None = None
        try:
            # A daemon, which does not keep the program from ending while it waits for a server.
            threading.Thread(target=self._run, name=RECEIVING, daemon=True).start()
        except RuntimeError as error:  # too many threads on this machine
            raise TransientError(str(error)) from error

    def response(self) -> requests.Response:
        """Wait for the header of the response."""
        item = self._next(time.monotonic() + HEADER_SECONDS, f"sent no complete header in {HEADER_SECONDS:.0f} s")
        if not isinstance(item, requests.Response):
            raise TypeError(f"not a response: {item!r}")
        self._response = item
        return item

    def blocks(self) -> Iterator[bytes]:
        """The body. Every SLOW_BYTES of it move the deadline."""
        missing = 0
        while True:
            if missing <= 0:
                missing, deadline = SLOW_BYTES, time.monotonic() + SLOW_SECONDS
            block = self._next(deadline, f"sent less than {SLOW_BYTES} bytes in {SLOW_SECONDS:.0f} s")
            if not isinstance(block, bytes):
                raise TypeError(f"not a block: {block!r}")
            if not block:
                return
            missing -= len(block)
            yield block

    def leave(self) -> None:
        """Let the thread end by itself: wake it up if it waits for bytes, or for room in the queue."""
        self._left.set()
        if self._response is not None:
            # ValueError and RuntimeError of urllib3, and OSError: there is no connection any more.
            with contextlib.suppress(ValueError, RuntimeError, OSError):
                self._response.raw.shutdown()
        with contextlib.suppress(queue.Empty):
            while True:
                self._received.get_nowait()

    def _next(self, deadline: float, fault: str) -> requests.Response | bytes:
        """The next item from the thread. Raises it if it is an exception; StopError; TransientError at `deadline`."""
        while not self._stop.is_set():
            if time.monotonic() > deadline:
                raise TransientError(f"the server {fault}")
            with contextlib.suppress(queue.Empty):
                item = self._received.get(timeout=STOP_SECONDS)
                if isinstance(item, Exception):
                    raise item
                return item
        raise StopError

    def _run(self) -> None:
        """In the thread: hand over the response, then its body, and b"" for its end, or the exception instead."""
        try:
            with _open(self._address, self._headers) as response:
                self._received.put(response)
                block = b"start"
                while block and not self._left.is_set():
                    block = _read_block(response)
                    self._received.put(block)
        except Exception as error:  # raised again by `_next`
            self._received.put(error)


def _open(address: str, headers: dict[str, str]) -> requests.Response:
    """The response to a GET request, whose body has not been read yet. Raises TransientError, UserError."""
    url = address
    for _ in range(1 + MAX_REDIRECTS):
        try:
            with _Session() as session:
                response = session.get(url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS))
            target = requests.sessions.SessionRedirectMixin().get_redirect_target(response)
            if target is None:
                return response
            response.close()
            url = urljoin(url, target)
        except (requests.ConnectionError, requests.Timeout) as error:
            raise TransientError(_innermost_message(error)) from error
        # ValueError: what a Location may contain that is neither UTF-8 nor an address.
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            raise UserError(f"{address}: {_innermost_message(error)}; check the source") from error
        if not is_url(url):
            raise UserError(f"{address}: redirects to {as_text(url)!r}, which is no web address; check the source")
    raise UserError(f"{address}: redirects more than {MAX_REDIRECTS} times; check the source")


class _Session(requests.Session):
    """Follows no redirect by itself, nor reads its body, which requests does even with `allow_redirects=False`."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None: there is nothing to follow."""


def _read_block(response: requests.Response) -> bytes:
    """What has arrived of the body, at most BLOCK bytes, exactly as sent; b"" at its end. Raises TransientError.

    `response.iter_content` would wait for a whole block, and would decode a Content-Encoding. If S3 labels a .tar.gz as
    gzip-encoded, it would return the uncompressed tar, with other offsets and another hash.
    """
    try:
        block: bytes = response.raw.read1(BLOCK, decode_content=False)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # ValueError: the length of a chunk
        raise TransientError(_innermost_message(error)) from error
    return block


def as_text(words: object) -> str:
    """A server's own words on one line, with control characters escaped, and not more of them than fit on a line."""
    return for_terminal(" ".join(str(words).split()))[:MAX_TEXT]


def _innermost_message(error: BaseException) -> str:
    """The innermost of a chain of library errors, on one line."""
    # requests wraps the errors of urllib3, which wrap those of the socket, in `reason` or in `args`. The outer messages
    # repeat the inner ones and contain the addresses of objects in memory.
    inner: object = error
    while isinstance(inner, BaseException):
        text = f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__
        deeper = getattr(inner, "reason", None) or next((a for a in inner.args if isinstance(a, BaseException)), None)
        inner = deeper if deeper is not inner else None
    return as_text(text)
