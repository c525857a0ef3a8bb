"""KillableProcess: answers, deadlines, deaths by name, limits, and that it ends."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from multiprocessing.connection import Connection

import pytest

from video_swinv2.killable import KillableProcess, NoAnswerError, ProcessDiedError, StartMethod, describe_exit

METHODS: tuple[StartMethod, ...] = ("spawn", "forkserver", "fork") if sys.platform == "linux" else ("spawn",)


def obey(pipe: Connection, greeting: str) -> None:
    """Do what the messages say."""
    pipe.send(greeting)
    while True:
        order = pipe.recv()
        if order == "sleep":
            time.sleep(600)
        elif order == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif order == "leave":
            sys.exit(3)
        elif order == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        elif order == "allocate":
            try:
                bytearray(2**40)
            except MemoryError:
                pipe.send("refused")
        pipe.send(order)


@pytest.mark.parametrize("method", METHODS)
def test_messages_and_deaths(method: StartMethod) -> None:
    for order, death in (("die", "SIGSEGV"), ("leave", "exit code 3")):
        process = KillableProcess(obey, "hello", method=method)
        try:
            assert process.receive(600) == "hello"
            process.send("interrupt")
            assert process.receive(60) == "interrupt", "Ctrl-C is the parent's to handle"
            process.send(order)
            with pytest.raises(ProcessDiedError, match=f"^{death}$") as caught:
                process.receive(60)
            assert caught.value.exit_code == process.end()
            assert not process.is_alive()
            with pytest.raises(ProcessDiedError):
                process.send("hello")
        finally:
            process.end()


def test_no_answer_leaves_the_process_running_until_it_is_ended() -> None:
    process = KillableProcess(obey, "hello", method="forkserver")
    assert process.receive(60) == "hello"
    process.send("sleep")
    started = time.monotonic()
    with pytest.raises(NoAnswerError):
        process.receive(0.2)
    assert time.monotonic() - started >= 0.2
    assert process.is_alive()
    assert process.end() == -signal.SIGKILL


def test_limits_hold_in_the_process_alone() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    process = KillableProcess(obey, "hello", method="spawn", limits={resource.RLIMIT_AS: 8 * 2**30})
    assert process.receive(60) == "hello"
    process.send("allocate")
    assert process.receive(60) == "refused"
    process.end()
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_exits_are_described() -> None:
    assert describe_exit(-signal.SIGKILL) == "SIGKILL"
    assert describe_exit(-60) == "signal 60", "a real-time signal has no name"
    assert describe_exit(1) == "exit code 1"
