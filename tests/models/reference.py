"""SwinV2 a second time, from its definition: what the fast model is compared with, in fp64 and one query at a time.

Nothing is padded, rolled or cut into windows here, and no table or mask exists: every query looks up, by integer
coordinates, the keys that share its cell of the (shifted) tiling, and the bias MLP is asked about each single pair.
Letters: N tokens of the whole grid, A axes, C channels, G heads, D channels of a head, K keys of one query.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from video_swinv2.models.attention import Backend
from video_swinv2.models.swinv2 import SwinV2

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Grid:
    """A grid of tokens, a window, and the log-CPB normaliser where it is not the window as shrunk to the grid."""

    grid: tuple[int, ...]
    window: tuple[int, ...]
    norm: tuple[int, ...] | None = None


# The second block shifts every axis longer than its window: here all, some or none of them, with whole windows, padded
# and shrunk ones, odd and even ones, axes that differ, normalisers that are not the window, in 2-D and 3-D.
GRIDS = (
    Grid((8, 8), (4, 4)),
    Grid((9, 6), (4, 4)),
    Grid((7, 15), (7, 7)),
    Grid((4, 6, 8), (2, 3, 4)),  # 27 regions
    Grid((5, 7, 9), (2, 3, 4)),
    Grid((3, 7, 14), (8, 7, 7)),
    Grid((4, 9, 5), (8, 4, 3)),
    Grid((6, 8, 8), (3, 8, 4)),
    Grid((5, 7, 8), (3, 5, 5), (8, 7, 7)),
    Grid((4, 8, 8), (4, 6, 6), (2, 4, 4)),
    Grid((1, 6, 9), (1, 3, 4)),
)


def reference_differences(case: Grid, backends: Sequence[Backend]) -> list[float]:
    """Largest difference, per backend, between the model and this file."""
    expected, *found = reference_answers(case, backends)
    return [(got - expected).abs().max().item() for got in found]


def reference_answers(case: Grid, backends: Sequence[Backend]) -> list[Tensor]:
    """Features of this file in fp64, then of the model per backend: one unshifted and one shifted block."""
    model = randomise(
        SwinV2(
            embed_dim=16,
            depths=(2,),
            num_heads=(2,),
            num_classes=0,
            frames=case.grid[0] if len(case.grid) == 3 else None,
            image_size=case.grid[-2:],
            patch_size=1,
            window=case.window,
            cpb_norm=[case.norm] if case.norm else None,
        )
    )
    x = torch.randn(1, 3, *case.grid, generator=torch.Generator().manual_seed(6))
    results = [features(model, x)]
    for backend in backends:
        for block in model.blocks():
            block.attn.attention = backend
        with torch.no_grad():
            results.append(model.forward_features(x))
    return results


def randomise(model: SwinV2, seed: int = 0) -> SwinV2:
    """Every tensor away from its start, in eval mode: post-norms begin at zero, which makes any comparison empty."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("logit_scale"):
                p.uniform_(1.0, 3.0, generator=generator)
                p[1:2] = 5.2  # one head past the clamp at ln 100 = 4.6
            elif "cpb_mlp" in name:
                p.normal_(std=0.4, generator=generator)
            elif name == "head.weight":
                p.normal_(std=0.1, generator=generator)  # logits of about 3, so that an absolute limit means something
            else:
                p.normal_(std=0.02 if p.ndim > 1 else 0.1, generator=generator)
    return model.eval()


def features(model: SwinV2, x: Tensor) -> Tensor:
    """What `model.forward_features` must give: (B, 3, *P) -> (B, *S, C) in fp64."""
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    return torch.stack([_sample(model, weights, sample.double()) for sample in x])


def _sample(model: SwinV2, weights: Weights, x: Tensor) -> Tensor:
    tokens, grid = _embed(weights, x, model.patch_size)
    for i, (depth, heads) in enumerate(zip(model.depths, model.num_heads, strict=True)):
        for j in range(depth):
            block = _under(weights, f"layers.{i}.blocks.{j}.")
            attended = _attend(block, tokens, grid, model.window, bool(j % 2), heads, model.cpb_norm[i])
            tokens = tokens + _norm(block, "norm1.", attended)
            hidden = F.gelu(_linear(block, "mlp.fc1.", tokens))
            tokens = tokens + _norm(block, "norm2.", _linear(block, "mlp.fc2.", hidden))
            if "enorm.weight" in block:
                tokens = _norm(block, "enorm.", tokens)
        if i < len(model.depths) - 1:
            tokens, grid = _downsample(_under(weights, f"layers.{i}.downsample."), tokens, grid)
    return _norm(weights, "norm.", tokens).view(*grid, -1)


