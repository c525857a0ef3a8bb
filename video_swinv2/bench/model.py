"""Speed and memory of the model, measured: against torchvision's Video Swin and timm's SwinV2, backend by backend.

Two models take turns in one process, so that what else the machine does hits both, and medians of ratios are told. On
CPUs time is CPU time of this process: with one thread it hardly depends on others. Memory is measured in a process of
its own for each case.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from video_swinv2.bench.measuring import clock_of, peak_of, product_speed
from video_swinv2.errors import UsageError
from video_swinv2.memory import free_memory_bytes
from video_swinv2.models.attention import BACKENDS, Backend, WindowAttention
from video_swinv2.models.simmim import SimMIM, mask_cells, masked_l1, random_mask
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.variants import Variant, create_model, find_variant
from video_swinv2.models.windows import Size, layout, partition
from video_swinv2.training.flops import count_forward_flops

Opponent = Literal["torchvision", "timm"]
FRAMES, PIXELS, WINDOW = 16, 224, (8, 7, 7)  # what torchvision's Video Swin is built for
PEERS = {"swinv2_tiny": "swin3d_t", "swinv2_small": "swin3d_s", "swinv2_base": "swin3d_b"}
# SimMIM's images and masks, and the drop path of its recipe for SwinV2-B (configs/simmim of Microsoft's).
SIMMIM_PIXELS, SIMMIM_WINDOW, SIMMIM_UNIT, SIMMIM_RATIO, SIMMIM_DROP_PATH = 192, 12, 32, 0.6, 0.1
LAYER_CASES = ((224, (8, 7, 7)), (256, (8, 16, 16)), (384, (8, 24, 24)))  # pixels and window
KINDS = {  # where time goes, by the names of torch's operators
    "matrix products of linear layers": ("aten::mm", "aten::addmm"),
    "attention": ("aten::bmm", "aten::baddbmm", "scaled_dot_product", "softmax", "_Sequential"),
    "GELU": ("aten::gelu",),
    "LayerNorm": ("native_layer_norm",),
    "copies": ("aten::copy_", "aten::cat", "aten::clone", "aten::roll", "aten::index"),
}


@dataclass(frozen=True)
class Race:
    """Ours against a peer: seconds per run in turns, and the median of peer / ours."""

    what: str
    ours: list[float]
    peer: list[float]

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return statistics.median(peer / ours for ours, peer in zip(self.ours, self.peer, strict=True))


@dataclass(frozen=True)
class Contest:
    """What is compared: plain data, so that it can go to another process."""

    against: Opponent
    name: str
    peer: str
    shape: tuple[int, ...]
    window: tuple[int, ...]
    races: tuple[str, ...]


def bench_model(
    name: str,
    *,
    rounds: int,
    threads: int,
    device: str,
    against: Opponent = "torchvision",
    batch: int = 1,
    frames: int = FRAMES,
    pixels: int | None = None,
) -> dict[str, Any]:
    """`name` against another library's model of that size, time, memory and floor; see `_clips` and `_masked_images`.

    A training step is the forward and the backward pass; the optimizer would be the same for both.
    """
    contest = _clips(name, batch, frames, pixels) if against == "torchvision" else _masked_images(name, batch, pixels)
    where = torch.device(device)
    torch.set_num_threads(threads)
    clock = clock_of(where)
    models = [_build(contest, kind).to(where) for kind in ("ours", "peer")]
    x = torch.randn(contest.shape, device=where)
    races = [_race(what, models, x, rounds, clock) for what in contest.races]
    gigaflops = product_speed(where, clock) / 1e9
    floor = count_forward_flops(_build(contest, "ours").to("meta"), x.to("meta")) / gigaflops / 1e9
    floors = {"forward": floor, "training step": 3 * floor}
    return {
        "model": name,
        "against": against,
        "peer": contest.peer,
        "input": list(contest.shape),
        "window": contest.window,
        "device": device,
        "threads": threads,
        "torch": torch.__version__,
        "races": [asdict(race) | {"ratio": race.ratio} for race in races],
        "peak_bytes": {kind: _in_process(_training_peak, contest, kind, device) for kind in ("ours", "peer")},
        "product_gigaflops_per_second": gigaflops,
        "floor_seconds": {race.what: floors[race.what] for race in races},
        "share_of_floor": {race.what: floors[race.what] / min(race.ours) for race in races},
        "where_time_goes": {race.what: _profile(models[0], x, race.what) for race in races},
    }


def bench_layer(
    name: str, *, rounds: int, threads: int, device: str, cases: Sequence[tuple[int, Size]] = LAYER_CASES
) -> list[dict[str, Any]]:
    """Every backend in one shifted first-stage attention layer of 16 frames: seconds and peak memory, or why not."""
    heads = _variant(name).num_heads[0]
    rows = []
    for pixels, window in cases:
        for backend in BACKENDS[1:]:
            for gradients in (False, True):
                case = {"pixels": pixels, "window": window, "backend": backend, "gradients": gradients}
                rows.append(case | _in_process(_layer, case, heads, rounds, threads, device))
    return rows


def _clips(name: str, batch: int, frames: int, pixels: int | None) -> Contest:
    """Classification of clips with window (8, 7, 7), against torchvision's Video Swin."""
    if name not in PEERS:
        raise UsageError(f"--model {name}: torchvision has no such size; there are {', '.join(PEERS)}")
    side = PIXELS if pixels is None else pixels
    shape = (batch, 3, frames, side, side)
    return Contest("torchvision", name, f"torchvision {PEERS[name]}", shape, WINDOW, ("forward", "training step"))


