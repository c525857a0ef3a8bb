"""Fetch one file from a server or a folder, resuming by byte range. The file is complete and checked, or absent.

An incomplete file NAME is stored as `.NAME.part`. The note `.NAME.part.json` beside it records what the server reported
about the complete file (size, ETag, date). The two halves of a download must come from the same version of the file, so
the request for the rest carries `If-Range`: if the file has changed since, the server sends all of it, and the download
starts over. The bytes themselves come from receive.py.

urllib3's Retry counts the attempts and computes the pauses, but the loop around it is our own. A Retry inside an
HTTPAdapter cannot resume, for three reasons:

- It repeats a request only until the response headers have arrived, while a large download mostly fails in the body.
- It would repeat the same `Range` header, although more bytes are on disk by then.
- It would also count attempts that made progress, so a connection that drops after every 100 MB would never finish.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import requests
import urllib3
from pydantic import Field

from data_prep.receive import BLOCK, StopError, TransientError, as_text, is_url, receive
from video_swinv2.errors import UserError
from video_swinv2.escaping import for_terminal
from video_swinv2.files import commit_file, partial_path, refuse_special_file, write_json
from video_swinv2.records import Record, read_record

MAX_ATTEMPTS = 8  # in a row without progress; the pauses between them add up to about two minutes
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 60.0
PROGRESS_BYTES = 1 << 20  # an attempt that adds less than this made no progress
RESERVE_BYTES = 1 << 30  # what a file of unknown size must leave free on the disk
MAX_DIGITS = 19  # of a number in a header; no file has more bytes, and Python refuses to convert thousands
# A header that can be stored, and sent back as it is: printable ASCII that does not begin with a space, or nothing.
PLAIN_HEADER = "^([!-~][ -~]{0,254})?$"
# Timeout, too early, too many requests, and the errors of an overloaded or restarting server.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class AbsentError(UserError):
    """The source does not have the file, or refuses to send it."""


class DiskError(UserError):
    """The disk cannot be written, so every other file would fail as well."""


@dataclass(frozen=True)
class FetchedFile:
    """A file that was fetched completely. The fields are stored in archives.json.

    `size` is in bytes and `sha256` hexadecimal. `etag` and `last_modified` are the server's headers, '' if unknown.
    """

    address: str
    size: int
    sha256: str
    etag: str = ""
    last_modified: str = ""


class _RemoteFile(Record):
    """What the server reports about the complete file; stored as a note beside the partial file.

    `size` is in bytes, None if the server did not announce it. The strings are '' if unknown.
    """

    address: str
    size: int | None = Field(ge=0)
    etag: str = Field(pattern=PLAIN_HEADER)
    last_modified: str = Field(pattern=PLAIN_HEADER)
    md5: str = Field(pattern="^([0-9a-f]{32})?$")

    def validator(self) -> str:
        """The value for the header If-Range: the ETag if it is strong, otherwise the date of the last modification.

        '' if the server sent neither; the partial file then cannot be resumed. A weak ETag (`W/"..."`) does not promise
        identical bytes, so RFC 9110, section 13.1.5, does not allow it in If-Range.
        """
        return self.etag if self.etag.startswith('"') else self.last_modified


def fetch_file(
    address: str,
    target: Path,
    *,
    find_fault: Callable[[Path], str],
    sha256: str = "",
    max_bytes: int | None = None,
    stop: threading.Event | None = None,
    on_bytes: Callable[[int], None] = lambda size: None,
) -> FetchedFile:
    """Fetch the file at `address`, a URL or a path, to `target`. If the target exists, it is only checked.

    `find_fault` inspects the complete file before it is renamed to `target`, and returns what is wrong with it, or ''.
    `sha256`, if given, must match. `max_bytes`, if given, limits the size of what is downloaded; otherwise a file whose
    size the server does not announce may fill the disk up to the last RESERVE_BYTES. `on_bytes` is called with the size
    of every block received. Setting `stop` ends the call with StopError, and the next call resumes a download.

    Raises AbsentError if the source does not have the file; DiskError, naming the target, if it cannot be written;
    otherwise UserError, naming the address, or the target if that already exists but is wrong.
    """
    stop = stop or threading.Event()
    partial, remote = partial_path(target), _unknown(address)
    with as_disk_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        # An existing target takes the place of the partial file, so that it goes through the same checks below.
        if target.is_file():
            partial = target
        elif is_url(address):
            remote = _download(address, partial, max_bytes, stop, on_bytes)
        else:
            _copy(Path(address), partial, stop, on_bytes)
        # Hashed from the disk rather than while receiving: a resumed file has parts that this process never received.
        hashes = _hash_file(partial, stop)
        fault = _hash_difference(hashes, sha256, remote.md5) or find_fault(partial)
        # A file that was there before is never deleted here, since it may be the user's own. A bad download is deleted,
        # or the next call would resume it.
        if fault and partial == target:
            raise UserError(f"{target}: {fault}; remove it to fetch it again")
        if fault:
            _discard(partial)
            raise UserError(f"{address}: {fault}; run again or try another source")
        if partial != target:
            # The note is deleted last. If it is left behind, it does no harm without a partial file.
            commit_file(partial, target)
            _note_path(partial).unlink(missing_ok=True)
        return FetchedFile(address, target.stat().st_size, hashes[0], remote.etag, remote.last_modified)


@contextlib.contextmanager
def as_disk_error(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a DiskError that names `path`."""
    try:
        yield
    except OSError as error:
        message = error.strerror or str(error)
        raise DiskError(
            f"{path}: cannot be written ({message}); free disk space or fix the cause, then run again"
        ) from error


