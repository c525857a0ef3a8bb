"""Launchers: environments of torchrun, deepspeed and srun written by hand, and which processes are launchers."""

from __future__ import annotations

import pytest

from video_swinv2.distributed.launchers import first_host, is_launcher, launch_info_from_environment
from video_swinv2.errors import UsageError


def _launch(environment: dict[str, str]) -> tuple[int, int, int, str | None]:
    launch = launch_info_from_environment(environment)
    return launch.rank, launch.world_size, launch.local_rank, launch.init_method


def test_a_process_started_by_hand_is_a_world_of_size_one() -> None:
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


def test_a_batch_script_without_srun_is_a_single_process_and_torchrun_under_slurm_is_torchrun() -> None:
    script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}
    assert _launch(script) == (0, 1, 0, None)
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert _launch(script | {"SLURM_STEP_NUM_TASKS": "1"} | torchrun) == (1, 2, 1, "env://")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK='x' is not a number"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, "SLURM_LOCALID is not set"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, "SLURM_STEP_NODELIST is empty"),
    ],
)
def test_an_incomplete_environment_is_refused(variables: dict[str, str], message: str) -> None:
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
def test_which_processes_are_launchers(command: str, expected: bool) -> None:
    assert is_launcher(command.split()) is expected
