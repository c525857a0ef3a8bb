"""What a training run will take before it is started: memory of a device, work, steps. Nothing is computed or loaded.

Weights, gradients and moments follow from the engine; activations from a micro-batch that goes through the model
forward and backward with tensors that have shapes but no memory, in which every allocation is counted.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from video_swinv2.config import Config
from video_swinv2.data.datasets import labelled, unlabelled
from video_swinv2.data.loading import plan_batch
from video_swinv2.errors import UsageError
from video_swinv2.models.attention import choose
from video_swinv2.models.sequential import BOUNDED
from video_swinv2.models.simmim import SimMIM, mask_cells
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import shrink
from video_swinv2.training.engine import BUCKET
from video_swinv2.training.tasks import build_model

NUMBER = 4  # bytes: weights, gradients and moments are fp32 in every engine
LIVE = 1_000_000_000  # weights that DeepSpeed's ZeRO-3 keeps gathered at most (stage3_max_live_parameters)
ALL_REDUCE = 500_000_000  # gradients that its ZeRO-0 averages at a time
MEASURED = 4  # samples at most that are sent through the model; beyond, memory grows by the same amount per sample


@dataclass(frozen=True)
class Plan:
    """Bytes are per device. `steps` and `samples` are None where neither the data nor its size is known."""

    model: str
    device: str
    parameters: int
    giga_macs: float
    """Multiply-accumulates of one sample's forward pass, in 10^9; training takes three times as many."""
    backends: tuple[str, ...]
    """Attention of each stage."""
    processes: int
    batch: int
    micro_batch: int
    accumulation: int
    samples: int | None
    steps_per_epoch: float | None
    steps: int | None
    weights: int
    gradients: int
    optimizer: int
    buffers: int
    """DeepSpeed's own: buckets of gradients, gathered weights."""
    activations: int
    """The most that forward and backward of a micro-batch hold at once beside all the others."""

    @property
    def peak(self) -> int:
        """All of it: an upper bound, as if gradients and activations were at their most together."""
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


def make_plan(
    config: Config,
    *,
    processes: int = 1,
    samples: int | None = None,
    classes: int | None = None,
    pretraining: bool = False,
) -> Plan:
    """The plan of `train` (or `pretrain`) with this configuration; `samples` and `classes` where the data is elsewhere.

    `engine.device: auto` is planned as a GPU. UsageError for a configuration that could not be run.
    """
    if processes < 1:
        raise UsageError(f"--processes {processes}: give 1 or more")
    if config.engine.engine == "plain" and processes > 1:
        raise UsageError("engine: plain runs in one process; leave --processes away or use engine.engine=deepspeed")
    samples, classes = _data(config, samples, classes, pretraining)
    batch = plan_batch(config.optim.batch, config.optim.micro_batch, processes)
    with torch.device("meta"):
        encoder = build_model(config, 0 if pretraining else classes)
        module: nn.Module = SimMIM(encoder, config.mask.unit) if pretraining else encoder
    parameters = sum(parameter.numel() for parameter in module.parameters())
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    backends = _choose_backends(encoder, device)
    with without_memory(module):
        giga_macs = _giga_macs(module, config)
        activations = _activations(module, config, device, batch.micro)
    return Plan(
        model=encoder.name,
        device=device,
        parameters=parameters,
        backends=backends,
        processes=processes,
        batch=batch.batch,
        micro_batch=batch.micro,
        accumulation=batch.accumulation,
        samples=samples,
        steps_per_epoch=None if samples is None else samples / batch.batch,
        steps=None if samples is None else max(1, round(config.optim.epochs * samples / batch.batch)),
        activations=activations,
        giga_macs=giga_macs,
        **state_bytes(config, parameters, processes, batch.accumulation),
    )


def _data(config: Config, samples: int | None, classes: int | None, pretraining: bool) -> tuple[int | None, int]:
    """Samples and classes as given, else counted in the data set if it is here, else unknown and Kinetics' 400."""
    # Of a pattern of shards (name-{000..146}.tar) the folder.
    here = all((Path(source).parent if "{" in str(source) else Path(source)).exists() for source in config.data.source)
    if here and pretraining and samples is None:
        samples = len(unlabelled(config.data, validation=False))
    elif here and not pretraining and (samples is None or classes is None):
        manifest = labelled(config.data, config.data.train_split)
        samples = len(manifest.entries) if samples is None else samples
        classes = len(manifest.classes) if classes is None else classes
    return samples, 400 if classes is None else classes


