"""Where in a clip the evidence for a class lies: Grad-CAM on the features of the last stage, shown over the frames.

Source: Selvaraju et al., "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization", ICCV 2017,
equations 1 and 2.

Letters: V views, T H W frames and pixels of a view, t h w tokens of the last stage, C channels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from video_swinv2.data.transforms import normalise
from video_swinv2.models.preprocessing import Preprocessing
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.report.mistakes import frames_of_strip, jpeg_of_frames

_HEAT = (255.0, 90.0, 0.0)  # RGB from 0 to 255: orange, which few scenes are full of
_MAX_OPACITY = 0.65  # of the colour, where the evidence is strongest


@dataclass(frozen=True)
class Explanation:
    """A JPEG file that shows the evidence for a class, and the number of the view that it shows."""

    jpeg: bytes
    view: int


def explain(
    model: SwinV2, views: Tensor, preprocessing: Preprocessing, label: int, *, batch: int = 12, bf16: bool = False
) -> Explanation:
    """Show the evidence for class `label` in the view that gives it the highest probability.

    views: uint8 (V, 3, [T,] H, W), all views of one file. batch: how many of them the model is given at once.
    """
    evidence, logits = class_evidence(model, views, preprocessing, label, batch=batch, bf16=bf16)
    view = int(logits.softmax(dim=1)[:, label].argmax())
    return Explanation(heat_strip(views[view], evidence[view]), view)


def class_evidence(
    model: SwinV2, views: Tensor, preprocessing: Preprocessing, label: int, *, batch: int = 12, bf16: bool = False
) -> tuple[Tensor, Tensor]:
    """What each token of the last stage adds to the logit of class `label`.

    uint8 (V, 3, [T,] H, W) -> evidence (V, [t,] h, w) and logits (V, K), both float32 on the CPU. The mean of a view's
    evidence, plus the bias of the head, is its logit. Raises ValueError for a model without a head.
    """
    if not isinstance(model.head, nn.Linear):
        raise ValueError("a model without a head has no evidence for a class")
    # The logit of class k is the mean over all tokens p of  head_k . features_p,  plus a bias. Its gradient with
    # respect to features_p is the same for every p: head_k / (t h w). Averaged over the tokens, as Grad-CAM does, it is
    # still that, so the weighted sum of channels needs no backward pass. The constant 1 / (t h w) is left out.
    device, weights = model.head.weight.device, model.head.weight[label].float()  # (C,)
    evidence, logits = [], []
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for part in torch.split(views, batch):
            pixels = normalise(part.to(device), preprocessing.mean, preprocessing.std)
            features = model.forward_features(pixels)  # (V, [t,] h, w, C)
            logits.append(model.forward_head(features).float().cpu())
            evidence.append((features.float() @ weights).cpu())
    return torch.cat(evidence), torch.cat(logits)


def heat_strip(view: Tensor, evidence: Tensor) -> bytes:
    """A JPEG of at most STRIP_FRAMES frames of a view, with the same frames below them, tinted where evidence lies.

    view: uint8 (3, [T,] H, W). evidence: (t, h, w), or (h, w) for an image. Evidence against the class counts as none,
    and the strongest evidence in the view has the full colour.
    """
    clip = view.unsqueeze(1) if view.ndim == 3 else view  # (3, T, H, W)
    tokens = evidence.unsqueeze(0) if evidence.ndim == 2 else evidence  # (t, h, w)
    heat = functional.interpolate(tokens.relu()[None, None], size=clip.shape[1:], mode="trilinear")[0]  # (1, T, H, W)
    opacity = _MAX_OPACITY * heat / heat.max().clamp(min=1e-12)
    tinted = (1 - opacity) * clip + opacity * torch.tensor(_HEAT).view(3, 1, 1, 1)
    frames = frames_of_strip(clip)
    return jpeg_of_frames([*frames, *frames_of_strip(tinted.round().to(torch.uint8))], len(frames))
