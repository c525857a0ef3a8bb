"""Benchmark of training steps on clips: engines, ZeRO stages and torch.compile, against torchvision's Video Swin.

Each setup runs in fresh processes, one setup after the other, with the engine and the optimizer that `train` uses. The
input is random clips that stay on the device: reading clips is measured by `bench loader`.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from video_swinv2.bench.measuring import (
    matmul_flops_per_second,
    peak_bytes,
    reset_peak_bytes,
    table_text,
    wall_seconds,
)
from video_swinv2.bench.peers import build_torchvision, torchvision_peer
from video_swinv2.config import EngineConfig
from video_swinv2.distributed.devices import product_dtype
from video_swinv2.distributed.world import World, join_world, leave_world
from video_swinv2.engine.base import StepSettings
from video_swinv2.engine.factory import make_engine
from video_swinv2.engine.optimizer import parameter_groups
from video_swinv2.errors import UsageError
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.variants import create_model
from video_swinv2.training.flops import count_forward_flops

WARM_UP_STEPS = 2  # not timed: the first one allocates Adam's moments, and both may compile
CLASSES = 400  # as Kinetics-400, and as torchvision's default


@dataclass(frozen=True)
class Workload:
    """What every setup trains on."""

    model: str
    frames: int
    pixels: int
    """Side of the square frames."""
    window: tuple[int, ...]
    """Of our model, (T, H, W) in tokens; torchvision's is always its own."""
    clips: int
    """Clips per process and step."""
    processes: int
    device: str
    precision: Literal["bf16", "fp32"]
    rounds: int
    """Timed steps."""
    threads: int
    checkpoint_blocks: int = 0
    """Blocks of our model that recompute their activations."""


@dataclass(frozen=True)
class TrainingSetup:
    """One way to train: which model, which engine, compiled or not."""

    name: str
    peer: bool = False
    """True for torchvision's model."""
    zero_stage: int | None = None
    """None for the plain engine, which supports one process only."""
    compiled: bool = False


def training_setups(processes: int) -> tuple[TrainingSetup, ...]:
    """All setups to compare. The plain engine is among them only with one process."""
    plain = (TrainingSetup("plain"), TrainingSetup("plain, compiled", compiled=True)) if processes == 1 else ()
    zero = tuple(TrainingSetup(f"ZeRO-{stage}", zero_stage=stage) for stage in (0, 1, 2, 3))
    compiled = TrainingSetup("ZeRO-1, compiled", zero_stage=1, compiled=True)
    # The peer is trained by the plain engine, or with several processes by ZeRO-1.
    stage = None if processes == 1 else 1
    # Setups run one after the other and cannot take turns, as each needs its own processes. So the peer is measured
    # first and last, and a difference between the two shows how much the machine drifted.
    first, last = (TrainingSetup(name, peer=True, zero_stage=stage) for name in ("torchvision", "torchvision again"))
    return (first, *plain, *zero, compiled, last)


def bench_train(work: Workload, setups: Sequence[TrainingSetup] | None = None) -> dict[str, Any]:
    """Clips per second, seconds per step, peak memory and TFLOP/s of each setup, or why it did not run; plain JSON.

    FLOPs are those of the model's matrix products, three times those of the forward pass. Recomputation by activation
    checkpointing is not counted. Raises UsageError for a size that torchvision does not have, and if there are fewer
    GPUs than processes.
    """
    peer_name = torchvision_peer(work.model)
    if work.device == "cuda" and torch.cuda.device_count() < work.processes:
        raise UsageError(
            f"--processes {work.processes}: only {torch.cuda.device_count()} GPUs are visible; start fewer processes"
        )
    torch.set_num_threads(work.threads)
    device = torch.device(work.device)
    # The rate of a large matrix product is the limit of this device; a step's share of it shows how well it is used.
    speed = matmul_flops_per_second(device, lambda: wall_seconds(device), product_dtype(work.precision, device))
    # By `setup.peer`: False for our model, True for torchvision's.
    flops = {peer: 3 * forward_flops(work, peer) for peer in (False, True)}
    chosen = training_setups(work.processes) if setups is None else setups
    rows = [_row(work, setup, flops[setup.peer], speed) for setup in chosen]
    return {
        "work": asdict(work),
        "peer": f"torchvision {peer_name}",
        "torch": torch.__version__,
        "device_name": torch.cuda.get_device_name() if work.device == "cuda" else "CPU",
        "product_tflops": speed / 1e12,
        "rows": rows,
    }


