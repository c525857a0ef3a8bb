"""Attention computed for a few windows and heads at a time: the sequential self-attention of SwinV2 (section 3.5).

Letters: M windows of all samples, W windows of one sample, N tokens in a window, G heads, D channels of a head, R
offsets in a window. A *piece* is what is computed at once, m windows and g heads.

Logits exist for one piece at a time, so memory does not grow with the number of windows. On CPUs a piece fits into the
cache, which makes this the fastest backend there. Three nested loops do the work:

    for each group of heads whose bias (G, N, N) fits into the memory allowed       (nearly always all heads)
        for each m windows: bring q and k to their lengths
            for each piece of m windows and g heads
                forward:   out = softmax(L) v with the logits L = q k^T + bias + mask;  S = log(sum(exp(L))) of each row
                backward:  recompute the attention weights P = exp(L - S), then compute the gradients of the piece

With O = P V, the gradients are, as in FlashAttention (arXiv 2205.14135):

    dV = P^T dO
    dL = P * (dO V^T - rowsum(dO * O))      gradient of the softmax; rowsum(dO * O) = rowsum(dP * P), without P
    dQ = dL K,   dK = dL^T Q,   dbias = the sum of dL over all windows

q and k are brought to their lengths here and not by the caller. What is kept for the backward pass is therefore only
the projection, which exists anyway, the output, and S.

Products have the precision of the projection and are accumulated in fp32. In bf16, a stored product has 8 significant
bits. That is enough for P, dL and the gradients, but not for L and dO V^T, from which S and the row sum are subtracted:
near a logit of 90, 8 bits are steps of 0.5. The subtraction is therefore part of the product, before anything is
rounded: rows have what to subtract in two additional channels, columns have ones there (`_extended`). Norms, S and
dbias have at least fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from video_swinv2.models.lengths import length_backward, length_factors, lengths_of
from video_swinv2.models.position_bias import expand_table, reduce_to_table
from video_swinv2.models.windows import WindowLayout

# Limits on the bytes of the logits of a piece. On a CPU they have to fit into a core's cache.
CPU_PIECE = 2**21
PIECE_LIMIT = 2**29  # also on the expanded bias of a group of heads, on all devices
LOG2_E = math.log2(math.e)


def sequential_attention(qkv: Tensor, scale: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """softmax(scale * cos(q, k) + bias) v: qkv (M, N, 3, G, D), scale (G, 1), table (G, R) -> (M, N, G, D).

    scale and table have at least fp32. The result has the dtype of qkv.
    """
    out: Tensor = _Sequential.apply(qkv, scale, table, layout)
    return out


class _Sequential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
        windows, tokens, _, heads, channels = qkv.shape
        out = qkv.new_empty(windows, tokens, heads, channels)
        log_sums = scale.new_empty(windows, tokens, heads) if any(ctx.needs_input_grad) else None
        for group in _head_groups(qkv):
            # The results are written to views of the output tensors.
            _group_forward(
                qkv[:, :, :, group],
                scale[group],
                table[group],
                layout,
                out[:, :, group],
                None if log_sums is None else log_sums[:, :, group],
            )
        if log_sums is not None:
            ctx.save_for_backward(qkv, scale, table, out, log_sums)
            ctx.layout = layout
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        qkv, scale, table, out, log_sums = ctx.saved_tensors
        grad_qkv, grad_scale, grad_table = torch.empty_like(qkv), torch.empty_like(scale), torch.empty_like(table)
        for group in _head_groups(qkv):
            given = qkv[:, :, :, group], scale[group], table[group]
            saved = out[:, :, group], log_sums[:, :, group], grad[:, :, group]
            grad_scale[group], grad_table[group] = _group_backward(given, saved, ctx.layout, grad_qkv[:, :, :, group])
        return grad_qkv, grad_scale, grad_table, None


def _group_forward(
    qkv: Tensor, scale: Tensor, table: Tensor, layout: WindowLayout, out: Tensor, log_sums: Tensor | None
) -> None:
    """Write the output (M, N, G, D) of a group of heads, and S (M, N, G) if it is needed."""
    bias = _expanded_bias(table, layout, qkv.dtype)[:, None]
    lengths = lengths_of(scale)
    windows_at_once, heads_at_once = _at_once(qkv, qkv.dtype)
    for windows in _slices(len(qkv), windows_at_once):
        mask = _mask(windows, layout, qkv.dtype)
        # (m, N, 2, G, D) and (m, N, G, D) -> q, k, v (G, m, N, D)
        q_k = qkv[windows, :, :2].to(scale.dtype)
        q, k = (q_k * length_factors(q_k, lengths)).to(qkv.dtype).permute(2, 3, 0, 1, 4)
        v = qkv[windows, :, 2].permute(2, 0, 1, 3)
        for heads in _slices(len(q), heads_at_once):
            # (g, 1, N, N), or with the mask (g, m, N, N)
            seen = bias[heads] if mask is None else bias[heads] + mask
            result, log_sum = _attend(q[heads], k[heads], v[heads], seen, log_sums)
            out[windows, :, heads] = result.permute(1, 2, 0, 3)
            if log_sums is not None:
                log_sums[windows, :, heads] = log_sum.permute(1, 2, 0)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, log_sums: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output of a piece (g, m, N, D), and S (g, m, N) in the dtype of `log_sums`; without them, S is not needed.

    q, k, v (g, m, N, D), bias (g, 1 or m, N, N). A fused kernel need not write the logits to memory.
    """
    if q.device.type == "cpu":
        # This is what scaled_dot_product_attention calls on CPUs, but it does not return S.
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = flash(q, k, v, attn_mask=bias, scale=1.0)
        return out, log_sum
    out = F.scaled_dot_product_attention(q, k, v, bias, scale=1.0)
    if log_sums is None:
        return out, out
    return out, (q.to(log_sums.dtype) @ k.to(log_sums.dtype).mT + bias).logsumexp(dim=-1)


