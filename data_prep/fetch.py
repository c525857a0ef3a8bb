"""One file from a server or a folder: resumed by byte range, checked against what the server said, whole or absent.

While a file NAME is incomplete it is `.NAME.part`, and `.NAME.part.json` beside it holds what the server said of the
whole file (size, ETag, date). Half a file is only worth something together with the other half of the same file, so a
request for the rest carries `If-Range`: if the file has changed, the server sends all of it, and we start over.

urllib3's Retry counts the attempts and computes the pauses, but the loop around them is ours, because a Retry inside an
HTTPAdapter cannot resume. It repeats a request only until the response headers have arrived, while most failures of a
large download come in the body; it would repeat the same `Range` header, although more bytes are on disk by then; and
it would count attempts that made progress, so that a connection that drops after every 100 MB would never finish.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import requests
import urllib3

from video_swinv2.errors import UserError
from video_swinv2.files import commit_file, partial_path, write_json

CONNECT_SECONDS = 10.0
READ_SECONDS = 30.0  # without a byte; also the longest that Ctrl-C may have to wait
MAX_ATTEMPTS = 8  # in a row without progress: a minute or two in all
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 60.0
PROGRESS_BYTES = 1 << 20  # an attempt that adds less than this made no progress
BLOCK = 1 << 16  # bytes; what can be lost when a connection is reset
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class AbsentError(UserError):
    """The source does not have the file, or refuses to send it."""


class DiskError(UserError):
    """The disk cannot be written; every other file would fail too."""


class StopError(Exception):
    """The work was stopped by the caller."""


class _TransientError(Exception):
    """A failure that may go away by itself; `wait_seconds` is how long the server asks us to wait."""

    def __init__(self, text: str, wait_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class FetchedFile:
    """A complete file; the fields are stored in archives.json."""

    address: str
    size: int
    sha256: str
    etag: str = ""
    last_modified: str = ""


@dataclass(frozen=True)
class _RemoteFile:
    """What the server says of the whole file; stored beside the partial file."""

    address: str
    size: int | None
    etag: str
    last_modified: str
    md5: str

    def validator(self) -> str:
        """The value for If-Range: a strong ETag, otherwise the date; '' if the file cannot be recognised again.

        A weak ETag (`W/"..."`) does not promise equal bytes, so RFC 9110 forbids it here.
        """
        return self.etag if self.etag.startswith('"') else self.last_modified


def fetch_file(
    address: str,
    target: Path,
    *,
    find_fault: Callable[[Path], str],
    sha256: str = "",
    stop: threading.Event | None = None,
    on_bytes: Callable[[int], None] = lambda size: None,
) -> FetchedFile:
    """Bring a file, by URL or path, to `target`. If it is already there it is only checked.

    `find_fault` inspects the complete file before it gets its name, and says what is wrong with it ('' if nothing);
    `sha256`, if given, must match; `on_bytes` is called with the size of every block received. Setting `stop` ends the
    work with StopError, and the next call resumes.

    Raises UserError naming the address; AbsentError if the source has no such file; DiskError naming the target.
    """
    stop = stop or threading.Event()
    partial, remote = partial_path(target), _RemoteFile(address, None, "", "", "")
    with as_disk_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            partial = target
        elif is_url(address):
            remote = _download(address, partial, stop, on_bytes)
        else:
            _copy(Path(address), partial, stop, on_bytes)
        hashes = _hash_file(partial, stop)
        fault = _hash_difference(hashes, sha256, remote.md5) or find_fault(partial)
        if fault and partial == target:
            raise UserError(f"{target}: {fault}; remove it to fetch it again")
        if fault:
            _discard(partial)
            raise UserError(f"{address}: {fault}; run again or try another source")
        if partial != target:
            commit_file(partial, target)
            _note_path(partial).unlink(missing_ok=True)
        return FetchedFile(address, target.stat().st_size, hashes[0], remote.etag, remote.last_modified)


def is_url(address: str) -> bool:
    """Whether the address is that of a server rather than a path."""
    return address.startswith(("http://", "https://"))


@contextlib.contextmanager
def as_disk_error(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a DiskError that names `path`."""
    try:
        yield
    except OSError as error:
        message = error.strerror or str(error)
        raise DiskError(
            f"{path}: cannot be written ({message}); free disk space or fix that, then run again"
        ) from error


