"""An exponential moving average of the weights over a run, which often does better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from video_swinv2.engine.zero_layout import Partition, names_by_id


class WeightAverage:
    """average = decay * average + (1 - decay) * weights, after every applied step; fp32.

    The averages are partitioned as the optimizer's own weights are, so each process averages only what it updates.
    """

    def __init__(self, partitions: Sequence[Partition], decay: float) -> None:
        self._partitions = partitions
        self._averages: list[Tensor | nn.Parameter] = [partition.local.detach().clone() for partition in partitions]
        self._update = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take in the current weights."""
        # The last argument, the number of averaged models, is not used by an exponential average.
        self._update(self._averages, [partition.local.detach() for partition in self._partitions], 0)

    def read(self, module: nn.Module) -> dict[str, Tensor]:
        """The averages of the trained parameters by name: whole CPU tensors on rank 0, else empty. Collective."""
        names = names_by_id(module)
        found: dict[str, Tensor] = {}
        for partition, average in zip(self._partitions, self._averages, strict=True):
            wholes = partition.gather(average)  # empty on the other ranks, hence not strict
            found.update({names[id(p)]: whole for p, whole in zip(partition.parameters, wholes, strict=False)})
        return found

    @torch.no_grad()
    def write(self, module: nn.Module, wholes: Mapping[str, Tensor]) -> None:
        """Continue from averages by name, or, if there are none, from the current weights."""
        names = names_by_id(module)
        for partition, average in zip(self._partitions, self._averages, strict=True):
            given = [wholes[names[id(p)]] for p in partition.parameters] if wholes else None
            average.copy_(partition.local if given is None else partition.slice_of(given))
