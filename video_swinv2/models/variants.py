"""The sizes of SwinV2 and `create_model`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from video_swinv2.models.attention import Backend
from video_swinv2.models.swinv2 import Axes, SwinV2


@dataclass(frozen=True)
class Variant:
    """What tells one size from another; every head is 32 channels wide."""

    embed_dim: int
    depths: tuple[int, ...]
    extra_norm_every: int = 0

    @property
    def num_heads(self) -> tuple[int, ...]:
        """Heads per stage."""
        return tuple(self.embed_dim * 2**i // 32 for i in range(len(self.depths)))


VARIANTS = {
    "swinv2_nano": Variant(32, (2, 2, 2, 2)),  # ours, 2.3 M parameters: for demonstrations, tests and laptops
    "swinv2_tiny": Variant(96, (2, 2, 6, 2)),
    "swinv2_small": Variant(96, (2, 2, 18, 2)),
    "swinv2_base": Variant(128, (2, 2, 18, 2)),
    "swinv2_large": Variant(192, (2, 2, 18, 2)),
    "swinv2_huge": Variant(352, (2, 2, 18, 2), extra_norm_every=6),
    "swinv2_giant": Variant(512, (2, 2, 42, 4), extra_norm_every=6),  # the paper's 3.0 B
    "swinv2_giant_1b": Variant(448, (2, 2, 18, 2), extra_norm_every=6),  # the released SimMIM "giant"
}


def list_models() -> list[str]:
    """The names that `create_model` knows, smallest first."""
    return list(VARIANTS)


def find_variant(name: str) -> Variant:
    """The size called `name`; ValueError with the nearest name if there is none."""
    if name not in VARIANTS:
        near = difflib.get_close_matches(name, VARIANTS, n=1, cutoff=0.4)
        raise ValueError(
            f"no model {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; there are {list_models()}")
        )
    return VARIANTS[name]


def variant_name(embed_dim: int, depths: Sequence[int]) -> str:
    """The name of the size with these numbers; `swinv2_custom` if it is none of ours."""
    sizes = {(variant.embed_dim, variant.depths): name for name, variant in VARIANTS.items()}
    return sizes.get((embed_dim, tuple(depths)), "swinv2_custom")


def create_model(
    name: str,
    *,
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
) -> SwinV2:
    """A freshly initialised SwinV2: a clip model when `frames` is given, an image model without.

    image_size: pixels, an int or (H, W). patch_size and window: an int for every axis, (H, W) or (T, H, W); by default
    4 and 7 in space, 2 and 8 in time. cpb_norm: the log-CPB normaliser per stage; by default the windows the model is
    built with, shrunk to each stage's grid. checkpoint_blocks: how many blocks, from the first on, recompute their
    activations in the backward pass. num_classes 0 leaves the head away. ValueError for an unknown name or sizes.
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
    )
