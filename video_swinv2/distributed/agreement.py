"""What all processes of a run must have in common before they compute anything together, and the folder they share.

Processes that differ would not fail: they would train on mismatched weights, or wait for each other for ever.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from video_swinv2.distributed.collectives import all_gather_objects
from video_swinv2.distributed.world import World
from video_swinv2.errors import UserError
from video_swinv2.files import create_folder, lock_file, sha256

LOCK = ".lock"
# A network file system may show a new file to other machines only after some time; NFS caches names for up to a minute,
# but names that have not been looked up before are not cached.
VISIBLE_SECONDS = 30.0
MAX_NAMED = 3  # differences that an error names


def require_agreement(world: World, facts: Mapping[str, object]) -> None:
    """Raise UserError, on all processes, naming the first process whose facts differ from rank 0's, and in what.

    Collective. facts: short plain values by name; names of nested mappings are joined by dots.
    """
    mine = {name: str(value) for name, value in _flatten(facts)}
    everybody = all_gather_objects(world, (socket.gethostname(), mine))
    first_host, first = everybody[0]
    for rank, (host, theirs) in enumerate(everybody):
        names = [name for name in first | theirs if first.get(name) != theirs.get(name)]
        if names:
            named = ", ".join(
                f"{name} is {theirs.get(name, 'absent')} instead of {first.get(name, 'absent')}"
                for name in names[:MAX_NAMED]
            )
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            raise UserError(
                f"process {rank} on {host} differs from process 0 on {first_host}: {named}{more}; start all processes "
                "with the same command, data and versions"
            )


def _flatten(facts: Mapping[str, object], above: str = "") -> Iterator[tuple[str, object]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


@contextmanager
def exclusive_folder(folder: Path, world: World, busy: str) -> Iterator[None]:
    """Create `folder` and lock it for this run inside the context; all processes must see the same folder.

    Rank 0 holds the lock for all. It is gone when that process ends, in whatever way. Collective. Raises UserError if
    the folder cannot be created, with the message `busy` if another run holds the lock, and on a process that does not
    see what rank 0 has written, because the folder is on a local disk of each machine.
    """
    if world.rank:
        host, digest = all_gather_objects(world, ("", ""))[0]
        wait_for_file(folder / LOCK, digest, host)
        yield
        return
    create_folder(folder)
    with lock_file(folder / LOCK, busy):
        if world.size > 1:
            # The other processes look for this content, which no folder on a local disk has.
            host = socket.gethostname()
            (folder / LOCK).write_text(f"process {os.getpid()} on {host}, {secrets.token_hex(8)}\n", encoding="utf-8")
            all_gather_objects(world, (host, sha256(folder / LOCK)))
        yield


def wait_for_file(path: Path, digest: str, writer: str) -> None:
    """Wait until this process sees the file that has this SHA-256 on the machine `writer`.

    Raises UserError if it does not appear, or has another content.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while True:
        try:
            if sha256(path) == digest:
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}: {socket.gethostname()} does not see the same file there as {writer}; the folder must be on a "
                "file system that all machines of the run share"
            )
        time.sleep(0.2)
