"""A model and all that turns pictures into answers: classes with their probabilities.

V views, T frames, H W pixels, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from video_swinv2.errors import UsageError, UserError
from video_swinv2.distributed.devices import choose_device, use_bf16
from video_swinv2.evaluation.overrides import Device, Precision
from video_swinv2.evaluation.testing import forward_views
from video_swinv2.report.metrics import average_views, ranking
from video_swinv2.weights.store import ModelCard, load_model, read_card


@dataclass(frozen=True)
class Answer:
    """A class and its probability, 0..1."""

    name: str
    probability: float


@dataclass(frozen=True)
class Classifier:
    """A model on its device, with its card; `top` answers are given, from `batch_views` views at once."""

    model: nn.Module
    card: ModelCard
    top: int
    batch_views: int
    bf16: bool

    def probabilities(self, pixels: Tensor) -> NDArray[np.float64]:
        """uint8 (V, 3, [T,] H, W) -> (V, K). Raises UserError where they are not finite."""
        return np.asarray(average_views(self._logits(pixels)[:, None], "prob"))

    def views_averaged(self, pixels: Tensor, average: str) -> NDArray[np.float64]:
        """uint8 (V, 3, [T,] H, W) of one video -> (K,), averaged as a protocol says."""
        return np.asarray(average_views(self._logits(pixels)[None], average)[0])

    def best(self, probabilities: NDArray[np.float64]) -> tuple[Answer, ...]:
        """(K,) -> the likeliest classes, likeliest first."""
        return tuple(
            Answer(self.card.classes[i], float(probabilities[i])) for i in ranking(probabilities[None], self.top)[0]
        )

    def _logits(self, pixels: Tensor) -> NDArray[np.float64]:
        logits = forward_views(self.model, pixels, self.card.preprocessing, batch=self.batch_views, bf16=self.bf16)
        if not torch.isfinite(logits).all():
            raise UserError("the model's scores are not finite; check the weights, or use fp32")
        return np.asarray(logits.double().numpy())


def open_classifier(
    model_path: Path | str,
    *,
    top: int = 5,
    device: Device = "auto",
    precision: Precision = "auto",
    batch_views: int = 12,
) -> Classifier:
    """The model of a file, ready to answer. Raises UsageError for a model without class names."""
    if top < 1 or batch_views < 1:
        raise UsageError("top and batch_views must be 1 or more")
    card, place = read_card(model_path), choose_device(device)
    if not card.classes:
        raise UsageError(f"{model_path}: holds no class names; save the model with classes")
    return Classifier(load_model(model_path).to(place), card, top, batch_views, use_bf16(precision, place))
