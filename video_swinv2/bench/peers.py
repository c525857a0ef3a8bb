"""The peers that our model is compared with: torchvision's Video Swin on clips, and timm's SwinV2 as SimMIM's encoder.

Letters: B batch, T H W frames and pixels, H' W' grid of tokens, C channels.
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
# The input and the window (T, H, W) that torchvision's Video Swin is built for.
FRAMES, PIXELS, WINDOW = 16, 224, (8, 7, 7)
# The model of torchvision with the same width and depth as ours.
TORCHVISION_PEERS = {"swinv2_tiny": "swin3d_t", "swinv2_small": "swin3d_s", "swinv2_base": "swin3d_b"}
# Microsoft's recipe for SimMIM with SwinV2-B: side of the image and of a mask cell in pixels, window in tokens, share
# of hidden cells, drop path.
SIMMIM_PIXELS, SIMMIM_WINDOW, SIMMIM_UNIT, SIMMIM_RATIO, SIMMIM_DROP_PATH = 192, 12, 32, 0.6, 0.1


@dataclass(frozen=True)
class Comparison:
    """Which models are compared on which input. It is plain data and so can be sent to another process."""

    against: PeerLibrary
    name: str
    """The size, by the name of our model."""
    peer: str
    """The peer in words."""
    shape: tuple[int, ...]
    """Of the input: (B, 3, T, H, W) for clips, (B, 3, H, W) for images."""
    window: tuple[int, ...]
    passes: tuple[str, ...]
    """What is timed: "forward", "training step" or both."""


def compare_on_clips(name: str, batch: int, frames: int, pixels: int | None) -> Comparison:
    """Compare the classification of clips with window (8, 7, 7) against torchvision's Video Swin of the same size.

    Raises UsageError for a size that torchvision does not have.
    """
    peer = f"torchvision {torchvision_peer(name)}"
    side = PIXELS if pixels is None else pixels
    return Comparison("torchvision", name, peer, (batch, 3, frames, side, side), WINDOW, ("forward", "training step"))


def compare_on_masked_images(name: str, batch: int, pixels: int | None) -> Comparison:
    """Compare SimMIM on images with window 12 against timm's SwinV2 with the same decoder, masks and loss.

    Raises UsageError for a size that timm's SwinV2 does not support.
    """
    if variant_of(name).extra_norm_every:
        raise UsageError(f"--model {name}: timm's SwinV2 has no extra norms; choose a smaller size")
    side = SIMMIM_PIXELS if pixels is None else pixels
    peer = f"timm SwinTransformerV2 (as swinv2_{name.removeprefix('swinv2_')}_window{SIMMIM_WINDOW}_{side})"
    return Comparison("timm", name, peer, (batch, 3, side, side), (SIMMIM_WINDOW,) * 2, ("training step",))


def torchvision_peer(name: str) -> str:
    """torchvision's name of its Video Swin of our size `name`. Raises UsageError for a size that it does not have."""
    if name not in TORCHVISION_PEERS:
        raise UsageError(
            f"--model {name}: torchvision has no model of this size; choose one of {', '.join(TORCHVISION_PEERS)}"
        )
    return TORCHVISION_PEERS[name]


def variant_of(name: str) -> Variant:
    """The dimensions of the model called `name`. Raises UsageError for an unknown name."""
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
    """torchvision's Video Swin of our size `name`, freshly initialised, with its default of 400 classes."""
    from torchvision.models import video

    model: nn.Module = getattr(video, torchvision_peer(name))(weights=None)
    return model


def build_image_encoder(side: Side, name: str, pixels: int) -> nn.Module:
    """An image encoder for SimMIM: ours, or timm's of the same size with the same drop path."""
    if side == "ours":
        return create_model(name, num_classes=0, image_size=pixels, window=SIMMIM_WINDOW, drop_path=SIMMIM_DROP_PATH)
    # Imported here, because timm is needed for this comparison only.
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
    """Wraps timm's SwinV2 in the attributes and methods that our SimMIM uses of its encoder."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.patch_size = self.model.patch_embed.patch_size
        self.depths = [len(stage.blocks) for stage in self.model.layers]
        self.embed_dim = self.model.embed_dim
        self.in_chans = self.model.in_chans
        self.num_features = self.model.num_features

    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> patch tokens (B, H', W', C). timm's Swin models keep channels last, as ours do."""
        return cast(Tensor, self.model.patch_embed(x))

    def encode(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, H', W', C) -> the tokens of the last stage after the final norm, (B, H'/8, W'/8, 8C)."""
        return cast(Tensor, self.model.norm(self.model.layers(tokens)))


class MaskedLoss(nn.Module):
    """SimMIM with an encoder and with masks that are drawn once, so that its only input is the images."""

    masks: Tensor

    def __init__(self, encoder: nn.Module, shape: Sequence[int]) -> None:
        super().__init__()
        self.simmim = SimMIM(cast(SwinV2, encoder), SIMMIM_UNIT)
        cells = mask_cells(shape[2:], SIMMIM_UNIT, 2)
        generator = torch.Generator().manual_seed(0)
        masks = [random_mask(cells, SIMMIM_RATIO, generator) for _ in range(shape[0])]
        self.register_buffer("masks", torch.stack(masks))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> the masked L1 loss, a scalar. The images also serve as the target."""
        return masked_l1(self.simmim(x, self.masks), x, self.masks, self.simmim.mask_unit)
