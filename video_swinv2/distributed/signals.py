"""Stopping a run and marking it for restart: signals become a flag, and the marker file asks for another start."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from video_swinv2.distributed.launchers import launcher_pids

# sysexits.h's EX_TEMPFAIL: the run was stopped and saved a checkpoint; the same command continues it.
EXIT_RESTART = 75
# The same message as a file in the run folder, because torchrun exits with 1 whatever its processes' exit code is.
RESTART_MARKER = "start-again"


class StopSignal:
    """Turns SIGTERM, SIGUSR1 and the first SIGINT into a flag that is read at the end of a step; a context manager.

    The handlers only set the flag: a collective or a save inside a handler could interleave with the step's own.
    A second SIGINT raises KeyboardInterrupt. Must be entered in the main thread (Python allows handlers nowhere else).
    The death of the launcher counts as a signal too: SIGTERM to ``deepspeed`` ends the launcher but leaves the
    processes it started running.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self._received = ""
        self._interrupts = 0
        self._previous: dict[signal.Signals, Any] = {}
        self._launchers = launcher_pids()

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived or the launcher is gone."""
        # A process whose parent dies is adopted by another one, so the chain of launchers above it changes.
        if not self._received and self._launchers and launcher_pids() != self._launchers:
            self._received = "the launcher's end"
        return bool(self._received)

    @property
    def name(self) -> str:
        """Name of the first signal that arrived, such as ``SIGTERM``; empty before that."""
        return self._received

    def __enter__(self) -> StopSignal:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number).name
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt


def write_restart_marker(folder: Path) -> None:
    """Write the restart marker: the run in this folder was stopped before its end and should be started again."""
    (folder / RESTART_MARKER).write_text("stopped and saved; the same command continues the run\n", encoding="utf-8")


def remove_restart_marker(folder: Path) -> None:
    """Remove the restart marker, if any: the run is going on or has finished."""
    (folder / RESTART_MARKER).unlink(missing_ok=True)
