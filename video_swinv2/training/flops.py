"""How many operations a model takes: a formula for a running training, torch's counter for everything else.

One multiply-accumulate is two floating-point operations. Only matrix products and convolutions count, as in the tables
of papers: softmax, GELU and LayerNorm cost time, but hardly any operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from video_swinv2.models.attention import WindowAttention
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import shrink_window


def count_forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """Floating-point operations of one forward pass, counted by torch's FlopCounterMode.

    Runs the module; on the meta device or on fake tensors that costs neither memory nor time. The log-CPB networks are
    counted too, once per call.
    """
    with _eager_attention(module), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())


@contextmanager
def _eager_attention(module: nn.Module) -> Iterator[None]:
    """Inside, attention is written out as matrix products: the counter does not know every fused kernel."""
    layers = [part for part in module.modules() if isinstance(part, WindowAttention)]
    backends = [layer.attention for layer in layers]
    for layer in layers:
        layer.attention = "eager"
    try:
        yield
    finally:
        for layer, backend in zip(layers, backends, strict=True):
            layer.attention = backend


def training_flops(encoder: SwinV2, *, frozen_stages: int = 0, pretraining: bool = False) -> float:
    """Floating-point operations of one sample's forward and backward pass.

    The backward pass takes twice the forward pass (the gradients of weights and of inputs), and nothing in frozen
    stages. Recomputation by activation checkpointing is not counted, as is usual for model FLOPs utilisation (PaLM,
    arXiv 2204.02311, appendix B).
    """
    forward = forward_macs(encoder, pretraining)
    frozen = sum(forward[: frozen_stages + 1]) if frozen_stages else 0.0  # the patch embedding freezes with stage 1
    return 2 * (3 * sum(forward) - 2 * frozen)


def forward_macs(encoder: SwinV2, pretraining: bool = False) -> list[float]:
    """Multiply-accumulates of one sample: patch embedding, each stage with its merging, head or SimMIM's decoder.

    A formula beside the counter for two reasons. The model of a running training may be partitioned (ZeRO-3), so that
    it cannot simply be run once more; and its log-CPB networks run once per micro-batch, not once per sample, so they
    are left out here. tests/training/test_throughput.py compares the formula with the counter, to the operation.
    """
    pixels = encoder.image_size if encoder.frames is None else (encoder.frames, *encoder.image_size)
    patch = encoder.patch_size
    grid = tuple(math.ceil(size / side) for size, side in zip(pixels, patch, strict=True))
    macs_of_parts = [math.prod(grid) * 3.0 * math.prod(patch) * encoder.embed_dim]
    for stage, depth in enumerate(encoder.depths):
        dim, window = encoder.embed_dim * 2**stage, shrink_window(encoder.window, grid)[0]
        tokens, in_window = math.prod(grid), math.prod(window)
        # Attention works on a grid padded to whole windows, the MLP on the tokens alone.
        padded = math.prod(math.ceil(size / side) * side for size, side in zip(grid, window, strict=True))
        # Per block: q, k, v and the projection, 4 C^2 per token; logits and weighted values, 2 N C per token for N
        # tokens in a window; the MLP with its four-fold width, 8 C^2 per token.
        macs = depth * (4.0 * padded * dim**2 + 2.0 * padded * in_window * dim + 8.0 * tokens * dim**2)
        if stage < len(encoder.depths) - 1:
            # Patch merging halves H and W, never T, and maps 4 C to 2 C channels.
            grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))
            macs += math.prod(grid) * 8.0 * dim**2
        macs_of_parts.append(macs)
    # SimMIM's decoder predicts every pixel under each of the last stage's tokens; a head works on their mean.
    outputs = 3 * math.prod(patch) * 4 ** (len(encoder.depths) - 1) * math.prod(grid)
    return [*macs_of_parts, float(encoder.num_features * (outputs if pretraining else encoder.num_classes))]