def _group_backward(
    given: tuple[Tensor, Tensor, Tensor], saved: tuple[Tensor, Tensor, Tensor], layout: WindowLayout, grad_qkv: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of scale and table of a group of heads; that of qkv is written to `grad_qkv`.

    given: qkv (M, N, 3, G, D), scale (G, 1) and table (G, R). saved: O (M, N, G, D), S (M, N, G) and dO (M, N, G, D).
    """
    (qkv, scale, table), (out, log_sums, grad) = given, saved
    # The range of fp16 is too narrow for products of gradients.
    dtype = torch.float32 if qkv.dtype == torch.float16 else qkv.dtype
    # P is computed as 2^(log2(e) (L - S)): on CPUs, exp takes 30 times as long for fp32 numbers that underflow.
    bias = _expanded_bias(table, layout, dtype)
    d_scale, d_bias = torch.zeros_like(scale), torch.zeros_like(bias, dtype=table.dtype)
    lengths = lengths_of(scale)
    windows_at_once, heads_at_once = _at_once(qkv, dtype)
    # Two buffers, for P and dL, are reused by all pieces, since fresh memory costs a page fault for every 4 KiB.
    scratch = bias.new_empty(2, windows_at_once * heads_at_once * bias[0].numel())
    for windows in _slices(len(qkv), windows_at_once):
        mask = _mask(windows, layout, dtype)
        # All with heads first: (2, G, m, N, D), (G, m, N, D) and (G, m, N)
        q_k = qkv[windows, :, :2].to(scale.dtype)
        factors = length_factors(q_k, lengths).permute(2, 3, 0, 1, 4)
        q_k = q_k.permute(2, 3, 0, 1, 4) * factors
        v, d_out, values = (t[windows].permute(2, 0, 1, 3) for t in (qkv[:, :, 2], grad, out))
        log_sum = log_sums[windows].permute(2, 0, 1)
        inner = (d_out.to(scale.dtype) * values).sum(dim=-1)
        rows = _extended(q_k[0], -log_sum, dtype), _extended(d_out, -inner, dtype)
        columns = _extended(q_k[1], 1, dtype), _extended(v, 1, dtype)
        d_qkv = rows[0].new_empty(3, *v.shape)
        for heads in _slices(len(v), heads_at_once):
            piece = [t[heads] for t in (*rows, *columns)]
            _piece_backward(piece, bias[heads], mask, scratch, d_qkv[:, heads], d_bias[heads])
        # lengths (2, G, 1) -> (2, G, 1, 1, 1)
        d_q_k, d_lengths = length_backward(d_qkv[:2], q_k, factors, lengths[..., None, None])
        d_qkv[:2] = d_q_k
        d_scale += d_lengths[0].sum(dim=(1, 2))
        grad_qkv[windows] = d_qkv.permute(2, 3, 0, 1, 4)
    return d_scale, reduce_to_table(d_bias, layout.window)


def _piece_backward(
    given: list[Tensor], bias: Tensor, mask: Tensor | None, scratch: Tensor, d_qkv: Tensor, d_bias: Tensor
) -> None:
    """Compute the gradients of one piece, with the formulas in the docstring of this module.

    given: q, dO, k and v, all `_extended` to (g, m, N, D + 2). bias (g, N, N), mask (m, N, N). scratch: two buffers,
    for P and dL. d_qkv (3, g, m, N, D) is overwritten. d_bias (g, N, N) is added to: it sums over all windows.
    """
    heads, windows, tokens, _ = given[0].shape
    # (g, m, N, N) in the buffers; the last piece may be smaller.
    shape = heads, windows, tokens, tokens
    weights, d_logits = (buffer[: math.prod(shape)].view(shape) for buffer in scratch)
    if mask is None:
        weights.copy_(bias[:, None])
    else:
        torch.add(bias[:, None], mask, out=weights)
    # (g, m, N, ...) -> (g * m, N, ...)
    q, d_out, k, v, p, d_l = (t.flatten(0, 1) for t in (*given, weights, d_logits))
    d_q, d_k, d_v = (t.flatten(0, 1) for t in d_qkv)
    p.baddbmm_(q, k.mT, beta=LOG2_E, alpha=LOG2_E).exp2_()
    torch.bmm(d_out, v.mT, out=d_l).mul_(p)
    for part in d_logits.unbind(1):
        d_bias += part
    torch.bmm(d_l, k[..., :-2], out=d_q)
    torch.bmm(d_l.mT, q[..., :-2], out=d_k)
    torch.bmm(p.mT, d_out[..., :-2], out=d_v)


def _extended(x: Tensor, extra: Tensor | int, dtype: torch.dtype) -> Tensor:
    """(..., D) -> (..., D + 2): a row with the number `extra` (...) in two channels, or a column with 1 in both.

    The product of such a row and column is that of their vectors plus the number. It takes two channels because bf16
    has 8 significant bits: the first holds the upper ones, the second the next 8.
    """
    out = torch.empty(*x.shape[:-1], x.shape[-1] + 2, dtype=dtype, device=x.device)
    out[..., :-2] = x
    out[..., -2:] = 1
    if isinstance(extra, Tensor):
        out[..., -2] = extra
        out[..., -1] = extra - out[..., -2]
    return out


def _expanded_bias(table: Tensor, layout: WindowLayout, dtype: torch.dtype) -> Tensor:
    """(G, R) -> (G, N, N) in `dtype`, minus 8, the middle of its range.

    Shifting all logits does not change the softmax, and values around 0 lose less to rounding in half precision.
    """
    return expand_table((table - 8).to(dtype), layout.window)


def _mask(windows: slice, layout: WindowLayout, dtype: torch.dtype) -> Tensor | None:
    """The mask (m, N, N) to add to the logits of some windows, or None if all their tokens may see each other.

    Most windows need none. It is a number that is added, because filling through a boolean mask takes five times as
    long on CPUs: 0 for equal labels, and -inf or the lowest number of the dtype for others.
    """
    label, divided = layout.label, layout.divided
    # The M windows are those of one sample after another, and all samples share the layout of W windows.
    if label is None or not any(divided[n % len(divided)] for n in range(windows.start, windows.stop)):
        return None
    # Numbered on the device: a list of numbers would be copied to the GPU, and the CPU would wait for that.
    numbers = torch.arange(windows.start, windows.stop, device=label.device) % len(divided)
    labels = label[numbers].to(dtype)  # small integers, which every dtype can tell apart
    return (labels[:, :, None] - labels[:, None, :]).square_().mul_(torch.finfo(dtype).min)


def _head_groups(qkv: Tensor) -> Iterator[slice]:
    """Groups of heads whose expanded bias fits into PIECE_LIMIT; nearly always a single group with all heads."""
    _, tokens, _, heads, _ = qkv.shape
    return _slices(heads, max(1, PIECE_LIMIT // (qkv.itemsize * tokens**2)))


def _at_once(qkv: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    """The numbers of windows and heads in a piece, for logits of `dtype`: as many heads as fit, then windows.

    Heads come first because q and k of a window are brought to their lengths for all of its heads.
    """
    windows, tokens, _, heads, _ = qkv.shape
    limit = CPU_PIECE if qkv.device.type == "cpu" else PIECE_LIMIT
    budget = max(1, limit // (dtype.itemsize * tokens**2))
    heads_at_once = min(heads, budget)
    # Divided evenly: of 4 windows, 2 and 2 rather than 3 and 1.
    windows_at_once = math.ceil(windows / math.ceil(windows / (budget // heads_at_once)))
    return windows_at_once, heads_at_once


def _slices(total: int, at_once: int) -> Iterator[slice]:
    """Divide the numbers from 0 to `total` into slices of `at_once`; the last may have fewer."""
    for first in range(0, total, at_once):
        yield slice(first, min(first + at_once, total))
