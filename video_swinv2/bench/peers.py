"""The models that ours is compared with: torchvision's Video Swin on clips, timm's SwinV2 as SimMIM's image encoder.

B batch, T H W frames and pixels, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from video_swinv2.errors import UsageError
from video_swinv2.models.simmim import SimMIM, mask_cells, masked_l1, random_mask
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.models.variants import Variant, create_model, find_variant

PeerLibrary = Literal["torchvision", "timm"]
Side = Literal["ours", "peer"]
FRAMES, PIXELS, WINDOW = 16, 224, (8, 7, 7)  # what torchvision's Video Swin is built for
TORCHVISION_PEERS = {"swinv2_tiny": "swin3d_t", "swinv2_small": "swin3d_s", "swinv2_base": "swin3d_b"}
# SimMIM's images and masks, and the drop path of its recipe for SwinV2-B (configs/simmim of Microsoft's).
SIMMIM_PIXELS, SIMMIM_WINDOW, SIMMIM_UNIT, SIMMIM_RATIO, SIMMIM_DROP_PATH = 192, 12, 32, 0.6, 0.1


@dataclass(frozen=True)
class Comparison:
    """What is compared on what input. Plain data, so that it can be sent to another process."""

    against: PeerLibrary
    name: str
    peer: str
    shape: tuple[int, ...]
    window: tuple[int, ...]
    passes: tuple[str, ...]
    """What is timed: "forward", "training step"."""


def compare_on_clips(name: str, batch: int, frames: int, pixels: int | None) -> Comparison:
    """Classification of clips with window (8, 7, 7), against torchvision's Video Swin of the same size.

    Raises UsageError for a size that torchvision does not have.
    """
    peer = f"torchvision {torchvision_peer(name)}"
    side = PIXELS if pixels is None else pixels
    return Comparison("torchvision", name, peer, (batch, 3, frames, side, side), WINDOW, ("forward", "training step"))


def compare_on_masked_images(name: str, batch: int, pixels: int | None) -> Comparison:
    """SimMIM on images with window 12, against timm's SwinV2 as the encoder under the same head, mask and loss.

    Raises UsageError for a size that timm's SwinV2 cannot have.
    """
    if variant_of(name).extra_norm_every:
        raise UsageError(f"--model {name}: timm's SwinV2 has no extra norms; choose a smaller size")
    side = SIMMIM_PIXELS if pixels is None else pixels
    peer = f"timm SwinTransformerV2 (as swinv2_{name.removeprefix('swinv2_')}_window{SIMMIM_WINDOW}_{side})"
    return Comparison("timm", name, peer, (batch, 3, side, side), (SIMMIM_WINDOW,) * 2, ("training step",))


def torchvision_peer(name: str) -> str:
    """torchvision's name for its Video Swin of our size `name`. Raises UsageError for a size it does not have."""
    if name not in TORCHVISION_PEERS:
        raise UsageError(
            f"--model {name}: torchvision has no model of this size; choose one of {', '.join(TORCHVISION_PEERS)}"
        )
    return TORCHVISION_PEERS[name]


def variant_of(name: str) -> Variant:
    """The model size called `name`. Raises UsageError for an unknown one."""
    try:
        return find_variant(name)
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error


def build_side(comparison: Comparison, side: Side) -> nn.Module:
    """One of the two models of a comparison, freshly initialised."""
    name, shape = comparison.name, comparison.shape
    if comparison.against == "timm":
        torch.manual_seed(0)
        return MaskedLoss(build_image_encoder(side, name, shape[-1]), shape)
    if side == "ours":
        return create_model(name, num_classes=400, frames=shape[2], image_size=shape[3], window=comparison.window)
    return build_torchvision(name)


def build_torchvision(name: str) -> nn.Module:
    """torchvision's Video Swin of our size `name`, freshly initialised, with 400 classes."""
    from torchvision.models import video

    model: nn.Module = getattr(video, torchvision_peer(name))(weights=None)
    return model


def build_image_encoder(side: Side, name: str, pixels: int) -> nn.Module:
    """The image encoder that SimMIM trains: ours, or timm's of the same size with the same drop path."""
    if side == "ours":
        return create_model(name, num_classes=0, image_size=pixels, window=SIMMIM_WINDOW, drop_path=SIMMIM_DROP_PATH)
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    size = find_variant(name)
    return TimmEncoder(
        SwinTransformerV2(
            img_size=pixels,
            window_size=SIMMIM_WINDOW,
            embed_dim=size.embed_dim,
            depths=size.depths,
            num_heads=size.num_heads,
            num_classes=0,
            drop_path_rate=SIMMIM_DROP_PATH,
        )
    )


class TimmEncoder(nn.Module):
    """timm's SwinV2 with the few attributes and methods that our SimMIM needs of an encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.patch_size = self.model.patch_embed.patch_size
        self.depths = [len(stage.blocks) for stage in self.model.layers]
        self.embed_dim = self.model.embed_dim
        self.num_features = self.model.num_features

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> patch tokens (B, H', W', C)."""
        return cast(Tensor, self.model.patch_embed(x))

    def encode(self, tokens: Tensor) -> Tensor:
        """Patch tokens -> the last stage's tokens, after the final norm."""
        return cast(Tensor, self.model.norm(self.model.layers(tokens)))


class MaskedLoss(nn.Module):
    """An encoder inside SimMIM with masks drawn once: maps images to their masked L1 loss."""

    masks: Tensor

    def __init__(self, encoder: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.simmim = SimMIM(cast(SwinV2, encoder), SIMMIM_UNIT)
        cells = mask_cells(shape[2:], SIMMIM_UNIT, 2)
        generator = torch.Generator().manual_seed(0)
        masks = [random_mask(cells, SIMMIM_RATIO, generator) for _ in range(shape[0])]
        self.register_buffer("masks", torch.stack(masks))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> scalar."""
        return masked_l1(self.simmim(x, self.masks), x, self.masks, self.simmim.mask_unit)
