"""A training of three steps for the tests of launchers: writes its rank, world size and losses to a folder.

Run by torchrun or deepspeed as ``launch_worker.py FOLDER``; deepspeed adds ``--local_rank``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from video_swinv2.config import EngineConfig
from video_swinv2.distributed.collectives import all_reduce_sum
from video_swinv2.distributed.world import join_world, leave_world
from video_swinv2.engine.base import StepSettings, seed_step
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups


def main() -> None:
    """Train and write the losses."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--local_rank", type=int)
    folder = parser.parse_args().folder
    torch.manual_seed(0)
    module = nn.Linear(4, 1)
    world = join_world("cpu")
    try:
        groups = parameter_groups(module, (1,), weight_decay=0.0)
        step_settings = StepSettings(micro_batch=8)
        engine = make_engine(module, groups, EngineConfig(), step_settings, world, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
        losses = []
        for step in range(3):
            seed_step(0, step, 0, world.rank)
            loss = (engine.forward(torch.randn(8, 4)).float() - 1.0).square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(all_reduce_sum(world, [loss.item()])[0] / world.size)
        result = {"rank": world.rank, "size": world.size, "local_rank": world.local_rank, "losses": losses}
        (folder / f"rank-{world.rank}.json").write_text(json.dumps(result))
    finally:
        leave_world()


if __name__ == "__main__":
    main()
