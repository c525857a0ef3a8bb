"""One pass of a model over views: their scores, and where in each view the evidence for a class lies.

The evidence is Grad-CAM on the features of the last stage, from which the scores are computed anyway: to explain an
answer takes no second pass. Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via
Gradient-based Localization", ICCV 2017, equations 1 and 2.

Letters: V views, T H W frames and pixels of a view, t h w tokens of the last stage, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from video_swinv2.data.transforms import normalise
from video_swinv2.models.preprocessing import Preprocessing
from video_swinv2.models.swinv2 import SwinV2


@dataclass(frozen=True)
class ScoredViews:
    """What a model computes for V views.

    logits: (V, K) float32 on the CPU, or the mean features (V, C) of a model without a head. features: of each view the
    tokens of the last stage, ([t,] h, w, C), on the device of the model. head: that of the model.
    """

    logits: Tensor
    features: tuple[Tensor, ...]
    head: nn.Module

    def evidence(self, view: int, label: int) -> Tensor:
        """What each token of a view adds to the logit of class `label`: ([t,] h, w) float32 on the CPU.

        Its mean, plus the bias of the head, is the logit. Raises ValueError for a model without a head.
        """
        if not isinstance(self.head, nn.Linear):
            raise ValueError("a model without a head has no evidence for a class")
        # The logit of class k is the mean over all tokens p of  head_k . features_p,  plus a bias. Its gradient with
        # respect to features_p is the same for every p: head_k / (t h w). Averaged over the tokens, as Grad-CAM does,
        # it is still that, so the weighted sum of channels needs no backward pass. The constant 1 / (t h w) is left
        # out.
        weights = self.head.weight[label].detach().float()  # (C,)
        return (self.features[view].float() @ weights).cpu()


def forward_views(
    model: SwinV2, pixels: Tensor, preprocessing: Preprocessing, *, batch: int, bf16: bool
) -> ScoredViews:
    """Score views, uint8 (V, 3, [T,] H, W), `batch` of them at a time, under bfloat16 autocast if `bf16` is set.

    Pixels are copied to the device as bytes and normalised there, which takes a quarter of the traffic of floats.
    """
    device = next(model.parameters()).device
    logits: list[Tensor] = []
    features: list[Tensor] = []
    # Always `batch` views at a time, with a smaller rest, and never views of several groups: scores are equal to the
    # bit only if every view is always in a batch with the same others.
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for part in torch.split(pixels, batch):
            tokens = model.forward_features(normalise(part.to(device), preprocessing.mean, preprocessing.std))
            logits.append(model.forward_head(tokens).float())
            features += tokens.unbind()  # of the last stage, which has few: no copy, and small beside the first stage
    return ScoredViews(torch.cat(logits).cpu(), tuple(features), model.head)
