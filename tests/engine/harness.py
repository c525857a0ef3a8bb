"""What the engine tests share: workers run in real processes, their outcomes read back, and states compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.distributed.launching import clean_environment
from tests.engine import engine_worker
from video_swinv2.distributed.world import World
from video_swinv2.engine.checkpoint import TrainingState

SINGLE = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
STAGES = (0, 1, 2, 3)
KINDS = ("weights", "exp_avg", "exp_avg_sq", "ema")


def worker_environment(folder: Path) -> dict[str, str]:
    """Without a launcher's variables and without a compiler."""
    return clean_environment() | {
        "PATH": "",
        "CXX": str(folder / "no" / "compiler"),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }


def run_workers(worker: Path, folder: Path, cases: str, size: int, device: str = "cpu") -> None:
    """Run the cases in ``size`` processes, all of which must succeed; their output is the message of a failure."""
    logs = [folder / f"log-{size}-{rank}.txt" for rank in range(size)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(worker), cases, str(rank), str(size), str(folder), device]
        with log.open("w") as output:
            # On GPUs this is no test of what happens without a compiler.
            environment = worker_environment(folder) if device == "cpu" else clean_environment()
            processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
    try:
        codes = [process.wait(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * size, "\n".join(log.read_text()[-3000:] for log in logs)


def read_outcome(folder: Path, name: str) -> tuple[TrainingState, list[dict[str, Any]]]:
    """The final state and the records per step that a worker wrote with `keep`."""
    tensors = load_file(folder / f"{name}.safetensors")
    note = json.loads((folder / f"{name}.json").read_text())
    kinds = [
        {key.removeprefix(f"{kind}/"): value for key, value in tensors.items() if key.startswith(f"{kind}/")}
        for kind in KINDS
    ]
    scale = tuple(note["loss_scale"]) if note["loss_scale"] else None
    return TrainingState(*kinds[:3], optimizer_step=note["steps"], ema=kinds[3], loss_scale=scale), note["records"]


def train_plain(
    accumulation: int = 1, steps: int = 4, precision: str = "fp32", world: World = SINGLE, **settings: Any
) -> tuple[TrainingState, list[dict[str, Any]]]:
    """The reference: the plain engine on the whole batch, in this process."""
    engine = engine_worker.build(world, engine="plain", precision=precision, accumulation=accumulation, **settings)
    records = engine_worker.train(engine, world, accumulation, 0, steps)
    state = engine.training_state()
    assert state is not None
    return state, records


def largest_difference(first: TrainingState, second: TrainingState) -> float:
    """The largest difference of any element, relative to the largest element of its tensor."""
    worst = 0.0
    for kind in KINDS:
        ours, theirs = getattr(first, kind), getattr(second, kind)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].shape == theirs[name].shape
            scale = theirs[name].abs().max().clamp(min=1e-3)
            worst = max(worst, float((ours[name] - theirs[name]).abs().max() / scale))
    return worst


def identical(first: TrainingState, second: TrainingState) -> bool:
    """Whether two states are equal bit for bit."""
    same = (first.optimizer_step, first.loss_scale) == (second.optimizer_step, second.loss_scale)
    for kind in KINDS:
        ours, theirs = getattr(first, kind), getattr(second, kind)
        same = same and ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    return same
