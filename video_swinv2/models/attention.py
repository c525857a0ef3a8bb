"""Scaled cosine attention within windows, with log-CPB, in four interchangeable backends (SwinV2, sections 3.2, 3.3).

Letters: B batch, W windows, N tokens in a window, C channels, G heads, D channels of a head, R offsets in a window.

    attention(q, k, v) = softmax(scale * cos(q, k) + bias) v

The scale is learned per head as its logarithm, `logit_scale`, and clamped to at most 100. It is multiplied into the
normalised queries. The logits are then a plain dot product, which any attention kernel can compute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from video_swinv2.models.lengths import scaled_parts
from video_swinv2.models.position_bias import NarrowLinear, bias_table, expand_table, token_codes, without_autocast
from video_swinv2.models.sequential import sequential_attention
from video_swinv2.models.windows import WindowLayout

Backend = Literal["auto", "eager", "sdpa", "flex", "sequential"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# The paper requires a temperature of at least 0.01, and the scale is its inverse. This is a Python float because a
# tensor would need a device and would break compiled graphs.
MAX_LOG_SCALE = math.log(100.0)
# From this many tokens per window, the (N, N) bias and its gradient dominate the memory of training on a GPU.
LARGE_WINDOW = 1024
MAX_GRAPHS = 128  # of torch.compile, for the code of all blocks


class WindowAttention(nn.Module):
    """Multi-head attention of SwinV2: cosine similarity, a learned temperature per head, and log-CPB.

    The parameters are named as in Microsoft's code: `qkv` has only a weight, and `q_bias` and `v_bias` are separate.
    The keys have no bias and must not get one. With dot-product attention it would not matter, because a key bias
    cancels in the softmax, but with cosine similarity it changes the result.
    """

    def __init__(self, dim: int, heads: int, axes: int, attention: Backend = "auto") -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        # Both initial values are Microsoft's: a scale of 10, and 512 hidden units in the log-CPB network.
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(NarrowLinear(axes, 512), nn.ReLU(inplace=True), nn.Linear(512, heads, bias=False))
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: WindowLayout, coordinates: Tensor) -> Tensor:
        """(B, W, N, C) -> (B, W, N, C); `coordinates` (R, axes) are the `window_coordinates` of the layout's window."""
        batch, windows, tokens, dim = x.shape
        # Zeros stand in for the missing key bias, so that one product computes q, k and v.
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        # (B, W, N, 3C) -> (B, W, N, 3, G, D)
        qkv = F.linear(x, self.qkv.weight, qkv_bias).view(batch, windows, tokens, 3, self.heads, -1)
        wide = torch.promote_types(qkv.dtype, torch.float32)
        # (G, 1, 1) -> (G, 1)
        scale = self.logit_scale.to(wide).clamp(max=MAX_LOG_SCALE).exp().flatten(1)
        # Computed in every pass and never kept, because nothing shows reliably whether a weight has changed: writes
        # through `.data` leave no trace. With clips it costs 1 to 2 % of a forward pass
        # (docs/results/model-speed.md).
        table = bias_table(self.cpb_mlp, coordinates).to(wide)
        backend = auto_backend(x.device, tokens) if self.attention == "auto" else self.attention
        # Autocast would cast q and k back to half precision before their product.
        with without_autocast(x.device):
            if backend == "sequential":
                # (B, W, ...) -> (M, ...) and back; its result is (M, N, G, D)
                out = sequential_attention(qkv.flatten(0, 1), scale, table, layout)
            else:
                # Fused kernels take q, k and v in one dtype.
                parts = scaled_parts(qkv, scale, wide if backend == "eager" else qkv.dtype)
                # q, k and v (B, W, N, G, D) -> (B, W, G, N, D), and back
                q, k, v = (part.transpose(2, 3) for part in parts)
                out = ATTEND[backend](q, k, v, table, layout).transpose(2, 3)
        return self.proj(out.reshape(batch, windows, tokens, dim))


def auto_backend(device: torch.device, tokens: int) -> str:
    """The backend that `auto` stands for, given windows of `tokens` tokens.

    On CPUs `sequential` is the fastest, with and without gradients (docs/results/model-speed.md), but compilers cannot
    handle its loop. On GPUs, `sequential` is what lets training with large windows fit in memory: the fused kernels of
    scaled_dot_product_attention write out the gradient of the bias for every window.
    """
    if torch.compiler.is_compiling():
        return "sdpa" if device.type != "cpu" or not torch.is_grad_enabled() else "eager"
    large = torch.is_grad_enabled() and tokens >= LARGE_WINDOW
    return "sequential" if device.type == "cpu" or large else "sdpa"


