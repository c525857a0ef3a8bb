"""Log-spaced continuous position bias (log-CPB) over offsets of any number of axes.

SwinV2 (arXiv 2111.09883) section 3.3, with the constants of the released weights: offsets are scaled to 8, the
logarithm is base 2 over 3, and the bias is 16 * sigmoid(MLP). Letters: N tokens in a window, G heads, R offsets in a
window, prod(2w - 1) over its axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def offsets(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Every (query - key) offset inside a window, row-major: (R, axes) float32, from -(w - 1) to w - 1."""
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


class NarrowLinear(nn.Linear):
    """A Linear of very few inputs, such as coordinates. The same numbers; the gradient's product is 14 times as fast.

    Autograd forms the weight's gradient in the layout in which the weight entered the product. As it is stored that
    means a product whose result is three columns wide, the worst case of a CPU's BLAS: 1 % of a training step.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmm(self.bias, input, self.weight.t().contiguous())


def bias_table(mlp: nn.Module, window: Sequence[int], norm: Sequence[int], device: torch.device) -> Tensor:
    """(G, R): 16 * sigmoid(mlp(log coordinates)) for every offset of `offsets(window)`, in fp32 or wider.

    Outside autocast: the MLP's output is multiplied by 16, which would magnify the rounding of half precision.
    """
    dtype = next(mlp.parameters()).dtype
    with without_autocast(device):
        table = mlp(log_coordinates(offsets(window, device), norm).to(dtype))
        table = 16 * torch.sigmoid(table.to(torch.promote_types(dtype, torch.float32)))
    return table.t()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A region of full precision; the meta device, which only counts, has no autocast to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def token_codes(window: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, int]:
    """(N,) int64 and a constant: the row of `offsets` for a query i and a key j is code[i] - code[j] + constant."""
    code = torch.zeros((), dtype=torch.int64, device=device)
    constant = 0
    for w in window:
        code = (code[..., None] * (2 * w - 1) + torch.arange(w, device=device)).flatten()
        constant = constant * (2 * w - 1) + w - 1
    return code, constant


def expand(table: Tensor, window: Sequence[int]) -> Tensor:
    """(G, R) -> the bias of every pair (G, N, N), query first.

    Along an axis the bias of a pair depends on i - j alone, so row i is a slice of the reversed table; axis by axis,
    the last first, slices of ever larger blocks are copied. No index is needed, which would be as large as the bias.
    """
    x = table.reshape(-1, *(2 * w - 1 for w in window), 1, 1)
    for axis in range(len(window), 0, -1):
        w, tokens = window[axis - 1], x.shape[-1]
        reverse = x.flip(axis)
        # (G, ..., w, n, n) for query i -> (G, ..., n, w, n): the axis's keys beside the keys there are
        rows = [reverse.narrow(axis, w - 1 - i, w).transpose(axis, -2) for i in range(w)]
        x = torch.stack(rows, dim=axis).reshape(*x.shape[:axis], w * tokens, w * tokens)
    return x


def collapse(grad: Tensor, window: Sequence[int]) -> Tensor:
    """The transpose of `expand`: gradients of the bias of every pair (G, N, N) -> those of the table (G, R)."""
    x = grad
    for axis, w in enumerate(window, start=1):
        tokens = x.shape[-1] // w
        x = x.reshape(*x.shape[:axis], w, tokens, w, tokens)
        reverse = x.new_zeros(*x.shape[:axis], 2 * w - 1, tokens, tokens)
        for i in range(w):
            reverse.narrow(axis, w - 1 - i, w).add_(x.select(axis, i).transpose(axis, -2))
        x = reverse.flip(axis)
    return x.flatten(1)
