"""Speed and memory of training steps on clips: engines, ZeRO stages, torch.compile, next to torchvision's Video Swin.

Each way to train runs in processes of its own, one after another, on the same made-up clips, with the engine and the
optimizer that `train` uses. What reading clips costs is `bench loader`.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

from video_swinv2.bench.measuring import product_speed, read_peak, start_peak, wall
from video_swinv2.bench.model import PEERS
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

WARM_UP = 2  # steps before the clock runs: moments are made in the first, programs compiled in both
CLASSES = 400


@dataclass(frozen=True)
class Workload:
    """What every way to train is given."""

    model: str
    frames: int
    pixels: int
    window: tuple[int, ...]
    clips: int
    """Per process and step."""
    processes: int
    device: str
    precision: str
    rounds: int
    threads: int
    checkpoint_blocks: int = 0


@dataclass(frozen=True)
class Way:
    """One way to train: whose model, which engine, compiled or not."""

    name: str
    peer: bool = False
    zero_stage: int | None = None
    """None: the plain engine, which knows one process only."""
    compiled: bool = False


def ways(processes: int) -> tuple[Way, ...]:
    """All there is to compare; the plain engine where there is one process."""
    plain = (Way("plain"), Way("plain, compiled", compiled=True)) if processes == 1 else ()
    zero = tuple(Way(f"ZeRO-{stage}", zero_stage=stage) for stage in (0, 1, 2, 3))
    compiled = Way("ZeRO-1, compiled", zero_stage=1, compiled=True)
    stage = None if processes == 1 else 1
    # The peer is measured first and last: what drifts on the machine in between shows.
    peers = (Way("torchvision", peer=True, zero_stage=stage), Way("torchvision again", peer=True, zero_stage=stage))
    return (peers[0], *plain, *zero, compiled, peers[1])


def bench_train(work: Workload, chosen: Sequence[Way] | None = None) -> dict[str, Any]:
    """Clips per second, seconds of a step, peak memory and TFLOP/s of each way, or why it could not be run.

    Operations are those of the model's products, forward times three; what is computed again for memory is not counted.
    UsageError for a size that torchvision lacks.
    """
    if work.model not in PEERS:
        raise UsageError(f"--model {work.model}: torchvision has no such size; there are {', '.join(PEERS)}")
    if work.device == "cuda" and torch.cuda.device_count() < work.processes:
        raise UsageError(f"--processes {work.processes}: this machine shows {torch.cuda.device_count()} GPUs")
    torch.set_num_threads(work.threads)
    device = torch.device(work.device)
    speed = product_speed(device, lambda: wall(device), product_dtype(work.precision, device))
    flops = {peer: 3 * _forward_flops(work, peer) for peer in (False, True)}
    rows = [_row(work, way, flops[way.peer], speed) for way in (ways(work.processes) if chosen is None else chosen)]
    return {
        "work": asdict(work),
        "peer": f"torchvision {PEERS[work.model]}",
        "torch": torch.__version__,
        "device_name": torch.cuda.get_device_name() if work.device == "cuda" else "CPU",
        "product_tflops": speed / 1e12,
        "rows": rows,
    }


def _row(work: Workload, way: Way, flops_per_clip: int, speed: float) -> dict[str, Any]:
    row: dict[str, Any] = {"way": way.name, "peer": way.peer, "compiled": way.compiled}
    measured = run_way(work, way)
    if "not_run" in measured:
        return row | measured
    seconds = statistics.median(measured["seconds"])
    flops = flops_per_clip * work.clips / seconds
    return row | {
        "step_seconds": seconds,
        "all_seconds": measured["seconds"],
        "clips_per_second": work.clips * work.processes / seconds,
        "peak_bytes": measured["peak_bytes"],
        "tflops": flops / 1e12,
        "share_of_product": flops / speed,
    }


def run_way(work: Workload, way: Way) -> dict[str, Any]:
    """`seconds` of each step and `peak_bytes`, the most of any process, measured in fresh processes; or `not_run`."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            spawn(_train, (work, way, folder), work.processes)
        except ProcessRaisedException as error:
            return {"not_run": _last_words(str(error))}
        except ProcessExitedException as error:
            return {"not_run": f"a process was killed, as the system does where memory is short ({error})"}
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))]
    return {"seconds": parts[0]["seconds"], "peak_bytes": max(part["peak_bytes"] for part in parts)}


def _last_words(trace: str) -> str:
    """What a traceback ends with, in one line of reasonable length."""
    lines = [line for line in trace.strip().splitlines() if line and not line.startswith(" ")]
    return lines[-1][:200] if lines else "failed without a word"


