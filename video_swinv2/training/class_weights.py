"""Weights of classes in a training loss, from how often each class occurs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from video_swinv2.errors import UsageError


def class_weights(
    wanted: str | tuple[float, ...] | None, classes: Sequence[str], count: Callable[[], Tensor], unit: str
) -> Tensor | None:
    """The weights (K,), float32, that `optim.class_weights` asks for; None without weights.

    `balanced` gives a class the weight units / (classes x units of the class), scikit-learn's formula, so that all
    classes have the same part in the loss. `sqrt_balanced` gives weights in proportion to 1 / sqrt(units of the class).
    In both, the mean weight over all units is 1, so that the loss keeps its size.

    Args:
        count: gives the number of training units of every class, (K,). It is called only if they decide.
        unit: what is counted, such as "sample", for messages.

    Raises UsageError for another number of weights than classes, and for a class without a unit, which has no weight.
    """
    if wanted is None:
        return None
    if isinstance(wanted, tuple):
        if len(wanted) != len(classes):
            raise UsageError(f"optim.class_weights: {len(wanted)} weights for {len(classes)} classes; give one each")
        return torch.tensor(wanted)
    counts = count().double()
    if not counts.all():
        empty = classes[int(counts.argmin())]
        raise UsageError(f"optim.class_weights: class {empty!r} has no training {unit}; give numbers instead")
    shares = 1 / (counts if wanted == "balanced" else counts.sqrt())
    return (shares * counts.sum() / (shares * counts).sum()).float()
