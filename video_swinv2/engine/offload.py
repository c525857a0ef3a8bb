"""Weights and moments in files: tensors whose memory is a mapped file, which the system pages to the disk as it must.

No other file has to know: they are ordinary CPU tensors to AdamW and to DeepSpeed, at every ZeRO stage, and need no
libaio, compiler or pinned memory, as DeepSpeed's own way to NVMe does.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from video_swinv2.distributed.world import World
from video_swinv2.engine.zero_layout import MOMENTS, Shard
from video_swinv2.errors import UserError


class MappedFolder:
    """This process's files below `folder`; whatever an earlier run left of them is removed first."""

    def __init__(self, folder: str, world: World) -> None:
        self._folder = Path(folder) / f"rank-{world.rank:05d}"
        self._count = 0
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot be made ({error.strerror or error}); name another engine.offload_folder"
            ) from error

    def mapped(self, tensor: Tensor) -> Tensor:
        """A CPU tensor of the same shape and values whose memory is a new file. UserError for a full disk."""
        path = self._folder / f"{self._count:05d}"
        self._count += 1
        size = max(1, tensor.numel())
        try:
            if shutil.disk_usage(self._folder).free < size * tensor.element_size():
                raise OSError(f"{size * tensor.element_size()} bytes are needed")
            # Mapped beforehand a full disk is an error here, not a bus error in the middle of a step.
            with path.open("wb") as file:
                for _ in range(0, size * tensor.element_size(), 1 << 24):
                    file.write(bytes(min(1 << 24, size * tensor.element_size() - file.tell())))
            made = torch.from_file(str(path), shared=True, size=size, dtype=tensor.dtype)
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path}: no room for offloaded tensors ({error}); free space on that disk") from error
        path.unlink()  # the mapping keeps it; a killed run leaves nothing behind
        made = made[: tensor.numel()].view(tensor.shape)
        made.copy_(tensor)
        return made


@torch.no_grad()
def map_optimizer(optimizer: torch.optim.Optimizer, shards: Sequence[Shard], folder: MappedFolder) -> None:
    """Put the pieces AdamW updates, and both their moments, into files."""
    for shard in shards:
        shard.piece.data = folder.mapped(shard.piece.detach())
        state = optimizer.state[shard.piece]
        # As AdamW makes them at its first step, on the CPU.
        state.setdefault("step", torch.tensor(0.0))
        for moment in MOMENTS:
            state[moment] = folder.mapped(state.get(moment, torch.zeros_like(shard.piece)))
