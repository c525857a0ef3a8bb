"""Scaled cosine attention inside windows with log-CPB.

Letters: B batch, W windows, N tokens in a window, C channels, G heads, D channels of a head.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.models.position_bias import position_bias
from video_swinv2.models.windows import Layout, Size

Backend = Literal["auto", "eager", "sdpa"]
BACKENDS: tuple[str, ...] = get_args(Backend)

MAX_LOG_SCALE = math.log(100.0)  # temperature >= 0.01; a Python float, so that no device or graph break is involved


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
        self.cpb_mlp = nn.Sequential(nn.Linear(axes, 512), nn.ReLU(inplace=True), nn.Linear(512, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        self._kept_bias: tuple[object, Tensor] | None = None

    def forward(self, x: Tensor, layout: Layout, norm: Size) -> Tensor:
        """(B, W, N, C) -> (B, W, N, C); `norm` is the log-CPB normaliser of this stage."""
        batch, windows, tokens, dim = x.shape
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        q, k, v = qkv.view(batch, windows, tokens, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5)
        # Norms of half-precision vectors overflow and the 1e-12 floor underflows to 0/0, so both are taken in fp32.
        wide = torch.promote_types(q.dtype, torch.float32)
        q = F.normalize(q.to(wide), dim=-1) * self.logit_scale.to(wide).clamp(max=MAX_LOG_SCALE).exp()
        k = F.normalize(k.to(wide), dim=-1)
        bias = self._bias(layout.window, norm, x.device)
        attend = _sdpa if self._use_sdpa(x.device) else _eager
        out = attend(q, k, v, bias, layout.allowed)
        return self.proj(out.transpose(2, 3).reshape(batch, windows, tokens, dim))

    def train(self, mode: bool = True) -> WindowAttention:
        """Switch mode; the kept bias goes, since weights may change unseen between the modes."""
        self._kept_bias = None
        super().train(mode)
        return self

    def _use_sdpa(self, device: torch.device) -> bool:
        if self.attention == "auto":
            # The fused CPU kernel has no gradient for the bias; with one it would fall back to slower plain products.
            return device.type != "cpu" or not torch.is_grad_enabled()
        return self.attention == "sdpa"

    def _bias(self, window: Size, norm: Size, device: torch.device) -> Tensor:
        """(G, N, N); outside training it is computed once and kept until the weights or the window change."""
        if self.training or torch.is_grad_enabled():
            return position_bias(self.cpb_mlp, window, norm, device)
        weights = tuple(
            (p.data_ptr(), p.dtype, 0 if p.is_inference() else p._version) for p in self.cpb_mlp.parameters()
        )
        key = (window, norm, device, weights)
        if self._kept_bias is None or self._kept_bias[0] != key:
            self._kept_bias = (key, position_bias(self.cpb_mlp, window, norm, device))
        return self._kept_bias[1]


def _eager(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, allowed: Tensor | None) -> Tensor:
    """softmax(q k^T + bias) v with the logits in fp32; q (scaled), k, v (B, W, G, N, D), bias (G, N, N)."""
    with torch.autocast(q.device.type, enabled=False):
        logits = q @ k.transpose(-2, -1) + bias
        if allowed is not None:
            logits = logits.masked_fill(~allowed[:, None], -math.inf)
        weights = logits.softmax(dim=-1)
    return weights.to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, allowed: Tensor | None) -> Tensor:
    """The same through torch's scaled_dot_product_attention."""
    # A constant over the keys changes nothing under softmax; around 0 half precision keeps more of the bias.
    bias = (bias - 8).to(v.dtype)
    q, k = q.to(v.dtype), k.to(v.dtype)
    if allowed is None:
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias[None], scale=1.0)
        return out.view_as(v)
    # One call per sample: the mask has an entry per window, and repeating it over the batch would cost B times more.
    mask = torch.where(allowed[:, None], bias, -math.inf)
    samples = zip(q, k, v, strict=True)
    return torch.stack([F.scaled_dot_product_attention(*sample, attn_mask=mask, scale=1.0) for sample in samples])
