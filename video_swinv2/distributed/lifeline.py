"""One connection from every process to rank 0, so that a process that dies or fails ends all of them, with one line.

Collectives do not do this: NCCL waits for the dead until its time limit, gloo raises a traceback in every survivor,
and not every launcher ends the others. Where a process is gone its kernel closes the connection at once; where its
machine is gone, keep-alive probes find out within half a minute.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
from contextlib import suppress
from types import TracebackType

from video_swinv2.distributed.world import World, gather, say

PROBE_AFTER, PROBE_EVERY, PROBES = 10, 5, 4  # seconds, seconds, times without an answer: 30 seconds
LEAVE_SECONDS = 5.0  # for a process that is ending anyway, by an error that all processes meet alike
LINGER_SECONDS = 30.0  # for a checkpoint that is being written
CONNECT_SECONDS = 5.0
BYE = "bye"
END = "end"


class Lifeline:
    """Holds while the context lasts; nothing for a process alone. Entered by all processes together (collective).

    On a death rank 0 prints the line and all end with code 1; where it was rank 0, the next ones say so.
    """

    def __init__(self, world: World, mend: str) -> None:
        self._world = world
        self._mend = mend
        self._leaving = threading.Event()
        self._ending = threading.Event()
        self._lines: dict[int, socket.socket] = {}
        """Of rank 0: to every other process; of those: to rank 0 alone."""

    def __enter__(self) -> Lifeline:
        if self._world.size > 1:
            self._connect()
            watch = self._watch_all if self._world.rank == 0 else self._watch_first
            threading.Thread(target=watch, name="lifeline", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        if error is None:
            self._send(BYE)
        elif self._world.rank == 0:
            self._send(f"{END} {getattr(error, 'exit_code', 1)}")

    def wait_for_verdict(self) -> None:
        """Called with an error in hand that may be an echo of another process's end: then this does not return."""
        if self._world.size > 1 and self._ending.wait(LEAVE_SECONDS):
            time.sleep(2 * LINGER_SECONDS)

    def fail(self, line: str, code: int) -> None:
        """Tell the others why this process ends. Returns on rank 0 only, which then says so itself."""
        if self._world.size > 1 and self._world.rank:
            self._leaving.set()
            self._send(f"fail {code} {line}")
            time.sleep(LINGER_SECONDS)  # rank 0 prints the line and ends this process too
            print(f"error: {line}", file=sys.stderr, flush=True)
            os._exit(code)

    def _send(self, text: str) -> None:
        for line in self._lines.values():
            with suppress(OSError):
                line.sendall(f"{text}\n".encode())

    def _connect(self) -> None:
        token, hosts = secrets.token_hex(16), [host for host, *_ in gather(self._world, (socket.gethostname(),))]
        together = len(set(hosts)) == 1
        with socket.socket() as listener:
            if self._world.rank == 0:
                listener.bind(("127.0.0.1" if together else "", 0))
                listener.listen(self._world.size)
            names = ["127.0.0.1"] if together else _own_names()
            port = listener.getsockname()[1] if self._world.rank == 0 else 0
            names, port, token = gather(self._world, (names, port, token))[0]
            if self._world.rank == 0:
                self._accept(listener, token)
            elif line := _reach(names, port, f"{token} {self._world.rank}"):
                self._lines[0] = line
        for line in self._lines.values():
            _probe(line)
        linked = gather(self._world, len(self._lines))
        if linked[0] < self._world.size - 1:
            say(
                self._world,
                f"lifeline: {self._world.size - 1 - linked[0]} processes cannot reach {hosts[0]} on a free port; "
                "if one of them dies only the launcher can end the others",
            )

    def _accept(self, listener: socket.socket, token: str) -> None:
        deadline = time.monotonic() + 2 * CONNECT_SECONDS
        while len(self._lines) < self._world.size - 1 and time.monotonic() < deadline:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            with suppress(OSError, ValueError):
                line, _ = listener.accept()
                line.settimeout(CONNECT_SECONDS)
                given, rank = line.makefile("r").readline().split()
                if secrets.compare_digest(given, token):
                    line.settimeout(None)
                    self._lines[int(rank)] = line

    def _watch_all(self) -> None:
        """Rank 0: whoever falls silent without a word has died; whoever failed says why."""
        with selectors.DefaultSelector() as selector:
            for rank, line in self._lines.items():
                selector.register(line, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    selector.unregister(key.fileobj)
                    words = _read(self._lines[key.data])
                    if words == BYE:
                        continue
                    code, text, patience = 1, f"process {key.data} of {self._world.size} died; {self._mend}", 0.0
                    if words.startswith("fail "):
                        _, number, text = words.split(" ", 2)
                        code, patience = int(number), LEAVE_SECONDS
                    if not self._leaving.wait(patience):
                        self._end(code, text)
                    return

    def _watch_first(self) -> None:
        """The others: rank 0 says that all is done, or that this ends, or is gone."""
        if not self._lines:
            return
        words = _read(self._lines[0])
        if words.startswith(END):
            self._end(int(words.split()[1]), "")
        elif words != BYE:
            # One of each machine speaks: nobody knows which others are left.
            speaks = self._world.local_rank == 0 or self._world.rank == 1
            self._end(1, f"process 0 of {self._world.size} died; {self._mend}" if speaks else "")

    def _end(self, code: int, line: str) -> None:
        """End this process; what other threads are writing is finished first."""
        self._ending.set()
        if line:
            print(f"error: {line}", file=sys.stderr, flush=True)
        if self._world.rank == 0:
            self._send(f"{END} {code}")
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(LINGER_SECONDS)
        sys.stdout.flush()
        os._exit(code)


def _own_names() -> list[str]:
    """By what this machine may be known to the others, the likeliest first."""
    names = [os.environ.get("MASTER_ADDR", ""), socket.getfqdn(), socket.gethostname()]
    with suppress(OSError):
        names += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return list(dict.fromkeys(name for name in names if name))


def _reach(names: list[str], port: int, introduction: str) -> socket.socket | None:
    for name in names:
        with suppress(OSError):
            line = socket.create_connection((name, port), timeout=CONNECT_SECONDS)
            line.settimeout(None)
            line.sendall(f"{introduction}\n".encode())
            return line
    return None


def _read(line: socket.socket) -> str:
    """The one line that the other end sends before it goes; empty where it went without."""
    with suppress(OSError), line.makefile("r") as text:
        return text.readline().strip()
    return ""


def _probe(line: socket.socket) -> None:
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", PROBE_AFTER), ("TCP_KEEPINTVL", PROBE_EVERY), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
