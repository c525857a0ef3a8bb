"""The measurements of `python -m tests.gpu`: each prints nothing and appends a line of JSON per figure.

    python -m tests.gpu.benchmarks NAME cpu|cuda ROWS

NAME is a key of BENCHMARKS. On a CPU every size is small and the figures mean nothing: that shows the code works.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import video_swinv2 as vs
from video_swinv2.bench.layer import layer_cases, measure_layer
from video_swinv2.bench.measuring import (
    elapsed,
    matmul_flops_per_second,
    peak_bytes,
    reset_peak_bytes,
    wall_seconds,
)
from video_swinv2.bench.model import bench_model
from video_swinv2.bench.peers import WINDOW
from video_swinv2.bench.train import TrainingSetup, Workload, bench_train, build_model, forward_flops, measure_steps
from video_swinv2.distributed.devices import product_dtype
from video_swinv2.distributed.world import World
from video_swinv2.engine.factory import compile_blocks

Rows = Iterator[dict[str, Any]]

MAX_STEP_SECONDS = 5.0  # a larger batch than one that takes this long is not tried
OURS, COMPILED = TrainingSetup("ours"), TrainingSetup("ours, compiled", compiled=True)
PEER = TrainingSetup("torchvision", peer=True)


def workload(device: str) -> Workload:
    """swinv2_base at 32x224x224 in bf16, one clip; on a CPU the smallest that torchvision has."""
    if device == "cuda":
        return Workload("swinv2_base", 32, 224, WINDOW, 1, 1, device, "bf16", rounds=5, threads=8)
    return Workload("swinv2_tiny", 2, 32, WINDOW, 1, 1, device, "fp32", rounds=1, threads=1)


def here(device: str) -> World:
    """This process on the first device."""
    return World(
        rank=0, size=1, local_rank=0, device=torch.device("cuda", 0) if device == "cuda" else torch.device(device)
    )


def products(device: str) -> Rows:
    """The rate of a large matrix product, which all shares refer to."""
    where = here(device).device
    for precision in ("bf16", "fp32"):
        dtype = product_dtype(precision, where)
        rate = max(matmul_flops_per_second(where, lambda: wall_seconds(where), dtype) for _ in range(3))
        yield {"precision": precision, "dtype": str(dtype), "tflops": rate / 1e12}


def by_batch(device: str, setup: TrainingSetup, measure: Callable[[Workload], dict[str, Any]]) -> Rows:
    """What `measure` gives (`seconds` per step and `peak_bytes`) at growing batches, until memory runs out."""
    # Each batch is compiled anew, which takes most of a minute.
    batches = (1, 2) if device == "cpu" else (8, 16) if setup.compiled else (1, 4, 8, 16, 32, 64)
    for clips in batches:
        work = dataclasses.replace(workload(device), clips=clips)
        row: dict[str, Any] = {"way": setup.name, "batch": clips, "model": work.model, "frames": work.frames}
        row |= {"pixels": work.pixels, "precision": work.precision}
        try:
            measured = measure(work)
        except torch.cuda.OutOfMemoryError as error:
            yield row | {"not_run": f"out of memory: {str(error).splitlines()[0][:150]}"}
            return
        seconds = statistics.median(measured["seconds"])
        yield row | {
            "step_seconds": seconds,
            "clips_per_second": clips / seconds,
            "peak_bytes": measured["peak_bytes"],
        }
        if device == "cuda" and seconds > MAX_STEP_SECONDS:
            return
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()


def training(device: str, setup: TrainingSetup) -> Rows:
    """Steps of the plain engine (forward, backward, clipping, AdamW) by batch."""
    counted = 3 * forward_flops(workload(device), setup.peer)
    for row in by_batch(device, setup, lambda work: measure_steps(work, setup, here(device))):
        yield row | {"flops_per_clip": counted}


def inference(device: str, setup: TrainingSetup) -> Rows:
    """Forward passes under autocast by batch; the peak includes the weights."""
    where = here(device).device
    with where:
        model = build_model(workload(device), setup.peer).eval()
    if setup.compiled:
        compile_blocks(model, "inductor" if device == "cuda" else "eager")
    counted = forward_flops(workload(device), setup.peer)
    for row in by_batch(device, setup, lambda work: _forward_seconds(model, work, where)):
        yield row | {"flops_per_clip": counted}


def _forward_seconds(model: nn.Module, work: Workload, device: torch.device) -> dict[str, Any]:
    clips = torch.randn(work.clips, 3, work.frames, work.pixels, work.pixels, device=device)
    dtype = product_dtype(work.precision, device)

    def run() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            model(clips)

    for _ in range(2):
        run()
    wall_seconds(device)
    reset_peak_bytes(device)
    seconds = [elapsed(run, lambda: wall_seconds(device)) for _ in range(work.rounds)]
    return {"seconds": seconds, "peak_bytes": peak_bytes(device)}


def backends(device: str) -> Rows:
    """One attention layer by backend, with and without gradients, at both windows; four clips of 16 frames."""
    sizes: list[tuple[int, tuple[int, ...]]] = [(224, (8, 7, 7)), (256, (8, 16, 16))]
    if device == "cpu":
        sizes = [(32, (8, 4, 4))]
    batch = 4 if device == "cuda" else 1
    for case in layer_cases(sizes):
        yield case | {"batch": batch} | measure_layer(case, "swinv2_base", 5, 1, device, batch)
        if device == "cuda":
            torch.cuda.empty_cache()


def engines(device: str) -> Rows:
    """The base model under each ZeRO stage, each in fresh processes: on all GPUs of this machine."""
    processes = torch.cuda.device_count() if device == "cuda" else 1
    work = dataclasses.replace(workload(device), clips=4 if device == "cuda" else 1, processes=processes)
    ways = [TrainingSetup(f"ZeRO-{stage}", zero_stage=stage) for stage in (1, 3, 0, 2)]
    for way in ways if device == "cuda" else ways[:1]:
        (row,) = bench_train(work, [way])["rows"]
        yield row | {"batch": work.clips, "processes": processes}


def dense(device: str) -> Rows:
    """Training steps (forward, backward, AdamW) of dense models on swinv2_tiny in bf16, at the recipes' sizes."""
    where, gpu = here(device).device, device == "cuda"
    name, window = ("swinv2_tiny", 8) if gpu else ("swinv2_nano", 4)
    height, width = (800, 1333) if gpu else (64, 96)
    side = 512 if gpu else 64
    for kind in ("mask_rcnn", "cascade_mask_rcnn", "upernet"):
        if kind == "upernet":
            model: nn.Module = vs.create_segmenter(name, num_classes=150, image_size=side, window=window)
        else:
            model = vs.create_detector(name, num_classes=80, kind=kind, window=window)
        model = model.to(where)
        optimizer = torch.optim.AdamW(model.parameters())
        for batch in (1, 4, 8) if gpu else (1,):
            inputs: tuple[Any, ...]
            if kind == "upernet":
                classes = torch.randint(0, 150, (batch, side, side), device=where)
                inputs = (torch.rand(batch, 3, side, side, device=where), classes)
            else:
                images = [torch.rand(3, height, width, device=where)] * batch
                inputs = (images, [_objects(height, width, where)] * batch, True)
            row = {"way": kind, "batch": batch, "model": name, "pixels": side if kind == "upernet" else [height, width]}
            try:
                measured = _dense_steps(model, optimizer, inputs, where)
            except torch.cuda.OutOfMemoryError:
                yield row | {"not_run": "out of memory"}
                break
            yield row | measured | {"images_per_second": batch / measured["step_seconds"]}
        del model, optimizer
        gc.collect()


