"""Swin Transformer V2 (arXiv 2111.09883) for any number of axes: (H, W) for images, (T, H, W) for clips.

Letters: B batch, C channels, *S the grid (tokens per axis), *P pixels (and frames) per axis.

    (B, 3, *P) -> PatchEmbed -> (B, *S, C)
    for each stage: blocks at (B, *S, C), then PatchMerging to half of H and W and twice C; T is never merged
    -> LayerNorm -> mean over all tokens -> head -> (B, num_classes)

Module names (`layers`, `downsample`, `attn`, `cpb_mlp`, ...) are Microsoft's and must stay: they are the keys of
released checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from video_swinv2.models.attention import BACKENDS, Backend, WindowAttention
from video_swinv2.models.parameters import decays, layer_id, stage_id
from video_swinv2.models.position_bias import window_coordinates
from video_swinv2.models.preprocessing import Preprocessing
from video_swinv2.models.windows import (
    PerAxis,
    WindowLayout,
    from_windows,
    shrink_window,
    to_windows,
    window_layout,
)

IntOrPerAxis = int | Sequence[int]
"""One int that applies to all axes, or one number per axis: (H, W) or (T, H, W)."""


class DropPath(nn.Module):
    """The addition of a residual branch with stochastic depth, drawn per sample: x + branch / (1 - rate), or x alone.

    A dropped branch is still computed and then multiplied by 0. Under ZeRO, a rank that skipped it would miss the
    collectives of its parameters, and the other ranks would wait for it forever.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """(B, *S, C), (B, *S, C) -> (B, *S, C)."""
        if not self.training or self.rate == 0:
            return x + branch
        survival = 1 - self.rate
        # (B, 1, ..., 1): one draw per sample, the same for all tokens and channels.
        mask = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < survival
        return torch.addcmul(x, branch, mask.to(branch.dtype) / survival)


class Mlp(nn.Module):
    """The feed-forward network of a block: Linear to four times the width, exact GELU, Linear back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        hidden = self.fc1(x)
        # In place if no gradient needs the input: this halves the memory, and on CPUs fresh memory can cost more than
        # GELU itself. Programs that record operations get the usual operator.
        in_place = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing())
        return self.fc2(torch.ops.aten.gelu_(hidden) if in_place else F.gelu(hidden))


class BranchNorm(nn.LayerNorm):
    """LayerNorm at the end of a residual branch, initialised to zero, so that a fresh block is the identity.

    `nn.LayerNorm` calls `reset_parameters` in its constructor. The zeros are Microsoft's initialisation.
    """

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class Block(nn.Module):
    """One transformer block with residual post-norm: attention within windows, then an MLP.

    The norm is the last operation of each residual branch, before the addition: x + DropPath(norm1(attention(x))), then
    x + DropPath(norm2(mlp(x))). `extra_norm` adds a LayerNorm on the main branch, as in the huge and giant models. Both
    are in section 3.2 of the paper.
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
        # `enorm` is a name in released checkpoints. Blocks without the norm have no such attribute.
        if extra_norm:
            self.enorm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, layout: WindowLayout, coordinates: Tensor) -> Tensor:
        """(B, *S, C) -> (B, *S, C); `coordinates` are those of the window of `layout`, `window_coordinates`."""
        x = self.drop_path(x, self.norm1(self._attend(x, layout, coordinates)))
        x = self.drop_path(x, self.norm2(self.mlp(x)))
        return self.enorm(x) if hasattr(self, "enorm") else x

    def _attend(self, x: Tensor, layout: WindowLayout, coordinates: Tensor) -> Tensor:
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            # The product to come would cast anyway; now, half as many bytes have to move. CPUs are 3 % slower with it.
            x = x.to(torch.get_autocast_dtype("cuda"))
        # (B, *S, C) -> (B, W, N, C), attention within each window, and back. windows.py works through an example.
        return from_windows(self.attn(to_windows(x, layout), layout, coordinates), layout)


