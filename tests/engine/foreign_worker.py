"""A run of plain DeepSpeed: it trains and saves, and its own tools convert what it saved.

Run as ``python foreign_worker.py FOLDER``; one process, ZeRO-2 with a frozen parameter, then ZeRO-3 without.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from tests.engine.engine_worker import BATCH, DEPTHS, LR, Tiny, batch, keep
from video_swinv2.distributed.world import World, join_world, leave_world
from video_swinv2.engine.checkpoint import TrainingState
from video_swinv2.engine.deepspeed import import_deepspeed
from video_swinv2.engine.optimizer import parameter_groups


def foreign(folder: Path, stage: int, world: World) -> None:
    """Two steps, a checkpoint, and two more steps, whose weights a resumed run must reach."""
    deepspeed = import_deepspeed(world)
    module = Tiny(0)
    if stage == 3:
        module.patch_embed["norm"].requires_grad_(True)  # DeepSpeed's universal form loses frozen ones at ZeRO-3
    groups = parameter_groups(module, DEPTHS, weight_decay=0.1, layer_decay=0.75)
    for group in groups:
        group["lr"] = LR * group["lr_scale"]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=config)
    for step in range(4):
        if step == 2:
            engine.save_checkpoint(str(folder / f"zero-{stage}"))
        images, labels = batch(step)
        engine.backward(nn.functional.cross_entropy(engine(images), labels))
        engine.step()
    weights = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=stage == 3 and isinstance(tensor, nn.Parameter)):
            weights[name] = tensor.detach().clone()
    keep(folder, f"expected-{stage}", TrainingState(weights, {}, {}, 4), [])
    convert(folder / f"zero-{stage}")


def convert(folder: Path) -> None:
    """Convert the checkpoint with both of DeepSpeed's tools."""
    from deepspeed.checkpoint import ds_to_universal
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

    arguments = argparse.Namespace(
        input_folder=str(folder / "global_step2"), output_folder=str(folder / "global_step2_universal"),
        num_extract_workers=1, num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    ds_to_universal.main(arguments)
    convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(folder / "fp32"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = join_world("cpu")
    try:
        for each in (2, 3):
            foreign(Path(sys.argv[1]), each, here)
    finally:
        leave_world()