def require_free_space(folder: Path, size: int) -> None:
    """Raises DiskError if `size` more bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if size > free:
        problem = f"{size / 1e9:.1f} GB more are needed, {free / 1e9:.1f} GB are free"
        raise DiskError(f"{folder}: {problem}; free disk space, then run again")


def _download(address: str, partial: Path, stop: threading.Event, on_bytes: Callable[[int], None]) -> _RemoteFile:
    """Make attempts until the partial file is complete, with growing pauses, as long as attempts make progress."""
    retries, most = _new_retries(), 0  # `most`: bytes on disk after the best attempt so far
    while True:
        try:
            return _attempt(address, partial, stop, on_bytes)
        except _TransientError as error:
            # Compared with the best attempt, not with the last one: a server that cannot resume sends the same first
            # bytes every time, and that is no progress.
            size = _size(partial)
            if size >= most + PROGRESS_BYTES:
                retries = _new_retries()
            most = max(most, size)
            try:
                retries = retries.increment(error=error)
            except urllib3.exceptions.MaxRetryError:
                raise UserError(
                    f"{address}: {error}; gave up after {MAX_ATTEMPTS} attempts without progress, run again to resume"
                ) from error
            pause = max(retries.get_backoff_time(), min(error.wait_seconds, MAX_PAUSE_SECONDS))
            print(f"{address}: {error}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            if stop.wait(pause):  # not Retry.sleep, which nothing can interrupt
                raise StopError from error


def _new_retries() -> urllib3.Retry:
    """Pauses of 0, 2, 4, 8, ... seconds; the jitter keeps workers that failed together from returning together."""
    return urllib3.Retry(
        MAX_ATTEMPTS - 1,
        backoff_factor=FIRST_PAUSE_SECONDS,
        backoff_max=MAX_PAUSE_SECONDS,
        backoff_jitter=FIRST_PAUSE_SECONDS,
    )


def _attempt(address: str, partial: Path, stop: threading.Event, on_bytes: Callable[[int], None]) -> _RemoteFile:
    """One request for what the partial file still lacks. Raises _TransientError if it may be worth another attempt."""
    remote = _read_note(partial, address)
    # Without a validator nothing can tell whether the bytes on disk belong to the file the server has now.
    have = _size(partial) if remote and remote.validator() else 0
    if remote and have and have == remote.size:
        return remote
    headers = {"Accept-Encoding": "identity"}
    if remote and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": remote.validator()}
    with _request(address, headers) as response:
        offset, remote = _interpret(response, address, remote, have, partial)
        if remote.size is not None:
            require_free_space(partial.parent, remote.size - offset)
        if not offset:
            # In this order: when killed in between, there must never be bytes beside a note that describes other bytes.
            _discard(partial)
            write_json(_note_path(partial), asdict(remote))
        with partial.open("ab" if offset else "wb") as file:
            written = offset
            for block in _blocks(response):
                if stop.is_set():
                    raise StopError
                written += len(block)
                if remote.size is not None and written > remote.size:
                    _discard(partial)
                    raise UserError(f"{address}: sent more than the {remote.size} bytes announced; try another source")
                file.write(block)
                on_bytes(len(block))
    if remote.size is not None and written < remote.size:
        raise _TransientError(f"the connection ended after {written} of {remote.size} bytes")
    return remote


def _interpret(
    response: requests.Response, address: str, known: _RemoteFile | None, have: int, partial: Path
) -> tuple[int, _RemoteFile]:
    """Where in the file the body begins (0 or `have`), and what is known of the whole file.

    Raises _TransientError, AbsentError.
    """
    status = response.status_code
    if status == 200:  # the whole file: the first request, or the file has changed, or the server cannot resume
        return 0, _remote_file(response, address, _to_int(response.headers.get("Content-Length")))
    if status == 206 and known is not None and have:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        size = (_to_int(span[2]) if span else None) or known.size
        same_file = response.headers.get("ETag", known.etag) == known.etag and known.size in (None, size)
        if span and int(span[1]) == have and same_file:
            return have, replace(known, size=size)
    if status in (206, 416):
        # Part of another file, another range, or a range beyond the end: start over.
        _discard(partial)
        raise _TransientError(f"the server's reply ({status}) does not fit the bytes fetched before")
    reason = f"the server answers {status} {response.reason or ''}".strip()
    if status in TRANSIENT_STATUS:
        raise _TransientError(reason, _to_int(response.headers.get("Retry-After")) or 0)
    raise AbsentError(f"{address}: {reason}; check the source and the name")


def _remote_file(response: requests.Response, address: str, size: int | None) -> _RemoteFile:
    headers = response.headers
    etag = headers.get("ETag", "")
    # On S3 the ETag is the MD5 of the bytes, unless the file was uploaded in several pieces (then it contains a dash)
    # or is encrypted with a key of its owner. On other servers it may be anything.
    is_md5 = "x-amz-request-id" in headers and "kms" not in headers.get("x-amz-server-side-encryption", "")
    md5 = re.fullmatch(r'"([0-9a-f]{32})"', etag) if is_md5 else None
    return _RemoteFile(address, size, etag, headers.get("Last-Modified", ""), md5[1] if md5 else "")


@contextlib.contextmanager
def _request(address: str, headers: dict[str, str]) -> Iterator[requests.Response]:
    try:
        response = requests.get(address, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS))
    except (requests.ConnectionError, requests.Timeout) as error:
        raise _TransientError(_innermost_message(error)) from error
    except requests.RequestException as error:
        raise UserError(f"{address}: {_innermost_message(error)}; check the source") from error
    with response:
        yield response


def _blocks(response: requests.Response) -> Iterator[bytes]:
    """The body exactly as sent. Decoding a Content-Encoding would unzip what S3 labels as a gzipped tar."""
    while True:
        try:
            block = response.raw.read(BLOCK, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _TransientError(_innermost_message(error)) from error
        if not block:
            return
        yield block


def _copy(source: Path, partial: Path, stop: threading.Event, on_bytes: Callable[[int], None]) -> None:
    try:
        with partial.open("wb") as copy:
            for block in _blocks_of_file(source, partial.parent):
                if stop.is_set():
                    raise StopError
                copy.write(block)
                on_bytes(len(block))
    except (AbsentError, StopError):
        partial.unlink()  # a copy is not resumed: nothing would show that both halves are of the same file
        raise


def _blocks_of_file(source: Path, target_folder: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            require_free_space(target_folder, source.stat().st_size)
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise AbsentError(f"{source}: {error.strerror or error}; check the source and the name") from error


def _hash_file(path: Path, stop: threading.Event) -> tuple[str, str]:
    """(sha256, MD5) of a file, read back from the disk."""
    digests = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if stop.is_set():
                raise StopError
            for digest in digests:
                digest.update(block)
    return digests[0].hexdigest(), digests[1].hexdigest()


def _hash_difference(hashes: tuple[str, str], sha256: str, md5: str) -> str:
    """How the hashes differ from the expected ones; '' if they agree, or nothing is expected."""
    if sha256 and hashes[0] != sha256:
        return f"its sha256 begins {hashes[0][:12]}, but the one recorded or published begins {sha256[:12]}"
    return f"its MD5 is not {md5}, which its ETag announced" if md5 and hashes[1] != md5 else ""


def _note_path(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_note(partial: Path, address: str) -> _RemoteFile | None:
    """What the server said of a partial file; None if the note is unreadable or about another address."""
    try:
        remote = _RemoteFile(**json.loads(_note_path(partial).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return remote if remote.address == address else None


def _discard(partial: Path) -> None:
    _note_path(partial).unlink(missing_ok=True)
    partial.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _to_int(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _innermost_message(error: BaseException) -> str:
    """The innermost of a chain of library errors, in one line."""
    inner: object = error
    while isinstance(inner, BaseException):
        text = f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__
        deeper = getattr(inner, "reason", None) or next((a for a in inner.args if isinstance(a, BaseException)), None)
        inner = deeper if deeper is not inner else None
    return " ".join(text.split())
