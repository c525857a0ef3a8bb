"""Swin Transformer V2 (arXiv 2111.09883) over any axes: (H, W) makes the image model, (T, H, W) the clip model.

Letters: B batch, C channels, *S the grid (tokens per axis), *P pixels (and frames) per axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from video_swinv2.models.attention import BACKENDS, Backend, WindowAttention
from video_swinv2.models.parameters import decays, layer_id, stage_id
from video_swinv2.models.windows import Layout, Size, crop_to, layout, merge, pad_to, partition, roll, shrink

Axes = int | Sequence[int]


class DropPath(nn.Module):
    """Stochastic depth per sample, kept paths scaled by 1 / (1 - rate).

    The branch is always computed and multiplied by 0 or not: a rank that skipped it would hang its peers in ZeRO.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        mask = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < keep
        return x * mask.to(x.dtype) / keep


class Mlp(nn.Module):
    """Linear to four times the width, exact GELU, Linear back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class BranchNorm(nn.LayerNorm):
    """LayerNorm at the end of a residual branch. It starts at zero, so that a fresh network is the identity there."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Block(nn.Module):
    """x + DropPath(norm1(attention(x))), then x + DropPath(norm2(mlp(x))): residual post-norm, equation 2 of the paper.

    `extra_norm` adds the LayerNorm on the main branch that huge and giant models carry (section 3.2).
    """

    def __init__(
        self, dim: int, heads: int, axes: int, drop_path: float, attention: Backend, extra_norm: bool = False
    ) -> None:
        super().__init__()
        self.attn = WindowAttention(dim, heads, axes, attention)
        self.norm1 = BranchNorm(dim)
        self.mlp = Mlp(dim)
        self.norm2 = BranchNorm(dim)
        self.drop_path = DropPath(drop_path)
        if extra_norm:
            self.enorm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, layout: Layout, norm: Size) -> Tensor:
        """(B, *S, C) -> (B, *S, C)."""
        x = x + self.drop_path(self.norm1(self._attend(x, layout, norm)))
        x = x + self.drop_path(self.norm2(self.mlp(x)))
        return self.enorm(x) if hasattr(self, "enorm") else x

    def _attend(self, x: Tensor, layout: Layout, norm: Size) -> Tensor:
        x = roll(pad_to(x, layout.padded), [-s for s in layout.shift])
        x = self.attn(partition(x, layout.window), layout, norm)
        return crop_to(roll(merge(x, layout.window, layout.padded), layout.shift), layout.grid)


