"""Attention for a few windows and heads at a time, forward and backward: the paper's sequential self-attention (3.5).

Letters: M windows of all samples, W windows of one sample, N tokens in a window, G heads, D channels of a head, R
offsets in a window; m and g are the windows and heads of one piece.

Logits exist only for the piece at hand, so memory does not grow with the number of windows. On CPUs a piece fits the
cache, which also makes this the fastest way there. The work is nested in two loops:

    for each group of heads whose bias (g, N, N) fits the memory allowed            (nearly always one group)
        expand the bias table of these heads
        for each piece of m windows and g heads
            forward:   weights P = softmax(q k^T + bias + mask);  out = P v
            backward:  P again, unless it was kept;  then the gradients of the piece

The backward pass needs P. It is recomputed from q, k and the table, except for small problems on CPUs, where the
forward pass keeps it. With O = P V and L the logits, as in FlashAttention (arXiv 2205.14135):

    dV = P^T dO
    dL = P * (dO V^T - rowsum(dO * O))      the softmax's gradient; rowsum(dO * O) = rowsum(dP * P) needs no P
    dQ = dL K,   dK = dL^T Q,   dbias = the sum of dL over all windows
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

# All three are numbers of logits.
CPU_PIECE = 2**19  # per piece on a CPU: 2 MiB in fp32, about the cache of a core
CPU_KEPT = 2**23  # attention weights that a layer keeps on a CPU: 32 MiB; beyond, loading them is slower than computing
PIECE_LIMIT = 2**27  # per piece on other devices, and for the bias shared by several pieces: 512 MiB


def sequential_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """softmax(q k^T + bias) v: q (scaled), k, v (M, G, N, D), table (G, R) -> (M, G, N, D) in the dtype of v."""
    out: Tensor = _Sequential.apply(q, k, v, table, layout)
    return out


class _Sequential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
        out = _empty_like_projection(v)
        kept = _room_for_weights(q, v) if any(ctx.needs_input_grad) else None
        for group in _head_groups(q):
            # Subtracting a constant from all keys does not change a softmax; around 0, half precision loses less.
            bias = expand_table((table[group] - 8).to(v.dtype), layout.window)
            parts = [t[:, group] for t in (q.to(v.dtype), k.to(v.dtype), v, out)]
            for windows, heads, mask in _pieces(parts[0], layout, bias.dtype):
                part_q, part_k, part_v, result = (t[windows, heads] for t in parts)
                if kept is None:
                    # Fused: the piece's logits are never written to memory. (m, g, N, D), mask (m or 1, g, N, N)
                    seen = bias[None, heads] if mask is None else bias[heads] + mask
                    result.copy_(F.scaled_dot_product_attention(part_q, part_k, part_v, seen, scale=1.0))
                else:
                    weights = kept[:, group][windows, heads].view(-1, *bias.shape[1:])  # (m * g, N, N)
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
        # rowsum(dO * O): (M, G, N, 1)
        inner = (grad.to(q.dtype) * out.to(q.dtype)).sum(dim=-1, keepdim=True)
        windows_at_once, heads_at_once = _at_once(q)
        # Two buffers for P and dL, shared by all pieces: fresh memory costs a page fault for every 4 KiB.
        scratch = table.new_empty(2, windows_at_once * heads_at_once * q.shape[2] ** 2)
        for group in _head_groups(q):
            bias = expand_table(table[group], ctx.layout.window)
            grad_bias = torch.zeros_like(bias)
            parts = [t[:, group] for t in (q, k, v, grad, inner, *grads)]
            for windows, heads, mask in _pieces(parts[0], ctx.layout, bias.dtype):
                *given, grad_q, grad_k, grad_v = [t[windows, heads] for t in parts]
                # (m, g, N, D) -> (m * g, N, D), in the bias's precision
                part_q, part_k, *others = (t.to(bias.dtype).flatten(0, 1) for t in given)
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
    """Memory for the attention weights (M, G, N, N) of all pieces; None where recomputing them is better.

    On CPUs recomputing takes a third of the backward pass, and a small problem has the memory to spare.
    """
    total, heads, tokens, _ = q.shape
    small = total * heads * tokens**2 <= CPU_KEPT and q.device.type == "cpu" and q.dtype == v.dtype
    return q.new_empty(total, heads, tokens, tokens) if small else None


def _softmax(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, weights: Tensor) -> None:
    """Write softmax(q k^T + bias + mask) of a piece to `weights` (m * g, N, N); q, k (m * g, N, D), bias (g, N, N)."""
    heads, tokens = bias.shape[:2]
    windows = len(q) // heads
    bias = bias if windows == 1 else bias.expand(windows, -1, -1, -1).flatten(0, 1)
    torch.baddbmm(bias, q, k.transpose(1, 2), out=weights)
    if mask is not None:
        weights.view(windows, heads, tokens, tokens).add_(mask)
    torch.softmax(weights, dim=-1, out=weights)


def _piece_backward(
    given: tuple[Tensor, ...], weights: Tensor, grad_logits: Tensor, results: tuple[Tensor, ...]
) -> None:
    """Write the gradients of q, k, v of one piece (m, g, N, D) to `results`, and add the bias's gradient (g, N, N).

    `given` is q, k, v, dO and rowsum(dO * O) of the piece, each (m * g, N, ...); `weights` is P, and `grad_logits` is
    overwritten with dL = P * (dO V^T - rowsum(dO * O)). The module's docstring has the formulas.
    """
    q, k, v, grad, inner = given
    grad_bias = results[-1]
    torch.bmm(grad, v.transpose(1, 2), out=grad_logits).sub_(inner).mul_(weights)
    # (m * g, N, N) -> (m, g, N, N) -> sum over the piece's windows
    grad_bias += grad_logits if len(q) == len(grad_bias) else grad_logits.view(-1, *grad_bias.shape).sum(dim=0)
    values = (grad_logits @ k, grad_logits.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad)
    for result, value in zip(results[:3], values, strict=True):
        result.copy_(value.view_as(result))


def _head_groups(q: Tensor) -> Iterator[slice]:
    """Groups of heads whose expanded bias fits the memory allowed; nearly always a single group of all heads."""
    heads, tokens = q.shape[1:3]
    at_once = max(1, PIECE_LIMIT // tokens**2)
    for first in range(0, heads, at_once):
        yield slice(first, first + at_once)


def _pieces(q: Tensor, layout: WindowLayout, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """For each piece: its windows, its heads, and the mask to add to its logits (m, 1, N, N).

    The mask is None where all tokens see each other, which holds for most windows. It is added, 0 or the lowest number
    of the dtype: filling through a boolean mask takes five times as long on CPUs.
    """
    total, heads, _, _ = q.shape
    windows_at_once, heads_at_once = _at_once(q)
    label, divided = layout.label, layout.divided
    for first in range(0, total, windows_at_once):
        # Windows of all samples are counted through, and layouts repeat for every sample.
        numbers = [n % max(len(divided), 1) for n in range(first, min(first + windows_at_once, total))]
        mask = None
        if label is not None and any(divided[n] for n in numbers):
            mask = (~same_region(label[numbers]))[:, None].to(dtype).mul_(torch.finfo(dtype).min)
        for head in range(0, heads, heads_at_once):
            yield slice(first, first + windows_at_once), slice(head, head + heads_at_once), mask


def _at_once(q: Tensor) -> tuple[int, int]:
    """How many windows and heads a piece of q (M, G, N, D) has; the last piece may have fewer."""
    total, heads, tokens, _ = q.shape
    budget = CPU_PIECE if q.device.type == "cpu" else PIECE_LIMIT
    heads_at_once = max(1, min(heads, budget // tokens**2))
    return max(1, min(total, budget // (heads_at_once * tokens**2))), heads_at_once


def _empty_like_projection(t: Tensor) -> Tensor:
    """An empty (M, G, N, D) in the memory order (M, N, G, D), in which the projections before and after it work."""
    return torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