def state_bytes(config: Config, parameters: int, processes: int, accumulation: int) -> dict[str, int]:
    """Weights, gradients, moments and DeepSpeed's buffers on one device, as `training/engine.py` keeps them.

    AdamW's two moments are always there. From ZeRO-1 on the optimizer updates its own copy of the weights it owns.
    """
    piece = math.ceil(parameters / processes)
    if config.engine.engine == "plain":
        numbers = (parameters, parameters, 2 * parameters, 0)
    elif config.engine.zero_stage == 0:
        numbers = (parameters, parameters, 2 * parameters, min(parameters, ALL_REDUCE))
    elif config.engine.zero_stage == 1:
        # Gradients are cut up at the end of a step only; until then accumulated ones are whole.
        whole = parameters if accumulation > 1 else 0
        numbers = (parameters, piece + whole, 3 * piece, BUCKET)
    elif config.engine.zero_stage == 2:
        numbers = (parameters, piece, 3 * piece, BUCKET)
    else:
        numbers = (piece, piece, 3 * piece, BUCKET + min(parameters, LIVE))
    keys = ("weights", "gradients", "optimizer", "buffers")
    return {key: NUMBER * count for key, count in zip(keys, numbers, strict=True)}


def _grids(encoder: SwinV2) -> Iterator[tuple[int, ...]]:
    """Tokens per axis of every stage."""
    pixels = encoder.image_size if encoder.frames is None else (encoder.frames, *encoder.image_size)
    grid = tuple(math.ceil(size / patch) for size, patch in zip(pixels, encoder.patch_size, strict=True))
    for _ in encoder.depths:
        yield grid
        grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))


def _choose_backends(encoder: SwinV2, device: str) -> tuple[str, ...]:
    """Write into every block what `auto` means on the device planned for, which need not be here."""
    chosen = []
    for stage, grid in zip(encoder.stages(), _grids(encoder), strict=True):
        backend = encoder.attention
        if backend == "auto":
            tokens = math.prod(shrink(encoder.window, grid)[0])
            with torch.enable_grad():
                backend = choose(torch.device(device), tokens)  # type: ignore[assignment]  # one of the literals
        for block in stage.blocks:
            block.attn.attention = backend  # type: ignore[union-attr]  # torch types members as Module
        chosen.append(str(backend))
    return tuple(chosen)


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages made inside that are alive, and the most there were; works on real and fake tensors.

    Storages of `known` tensors do not count. What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then look at the storages of what it gave."""
        out = function(*arguments, **(keywords or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = None
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, count: int) -> None:
        self.now -= count


class _FusedAttention(TorchFunctionMode):
    """Scaled dot products as GPUs compute them, in one kernel that keeps no logits; CPUs would choose another way."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Everything but scaled_dot_product_attention runs as it is."""
        if function is not F.scaled_dot_product_attention:
            return function(*arguments, **(keywords or {}))
        q, k, v, *rest = arguments
        bias = rest[0] if rest else (keywords or {})["attn_mask"]
        bias = bias.expand(*q.shape[:2], q.shape[2], k.shape[2]) if q.ndim == 4 else bias
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=1.0)[0]


