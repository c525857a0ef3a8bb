"""Offloads weights and moments to disk: CPU tensors whose memory is a mapped file, paged in and out by the kernel.

To AdamW and DeepSpeed these are ordinary CPU tensors, so this works at every ZeRO stage that can offload to the CPU.
Unlike DeepSpeed's own NVMe offload, it needs no libaio, no compiler and no pinned memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from video_swinv2.distributed.world import World
from video_swinv2.engine.zero_layout import MOMENTS, Partition
from video_swinv2.errors import UserError

WRITE_BYTES = 1 << 24  # a new file is filled with zeros in blocks of 16 MiB


class MappedFolder:
    """This process's own subfolder of `folder`, one per rank. What an earlier run left in it is removed first."""

    def __init__(self, folder: str, world: World) -> None:
        self._folder = Path(folder) / f"rank-{world.rank:05d}"
        self._count = 0
        try:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        except OSError as error:
            raise UserError(
                f"{self._folder}: cannot be created ({error.strerror or error}); name another engine.offload_folder"
            ) from error

    def map_copy(self, tensor: Tensor) -> Tensor:
        """A CPU tensor of the same shape, dtype and values, backed by a new file. UserError if the disk is full."""
        path = self._folder / f"{self._count:05d}"
        self._count += 1
        elements = max(1, tensor.numel())  # an empty file cannot be mapped
        size_bytes = elements * tensor.element_size()
        try:
            if shutil.disk_usage(self._folder).free < size_bytes:
                raise OSError(f"{size_bytes} bytes are needed")
            # Allocate every block by writing it. torch.from_file alone would create a sparse file, and if the disk
            # filled up later, the kernel would kill the process with SIGBUS in the middle of a step.
            with path.open("wb") as file:
                for _ in range(0, size_bytes, WRITE_BYTES):
                    file.write(bytes(min(WRITE_BYTES, size_bytes - file.tell())))
            mapped = torch.from_file(str(path), shared=True, size=elements, dtype=tensor.dtype)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot store offloaded tensors ({error}); "
                "free space on that disk or name another engine.offload_folder"
            ) from error
        path.unlink()  # the mapping keeps the data alive, and even a killed run leaves no file behind
        mapped = mapped[: tensor.numel()].view(tensor.shape)  # (elements,) -> the tensor's shape, possibly empty
        mapped.copy_(tensor)
        return mapped


@torch.no_grad()
def offload_to_files(optimizer: torch.optim.Optimizer, partitions: Sequence[Partition], folder: MappedFolder) -> None:
    """Move the tensors that AdamW updates and both of their moments into files, in place."""
    for partition in partitions:
        # Assigning to .data keeps the tensor object, which is the key of AdamW's state and to which DeepSpeed holds
        # references.
        partition.local.data = folder.map_copy(partition.local.detach())
        state = optimizer.state[partition.local]
        # AdamW creates its state at the first step, in ordinary memory. Create the same state here, in files: AdamW
        # keeps what it finds.
        state.setdefault("step", torch.tensor(0.0))
        for moment in MOMENTS:
            state[moment] = folder.map_copy(state.get(moment, torch.zeros_like(partition.local)))
