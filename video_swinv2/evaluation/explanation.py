"""Pictures of where in a view the evidence for a class lies: its frames, tinted by `forward.ScoredViews.evidence`.

Letters: V views, T H W frames and pixels of a view, t h w tokens of the last stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from video_swinv2.evaluation.forward import ScoredViews, forward_views
from video_swinv2.models.preprocessing import Preprocessing
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.report.mistakes import film_strip, frames_of_strip, jpeg_of_frames

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

    views: uint8 (V, 3, [T,] H, W), all views of one file. batch: how many of them the model is given at once. Raises
    ValueError for a model without a head.
    """
    return explain_scored(views, forward_views(model, views, preprocessing, batch=batch, bf16=bf16), label)


def explain_scored(views: Tensor, scored: ScoredViews, label: int) -> Explanation:
    """`explain` for views, uint8 (V, 3, [T,] H, W), that have been scored already."""
    view = int(scored.logits.softmax(dim=1)[:, label].argmax())
    return Explanation(heat_strip(views[view], scored.evidence(view, label)), view)


def heat_strip(view: Tensor, evidence: Tensor) -> bytes:
    """A JPEG of at most STRIP_FRAMES frames of a view, with the same frames below them, tinted where evidence lies.

    view: uint8 (3, [T,] H, W). evidence: ([t,] h, w).
    """
    frames = frames_of_strip(view)
    return jpeg_of_frames([*frames, *frames_of_strip(tint(view, evidence))], len(frames))


def explanation_strip(view: Tensor, evidence: Tensor) -> bytes:
    """The film strip of a view, uint8 (3, [T,] H, W), tinted where evidence, ([t,] h, w), lies.

    Empty if there is a single token per frame, which says nothing about where in the frame evidence lies.
    """
    return film_strip(tint(view, evidence)) if evidence.shape[-2:].numel() > 1 else b""


def tint(view: Tensor, evidence: Tensor) -> Tensor:
    """A view, uint8 (3, [T,] H, W), with colour where the evidence, ([t,] h, w), lies; of the same shape.

    Evidence against the class counts as none, and the strongest evidence in the view has the full colour.
    """
    clip = view.unsqueeze(1) if view.ndim == 3 else view  # (3, T, H, W)
    tokens = evidence.unsqueeze(0) if evidence.ndim == 2 else evidence  # (t, h, w)
    heat = functional.interpolate(tokens.relu()[None, None], size=clip.shape[1:], mode="trilinear")[0]  # (1, T, H, W)
    opacity = _MAX_OPACITY * heat / heat.max().clamp(min=1e-12)
    tinted = (1 - opacity) * clip + opacity * torch.tensor(_HEAT).view(3, 1, 1, 1)
    return tinted.round().to(torch.uint8).view_as(view)
