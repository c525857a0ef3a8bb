"""Offloaded or not, what is exchanged is on the GPU, as NCCL needs it: partitions with fake tensors on `cuda`.

Covers moments and averages, which we exchange ourselves. DeepSpeed's own collectives need a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.models.fake_gpu import CUDA, fake_gpu
from video_swinv2.distributed.world import World
from video_swinv2.engine.checkpoint import TrainingState
from video_swinv2.engine.ema import WeightAverage
from video_swinv2.engine.zero_layout import (
    GroupPartition,
    ParameterPartitions,
    Partition,
    WholeParameter,
    read_moments,
    write_moments,
)

# Rank 0 of two. Its partition of a Linear (3 x 5 weights, 3 biases) has 10 elements in either layout.
WORLD = World(rank=0, size=2, local_rank=0, device=CUDA)
SHAPES = {"weight": (3, 5), "bias": (3,)}


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is gathered on rank 0, all of it on the GPU, by a stand-in that communicates nothing."""
    exchanged: list[Tensor] = []

    def gather(tensor: Tensor, received: Sequence[Tensor]) -> None:
        assert {each.device for each in (tensor, *received)} == {CUDA}, "NCCL cannot send from the CPU"
        exchanged.append(tensor)

    monkeypatch.setattr(dist, "gather", gather)
    return exchanged


def partitioned(kind: str, device: torch.device) -> tuple[nn.Module, list[Partition]]:
    """A module on the GPU, and its partitions, with the tensors that AdamW updates on `device`."""
    module = nn.Module()
    buffer = torch.empty(20, device=CUDA)
    module.weight, module.bias = nn.Parameter(buffer[:15].view(3, 5)), nn.Parameter(buffer[15:18])
    parameters = [module.weight, module.bias]
    if kind == "whole":
        return module, [WholeParameter(parameter) for parameter in parameters]
    local = torch.empty(10, device=device, requires_grad=True)
    if kind == "group":
        return module, [GroupPartition(local, parameters, buffer, WORLD)]
    for parameter, length in zip(parameters, (8, 2), strict=True):  # as DeepSpeed does at ZeRO-3
        parameter.ds_numel, parameter.ds_shape = parameter.numel(), parameter.shape
        parameter.partition_numel = lambda length=length: length
    return module, [ParameterPartitions(local, parameters, WORLD)]


@pytest.mark.parametrize(
    ("kind", "device"),
    [("whole", "cuda"), ("group", "cuda"), ("group", "cpu"), ("parameters", "cuda"), ("parameters", "cpu")],
)
def test_moments_and_averages_travel_between_the_gpu_and_whole_cpu_tensors(
    gathered: list[Tensor], kind: str, device: str
) -> None:
    with fake_gpu():
        module, partitions = partitioned(kind, torch.device(device))
        local = [partition.local for partition in partitions]
        optimizer = torch.optim.AdamW(local, fused=True)
        whole = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        write_moments(module, optimizer, partitions, TrainingState(whole, whole, whole, optimizer_step=3))
        for tensor in local:
            assert {held.device for held in optimizer.state[tensor].values()} == {tensor.device}
        average = WeightAverage(partitions, 0.9)
        average.update()
        average.write(module, whole)
        for found in (*read_moments(module, optimizer, partitions), average.read(module)):
            assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
            assert {tensor.device.type for tensor in found.values()} == {"cpu"}
    assert bool(gathered) == (kind != "whole")