def _embed(weights: Weights, x: Tensor, patch: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """(3, *P) -> (N, C) and the grid; what is missing of a last patch repeats the last row, column or frame."""
    for axis, p in enumerate(patch, start=1):
        size = x.shape[axis]
        x = x.index_select(axis, torch.arange(math.ceil(size / p) * p).clamp(max=size - 1)).unfold(axis, p, p)
    grid = tuple(x.shape[1 : 1 + len(patch)])
    pixels = x.movedim(0, len(patch)).reshape(math.prod(grid), -1)
    kernel = weights["patch_embed.proj.weight"].flatten(1)
    return _norm(weights, "patch_embed.norm.", pixels @ kernel.t() + weights["patch_embed.proj.bias"]), grid


def cells(grid: Sequence[int], window: Sequence[int], shifted: bool) -> Tensor:
    """(N, A): the cell of every token in the tiling whose cut points per axis are s, s + w, s + 2w, ...

    An axis no longer than the window is one cell. The token before the first cut is in cell -1, alone with its like.
    """
    columns = []
    for size, w in zip(grid, window, strict=True):
        shift = w // 2 if shifted and size > w else 0
        columns.append([(p - shift) // min(w, size) for p in range(size)])
    return torch.tensor(list(itertools.product(*columns)))


def _attend(
    block: Weights,
    tokens: Tensor,
    grid: Sequence[int],
    window: Sequence[int],
    shifted: bool,
    heads: int,
    norm: Sequence[int],
) -> Tensor:
    """(N, C) -> (N, C), one query after the other."""
    bias = torch.cat((block["attn.q_bias"], torch.zeros_like(block["attn.q_bias"]), block["attn.v_bias"]))
    q, k, v = (tokens @ block["attn.qkv.weight"].t() + bias).view(len(tokens), 3, heads, -1).unbind(1)
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    scale = block["attn.logit_scale"].view(-1).clamp(max=math.log(100)).exp()
    position = torch.tensor(list(itertools.product(*map(range, grid))))
    cell = cells(grid, window, shifted)
    out = torch.empty_like(v)
    for i in range(len(tokens)):
        keys = (cell == cell[i]).all(dim=1).nonzero()[:, 0]
        cosine = (q[i] * k[keys]).sum(dim=-1)
        weight = (cosine * scale + _pair_bias(block, position[i] - position[keys], norm)).softmax(dim=0)
        out[i] = (weight[..., None] * v[keys]).sum(dim=0)
    return _linear(block, "attn.proj.", out.flatten(1))


def _pair_bias(block: Weights, offset: Tensor, norm: Sequence[int]) -> Tensor:
    """(K, A) offsets query - key in tokens -> (K, G)."""
    u = 8 * offset.double() / torch.tensor([max(n - 1, 1) for n in norm])
    coordinates = torch.copysign((1 + u.abs()).log() / math.log(8), u)
    hidden = F.relu(coordinates @ block["attn.cpb_mlp.0.weight"].t() + block["attn.cpb_mlp.0.bias"])
    return 16 / (1 + (-hidden @ block["attn.cpb_mlp.2.weight"].t()).exp())


def _downsample(weights: Weights, tokens: Tensor, grid: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """Neighbours (0,0), (1,0), (0,1), (1,1) side by side, zeros beyond the border, then Linear and LayerNorm."""
    place = {position: i for i, position in enumerate(itertools.product(*map(range, grid)))}
    tokens = torch.cat((tokens, torch.zeros_like(tokens[:1])))  # the last row is what lies outside
    merged = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))
    rows = [
        [place.get((*t, 2 * h + dh, 2 * w + dw), -1) for dw in (0, 1) for dh in (0, 1)]
        for *t, h, w in itertools.product(*map(range, merged))
    ]
    joined = tokens[torch.tensor(rows)].flatten(1)
    return _norm(weights, "norm.", joined @ weights["reduction.weight"].t()), merged


def _under(weights: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _linear(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    return x @ weights[prefix + "weight"].t() + weights[prefix + "bias"]


def _norm(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[prefix + "weight"], weights[prefix + "bias"], eps=1e-5)
