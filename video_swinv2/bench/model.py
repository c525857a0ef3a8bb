"""Benchmark of our model against a peer: torchvision's Video Swin on clips, or timm's SwinV2 in SimMIM.

Both run in fp32, and in bf16 autocast where the device has units for it.

The two models take turns in one process, and the median of the ratios within the rounds is reported. On a CPU the time
is CPU time of this process, which with one thread hardly depends on other programs. Peak memory is measured in a fresh
process for each model.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType

from video_swinv2.bench.measuring import (
    clock_for,
    elapsed,
    matmul_flops_per_second,
    median_ratio,
    peak_bytes_of,
    run_in_fresh_process,
    table_text,
    take_turns,
)
from video_swinv2.bench.peers import (
    FRAMES,
    Comparison,
    PeerLibrary,
    Side,
    build_side,
    compare_on_clips,
    compare_on_masked_images,
)
from video_swinv2.distributed.devices import AUTOCAST_DTYPES, bf16_pays
from video_swinv2.training.flops import count_forward_flops

SIDES: tuple[Side, ...] = ("ours", "peer")
# Kinds of work, each with parts of the names of its operators, as torch's profiler reports them. "_Sequential" is the
# autograd function of our sequential attention.
OPERATOR_KINDS = {
    "matrix products of linear layers": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::baddbmm", "scaled_dot_product", "aten::exp2", "_Sequential"),
    "GELU": ("aten::gelu",),
    "LayerNorm": ("native_layer_norm",),
    "copies": ("aten::copy_", "aten::cat", "aten::stack", "aten::clone", "aten::index"),
}


@dataclass(frozen=True)
class Race:
    """The seconds of both models in each round, for one pass, "forward" or "training step", in one precision."""

    what: str
    precision: str
    ours: list[float]
    peer: list[float]

    @property
    def ratio(self) -> float:
        """How many times as fast as the peer our model is: the median over the rounds."""
        return median_ratio(self.peer, self.ours)


def bench_model(
    name: str,
    *,
    rounds: int,
    threads: int,
    device: str,
    against: PeerLibrary = "torchvision",
    batch: int = 1,
    frames: int = FRAMES,
    pixels: int | None = None,
    precisions: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compare the model `name` with the peer's model of the same size: time, peak memory and floor, as plain JSON.

    A training step here is the forward and backward pass, without the optimizer, which would be the same for both.
    precisions: fp32, bf16 or both; by default those in which the device is fast.
    Raises UsageError for a size that the peer does not have.
    """
    if against == "torchvision":
        comparison = compare_on_clips(name, batch, frames, pixels)
    else:
        comparison = compare_on_masked_images(name, batch, pixels)
    where = torch.device(device)
    torch.set_num_threads(threads)
    # Both models stay on the device throughout, so that both see the same free memory and caches.
    models = {side: build_side(comparison, side).to(where) for side in SIDES}
    x = torch.randn(comparison.shape, device=where)
    chosen = precisions or (("fp32", "bf16") if bf16_pays(where) else ("fp32",))
    races = [_race(what, precision, models, x, rounds) for precision in chosen for what in comparison.passes]
    # By the same clock as the races, since CPU time and wall time differ with several threads.
    rates = {
        name: matmul_flops_per_second(where, clock_for(where), AUTOCAST_DTYPES.get(name, torch.float32))
        for name in chosen
    }
    flops = _pass_flops(comparison)
    # Not in this process, whose peak would include the other model and the races.
    peaks = {
        precision: {
            side: run_in_fresh_process(_training_peak_bytes, comparison, side, precision, device, device=device)
            for side in SIDES
        }
        for precision in chosen
    }
    floors = [flops[race.what] / rates[race.precision] for race in races]
    return {
        "model": name,
        "against": against,
        "peer": comparison.peer,
        "input": list(comparison.shape),
        "window": comparison.window,
        "device": device,
        "threads": threads,
        "torch": torch.__version__,
        "peak_bytes": peaks,
        "product_gigaflops_per_second": {precision: rate / 1e9 for precision, rate in rates.items()},
        "races": [
            asdict(race)
            | {
                "ratio": race.ratio,
                "floor_seconds": floor,
                # The floor is a best rate, so it is compared with the fastest round.
                "share_of_floor": floor / min(race.ours),
                "where_time_goes": _time_shares(models["ours"], x, race.what, race.precision),
            }
            for race, floor in zip(races, floors, strict=True)
        ],
    }


