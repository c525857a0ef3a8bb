"""Scaled cosine attention within windows with log-CPB (SwinV2, section 3.3), in four backends that agree.

Letters: B batch, W windows, N tokens in a window, C channels, G heads, D channels of a head, R offsets in a window.

    attention(q, k, v) = softmax(scale * cos(q, k) + bias) v

The scale is learned per head, as the logarithm `logit_scale`, and clamped at 100. It is multiplied into the normalised
queries, so that the logits are a plain product and any attention kernel can compute them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.models.position_bias import NarrowLinear, bias_table, expand_table, token_codes, without_autocast
from video_swinv2.models.sequential import sequential_attention
from video_swinv2.models.windows import PerAxis, WindowLayout

Backend = Literal["auto", "eager", "sdpa", "flex", "sequential"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# Temperature >= 0.01. A Python float: a tensor would need a device, and would break compiled graphs.
MAX_LOG_SCALE = math.log(100.0)
# Tokens per window from which the bias of every pair and its gradient outweigh everything else on a GPU.
LARGE_WINDOW = 1024


class WindowAttention(nn.Module):
    """Multi-head attention of SwinV2: cosine similarity, a learned temperature per head, log-CPB.

    The parameters are Microsoft's: `qkv.weight` without a bias, and `q_bias` and `v_bias` beside it. The key has no
    bias and must not get one: with dot products it would cancel in the softmax, with cosine similarity it would not.
    """

    def __init__(self, dim: int, heads: int, axes: int, attention: Backend = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(NarrowLinear(axes, 512), nn.ReLU(inplace=True), nn.Linear(512, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self._kept_table: tuple[object, Tensor] | None = None

    def forward(self, x: Tensor, layout: WindowLayout, norm: PerAxis) -> Tensor:
        """(B, W, N, C) -> (B, W, N, C); `norm` is the log-CPB normaliser of this stage."""
        batch, windows, tokens, dim = x.shape
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        # (B, W, N, 3C) -> (B, W, N, 3, G, D) -> (3, B, W, G, N, D)
        q, k, v = qkv.view(batch, windows, tokens, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        # In half precision, norms overflow and the floor of 1e-12 underflows to 0/0. Both are computed in fp32.
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = self.logit_scale.to(wide).clamp(max=MAX_LOG_SCALE).exp()
        q, k = _scale_to_length(q.to(wide), scale), _scale_to_length(k.to(wide), 1.0)
        table = self._table(layout.window, norm, x.device).to(wide)
        backend = auto_backend(x.device, tokens) if self.attention == "auto" else self.attention
        with without_autocast(x.device):
            out = ATTEND[backend](q, k, v, table, layout)
        # (B, W, G, N, D) -> (B, W, N, G, D) -> (B, W, N, C)
        return self.proj(out.transpose(2, 3).reshape(batch, windows, tokens, dim))

    def train(self, mode: bool = True) -> WindowAttention:
        """Switch the mode and drop the kept table: weights may change unseen between the modes."""
        self._kept_table = None
        super().train(mode)
        return self

    def _table(self, window: PerAxis, norm: PerAxis, device: torch.device) -> Tensor:
        """(G, R) bias per offset. In eval mode it is computed once and kept until weights, device or window change.

        The bias of every pair is not kept but expanded again in each pass, so the memory grows with N and not with N^2.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return bias_table(self.cpb_mlp, window, norm, device)
        # A weight is the same as long as it lies at the same address and was not written to. Tensors made in inference
        # mode have no version counter; they cannot be written to outside it either.
        weights = tuple(
            (p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in self.cpb_mlp.parameters()
        )
        key = (window, norm, device, weights)
        if self._kept_table is None or self._kept_table[0] != key:
            self._kept_table = (key, bias_table(self.cpb_mlp, window, norm, device))
        return self._kept_table[1]


def _scale_to_length(x: Tensor, length: Tensor | float) -> Tensor:
    """Scale the vectors along the last axis to `length`; zero vectors stay zero."""
    return x * (length / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12))


def auto_backend(device: torch.device, tokens: int) -> str:
    """The backend that `auto` stands for, given windows of `tokens` tokens.

    On CPUs `sequential` is the fastest with and without gradients (docs/results/model-speed.md), but compilers cannot
    handle its loop. On GPUs, training with large windows needs it to fit in memory: the fused kernels of
    scaled_dot_product_attention write out the gradient of the bias for every window.
    """
    if torch.compiler.is_compiling():
        return "sdpa" if device.type != "cpu" or not torch.is_grad_enabled() else "eager"
    large = torch.is_grad_enabled() and tokens >= LARGE_WINDOW
    return "sequential" if device.type == "cpu" or large else "sdpa"


def _eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """softmax(q k^T + bias) v with the logits in fp32; q (scaled), k, v (B, W, G, N, D), table (G, R)."""
    # (B, W, G, N, N) + (G, N, N)
    logits = q @ k.transpose(-2, -1) + expand_table(table, layout.window)
    allowed = layout.allowed
    if allowed is not None:  # (W, N, N) -> (W, 1, N, N), the same for all heads
        logits = logits.masked_fill(~allowed[:, None], -math.inf)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """The same through torch's scaled_dot_product_attention."""
    # Subtracting a constant from all keys does not change a softmax. The bias lies between 0 and 16; moved to -8..8, it
    # loses less in half precision.
    bias = expand_table((table - 8).to(v.dtype), layout.window)
    q, k = q.to(v.dtype), k.to(v.dtype)
    allowed = layout.allowed
    if allowed is None:  # all windows share one mask, the bias: (B, W, G, N, D) -> (B * W, G, N, D)
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias[None], scale=1.0)
        return out.view_as(v)
    mask = bias.masked_fill(~allowed[:, None], -math.inf)
    if not torch.is_grad_enabled():
        # Windows become heads, (B, W, G, N, D) -> (B, W * G, N, D): a single call, and the number of samples stays free
        # in compiled and exported programs.
        joined = F.scaled_dot_product_attention(
            q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask.flatten(0, 1)[None], scale=1.0
        )
        return joined.view_as(v)
    # One call per sample, so that the gradient of the mask (W, G, N, N) exists for one sample at a time.
    samples = zip(q.unbind(), k.unbind(), v.unbind(), strict=True)
    return torch.stack([F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=1.0) for qkv in samples])


def _flex(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """The same through torch's flex_attention: the kernel looks up the bias of a pair in the table.

    Neither a bias nor a mask of size N x N exists. On GPUs it is compiled (by Triton). Elsewhere torch interprets it,
    which is meant for checks only and has no gradients.
    """
    if q.device.type != "cuda" and torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("attention: flex has gradients on CUDA only; choose sequential, or auto")
    code, constant = token_codes(layout.window, q.device)
    label, table = layout.label, (table - 8).to(v.dtype)

    # s logit, b window of the batch, g head, i query, j key
    def score(s: Tensor, b: Tensor, g: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = s + table[g, code[i] - code[j] + constant]
        if label is None:
            return s
        window = b % label.shape[0]
        return torch.where(label[window, i] == label[window, j], s, -math.inf)

    flat = [t.flatten(0, 1).to(v.dtype) for t in (q, k, v)]
    out: Tensor = _flex_attention(q.device.type)(*flat, score_mod=score, scale=1.0)
    return out.view_as(v)


@cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # not at the top: this import alone takes a second

    if device_type == "cuda":
        return torch.compile(flex_attention)
    return flex_attention


def _sequential(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    return sequential_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), table, layout).view_as(v)


ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, WindowLayout], Tensor]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "flex": _flex,
    "sequential": _sequential,
}
