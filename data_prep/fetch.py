"""One file from a server or a folder: resumed where it stopped, checked against what was promised, whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
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
TRIES = 8  # without progress in between, a minute or two in all
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
PROGRESS_BYTES = 1 << 20  # a try that brought less of what was not there before counts as vain
BLOCK = 1 << 16  # what a connection that is reset can lose
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


class AbsentError(UserError):
    """The source does not have the file, or does not give it."""


class DiskError(UserError):
    """The disk refuses: every other file would fail too."""


class StopError(Exception):
    """The work was told to stop."""


class _NetworkError(Exception):
    """What may pass by itself; the server may have said how long to wait."""

    def __init__(self, text: str, wait_seconds: float = 0.0) -> None:
        super().__init__(text)
        self.wait_seconds = wait_seconds


@dataclass(frozen=True)
class FetchedFile:
    """What a file turned out to be."""

    address: str
    size: int
    sha256: str
    etag: str = ""
    last_modified: str = ""


@dataclass(frozen=True)
class _RemoteFile:
    """What the server says of a file: kept beside the half of it, since half a file is only worth its other half."""

    address: str
    size: int | None
    etag: str
    last_modified: str
    md5: str

    def validator(self) -> str:
        """What If-Range takes: a strong ETag, else the date; '' where the file cannot be known again."""
        return self.etag if self.etag.startswith('"') else self.last_modified


def fetch_file(
    address: str,
    target: Path,
    *,
    find_fault: Callable[[Path], str],
    sha256: str = "",
    stop: threading.Event | None = None,
    moved: Callable[[int], None] = lambda size: None,
) -> FetchedFile:
    """Bring a URL, or a file by its path, to `target`; one that is there already is only checked.

    `find_fault` looks at the whole file before it gets its name and says what is wrong with it, or ''; `moved` is told
    the size of every block; setting `stop` ends the work with StopError, and the next call goes on from there.
    UserError naming the address; AbsentError where the source has no such file; DiskError naming the target.
    """
    stop = stop or threading.Event()
    part, promise = partial_path(target), _RemoteFile(address, None, "", "", "")
    with as_disk_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file():
            part = target
        elif is_url(address):
            promise = _download(address, part, stop, moved)
        else:
            _copy(Path(address), part, stop, moved)
        hashes = _hashes(part, stop)
        wrong = _difference(hashes, sha256, promise.md5) or find_fault(part)
        if wrong and part == target:
            raise UserError(f"{target}: {wrong}; remove it to fetch it again")
        if wrong:
            _forget(part)
            raise UserError(f"{address}: {wrong}; run again or try another source")
        if part != target:
            commit_file(part, target)
            _note(part).unlink(missing_ok=True)
        return FetchedFile(address, target.stat().st_size, hashes[0], promise.etag, promise.last_modified)


def is_url(address: str) -> bool:
    """True for what a server has to be asked for."""
    return address.startswith(("http://", "https://"))


@contextlib.contextmanager
def as_disk_error(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DiskError that names `path`."""
    try:
        yield
    except OSError as fault:
        text = fault.strerror or str(fault)
        raise DiskError(f"{path}: cannot be written ({text}); free space or mend it, then run again") from fault


def require_free_space(folder: Path, size: int) -> None:
    """DiskError if `size` more bytes do not fit."""
    free = shutil.disk_usage(folder).free
    if size > free:
        text = f"needs {size / 1e9:.1f} GB more, {free / 1e9:.1f} GB are free"
        raise DiskError(f"{folder}: {text}; free space, then run again")


def _download(address: str, part: Path, stop: threading.Event, moved: Callable[[int], None]) -> _RemoteFile:
    """Try until the part is whole, with longer and longer pauses, as long as tries bring something."""
    best = vain = 0
    while True:
        try:
            return _attempt(address, part, stop, moved)
        except _NetworkError as fault:
            size = _size(part)
            vain = 1 if size >= best + PROGRESS_BYTES else vain + 1
            best = max(best, size)
            if vain >= TRIES:
                raise UserError(f"{address}: {fault}; {TRIES} tries were vain, run again to go on") from fault
            pause = min(LONGEST_WAIT_SECONDS, max(fault.wait_seconds, FIRST_WAIT_SECONDS * 2 ** (vain - 1)))
            pause *= random.uniform(0.5, 1.5)  # or all workers would come back at once
            print(f"{address}: {fault}; again in {pause:.0f} s", file=sys.stderr, flush=True)
            if stop.wait(pause):
                raise StopError from fault


def _attempt(address: str, part: Path, stop: threading.Event, moved: Callable[[int], None]) -> _RemoteFile:
    """One request for what the part still lacks."""
    promise = _read_note(part, address)
    have = _size(part) if promise and promise.validator() else 0
    if promise and have and have == promise.size:
        return promise
    headers = {"Accept-Encoding": "identity"}
    if promise and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": promise.validator()}
    with _answer(address, headers) as response:
        offset, promise = _judge(response, address, promise, have, part)
        if promise.size is not None:
            require_free_space(part.parent, promise.size - offset)
        if not offset:
            # The note comes after the bytes it does not describe are gone, and before the first that it does.
            _forget(part)
            write_json(_note(part), asdict(promise))
        with part.open("ab" if offset else "wb") as file:
            written = offset
            for block in _blocks(response):
                if stop.is_set():
                    raise StopError
                written += len(block)
                if promise.size is not None and written > promise.size:
                    _forget(part)
                    raise UserError(f"{address}: sends more than the {promise.size} bytes promised; try another source")
                file.write(block)
                moved(len(block))
    if promise.size is not None and written < promise.size:
        raise _NetworkError(f"the connection ended after {written} of {promise.size} bytes")
    return promise


