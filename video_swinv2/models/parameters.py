"""Depth and weight decay of a parameter, derived from its name, for building optimizer parameter groups."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

# State-dict names of SwinV2. SimMIM and dense models wrap it, so that its names have a prefix that ends with "encoder."
# (removed before matching).
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.")
_DOWNSAMPLE = re.compile(r"layers\.(\d+)\.downsample\.")
_UNDECAYED_NAMES = ("absolute_pos_embed", "mask_token")
_UNDECAYED_PARTS = ("cpb_mlp", "logit_scale", "relative_position_bias_table")


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Depth of a parameter, from 0 (patch embedding) to ``sum(depths) + 1`` (final norm, head, decoder).

    This is ``get_swin_layer`` of Microsoft's SimMIM: block k of the network, counted from 0, has depth k + 1, and the
    patch merging after a stage has the depth of the stage's last block. Raises ValueError for a block that is not in a
    model with these ``depths``.
    """
    name = _in_encoder(name)
    if name.startswith("patch_embed.") or name == "mask_token":
        return 0
    if found := _BLOCK.match(name):
        stage, block = int(found[1]), int(found[2])
        if stage < len(depths) and block < depths[stage]:
            return sum(depths[:stage]) + block + 1
    elif found := _DOWNSAMPLE.match(name):
        if int(found[1]) < len(depths):
            return sum(depths[: int(found[1]) + 1])
    else:
        return sum(depths) + 1
    raise ValueError(f"parameter {name}: depths {tuple(depths)} have no such block; pass the model's own depths")


def stage_id(name: str, depths: Sequence[int]) -> int:
    """Depth by stage: 0 for the patch embedding, i + 1 for stage i and its merging, then final norm and head."""
    layer = layer_id(name, depths)
    # Count the stages that begin below this layer. The final norm and the head lie beyond all of them.
    return sum(layer > sum(depths[:stage]) for stage in range(len(depths) + 1))


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies. It skips biases, norms, the mask token, logit scales and log-CPB networks.

    This is what SwinV2's ``no_weight_decay`` lists intend. Microsoft's SimMIM pre-training code looks for
    ``encoder.cpb_mlp``, which no parameter name contains, and therefore does decay logit scales and log-CPB networks.
    """
    name = _in_encoder(name)
    # Under ZeRO-3 a partitioned parameter is an empty tensor, and `ds_shape` is its full shape.
    axes = len(getattr(parameter, "ds_shape", parameter.shape))
    # One axis or none: biases and the weights of norms.
    if axes <= 1 or name.endswith(".bias") or name in _UNDECAYED_NAMES:
        return False
    return not any(part in name for part in _UNDECAYED_PARTS)


def _in_encoder(name: str) -> str:
    """The name that a parameter has in the SwinV2 itself: "backbone.encoder.norm.bias" -> "norm.bias"."""
    return name.rpartition("encoder.")[2]
