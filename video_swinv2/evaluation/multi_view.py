"""Multi-view scores and accuracies in your own code, as `test` computes them.

Letters: N videos, V views, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from video_swinv2.distributed.devices import use_bf16
from video_swinv2.errors import UsageError
from video_swinv2.evaluation.forward import forward_views
from video_swinv2.evaluation.overrides import Precision, TestOverrides
from video_swinv2.evaluation.protocols import View, find_protocol
from video_swinv2.evaluation.views import read_video_or_image
from video_swinv2.models.preprocessing import Preprocessing
from video_swinv2.models.swinv2 import SwinV2
from video_swinv2.report.intervals import Interval, number_sources, share_interval
from video_swinv2.report.metrics import average_views, ranking


@dataclass(frozen=True)
class MultiViewScores:
    """The scores of one video: those of each view, and their average."""

    logits: Tensor
    """(V, K) float32, one row per view."""
    average: Tensor
    """(K,) float64 class probabilities of the video, averaged over its views as the protocol says."""
    views: tuple[View, ...]
    """The frames and the crop of each view."""


def multi_view(
    model: SwinV2,
    video: Path | str,
    protocol: str = "videoswin-4x3",
    *,
    preprocessing: Preprocessing | None = None,
    batch_views: int = TestOverrides().batch_views,
    precision: Precision = "auto",
    time_limit_seconds: float = 60.0,
) -> MultiViewScores:
    """Score one video, or one image with an image model, in the views of a protocol, as `video-swinv2 test` does.

    Args:
        model: on any device. It is put into eval mode and back.
        video: the file.
        protocol: a name, or a protocol spelled out; docs/test.md has both.
        preprocessing: by default `model.preprocessing`.
        batch_views: number of views that the model is given at a time.
        precision: auto, fp32 or bf16; auto is bf16 on GPUs that have it and on CPUs with AMX.
        time_limit_seconds: how long decoding may take.

    Raises UsageError for an unknown protocol or a model without preprocessing, and DecodeError for a file that cannot
    be read.
    """
    shown = preprocessing or model.preprocessing
    if shown is None:
        raise UsageError(
            "preprocessing: the model does not say which it was trained with; pass it, or set model.preprocessing to "
            "that of its VideoDataset"
        )
    chosen = find_protocol(protocol)
    pixels, views = read_video_or_image(Path(video), chosen, shown, time_limit_seconds=time_limit_seconds)
    bf16 = use_bf16(precision, next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        logits = forward_views(model, pixels, shown, batch=batch_views, bf16=bf16).logits
    finally:
        model.train(training)
    # (V, K) -> (1, V, K): one video of V views.
    average = average_views(np.asarray(logits.double().numpy())[None], chosen.average)[0]
    return MultiViewScores(logits, torch.from_numpy(average), views)


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy as a share in 0..1, with its interval at the 95 % level."""

    top1: float
    interval: Interval
    videos: int
    groups: int
    """The number of groups; a video of unknown group counts as one."""

    def __str__(self) -> str:
        low, high = (100 * bound for bound in self.interval)
        return f"{100 * self.top1:.2f} % [{low:.2f}, {high:.2f}] of {self.videos} videos in {self.groups} groups"


def accuracy(scores: ArrayLike | Tensor, labels: ArrayLike | Tensor, groups: Sequence[str] | None = None) -> Accuracy:
    """Top-1 accuracy with the interval that `test` reports (`report/intervals.py` has its sources).

    Args:
        scores: (N, K), the logits or probabilities of each video, averaged over its views. Of equal scores the first
            counts as the answer.
        labels: (N,), numbers of classes.
        groups: (N,), what each video was cut from, such as `VideoDataset.groups`; '' is unknown. Videos of one group
            are no independent evidence, so fewer groups give a wider interval. By default each is its own.

    Raises UsageError for numbers of other shapes, scores that are not finite, and labels that are no classes.
    """
    rows, truth = (np.asarray(torch.as_tensor(values).detach().cpu()) for values in (scores, labels))
    names = [""] * truth.size if groups is None else list(groups)
    if rows.ndim != 2 or truth.ndim != 1 or not len(rows) == len(truth) == len(names) or not rows.size:
        raise UsageError(
            f"accuracy: scores {rows.shape}, labels {truth.shape} and {len(names)} groups; give scores (N, K), and a "
            "label and a group for each of the N videos"
        )
    if not np.isfinite(rows).all():
        raise UsageError("accuracy: some scores are NaN or Inf; check the weights of the model")
    if not np.isin(truth, np.arange(rows.shape[1])).all():
        raise UsageError(
            f"accuracy: labels from {truth.min()} to {truth.max()} for {rows.shape[1]} classes; give numbers of classes"
        )
    correct = (ranking(rows.astype(np.float64), 1)[:, 0] == truth).astype(np.float64)
    sources = number_sources(names)
    interval = share_interval(correct, sources)
    return Accuracy(float(correct.mean()), interval, len(correct), int(sources.max()) + 1)