def _fuse_attention(encoder: SwinV2) -> None:
    """Put each attention under _FusedAttention; around the whole pass it would be off where blocks are recomputed."""

    def fused(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            with _FusedAttention():
                return forward(*arguments)

        return run

    for block in encoder.blocks():
        block.attn.forward = fused(block.attn.forward)  # type: ignore[method-assign]  # the model serves the plan only


def pass_memory(module: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], batch: int, *, bf16: bool) -> int:
    """The most bytes that a forward and backward pass of `batch` samples hold beside weights and their gradients."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None  # counted with the states

    hooks = [parameter.register_post_accumulate_grad_hook(drop) for parameter in module.parameters()]
    try:
        with Allocations(module.parameters()) as allocations:
            given = inputs(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = module(*given)
            out.float().square().mean().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return allocations.peak


def _activations(module: nn.Module, config: Config, device: str, micro: int) -> int:
    """`pass_memory` of a micro-batch without memory or time, and what the sequential backend works in."""
    bf16 = config.engine.precision == "bf16"
    encoder: SwinV2 = module.encoder if isinstance(module, SimMIM) else module  # type: ignore[assignment]  # see make_plan
    with ExitStack() as stack:
        if device == "cuda":
            _fuse_attention(encoder)
            if bf16:
                stack.enter_context(_norms_in_fp32(module))
        inputs = _inputs_of(config, encoder, isinstance(module, SimMIM))
        last = pass_memory(module, inputs, min(micro, MEASURED), bf16=bf16)
        if micro > MEASURED:
            last += (micro - MEASURED) * (last - pass_memory(module, inputs, MEASURED - 1, bf16=bf16))
    return last + _sequential_workspace(encoder, device, micro)


def _sequential_workspace(encoder: SwinV2, device: str, micro: int) -> int:
    """Logits, their gradient and one more of a piece on a GPU, where pieces are larger than where this is counted."""
    if device == "cpu":
        return 0
    logits = [0]
    for stage, heads, grid in zip(encoder.stages(), encoder.num_heads, _grids(encoder), strict=True):
        if stage.blocks[0].attn.attention == "sequential":  # type: ignore[union-attr]  # torch types members as Module
            tokens = math.prod(shrink(encoder.window, grid)[0])
            logits.append(micro * math.ceil(math.prod(grid) / tokens) * heads * tokens**2)
    return 3 * NUMBER * min(BOUNDED, max(logits))


def _inputs_of(config: Config, encoder: SwinV2, masked: bool) -> Callable[[int], tuple[Tensor, ...]]:
    frames = () if encoder.frames is None else (encoder.frames,)
    cells = mask_cells((*frames, *encoder.image_size), config.mask.unit, len(encoder.patch_size)) if masked else ()

    def inputs(batch: int) -> tuple[Tensor, ...]:
        pixels = torch.empty(batch, 3, *frames, *encoder.image_size)
        return (pixels, torch.zeros(batch, *cells, dtype=torch.bool)) if masked else (pixels,)

    return inputs


@contextmanager
def without_memory(module: nn.Module) -> Iterator[None]:
    """Inside, tensors have shapes only, and `module`, built on the meta device, has such weights, on the CPU."""
    with FakeTensorMode():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                setattr(part, name, nn.Parameter(torch.empty(parameter.shape, device="cpu")))
        module.train()
        yield


@contextmanager
def _norms_in_fp32(module: nn.Module) -> Iterator[None]:
    """What autocast does with LayerNorms on GPUs, and not on CPUs."""

    def widen(norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(argument.float() for argument in arguments)

    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(widen) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _giga_macs(module: nn.Module, config: Config) -> float:
    encoder: SwinV2 = module.encoder if isinstance(module, SimMIM) else module  # type: ignore[assignment]  # see make_plan
    backends = [block.attn.attention for block in encoder.blocks()]
    for block in encoder.blocks():
        block.attn.attention = "eager"  # every product in sight
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*_inputs_of(config, encoder, isinstance(module, SimMIM))(1))
    for block, backend in zip(encoder.blocks(), backends, strict=True):
        block.attn.attention = backend
    return counter.get_total_flops() / 2e9


def show(plan: Plan, memory: int | None = None) -> str:
    """The plan for people, and whether it fits `memory` bytes."""
    steps = "unknown; give --samples"
    if plan.steps is not None:
        steps = f"{plan.steps}, {plan.steps_per_epoch:.1f} per epoch of {plan.samples} samples"
    rows = [(key, getattr(plan, key)) for key in ("weights", "gradients", "optimizer", "buffers", "activations")]
    lines = [
        f"{plan.model}: {plan.parameters:,} parameters, {plan.giga_macs:.1f} GMAC a sample forward",
        f"batch {plan.batch} = {plan.processes} devices ({plan.device}) x {plan.micro_batch} samples x "
        f"{plan.accumulation} accumulated; attention by stage: {', '.join(plan.backends)}",
        f"steps: {steps}",
        "memory per device, GB:",
        *(f"  {key:12s}{value / 1e9:9.2f}" for key, value in [*rows, ("at most", plan.peak)]),
    ]
    if memory is not None:
        word = "fits" if plan.peak <= memory else "does not fit"
        lines.append(f"{word} {memory / 1e9:.1f} GB")
    return "\n".join(lines)
