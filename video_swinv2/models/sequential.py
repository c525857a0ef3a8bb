"""Attention a few windows and heads at a time, in both directions: the paper's sequential self-attention (section 3.5).

Logits exist for one piece only and are made again in the backward pass. That bounds memory, and on CPUs, where a piece
fits the cache, it is also the quickest way. Letters: M windows of all samples, W windows of one, N tokens in a window,
G heads, D channels of a head, R offsets in a window.
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
BOUNDED = 2**27  # elsewhere, and for the bias that several pieces share: 512 MiB


def sequential(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """softmax(q k^T + bias) v: q (scaled), k, v (M, G, N, D), table (G, R) -> (M, G, N, D) in the dtype of v."""
    out: Tensor = _Sequential.apply(q, k, v, table, layout)
    return out


class _Sequential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
        out = _beside(v)
        narrow = (q.to(v.dtype), k.to(v.dtype), v)
        for group in _head_groups(q):
            # A constant over the keys changes nothing under softmax; around 0 half precision keeps more of the bias.
            bias = expand((table[group] - 8).to(v.dtype), layout.window)
            parts = [t[:, group] for t in (*narrow, out)]
            for windows, heads, mask in _pieces(parts[0], layout):
                part_q, part_k, part_v, result = (t[windows, heads] for t in parts)
                seen = bias[None, heads] if mask is None else bias[heads].masked_fill(mask, -math.inf)
                result.copy_(F.scaled_dot_product_attention(part_q, part_k, part_v, seen, scale=1.0))
        ctx.save_for_backward(q, k, v, table, out)
        ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, table, out = ctx.saved_tensors
        grads = _beside(q), _beside(k), _beside(v)
        grad_table = torch.empty_like(table)
        inner = (grad.to(q.dtype) * out.to(q.dtype)).sum(dim=-1, keepdim=True)
        for group in _head_groups(q):
            bias = expand(table[group], ctx.layout.window)
            grad_bias = torch.zeros_like(bias)
            parts = [t[:, group] for t in (q, k, v, grad, inner, *grads)]
            for windows, heads, mask in _pieces(parts[0], ctx.layout):
                *given, grad_q, grad_k, grad_v = [t[windows, heads] for t in parts]
                _piece_backward(given, bias[heads], mask, (grad_q, grad_k, grad_v, grad_bias[heads]))
            grad_table[group] = collapse(grad_bias, ctx.layout.window)
        return *grads, grad_table, None


def _piece_backward(given: list[Tensor], bias: Tensor, mask: Tensor | None, results: tuple[Tensor, ...]) -> None:
    """Write the gradients of q, k, v of one piece (m, g, N, D) to `results`, and add that of the bias (g, N, N).

    With P = softmax(logits): dV = P^T dO, dlogits = P * (dO V^T - inner), inner = rowsum(dO * O) as in FlashAttention.
    """
    windows, heads, tokens, _ = given[0].shape
    grad_bias = results[-1]
    q, k, v, grad, inner = (t.to(bias.dtype).flatten(0, 1) for t in given)
    bias = bias if windows == 1 else bias.expand(windows, -1, -1, -1).flatten(0, 1)
    logits = torch.baddbmm(bias, q, k.transpose(1, 2))
    if mask is not None:
        logits.view(windows, heads, tokens, tokens).masked_fill_(mask, -math.inf)
    weights = logits.softmax(dim=-1)
    grad_logits = torch.bmm(grad, v.transpose(1, 2)).sub_(inner).mul_(weights)
    grad_bias += grad_logits if windows == 1 else grad_logits.view(windows, heads, tokens, tokens).sum(dim=0)
    values = (grad_logits @ k, grad_logits.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad)
    for result, value in zip(results[:3], values, strict=True):
        result.copy_(value.view_as(result))


def _head_groups(q: Tensor) -> Iterator[slice]:
    """Heads whose bias of every pair fits the memory allowed; nearly always all of them."""
    heads, tokens = q.shape[1:3]
    at_once = max(1, BOUNDED // tokens**2)
    for first in range(0, heads, at_once):
        yield slice(first, first + at_once)


def _pieces(q: Tensor, layout: Layout) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Windows, heads, and what the queries must not see (m, 1, N, N) bool; None where all tokens see each other."""
    total, heads, tokens, _ = q.shape
    budget = CACHED if q.device.type == "cpu" else BOUNDED
    heads_at_once = max(1, min(heads, budget // tokens**2))
    windows_at_once = max(1, budget // (heads_at_once * tokens**2))
    label, divided = layout.label, layout.divided
    for first in range(0, total, windows_at_once):
        numbers = [n % max(len(divided), 1) for n in range(first, min(first + windows_at_once, total))]
        mask = None
        if label is not None and any(divided[n] for n in numbers):
            mask = ~same(label[numbers])[:, None]
        for head in range(0, heads, heads_at_once):
            yield slice(first, first + windows_at_once), slice(head, head + heads_at_once), mask


def _beside(t: Tensor) -> Tensor:
    """An empty (M, G, N, D) like `t` whose heads lie side by side in memory, as the projections around want them."""
    return torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