def _row(work: Workload, setup: TrainingSetup, flops_per_clip: int, speed: float) -> dict[str, Any]:
    """The figures of one setup. `speed` is that of a large matrix product, in FLOP/s per device."""
    row: dict[str, Any] = {"way": setup.name, "peer": setup.peer, "compiled": setup.compiled}
    measured = run_setup(work, setup)
    if "not_run" in measured:
        return row | measured
    seconds = statistics.median(measured["seconds"])
    flops = flops_per_clip * work.clips / seconds  # FLOP/s of one device
    return row | {
        "step_seconds": seconds,
        "all_seconds": measured["seconds"],
        "clips_per_second": work.clips * work.processes / seconds,
        "peak_bytes": measured["peak_bytes"],
        "tflops": flops / 1e12,
        "share_of_product": flops / speed,
    }


def run_setup(work: Workload, setup: TrainingSetup) -> dict[str, Any]:
    """Run a setup in fresh processes.

    Returns the `seconds` of each step and the largest `peak_bytes` of any process, or `not_run` with the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_train, (work, setup, folder), work.processes)
        except ProcessRaisedException as error:
            return {"not_run": _last_error_line(str(error))}
        except ProcessExitedException as error:
            return {"not_run": f"a process was killed, probably because memory ran out ({error})"}
        # One file per rank. A barrier before each step makes the times of all ranks nearly equal, so rank 0's will do.
        measured = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    return {"seconds": measured[0]["seconds"], "peak_bytes": max(one["peak_bytes"] for one in measured)}


def _last_error_line(trace: str) -> str:
    """The last line of a traceback that is not indented, which names the error; at most 200 characters of it."""
    lines = [line for line in trace.strip().splitlines() if line and not line.startswith(" ")]
    return lines[-1][:200] if lines else "failed without a message"


def _train(rank: int, work: Workload, setup: TrainingSetup, folder: str) -> None:
    """What each process runs: build model and engine, take the steps, write the figures to `folder`/RANK.json."""
    os.environ["LOCAL_RANK"] = str(rank)  # read by join_world, which chooses the GPU by it
    torch.set_num_threads(work.threads)
    # The processes meet through a file in the temporary folder, so no port is needed. join_world uses this group.
    dist.init_process_group(
        "nccl" if work.device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=work.processes,
    )
    try:
        result = measure_steps(work, setup, join_world(work.device))
        (Path(folder) / f"{rank}.json").write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
    finally:
        leave_world()


def measure_steps(work: Workload, setup: TrainingSetup, world: World) -> dict[str, Any]:
    """Train in this process: the `seconds` of each timed step, and the `peak_bytes` beyond what it holds now."""
    # What the process holds before training starts is not memory of training.
    _load_libraries(work, setup, world)
    before = reset_peak_bytes(world.device)
    torch.manual_seed(0)
    # Made on the device, where torch's own start values, which ours replace, cost no time.
    with world.device:
        module = build_model(work, setup.peer).train()
    # `parameter_groups` needs the depths of our model for layer-wise learning rate decay, which is off here.
    groups = _peer_groups(module) if setup.peer else parameter_groups(module, _depths(module), weight_decay=0.05)
    engine = make_engine(
        module, groups, _engine_config(work, setup), _step(work), world, lr=1e-4, betas=(0.9, 0.999), eps=1e-8
    )
    engine.set_lr(1e-4)
    clips, labels = random_batch(work, world)
    seconds = []
    for step in range(WARM_UP_STEPS + work.rounds):
        if world.size > 1:
            dist.barrier()  # all processes start a step together, so that no wait for a late one is timed
        # wall_seconds waits for the device, so the time of a step includes all of its work.
        started = wall_seconds(world.device)
        engine.backward(F.cross_entropy(engine.forward(clips).float(), labels))
        engine.step()
        if step >= WARM_UP_STEPS:
            seconds.append(wall_seconds(world.device) - started)
    return {"seconds": seconds, "peak_bytes": peak_bytes(world.device) - before}


def random_batch(work: Workload, world: World) -> tuple[Tensor, Tensor]:
    """Clips (B, 3, T, H, W) and labels (B,) on the device. All setups get the same, each process its own."""
    # Not from the global generator, of which building a model uses up an amount that depends on the model.
    generator = torch.Generator().manual_seed(world.rank)
    clips = torch.randn(work.clips, 3, work.frames, work.pixels, work.pixels, generator=generator)
    labels = torch.randint(CLASSES, (work.clips,), generator=generator)
    return clips.to(world.device), labels.to(world.device)


def _load_libraries(work: Workload, setup: TrainingSetup, world: World) -> None:
    """Take a step with a tiny model, so that what libraries allocate at first use is not counted as training."""
    module = nn.Linear(4, CLASSES)
    engine = make_engine(
        module,
        _peer_groups(module),
        _engine_config(work, setup),
        _step(work),
        world,
        lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    engine.backward(engine.forward(torch.ones(work.clips, 4, device=world.device)).float().square().mean())
    engine.step()


def _engine_config(work: Workload, setup: TrainingSetup) -> EngineConfig:
    return EngineConfig(
        engine="plain" if setup.zero_stage is None else "deepspeed",
        zero_stage=setup.zero_stage or 0,
        precision=work.precision,
        compile=setup.compiled,
    )


def _step(work: Workload) -> StepSettings:
    return StepSettings(micro_batch=work.clips, clip_norm=5.0)


def build_model(work: Workload, peer: bool) -> nn.Module:
    """A freshly initialised classifier of clips: our model, or torchvision's of the same size."""
    if not peer:
        return create_model(
            work.model,
            num_classes=CLASSES,
            frames=work.frames,
            image_size=work.pixels,
            window=work.window,
            drop_path=0.1,  # torchvision's default
            checkpoint_blocks=work.checkpoint_blocks,
        )
    return build_torchvision(work.model)


