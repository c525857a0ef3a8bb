"""Processes, seeds and signals: real launchers, real signals, and environments written by hand."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from video_swinv2.distributed.collectives import all_reduce_max, all_reduce_sum, print_on_rank_zero
from video_swinv2.distributed.launchers import first_host, is_launcher, launch_info_from_environment
from video_swinv2.distributed.signals import StopSignal
from video_swinv2.distributed.world import World, join_world
from video_swinv2.engine.base import seed_step
from video_swinv2.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("launch_worker.py")
ALONE = World(0, 1, 0, torch.device("cpu"))
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2"],
}


def _launch(environment: dict[str, str]) -> tuple[int, int, int, str | None]:
    launch = launch_info_from_environment(environment)
    return launch.rank, launch.world_size, launch.local_rank, launch.init_method


def test_a_plain_process_is_a_world_of_one() -> None:
    assert _launch({}) == (0, 1, 0, None)


def test_torchrun_and_deepspeed() -> None:
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert _launch(variables) == (5, 8, 1, "env://")


def test_srun() -> None:
    variables = {
        "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[03-04]", "SLURM_JOB_ID": "40007",
    }  # fmt: skip
    assert _launch(variables) == (5, 8, 1, "tcp://gpu03:25007")
    assert _launch(variables | {"MASTER_PORT": "77", "MASTER_ADDR": "b"}) == (5, 8, 1, "tcp://b:77")
    assert _launch(variables | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})[3] is None


def test_a_batch_script_without_srun_is_alone_and_torchrun_under_slurm_is_torchrun() -> None:
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    assert _launch(script) == (0, 1, 0, None)
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert _launch(script | {"SLURM_STEP_NUM_TASKS": "1"} | torchrun) == (1, 2, 1, "env://")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='x' is not a number"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, "SLURM_STEP_NODELIST is empty"),
    ],
)
def test_half_an_environment_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launch_info_from_environment(variables)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-010,12],cpu1", "gpu007"),
        ("gpu[5,7-9]", "gpu5"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("", ""),
    ],
)
def test_first_host_of_a_node_list(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="device: unknown device 'gpu'"):
        join_world("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="cuda was requested"):
            join_world("cuda")


def _draws(*arguments: int) -> tuple[float, float, float]:
    seed_step(*arguments)
    return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002 - what seed_step sets


def test_seeds_depend_on_each_argument_and_on_nothing_else() -> None:
    first = _draws(1, 2, 3, 4)
    torch.rand(5)
    assert _draws(1, 2, 3, 4) == first
    others = [
        _draws(*arguments) for arguments in ((2, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5), (2, 1, 3, 4))
    ]
    assert len({first, *others}) == 6
    assert all(len({draw[source] for draw in (first, *others)}) == 6 for source in range(3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_a_process_is_a_flag_and_the_old_handlers_come_back(number: signal.Signals) -> None:
    worker = Path(__file__).with_name("signal_worker.py")
    process = subprocess.Popen(
        [sys.executable, str(worker)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == f"{number.name}\nrestored\n"
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()


# deepspeed's launcher imports DeepSpeed twice over before it starts anything.
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("torchrun", signal.SIGKILL), pytest.param("deepspeed", signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_the_launcher_s_end_is_a_signal_too(launcher: str, number: signal.Signals) -> None:
    """SIGKILL leaves what torchrun started running, SIGTERM what deepspeed started (its launcher ends alone)."""
    worker = Path(__file__).with_name("signal_worker.py")
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher][:-1], "1", str(worker)],
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


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/usr/bin/python3 -u -m deepspeed.launcher.launch --world_info=e30 train.py", True),
        ("/venv/bin/python /venv/bin/deepspeed --num_gpus 2 train.py", True),
        ("/venv/bin/python3.11 -m torch.distributed.run --standalone train.py", True),
        ("/venv/bin/python /venv/bin/torchrun train.py", True),
        ("bash -c torchrun train.py", False),
        ("/venv/bin/python -m video_swinv2 train deepspeed", False),
        ("-bash", False),
        ("python3", False),
    ],
)
def test_whose_end_counts(command: str, expected: bool) -> None:
    assert is_launcher(command.split()) is expected


def test_the_second_interrupt_interrupts() -> None:
    with StopSignal() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert stop.name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_process_agrees_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert all_reduce_max(ALONE, 0.0, 1.0) == (0.0, 1.0)
    assert all_reduce_sum(ALONE, [0.1, 2.0]) == [0.1, 2.0]
    print_on_rank_zero(ALONE, "hello")
    print_on_rank_zero(World(1, 2, 1, torch.device("cpu")), "not this")
    assert capsys.readouterr().out == "hello\n"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# deepspeed's launcher imports DeepSpeed in three processes one after another: half a minute for a convenience.
@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("deepspeed", marks=pytest.mark.slow)])
def test_a_launcher_trains_three_steps_without_a_compiler(tmp_path: Path, launcher: str) -> None:
    command = [sys.executable, *LAUNCHERS[launcher]]
    if launcher == "deepspeed":
        command += ["--master_port", str(_free_port())]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        environment.pop(name, None)
    (tmp_path / "bin").mkdir()
    environment |= {
        "PATH": str(tmp_path / "bin"),  # no g++, ninja, nvcc or numactl here
        "CXX": str(tmp_path / "bin" / "c++"),
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [*command, str(WORKER), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    results = [tmp_path / f"rank-{rank}.json" for rank in range(2)]
    # Judged by the files: gloo's threads may abort a process that has done all its work (seen 2 times in 120).
    assert all(path.exists() for path in results), done.stdout[-3000:] + done.stderr[-3000:]
    found = [json.loads(path.read_text()) for path in results]
    assert [(result["rank"], result["size"], result["local_rank"]) for result in found] == [
        (rank, 2, rank) for rank in range(2)
    ]
    assert all(result["losses"] == found[0]["losses"] for result in found)
    assert found[0]["losses"][0] > found[0]["losses"][2]
    assert not (tmp_path / "extensions").exists()


def test_two_tasks_of_srun_meet_and_train(tmp_path: Path) -> None:
    """As srun starts them: no launcher between, everything from the variables it sets."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        clean.pop(name, None)
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(_free_port() % 15000)}
    tasks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path)],
            env=clean | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "OMP_NUM_THREADS": "1",
                                "PYTHONPATH": str(REPOSITORY)},
        )
        for rank in range(2)
    ]  # fmt: skip
    for task in tasks:
        task.wait(timeout=300)
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert [(result["rank"], result["size"]) for result in found] == [(0, 2), (1, 2)]
    assert found[0]["losses"] == found[1]["losses"]
