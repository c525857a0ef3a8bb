"""The named variants of SwinV2, and `create_model`, which builds a model from a name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from video_swinv2.models.attention import Backend
from video_swinv2.models.swinv2 import IntOrPerAxis, SwinV2


@dataclass(frozen=True)
class Variant:
    """The hyperparameters that differ between variants.

    `extra_norm_every` adds a LayerNorm on the main branch after every so many blocks of a stage; 0 adds none.
    """

    embed_dim: int
    depths: tuple[int, ...]
    extra_norm_every: int = 0

    @property
    def num_heads(self) -> tuple[int, ...]:
        """Heads per stage. Every head has 32 channels, and the width doubles from stage to stage."""
        return tuple(self.embed_dim * 2**i // 32 for i in range(len(self.depths)))


# Widths and depths are those of the paper, except where noted. The order, smallest first, is that of `list_models`.
VARIANTS = {
    "swinv2_nano": Variant(32, (2, 2, 2, 2)),  # not in the paper; 2.3 M parameters, for demos, tests and laptops
    "swinv2_tiny": Variant(96, (2, 2, 6, 2)),
    "swinv2_small": Variant(96, (2, 2, 18, 2)),
    "swinv2_base": Variant(128, (2, 2, 18, 2)),
    "swinv2_large": Variant(192, (2, 2, 18, 2)),
    "swinv2_huge": Variant(352, (2, 2, 18, 2), extra_norm_every=6),
    "swinv2_giant": Variant(512, (2, 2, 42, 4), extra_norm_every=6),  # 3.0 B parameters in the paper
    "swinv2_giant_1b": Variant(448, (2, 2, 18, 2), extra_norm_every=6),  # released as the SimMIM "giant"
}


def list_models() -> list[str]:
    """The names that `create_model` accepts, smallest first."""
    return list(VARIANTS)


def find_variant(name: str) -> Variant:
    """The variant called `name`. Raises ValueError, with the closest known name, if there is none."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1)  # as `errors.nearest_name`
        raise ValueError(
            f"no model {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(list_models())}")
        )
    return VARIANTS[name]


def variant_name(embed_dim: int, depths: Sequence[int]) -> str:
    """The name of the variant with this width and these depths, or `swinv2_custom` if there is none."""
    sizes = {(variant.embed_dim, variant.depths): name for name, variant in VARIANTS.items()}
    return sizes.get((embed_dim, tuple(depths)), "swinv2_custom")


def create_model(
    name: str,
    *,
    num_classes: int = 0,
    frames: int | None = None,
    image_size: IntOrPerAxis = 224,
    patch_size: IntOrPerAxis | None = None,
    window: IntOrPerAxis | None = None,
    cpb_norm: Sequence[Sequence[int]] | None = None,
    drop_path: float = 0.0,
    head_dropout: float = 0.0,
    attention: Backend = "auto",
    checkpoint_blocks: int = 0,
    in_chans: int = 3,
    features_only: bool = False,
) -> SwinV2:
    """Create a freshly initialised SwinV2: a clip model if `frames` is given, otherwise an image model.

    Args:
        name: one of `list_models()`.
        num_classes: number of outputs of the head; 0 omits the head, and the model returns the mean of its tokens.
        frames: frames per clip; omit for an image model.
        image_size: pixels, as an int or (H, W).
        patch_size: an int for every axis, (H, W) or (T, H, W); by default 4 in space and 2 in time.
        window: attention window in tokens, in the same form; by default 7 in space and 8 in time.
        cpb_norm: the log-CPB normaliser per stage, (H, W) or (T, H, W) tokens; by default this model's window, shrunk
            to the grid of each stage.
        drop_path: rate of stochastic depth at the last block; it grows linearly from 0 at the first block.
        head_dropout: rate of dropout before the head.
        attention: the attention backend: auto, eager, sdpa, flex or sequential.
        checkpoint_blocks: number of blocks, counted from the first, that recompute their activations in the backward
            pass to save memory.
        in_chans: channels of the input.
        features_only: return the four stages' feature maps (B, C_i, [T',] H_i, W_i) instead of logits, as timm's models
            do; `feature_info` describes them. Such a model has neither a head nor the final norm.

    Raises ValueError for an unknown name or for sizes that do not fit together.
    """
    variant = find_variant(name)
    return SwinV2(
        name=name,
        embed_dim=variant.embed_dim,
        depths=variant.depths,
        num_heads=variant.num_heads,
        extra_norm_every=variant.extra_norm_every,
        num_classes=num_classes,
        frames=frames,
        image_size=image_size,
        patch_size=patch_size,
        window=window,
        cpb_norm=cpb_norm,
        drop_path=drop_path,
        head_dropout=head_dropout,
        attention=attention,
        checkpoint_blocks=checkpoint_blocks,
        in_chans=in_chans,
        features_only=features_only,
    )
