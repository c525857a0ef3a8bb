"""Attention computed for a few windows and heads at a time: the sequential self-attention of SwinV2 (section 3.5).

Letters: M windows of all samples, W windows of one sample, N tokens in a window, G heads, D channels of a head, R
offsets in a window. A *piece* is what is computed at once, m windows and g heads.

Logits exist for one piece at a time, so memory does not grow with the number of windows. On CPUs a piece fits into the
cache, which makes this the fastest backend there. Two nested loops do the work:

    for each group of heads whose bias (g, N, N) fits into the memory allowed       (nearly always one group)
        expand the bias table of these heads
        for each piece of m windows and g heads
            forward:   attention weights P = softmax(q k^T + bias + mask);  out = P v
            backward:  recompute P unless it was kept;  then compute the gradients of the piece

The backward pass needs P. It is recomputed from q, k and the table, except for small problems on CPUs, where the
forward pass keeps it. With O = P V and the logits L, the gradients are, as in FlashAttention (arXiv 2205.14135):

    dV = P^T dO
    dL = P * (dO V^T - rowsum(dO * O))      gradient of the softmax; rowsum(dO * O) = rowsum(dP * P), without P
    dQ = dL K,   dK = dL^T Q,   dbias = the sum of dL over all windows

q already carries the learned scale of its head, so every product here is unscaled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from video_swinv2.models.position_bias import expand_table, reduce_to_table
from video_swinv2.models.windows import WindowLayout, same_region

# These limits count logits, of 4 bytes each in fp32.
CPU_PIECE = 2**19  # per piece on a CPU: 2 MiB, about the cache of a core
CPU_KEPT = 2**23  # weights that a layer keeps on a CPU: 32 MiB; beyond this, loading them is slower than recomputing
PIECE_LIMIT = 2**27  # per piece on other devices, and for the expanded bias of a group on all devices: 512 MiB


def sequential_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """softmax(q k^T + bias) v: q (scaled), k and v (M, G, N, D), table (G, R) -> (M, G, N, D) in the dtype of v."""
    out: Tensor = _Sequential.apply(q, k, v, table, layout)
    return out


class _Sequential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
        out = _empty_like_projection(v)
        kept = _room_for_weights(q, v) if any(ctx.needs_input_grad) else None
        for group in _head_groups(q):
            # The bias lies between 0 and 16. A constant shift does not change the softmax, and values around 0 lose
            # less to rounding in half precision.
            bias = expand_table((table[group] - 8).to(v.dtype), layout.window)
            # Slices of `out` are views, so writing the result of a piece fills the output in place.
            parts = [t[:, group] for t in (q.to(v.dtype), k.to(v.dtype), v, out)]
            for windows, heads, mask in _pieces(parts[0], layout, bias.dtype):
                part_q, part_k, part_v, result = (t[windows, heads] for t in parts)
                if kept is None:
                    # A fused kernel need not write the logits to memory. q, k, v (m, g, N, D), mask (m or 1, g, N, N)
                    seen = bias[None, heads] if mask is None else bias[heads] + mask
                    result.copy_(F.scaled_dot_product_attention(part_q, part_k, part_v, seen, scale=1.0))
                else:
                    # (m, g, N, N) -> (m * g, N, N). `view` works because a piece with several windows has all heads,
                    # and the small problems whose weights are kept have a single group.
                    weights = kept[:, group][windows, heads].view(-1, *bias.shape[1:])
                    _softmax(part_q.flatten(0, 1), part_k.flatten(0, 1), bias[heads], mask, weights)
                    result.copy_((weights @ part_v.flatten(0, 1)).view_as(result))
        ctx.save_for_backward(q, k, v, table, out, *(() if kept is None else (kept,)))
        ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, table, out, *kept = ctx.saved_tensors
        grads = _empty_like_projection(q), _empty_like_projection(k), _empty_like_projection(v)
        grad_table = torch.empty_like(table)
        # rowsum(dO * O) for all pieces, at the precision of q: (M, G, N, D) -> (M, G, N, 1)
        inner = (grad.to(q.dtype) * out.to(q.dtype)).sum(dim=-1, keepdim=True)
        windows_at_once, heads_at_once = _at_once(q)
        # Two buffers, for P and dL, are reused by all pieces, since fresh memory costs a page fault for every 4 KiB.
        scratch = table.new_empty(2, windows_at_once * heads_at_once * q.shape[2] ** 2)
        for group in _head_groups(q):
            # No shift by 8 is needed: the table has the precision of q, at least fp32 (WindowAttention.forward).
            bias = expand_table(table[group], ctx.layout.window)
            grad_bias = torch.zeros_like(bias)
            parts = [t[:, group] for t in (q, k, v, grad, inner, *grads)]
            for windows, heads, mask in _pieces(parts[0], ctx.layout, bias.dtype):
                *given, grad_q, grad_k, grad_v = [t[windows, heads] for t in parts]
                # (m, g, N, D) -> (m * g, N, D), at the precision of the bias
                part_q, part_k, *others = (t.to(bias.dtype).flatten(0, 1) for t in given)
                # The last piece may be smaller, so each buffer is cut to (m * g, N, N).
                shape = (len(part_q), *bias.shape[1:])
                weights, grad_logits = (part[: math.prod(shape)].view(shape) for part in scratch)
                if kept:
                    weights = kept[0][:, group][windows, heads].view(-1, *bias.shape[1:])
                else:
                    _softmax(part_q, part_k, bias[heads], mask, weights)
                _piece_backward(
                    (part_q, part_k, *others), weights, grad_logits, (grad_q, grad_k, grad_v, grad_bias[heads])
                )
            grad_table[group] = reduce_to_table(grad_bias, ctx.layout.window)
        return *grads, grad_table, None


def _room_for_weights(q: Tensor, v: Tensor) -> Tensor | None:
    """Allocate the attention weights of all pieces, (M, G, N, N). Returns None where recomputing them is better.

    On CPUs, recomputing them takes a third of the backward pass, and small problems have memory to spare. If q and v
    differ in dtype (mixed precision), the forward pass works in that of v and the backward pass in that of q, so the
    weights of the one cannot serve the other.
    """
    total, heads, tokens, _ = q.shape
    small = total * heads * tokens**2 <= CPU_KEPT and q.device.type == "cpu" and q.dtype == v.dtype
    return q.new_empty(total, heads, tokens, tokens) if small else None


def _softmax(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, weights: Tensor) -> None:
    """Write softmax(q k^T + bias + mask) of a piece to `weights` (m * g, N, N); q, k (m * g, N, D), bias (g, N, N)."""
    heads, tokens = bias.shape[:2]
    windows = len(q) // heads
    # (g, N, N) -> (m * g, N, N), the bias repeated for every window. A single window needs no copy.
    bias = bias if windows == 1 else bias.expand(windows, -1, -1, -1).flatten(0, 1)
    torch.baddbmm(bias, q, k.transpose(1, 2), out=weights)
    if mask is not None:
        weights.view(windows, heads, tokens, tokens).add_(mask)
    torch.softmax(weights, dim=-1, out=weights)


def _piece_backward(
    given: tuple[Tensor, ...], weights: Tensor, grad_logits: Tensor, results: tuple[Tensor, ...]
) -> None:
    """Compute the gradients of one piece, with the formulas in the docstring of this module.

    given: q, k, v, dO and rowsum(dO * O) of the piece, each (m * g, N, ...). weights: P. grad_logits: a buffer that is
    overwritten with dL. results: the gradients of q, k and v, (m, g, N, D), are overwritten. That of the bias,
    (g, N, N), is added to, because it sums over the windows of all pieces.
    """
    q, k, v, grad, inner = given
    grad_bias = results[-1]
    torch.bmm(grad, v.transpose(1, 2), out=grad_logits).sub_(inner).mul_(weights)
    # (m * g, N, N) -> (m, g, N, N) -> (g, N, N), summed over the windows of the piece; m = 1 needs no sum.
    grad_bias += grad_logits if len(q) == len(grad_bias) else grad_logits.view(-1, *grad_bias.shape).sum(dim=0)
    values = (grad_logits @ k, grad_logits.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad)
    for result, value in zip(results[:3], values, strict=True):
        result.copy_(value.view_as(result))


def _head_groups(q: Tensor) -> Iterator[slice]:
    """Groups of heads whose expanded bias fits into PIECE_LIMIT; nearly always a single group with all heads."""
    heads, tokens = q.shape[1:3]
    at_once = max(1, PIECE_LIMIT // tokens**2)
    for first in range(0, heads, at_once):
        yield slice(first, first + at_once)


def _pieces(q: Tensor, layout: WindowLayout, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """For each piece: its windows, its heads, and the mask (m, 1, N, N) to add to its logits.

    The mask is None if all tokens of each window may see each other, which holds for most windows. It is a number that
    is added, because filling through a boolean mask takes five times as long on CPUs. Its values are 0 and the lowest
    number of the dtype. They are made by a multiplication, where -inf would turn the zeros into NaN.
    """
    total, heads, _, _ = q.shape
    windows_at_once, heads_at_once = _at_once(q)
    label, divided = layout.label, layout.divided
    for first in range(0, total, windows_at_once):
        # The M windows are those of one sample after another, and all samples share the layout of W windows.
        last = min(first + windows_at_once, total)
        mask = None
        if label is not None and any(divided[n % len(divided)] for n in range(first, last)):
            # Numbered on the device: a list of numbers would be copied to the GPU, and the CPU would wait for that.
            numbers = torch.arange(first, last, device=label.device) % len(divided)
            mask = (~same_region(label[numbers]))[:, None].to(dtype).mul_(torch.finfo(dtype).min)
        for head in range(0, heads, heads_at_once):
            yield slice(first, first + windows_at_once), slice(head, head + heads_at_once), mask


def _at_once(q: Tensor) -> tuple[int, int]:
    """The numbers of windows and heads in a piece of q (M, G, N, D); the last piece may have fewer.

    Heads come first: a piece has more than one window only if it has all heads.
    """
    total, heads, tokens, _ = q.shape
    budget = CPU_PIECE if q.device.type == "cpu" else PIECE_LIMIT
    heads_at_once = max(1, min(heads, budget // tokens**2))
    return max(1, min(total, budget // (heads_at_once * tokens**2))), heads_at_once


def _empty_like_projection(t: Tensor) -> Tensor:
    """An empty (M, G, N, D) tensor that is stored as (M, N, G, D).

    This is the order of the projections before and after the attention: merging the heads again, (M, N, G, D) ->
    (M, N, C), is then a view and needs no copy.
    """
    return torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
