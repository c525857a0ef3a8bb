"""The classifier: a loaded model and a protocol, which turn views into class probabilities and answers.

Letters: N files or segments, V views of each, T frames, H W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from video_swinv2.distributed.devices import choose_device, report_missing_bf16, use_bf16
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.explanation import explain_scored
from video_swinv2.evaluation.forward import ScoredViews, forward_views
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.evaluation.protocols import Protocol, find_protocol
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.report.metrics import average_views, ranking
from video_swinv2.weights.store import ModelCard, load_model, read_card, require_rgb

DEFAULT_PROTOCOL = "videoswin-4x3"


@dataclass(frozen=True)
class Answer:
    """A class and its probability, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Classifier:
    """A model on its device, with the card of its file. It answers with `top` classes.

    A file is answered from all views of `protocol`, and a segment from the protocol's crops of its one clip.
    `batch_views` views are passed to the model at a time, under bfloat16 autocast if `bf16` is set.
    """

    model: SwinV2
    card: ModelCard
    protocol: Protocol
    top: int
    batch_views: int
    bf16: bool

    def probabilities(self, views: Tensor) -> NDArray[np.float64]:
        """Classify N files or segments: uint8 (N, V, 3, [T,] H, W) -> (N, K).

        Views are averaged as the protocol says. Raises UserError for non-finite logits.
        """
        scored = self.score(views.flatten(0, 1))
        return self.average(scored.logits.unflatten(0, views.shape[:2]))

    def score(self, views: Tensor) -> ScoredViews:
        """Score views, uint8 (V, 3, [T,] H, W). Raises UserError unless all logits are finite."""
        scored = forward_views(self.model, views, self.card.preprocessing, batch=self.batch_views, bf16=self.bf16)
        if not torch.isfinite(scored.logits).all():
            raise UserError("the model computes non-finite logits; check its weights, or use precision fp32")
        return scored

    def average(self, logits: Tensor) -> NDArray[np.float64]:
        """Average views as the protocol says: logits (N, V, K) -> probabilities (N, K)."""
        return np.asarray(average_views(logits.double().numpy(), self.protocol.average))

    def views_of(self, unit: str, count: int) -> str:
        """What an answer was averaged over, to be shown beside it: "videoswin-4x3: 4 clips x 3 crops".

        unit: "clip" for a file (an image is a single one), "segment" for a stretch of time.
        """
        units, crops = f"{unit}{'s' * (count != 1)}", f"crop{'s' * (self.protocol.crops != 1)}"
        return f"{self.protocol.name}: {count} {units} x {self.protocol.crops} {crops}"

    def explain(self, views: Tensor, scored: ScoredViews, probabilities: NDArray[np.float64]) -> bytes:
        """A JPEG file that shows where the evidence for the most likely class lies, as in `evaluation.explanation`.

        views: all those of one file, uint8 (V, 3, [T,] H, W), and what `score` returned for them. probabilities: (K,).
        """
        (label,) = ranking(probabilities[None], 1)[0].tolist()
        return explain_scored(views, scored, label).jpeg

    def top_classes(self, probabilities: NDArray[np.float64]) -> tuple[Answer, ...]:
        """Probabilities (K,) -> the `top` most likely classes, most likely first."""
        return tuple(
            Answer(self.card.classes[i], float(probabilities[i])) for i in ranking(probabilities[None], self.top)[0]
        )


def open_classifier(
    model_path: Path | str,
    *,
    top: int = 5,
    protocol: str = DEFAULT_PROTOCOL,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_views: int = 12,
) -> Classifier:
    """Load a model file for inference.

    top: number of classes in an answer; models with fewer classes return all of them. protocol: its name. Raises
    UsageError for an unknown protocol, for a model without a classifier or class names, and for numbers below 1.
    """
    if top < 1 or batch_views < 1:
        raise UsageError("top and batch_views must be at least 1")
    # The card is read first: it is small, so a model without class names fails before its weights are loaded.
    chosen_protocol, card, chosen_device = find_protocol(protocol), read_card(model_path), choose_device(device)
    require_rgb(card.architecture, model_path)
    if not card.architecture["num_classes"]:
        raise UsageError(
            f"{model_path}: a pre-training file or backbone, which has no classifier; fine-tune it with `train` and "
            f"init={model_path}"
        )
    if not card.classes:
        raise UsageError(f"{model_path}: has no class names; save the model with `classes`")
    report_missing_bf16(precision, chosen_device)
    model = load_model(model_path).to(chosen_device)
    return Classifier(model, card, chosen_protocol, top, batch_views, use_bf16(precision, chosen_device))
