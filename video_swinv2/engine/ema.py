"""An average of the weights over the steps of a run, which often is better than the weights of any one step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from video_swinv2.engine.zero_layout import Shard


class Average:
    """average = decay * average + (1 - decay) * weights, after every step whose update was applied; fp32.

    Kept in the pieces in which the optimizer holds the weights, so each process averages only what it updates.
    """

    def __init__(self, shards: Sequence[Shard], decay: float) -> None:
        self._shards = shards
        self._pieces: list[Tensor | nn.Parameter] = [shard.piece.detach().clone() for shard in shards]
        self._average = get_ema_multi_avg_fn(decay)

    def update(self) -> None:
        """Take in the weights as they are now."""
        self._average(self._pieces, [shard.piece.detach() for shard in self._shards], 0)

    def read(self, module: nn.Module) -> dict[str, Tensor]:
        """The averages of the trained parameters by name: whole CPU copies on rank 0. Collective."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        found: dict[str, Tensor] = {}
        for shard, piece in zip(self._shards, self._pieces, strict=True):
            found.update({names[id(p)]: whole for p, whole in zip(shard.parameters, shard.join(piece), strict=False)})
        return found

    @torch.no_grad()
    def write(self, module: nn.Module, wholes: Mapping[str, Tensor]) -> None:
        """Go on from averages by name, or, where there are none, from the weights as they are now."""
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        for shard, piece in zip(self._shards, self._pieces, strict=True):
            given = [wholes[names[id(p)]] for p in shard.parameters] if wholes else None
            piece.copy_(shard.piece if given is None else shard.cut(given))
