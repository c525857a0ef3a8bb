"""The memory of a forward and backward pass, measured by running it on tensors that have shapes but no memory.

The model runs under torch's FakeTensorMode, operator by operator, and every storage that an operator would allocate is
counted from its creation to its release. This includes activations kept for the backward pass, gradients, temporaries
and recomputation by activation checkpointing, without a formula for any of them.

Fake tensors claim to be on the CPU, so where a GPU would take another path (fused attention, LayerNorm in fp32, larger
pieces of sequential attention), a context in this file makes the CPU path behave like it.

Letters: B batch, W windows, N tokens in a window, G heads, D channels of a head.
"""

from __future__ import annotations

import functools
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
from video_swinv2.distributed.devices import computing_precision
from video_swinv2.models import sequential
from video_swinv2.models.attention import auto_backend
from video_swinv2.models.simmim import SimMIM, mask_cells
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import shrink_window
from video_swinv2.training.flops import count_forward_flops

MEASURED_SAMPLES = 4  # the largest batch that is run; each sample beyond it takes the same number of bytes


class PassMemory(NamedTuple):
    """Peak bytes of a forward and backward pass, not counting the weights."""

    activations: int
    """Without the gradients of the weights, for engines that move each gradient away as soon as it is computed."""
    together: int
    """With the gradients of the weights. Activations are freed as gradients appear, so it is less than the sum."""


