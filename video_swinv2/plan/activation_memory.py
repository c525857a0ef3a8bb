"""The memory of a forward and backward pass, found by running it on tensors that have shapes but no bytes.

The model runs under torch's FakeTensorMode, operator by operator, and every storage that an operator would allocate is
counted from its creation to its release. So activations kept for the backward pass, gradients, temporaries and
recomputation by activation checkpointing are all in, without a formula for any of them.
"""

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
from torch.utils.weak import WeakIdKeyDictionary

from video_swinv2.config import Config
from video_swinv2.models import sequential
from video_swinv2.models.attention import auto_backend
from video_swinv2.models.simmim import SimMIM, mask_cells
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import shrink_window
from video_swinv2.training.flops import count_forward_flops

MEASURED_SAMPLES = 4  # the largest batch that is run; beyond it, each further sample takes the same number of bytes


class PassMemory(NamedTuple):
    """Peak bytes of a forward and backward pass, beside the weights."""

    activations: int
    """Without the gradients of weights: for engines that take each gradient away as soon as it is computed."""
    together: int
    """With them. Activations are freed as gradients arrive, so this is less than the sum of both peaks."""


class Allocations(TorchDispatchMode):
    """Counts the bytes of the storages created inside that are alive, now and at the peak, of real and fake tensors.

    Storages of `known` tensors are not counted. What an operator allocates and frees internally is invisible here.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kept = self.peak_without_kept = 0
        # Storages, not tensors: views share one. By identity and weakly, so that counting keeps nothing alive.
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, then count the storages of its outputs that are new."""
        out = function(*arguments, **(keywords or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = None
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        self.peak_without_kept = max(self.peak_without_kept, self.now - self.kept)
        return out

    def keep(self, tensor: Tensor) -> None:
        """Count a tensor as one that stays, as gradients do: it is left out of `peak_without_kept` from now on."""
        self.kept += tensor.untyped_storage().nbytes()

    def _free(self, byte_count: int) -> None:
        self.now -= byte_count


class _FusedAttention(TorchFunctionMode):
    """Computes scaled dot products by the fused kernel that GPUs use, which keeps no logits for the backward pass.

    Fake tensors claim to be on the CPU, where torch would choose another kernel and the count would be another.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Replace scaled_dot_product_attention, and run everything else unchanged."""
        if function is not F.scaled_dot_product_attention:
            return function(*arguments, **(keywords or {}))
        q, k, v, *rest = arguments
        bias = rest[0] if rest else (keywords or {})["attn_mask"]
        bias = bias.expand(*q.shape[:2], q.shape[2], k.shape[2]) if q.ndim == 4 else bias
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=1.0)[0]


def _fuse_attention(encoder: SwinV2) -> None:
    """Put the forward pass of each attention layer under _FusedAttention.

    Layer by layer, not around the whole pass: a block that is recomputed in the backward pass runs outside of any mode
    that was active in the forward pass.
    """

    def fused(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any) -> Tensor:
            with _FusedAttention():
                return forward(*arguments)

        return run

    for block in encoder.blocks():
        block.attn.forward = fused(block.attn.forward)  # type: ignore[method-assign]  # this model is for the plan only


@contextmanager
def _sequential_as_on_gpus() -> Iterator[None]:
    """Inside, the sequential backend takes as many windows at once as on GPUs, and keeps no attention weights."""
    before = sequential.CPU_PIECE, sequential.CPU_KEPT
    sequential.CPU_PIECE, sequential.CPU_KEPT = sequential.PIECE_LIMIT, 0
    try:
        yield
    finally:
        sequential.CPU_PIECE, sequential.CPU_KEPT = before


def pass_memory(
    module: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], batch: int, *, bf16: bool
) -> PassMemory:
    """Peak bytes of a forward and backward pass of `batch` samples, on real or fake tensors.

    inputs: makes the module's arguments for a number of samples. Gradients are removed again before it returns.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with Allocations(module.parameters()) as allocations:
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda it: allocations.keep(it.grad)) for parameter in trained
        ]
        try:
            arguments = inputs(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):  # as the engine does
                out = module(*arguments)
            out.float().square().mean().backward()
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
    return PassMemory(allocations.peak_without_kept, allocations.peak)


def micro_batch_memory(module: nn.Module, config: Config, device: str, micro_batch: int) -> PassMemory:
    """`pass_memory` of a training micro-batch on a device of the kind `device`; call inside `without_memory`."""
    half = config.engine.precision != "fp32"
    encoder = encoder_of(module)
    with ExitStack() as stack:
        if device == "cuda":
            _fuse_attention(encoder)
            stack.enter_context(_sequential_as_on_gpus())
            if half:
                stack.enter_context(_norms_in_fp32(module))
        inputs = _input_maker(config, encoder, isinstance(module, SimMIM))
        memory = pass_memory(module, inputs, min(micro_batch, MEASURED_SAMPLES), bf16=half)
        if micro_batch > MEASURED_SAMPLES:
            one_less = pass_memory(module, inputs, MEASURED_SAMPLES - 1, bf16=half)
            further = micro_batch - MEASURED_SAMPLES
            memory = PassMemory(*(now + further * (now - less) for now, less in zip(memory, one_less, strict=True)))
    return memory


def encoder_of(module: nn.Module) -> SwinV2:
    """The SwinV2 in a task's module."""
    return module.encoder if isinstance(module, SimMIM) else module  # type: ignore[return-value]  # the other is one