def _masked_images(name: str, batch: int, pixels: int | None) -> Contest:
    """SimMIM of images with window 12, against timm's SwinV2 as the encoder in the same head, mask and loss."""
    if _variant(name).extra_norm_every:
        raise UsageError(f"--model {name}: timm's SwinV2 has no extra norms; take a smaller size")
    side = SIMMIM_PIXELS if pixels is None else pixels
    peer = f"timm SwinTransformerV2 (as swinv2_{name.removeprefix('swinv2_')}_window{SIMMIM_WINDOW}_{side})"
    return Contest("timm", name, peer, (batch, 3, side, side), (SIMMIM_WINDOW,) * 2, ("training step",))


def _build(contest: Contest, kind: str) -> nn.Module:
    name, shape = contest.name, contest.shape
    if contest.against == "timm":
        torch.manual_seed(0)
        return MaskedLoss(_image_encoder(kind, name, shape[-1]), shape)
    if kind == "ours":
        return create_model(name, num_classes=400, frames=shape[2], image_size=shape[3], window=contest.window)
    from torchvision.models import video

    peer: nn.Module = getattr(video, PEERS[name])(weights=None)
    return peer


def _image_encoder(kind: str, name: str, pixels: int) -> nn.Module:
    if kind == "ours":
        return create_model(name, num_classes=0, image_size=pixels, window=SIMMIM_WINDOW, drop_path=SIMMIM_DROP_PATH)
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    size = find_variant(name)
    return TimmEncoder(
        SwinTransformerV2(
            img_size=pixels,
            window_size=SIMMIM_WINDOW,
            embed_dim=size.embed_dim,
            depths=size.depths,
            num_heads=size.num_heads,
            num_classes=0,
            drop_path_rate=SIMMIM_DROP_PATH,
        )
    )


def _variant(name: str) -> Variant:
    try:
        return find_variant(name)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error


class TimmEncoder(nn.Module):
    """timm's SwinV2 with the few things that SimMIM asks of an encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.patch_size = self.model.patch_embed.patch_size
        self.depths = [len(stage.blocks) for stage in self.model.layers]
        self.embed_dim = self.model.embed_dim
        self.num_features = self.model.num_features

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> patch tokens (B, *S, C)."""
        return cast(Tensor, self.model.patch_embed(x))

    def encode(self, tokens: Tensor) -> Tensor:
        """Patch tokens -> the last stage's, after the final norm."""
        return cast(Tensor, self.model.norm(self.model.layers(tokens)))


