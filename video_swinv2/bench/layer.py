"""Benchmark of one attention layer: time and peak memory of each attention backend, forward and backward.

Letters: B batch, W windows, N tokens in a window, C channels.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from video_swinv2.bench.measuring import clock_for, elapsed, peak_bytes_of, run_in_fresh_process, table_text
from video_swinv2.bench.peers import FRAMES, variant_of
from video_swinv2.distributed.devices import product_dtype
from video_swinv2.models.attention import BACKENDS, Backend, WindowAttention
from video_swinv2.models.position_bias import window_coordinates
from video_swinv2.models.windows import PerAxis, window_layout, window_partition

# Pixels and window (T, H, W) in tokens: from 392 to 4608 tokens in a window.
LAYER_CASES = ((224, (8, 7, 7)), (256, (8, 16, 16)), (384, (8, 24, 24)))
HEAD_CHANNELS = 32  # in every released SwinV2


def bench_layer(
    name: str,
    *,
    rounds: int,
    threads: int,
    device: str,
    batch: int = 1,
    cases: Sequence[tuple[int, PerAxis]] = LAYER_CASES,
) -> list[dict[str, Any]]:
    """Measure every backend in a shifted attention layer, as in the first stage of the model `name`.

    The input is `batch` clips of 16 frames. Returns one row for each case of window, backend and pass, with the median
    `seconds` and the `peak_bytes`, or with `not_run` and the reason. Each case runs in a fresh process, so that its
    memory peak is its own.
    """
    return [
        case | run_in_fresh_process(measure_layer, case, name, rounds, threads, device, batch, device=device)
        for case in layer_cases(cases)
    ]


def layer_cases(cases: Sequence[tuple[int, PerAxis]]) -> list[dict[str, Any]]:
    """Every backend, without and with gradients, for each pair of pixels and window."""
    return [
        {"pixels": pixels, "window": window, "backend": backend, "gradients": gradients}
        for pixels, window in cases
        for backend in BACKENDS[1:]  # the first is "auto", which picks one of the others
        for gradients in (False, True)
    ]


def measure_layer(
    case: dict[str, Any], name: str, rounds: int, threads: int, device_name: str, batch: int
) -> dict[str, Any]:
    """The figures of one of `layer_cases`, or `not_run`.

    As in training, products are computed in bf16 on GPUs and in fp32 on CPUs.
    """
    device = torch.device(device_name)
    dtype = product_dtype("bf16", device)
    heads = variant_of(name).num_heads[0]
    torch.set_num_threads(threads)
    # The grid in tokens: patches are 2 x 4 x 4. True shifts the windows, so that the attention mask is measured too.
    side = case["pixels"] // 4
    plan = window_layout((FRAMES // 2, side, side), case["window"], True, device)
    coordinates = window_coordinates(plan.window, plan.window, device)
    backend: Backend = case["backend"]
    if backend == "flex" and device.type != "cuda":
        return {"not_run": "compiled on CUDA only"}
    channels = HEAD_CHANNELS * heads
    module = WindowAttention(channels, heads, 3, backend).to(device).train(case["gradients"])
    # (B, T, H, W, C) -> (B, W, N, C)
    x = window_partition(torch.randn(batch, *plan.padded, channels, device=device), plan.window)
    x.requires_grad_(case["gradients"])

    def run() -> None:
        with torch.set_grad_enabled(case["gradients"]):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = module(x, plan, coordinates)
            if case["gradients"]:
                # Any scalar made from the output can stand for a loss.
                out.float().square().mean().backward()

    try:
        peak = peak_bytes_of(run, device)  # also the warm-up of the timing below
    except RuntimeError as error:  # PyTorch raises it when memory runs out, on CPUs and on GPUs
        return {"not_run": f"not enough memory ({str(error).splitlines()[0][-80:]})"}
    clock = clock_for(device)
    seconds = [elapsed(run, clock) for _ in range(rounds)]
    return {"seconds": statistics.median(seconds), "peak_bytes": peak}


def layer_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `bench_layer` as a table."""
    cells = []
    for row in rows:
        if "not_run" in row:
            figures = [f"not run: {row['not_run']}", ""]
        else:
            figures = [f"{row['seconds']:.3f}", f"{row['peak_bytes'] / 2**20:.0f}"]
        what = "forward and backward" if row["gradients"] else "forward"
        cells.append([", ".join(map(str, row["window"])), str(row["pixels"]), row["backend"], what, *figures])
    return table_text(["window", "pixels", "backend", "pass", "seconds", "peak MiB"], cells)