def _input_maker(config: Config, encoder: SwinV2, masked: bool) -> Callable[[int], tuple[Tensor, ...]]:
    """A function from a number of samples to the module's arguments: pixels, and masks if `masked`."""
    frames = () if encoder.frames is None else (encoder.frames,)
    cells = mask_cells((*frames, *encoder.image_size), config.mask.unit, len(encoder.patch_size)) if masked else ()

    def inputs(batch: int) -> tuple[Tensor, ...]:
        pixels = torch.empty(batch, 3, *frames, *encoder.image_size)
        return (pixels, torch.zeros(batch, *cells, dtype=torch.bool)) if masked else (pixels,)

    return inputs


@contextmanager
def without_memory(module: nn.Module) -> Iterator[None]:
    """Inside, new tensors have shapes but no bytes, and so have the weights of `module`, built on the meta device.

    The fake weights claim to be on the CPU: autocast and attention backends act by device, and know no meta device.
    """
    with FakeTensorMode():
        for part in module.modules():
            for name, parameter in part.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, device="cpu")
                setattr(part, name, nn.Parameter(fake, requires_grad=parameter.requires_grad))
        module.train()
        yield


@contextmanager
def _norms_in_fp32(module: nn.Module) -> Iterator[None]:
    """Inside, LayerNorms get fp32 inputs, as autocast does it on GPUs but not on CPUs."""

    def widen(norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(argument.float() for argument in arguments)

    norms = [part for part in module.modules() if isinstance(part, nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(widen) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def forward_giga_macs(module: nn.Module, config: Config) -> float:
    """Multiply-accumulates of one sample's forward pass, in 10^9; call inside `without_memory`."""
    inputs = _input_maker(config, encoder_of(module), isinstance(module, SimMIM))
    return count_forward_flops(module, *inputs(1)) / 2e9


def _stage_grids(encoder: SwinV2) -> Iterator[tuple[int, ...]]:
    """The grid of every stage, tokens per axis."""
    pixels = encoder.image_size if encoder.frames is None else (encoder.frames, *encoder.image_size)
    grid = tuple(math.ceil(size / patch) for size, patch in zip(pixels, encoder.patch_size, strict=True))
    for _ in encoder.depths:
        yield grid
        grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))  # merging leaves T alone


def choose_backends(encoder: SwinV2, device: str) -> tuple[str, ...]:
    """The attention backend of each stage on the planned device, which need not exist here; written into the blocks.

    `auto` would otherwise be decided by the device of the fake tensors.
    """
    chosen = []
    for stage, grid in zip(encoder.stages(), _stage_grids(encoder), strict=True):
        backend = encoder.attention
        if backend == "auto":
            window_tokens = math.prod(shrink_window(encoder.window, grid)[0])
            with torch.enable_grad():  # the choice differs between training and inference
                backend = auto_backend(torch.device(device), window_tokens)  # type: ignore[assignment]  # one of the literals
        for block in stage.blocks:
            block.attn.attention = backend  # type: ignore[union-attr]  # torch types members as Module
        chosen.append(str(backend))
    return tuple(chosen)
