"""Log-spaced continuous position bias (log-CPB) over offsets of any number of axes.

SwinV2 (arXiv 2111.09883) section 3.3, with the constants of the released weights: offsets are scaled to 8, the
logarithm is base 2 over 3, and the bias is 16 * sigmoid(MLP). Letters: N tokens in a window, G heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def offsets(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Every (query - key) offset inside a window, row-major: (prod(2w - 1), axes) float32, from -(w - 1) to w - 1."""
    ranges = [torch.arange(1 - w, w, dtype=torch.float32, device=device) for w in window]
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).reshape(-1, len(window))


def log_coordinates(offset: Tensor, norm: Sequence[int]) -> Tensor:
    """Offsets in tokens (..., axes) -> the coordinates that the bias MLP sees.

    Per axis u = 8 d / max(norm - 1, 1), then sign(u) log2(1 + |u|) / 3. `norm` is the window that the weights were
    trained with, not the one in use: it belongs to the weights (an axis of norm 1 would divide by zero, hence max).
    """
    scale = torch.tensor([8.0 / max(n - 1, 1) for n in norm], dtype=offset.dtype, device=offset.device)
    scaled = offset * scale
    return scaled.sign() * torch.log2(1 + scaled.abs()) / 3


def pair_index(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """(N, N) int64: the row of `offsets` that belongs to (query, key)."""
    ranges = [torch.arange(w, device=device) for w in window]
    tokens = torch.stack(torch.meshgrid(*ranges, indexing="ij")).flatten(1)
    index = torch.zeros(math.prod(window), math.prod(window), dtype=torch.int64, device=device)
    for position, w in zip(tokens, window, strict=True):
        index = index * (2 * w - 1) + (position[:, None] - position[None, :] + w - 1)
    return index


def position_bias(mlp: torch.nn.Module, window: Sequence[int], norm: Sequence[int], device: torch.device) -> Tensor:
    """(G, N, N) bias in fp32 or wider, 16 * sigmoid(mlp(log coordinates)), for one window shape.

    The MLP runs once per distinct offset, not per pair, and outside autocast: its output is multiplied by 16, which
    would magnify the rounding of half precision.
    """
    dtype = next(mlp.parameters()).dtype
    with torch.autocast(device.type, enabled=False):
        table = mlp(log_coordinates(offsets(window, device), norm).to(dtype))
        table = 16 * torch.sigmoid(table.to(torch.promote_types(dtype, torch.float32)))
    return table.t()[:, pair_index(window, device)]