def _train(rank: int, work: Workload, way: Way, folder: str) -> None:
    """A process: builds model and engine, takes the steps, writes down what it measured."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(work.threads)
    dist.init_process_group(
        "nccl" if work.device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=work.processes,
    )
    try:
        result = _measure(work, way, join_world(work.device))
        (Path(folder) / f"{rank}.json").write_text(json.dumps(result), encoding="utf-8")
    finally:
        leave_world()


def _measure(work: Workload, way: Way, world: World) -> dict[str, Any]:
    _load_libraries(work, way, world)
    before = start_peak(world.device)
    torch.manual_seed(0)
    module = build(work, way.peer).train()
    groups = _peer_groups(module) if way.peer else parameter_groups(module, _depths(module), weight_decay=0.05)
    engine = make_engine(
        module, groups, _engine_config(work, way), _step(work), world, lr=1e-4, betas=(0.9, 0.999), eps=1e-8
    )
    engine.set_lr(1e-4)
    clips = torch.randn(work.clips, 3, work.frames, work.pixels, work.pixels, device=world.device)
    labels = torch.randint(CLASSES, (work.clips,), device=world.device)
    seconds = []
    for step in range(WARM_UP + work.rounds):
        if world.size > 1:
            dist.barrier()
        started = wall(world.device)
        engine.backward(F.cross_entropy(engine.forward(clips).float(), labels))
        engine.step()
        if step >= WARM_UP:
            seconds.append(wall(world.device) - started)
    return {"seconds": seconds, "peak_bytes": read_peak(world.device) - before}


def _load_libraries(work: Workload, way: Way, world: World) -> None:
    """Take a step with next to nothing: what libraries load at their first use is no part of what training takes."""
    module = nn.Linear(4, CLASSES)
    engine = make_engine(
        module,
        _peer_groups(module),
        _engine_config(work, way),
        _step(work),
        world,
        lr=0.0,
        betas=(0.9, 0.999),
        eps=1e-8,
    )
    engine.backward(engine.forward(torch.ones(work.clips, 4, device=world.device)).float().square().mean())
    engine.step()


def _engine_config(work: Workload, way: Way) -> EngineConfig:
    return EngineConfig(
        engine="plain" if way.zero_stage is None else "deepspeed",
        zero_stage=way.zero_stage or 0,
        precision=work.precision,
        compile=way.compiled,
    )


def _step(work: Workload) -> StepSettings:
    return StepSettings(micro_batch=work.clips, clip_norm=5.0)


def build(work: Workload, peer: bool) -> nn.Module:
    """A fresh classifier of clips: ours, or torchvision's of the same size."""
    if not peer:
        return create_model(
            work.model,
            num_classes=CLASSES,
            frames=work.frames,
            image_size=work.pixels,
            window=work.window,
            drop_path=0.1,  # as torchvision has it
            checkpoint_blocks=work.checkpoint_blocks,
        )
    from torchvision.models import video

    model: nn.Module = getattr(video, PEERS[work.model])(weights=None)
    return model


def _depths(module: nn.Module) -> tuple[int, ...]:
    if not isinstance(module, SwinV2):
        raise TypeError("only our own model tells its depths")
    return tuple(module.depths)


def _peer_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Optimizer groups of a model whose layers we do not know by name: matrices decay, the rest does not."""
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


def _forward_flops(work: Workload, peer: bool) -> int:
    """Operations of one clip's forward pass, two for each multiplication and addition."""
    with torch.device("meta"):
        module = build(work, peer).eval()
    return count_forward_flops(module, torch.empty(1, 3, work.frames, work.pixels, work.pixels, device="meta"))


def show_train(result: dict[str, Any]) -> str:
    """The result of `bench_train` for people, as a Markdown table."""
    work = result["work"]
    size = f"{work['frames']}x{work['pixels']}x{work['pixels']}"
    lines = [
        f"{work['model']} and {result['peer']}: {work['clips']} clips of {size} a process, {work['processes']} "
        f"process(es) on {result['device_name']}, {work['precision']}, torch {result['torch']}; a large product: "
        f"{result['product_tflops']:.3g} TFLOP/s",
        "",
        "| | clips/s | seconds a step | peak GiB | TFLOP/s a device | of a large product |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        name = row["way"].replace("torchvision", result["peer"])
        if "not_run" in row:
            lines.append(f"| {name} | not run: {row['not_run']} | | | | |")
            continue
        lines.append(
            f"| {name} | {row['clips_per_second']:.3g} | {row['step_seconds']:.3g} | {row['peak_bytes'] / 2**30:.2f} | "
            f"{row['tflops']:.3g} | {row['share_of_product']:.0%} |"
        )
    return "\n".join(lines)
