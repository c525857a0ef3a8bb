"""The feature pyramid that dense heads are built on: a SwinV2 with a LayerNorm on the output of every stage.

Letters: B batch, C_i channels of stage i, *S_i its grid: (H_i, W_i) of an image model, (T', H_i, W_i) of a clip model.
"""

from __future__ import annotations

from torch import Tensor, nn

from video_swinv2.models.swinv2 import SwinV2


class PyramidBackbone(nn.Module):
    """The maps of all stages of a SwinV2, each with a LayerNorm of its own, as in Swin's detection code.

    The norms are called `norm0`, `norm1`, ... as there. In SwinV2, unlike in V1, a stage ends with the residual sum of
    its last block, which no norm follows, so that without these norms heads would see values of any size.

    Nothing here depends on the size of the input or on the number of its axes. Images of any height and width work,
    and the maps of an image do not depend on any padding: the encoder never attends to a padded token, and what it adds
    to fill the last patch or merging is a function of the image alone.

    encoder: a `features_only` model, which has neither a final norm nor a head. Raises ValueError for any other, since
    a parameter that is never used would have no gradient, which data-parallel training refuses.
    """

    def __init__(self, encoder: SwinV2) -> None:
        super().__init__()
        if not encoder.features_only:
            raise ValueError("encoder: has a head or a final norm, which a pyramid leaves out; use features_only=True")
        self.encoder = encoder
        for stage, channels in enumerate(self.channels):
            self.add_module(f"norm{stage}", nn.LayerNorm(channels))

    @property
    def channels(self) -> list[int]:
        """The number of channels C_i of every map."""
        return self.encoder.feature_info.channels()

    @property
    def strides(self) -> list[int]:
        """The pixels, in height and in width, that one token of every map covers."""
        return self.encoder.feature_info.reduction()

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W) or clips (B, 3, T, H, W) -> the map of every stage, (B, C_i, *S_i).

        S_i is ceil(ceil(size / patch) / 2 / 2 ...) in height and width, and does not shrink in time.
        """
        maps = self.encoder.forward_pyramid(x)
        # (B, C_i, *S_i) -> channels last, which is how the encoder computed them, for the norm -> channels first
        return [
            self.get_submodule(f"norm{i}")(m.movedim(1, m.ndim - 1)).movedim(m.ndim - 1, 1) for i, m in enumerate(maps)
        ]
