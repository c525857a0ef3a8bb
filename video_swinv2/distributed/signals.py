"""Stopping a run on a signal: handlers that set a flag, and the exit code and file that ask for a restart."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from video_swinv2.distributed.launchers import launcher_pids

# EX_TEMPFAIL of sysexits.h: the run was stopped and has saved a checkpoint; the same command resumes it.
EXIT_RESTART = 75
# A file in the run folder with the same meaning, for job scripts: torchrun exits with 1, whatever the exit code of its
# processes.
RESTART_MARKER = "start-again"


class StopSignal:
    """A context manager that turns SIGTERM, SIGUSR1 and SIGINT into a flag, read by the loop at the end of each step.

    The handlers do nothing but set the flag, because a handler may run anywhere in a step, and a collective or a save
    in it could interleave with the step's own. A second SIGINT raises KeyboardInterrupt. The context must be entered
    in the main thread, the only one in which Python allows handlers to be set.

    The end of the launcher counts as a signal too: SIGTERM to ``deepspeed`` ends the launcher, but the processes that
    it started keep running.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self._received = ""  # name of the first signal
        self._interrupts = 0  # number of SIGINTs
        # The handlers that were installed before, to be restored on leaving.
        self._previous: dict[signal.Signals, Any] = {}
        self._launchers = launcher_pids()

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived or the launcher is gone."""
        # The kernel gives a process whose parent dies a new parent, so the chain of launchers above it changes.
        if not self._received and self._launchers and launcher_pids() != self._launchers:
            self._received = "the launcher's end"
        return bool(self._received)

    @property
    def name(self) -> str:
        """Name of the first signal that arrived, for example ``SIGTERM``; empty if there was none."""
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
    """Write the restart marker, which says that the run was stopped before its end and should be started again."""
    (folder / RESTART_MARKER).write_text("stopped and saved; the same command continues the run\n", encoding="utf-8")


def remove_restart_marker(folder: Path) -> None:
    """Remove the restart marker, if any, because the run has been started again."""
    (folder / RESTART_MARKER).unlink(missing_ok=True)
