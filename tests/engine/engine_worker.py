"""One process of an engine test: trains a tiny network with SwinV2's parameter names and records what happened.

Run as ``python engine_worker.py CASES RANK SIZE FOLDER DEVICE``; the processes meet at a file in FOLDER.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.closeness import assert_close
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.collectives import all_reduce_max, all_reduce_sum
from video_swinv2.distributed.world import World, join_world, leave_world
from video_swinv2.engine.base import Engine, StepSettings
from video_swinv2.engine.checkpoint import Checkpoints, TrainingState
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups

DEPTHS = (1, 2)
BATCH = 8
LR = 0.02


class Attention(nn.Module):
    """Parameters as SwinV2's attention names them, with sizes that two ranks cannot divide evenly."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full((1, 1, 1), 0.5))
        self.cpb_mlp = nn.Sequential(nn.Linear(dim, 3), nn.ReLU(), nn.Linear(3, dim, bias=False))
        self.qkv = nn.Linear(dim, dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        return torch.tanh(self.qkv(x) * self.logit_scale.flatten() + self.q_bias) + self.cpb_mlp(x)


class Block(nn.Module):
    """A residual block whose attention is used twice in every forward pass."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = Attention(dim)
        self.norm1 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        return x + self.norm1(self.attn(self.attn(x)))


class Stage(nn.Module):
    """Blocks under activation checkpointing, then a linear in place of patch merging."""

    def __init__(self, dim: int, depth: int, merging: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.downsample = nn.ModuleDict({"reduction": nn.Linear(dim, dim + 2, bias=False)}) if merging else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) -> (B, C or C + 2)."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x if self.downsample is None else self.downsample["reduction"](x)


class Tiny(nn.Module):
    """Two stages, a frozen norm and a buffer: (B, 6) -> (B, 3)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch_embed = nn.ModuleDict({"proj": nn.Linear(6, 5), "norm": nn.LayerNorm(5)})
        self.patch_embed["norm"].requires_grad_(False)
        self.layers = nn.ModuleList([Stage(5, DEPTHS[0], merging=True), Stage(7, DEPTHS[1], merging=False)])
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)
        self.register_buffer("shift", torch.rand(5))
        with torch.no_grad():
            self.patch_embed["norm"].weight.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.patch_embed["norm"](self.patch_embed["proj"](x)) + self.shift
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def batch(step: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The whole batch of a step, the same for every process and accumulation."""
    generator = torch.Generator().manual_seed(1000 + step)
    images, labels = torch.randn(BATCH, 6, generator=generator), torch.randint(0, 3, (BATCH,), generator=generator)
    return images.to(device), labels.to(device)


def build(
    world: World,
    *,
    seed: int = 0,
    clip_norm: float | None = 0.3,
    accumulation: int = 1,
    ema: float = 0.0,
    **keys: Any,
) -> Engine:
    """An engine over a fresh network, with layer decay, weight decay and an effective clipping norm.

    ``keys`` are those of the `engine` section.
    """
    module = Tiny(seed)
    groups = parameter_groups(module, DEPTHS, weight_decay=0.1, layer_decay=0.75)
    step = StepSettings(clip_norm=clip_norm, accumulation=accumulation, ema=ema)
    return make_engine(module, groups, EngineConfig(**keys), step, world, lr=LR, betas=(0.9, 0.95), eps=1e-6)


Spoil = Callable[[int, int, Tensor], Tensor]


def train(
    engine: Engine, world: World, accumulation: int, first: int, last: int, spoil: Spoil | None = None
) -> list[dict[str, Any]]:
    """Steps ``first`` to ``last``; ``spoil`` may change a micro-batch's loss. One record per step."""
    records = []
    for step in range(first, last):
        engine.set_lr(LR * (1.0 - step / 10))
        images, labels = batch(step, world.device)
        parts = range(world.rank, world.size * accumulation, world.size)
        losses, outcome = 0.0, None
        for micro, part in enumerate(parts):
            mine = slice(part * BATCH // len(parts) // world.size, (part + 1) * BATCH // len(parts) // world.size)
            loss = nn.functional.cross_entropy(engine.forward(images[mine]).float(), labels[mine])
            losses += loss.item() / accumulation / world.size
            engine.backward(loss if spoil is None else spoil(step, micro, loss))
            outcome = engine.step()
            if (outcome is None) != (micro + 1 < accumulation):
                raise RuntimeError(f"outcome {outcome} at micro-batch {micro} of {accumulation}")
        (mean,) = all_reduce_sum(world, [losses])
        records.append({"loss": mean, "norm": outcome.grad_norm, "applied": outcome.applied})
        records[-1]["rescaled"] = outcome.rescaled
    return records


def keep(folder: Path, name: str, state: TrainingState | None, records: list[dict[str, Any]]) -> None:
    """Write a case's outcome for `harness.read_outcome`; only rank 0 has the tensors."""
    if state is not None:
        kinds = ("weights", "exp_avg", "exp_avg_sq", "ema")
        tensors = {f"{kind}/{key}": value for kind in kinds for key, value in getattr(state, kind).items()}
        save_file(tensors, folder / f"{name}.safetensors")
        note = {"steps": state.optimizer_step, "records": records, "loss_scale": state.loss_scale}
        (folder / f"{name}.json").write_text(json.dumps(note))


def through_checkpoint(engine: Engine, folder: Path) -> TrainingState:
    """The engine's state after it has been written to disk by rank 0 and read back by every rank. Collective."""
    checkpoints = Checkpoints(folder)
    state = engine.training_state()
    if state is not None:
        checkpoints.save(state, {}, step=2)
        checkpoints.wait()
    dist.barrier()
    return checkpoints.read(2)[0]


def parity(world: World, folder: Path) -> None:
    """Four steps of every stage and accumulation."""
    for stage in range(4):
        for accumulation in (1, 2):
            engine = build(world, zero_stage=stage, precision="fp32", accumulation=accumulation)
            records = train(engine, world, accumulation, 0, 4)
            weights = engine.weights()
            if (weights is None) != (world.rank != 0):
                raise RuntimeError("weights() belong to rank 0")
            keep(folder, f"parity-{stage}-{accumulation}", engine.training_state(), records)


def resume(world: World, folder: Path) -> None:
    """Two steps, a checkpoint on disk, then two more from it: by the same stage and by ZeRO-1 after ZeRO-3."""
    for stage, after in ((0, 0), (1, 1), (2, 2), (3, 3), (3, 1), (1, 3)):
        engine = build(world, zero_stage=stage, precision="fp32")
        train(engine, world, 1, 0, 2)
        state = through_checkpoint(engine, folder / f"checkpoints-{stage}-{after}")
        other = build(world, seed=7, zero_stage=after, precision="fp32")
        other.load(state)
        records = train(other, world, 1, 2, 4)
        keep(folder, f"resume-{stage}-{after}", other.training_state(), records)


def first_states(world: World, folder: Path) -> None:
    """States before the first step, and a load into an engine that has already stepped."""
    for stage in range(4):
        engine = build(world, zero_stage=stage, precision="fp32")
        keep(folder, f"first-{stage}", engine.training_state(), [])
        state = through_checkpoint(engine, folder / f"first-{stage}")
        train(engine, world, 1, 0, 1)
        engine.load(state)
        keep(folder, f"rewound-{stage}", engine.training_state(), [])


def spoilt(world: World, folder: Path) -> None:
    """Four steps, the second with a non-finite loss or gradient on the last rank only."""

    def nan_loss(step: int, micro: int, loss: Tensor) -> Tensor:
        return loss * math.nan if (step, micro, world.rank) == (1, 0, world.size - 1) else loss

    def infinite_loss(step: int, micro: int, loss: Tensor) -> Tensor:
        return loss + math.inf if (step, micro, world.rank) == (1, 0, world.size - 1) else loss

    def nan_gradient(step: int, micro: int, loss: Tensor) -> Tensor:
        if (step, micro, world.rank) == (1, 0, world.size - 1):
            loss.register_hook(lambda gradient: gradient * math.nan)
        return loss

    kinds = (("loss", nan_loss, (1, 2)), ("infinite", infinite_loss, (2,)), ("gradient", nan_gradient, (2,)))
    for name, spoil, accumulations in kinds:
        for stage in range(4):
            for accumulation in accumulations:
                engine = build(world, zero_stage=stage, precision="fp32", accumulation=accumulation)
                before = train(engine, world, accumulation, 0, 1, spoil)
                keep(folder, f"before-{name}-{stage}-{accumulation}", engine.training_state(), before)
                during = train(engine, world, accumulation, 1, 2, spoil)
                keep(folder, f"during-{name}-{stage}-{accumulation}", engine.training_state(), during)
                after = train(engine, world, accumulation, 2, 4, spoil)
                keep(folder, f"after-{name}-{stage}-{accumulation}", engine.training_state(), after)
                # Every rank must hold the same weights: compare this rank's own logits with all others'.
                logits = engine.forward(batch(9, world.device)[0]).detach().flatten().tolist()
                highest = all_reduce_max(world, *logits)
                lowest = all_reduce_max(world, *[-value for value in logits])
                if list(highest) != [-value for value in lowest]:
                    raise RuntimeError("ranks differ after a step that was not applied")


def alone(world: World, folder: Path) -> None:
    """One process resumes from what two processes saved."""
    if world.size != 1:
        raise RuntimeError("this case is for one process")
    for stage, after in ((0, 1), (1, 1), (2, 2), (3, 3), (3, 1)):
        state, _ = Checkpoints(folder / f"checkpoints-{stage}-{stage}").read(2)
        engine = build(world, seed=7, zero_stage=after, precision="fp32")
        engine.load(state)
        records = train(engine, world, 1, 2, 4)
        keep(folder, f"alone-{stage}-{after}", engine.training_state(), records)


def halves(world: World, folder: Path) -> None:
    """bf16 autocast at every stage, with unclipped gradients; no step before the first (DeepSpeed's bf16 takes one)."""
    for stage in range(4):
        for accumulation in (1, 2):
            engine = build(world, zero_stage=stage, precision="bf16", accumulation=accumulation, clip_norm=None)
            fresh, built = Tiny(0).state_dict(), engine.training_state()
            if built is not None and (
                built.optimizer_step or not all(torch.equal(built.weights[name], fresh[name]) for name in fresh)
            ):
                raise RuntimeError("a step was taken at construction")
            with torch.no_grad():
                if engine.forward(batch(0, world.device)[0]).dtype != torch.bfloat16:
                    raise RuntimeError("forward was not in autocast")
            records = train(engine, world, accumulation, 0, 4)
            keep(folder, f"bf16-{stage}-{accumulation}", engine.training_state(), records)


def averaged(world: World, folder: Path) -> None:
    """Two steps with averaged weights, a checkpoint, a validation of the averages, and two more steps from each."""
    for stage in range(4):
        engine = build(world, zero_stage=stage, precision="fp32", ema=0.6)
        train(engine, world, 1, 0, 2)
        state = through_checkpoint(engine, folder / f"averaged-{stage}")
        trained, average = engine.weights(), engine.averaged_weights()
        engine.write_weights(average)
        with torch.no_grad():
            logits = engine.forward(batch(9, world.device)[0])
        shown = engine.weights()
        engine.write_weights(trained)
        if shown is not None and average is not None:
            if not all(torch.equal(shown[name], average[name]) for name in average):
                raise RuntimeError("the module does not hold the averages")
            # Not to the bit: DeepSpeed keeps weights at other addresses, and sums may be in another order there.
            expected = functional_call(Tiny(0), average, (batch(9)[0],))
            assert_close(logits.cpu(), expected, name="with averaged weights")
        keep(
            folder, f"straight-averaged-{stage}", engine.training_state() if train(engine, world, 1, 2, 4) else None, []
        )
        other = build(world, seed=7, zero_stage=stage, precision="fp32", ema=0.6)
        other.load(state)
        train(other, world, 1, 2, 4)
        keep(folder, f"resumed-averaged-{stage}", other.training_state(), [])


Case = Callable[[World, Path], None]

CASES: dict[str, Case] = {
    "parity": parity,
    "resume": resume,
    "first": first_states,
    "spoilt": spoilt,
    "bf16": halves,
    "alone": alone,
    "averaged": averaged,
}


def run_cases(cases: Mapping[str, Case]) -> None:
    """Run the cases named on the command line; a single process gets its process group from `join_world`."""
    names, rank, size, folder, device = sys.argv[1:]
    torch.set_num_threads(1)
    if int(size) > 1:
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=int(rank), world_size=int(size))
    world = join_world(device)
    try:
        for name in names.split(","):
            cases[name](world, Path(folder))
    finally:
        leave_world()


if __name__ == "__main__":
    run_cases(CASES)