def _pass_flops(comparison: Comparison) -> dict[str, int]:
    """The operations of our model's matrix products in each pass.

    A training step has three times the operations of the forward pass: the backward pass has twice as many.
    """
    model = build_side(comparison, "ours").to("meta")
    forward = count_forward_flops(model, torch.empty(comparison.shape, device="meta"))
    return {"forward": forward, "training step": 3 * forward}


def _race(what: str, precision: str, models: dict[Side, nn.Module], x: Tensor, rounds: int) -> Race:
    """Let the models take turns in one pass, "forward" or "training step"."""
    clock = clock_for(x.device)
    seconds = take_turns(
        {side: partial(elapsed, partial(_run, model, x, what, precision), clock) for side, model in models.items()},
        rounds,
    )
    return Race(what, precision, seconds["ours"], seconds["peer"])


def _run(model: nn.Module, x: Tensor, what: str, precision: str) -> None:
    """One pass of a model on the input `x`. As in our engines, autocast keeps no copies of the weights."""
    autocast = torch.autocast(
        x.device.type, AUTOCAST_DTYPES.get(precision, torch.bfloat16), precision != "fp32", cache_enabled=False
    )
    # The modes are set in each pass, because the model runs both passes in turn.
    if what == "forward":
        with torch.inference_mode(), autocast:
            model.eval()(x)
        return
    model.train().zero_grad()
    with autocast:
        out = model(x).float()
    (out if out.ndim == 0 else out.square().mean()).backward()  # SimMIM returns its loss, a scalar


def _time_shares(model: nn.Module, x: Tensor, what: str, precision: str) -> dict[str, float]:
    """How the time of a pass on the device is divided among kinds of operators: shares that add up to 1."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + ([activity.CUDA] if x.is_cuda else [])
    with torch.profiler.profile(activities=activities) as profile:
        _run(model, x, what, precision)
    # CPU time does not show what a GPU does, so there the time of its kernels is taken.
    # Self time does not include the operators that an operator calls, so nothing is counted twice. The kernels of a GPU
    # are listed too, beside the operators that launched them, and left out for the same reason.
    times = {
        event.key: event.self_device_time_total if x.is_cuda else event.self_cpu_time_total
        for event in profile.key_averages()
        if event.device_type == DeviceType.CPU
    }
    total = sum(times.values())
    shares = {
        kind: sum(time for key, time in times.items() if any(part in key for part in parts)) / total
        for kind, parts in OPERATOR_KINDS.items()
    }
    return shares | {"elementwise work and overhead": 1 - sum(shares.values())}


def _training_peak_bytes(comparison: Comparison, side: Side, precision: str, device: str) -> int:
    """Peak bytes of one training step, including gradients but not the weights. Called in a fresh process."""
    where = torch.device(device)
    torch.set_num_threads(1)
    model = build_side(comparison, side).to(where)
    x = torch.randn(comparison.shape, device=where)
    return peak_bytes_of(lambda: _run(model, x, "training step", precision), where)


def model_table(result: dict[str, Any]) -> str:
    """The result of `bench_model` as text: a table of the races, and notes."""
    rows = [
        [
            race["what"],
            race["precision"],
            f"{statistics.median(race['ours']):.2f}",
            f"{statistics.median(race['peer']):.2f}",
            f"{race['ratio']:.2f}",
            f"{race['share_of_floor']:.0%}",
        ]
        for race in result["races"]
    ]
    lines = [
        f"{result['model']} against {result['peer']}: {result['input']}, window {result['window']}, "
        f"{result['device']}, {result['threads']} thread(s), torch {result['torch']}; "
        f"medians of {len(result['races'][0]['ours'])} rounds",
        "",
        table_text(["pass", "precision", "ours, s", "peer, s", "peer / ours", "of the floor"], rows),
        "",
    ]
    for precision, peaks in result["peak_bytes"].items():
        ours, peer = (peaks[side] / 2**30 for side in SIDES)
        rate = result["product_gigaflops_per_second"][precision]
        lines.append(
            f"{precision}: peak memory of a training step: ours {ours:.2f} GiB, peer {peer:.2f} GiB; "
            f"the floor is our matrix products at the rate of a large one, {rate:.0f} GFLOP/s"
        )
    for race in result["races"]:
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in race["where_time_goes"].items())
        lines.append(f"where the time of a {race['what']} in {race['precision']} goes: {shares}")
    return "\n".join(lines)
