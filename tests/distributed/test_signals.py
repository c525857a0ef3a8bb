"""Stop signals: real signals to real processes, and the death of a real launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.distributed.launching import LAUNCHERS
from video_swinv2.distributed.signals import StopSignal

WORKER = Path(__file__).with_name("signal_worker.py")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_becomes_a_flag_and_the_old_handlers_are_restored(number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, str(WORKER)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == f"{number.name}\nrestored\n"
        assert process.wait(timeout=600) == 0
    finally:
        process.kill()


# deepspeed's launcher imports DeepSpeed twice before it starts anything.
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("torchrun", signal.SIGKILL), pytest.param("deepspeed", signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_the_death_of_the_launcher_counts_as_a_signal(launcher: str, number: signal.Signals) -> None:
    """SIGKILL of torchrun, and SIGTERM of deepspeed, leave the processes they started running."""
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher][:-1], "1", str(WORKER)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()) != "ready\n":
        assert line, "it ended before its process was ready"
    process.send_signal(number)
    assert "the launcher's end\nrestored\n" in process.stdout.read()
    process.wait()


def test_the_second_sigint_raises() -> None:
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
