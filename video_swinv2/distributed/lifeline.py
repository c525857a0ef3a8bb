"""A connection from every process to rank 0, so that a process that dies or fails ends the whole run with one line.

Collectives cannot do this: NCCL waits for a dead peer until its timeout, gloo raises a traceback in every survivor,
and not every launcher ends the other processes. The lifeline relies on the kernel instead: when a process dies, its
kernel closes the connection at once; when its machine dies, TCP keep-alive probes notice within half a minute.

The protocol is one line of text per connection, sent by the end that leaves first:

    other rank -> rank 0    "bye"                it finished; ignore that the connection closes now
                            "fail CODE TEXT"     it is about to end with this exit code and error message
                            (closed, no line)    it died
    rank 0 -> other ranks   "bye"                rank 0 finished
                            "end CODE"           everybody ends now with this exit code
                            (closed, no line)    rank 0 died

Only rank 0 prints and decides, which is why one error gives one message however many processes meet it.
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

from video_swinv2.distributed.collectives import all_gather_objects, print_on_rank_zero
from video_swinv2.distributed.world import World

# A machine that is gone is noticed after 10 + 4 * 5 = 30 seconds.
PROBE_AFTER_SECONDS, PROBE_EVERY_SECONDS, PROBES = 10, 5, 4
# How long a failing process may take to end by itself: an error that all processes meet reaches them at once, and then
# each leaves the context normally.
LEAVE_SECONDS = 5.0
LINGER_SECONDS = 30.0  # for a checkpoint that is being written
CONNECT_SECONDS = 5.0
BYE = "bye"
END = "end"
FAIL = "fail"


class Lifeline:
    """Active inside the context; a no-op in a single process. All processes enter it together (collective).

    When a process dies, rank 0 prints a line that ends with ``advice`` and all processes end with exit code 1. When
    rank 0 itself dies, one process of each machine prints the line.
    """

    def __init__(self, world: World, advice: str) -> None:
        self._world = world
        self._advice = advice
        # Set when this process leaves the context, so that the watcher does not take that for a death.
        self._leaving = threading.Event()
        # Set when the watcher has decided to end this process.
        self._ending = threading.Event()
        self._connections: dict[int, socket.socket] = {}
        """By rank of the other end: rank 0 has one to each other rank, every other rank has one to rank 0."""

    def __enter__(self) -> Lifeline:
        if self._world.size > 1:
            self._connect()
            watch = self._watch_all if self._world.rank == 0 else self._watch_rank_zero
            # A daemon: it may be blocked in a read when the program ends.
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
        # Another rank that leaves with an error sends nothing: rank 0 treats the closed connection as a death.

    def wait_for_verdict(self) -> None:
        """Call this with an unexpected error in hand: if it only echoes another process's end, this does not return.

        A collective fails with some traceback when a peer is gone. The watcher learns of the peer at about the same
        time, prints the actual reason and ends this process, which makes the traceback superfluous.
        """
        if self._world.size > 1 and self._ending.wait(LEAVE_SECONDS):
            time.sleep(2 * LINGER_SECONDS)  # the watcher thread calls os._exit meanwhile

    def fail(self, message: str, code: int) -> None:
        """Report to rank 0 why this process ends. Returns on rank 0 only, which then raises the error itself."""
        if self._world.size > 1 and self._world.rank:
            self._leaving.set()
            self._send(f"{FAIL} {code} {message}")
            time.sleep(LINGER_SECONDS)  # rank 0 prints the message and ends this process too
            # Rank 0 did not answer, so print the message here.
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(code)

    def _send(self, text: str) -> None:
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(f"{text}\n".encode())

    def _connect(self) -> None:
        """Open the connections: rank 0 listens on a free port, which it shares through the process group."""
        token = secrets.token_hex(16)
        hosts = [host for host, *_ in all_gather_objects(self._world, (socket.gethostname(),))]
        one_machine = len(set(hosts)) == 1
        with socket.socket() as listener:
            if self._world.rank == 0:
                # Open to other machines only if there are any.
                listener.bind(("127.0.0.1" if one_machine else "", 0))
                listener.listen(self._world.size)
            names = ["127.0.0.1"] if one_machine else _own_names()
            port = listener.getsockname()[1] if self._world.rank == 0 else 0
            # Everybody takes part in the gather, but only rank 0's names, port and token are used.
            names, port, token = all_gather_objects(self._world, (names, port, token))[0]
            if self._world.rank == 0:
                self._accept(listener, token)
            elif connection := _connect_to_any(names, port, f"{token} {self._world.rank}"):
                self._connections[0] = connection
        for connection in self._connections.values():
            _enable_keep_alive(connection)
        connected = all_gather_objects(self._world, len(self._connections))
        missing = self._world.size - 1 - connected[0]
        if missing > 0:
            print_on_rank_zero(
                self._world,
                f"lifeline: {missing} processes cannot reach {hosts[0]} on a free port; if one of them dies, only the "
                "launcher can end the others",
            )

    def _accept(self, listener: socket.socket, token: str) -> None:
        """Rank 0: accept one connection per other rank, each introduced by ``TOKEN RANK``.

        The token keeps out anything else on the network that connects to the port.
        """
        deadline = time.monotonic() + 2 * CONNECT_SECONDS
        while len(self._connections) < self._world.size - 1 and time.monotonic() < deadline:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            # OSError covers timeouts; ValueError covers a first line that is not "TOKEN RANK".
            with suppress(OSError, ValueError):
                connection, _ = listener.accept()
                connection.settimeout(CONNECT_SECONDS)
                given, rank = connection.makefile("r").readline().split()
                if secrets.compare_digest(given, token):
                    connection.settimeout(None)
                    self._connections[int(rank)] = connection

    def _watch_all(self) -> None:
        """Rank 0's thread: waits until some rank sends its line or dies, and ends the run unless the line is "bye"."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    # Readable means a line or a closed connection; either way it is the last news of this rank.
                    selector.unregister(key.fileobj)
                    received = _read_line(self._connections[key.data])
                    if received == BYE:
                        continue
                    code, message = 1, f"process {key.data} of {self._world.size} died; {self._advice}"
                    patience_seconds = 0.0
                    if received.startswith(f"{FAIL} "):
                        _, number, message = received.split(" ", 2)
                        # Rank 0 may be about to meet the same error, and then raises it itself.
                        code, patience_seconds = int(number), LEAVE_SECONDS
                    if not self._leaving.wait(patience_seconds):
                        self._end_process(code, message)
                    return

    def _watch_rank_zero(self) -> None:
        """The other ranks' thread: waits for rank 0 to finish, to end the run, or to die."""
        if not self._connections:
            return
        received = _read_line(self._connections[0])
        if received.startswith(END):
            self._end_process(int(received.split()[1]), "")  # rank 0 has printed the message
        elif received != BYE:
            # Nobody knows which processes are left, so one of each machine prints: local rank 0, and rank 1 because
            # on rank 0's own machine local rank 0 is the one that died.
            prints = self._world.local_rank == 0 or self._world.rank == 1
            self._end_process(1, f"process 0 of {self._world.size} died; {self._advice}" if prints else "")

    def _end_process(self, code: int, message: str) -> None:
        """End this process, after other threads have finished what they are writing."""
        self._ending.set()
        if message:
            print(f"error: {message}", file=sys.stderr, flush=True)
        if self._world.rank == 0:
            self._send(f"{END} {code}")
        for thread in threading.enumerate():
            # The checkpoint writer is not a daemon. The main thread may be stuck in a collective and is not waited for.
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(LINGER_SECONDS)
        sys.stdout.flush()
        # Not sys.exit: this is not the main thread, and the main thread may never return from its collective.
        os._exit(code)


def _own_names() -> list[str]:
    """Names and addresses under which other machines may know this one, most likely first."""
    names = [os.environ.get("MASTER_ADDR", ""), socket.getfqdn(), socket.gethostname()]
    with suppress(OSError):
        names += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return list(dict.fromkeys(name for name in names if name))


def _connect_to_any(names: list[str], port: int, introduction: str) -> socket.socket | None:
    """A connection to the first name that answers, introduced by one line; None if none answers."""
    for name in names:
        with suppress(OSError):
            connection = socket.create_connection((name, port), timeout=CONNECT_SECONDS)
            connection.settimeout(None)
            connection.sendall(f"{introduction}\n".encode())
            return connection
    return None


def _read_line(connection: socket.socket) -> str:
    """The line that the other end sends before it leaves; empty if the connection closed without one. Blocks."""
    with suppress(OSError), connection.makefile("r") as text:
        return text.readline().strip()
    return ""


def _enable_keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_KEEPIDLE", PROBE_AFTER_SECONDS),
        ("TCP_KEEPINTVL", PROBE_EVERY_SECONDS),
        ("TCP_KEEPCNT", PROBES),
    )
    for name, value in options:
        if hasattr(socket, name):  # the names are Linux's; other systems lack some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
