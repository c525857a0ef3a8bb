"""Attention a few windows and heads at a time, in both directions: the paper's sequential self-attention (section 3.5).

Logits exist for one piece only and, but for small problems on CPUs, are made again in the backward pass. That bounds
memory, and on CPUs, where a piece fits the cache, it is also the quickest way. Letters: M windows of all samples, W
windows of one, N tokens in a window, G heads, D channels of a head, R offsets in a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from video_swinv2.models.position_bias import collapse, expand
from video_swinv2.models.windows import Layout, same

CACHED = 2**19  # logits of a piece on a CPU: 2 MiB in fp32, near the cache of a core
KEPT = 2**23  # weights kept by a layer on a CPU: 32 MiB in fp32; to fetch more takes longer than to make them again
BOUNDED = 2**27  # elsewhere, and for the bias that several pieces share: 512 MiB


def sequential(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """softmax(q k^T + bias) v: q (scaled), k, v (M, G, N, D), table (G, R) -> (M, G, N, D) in the dtype of v."""
    out: Tensor = _Sequential.apply(q, k, v, table, layout)
    return out


class _Sequential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
        out = _beside(v)
        kept = _to_keep(q, v) if any(ctx.needs_input_grad) else None
        for group in _head_groups(q):
            # A constant over the keys changes nothing under softmax; around 0 half precision keeps more of the bias.
            bias = expand((table[group] - 8).to(v.dtype), layout.window)
            parts = [t[:, group] for t in (q.to(v.dtype), k.to(v.dtype), v, out)]
            for windows, heads, mask in _pieces(parts[0], layout, bias.dtype):
                part_q, part_k, part_v, result = (t[windows, heads] for t in parts)
                if kept is None:
                    seen = bias[None, heads] if mask is None else bias[heads] + mask
                    result.copy_(F.scaled_dot_product_attention(part_q, part_k, part_v, seen, scale=1.0))
                else:
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
        grads = _beside(q), _beside(k), _beside(v)
        grad_table = torch.empty_like(table)
        inner = (grad.to(q.dtype) * out.to(q.dtype)).sum(dim=-1, keepdim=True)
        windows_at_once, heads_at_once = _at_once(q)
        # Memory fresh from the system costs a page fault for every 4 KiB, so all pieces share this.
        scratch = table.new_empty(2, windows_at_once * heads_at_once * q.shape[2] ** 2)
        for group in _head_groups(q):
            bias = expand(table[group], ctx.layout.window)
            grad_bias = torch.zeros_like(bias)
            parts = [t[:, group] for t in (q, k, v, grad, inner, *grads)]
            for windows, heads, mask in _pieces(parts[0], ctx.layout, bias.dtype):
                *given, grad_q, grad_k, grad_v = [t[windows, heads] for t in parts]
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
            grad_table[group] = collapse(grad_bias, ctx.layout.window)
        return *grads, grad_table, None


def _to_keep(q: Tensor, v: Tensor) -> Tensor | None:
    """Room for the attention weights (M, G, N, N) of all pieces, None where they are better made again.

    On CPUs making them again is a third of the backward pass, and a small problem has the memory.
    """
    total, heads, tokens, _ = q.shape
    small = total * heads * tokens**2 <= KEPT and q.device.type == "cpu" and q.dtype == v.dtype
    return q.new_empty(total, heads, tokens, tokens) if small else None


def _softmax(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, weights: Tensor) -> None:
    """Write softmax(q k^T + bias + mask) of one piece to `weights` (m g, N, N); q, k (m g, N, D), bias (g, N, N)."""
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
    """Write the gradients of q, k, v of one piece (m, g, N, D) to `results`, and add that of the bias (g, N, N).

    With P = weights: dV = P^T dO, dlogits = P * (dO V^T - inner), inner = rowsum(dO * O) as in FlashAttention.
    """
    q, k, v, grad, inner = given
    grad_bias = results[-1]
    torch.bmm(grad, v.transpose(1, 2), out=grad_logits).sub_(inner).mul_(weights)
    grad_bias += grad_logits if len(q) == len(grad_bias) else grad_logits.view(-1, *grad_bias.shape).sum(dim=0)
    values = (grad_logits @ k, grad_logits.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad)
    for result, value in zip(results[:3], values, strict=True):
        result.copy_(value.view_as(result))


def _head_groups(q: Tensor) -> Iterator[slice]:
    """Heads whose bias of every pair fits the memory allowed; nearly always all of them."""
    heads, tokens = q.shape[1:3]
    at_once = max(1, BOUNDED // tokens**2)
    for first in range(0, heads, at_once):
        yield slice(first, first + at_once)


def _pieces(q: Tensor, layout: Layout, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Windows, heads, and what to add to the logits (m, 1, N, N); None where all tokens see each other.

    Numbers to add, 0 or the lowest there is: filling by a mask of bools takes five times as long on CPUs.
    """
    total, heads, _, _ = q.shape
    windows_at_once, heads_at_once = _at_once(q)
    label, divided = layout.label, layout.divided
    for first in range(0, total, windows_at_once):
        numbers = [n % max(len(divided), 1) for n in range(first, min(first + windows_at_once, total))]
        mask = None
        if label is not None and any(divided[n] for n in numbers):
            mask = (~same(label[numbers]))[:, None].to(dtype).mul_(torch.finfo(dtype).min)
        for head in range(0, heads, heads_at_once):
            yield slice(first, first + windows_at_once), slice(head, head + heads_at_once), mask


def _at_once(q: Tensor) -> tuple[int, int]:
    """How many windows and heads a piece of q (M, G, N, D) has, the last one excepted."""
    total, heads, tokens, _ = q.shape
    budget = CACHED if q.device.type == "cpu" else BOUNDED
    heads_at_once = max(1, min(heads, budget // tokens**2))
    return max(1, min(total, budget // (heads_at_once * tokens**2))), heads_at_once


def _beside(t: Tensor) -> Tensor:
    """An empty (M, G, N, D) like `t` whose heads lie side by side in memory, as the projections around want them."""
    return torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
