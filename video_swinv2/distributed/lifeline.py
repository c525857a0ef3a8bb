"""Ends all processes of a run, with one line of output, when one of them dies or fails.

Every process keeps a TCP connection to rank 0. Collectives do not help here: NCCL waits for a dead peer until its
timeout, gloo raises a traceback in every surviving process, and not every launcher ends the other processes. The
lifeline relies on the kernel instead: when a process dies, its kernel closes the connection at once; when its machine
dies, TCP keep-alive probes notice it within half a minute.

The protocol is a single line of text per connection and direction, sent by a process that leaves:

    other rank -> rank 0    "bye"                the process has finished; the connection will close
                            "fail CODE TEXT"     the process must end with this exit code and error message
                            (closed, no line)    the process has died
    rank 0 -> other ranks   "bye"                rank 0 has finished
                            "end CODE"           all processes must end now with this exit code
                            (closed, no line)    rank 0 has died

Rank 0 alone decides and prints. Therefore an error that several processes meet is reported once.
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

# TCP keep-alive: the first probe after 10 s of silence, then one every 5 s. A connection is closed after 4 unanswered
# ones, so the loss of a machine is noticed after 10 + 4 * 5 = 30 seconds.
PROBE_AFTER_SECONDS, PROBE_EVERY_SECONDS, PROBES = 10, 5, 4
# How long to wait before a failure is acted on. An error that all processes meet reaches them at about the same time,
# and within these seconds rank 0 leaves the context by itself and reports it in the normal way.
LEAVE_SECONDS = 5.0
LINGER_SECONDS = 30.0  # how long a process that must end waits for a checkpoint that is being written
CONNECT_SECONDS = 5.0
# The first words of the protocol's lines.
BYE = "bye"
END = "end"
FAIL = "fail"


class Lifeline:
    """Active inside the context; a no-op in a single process. Collective: all processes enter it together.

    When a process dies, rank 0 prints a line that ends with ``advice``, and all processes end with exit code 1. When
    rank 0 itself dies, one process on each machine prints the line.

    A thread in each process, the watcher, waits for lines from the other end and ends the process when it has to. The
    main thread cannot do that, because it may be stuck in a collective.
    """

    def __init__(self, world: World, advice: str) -> None:
        self._world = world
        self._advice = advice
        # Set when this process leaves the context, so that the watcher on rank 0 does not end it any more.
        self._leaving = threading.Event()
        # Set when the watcher has decided to end this process.
        self._ending = threading.Event()
        self._connections: dict[int, socket.socket] = {}
        """By rank of the other end: rank 0 has one to each other rank, every other rank has one to rank 0."""

    def __enter__(self) -> Lifeline:
        if self._world.size > 1:
            self._connect()
            watch = self._watch_all if self._world.rank == 0 else self._watch_rank_zero
            # A daemon, because it may still be blocked in a read when the program ends.
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
        # Any other rank that leaves with an error sends nothing here: it has called `fail` before, or its traceback is
        # its own to print, and rank 0 then treats the closed connection as a death.

    def wait_for_verdict(self) -> None:
        """To be called after an unexpected error; does not return if the cause is that another process has ended.

        When a peer is gone, a collective raises an error with a traceback that says nothing about the reason. The
        watcher hears from the peer at about the same time, prints the actual reason and ends this process.
        """
        if self._world.size > 1 and self._ending.wait(LEAVE_SECONDS):
            time.sleep(2 * LINGER_SECONDS)  # meanwhile the watcher calls os._exit

    def fail(self, message: str, code: int) -> None:
        """Report to rank 0 why this process has to end. Does not return, except on rank 0 and in a single process.

        There the caller raises the error itself.
        """
        if self._world.size > 1 and self._world.rank:
            self._leaving.set()
            self._send(f"{FAIL} {code} {message}")
            time.sleep(LINGER_SECONDS)  # until rank 0 has printed the message and ended this process
            # Rank 0 has not answered, so print the message here.
            print(f"error: {message}", file=sys.stderr, flush=True)
            os._exit(code)

    def _send(self, text: str) -> None:
        """Send a line to every connected process; those that are already gone are ignored."""
        for connection in self._connections.values():
            with suppress(OSError):
                connection.sendall(f"{text}\n".encode())

    def _connect(self) -> None:
        """Open the connections: rank 0 listens on a free port and announces it through the process group."""
        token = secrets.token_hex(16)
        hosts = [host for host, *_ in all_gather_objects(self._world, (socket.gethostname(),))]
        one_machine = len(set(hosts)) == 1
        with socket.socket() as listener:
            if self._world.rank == 0:
                # Reachable from other machines only if the run uses any. Port 0 lets the kernel choose a free one.
                listener.bind(("127.0.0.1" if one_machine else "", 0))
                listener.listen(self._world.size)
            names = ["127.0.0.1"] if one_machine else _own_names()
            port = listener.getsockname()[1] if self._world.rank == 0 else 0
            # A gather used as a broadcast: every rank contributes its values, and all use those of rank 0. It also
            # ensures that rank 0 listens before anybody connects.
            names, port, token = all_gather_objects(self._world, (names, port, token))[0]
            if self._world.rank == 0:
                self._accept(listener, token)
            elif connection := _connect_to_any(names, port, f"{token} {self._world.rank}"):
                self._connections[0] = connection
        for connection in self._connections.values():
            _enable_keep_alive(connection)
        # A process that cannot connect (a firewall, for example) does not stop the run; the user is told.
        connected = all_gather_objects(self._world, len(self._connections))
        missing = self._world.size - 1 - connected[0]
        if missing > 0:
            print_on_rank_zero(
                self._world,
                f"lifeline: {missing} processes cannot reach {hosts[0]} on a free port; if one of them dies, only the "
                "launcher can end the others",
            )

    def _accept(self, listener: socket.socket, token: str) -> None:
        """On rank 0: accept one connection from each other rank, which introduces itself with the line ``TOKEN RANK``.

        Anything else on the network that connects to the port does not know the token and is ignored.
        """
        deadline = time.monotonic() + 2 * CONNECT_SECONDS
        while len(self._connections) < self._world.size - 1 and time.monotonic() < deadline:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            # A stranger must not end the run. OSError covers timeouts, ValueError a line that is not "TOKEN RANK".
            with suppress(OSError, ValueError):
                connection, _ = listener.accept()
                connection.settimeout(CONNECT_SECONDS)
                given, rank = connection.makefile("r").readline().split()
                if secrets.compare_digest(given, token):
                    connection.settimeout(None)
                    self._connections[int(rank)] = connection

    def _watch_all(self) -> None:
        """The watcher on rank 0: waits for each rank to leave or die, and ends the run unless its line is "bye"."""
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    # Readable: a line or the end of the connection. Either way nothing more will come from this rank.
                    selector.unregister(key.fileobj)
                    received = _read_line(self._connections[key.data])
                    if received == BYE:
                        continue
                    code, message = 1, f"process {key.data} of {self._world.size} died; {self._advice}"
                    patience_seconds = 0.0
                    if received.startswith(f"{FAIL} "):
                        _, number, message = received.split(" ", 2)
                        # Rank 0 may be about to meet the same error. Give it the time to raise that itself.
                        code, patience_seconds = int(number), LEAVE_SECONDS
                    if not self._leaving.wait(patience_seconds):
                        self._end_process(code, message)
                    return

    def _watch_rank_zero(self) -> None:
        """The watcher on the other ranks: waits for rank 0 to finish, to end the run, or to die."""
        if not self._connections:  # this process could not connect
            return
        received = _read_line(self._connections[0])
        if received.startswith(END):
            self._end_process(int(received.split()[1]), "")  # rank 0 has printed the message
        elif received != BYE:
            # The survivors cannot reach each other, so one process on each machine prints the line: local rank 0. On
            # rank 0's machine that is the one that died, so there rank 1 prints it.
            prints = self._world.local_rank == 0 or self._world.rank == 1
            self._end_process(1, f"process 0 of {self._world.size} died; {self._advice}" if prints else "")

    def _end_process(self, code: int, message: str) -> None:
        """Print the message if it is not empty and end this process, once other threads have finished writing."""
        self._ending.set()
        if message:
            print(f"error: {message}", file=sys.stderr, flush=True)
        if self._world.rank == 0:
            # Before waiting for the checkpoint, so that the other processes do not run on meanwhile.
            self._send(f"{END} {code}")
        for thread in threading.enumerate():
            # The checkpoint writer is a thread that is not a daemon. The main thread is not waited for, because it may
            # be stuck in a collective.
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(LINGER_SECONDS)
        sys.stdout.flush()
        # sys.exit would only end this thread, and the main thread may never return from its collective.
        os._exit(code)


def _own_names() -> list[str]:
    """Names and addresses under which other machines may reach this one, most likely first and without duplicates."""
    names = [os.environ.get("MASTER_ADDR", ""), socket.getfqdn(), socket.gethostname()]
    with suppress(OSError):
        names += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    return list(dict.fromkeys(name for name in names if name))


def _connect_to_any(names: list[str], port: int, introduction: str) -> socket.socket | None:
    """Connect to the first name that answers and send the line ``introduction``; None if no name answers."""
    for name in names:
        with suppress(OSError):
            connection = socket.create_connection((name, port), timeout=CONNECT_SECONDS)
            connection.settimeout(None)
            connection.sendall(f"{introduction}\n".encode())
            return connection
    return None


def _read_line(connection: socket.socket) -> str:
    """Block until the other end sends its line; an empty string if the connection closes without one."""
    with suppress(OSError), connection.makefile("r") as text:
        return text.readline().strip()
    return ""


def _enable_keep_alive(connection: socket.socket) -> None:
    """Let the kernel probe a silent connection, because a machine that loses power does not close it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_KEEPIDLE", PROBE_AFTER_SECONDS),
        ("TCP_KEEPINTVL", PROBE_EVERY_SECONDS),
        ("TCP_KEEPCNT", PROBES),
    )
    for name, value in options:
        if hasattr(socket, name):  # these are Linux names; other systems lack some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