class Allocations(TorchDispatchMode):
    """Counts the bytes of live storages that are created inside, of real and of fake tensors.

    `now` is the current number of bytes and `peak` the largest so far. `peak_without_kept` leaves out the tensors that
    were passed to `keep`. The storages of `known` tensors are not counted. Memory that an operator allocates and frees
    internally is invisible here.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.kept = self.peak_without_kept = 0
        # Storages and not tensors, because a view shares the storage of its base. Weak references, so that counting
        # does not keep anything alive.
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = None

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, then count the storages of its outputs that have not been seen before."""
        out = function(*arguments, **(keywords or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen[storage] = None
                self.now += storage.nbytes()
                # Runs when the last tensor on this storage is gone, just as the memory would be released.
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        self.peak_without_kept = max(self.peak_without_kept, self.now - self.kept)
        return out

    def keep(self, tensor: Tensor) -> None:
        """Leave a tensor that stays alive, such as a gradient, out of `peak_without_kept` from now on."""
        self.kept += tensor.untyped_storage().nbytes()

    def _free(self, byte_count: int) -> None:
        self.now -= byte_count


class _FusedAttention(TorchFunctionMode):
    """Makes scaled_dot_product_attention use the fused kernel of GPUs, which keeps no logits for the backward pass.

    torch chooses the kernel by the device of the tensors, and fake tensors claim to be on the CPU. Its kernel there
    allocates other amounts of memory.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        """Replace scaled_dot_product_attention, and run everything else unchanged."""
        if function is not F.scaled_dot_product_attention:
            return function(*arguments, **(keywords or {}))
        q, k, v, *rest = arguments  # (B, G, N, D) each
        bias = rest[0] if rest else (keywords or {})["attn_mask"]
        # (1, G, N, N) or (B, G, N, N) -> (B, G, N, N), which the kernel requires; expanding allocates nothing.
        bias = bias.expand(*q.shape[:2], q.shape[2], k.shape[2]) if q.ndim == 4 else bias
        # True: also return the log-sum-exp (B, G, N), which the backward pass needs and which so stays allocated.
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=1.0)[0]


def _fuse_attention(encoder: SwinV2) -> None:
    """Make the forward pass of each attention layer run under _FusedAttention.

    Each layer enters the mode itself. One mode around the whole forward pass would not be enough: a block that is
    recomputed in the backward pass runs outside of the modes that were active in the forward pass.
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
    """Inside, the sequential backend takes as many windows at once as on a GPU."""
    before = sequential.CPU_PIECE
    sequential.CPU_PIECE = sequential.PIECE_LIMIT
    try:
        yield
    finally:
        sequential.CPU_PIECE = before


@contextmanager
def _first_and_last_pieces() -> Iterator[None]:
    """Inside, sequential attention computes the first and the last of its pieces only.

    The others take no more memory: results are written to tensors that exist before, and of the windows of a sample the
    last ones are divided, if any, and need a mask. All pieces of a clip would be thousands of fake operations.
    """
    every = sequential._slices

    def ends(total: int, at_once: int) -> Iterator[slice]:
        slices = list(every(total, at_once))
        return iter(slices if len(slices) < 3 else (slices[0], slices[-1]))

    sequential._slices = ends
    try:
        yield
    finally:
        sequential._slices = every


def pass_memory(
    module: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], batch: int, *, bf16: bool
) -> PassMemory:
    """Peak bytes of a forward and backward pass of `batch` samples, on real or fake tensors.

    inputs: a function from a number of samples to the module's arguments. The arguments count as activations. The
    gradients of the module's parameters are None afterwards.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    with Allocations(module.parameters()) as allocations:
        # Called as soon as the gradient of a parameter is complete.
        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda it: allocations.keep(it.grad)) for parameter in trained
        ]
        try:
            arguments = inputs(batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):  # as the engines do
                out = module(*arguments)
            # Any scalar made from the output can stand for the loss.
            out.float().square().mean().backward()
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
    return PassMemory(allocations.peak_without_kept, allocations.peak)


def micro_batch_memory(module: nn.Module, config: Config, device: str) -> Callable[[int], PassMemory]:
    """A function from a number of samples to the `pass_memory` of such a micro-batch in training.

    As on a device of type `device`; call both inside `without_memory`. The function runs each size at most once.
    """
    precision = config.engine.precision
    # A GPU that is only planned for cannot be asked; those that people train on have bf16.
    half = precision != "fp32" if device == "cuda" else computing_precision(precision, torch.device(device)) != "fp32"
    encoder = encoder_of(module)
    inputs = _input_maker(config, encoder, isinstance(module, SimMIM))
    if device == "cuda":
        _fuse_attention(encoder)

    @functools.cache
    def run(samples: int) -> PassMemory:
        with ExitStack() as stack:
            stack.enter_context(_first_and_last_pieces())
            if device == "cuda":
                stack.enter_context(_sequential_as_on_gpus())
                if half:
                    stack.enter_context(_norms_in_fp32(module))
            return pass_memory(module, inputs, samples, bf16=half)

    def memory(micro_batch: int) -> PassMemory:
        most = run(min(micro_batch, MEASURED_SAMPLES))
        further = micro_batch - MEASURED_SAMPLES
        if further <= 0:
            return most
        # Memory grows linearly from here on, so the difference to one sample less is what a further sample takes.
        one_less = run(MEASURED_SAMPLES - 1)
        return PassMemory(*(now + further * (now - less) for now, less in zip(most, one_less, strict=True)))

    return memory


def encoder_of(module: nn.Module) -> SwinV2:
    """The SwinV2 in a task's module: the encoder of SimMIM, or the module itself."""
    return module.encoder if isinstance(module, SimMIM) else module  # type: ignore[return-value]  # the other is one


def _input_maker(config: Config, encoder: SwinV2, masked: bool) -> Callable[[int], tuple[Tensor, ...]]:
    """A function from a number of samples to the module's arguments: pixels, and masks for SimMIM (`masked`)."""
    frames = () if encoder.frames is None else (encoder.frames,)
    cells = mask_cells((*frames, *encoder.image_size), config.mask.unit, len(encoder.patch_size)) if masked else ()

    def inputs(batch: int) -> tuple[Tensor, ...]:
        pixels = torch.empty(batch, 3, *frames, *encoder.image_size)
        return (pixels, torch.zeros(batch, *cells, dtype=torch.bool)) if masked else (pixels,)

    return inputs


@contextmanager
def without_memory(module: nn.Module) -> Iterator[None]:
    """Inside, new tensors have shapes but no memory, and the weights of `module` are replaced by such tensors.

    `module` has to be built on the meta device. Meta tensors themselves would not do, because autocast and the
    attention backends depend on the device and do not support that one; fake tensors claim to be on the CPU.
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
    """Inside, every LayerNorm gets fp32 inputs. Autocast casts them on GPUs, but not on CPUs."""

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
    """Multiply-accumulates of one sample's forward pass, in 10^9 (GMAC); call inside `without_memory`."""
    inputs = _input_maker(config, encoder_of(module), isinstance(module, SimMIM))
    return count_forward_flops(module, *inputs(1)) / 2e9  # two operations per multiply-accumulate


def _stage_grids(encoder: SwinV2) -> Iterator[tuple[int, ...]]:
    """The grid of each stage: tokens per axis, (H, W) or (T, H, W)."""
    pixels = encoder.image_size if encoder.frames is None else (encoder.frames, *encoder.image_size)
    grid = tuple(math.ceil(size / patch) for size, patch in zip(pixels, encoder.patch_size, strict=True))
    for _ in encoder.depths:
        yield grid
        grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))  # patch merging does not change T


def choose_backends(encoder: SwinV2, device: str) -> tuple[str, ...]:
    """Decide the attention backend of each stage for the planned device, and write it into the stage's blocks.

    The device need not exist on this machine. Left as `auto`, the backend would be chosen in each pass by the device of
    the fake tensors, which is always the CPU.
    """
    chosen = []
    for stage, grid in zip(encoder.stages(), _stage_grids(encoder), strict=True):
        backend = encoder.attention
        if backend == "auto":
            window_tokens = math.prod(shrink_window(encoder.window, grid)[0])
            with torch.enable_grad():  # `auto` means other backends in inference
                backend = auto_backend(torch.device(device), window_tokens)  # type: ignore[assignment]  # one of the literals
        for block in stage.blocks:
            block.attn.attention = backend  # type: ignore[union-attr]  # torch types members as Module
        chosen.append(str(backend))
    return tuple(chosen)
