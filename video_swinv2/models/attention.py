"""Scaled cosine attention inside windows with log-CPB, in four ways that give the same result.

Letters: B batch, W windows, N tokens in a window, C channels, G heads, D channels of a head, R offsets in a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.models.position_bias import NarrowLinear, bias_table, expand, token_codes, without_autocast
from video_swinv2.models.sequential import sequential
from video_swinv2.models.windows import Layout, Size

Backend = Literal["auto", "eager", "sdpa", "flex", "sequential"]
BACKENDS: tuple[str, ...] = get_args(Backend)

MAX_LOG_SCALE = math.log(100.0)  # temperature >= 0.01; a Python float, so that no device or graph break is involved
LARGE_WINDOW = 1024  # tokens; from here on the bias of every pair and its gradient outweigh everything else on a GPU


class WindowAttention(nn.Module):
    """Multi-head attention of SwinV2: cosine similarity, a learned temperature per head, log-CPB.

    Microsoft's parameters: `qkv.weight` without bias, `q_bias` and `v_bias` beside it. The key has no bias, and cannot
    gain one: cosine similarity, unlike a dot product, would notice it.
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

    def forward(self, x: Tensor, layout: Layout, norm: Size) -> Tensor:
        """(B, W, N, C) -> (B, W, N, C); `norm` is the log-CPB normaliser of this stage."""
        batch, windows, tokens, dim = x.shape
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        q, k, v = qkv.view(batch, windows, tokens, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        # Norms of half-precision vectors overflow and the 1e-12 floor underflows to 0/0, so both are taken in fp32.
        wide = torch.promote_types(q.dtype, torch.float32)
        scale = self.logit_scale.to(wide).clamp(max=MAX_LOG_SCALE).exp()
        q, k = _unit(q.to(wide), scale), _unit(k.to(wide), 1.0)
        table = self._table(layout.window, norm, x.device).to(wide)
        backend = choose(x.device, tokens) if self.attention == "auto" else self.attention
        with without_autocast(x.device):
            out = ATTEND[backend](q, k, v, table, layout)
        return self.proj(out.transpose(2, 3).reshape(batch, windows, tokens, dim))

    def train(self, mode: bool = True) -> WindowAttention:
        """Switch mode; the kept table goes, since weights may change unseen between the modes."""
        self._kept_table = None
        super().train(mode)
        return self

    def _table(self, window: Size, norm: Size, device: torch.device) -> Tensor:
        """(G, R) bias per offset; outside training it is computed once and kept until weights or window change.

        What is kept grows with N, not with its square: the bias of every pair is spread out anew in each pass.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return bias_table(self.cpb_mlp, window, norm, device)
        weights = tuple(
            (p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in self.cpb_mlp.parameters()
        )
        key = (window, norm, device, weights)
        if self._kept_table is None or self._kept_table[0] != key:
            self._kept_table = (key, bias_table(self.cpb_mlp, window, norm, device))
        return self._kept_table[1]


def _unit(x: Tensor, length: Tensor | float) -> Tensor:
    """Vectors of the last axis scaled to `length`; zero vectors stay zero."""
    return x * (length / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12))


def choose(device: torch.device, tokens: int) -> str:
    """The backend that `auto` means for windows of `tokens` tokens.

    On CPUs `sequential` is the quickest with and without gradients (docs/model.md), but its loop is not for compilers.
    On GPUs large windows need it to fit in memory when there are gradients, since the fused kernels of
    scaled_dot_product_attention write the gradient of the bias out for every window.
    """
    if torch.compiler.is_compiling():
        return "sdpa" if device.type != "cpu" or not torch.is_grad_enabled() else "eager"
    large = torch.is_grad_enabled() and tokens >= LARGE_WINDOW
    return "sequential" if device.type == "cpu" or large else "sdpa"


def _eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """softmax(q k^T + bias) v with the logits in fp32; q (scaled), k, v (B, W, G, N, D), table (G, R)."""
    logits = q @ k.transpose(-2, -1) + expand(table, layout.window)
    allowed = layout.allowed
    if allowed is not None:
        logits = logits.masked_fill(~allowed[:, None], -math.inf)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """The same through torch's scaled_dot_product_attention."""
    # A constant over the keys changes nothing under softmax; around 0 half precision keeps more of the bias.
    bias = expand((table - 8).to(v.dtype), layout.window)
    q, k = q.to(v.dtype), k.to(v.dtype)
    allowed = layout.allowed
    if allowed is None:
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias[None], scale=1.0)
        return out.view_as(v)
    mask = bias.masked_fill(~allowed[:, None], -math.inf)
    if not torch.is_grad_enabled():
        # Windows as heads: one call, and the number of samples stays free in what is compiled or exported.
        joined = F.scaled_dot_product_attention(
            q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask.flatten(0, 1)[None], scale=1.0
        )
        return joined.view_as(v)
    # One call per sample: the gradient of the mask, which has an entry per window, is written for one at a time.
    samples = zip(q.unbind(), k.unbind(), v.unbind(), strict=True)
    return torch.stack([F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=1.0) for qkv in samples])


def _flex(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
    """The same through torch's flex_attention: the bias of a pair is looked up in the table inside the kernel.

    Neither a bias nor a mask of N x N exists. On GPUs it is compiled (by triton); elsewhere torch interprets it, which
    is for checks only and has no gradients.
    """
    if q.device.type != "cuda" and torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("attention: flex has gradients on CUDA only; choose sequential, or auto")
    code, constant = token_codes(layout.window, q.device)
    label, table = layout.label, (table - 8).to(v.dtype)

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
    from torch.nn.attention.flex_attention import flex_attention  # its import alone takes a second

    if device_type == "cuda":
        return torch.compile(flex_attention)
    return flex_attention


def _sequential(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: Layout) -> Tensor:
    return sequential(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), table, layout).view_as(v)


ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Layout], Tensor]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "flex": _flex,
    "sequential": _sequential,
}