def require_free_space(folder: Path, size: int) -> None:
    """Raise DiskError if the file system of `folder` has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if size > free:
        problem = f"{size / 1e9:.1f} GB more are needed, {free / 1e9:.1f} GB are free"
        raise DiskError(f"{folder}: {problem}; free disk space, then run again")


def _download(
    address: str, partial: Path, max_bytes: int | None, stop: threading.Event, on_bytes: Callable[[int], None]
) -> _RemoteFile:
    """Repeat attempts, with growing pauses, until the partial file is complete.

    Raises UserError after MAX_ATTEMPTS in a row without progress, and StopError.
    """
    retries, most = _new_retries(), 0  # `most`: bytes on disk after the best attempt so far
    while True:
        try:
            return _attempt(address, partial, max_bytes, stop, on_bytes)
        except TransientError as error:
            # Progress is measured against the best attempt, not the last one: a server that cannot resume sends the
            # same first bytes every time, which is no progress.
            size = _size(partial)
            if size >= most + PROGRESS_BYTES:
                retries = _new_retries()
            most = max(most, size)
            # increment returns a copy with one attempt fewer, or raises if none is left.
            try:
                retries = retries.increment(error=error)
            except urllib3.exceptions.MaxRetryError:
                raise UserError(
                    f"{address}: {error}; gave up after {MAX_ATTEMPTS} attempts without progress, run again to resume"
                ) from error
            pause = max(retries.get_backoff_time(), min(error.wait_seconds, MAX_PAUSE_SECONDS))
            print(for_terminal(f"{address}: {error}; trying again in {pause:.0f} s"), file=sys.stderr, flush=True)
            if stop.wait(pause):  # rather than Retry.sleep, which another thread cannot interrupt
                raise StopError from error


def _new_retries() -> urllib3.Retry:
    """A full count of attempts, with pauses of 0, 2, 4, 8, ... seconds between them, at most MAX_PAUSE_SECONDS.

    A random extra of up to a second (jitter) keeps workers whose connections failed together from returning at the same
    moment. The first attempt is not a retry, hence MAX_ATTEMPTS - 1.
    """
    return urllib3.Retry(
        MAX_ATTEMPTS - 1,
        backoff_factor=FIRST_PAUSE_SECONDS,
        backoff_max=MAX_PAUSE_SECONDS,
        backoff_jitter=FIRST_PAUSE_SECONDS,
    )


def _attempt(
    address: str, partial: Path, max_bytes: int | None, stop: threading.Event, on_bytes: Callable[[int], None]
) -> _RemoteFile:
    """Request the bytes that the partial file still lacks, and append them. Returns what is known of the whole file.

    Raises TransientError if another attempt may succeed; AbsentError, DiskError, UserError, StopError.
    """
    remote = _read_note(partial, address)
    # Without a validator there is no way to tell whether the bytes on disk belong to the server's current file.
    have = _size(partial) if remote and remote.validator() else 0
    # Complete already: the earlier run was interrupted after the last byte. A request for the rest would fail with 416.
    if remote and have and have == remote.size:
        return remote
    # "identity": no compression in transit, because offsets and sizes must be those of the file itself.
    headers = {"Accept-Encoding": "identity"}
    if remote and have:
        headers |= {"Range": f"bytes={have}-", "If-Range": remote.validator()}
    with receive(address, headers, stop) as (response, blocks):
        offset, remote = _interpret(response, address, remote, have, partial)
        # What a server announces it must not exceed, nor a file of unknown size what was asked for at most.
        limit = max_bytes if remote.size is None else remote.size
        if remote.size is not None:
            if max_bytes is not None and remote.size > max_bytes:
                problem = f"has {remote.size} bytes, above the limit of {max_bytes}"
                raise UserError(f"{address}: {problem}; try another source")
            require_free_space(partial.parent, remote.size - offset)
        if not offset:
            # The whole file is coming, so the old bytes and their note are deleted before the new note is written. In
            # this order, a run killed in between never leaves bytes beside a note that describes another file.
            _discard(partial)
            write_json(_note_path(partial), remote.model_dump())
        with partial.open("ab" if offset else "wb") as file:
            written = offset
            for block in blocks:
                written += len(block)
                if limit is not None and written > limit:
                    _discard(partial)
                    words = "announced" if limit == remote.size else "allowed"
                    raise UserError(f"{address}: sent more than the {limit} bytes {words}; try another source")
                if limit is None:
                    _require_reserve(address, partial)
                file.write(block)
                on_bytes(len(block))
    # A connection that closes early looks like the regular end of the body, so the count has to be compared.
    if remote.size is not None and written < remote.size:
        raise TransientError(f"the connection ended after {written} of {remote.size} bytes")
    return remote


def _require_reserve(address: str, partial: Path) -> None:
    """Raise DiskError, and delete the partial file, if a file of unknown size has taken all but RESERVE_BYTES."""
    if shutil.disk_usage(partial.parent).free < RESERVE_BYTES:
        _discard(partial)
        problem = f"{address}, whose size is not announced, has left less than {RESERVE_BYTES / 1e9:.1f} GB free"
        raise DiskError(f"{partial.parent}: {problem}; free disk space or try another source")


def _interpret(
    response: requests.Response, address: str, known: _RemoteFile | None, have: int, partial: Path
) -> tuple[int, _RemoteFile]:
    """The offset in the file at which the body begins (0 or `have`), and what is known of the whole file.

    `known` is the note of the partial file, which has `have` usable bytes. Raises TransientError, AbsentError.
    """
    status = response.status_code
    # 200: the body is the whole file. Either that was requested, or the file has changed, or the server cannot resume.
    if status == 200:
        return 0, _remote_file(response, address, _to_int(response.headers.get("Content-Length")))
    # 206: the body is a range. In case the server ignores If-Range, the range is accepted only if it begins exactly at
    # our offset and neither the ETag nor the size shows a change. Content-Range is `bytes FIRST-LAST/SIZE`, with `*`
    # for an unknown size.
    if status == 206 and known is not None and have:
        span = re.fullmatch(r"bytes ([0-9]+)-[0-9]+/([0-9]+|\*)", response.headers.get("Content-Range", ""))
        size = (_to_int(span[2]) if span else None) or known.size
        same_file = _plain(response.headers.get("ETag", known.etag)) == known.etag and known.size in (None, size)
        if span and _to_int(span[1]) == have and same_file:
            return have, known.model_copy(update={"size": size})
    if status in (206, 416):
        # The range is of another file or begins elsewhere, or (416) the file now ends before our offset: start over.
        _discard(partial)
        raise TransientError(f"the server's reply ({status}) does not fit the bytes fetched before")
    reason = f"the server answered {status} {as_text(response.reason or '')}".strip()
    # Retry-After may also be a date; it is then ignored, and the usual pause applies.
    if status in TRANSIENT_STATUS:
        raise TransientError(reason, _to_int(response.headers.get("Retry-After")) or 0)
    raise AbsentError(f"{address}: {reason}; check the source and the name")


def _remote_file(response: requests.Response, address: str, size: int | None) -> _RemoteFile:
    """What the headers of a response with status 200 say of the file."""
    headers = response.headers
    etag = _plain(headers.get("ETag", ""))
    # On S3 the ETag is the MD5 of the content, with two exceptions: files uploaded in several parts (the ETag then
    # contains a dash, which the pattern does not match) and files encrypted with KMS. On other servers the ETag may be
    # anything, so the header x-amz-request-id has to show that this is S3.
    is_md5 = "x-amz-request-id" in headers and "kms" not in headers.get("x-amz-server-side-encryption", "")
    md5 = re.fullmatch(r'"([0-9a-f]{32})"', etag) if is_md5 else None
    modified = _plain(headers.get("Last-Modified", ""))
    return _RemoteFile(address=address, size=size, etag=etag, last_modified=modified, md5=md5[1] if md5 else "")


def _unknown(address: str) -> _RemoteFile:
    """A file that is not downloaded, so that no server reports anything about it."""
    return _RemoteFile(address=address, size=None, etag="", last_modified="", md5="")


def _plain(header: str) -> str:
    """The value of a header if it is as in PLAIN_HEADER, otherwise ''."""
    return header if re.fullmatch(PLAIN_HEADER, header) else ""


def _copy(source: Path, partial: Path, stop: threading.Event, on_bytes: Callable[[int], None]) -> None:
    """Copy a file of a source folder, from the beginning. Raises AbsentError, DiskError, StopError."""
    try:
        with partial.open("wb") as copy:
            for block in _blocks_of_file(source, partial.parent):
                if stop.is_set():
                    raise StopError
                copy.write(block)
                on_bytes(len(block))
    except (AbsentError, StopError):
        partial.unlink()  # a copy is never resumed: there is no ETag to show that both halves are of the same file
        raise


def _blocks_of_file(source: Path, target_folder: Path) -> Iterator[bytes]:
    """The content of a file in blocks. Raises AbsentError; DiskError if it does not fit into `target_folder`."""
    # A function of its own, so that an OSError from reading is not taken for one from writing (see as_disk_error).
    refuse_special_file(source)
    try:
        with source.open("rb") as file:
            require_free_space(target_folder, source.stat().st_size)
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise AbsentError(f"{source}: {error.strerror or error}; check the source and the name") from error


def _hash_file(path: Path, stop: threading.Event) -> tuple[str, str]:
    """(sha256, MD5) of a file in hexadecimal, read from the disk. Raises StopError."""
    # usedforsecurity=False: MD5 is only compared with an ETag; without it, Python refuses MD5 on FIPS systems.
    digests = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if stop.is_set():
                raise StopError
            for digest in digests:
                digest.update(block)
    return digests[0].hexdigest(), digests[1].hexdigest()


def _hash_difference(hashes: tuple[str, str], sha256: str, md5: str) -> str:
    """How `hashes` (sha256, MD5) differ from the expected ones; '' if they agree. Expected hashes of '' are ignored."""
    if sha256 and hashes[0] != sha256:
        return f"its sha256 begins {hashes[0][:12]}, but the one recorded or published begins {sha256[:12]}"
    return f"its MD5 is not {md5}, which its ETag announced" if md5 and hashes[1] != md5 else ""


def _note_path(partial: Path) -> Path:
    """The path of the note beside a partial file."""
    return partial.with_name(f"{partial.name}.json")


def _read_note(partial: Path, address: str) -> _RemoteFile | None:
    """The note of a partial file; None if it is absent or unreadable, or if it is about another address."""
    try:
        remote = read_record(_note_path(partial), _RemoteFile)
    except UserError:
        return None
    return remote if remote.address == address else None


def _discard(partial: Path) -> None:
    # The note first: bytes without a note are never resumed.
    _note_path(partial).unlink(missing_ok=True)
    partial.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _to_int(text: str | None) -> int | None:
    """The value of a header as an integer; None if it is absent or is anything other than a few digits."""
    return int(text) if text and re.fullmatch(f"[0-9]{{1,{MAX_DIGITS}}}", text) else None
