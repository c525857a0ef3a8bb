"""Ends all processes of a run, with one report of the cause, when one of them fails, dies or stops answering.

Every process keeps a TCP connection to rank 0. Collectives do not help here: NCCL waits for a dead peer until its
timeout, gloo raises a traceback in every surviving process, and not every launcher ends the other processes. The
lifeline relies on the kernel instead: when a process dies, its kernel closes the connection at once; when its machine
dies, TCP keep-alive probes notice it within half a minute. A process that is stopped, or whose machine hangs, keeps its
connection, so each process also sends a beat every few seconds.

The messages are JSON, one per line:

    other rank -> rank 0    {"token", "rank", "host", "pid"}    introduces the process, once
    both directions         {"beat": true}                      still there
    both directions         {"bye": true}                       has finished; the connection will close
    other rank -> rank 0    {"failure": {...}}                  the fields of `Failure`; waits to be ended
    rank 0 -> other ranks   {"end": CODE, "kill": [HOST, PID]}  every process ends now with this exit code; one on
                                                                HOST kills the process PID, which does not answer
    (closed without bye)                                        the process has died

Rank 0 alone decides and prints, so an error that several processes meet is reported once. If rank 0 itself dies or does
not answer, one process on each machine prints the line.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from video_swinv2.distributed.collectives import common_store, print_on_rank_zero
from video_swinv2.distributed.launchers import launcher_pids, lost_launcher
from video_swinv2.distributed.world import World

# TCP keep-alive: the first probe after 10 s of silence, then one every 5 s. A connection is closed after 4 unanswered
# ones, so the loss of a machine is noticed after 10 + 4 * 5 = 30 seconds.
PROBE_AFTER_SECONDS, PROBE_EVERY_SECONDS, PROBES = 10, 5, 4
BEAT_SECONDS = 2.0
WARN_SECONDS = 60.0  # after which a silent process is named
# How long to wait, after a process has reported an error, for one that explains more: the same error on rank 0, or the
# death that broke a collective.
BETTER_CAUSE_SECONDS = 5.0
LINGER_SECONDS = 30.0  # how long a process that must end waits for a checkpoint that is being written
CONNECT_SECONDS = 5.0


class Cause(IntEnum):
    """What ends a run; a greater one explains a lesser one that occurs at about the same time."""

    BROKEN_COLLECTIVE = 0
    """A collective failed, most likely because of something that happened to another process."""
    GONE = 1
    """The process has died, or did not answer for too long."""
    ERROR = 2
    """An error of the process itself."""


@dataclass(frozen=True)
class Failure:
    """Why the run has to end: what rank 0 prints, and the exit code of all processes."""

    rank: int
    cause: Cause
    text: str
    code: int
    kill: tuple[str, int] | None = None
    """Host and pid of a process that does not answer, to be killed."""


@dataclass
class _Peer:
    """The process at the other end of a connection."""

    rank: int
    host: str
    pid: int
    connection: socket.socket
    received: bytes = b""
    """The beginning of a line whose rest has not arrived yet."""
    silent_seconds: float = 0.0
    """How long it has not sent anything, counted only while this process was running itself."""
    is_named: bool = False
    """Whether its silence has been reported."""


class Lifeline:
    """Watches the other processes, of which there is at least one, from its construction to `leave`.

    Collective: all processes construct it together. A thread in each process, the watcher, exchanges beats with the
    other end and ends the process when it has to. The main thread cannot do that, because it may be stuck in a
    collective.

    Args:
        advice: what to do after one of the processes has died; the end of the line that says so.
        silence_seconds: the run ends if a process does not answer for this long.
        end_with_launcher: whether the end of the launcher ends the run. Training saves a checkpoint instead, see
            `StopSignal`.
    """

    def __init__(self, world: World, advice: str, *, silence_seconds: float, end_with_launcher: bool) -> None:
        self._world, self._advice = world, advice
        self._silence_seconds = silence_seconds
        # A limit below two minutes is announced when half of it is over.
        self._warn_seconds = min(WARN_SECONDS, silence_seconds / 2)
        # One process on each machine is enough to notice the launcher's end.
        self._launchers = launcher_pids() if end_with_launcher and world.local_rank == 0 else ()
        self._host = socket.gethostname()
        self._peers: dict[int, _Peer] = {}
        """By rank: on rank 0 all others, on every other rank only rank 0."""
        self._sending = threading.Lock()  # the main thread and the watcher send on the same connections
        self._leaving = threading.Event()
        self._ended = threading.Event()
        """Set when the watcher has nobody left to watch."""
        # What `fail` was called with on rank 0, for the watcher to compare with what other processes report.
        self._own_failure: Failure | None = None
        # Wakes the watcher from its wait for messages.
        self._wake_reader, self._waker = socket.socketpair()
        self._connect()
        # A daemon, because the program may end while it waits.
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def leave(self) -> None:
        """Stop watching, and being watched, because this process has finished successfully.

        Waits a moment for the others to say goodbye too: the end of a connection can overtake what was sent before it.
        """
        self._leaving.set()
        self._send({"bye": True})
        self._ended.wait(LINGER_SECONDS)

    def fail(self, failure: Failure) -> None:
        """End all processes because of this failure, which is printed unless another one explains it.

        Does not return. The process group is not destroyed: under NCCL that would wait for the other processes.
        """
        if self._report(failure):
            time.sleep(BETTER_CAUSE_SECONDS + 2 * LINGER_SECONDS)  # meanwhile the watcher ends this process
        # Nobody watches any more, or rank 0 does not answer.
        print(failure.text, file=sys.stderr, flush=True)
        self._exit(failure.code)

    def _report(self, failure: Failure) -> bool:
        """Tell rank 0 about a failure; returns whether it was told."""
        if self._world.rank:
            return self._send({"failure": asdict(failure)})
        self._own_failure = failure
        self._waker.send(b"x")
        return bool(self._peers)

    def _send(self, message: Mapping[str, Any]) -> bool:
        """Send a message to every peer; returns whether anyone received it. Peers that are gone are ignored."""
        line, received = f"{json.dumps(message, allow_nan=False)}\n".encode(), False
        with self._sending:
            for peer in list(self._peers.values()):  # the watcher may remove some meanwhile
                with suppress(OSError):
                    peer.connection.sendall(line)
                    received = True
        return received

    def _connect(self) -> None:
        """Open the connections: rank 0 listens on a free port and announces it in the store of the process group."""
        store = common_store()
        if self._world.rank == 0:
            token = secrets.token_hex(16)
            with socket.socket() as listener:
                # Port 0 lets the kernel choose a free one.
                listener.bind(("", 0))
                listener.listen(self._world.size)
                place = {"names": _own_names(), "port": listener.getsockname()[1], "token": token}
                store.set("place", json.dumps(place | {"host": self._host, "pid": os.getpid()}, allow_nan=False))
                self._accept(listener, token)
            missing = self._world.size - 1 - len(self._peers)
            if missing:
                # A process that cannot connect (a firewall, for example) does not stop the run; the user is told.
                print_on_rank_zero(
                    self._world,
                    f"lifeline: {missing} processes cannot reach {self._host} on a free port; if one of them dies, "
                    "only the launcher can end the others",
                )
            return
        place = json.loads(store.get("place"))
        me = {"token": place["token"], "rank": self._world.rank, "host": self._host, "pid": os.getpid()}
        names = ["127.0.0.1"] if place["host"] == self._host else place["names"]
        if connection := _connect_to_any(names, place["port"], json.dumps(me, allow_nan=False)):
            self._peers[0] = _Peer(0, place["host"], place["pid"], connection)

    def _accept(self, listener: socket.socket, token: str) -> None:
        """On rank 0: accept one connection from each other rank.

        Anything else on the network that connects to the port does not know the token and is ignored.
        """
        deadline = time.monotonic() + 2 * CONNECT_SECONDS
        while len(self._peers) < self._world.size - 1 and time.monotonic() < deadline:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            # A stranger must not end the run. OSError covers timeouts, the others a line that is no introduction.
            with suppress(OSError, ValueError, KeyError, TypeError):
                connection, _ = listener.accept()
                connection.settimeout(CONNECT_SECONDS)
                given = json.loads(_read_introduction(connection))
                if secrets.compare_digest(str(given["token"]), token):
                    _keep(connection)
                    rank = int(given["rank"])
                    self._peers[rank] = _Peer(rank, str(given["host"]), int(given["pid"]), connection)

    def _watch(self) -> None:
        """The watcher: exchanges beats and ends this process when the run has to end."""
        failures: list[Failure] = []
        decide_at = float("inf")
        ticked = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_reader, selectors.EVENT_READ)
            for peer in self._peers.values():
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while self._peers:
                wait_seconds = max(0.0, min(decide_at - time.monotonic(), BEAT_SECONDS))
                for key, _ in selector.select(wait_seconds):
                    if key.data is None:
                        self._wake_reader.recv(16)
                    elif not self._receive(key.data, failures):
                        selector.unregister(key.fileobj)
                        del self._peers[key.data.rank]
                now = time.monotonic()
                if now - ticked >= BEAT_SECONDS:
                    self._send({"beat": True})
                    # If this process was stopped itself, the others may have been stopped with it and need the time
                    # of a beat to be heard again. So a long gap counts as a short one.
                    self._count_silence(min(now - ticked, 2 * BEAT_SECONDS), failures)
                    ticked = now
                    if self._launchers and lost_launcher(self._launchers):
                        text = f"error: the launcher on {self._host} has ended; {self._advice}"
                        self._report(Failure(self._world.rank, Cause.ERROR, text, 1))
                if self._own_failure and self._own_failure not in failures:
                    failures.append(self._own_failure)
                if failures and decide_at == float("inf"):
                    decide_at = now + BETTER_CAUSE_SECONDS
                if failures and (now >= decide_at or _is_decisive(failures, self._own_failure)):
                    self._end_run(max(failures, key=lambda failure: (failure.cause, -failure.rank)))
        self._ended.set()

    def _receive(self, peer: _Peer, failures: list[Failure]) -> bool:
        """Read what a peer has sent and append to `failures` what it reports; returns whether it is still connected."""
        try:
            data = peer.connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            if self._leaving.is_set():  # it has left before this process could read its goodbye
                return False
            text = f"error: {self._name(peer)} died; {self._advice} (it was {_place(peer)})"
            # Rank 0 is watched by all others, of which one on each machine prints.
            failures.append(Failure(peer.rank, Cause.GONE, text if self._reports() else "", 1))
            return False
        if peer.is_named and self._reports():
            print(f"lifeline: {self._name(peer)} answers again", file=sys.stderr, flush=True)
        peer.silent_seconds, peer.is_named = 0.0, False
        *lines, peer.received = (peer.received + data).split(b"\n")
        for message in map(json.loads, lines):
            if "bye" in message:
                return False
            if "failure" in message:
                given = message["failure"]
                failures.append(Failure(given["rank"], Cause(given["cause"]), given["text"], given["code"]))
            if "end" in message:
                self._end_with_rank_zero(peer, message["end"], message["kill"])
        return True

    def _count_silence(self, seconds: float, failures: list[Failure]) -> None:
        """Add `seconds` to the silence of every peer; name those that are silent too long, and end the run for one."""
        for peer in self._peers.values():
            peer.silent_seconds += seconds
            if peer.silent_seconds >= self._silence_seconds:
                text = (
                    f"error: {self._name(peer)} has not answered for {self._silence_seconds:g} seconds "
                    f"(engine.silence_seconds) and was ended; {self._advice} (it was {_place(peer)})"
                )
                text = text if self._reports() else ""
                failures.append(Failure(peer.rank, Cause.GONE, text, 1, kill=(peer.host, peer.pid)))
            elif peer.silent_seconds >= self._warn_seconds and not peer.is_named:
                peer.is_named = True
                if self._reports():
                    print(
                        f"lifeline: {self._name(peer)} has not answered for {peer.silent_seconds:.0f} seconds: it is "
                        f"stopped, or its machine hangs ({_place(peer)}); after {self._silence_seconds:g} seconds the "
                        "run ends",
                        file=sys.stderr,
                        flush=True,
                    )

    def _reports(self) -> bool:
        """Whether this process prints what it notices: rank 0 does; about rank 0, one process on each machine.

        That is local rank 0, but on rank 0's own machine, where local rank 0 is rank 0 itself, it is rank 1.
        """
        return self._world.local_rank == 0 or self._world.rank == 1

    def _name(self, peer: _Peer) -> str:
        return f"process {peer.rank} of {self._world.size}"

    def _end_run(self, failure: Failure) -> None:
        """Print the failure, tell all other processes to end, and end this one."""
        if failure.text:
            print(failure.text, file=sys.stderr, flush=True)
        if self._world.rank == 0:
            self._send({"end": failure.code, "kill": failure.kill})
        self._kill(failure.kill)
        self._exit(failure.code)

    def _end_with_rank_zero(self, rank_zero: _Peer, code: int, kill: Sequence[Any] | None) -> None:
        """End this process because rank 0 says so, but after rank 0.

        Launchers end all processes as soon as one has ended, and rank 0 may still be writing a checkpoint.
        """
        self._kill(kill)
        with suppress(OSError):
            rank_zero.connection.settimeout(LINGER_SECONDS)
            while rank_zero.connection.recv(1 << 16):
                pass
        self._exit(code)

    def _kill(self, process: Sequence[Any] | None) -> None:
        """Kill a process that does not answer, given as host and pid, if it is on this machine."""
        if process and process[0] == self._host:
            with suppress(OSError):
                os.kill(int(process[1]), signal.SIGKILL)

    def _exit(self, code: int) -> None:
        """End this process once a checkpoint that is being written is complete, but do not wait for other processes."""
        for thread in threading.enumerate():
            # The checkpoint writer is a thread that is not a daemon. The main thread is not waited for, because it may
            # be stuck in a collective.
            if not thread.daemon and thread not in (threading.main_thread(), threading.current_thread()):
                thread.join(LINGER_SECONDS)
        with suppress(Exception):
            sys.stdout.flush()
        # sys.exit would only end this thread, and an orderly end may wait for the other processes.
        os._exit(code)


def _place(peer: _Peer) -> str:
    return f"pid {peer.pid} on {peer.host}"


def _is_decisive(failures: Sequence[Failure], own: Failure | None) -> bool:
    """Whether nothing that may still be reported could explain more: a process is gone, or this one has an error."""
    return any(failure.cause == Cause.GONE for failure in failures) or (own is not None and own.cause == Cause.ERROR)


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
            connection.sendall(f"{introduction}\n".encode())
            _keep(connection)
            return connection
    return None


def _read_introduction(connection: socket.socket) -> bytes:
    """The first line, read byte by byte, so that nothing that follows it is lost; at most 1000 bytes."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 1000 and (byte := connection.recv(1)):
        line += byte
    return line


def _keep(connection: socket.socket) -> None:
    """Wait for messages without a limit, and let the kernel probe the connection.

    A machine that loses power does not close it.
    """
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_KEEPIDLE", PROBE_AFTER_SECONDS),
        ("TCP_KEEPINTVL", PROBE_EVERY_SECONDS),
        ("TCP_KEEPCNT", PROBES),
    )
    for name, value in options:
        if hasattr(socket, name):  # these are Linux names; other systems lack some of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
