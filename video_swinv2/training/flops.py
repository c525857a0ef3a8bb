"""Floating-point operations of a model: a formula for models in training, torch's counter for everything else.

A multiply-accumulate (MAC) counts as two floating-point operations (FLOPs). Only matrix products and convolutions are
counted, as in the tables of papers: softmax, GELU and LayerNorm take time, but few operations.

Letters: C channels, N tokens in a window, H W rows and columns of the token grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from video_swinv2.models.attention import WindowAttention
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.windows import shrink_window


def count_forward_flops(module: nn.Module, *inputs: Any) -> int:
    """Floating-point operations of one forward pass, counted by torch's FlopCounterMode.

    The module is run once. On the meta device or on fake tensors this takes neither memory nor much time. The networks
    that compute the position bias (log-CPB) are counted too, once per call whatever the batch.
    """
    with _eager_attention(module), torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(*inputs)
    return int(counter.get_total_flops())


@contextmanager
def _eager_attention(module: nn.Module) -> Iterator[None]:
    """Inside, attention runs as plain matrix products, because the counter does not know every fused kernel."""
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

    The backward pass takes twice as many as the forward pass, once for the gradients of the weights and once for those
    of the inputs; frozen stages have no backward pass. Recomputation by activation checkpointing is not counted, which
    is the convention for model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B).
    """
    forward = forward_macs(encoder, pretraining)
    frozen = sum(forward[: frozen_stages + 1]) if frozen_stages else 0.0  # the patch embedding freezes with stage 1
    # Forward and backward are 3 times the forward pass, minus the 2 of the frozen parts; 2 operations per MAC.
    return 2 * (3 * sum(forward) - 2 * frozen)


def forward_macs(encoder: SwinV2, pretraining: bool = False) -> list[float]:
    """Multiply-accumulates of one sample's forward pass, part by part, from a formula.

    The parts are the patch embedding, each stage including its patch merging, and the head or SimMIM's decoder.

    Two reasons for a formula instead of the counter: a model in training may be partitioned (ZeRO-3) and cannot simply
    be run once more, and the log-CPB networks have to be left out, because they run once per micro-batch and not once
    per sample. tests/training/test_throughput.py checks that formula and counter agree exactly.
    """
    pixels = encoder.image_size if encoder.frames is None else (encoder.frames, *encoder.image_size)
    patch = encoder.patch_size
    grid = tuple(math.ceil(size / side) for size, side in zip(pixels, patch, strict=True))
    # The patch embedding is a convolution without overlap: 3 * prod(patch) inputs and C outputs for each token.
    macs_of_parts = [math.prod(grid) * 3.0 * math.prod(patch) * encoder.embed_dim]
    for stage, depth in enumerate(encoder.depths):
        dim, window = encoder.embed_dim * 2**stage, shrink_window(encoder.window, grid)[0]
        tokens, in_window = math.prod(grid), math.prod(window)
        # Attention runs on a grid that is padded to whole windows, the MLP on the tokens without padding.
        padded = math.prod(math.ceil(size / side) * side for size, side in zip(grid, window, strict=True))
        # Per token and block: 4 C^2 for the query, key, value and output projections, 2 N C for the logits and the
        # weighted sum of values over the N tokens of a window, 8 C^2 for the two layers of the MLP, 4 C wide.
        macs = depth * (4.0 * padded * dim**2 + 2.0 * padded * in_window * dim + 8.0 * tokens * dim**2)
        if stage < len(encoder.depths) - 1:
            # Patch merging halves H and W but not T, and maps 4 C to 2 C channels: 8 C^2 per merged token.
            grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))
            macs += math.prod(grid) * 8.0 * dim**2
        macs_of_parts.append(macs)
    # SimMIM's decoder predicts, from each token of the last stage, the 3 channels of all pixels under this token. Every
    # merging before it doubled the height and width that a token covers. The head sees only the mean of all tokens.
    outputs = 3 * math.prod(patch) * 4 ** (len(encoder.depths) - 1) * math.prod(grid)
    return [*macs_of_parts, float(encoder.num_features * (outputs if pretraining else encoder.num_classes))]