def _depths(module: nn.Module) -> tuple[int, ...]:
    """The number of blocks in each stage of our model."""
    if not isinstance(module, SwinV2):
        raise TypeError(f"{type(module).__name__} is not our SwinV2, so its depths are unknown")
    return tuple(module.depths)


def _peer_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups for a model whose parameter names we do not know: matrices have weight decay, vectors do not.

    The groups have the keys that `engine.optimizer` expects.
    """
    groups = []
    for decayed in (True, False):
        named = [(name, value) for name, value in module.named_parameters() if (value.ndim > 1) == decayed]
        decay = 0.05 if decayed else 0.0
        groups.append(
            {
                "name": "decay" if decayed else "no_decay",
                "params": [value for _, value in named],
                "parameter_names": [name for name, _ in named],
                "lr_scale": 1.0,
                "weight_decay": decay,
                "configured_weight_decay": decay,
            }
        )
    return groups


def forward_flops(work: Workload, peer: bool) -> int:
    """FLOPs of one clip's forward pass, counted on the meta device; a multiply-accumulate counts as two."""
    with torch.device("meta"):
        module = build_model(work, peer).eval()
    return count_forward_flops(module, torch.empty(1, 3, work.frames, work.pixels, work.pixels, device="meta"))


def training_table(result: dict[str, Any]) -> str:
    """The result of `bench_train` as text."""
    work = result["work"]
    size = f"{work['frames']}x{work['pixels']}x{work['pixels']}"
    heading = (
        f"{work['model']} and {result['peer']}: {work['clips']} clips of {size} per process, {work['processes']} "
        f"process(es) on {result['device_name']}, {work['precision']}, torch {result['torch']}; a large matrix product "
        f"reaches {result['product_tflops']:.3g} TFLOP/s"
    )
    # Setups that did not run get an empty row, and the reason below the table.
    rows, notes = [], []
    for row in result["rows"]:
        name = row["way"].replace("torchvision", result["peer"])
        if "not_run" in row:
            rows.append([name, "not run", "", "", "", ""])
            notes.append(f"{name}: not run: {row['not_run']}")
            continue
        figures = [f"{row['clips_per_second']:.3g}", f"{row['step_seconds']:.3g}", f"{row['peak_bytes'] / 2**30:.2f}"]
        rows.append([name, *figures, f"{row['tflops']:.3g}", f"{row['share_of_product']:.0%}"])
    columns = ["", "clips/s", "seconds/step", "peak GiB", "TFLOP/s per device", "of a large product"]
    return "\n".join([heading, "", table_text(columns, rows), *(["", *notes] if notes else [])])