def _objects(height: int, width: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Seven objects, COCO's mean, with masks."""
    corners = torch.rand(7, 2) * torch.tensor([width * 0.6, height * 0.6])
    boxes = torch.cat([corners, corners + torch.rand(7, 2) * torch.tensor([width * 0.3, height * 0.3]) + 8], dim=1)
    masks = torch.zeros(7, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    target = {"boxes": boxes, "labels": torch.randint(1, 81, (7,)), "masks": masks}
    return {key: value.to(device) for key, value in target.items()}


def _dense_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: tuple[Any, ...], device: torch.device
) -> dict[str, Any]:
    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            losses = model(*inputs)
        torch.stack([loss.float() for loss in losses.values()]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    wall_seconds(device)
    reset_peak_bytes(device)
    seconds = [elapsed(step, lambda: wall_seconds(device)) for _ in range(5)]
    return {"step_seconds": statistics.median(seconds), "peak_bytes": peak_bytes(device)}


def races(device: str) -> Rows:
    """`bench model`: ours and torchvision's in turns, in fp32, and where the time goes."""
    sizes = {} if device == "cuda" else {"frames": 2, "pixels": 32}
    yield bench_model("swinv2_tiny", rounds=5 if device == "cuda" else 1, threads=1, device=device, **sizes)


BENCHMARKS: dict[str, Callable[[str], Rows]] = {
    "products": products,
    "training-ours": lambda device: training(device, OURS),
    "training-torchvision": lambda device: training(device, PEER),
    "training-compiled": lambda device: training(device, COMPILED),
    "inference-ours": lambda device: inference(device, OURS),
    "inference-torchvision": lambda device: inference(device, PEER),
    "inference-compiled": lambda device: inference(device, COMPILED),
    "backends": backends,
    "engines": engines,
    "races": races,
    "dense": dense,
}


def main() -> None:
    """Run one benchmark and write each of its rows as it comes."""
    name, device, rows = sys.argv[1:]
    with Path(rows).open("a", encoding="utf-8") as lines:
        for row in BENCHMARKS[name](device):
            lines.write(json.dumps(row) + "\n")
            lines.flush()


if __name__ == "__main__":
    main()
