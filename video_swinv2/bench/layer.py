"""Speed and memory of one attention layer under each attention backend, forward and backward."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from video_swinv2.bench.measuring import clock_for, elapsed, peak_bytes_of, run_in_fresh_process, table_text
from video_swinv2.bench.peers import FRAMES, variant_of
from video_swinv2.models.attention import BACKENDS, Backend, WindowAttention
from video_swinv2.models.windows import PerAxis, window_layout, window_partition

LAYER_CASES = ((224, (8, 7, 7)), (256, (8, 16, 16)), (384, (8, 24, 24)))  # pixels and window
HEAD_CHANNELS = 32


def bench_layer(
    name: str, *, rounds: int, threads: int, device: str, cases: Sequence[tuple[int, PerAxis]] = LAYER_CASES
) -> list[dict[str, Any]]:
    """Every backend in a shifted attention layer of model `name`'s first stage, on clips of 16 frames.

    Each row has `seconds` and `peak_bytes`, or `not_run` with the reason. Each case runs in a process of its own.
    """
    heads = variant_of(name).num_heads[0]
    rows = []
    for pixels, window in cases:
        for backend in BACKENDS[1:]:  # the first is "auto", which picks one of the others
            for gradients in (False, True):
                case = {"pixels": pixels, "window": window, "backend": backend, "gradients": gradients}
                rows.append(
                    case | run_in_fresh_process(_measure_layer, case, heads, rounds, threads, device, device=device)
                )
    return rows


def _measure_layer(case: dict[str, Any], heads: int, rounds: int, threads: int, device_name: str) -> dict[str, Any]:
    """Runs in its own process: the figures of one case, or `not_run`."""
    device = torch.device(device_name)
    torch.set_num_threads(threads)
    side = case["pixels"] // 4  # tokens: patches are 2 x 4 x 4
    plan = window_layout((FRAMES // 2, side, side), case["window"], True, device)
    backend: Backend = case["backend"]
    if backend == "flex" and device.type != "cuda":
        return {"not_run": "compiled on CUDA only"}
    channels = HEAD_CHANNELS * heads
    module = WindowAttention(channels, heads, 3, backend).to(device).train(case["gradients"])
    # (1, T, H, W, C) -> (windows, N, C)
    x = window_partition(torch.randn(1, *plan.padded, channels, device=device), plan.window)
    x.requires_grad_(case["gradients"])

    def run() -> None:
        with torch.set_grad_enabled(case["gradients"]):
            out = module(x, plan, plan.window)
            if case["gradients"]:
                out.square().mean().backward()

    try:
        peak = peak_bytes_of(run, device)  # also warms up
    except RuntimeError as error:  # PyTorch raises it for lack of memory, on CPUs and on GPUs
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
