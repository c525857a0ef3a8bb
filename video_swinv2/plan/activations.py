"""The memory of a pass before it is run: tensors that have shapes but no bytes, every allocation of them counted."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

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
from video_swinv2.models import sequential
from video_swinv2.models.attention import choose
from video_swinv2.models.simmim import SimMIM, mask_cells
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import shrink

MEASURED = 4  # samples at most that are sent through the model; beyond, memory grows by the same amount per sample


class PassMemory(NamedTuple):
    """The most bytes that a forward and backward pass holds beside the weights."""

    activations: int
    """Without the weights' gradients, as where each is taken away as soon as it is there."""
    together: int
    """With them: activations go as gradients come, so this is less than the sum of both."""


class Allocations(TorchDispatchMode):
    """Counts the bytes of storages made inside that are alive, and the most there were; works on real and fake tensors.

    Storages of `known` tensors do not count. What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kept = self.peak_of_others = 0
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
        self.peak_of_others = max(self.peak_of_others, self.now - self.kept)
        return out

    def keep(self, tensor: Tensor) -> None:
        """Tell it from the others: it stays, as gradients do."""
        self.kept += tensor.untyped_storage().nbytes()

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


@contextmanager
def _pieces_of_gpus() -> Iterator[None]:
    """Inside, the sequential backend takes as many windows at once as on GPUs, and keeps no weights."""
    before = sequential.CACHED, sequential.KEPT
    sequential.CACHED, sequential.KEPT = sequential.BOUNDED, 0
    try:
        yield
    finally:
        sequential.CACHED, sequential.KEPT = before


def pass_memory(
    module: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], batch: int, *, bf16: bool
) -> PassMemory:
    """The most that a forward and backward pass of `batch` samples holds; gradients are gone when it returns."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with Allocations(module.parameters()) as allocations:
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda it: allocations.keep(it.grad)) for parameter in trained
        ]
        try:
            given = inputs(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):  # as the engine does
                out = module(*given)
            out.float().square().mean().backward()
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
    return PassMemory(allocations.peak_of_others, allocations.peak)


def measure_pass(module: nn.Module, config: Config, device: str, micro: int) -> PassMemory:
    """`pass_memory` of a micro-batch without memory or time."""
    half = config.engine.precision != "fp32"
    encoder = encoder_of(module)
    with ExitStack() as stack:
        if device == "cuda":
            _fuse_attention(encoder)
            stack.enter_context(_pieces_of_gpus())
            if half:
                stack.enter_context(_norms_in_fp32(module))
        inputs = _inputs_of(config, encoder, isinstance(module, SimMIM))
        last = pass_memory(module, inputs, min(micro, MEASURED), bf16=half)
        if micro > MEASURED:
            before = pass_memory(module, inputs, MEASURED - 1, bf16=half)
            pairs = zip(last, before, strict=True)
            last = PassMemory(*(now + (micro - MEASURED) * (now - then) for now, then in pairs))
    return last


def encoder_of(module: nn.Module) -> SwinV2:
    """The SwinV2 in a task's module."""
    return module.encoder if isinstance(module, SimMIM) else module  # type: ignore[return-value]  # the other is one


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
                fake = torch.empty(parameter.shape, device="cpu")
                setattr(part, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
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


def count_giga_macs(module: nn.Module, config: Config) -> float:
    """Multiply-accumulates of one sample's forward pass, in 10^9; inside `without_memory`."""
    encoder = encoder_of(module)
    backends = [block.attn.attention for block in encoder.blocks()]
    for block in encoder.blocks():
        block.attn.attention = "eager"  # every product in sight
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*_inputs_of(config, encoder, isinstance(module, SimMIM))(1))
    for block, backend in zip(encoder.blocks(), backends, strict=True):
        block.attn.attention = backend
    return counter.get_total_flops() / 2e9


def _grids(encoder: SwinV2) -> Iterator[tuple[int, ...]]:
    """Tokens per axis of every stage."""
    pixels = encoder.image_size if encoder.frames is None else (encoder.frames, *encoder.image_size)
    grid = tuple(math.ceil(size / patch) for size, patch in zip(pixels, encoder.patch_size, strict=True))
    for _ in encoder.depths:
        yield grid
        grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))


def choose_backends(encoder: SwinV2, device: str) -> tuple[str, ...]:
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