class MaskedLoss(nn.Module):
    """An encoder in SimMIM with masks drawn once: images to their masked L1 loss."""

    masks: Tensor

    def __init__(self, encoder: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.simmim = SimMIM(cast(SwinV2, encoder), SIMMIM_UNIT)
        cells = mask_cells(shape[2:], SIMMIM_UNIT, 2)
        generator = torch.Generator().manual_seed(0)
        masks = [random_mask(cells, SIMMIM_RATIO, generator) for _ in range(shape[0])]
        self.register_buffer("masks", torch.stack(masks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> scalar."""
        return masked_l1(self.simmim(x, self.masks), x, self.masks, self.simmim.mask_unit)


def _race(what: str, models: list[nn.Module], x: Tensor, rounds: int, clock: Callable[[], float]) -> Race:
    seconds: list[list[float]] = [[], []]
    for number in range(rounds + 1):  # the first round warms up
        for model, taken in zip(models, seconds, strict=True):
            started = clock()
            _run(model, x, what)
            if number:
                taken.append(clock() - started)
    return Race(what, *seconds)


def _run(model: nn.Module, x: Tensor, what: str) -> None:
    if what == "forward":
        with torch.inference_mode():
            model.eval()(x)
        return
    model.train().zero_grad()
    out = model(x)
    (out if out.ndim == 0 else out.square().mean()).backward()


def _profile(model: nn.Module, x: Tensor, what: str) -> dict[str, float]:
    """Shares of the CPU's (or GPU's) own time by kind of operator; the remainder is elementwise work and overhead."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + ([activity.CUDA] if x.is_cuda else [])
    with torch.profiler.profile(activities=activities) as profile:
        _run(model, x, what)
    own = {
        event.key: event.self_device_time_total if x.is_cuda else event.self_cpu_time_total
        for event in profile.key_averages()
    }
    total = sum(own.values())
    shares = {
        kind: sum(t for key, t in own.items() if any(part in key for part in parts)) / total
        for kind, parts in KINDS.items()
    }
    return shares | {"elementwise work and overhead": 1 - sum(shares.values())}


def _training_peak(contest: Contest, kind: str, device: str) -> int:
    """Bytes that one training step needs beyond the model, its gradients included."""
    where = torch.device(device)
    torch.set_num_threads(1)
    model = _build(contest, kind).to(where)
    x = torch.randn(contest.shape, device=where)
    return peak_of(lambda: _run(model, x, "training step"), where)


def _in_process(work: Callable[..., Any], *arguments: object) -> Any:
    """The result of `work` in a fresh process, which may use the memory that is free now and no more."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_limited, work, *arguments).result()


def _limited(work: Callable[..., Any], *arguments: object) -> Any:
    free = free_memory_bytes()
    if "cpu" in arguments and free is not None:
        used = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(0.8 * free), resource.RLIM_INFINITY))
    return work(*arguments)


def _layer(case: dict[str, Any], heads: int, rounds: int, threads: int, device: str) -> dict[str, Any]:
    """One attention layer with 32 channels per head, as the first stage of a clip model has it."""
    where = torch.device(device)
    torch.set_num_threads(threads)
    side = case["pixels"] // 4
    plan = layout((FRAMES // 2, side, side), case["window"], True, where)
    backend: Backend = case["backend"]
    if backend == "flex" and where.type != "cuda":
        return {"not_run": "compiled on CUDA only"}
    module = WindowAttention(32 * heads, heads, 3, backend).to(where).train(case["gradients"])
    x = partition(torch.randn(1, *plan.padded, 32 * heads, device=where), plan.window)
    x.requires_grad_(case["gradients"])
    clock, seconds = clock_of(where), []

    def once() -> None:
        with torch.set_grad_enabled(case["gradients"]):
            out = module(x, plan, plan.window)
            if case["gradients"]:
                out.square().mean().backward()

    try:
        peak = peak_of(once, where)
    except RuntimeError as error:  # out of memory is one, on CPUs and on GPUs
        return {"not_run": f"more memory than there is ({str(error).splitlines()[0][-80:]})"}
    for _ in range(rounds):
        started = clock()
        once()
        seconds.append(clock() - started)
    return {"seconds": statistics.median(seconds), "peak_bytes": peak}


def show_model(result: dict[str, Any]) -> str:
    """The result of `bench_model` for people."""
    ours, peer = result["model"], result["peer"]
    lines = [f"{ours} against {peer}: {result['input']}, window {result['window']}, {result['device']},"]
    lines[0] += f" {result['threads']} thread(s), torch {result['torch']}"
    for race in result["races"]:
        medians = [statistics.median(race[kind]) for kind in ("ours", "peer")]
        lines.append(
            f"  {race['what']:14s} ours {medians[0]:6.2f} s, peer {medians[1]:6.2f} s, peer / ours {race['ratio']:.2f} "
            f"(median of {len(race['ours'])}), {result['share_of_floor'][race['what']]:.0%} of the floor reached"
        )
    peaks = [result["peak_bytes"][kind] / 2**30 for kind in ("ours", "peer")]
    lines.append(f"  peak memory of a training step: ours {peaks[0]:.2f} GiB, peer {peaks[1]:.2f} GiB")
    lines.append(f"  floor: all products at the {result['product_gigaflops_per_second']:.0f} GFLOP/s of a large one")
    for what, shares in result["where_time_goes"].items():
        lines.append(f"  where the time of a {what} goes: " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()))
    return "\n".join(lines)


def show_layer(rows: list[dict[str, Any]]) -> str:
    """The rows of `bench_layer` as a Markdown table."""
    lines = ["| window | pixels | backend | pass | seconds | peak MiB |", "|---|---|---|---|---|---|"]
    for row in rows:
        what = "forward and backward" if row["gradients"] else "forward"
        figures = (
            f"{row['seconds']:.3f} | {row['peak_bytes'] / 2**20:.0f}" if "seconds" in row else row["not_run"] + " |"
        )
        window = ", ".join(map(str, row["window"]))
        lines.append(f"| {window} | {row['pixels']} | {row['backend']} | {what} | {figures} |")
    return "\n".join(lines)