class PatchMerging(nn.Module):
    """Merges 2 x 2 neighbours in space into one token of twice the width: Linear, then LayerNorm. T is not merged.

    Odd heights and widths are padded with zero tokens, as in timm and Hugging Face.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., H, W, C) -> (B, ..., ceil(H / 2), ceil(W / 2), 2C)."""
        if x.shape[-2] % 2 or x.shape[-3] % 2:  # F.pad would copy even when there is nothing to pad
            x = F.pad(x, (0, 0, 0, x.shape[-2] % 2, 0, x.shape[-3] % 2))
        # Four tensors (B, ..., H/2, W/2, C), concatenated to 4C. The order (row, column) = 00, 10, 01, 11 is
        # Microsoft's, and the released weights of `reduction` depend on it.
        corners = [x[..., row::2, column::2, :] for column in (0, 1) for row in (0, 1)]
        return self.norm(self.reduction(torch.cat(corners, dim=-1)))


Geometry = tuple[WindowLayout, WindowLayout, Tensor]
"""All that the blocks of a stage need to know of the grid: layouts without and with shift, and coordinates."""


class Stage(nn.Module):
    """The blocks of one resolution, every second one with shifted windows, and the patch merging that follows them.

    `forward` does not apply the merging, so that `SwinV2` can also return the features before it.
    """

    def __init__(self, blocks: Sequence[Block], dim: int, window: PerAxis, norm: PerAxis, merging: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = PatchMerging(dim) if merging else None
        self.window = window
        self.norm_window = norm
        self._kept: tuple[object, Geometry] | None = None

    def forward(self, x: Tensor, recomputed: int) -> Tensor:
        """(B, *S, C) -> (B, *S, C), before merging.

        The first `recomputed` blocks recompute their activations in the backward pass; the number may be negative.
        """
        *layouts, coordinates = self._geometry(tuple(x.shape[1:-1]), x.device)
        for index, block in enumerate(self.blocks):
            # Blocks 0, 2, ... have plain windows, blocks 1, 3, ... shifted ones.
            arguments = (x, layouts[index % 2], coordinates)
            if index < recomputed and torch.is_grad_enabled():
                # The reentrant variant would lose all gradients if no input of the block required one, as behind a
                # frozen patch embedding.
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return x

    def _geometry(self, grid: PerAxis, device: torch.device) -> Geometry:
        """The layouts without and with shift, and the coordinates of their window.

        They are shared by all blocks, and kept until one of their sizes or the device changes.
        """
        key = (grid, self.window, self.norm_window, device)
        if torch.compiler.is_compiling():
            # Nothing is kept here: a graph that writes to its module would be compiled again at the second call.
            return self._new_geometry(grid, device)
        if self._kept is None or self._kept[0] != key:
            # A validation in inference mode may come first, and training cannot use tensors made in that mode.
            with torch.inference_mode(False):
                self._kept = (key, self._new_geometry(grid, device))
        return self._kept[1]

    def _new_geometry(self, grid: PerAxis, device: torch.device) -> Geometry:
        plain, shifted = (window_layout(grid, self.window, moved, device) for moved in (False, True))
        return plain, shifted, window_coordinates(plain.window, self.norm_window, device)


class PatchEmbed(nn.Module):
    """Turns non-overlapping patches into tokens: convolution, then LayerNorm.

    An input that does not divide into whole patches is padded by repeating its last row, column or frame. A model with
    patches of two frames therefore accepts a single frame, which becomes a still clip of two.
    """

    def __init__(self, dim: int, patch_size: PerAxis, in_chans: int = 3) -> None:
        super().__init__()
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch_size)]
        self.proj: nn.Module = convolution(in_chans, dim, kernel_size=patch_size, stride=patch_size)  # type: ignore[arg-type]  # mypy sees the union of both classes
        self.norm = nn.LayerNorm(dim)
        self.patch_size = patch_size

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, *P) -> (B, *S, C)."""
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.patch_size, strict=True)]
        # F.pad takes (before, after) for each axis, starting with the last one.
        if any(missing):
            x = F.pad(x, [n for m in reversed(missing) for n in (0, m)], mode="replicate")
        # (B, C, *S) -> (B, *S, C): from here on channels are last, as LayerNorm and Linear need them.
        return self.norm(self.proj(x).movedim(1, x.ndim - 1))


@dataclass(frozen=True)
class FeatureInfo:
    """What the feature maps of `forward_pyramid` are, stage by stage. Names and keys are timm's.

    Indexing gives the dictionary of a stage: `num_chs` channels, `reduction` (pixels per token in height and width) and
    `module` (the name of the stage).
    """

    stages: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.stages[index]

    def channels(self) -> list[int]:
        """The number of channels of every map."""
        return [stage["num_chs"] for stage in self.stages]

    def reduction(self) -> list[int]:
        """The number of pixels, in height and in width, that one token of every map covers."""
        return [stage["reduction"] for stage in self.stages]

    def module_name(self) -> list[str]:
        """The name of the module that each map comes from."""
        return [stage["module"] for stage in self.stages]


class SwinV2(nn.Module):
    """Swin Transformer V2 with residual post-norm, scaled cosine attention and log-CPB.

    `create_model` builds the named variants and documents the arguments. The state dict of an image model has the same
    keys as Microsoft's, except for the derived buffers, which are computed instead. Sizes are an int, (H, W) or
    (T, H, W). Raises ValueError for sizes that do not fit together.
    """

    # Users of timm and Hugging Face expect these two methods on the class. Reading and writing files is the task of
    # weights/, which must not be imported here. Instead, weights/pretrained.py attaches both when it is imported.
    from_pretrained: ClassVar[Callable[..., SwinV2]]
    """Build a model from a file or Hub folder in any supported layout; see `weights.pretrained.from_pretrained`."""
    save_pretrained: ClassVar[Callable[..., None]]
    """Write `model.safetensors` and `config.json` to a folder; see `weights.pretrained.save_pretrained`."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        num_classes: int,
        frames: int | None = None,
        image_size: IntOrPerAxis = 224,
        patch_size: IntOrPerAxis | None = None,
        window: IntOrPerAxis | None = None,
        cpb_norm: Sequence[Sequence[int]] | None = None,
        drop_path: float = 0.0,
        head_dropout: float = 0.0,
        attention: Backend = "auto",
        checkpoint_blocks: int = 0,
        extra_norm_every: int = 0,
        in_chans: int = 3,
        features_only: bool = False,
        name: str = "swinv2_custom",
    ) -> None:
        super().__init__()
        if attention not in BACKENDS:
            raise ValueError(f"attention: {attention!r} is not one of {', '.join(BACKENDS)}")
        if in_chans < 1:
            raise ValueError(f"in_chans: invalid value {in_chans}; give the number of channels of the input")
        if features_only and num_classes:
            raise ValueError(f"num_classes: {num_classes}, but a features_only model has no head; omit num_classes")
        if len(depths) != len(num_heads):
            raise ValueError(f"depths {tuple(depths)} and num_heads {tuple(num_heads)} differ in length")
        # The number of axes is the only difference between an image and a clip model.
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
        self.in_chans = in_chans
        self.features_only = features_only
        self.classes: tuple[str, ...] = ()
        """The names of the head's rows, in order; () if unknown. Model files keep them."""
        self.preprocessing: Preprocessing | None = None
        """How frames become the input that the weights were trained with; None if unknown. Model files keep it."""
        # The log-CPB normaliser is a property of the weights. Fresh weights belong to the window they are created with.
        norms = self._native_windows() if cpb_norm is None else cpb_norm
        if len(norms) != len(self.depths):
            raise ValueError(f"cpb_norm: {len(norms)} normalisers for {len(self.depths)} stages")

        self.patch_embed = PatchEmbed(embed_dim, self.patch_size, self.in_chans)
        # The drop path rate grows linearly from 0 at the first block to `drop_path` at the last. It is computed on the
        # CPU even inside `with torch.device("meta")`, where `tolist` would fail.
        rates = torch.linspace(0, drop_path, sum(self.depths), device="cpu").tolist()
        stages = []
        for i, (depth, heads) in enumerate(zip(self.depths, self.num_heads, strict=True)):
            # Width doubles from stage to stage; `first` is the number of blocks before this stage.
            dim, first = embed_dim * 2**i, sum(self.depths[:i])
            blocks = [
                Block(
                    dim,
                    heads,
                    axes,
                    rates[first + j],
                    attention,
                    # The huge and giant models have an extra norm after every sixth block of a stage.
                    bool(extra_norm_every) and (j + 1) % extra_norm_every == 0,
                )
                for j in range(depth)
            ]
            norm = per_axis("cpb_norm", norms[i], axes)
            stages.append(Stage(blocks, dim, self.window, norm, merging=i < len(self.depths) - 1))
        self.layers = nn.ModuleList(stages)
        self.num_features = embed_dim * 2 ** (len(self.depths) - 1)
        # A parameter that `forward` did not use would have no gradient, which data-parallel training refuses.
        self.norm: nn.Module = nn.Identity() if features_only else nn.LayerNorm(self.num_features)
        self.head_drop = nn.Dropout(head_dropout)
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.apply(_initialise)

    @property
    def cpb_norm(self) -> list[PerAxis]:
        """The log-CPB normaliser of every stage, per axis. It belongs to the weights, not to the window in use."""
        return [stage.norm_window for stage in self.stages()]

    @cpb_norm.setter
    def cpb_norm(self, norms: Sequence[Sequence[int]]) -> None:
        for stage, norm in zip(self.stages(), norms, strict=True):
            stage.norm_window = per_axis("cpb_norm", norm, len(self.window))

    @property
    def feature_info(self) -> FeatureInfo:
        """Channels and reduction of the maps that `forward_pyramid` returns."""
        return FeatureInfo(
            tuple(
                {"num_chs": self.embed_dim * 2**i, "reduction": self.patch_size[-1] * 2**i, "module": f"layers.{i}"}
                for i in range(len(self.depths))
            )
        )

    def blocks(self) -> list[Block]:
        """All blocks in the order of the forward pass."""
        # The `isinstance` is for the type checker, to which a ModuleList holds any modules.
        return [block for stage in self.stages() for block in stage.blocks if isinstance(block, Block)]

    def stages(self) -> list[Stage]:
        """The stages in the order of the forward pass."""
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    def architecture(self) -> dict[str, object]:
        """The constructor arguments as plain data, to build an equal model. `cpb_norm` is always given explicitly."""
        # Model files store this dictionary, so its keys must not change.
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
            "in_chans": self.in_chans,
            "features_only": self.features_only,
        }

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Images (B, 3, H, W) or clips (B, 3, T, H, W), normalised -> class logits (B, num_classes).

        A `features_only` model returns the maps of `forward_pyramid` instead.
        """
        return self.forward_pyramid(x) if self.features_only else self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, 3, *P) -> the last stage's tokens after the final norm (B, *S, C)."""
        return self.encode(self.embed(x))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, *S, C) -> mean over all tokens -> (B, num_classes).

        Without a head, and with `pre_logits`, it returns the mean (B, C).
        """
        # (B, *S, C) -> (B, tokens, C) -> (B, C)
        pooled = self.head_drop(features.flatten(1, -2).mean(dim=1))
        return pooled if pre_logits else self.head(pooled)

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """(B, 3, *P) -> the output of each stage i before merging, (B, C_i, *S_i), without the final norm."""
        return [tokens.movedim(tokens.ndim - 1, 1) for tokens in self._run_stages(self.embed(x))]

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, *P) -> patch tokens (B, *S, C), some of which SimMIM replaces.

        Raises ValueError for other shapes, and TypeError for integers, such as the uint8 pixels of a decoder.
        """
        if x.ndim != 2 + len(self.window) or x.shape[1] != self.in_chans:
            wanted = f"(B, {self.in_chans}, {'H, W' if len(self.window) == 2 else 'T, H, W'})"
            raise ValueError(f"{self.name} takes {wanted}, not {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(
                f"{self.name} takes normalised floating-point pixels, not {x.dtype}; divide pixels of 0 to 255 by 255, "
                "then subtract the mean and divide by the standard deviation of each channel (model.preprocessing of "
                "a loaded model has both)"
            )
        return self.patch_embed(x)

    def encode(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, *S, C) -> the last stage's tokens after the final norm."""
        return self.norm(self._run_stages(tokens)[-1])

    def _run_stages(self, x: Tensor) -> list[Tensor]:
        """Patch tokens (B, *S, C) -> the output of each stage before merging, (B, *S_i, C_i)."""
        # `checkpoint_blocks` counts through the whole network: each stage uses up as many as it has blocks.
        outputs, recomputed = [], self.checkpoint_blocks
        for stage in self.stages():
            outputs.append(stage(x, recomputed))
            recomputed -= len(stage.blocks)
            x = stage.downsample(outputs[-1]) if stage.downsample is not None else outputs[-1]
        return outputs

    def _native_windows(self) -> list[PerAxis]:
        """The window of every stage at the input size that the model is built for, shrunk to the grid of the stage."""
        pixels = self.image_size if self.frames is None else (self.frames, *self.image_size)
        # Grids are rounded up, because PatchEmbed and PatchMerging pad.
        grid = tuple(math.ceil(size / patch) for size, patch in zip(pixels, self.patch_size, strict=True))
        windows = []
        for _ in self.depths:
            windows.append(shrink_window(self.window, grid)[0])
            grid = (*grid[:-2], math.ceil(grid[-2] / 2), math.ceil(grid[-1] / 2))
        return windows

    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or an Identity if the model has none. The name is timm's."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head with a freshly initialised one for `num_classes` classes; 0 removes it.

        The new head has the device and the dtype of the model, and no class names. Raises ValueError for a
        `features_only` model.
        """
        if self.features_only:
            raise ValueError("a features_only model takes no head; build the model without features_only")
        self.num_classes = num_classes
        self.classes = ()
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        # `to` with a tensor adopts both its device and its dtype.
        self.head.to(self.patch_embed.norm.weight).apply(_initialise)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Make either all blocks or none recompute their activations in the backward pass. The name is timm's."""
        self.checkpoint_blocks = sum(self.depths) if enable else 0

    def no_weight_decay(self) -> set[str]:
        """Names of all parameters without weight decay, including biases and norms. The name is timm's."""
        return {name for name, parameter in self.named_parameters() if not decays(name, parameter)}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """A function from a parameter name to its depth, per block or (coarse) per stage, for timm's optimizers."""
        return partial(stage_id if coarse else layer_id, depths=self.depths)


def per_axis(key: str, value: IntOrPerAxis, axes: int) -> PerAxis:
    """Expand an int to all axes, or check a sequence. Raises ValueError, naming `key`, unless all are positive ints."""
    sizes = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(sizes) != axes or any(not isinstance(n, int) or n < 1 for n in sizes):
        order = "(H, W)" if axes == 2 else "(T, H, W)"
        raise ValueError(f"{key}: invalid value {value}; give a positive int or {order}")
    return sizes


def _initialise(module: nn.Module) -> None:
    """Initialise Linear weights from a normal distribution with standard deviation 0.02, and biases with zero.

    The distribution is truncated at -2 and 2, as in Microsoft's code. That is 100 standard deviations, so it has no
    effect. Convolutions and LayerNorms keep torch's default initialisation.
    """
    if isinstance(module, nn.Linear):
        # Drawn on the CPU even if the weight is on the GPU already, as it is under ZeRO-3. The GPU's generator draws
        # other numbers, but a seed should mean the same weights at every stage.
        weight = module.weight
        drawn = torch.empty_like(weight, device="cpu") if weight.is_cuda else weight
        nn.init.trunc_normal_(drawn, std=0.02)
        if weight.is_cuda:
            weight.data.copy_(drawn)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
