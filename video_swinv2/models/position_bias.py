"""Log-spaced continuous position bias (log-CPB) for windows with any number of axes.

The source is SwinV2 (arXiv 2111.09883), section 3.3, with the constants of the released weights: offsets are scaled to
the range -8..8, the logarithm is log2(1 + |u|) / 3, and the bias is 16 * sigmoid(MLP).

Letters: N tokens in a window, G heads, R offsets in a window, which is the product of 2w - 1 over its axes.

The bias of a pair of tokens depends only on the offset between them, and there are far fewer offsets than pairs. A
window of (8, 7, 7) has R = 15 * 13 * 13 = 2,535 offsets and N^2 = 392^2 = 153,664 pairs. The bias is therefore computed
once per offset (`bias_table`, G x R) and then copied to all pairs (`expand_table`, G x N x N) or looked up for each
(`token_codes`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def window_offsets(window: Sequence[int], device: torch.device | None = None) -> Tensor:
    """All offsets (query minus key) in a window, in row-major order: (R, axes) float32, each from -(w - 1) to w - 1."""
    ranges = [torch.arange(1 - w, w, dtype=torch.float32, device=device) for w in window]
    # 2-D: two grids (2h - 1, 2w - 1), stacked to (2h - 1, 2w - 1, 2), flattened to (R, 2)
    return torch.stack(torch.meshgrid(*ranges, indexing="ij"), dim=-1).reshape(-1, len(window))


def log_coordinates(offset: Tensor, norm: Sequence[int]) -> Tensor:
    """Offsets in tokens (..., axes) -> the log-spaced coordinates that the bias MLP takes.

    For an offset d along one axis, u = 8 d / max(norm - 1, 1), and the coordinate is sign(u) log2(1 + |u|) / 3. The
    maximum avoids a division by zero for an axis of norm 1, whose only offset is 0. `norm` is the window that the
    weights were trained with. It belongs to the weights and may differ from the window in use.
    """
    # Axis by axis with Python numbers: a tensor of them would be copied to the GPU, and each block would wait for that.
    axes = zip(offset.unbind(-1), norm, strict=True)
    scaled = torch.stack([axis * (8.0 / max(n - 1, 1)) for axis, n in axes], dim=-1)
    # The divisor 3 is log2(8), as in Microsoft's code.
    return scaled.sign() * torch.log2(1 + scaled.abs()) / 3


class NarrowLinear(nn.Linear):
    """A Linear for very few inputs, such as coordinates. Same results, but the weight's gradient is 14 times as fast.

    Autograd computes the gradient of a weight in the memory layout that the weight had in the forward product. In the
    layout that nn.Linear uses, the result of that product has only two or three columns, which is the worst case for a
    CPU's BLAS and costs 1 % of a training step. The transposed copy gives two or three rows instead.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmm(self.bias, input, self.weight.t().contiguous())


def window_coordinates(window: Sequence[int], norm: Sequence[int], device: torch.device) -> Tensor:
    """(R, axes) float32: the log-spaced coordinates of every row of `window_offsets(window)`."""
    return log_coordinates(window_offsets(window, device), norm)


def bias_table(mlp: nn.Module, coordinates: Tensor) -> Tensor:
    """(G, R): 16 * sigmoid(mlp(coordinates)) for the `window_coordinates` (R, axes), in fp32 or wider.

    It is computed outside autocast, because the factor of 16 would magnify the rounding errors of half precision.
    """
    dtype = next(mlp.parameters()).dtype
    with without_autocast(coordinates.device):
        # (R, axes) -> (R, 512) -> (R, G)
        table = mlp(coordinates.to(dtype))
        table = 16 * torch.sigmoid(table.to(torch.promote_types(dtype, torch.float32)))
    return table.t()


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast. The meta device, which only tracks shapes, has no autocast to switch off."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def token_codes(window: Sequence[int], device: torch.device | None = None) -> tuple[Tensor, int]:
    """Codes (N,) int64 and a constant: the pair of query i and key j has entry code[i] - code[j] + constant of R.

    The code of a token is its position in the window, read as a number with one digit per axis. The digit of an axis
    of length w has base 2w - 1, the number of offsets along it, so that differences of digits never overlap. In 2-D,
    the token (y, x) of a window (h, w) has the code y * (2w - 1) + x. The constant is the entry of the offset (0, 0),
    which is (h - 1) * (2w - 1) + (w - 1).
    """
    # Horner's scheme, one axis at a time: () -> (T,) -> (T * H,) -> (T * H * W,)
    code = torch.zeros((), dtype=torch.int64, device=device)
    constant = 0
    for w in window:
        code = (code[..., None] * (2 * w - 1) + torch.arange(w, device=device)).flatten()
        constant = constant * (2 * w - 1) + w - 1
    return code, constant