class PatchMerging(nn.Module):
    """2 x 2 neighbours in space to one token of twice the width: Linear, then LayerNorm. Time is kept.

    Odd heights and widths are padded with zero tokens, as timm and Hugging Face do.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., H, W, C) -> (B, ..., ceil(H / 2), ceil(W / 2), 2C)."""
        if x.shape[-2] % 2 or x.shape[-3] % 2:  # F.pad copies even where there is nothing to pad
            x = F.pad(x, (0, 0, 0, x.shape[-2] % 2, 0, x.shape[-3] % 2))
        corners = [x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        return self.norm(self.reduction(torch.cat(corners, dim=-1)))


class Stage(nn.Module):
    """Blocks of one resolution, shifted windows in every second one, and the merging that follows them."""

    def __init__(self, blocks: Sequence[Block], dim: int, window: Size, norm: Size, merging: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = PatchMerging(dim) if merging else None
        self.window = window
        self.norm_window = norm
        self._kept_layouts: tuple[object, tuple[Layout, Layout]] | None = None

    def forward(self, x: Tensor, recomputed: int) -> Tensor:
        """(B, *S, C) -> (B, *S, C), before merging; the first `recomputed` blocks keep no activations."""
        layouts = self._layouts(tuple(x.shape[1:-1]), x.device)
        for index, block in enumerate(self.blocks):
            arguments = (x, layouts[index % 2], self.norm_window)
            if index < recomputed and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return x

    def _layouts(self, grid: Size, device: torch.device) -> tuple[Layout, Layout]:
        """Both layouts of this grid, shared by all blocks and kept until another size comes."""
        key = (grid, self.window, device)
        if torch.compiler.is_compiling():  # a graph that writes to its module is compiled again at the second call
            return layout(grid, self.window, False, device), layout(grid, self.window, True, device)
        if self._kept_layouts is None or self._kept_layouts[0] != key:
            pair = (layout(grid, self.window, False, device), layout(grid, self.window, True, device))
            self._kept_layouts = (key, pair)
        return self._kept_layouts[1]


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: convolution, then LayerNorm.

    An input that is not whole patches is continued with its last row, column or frame, so that one frame given to a
    model with patches of two frames counts as a still clip.
    """

    def __init__(self, dim: int, patch_size: Size) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch_size)]
        self.proj: nn.Module = convolution(3, dim, kernel_size=patch_size, stride=patch_size)  # type: ignore[arg-type]  # a union of kinds
        self.norm = nn.LayerNorm(dim)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, *P) -> (B, *S, C)."""
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        if any(missing):
            x = F.pad(x, [n for m in reversed(missing) for n in (0, m)], mode="replicate")
        return self.norm(self.proj(x).movedim(1, -1))


class SwinV2(nn.Module):
    """Swin Transformer V2 with residual post-norm, scaled cosine attention and log-CPB.

    State-dict names are Microsoft's; an image model's state dict is Microsoft's exactly, without its derived buffers.
    Sizes are an int, (H, W) or (T, H, W). Raises ValueError for sizes that do not fit together.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        num_classes: int,
        frames: int | None = None,
        image_size: Axes = 224,
        patch_size: Axes | None = None,
        window: Axes | None = None,
        cpb_norm: Sequence[Sequence[int]] | None = None,
        drop_path: float = 0.0,
        head_dropout: float = 0.0,
        attention: Backend = "auto",
        checkpoint_blocks: int = 0,
        extra_norm_every: int = 0,
        name: str = "swinv2_custom",
    ) -> None:
        super().__init__()
        if attention not in BACKENDS:
            raise ValueError(f"attention: {attention!r} is not one of {', '.join(BACKENDS)}")
        if len(depths) != len(num_heads):
            raise ValueError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)} differ in length")
        axes = 2 if frames is None else 3
        self.name = name
        self.embed_dim = embed_dim
        self.depths = tuple(depths)
        self.num_heads = tuple(num_heads)
        self.num_classes = num_classes
        self.frames = frames
        self.image_size = per_axis("image_size", image_size, 2)
        self.patch_size = per_axis("patch_size", (2, 4, 4)[-axes:] if patch_size is None else patch_size, axes)
        self.window = per_axis("window", (8, 7, 7)[-axes:] if window is None else window, axes)
        self.drop_path = drop_path
        self.attention: Backend = attention
        self.checkpoint_blocks = checkpoint_blocks
        self.extra_norm_every = extra_norm_every
        norms = self._native_windows() if cpb_norm is None else cpb_norm
        if len(norms) != len(self.depths):
            raise ValueError(f"cpb_norm: {len(norms)} normalisers for {len(self.depths)} stages")

        self.patch_embed = PatchEmbed(embed_dim, self.patch_size)
        rates = torch.linspace(0, drop_path, sum(self.depths), device="cpu").tolist()
        stages = []
        for i, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            dim, first = embed_dim * 2**i, sum(self.depths[:i])
            blocks = [
                Block(
                    dim,
                    heads,
                    axes,
                    rates[first + j],
                    attention,
                    bool(extra_norm_every) and (j + 1) % extra_norm_every == 0,
                )
                for j in range(depth)
            ]
            norm = per_axis("cpb_norm", norms[i], axes)
            stages.append(Stage(blocks, dim, self.window, norm, merging=i < len(self.depths) - 1))
        self.layers = nn.ModuleList(stages)
        self.num_features = embed_dim * 2 ** (len(self.depths) - 1)
        self.norm = nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(head_dropout)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    @property
    def cpb_norm(self) -> list[Size]:
        """The log-CPB normaliser of every stage, per axis: part of the weights, whatever the window in use."""
        return [stage.norm_window for stage in self.stages()]

    @cpb_norm.setter
    def cpb_norm(self, norms: Sequence[Sequence[int]]) -> None:
        for stage, norm in zip(self.stages(), norms, strict=True):
            stage.norm_window = per_axis("cpb_norm", norm, len(self.window))

    def blocks(self) -> list[Block]:
        """All blocks in the order of the forward pass."""
        return [block for stage in self.stages() for block in stage.blocks if isinstance(block, Block)]

    def stages(self) -> list[Stage]:
        """The stages in the order of the forward pass."""
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    def architecture(self) -> dict[str, object]:
        """The constructor arguments as plain data, the log-CPB normaliser among them."""
        return {
            "name": self.name,
            "embed_dim": self.embed_dim,
            "depths": self.depths,
            "num_heads": self.num_heads,
            "num_classes": self.num_classes,
            "frames": self.frames,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "window": self.window,
            "cpb_norm": [list(norm) for norm in self.cpb_norm],
            "drop_path": self.drop_path,
            "head_dropout": self.head_drop.p,
            "attention": self.attention,
            "checkpoint_blocks": self.checkpoint_blocks,
            "extra_norm_every": self.extra_norm_every,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) or clips (B, 3, T, H, W), normalised -> class logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, *P) -> the last stage's tokens after the final norm (B, *S, C)."""
        return self.encode(self.embed(x))

    def forward_head(self, features: Tensor) -> Tensor:
        """(B, *S, C) -> mean over all tokens -> (B, num_classes)."""
        return self.head(self.head_drop(features.flatten(1, -2).mean(dim=1)))

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """(B, 3, *P) -> what each stage gives before merging, as (B, C_i, *S_i); the final norm is not applied."""
        return [tokens.movedim(-1, 1) for tokens in self._run_stages(self.embed(x))]

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, *P) -> patch tokens (B, *S, C), where SimMIM puts its mask token."""
        if x.ndim != 2 + len(self.window) or x.shape[1] != 3:
            wanted = "(B, 3, H, W)" if len(self.window) == 2 else "(B, 3, T, H, W)"
            raise ValueError(f"{self.name} takes {wanted}, not {tuple(x.shape)}")
        return self.patch_embed(x)

    def encode(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, *S, C) -> the last stage's tokens after the final norm."""
        return self.norm(self._run_stages(tokens)[-1])

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        outputs, recomputed = [], self.checkpoint_blocks
        for stage in self.stages():
            outputs.append(stage(x, recomputed))
            recomputed -= len(stage.blocks)
            x = stage.downsample(outputs[-1]) if stage.downsample is not None else outputs[-1]
        return outputs

    def _native_windows(self) -> list[Size]:
        """The window of every stage at the size the model is built for, shrunk to the grid."""
        pixels = self.image_size if self.frames is None else (self.frames, *self.image_size)
        grid = tuple(math.ceil(size / patch) for size, patch in zip(pixels, self.patch_size, strict=True))
        windows = []
        for _ in self.depths:
            windows.append(shrink(self.window, grid)[0])
            grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))
        return windows

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        frames: int | None = None,
        image_size: Axes | None = None,
        patch_size: Axes | None = None,
        window: Axes | None = None,
        cpb_norm: Sequence[Sequence[int]] | None = None,
    ) -> SwinV2:
        """A model with the weights of a file or Hub folder of any known layout, in eval mode, fp32, on the CPU.

        Sizes not given are those the weights were trained with; `frames` makes a clip model of image weights. cpb_norm:
        as in `load_weights`. UserError for weights that cannot be read or explained, UsageError for sizes.
        """
        # Here, not above: models know nothing of files, but people look for this name on the class.
        from video_swinv2.weights.formats import read_checkpoint
        from video_swinv2.weights.pretrained import Sizes, open_model

        sizes = Sizes(frames, image_size, patch_size, window)
        return open_model(read_checkpoint(path), sizes, cpb_norm=cpb_norm)[0]

    def save_pretrained(self, folder: Path | str, *, classes: Sequence[str] = ()) -> None:
        """Write `model.safetensors` and a readable `config.json`; `save_model` can say more."""
        from video_swinv2.weights.pretrained import save_pretrained  # see from_pretrained

        save_pretrained(self, folder, classes=classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for other classes, on the same device and in the same dtype; 0 leaves the head away."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.head.to(self.norm.weight).apply(_initialise)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """All blocks recompute their activations in the backward pass, or none does."""
        self.checkpoint_blocks = sum(self.depths) if enable else 0

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay, one-dimensional ones among them."""
        return {name for name, parameter in self.named_parameters() if not decays(name, parameter)}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """A function from a parameter's name to its depth, by block or (coarse) by stage: timm's optimizers take it."""
        return partial(stage_id if coarse else layer_id, depths=self.depths)


def per_axis(key: str, value: Axes, axes: int) -> Size:
    """An int for every axis, or one value per axis as a tuple of positive ints; ValueError naming `key` otherwise."""
    sizes = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(sizes) != axes or any(not isinstance(n, int) or n < 1 for n in sizes):
        order = "(H, W)" if axes == 2 else "(T, H, W)"
        raise ValueError(f"{key}: {value} does not fit; give a positive int or {order}")
    return sizes


def _initialise(module: nn.Module) -> None:
    """Linear weights normal with 0.02 (Microsoft truncates at 2, which is 100 deviations), biases zero.

    Convolutions and LayerNorms keep torch's own start.
    """
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
