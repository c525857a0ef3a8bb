"""The classifier: a loaded model that turns views into class probabilities and answers.

Letters: V views, T frames, H W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from video_swinv2.distributed.devices import choose_device, report_missing_bf16, use_bf16
from video_swinv2.errors import UsageError, UserError
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.evaluation.testing import forward_views
from video_swinv2.report.metrics import average_views, ranking
from video_swinv2.weights.store import ModelCard, load_model, read_card


@dataclass(frozen=True)
class Answer:
    """A class and its probability, from 0 to 1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Classifier:
    """A model on its device, with the card of its file. It answers with `top` classes.

    `batch_views` views are passed to the model at a time, under bfloat16 autocast if `bf16` is set.
    """

    model: nn.Module
    card: ModelCard
    top: int
    batch_views: int
    bf16: bool

    def probabilities(self, views: Tensor) -> NDArray[np.float64]:
        """Classify each view on its own: uint8 (V, 3, [T,] H, W) -> (V, K). Raises UserError for non-finite logits."""
        # (V, K) -> (V, 1, K): V clips of one view each, so the average is over a single softmax.
        return np.asarray(average_views(self._logits(views)[:, None], "prob"))

    def average_probabilities(self, views: Tensor, average: str) -> NDArray[np.float64]:
        """Classify one video from all its views: uint8 (V, 3, [T,] H, W) -> (K,).

        average: how the protocol combines views, as in `average_views`. Raises UserError for non-finite logits.
        """
        # (V, K) -> (1, V, K): one video of V views.
        return np.asarray(average_views(self._logits(views)[None], average)[0])

    def top_classes(self, probabilities: NDArray[np.float64]) -> tuple[Answer, ...]:
        """Probabilities (K,) -> the `top` most likely classes, most likely first."""
        return tuple(
            Answer(self.card.classes[i], float(probabilities[i])) for i in ranking(probabilities[None], self.top)[0]
        )

    def _logits(self, views: Tensor) -> NDArray[np.float64]:
        """uint8 (V, 3, [T,] H, W) -> logits (V, K) in fp64. Raises UserError unless all are finite."""
        logits = forward_views(self.model, views, self.card.preprocessing, batch=self.batch_views, bf16=self.bf16)
        if not torch.isfinite(logits).all():
            raise UserError("the model computes non-finite logits; check its weights, or use precision fp32")
        return np.asarray(logits.double().numpy())


def open_classifier(
    model_path: Path | str,
    *,
    top: int = 5,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_views: int = 12,
) -> Classifier:
    """Load a model file for inference.

    top: number of classes in an answer; models with fewer classes return all of them. Raises UsageError for a model
    without class names and for numbers below 1.
    """
    # The card is read first: it is small, so a model without class names fails before its weights are loaded.
    if top < 1 or batch_views < 1:
        raise UsageError("top and batch_views must be at least 1")
    card, chosen_device = read_card(model_path), choose_device(device)
    if not card.classes:
        raise UsageError(f"{model_path}: has no class names; save the model with `classes`")
    report_missing_bf16(precision, chosen_device)
    model = load_model(model_path).to(chosen_device)
    return Classifier(model, card, top, batch_views, use_bf16(precision, chosen_device))
