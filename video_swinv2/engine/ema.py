"""The exponential moving average (EMA) of the weights, which often generalises better than the weights themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from video_swinv2.engine.zero_layout import Partition, names_by_id


class WeightAverage:
    """Computes average = decay * average + (1 - decay) * weights after every applied step, in fp32.

    The averages are partitioned in the same way as the weights in the optimizer, so each process stores and updates
    only the averages of the weights that it updates.
    """

    def __init__(self, partitions: Sequence[Partition], decay: float) -> None:
        self._partitions = partitions
        # One average per partition, in the partition's own layout and on its device.
        self._averages: list[Tensor | nn.Parameter] = [partition.local.detach().clone() for partition in partitions]
        self._update = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Add the current weights to the average."""
        # The last argument, the number of averaged models, is not used by an exponential average.
        self._update(self._averages, [partition.local.detach() for partition in self._partitions], 0)

    def read(self, module: nn.Module) -> dict[str, Tensor]:
        """The averages of the trained parameters by name: whole CPU tensors on rank 0, empty elsewhere. Collective."""
        names = names_by_id(module)
        found: dict[str, Tensor] = {}
        for partition, average in zip(self._partitions, self._averages, strict=True):
            wholes = partition.gather(average)  # may be empty on ranks other than 0, hence not strict below
            found.update({names[id(p)]: whole for p, whole in zip(partition.parameters, wholes, strict=False)})
        return found

    @torch.no_grad()
    def write(self, module: nn.Module, wholes: Mapping[str, Tensor]) -> None:
        """Set the averages from whole tensors by name or, if there are none, from the current weights.

        There are none in the checkpoint of a run that kept no average, and in one of DeepSpeed.
        """
        names = names_by_id(module)
        for partition, average in zip(self._partitions, self._averages, strict=True):
            given = [wholes[names[id(p)]] for p in partition.parameters] if wholes else None
            average.copy_(partition.local if given is None else partition.slice_of(given))
