"""A local server with CVDF's layout that can drop connections, lie, or change its files; and the files it serves."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np

from data_prep.cvdf import VERSIONS

ID = "-aU_xCCzk"
Fault = Callable[["Handler", bytes], None]
noise = np.random.default_rng(0).bytes

# Slow enough for a client to be stopped long before it has everything, fast enough for it to notice that it should stop
# when the next block arrives, and not by its read timeout.
SECONDS_PER_BLOCK_PAST_LIMIT = 0.25


class Server(ThreadingHTTPServer):
    """Serves CVDF's layout locally and answers like S3, except for the faults queued for a path, one per request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server_port}/mirror/kinetics"
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.sent = 0
        self.limit = float("inf")  # bytes sent in total, past which it only trickles
        self.lock = threading.Lock()

    def asked_for(self, path: str) -> list[str | None]:
        return [span for asked, span in self.asked if asked == path]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is expected."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        path = unquote(self.path).removeprefix("/mirror/kinetics/")
        with self.server.lock:
            self.server.asked.append((path, self.headers.get("Range")))
            waiting = self.server.faults.get(path)
            fault = waiting.pop(0) if waiting else whole_or_rest
        fault(self, self.server.files.get(path, b""))

    def head(self, code: int, length: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(length), "Connection": "close"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def body(self, content: bytes) -> None:
        for start in range(0, len(content), 1 << 14):
            self.wfile.write(content[start : start + (1 << 14)])
            with self.server.lock:
                self.server.sent += len(content[start : start + (1 << 14)])
            if self.server.sent > self.server.limit:
                time.sleep(SECONDS_PER_BLOCK_PAST_LIMIT)

    def log_message(self, format: str, *args: object) -> None:
        pass


def marks(content: bytes) -> dict[str, str]:
    return {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "x_amz_request_id": "1"}


def offset_of(handler: Handler, content: bytes) -> int:
    asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    fits = handler.headers.get("If-Range") in (None, marks(content)["ETag"])
    return int(asked[1]) if asked and fits else 0


def whole_or_rest(handler: Handler, content: bytes, *, cut: int | None = None, **headers: str) -> None:
    if not content:
        return handler.head(403, 0)
    offset = offset_of(handler, content)
    if offset >= len(content):
        return handler.head(416, 0, Content_Range=f"bytes */{len(content)}")
    span = {"Content_Range": f"bytes {offset}-{len(content) - 1}/{len(content)}"} if offset else {}
    handler.head(206 if offset else 200, len(content) - offset, **(span | marks(content) | headers))
    handler.body(content[offset:][:cut])


def short(handler: Handler, content: bytes) -> None:
    whole_or_rest(handler, content, cut=40_000)


def dropped(handler: Handler, content: bytes) -> None:
    whole_or_rest(handler, content, cut=40_000)
    handler.wfile.flush()
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def from_the_start(handler: Handler, content: bytes) -> None:
    handler.head(200, len(content), **marks(content))
    handler.body(content)


def wrong_range(handler: Handler, content: bytes) -> None:
    handler.head(206, 10, Content_Range=f"bytes 0-9/{len(content)}", **marks(content))
    handler.body(content[:10])


def unsatisfiable(handler: Handler, content: bytes) -> None:
    handler.head(416, 0, Content_Range=f"bytes */{len(content)}")


def other_mark(handler: Handler, content: bytes) -> None:
    offset = int(handler.headers["Range"][6:-1])
    handler.head(206, len(content) - offset, Content_Range=f"bytes {offset}-/9", ETag='"other"')


def cut_off(handler: Handler, content: bytes) -> None:
    """A Content-Length that fits the truncated body, not the file."""
    handler.head(200, len(content) - 500, **marks(content))
    handler.body(content[:-500])


def busy(handler: Handler, content: bytes) -> None:
    handler.head(503, 0, Retry_After="0")


def changed(handler: Handler, content: bytes) -> None:
    handler.server.files["400/train/part_0.tar.gz"] = content[::-1]
    whole_or_rest(handler, content[::-1])


def too_long(handler: Handler, content: bytes) -> None:
    """A partial reply with more bytes than the range it announces."""
    offset = offset_of(handler, content)
    span = f"bytes {offset}-{len(content) - 1}/{len(content)}"
    handler.head(206, len(content) - offset + 500, Content_Range=span, **marks(content))
    handler.body(content[offset:] + bytes(500))


def falsified(handler: Handler, content: bytes) -> None:
    handler.head(200, len(content), **marks(content))
    handler.body(b"\x1f\x8b" + content[2:][::-1])


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A running server."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def archive_of(clips: dict[str, bytes], zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz" if zipped else "w") as tar:
        for name, content in clips.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def name_of(number: int) -> str:
    return f"{ID}{number:02d}_{number:06d}_{number + 10:06d}"


def table(split: str, *numbers: int) -> bytes:
    rows = "".join(f'"massaging, person\'s head",{ID}{n:02d},{n},{n + 10},{split},0\n' for n in numbers)
    return f"label,youtube_id,time_start,time_end,split,is_cc\n{rows}".encode()


def layout(folder: str, prefix: str, split: str, parts: dict[str, bytes], listed: bytes) -> dict[str, bytes]:
    """The files of one split, as CVDF has them."""
    base = "https://s3.amazonaws.com/kinetics"
    name = VERSIONS[{"400": "kinetics400", "600": "kinetics600"}[folder]].annotations[split]
    files = {f"{folder}/{split}/{unquote(part)}": content for part, content in parts.items()}
    files[f"{folder}/annotations/{name}"] = listed
    files[f"{folder}/{split}/{prefix}_{split}_path.txt"] = "\n".join(
        f"{base}/{folder}/{split}/{part}" for part in parts
    ).encode()
    return files


def kinetics400(size: int = 50_000) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files of the source, and the videos that should come out of them, by path."""
    clips = {n: noise(size) for n in range(8)}
    parts = {f"part_{n}.tar.gz": {f"./{name_of(2 * n + m)}.mp4": clips[2 * n + m] for m in (0, 1)} for n in range(4)}
    parts["part_3.tar.gz"]["./" + name_of(8) + ".mp4"] = clips[8] = b""
    train = {name: archive_of(content, zipped=name != "part_2.tar.gz") for name, content in parts.items()}
    files = layout("400", "k400", "train", train, table("train", *range(10)))
    files |= layout("400", "k400", "val", {"part_0.tar.gz": archive_of({f"{name_of(20)}.mp4": b"v"})}, table("val", 20))
    fresh = {3: b"repaired", 9: b"was not there", 20: b"new", 77: b"of another split"}
    names = {f"replacement_for_corrupted_k400/{name_of(n)}.mp4": content for n, content in fresh.items()}
    files["400/replacement_for_corrupted_k400.tgz"] = archive_of(names)
    wanted = {f"train/{name_of(n)}.mp4": content for n, content in (clips | {3: fresh[3], 9: fresh[9]}).items()}
    return files, wanted | {f"val/{name_of(20)}.mp4": b"new"}