def expand_table(table: Tensor, window: Sequence[int]) -> Tensor:
    """Expand the bias of every offset to the bias of every pair of tokens: (G, R) -> (G, N, N), query first.

    Along one axis, the bias of a pair depends only on i - j, so the row of query i is a slice of the reversed table.
    For w = 3 the table holds the offsets -2 -1 0 1 2. Reversed, they are 2 1 0 -1 -2, and

        query 0   needs  0 -1 -2   the slice that starts at position 2
        query 1   needs  1  0 -1   the slice that starts at position 1
        query 2   needs  2  1  0   the slice that starts at position 0

    The usual alternative, a gather, needs an index tensor as large as the bias itself.
    """
    expanded: Tensor = _Expand.apply(table, tuple(window)) if table.is_cuda else _expand_axes(table, window)
    return expanded


def reduce_to_table(grad: Tensor, window: Sequence[int]) -> Tensor:
    """The transpose of `expand_table`, for its backward pass: (G, N, N) gradients of pairs -> (G, R) of the table.

    It sums the gradients of all copies that `expand_table` made of an entry, in fp32 or wider.
    """
    return _reduce_skewed(grad, window) if grad.is_cuda else _reduce_axes(grad, window)


def _expand_axes(table: Tensor, window: Sequence[int]) -> Tensor:
    """For CPUs: the axes one after another, starting with the last, in copies of whole slices.

    The slices are of blocks that grow with each axis, so that this takes a third of the time of `_expand_strided`.
    """
    # 2-D: (G, R) -> (G, 2h - 1, 2w - 1, 1, 1) -> (G, 2h - 1, w, w) -> (G, h * w, h * w). The last two axes always hold
    # the queries and keys of the axes that are already expanded, n of each.
    x = table.reshape(-1, *(2 * w - 1 for w in window), 1, 1)
    for axis in range(len(window), 0, -1):
        w, tokens = window[axis - 1], x.shape[-1]
        reverse = x.flip(axis)
        # For each query i of this axis, slice its w keys and move them next to the keys of the expanded axes:
        # (G, ..., w, n, n) -> (G, ..., n, w, n)
        rows = [reverse.narrow(axis, w - 1 - i, w).transpose(axis, -2) for i in range(w)]
        # Stack the queries: (G, ..., w, n, w, n) -> (G, ..., w * n, w * n)
        x = torch.stack(rows, dim=axis).reshape(*x.shape[:axis], w * tokens, w * tokens)
    return x


def _reduce_axes(grad: Tensor, window: Sequence[int]) -> Tensor:
    """For CPUs: the transpose of `_expand_axes`, starting with the first axis."""
    x = grad
    for axis, w in enumerate(window, start=1):
        tokens = x.shape[-1] // w
        # (G, ..., w * n, w * n) -> (G, ..., w, n, w, n)
        x = x.reshape(*x.shape[:axis], w, tokens, w, tokens)
        reverse = x.new_zeros(*x.shape[:axis], 2 * w - 1, tokens, tokens)
        for i in range(w):
            # Query i was copied from the slice at w - 1 - i of the reversed table, so its gradients go there.
            reverse.narrow(axis, w - 1 - i, w).add_(x.select(axis, i).transpose(axis, -2))
        x = reverse.flip(axis)
    return x.flatten(1)


class _Expand(torch.autograd.Function):
    """`expand_table` for GPUs, where the small copies of `_expand_axes` would cost more to start than to run."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, window: tuple[int, ...]) -> Tensor:
        ctx.window, ctx.dtype = window, table.dtype
        return _expand_strided(table, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce_to_table(grad, ctx.window).to(ctx.dtype), None


def _expand_strided(table: Tensor, window: Sequence[int]) -> Tensor:
    """All axes in a single copy.

    With the keys counted from the last one, j' = w - 1 - j, the entry of a pair is i - j + w - 1 = i + j'. So i and j'
    have the same stride in the table, and a view of it holds every pair.
    """
    axes = range(len(window))
    strides = [math.prod(2 * w - 1 for w in window[axis + 1 :]) for axis in axes]
    # 2-D: (G, R) -> (G, h, w, h, w), and the last two axes turned round
    pairs = table.contiguous().as_strided((len(table), *window, *window), (table.shape[1], *strides, *strides))
    tokens = math.prod(window)
    return pairs.flip([1 + len(window) + axis for axis in axes]).reshape(-1, tokens, tokens)


def _reduce_skewed(grad: Tensor, window: Sequence[int]) -> Tensor:
    """The transpose of `_expand_strided`: for each axis the sums over all pairs with the same i + j'."""
    axes = range(len(window))
    # 2-D: (G, N, N) -> (G, h, w, h, w), the keys counted from the last one
    x = grad.reshape(len(grad), *window, *window).flip([1 + len(window) + axis for axis in axes])
    wide = torch.promote_types(grad.dtype, torch.float32)
    for done, w in enumerate(window):
        # The queries and keys of the first axis that is left move to the end: (G, ..., w, w)
        x = x.movedim((1, 1 + len(window) - done), (-2, -1))
        # Rows of 2w numbers, read as rows of 2w - 1, begin one place later in each row, which is i + j' as a column.
        skewed = F.pad(x, (0, w)).flatten(-2)[..., : w * (2 * w - 1)].unflatten(-1, (w, 2 * w - 1))
        x = skewed.sum(dim=-2, dtype=wide)
    return x.flatten(1)
