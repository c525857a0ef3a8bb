"""The cosine in the attention of SwinV2 (section 3.2): q and k are brought to given lengths before their product.

Letters: N tokens in a window, G heads, D channels of a head; ... are windows, of one sample or of many.

Queries get the length of the learned scale and keys the length 1, so that their product is scale * cos(q, k).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def lengths_of(scale: Tensor) -> Tensor:
    """The lengths of q, which is the scale, and of k, which is 1: (G, 1) -> (2, G, 1)."""
    return torch.stack((scale, torch.ones_like(scale)))


def length_factors(q_k: Tensor, lengths: Tensor) -> Tensor:
    """What to multiply q and k (..., 2, G, D) by to give them the lengths (2, G, 1): (..., 2, G, 1), as `lengths`.

    Norms are computed in the dtype of the lengths, at least fp32. In half precision they could overflow, and the floor
    of 1e-12 would underflow to zero and turn zero vectors, which stay zero, into 0/0.
    """
    norms = torch.linalg.vector_norm(q_k, dim=-1, keepdim=True, dtype=lengths.dtype)
    return lengths / norms.clamp_min(1e-12)


def length_backward(grad: Tensor, x: Tensor, factors: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of x = factors * y (..., D): that of y (..., D), and those of the lengths (..., 1).

    The length depends on the part of the gradient along x only, and y on the part across x:

        dlength = (grad . x) / length,   dy = factor (grad - x (grad . x) / length^2)
    """
    along = (grad * x).sum(dim=-1, keepdim=True) / lengths
    return factors * (grad - x * (along / lengths)), along


def scaled_parts(qkv: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The projection (..., N, 3, G, D) -> q and k with their lengths, in `dtype`, and v: (..., N, G, D) each.

    scale: (G, 1), at least fp32. Autograd by itself would keep q and k in fp32 and fill the gradient of the projection
    part by part, which is a fifth of the memory and of the time that a block takes on a GPU.
    """
    # For the ONNX file of a detector, whose exporter does not know the operator of `_Scaled`.
    if torch.jit.is_tracing():
        q_k = qkv[..., :2, :, :]
        scaled = (q_k * length_factors(q_k, lengths_of(scale))).to(dtype)
        return scaled[..., 0, :, :], scaled[..., 1, :, :], qkv[..., 2, :, :]
    q, k, v = _Scaled.apply(qkv, scale, dtype)
    return q, k, v


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        lengths = lengths_of(scale)
        q_k = qkv[..., :2, :, :]
        factors = length_factors(q_k, lengths)
        scaled = torch.mul(q_k, factors, out=torch.empty_like(q_k, dtype=dtype, memory_format=torch.contiguous_format))
        ctx.save_for_backward(scaled, factors, lengths)
        ctx.dtype = qkv.dtype
        return scaled[..., 0, :, :], scaled[..., 1, :, :], qkv[..., 2, :, :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor, Tensor, None]:
        scaled, factors, lengths = ctx.saved_tensors
        grad = torch.stack((d_q, d_k), dim=-3).to(lengths.dtype)
        d_q_k, d_lengths = length_backward(grad, scaled, factors, lengths)
        *outer, _, heads, channels = scaled.shape
        d_qkv = torch.empty(*outer, 3, heads, channels, dtype=ctx.dtype, device=scaled.device)
        d_qkv[..., :2, :, :] = d_q_k
        d_qkv[..., 2, :, :] = d_v
        return d_qkv, d_lengths[..., 0, :, :].flatten(0, -3).sum(dim=0), None