def _judge(
    response: requests.Response, address: str, known: _RemoteFile | None, have: int, part: Path
) -> tuple[int, _RemoteFile]:
    """Where in the file the body begins, and what is promised of the whole. Raises _NetworkError, UserError."""
    status = response.status_code
    if status == 200:
        return 0, _promise(response, address, _number(response.headers.get("Content-Length")))
    if status == 206 and known is not None and have:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        total = (_number(span[2]) if span else None) or known.size
        same = response.headers.get("ETag", known.etag) == known.etag and known.size in (None, total)
        if span and int(span[1]) == have and same:
            return have, replace(known, size=total)
    if status in (206, 416):
        # Another file than the one begun, or a range that makes no sense: from the start.
        _forget(part)
        raise _NetworkError(f"the server's {status} does not fit what was fetched before")
    reason = f"the server answers {status} {response.reason or ''}".strip()
    if status in PASSING:
        raise _NetworkError(reason, _number(response.headers.get("Retry-After")) or 0)
    raise AbsentError(f"{address}: {reason}; check the source and the name")


def _promise(response: requests.Response, address: str, size: int | None) -> _RemoteFile:
    headers = response.headers
    etag = headers.get("ETag", "")
    # S3's ETag is the MD5 of the bytes unless they came in several pieces (then it holds a dash) or are encrypted
    # with a key of the owner's; elsewhere it may be anything.
    plain = "x-amz-request-id" in headers and "kms" not in headers.get("x-amz-server-side-encryption", "")
    md5 = re.fullmatch(r'"([0-9a-f]{32})"', etag) if plain else None
    return _RemoteFile(address, size, etag, headers.get("Last-Modified", ""), md5[1] if md5 else "")


@contextlib.contextmanager
def _answer(address: str, headers: dict[str, str]) -> Iterator[requests.Response]:
    try:
        response = requests.get(address, headers=headers, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS))
    except (requests.ConnectionError, requests.Timeout) as fault:
        raise _NetworkError(_last_words(fault)) from fault
    except requests.RequestException as fault:
        raise UserError(f"{address}: {_last_words(fault)}; check the source") from fault
    with response:
        yield response


def _blocks(response: requests.Response) -> Iterator[bytes]:
    """The body as sent: undoing a Content-Encoding would unpack what S3 calls a gzipped tar."""
    while True:
        try:
            block = response.raw.read(BLOCK, decode_content=False)
        except (urllib3.exceptions.HTTPError, OSError) as fault:
            raise _NetworkError(_last_words(fault)) from fault
        if not block:
            return
        yield block


def _copy(source: Path, part: Path, stop: threading.Event, moved: Callable[[int], None]) -> None:
    try:
        with part.open("wb") as copy:
            for block in _blocks_of_file(source, part.parent):
                if stop.is_set():
                    raise StopError
                copy.write(block)
                moved(len(block))
    except (AbsentError, StopError):
        part.unlink()  # without a promise to hold the rest against, a half is worth nothing
        raise


def _blocks_of_file(source: Path, target: Path) -> Iterator[bytes]:
    try:
        with source.open("rb") as file:
            require_free_space(target, source.stat().st_size)
            while block := file.read(BLOCK):
                yield block
    except OSError as fault:
        raise AbsentError(f"{source}: {fault.strerror or fault}; check the source and the name") from fault


def _hashes(path: Path, stop: threading.Event) -> tuple[str, str]:
    """sha256 and MD5, read back from the disk."""
    digests = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if stop.is_set():
                raise StopError
            for digest in digests:
                digest.update(block)
    return digests[0].hexdigest(), digests[1].hexdigest()


def _difference(hashes: tuple[str, str], sha256: str, md5: str) -> str:
    """How the bytes differ from what they should be; '' where they do not, or nothing is known."""
    if sha256 and hashes[0] != sha256:
        return f"its sha256 begins {hashes[0][:12]}, that recorded or published {sha256[:12]}"
    return f"its MD5 is not {md5}, its ETag" if md5 and hashes[1] != md5 else ""


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path, address: str) -> _RemoteFile | None:
    """What was promised of a half file; None if it is of another address or unreadable."""
    try:
        promise = _RemoteFile(**json.loads(_note(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    return promise if promise.address == address else None


def _forget(part: Path) -> None:
    _note(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def _last_words(fault: BaseException) -> str:
    """What a chain of library errors comes down to, in one line."""
    inner: object = fault
    while isinstance(inner, BaseException):
        text = f"{type(inner).__name__}: {inner}" if str(inner) else type(inner).__name__
        deeper = getattr(inner, "reason", None) or next((a for a in inner.args if isinstance(a, BaseException)), None)
        inner = deeper if deeper is not inner else None
    return " ".join(text.split())
