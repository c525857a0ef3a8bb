"""What tests of processes share: how launchers are started, a clean environment for them, and what a log says."""

from __future__ import annotations

import os
from pathlib import Path

from tests.conftest import REPOSITORY

# Arguments of Python that start two processes; the last one is the number of processes.
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "deepspeed": ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2"],
}


def clean_environment() -> dict[str, str]:
    """This process's environment without the variables of torchrun, deepspeed and SLURM, and with one thread."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        clean.pop(name, None)
    return clean | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def errors_in(log: Path) -> list[str]:
    """The lines of a log in which our processes say why they end."""
    return [line for line in log.read_text().splitlines() if line.startswith("error:")]