def _eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """softmax(q k^T + bias) v with logits in at least fp32; q (scaled), k and v are (B, W, G, N, D), table (G, R)."""
    # (B, W, G, N, N) + (G, N, N)
    logits = q @ k.transpose(-2, -1) + expand_table(table, layout.window)
    allowed = layout.allowed
    if allowed is not None:
        # (W, N, N) -> (W, 1, N, N), the same for all heads. No row is -inf throughout, which would make its softmax
        # NaN, since every token may attend to itself.
        logits = logits.masked_fill(~allowed[:, None], -math.inf)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """The same result from torch's scaled_dot_product_attention. It is given scale=1 because q is already scaled."""
    # Adding the same constant to the logits of all keys does not change the softmax. The bias lies between 0 and 16.
    # Shifted to -8..8, it loses less to rounding in half precision.
    bias = expand_table((table - 8).to(v.dtype), layout.window)
    allowed = layout.allowed
    if allowed is None:
        # The bias is the same for all windows, so windows can join the batch: (B, W, G, N, D) -> (B * W, G, N, D).
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), bias[None], scale=1.0)
        return out.view_as(v)
    # From here on the mask differs between windows: (G, N, N) and (W, 1, N, N) -> (W, G, N, N).
    mask = bias.masked_fill(~allowed[:, None], -math.inf)
    if not torch.is_grad_enabled():
        # Windows become heads: (B, W, G, N, D) -> (B, W * G, N, D). This takes a single call, and it leaves the batch
        # size dynamic in compiled and exported programs, which the loop below would not.
        joined = F.scaled_dot_product_attention(
            q.flatten(1, 2), k.flatten(1, 2), v.flatten(1, 2), mask.flatten(0, 1)[None], scale=1.0
        )
        return joined.view_as(v)
    # One call per sample: the kernel writes out the gradient of the mask, which would otherwise be (B, W * G, N, N).
    # Here windows are the batch of each call, (W, G, N, D).
    samples = zip(q.unbind(), k.unbind(), v.unbind(), strict=True)
    return torch.stack([F.scaled_dot_product_attention(*qkv, attn_mask=mask, scale=1.0) for qkv in samples])


def _flex(q: Tensor, k: Tensor, v: Tensor, table: Tensor, layout: WindowLayout) -> Tensor:
    """The same result from torch's flex_attention, whose kernel looks up the bias of each pair in the table.

    It needs neither a bias nor a mask of size N x N. On GPUs it is compiled with Triton. On other devices torch
    interprets it, without gradients, which is meant for checks only.
    """
    if q.device.type != "cuda" and torch.is_grad_enabled() and q.requires_grad:
        raise ValueError("attention: flex has gradients on CUDA only; choose sequential, or auto")
    code, constant = token_codes(layout.window, q.device)
    label, table = layout.label, (table - 8).to(v.dtype)

    # Called per logit s, with the indices of its window b (in the whole batch), head g, query i and key j.
    def score(s: Tensor, b: Tensor, g: Tensor, i: Tensor, j: Tensor) -> Tensor:
        s = s + table[g, code[i] - code[j] + constant]
        if label is None:
            return s
        window = b % label.shape[0]  # B and W were flattened with W inside, and every sample has the same layout
        return torch.where(label[window, i] == label[window, j], s, -math.inf)

    flat = (t.flatten(0, 1) for t in (q, k, v))
    out: Tensor = _flex_attention(q.device.type)(*flat, score_mod=score, scale=1.0)
    return out.view_as(v)


@cache
def _flex_attention(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention  # imported here because it takes a second to import

    if device_type == "cuda":
        allow_many_graphs()
        return torch.compile(flex_attention)
    return flex_attention


def allow_many_graphs() -> None:
    """Let torch.compile make as many variants of a function as a model needs.

    All blocks share their code. By default, PyTorch compiles 8 variants of it and then goes on uncompiled. A model
    needs up to 8 in training, two per stage, as many in validation, and more if images have several sizes.
    """
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, MAX_GRAPHS)


ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, WindowLayout], Tensor]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "flex": _flex,
}
