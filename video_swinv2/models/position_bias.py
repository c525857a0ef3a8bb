"""Log-spaced continuous position bias (log-CPB) over offsets with any number of axes.

SwinV2 (arXiv 2111.09883), section 3.3, with the constants of the released weights: offsets are scaled to 8, the
logarithm is base 2 over 3, and the bias is 16 * sigmoid(MLP). Letters: N tokens in a window, G heads, R offsets in a
window, prod(2w - 1) over its axes.

Two tokens of a window get a bias that depends on their offset alone. There are far fewer offsets than pairs: for a
window of (8, 7, 7), R = 15 * 13 * 13 = 2,535 offsets and N^2 = 392^2 = 153,664 pairs. So the bias is computed per
offset (`bias_table`, G x R) and then copied to the pairs (`expand_table`, G x N x N) or looked up (`token_codes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn


def window_offsets(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Every offset query - key inside a window, in row-major order: (R, axes) float32, from -(w - 1) to w - 1."""
    ranges = [torch.arange(1 - w, w, dtype=torch.float32, device=device) for w in window]
    # 2-D: two grids (2h - 1, 2w - 1), stacked to (2h - 1, 2w - 1, 2), flattened to (R, 2)
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).reshape(-1, len(window))


def log_coordinates(offset: Tensor, norm: Sequence[int]) -> Tensor:
    """Offsets in tokens (..., axes) -> the log-spaced coordinates that the bias MLP takes.

    Per axis u = 8 d / max(norm - 1, 1), then sign(u) log2(1 + |u|) / 3. `norm` is the window the weights were trained
    with and not the window in use: it belongs to the weights. (The maximum avoids a division by zero for an axis of
    norm 1, whose only offset is 0.)
    """
    scale = torch.tensor([8.0 / max(n - 1, 1) for n in norm], dtype=offset.dtype, device=offset.device)
    scaled = offset * scale
    return scaled.sign() * torch.log2(1 + scaled.abs()) / 3


class NarrowLinear(nn.Linear):
    """A Linear with very few inputs, such as coordinates: same numbers, but the gradient's product is 14 times as fast.

    Autograd computes the weight's gradient in the layout in which the weight entered the product. With the layout it is
    stored in, that product has a result of three columns, the worst case of a CPU's BLAS: 1 % of a training step.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmm(self.bias, input, self.weight.t().contiguous())


def bias_table(mlp: nn.Module, window: Sequence[int], norm: Sequence[int], device: torch.device) -> Tensor:
    """(G, R): 16 * sigmoid(mlp(log coordinates)) for every row of `window_offsets(window)`, in fp32 or wider.

    Computed outside autocast: the output of the sigmoid is multiplied by 16, which would magnify the rounding of half
    precision.
    """
    dtype = next(mlp.parameters()).dtype
    with without_autocast(device):
        # (R, axes) -> (R, 512) -> (R, G)
        table = mlp(log_coordinates(window_offsets(window, device), norm).to(dtype))
        table = 16 * torch.sigmoid(table.to(torch.promote_types(dtype, torch.float32)))
    return table.t()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A region of full precision. The meta device, which only tracks shapes, has no autocast to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def token_codes(window: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, int]:
    """(N,) int64 and a constant: query i and key j use row code[i] - code[j] + constant of the bias table.

    The code of a token is its position read as a number with one digit per axis, in base 2w - 1 of that axis, so that
    the digits of a difference never carry. In 2-D, the token (y, x) has code y * (2w - 1) + x, and the constant, the
    row of offset (0, 0), is (h - 1) * (2w - 1) + (w - 1).
    """
    code = torch.zeros((), dtype=torch.int64, device=device)
    constant = 0
    for w in window:
        code = (code[..., None] * (2 * w - 1) + torch.arange(w, device=device)).flatten()
        constant = constant * (2 * w - 1) + w - 1
    return code, constant


def expand_table(table: Tensor, window: Sequence[int]) -> Tensor:
    """The bias of every pair from the bias of every offset: (G, R) -> (G, N, N), query first.

    Along one axis the bias of a pair depends on i - j alone, so the row of query i is a slice of the reversed table.
    For w = 3 the table holds the offsets -2 -1 0 1 2, reversed 2 1 0 -1 -2, and

        query 0   needs  0 -1 -2   the slice from 2
        query 1   needs  1  0 -1   the slice from 1
        query 2   needs  2  1  0   the slice from 0

    Axes are expanded one after the other, the last first, so what is copied are slices of ever larger blocks. No index
    is needed; it would be as large as the bias itself.
    """
    # 2-D: (G, R) -> (G, 2h - 1, 2w - 1, 1, 1); the last two axes hold the pairs of the axes that are done
    x = table.reshape(-1, *(2 * w - 1 for w in window), 1, 1)
    for axis in range(len(window), 0, -1):
        w, tokens = window[axis - 1], x.shape[-1]
        reverse = x.flip(axis)
        # For each query i of this axis: (G, ..., w, n, n) -> (G, ..., n, w, n), this axis's keys beside the other keys
        rows = [reverse.narrow(axis, w - 1 - i, w).transpose(axis, -2) for i in range(w)]
        # Stack over the queries: (G, ..., w, n, w, n) -> (G, ..., w * n, w * n)
        x = torch.stack(rows, dim=axis).reshape(*x.shape[:axis], w * tokens, w * tokens)
    return x


def reduce_to_table(grad: Tensor, window: Sequence[int]) -> Tensor:
    """The transpose of `expand_table`: gradients of the pairs' bias (G, N, N) -> gradients of the table (G, R).

    Undoes the axes in the opposite order, the first first, and adds up what `expand_table` has copied.
    """
    x = grad
    for axis, w in enumerate(window, start=1):
        tokens = x.shape[-1] // w
        # (G, ..., w * n, w * n) -> (G, ..., w, n, w, n)
        x = x.reshape(*x.shape[:axis], w, tokens, w, tokens)
        reverse = x.new_zeros(*x.shape[:axis], 2 * w - 1, tokens, tokens)
        for i in range(w):
            # The gradients of query i belong to the slice of the reversed table that it was copied from.
            reverse.narrow(axis, w - 1 - i, w).add_(x.select(axis, i).transpose(axis, -2))
        x = reverse.flip(axis)
    return x.flatten(1)
