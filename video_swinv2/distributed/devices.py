"""Chooses the device on which a process computes and the precision; nothing else in the project decides either."""

from __future__ import annotations

import sys

import torch

from video_swinv2.distributed.launchers import LaunchInfo
from video_swinv2.errors import UsageError

DEVICE_NAMES = ("auto", "cpu", "cuda")

# The type in which torch autocast computes matrix products. fp32 has no entry, because it runs without autocast.
AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_device_name(name: str) -> None:
    """Raise UsageError unless ``name`` is ``auto``, ``cpu`` or ``cuda``."""
    if name not in DEVICE_NAMES:
        raise UsageError(f"device: unknown device {name!r}; use auto, cpu or cuda")


def choose_device(name: str, launch: LaunchInfo | None = None) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``; ``auto`` means a GPU if PyTorch sees one.

    With ``launch``, each process on a machine gets the GPU of its local rank; without it, the current GPU. Raises
    UsageError if a GPU is requested and there is none, or if a machine has fewer GPUs than processes.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("device: cuda was requested but PyTorch sees no GPU; use device=cpu or fix the driver")
    if launch is None:
        return torch.device("cuda")
    count = torch.cuda.device_count()
    if launch.local_rank < count:
        return torch.device("cuda", launch.local_rank)
    # srun --gpus-per-task=1 hides all GPUs but its own from each task, and PyTorch numbers that one 0. With other
    # launchers a single GPU means that several processes would share it, which is refused below.
    if count == 1 and launch.from_slurm:
        return torch.device("cuda", 0)
    raise UsageError(
        f"device: local rank {launch.local_rank} has no GPU, this machine has {count}; start fewer processes"
    )


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 runs on the device without emulation by CUDA. True for CPUs, where PyTorch always supports it."""
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def trainable_precision(precision: str, device: torch.device) -> str:
    """The precision to train in: the requested one, or fp32 if bf16 is requested and the GPU can only emulate it."""
    return "fp32" if precision == "bf16" and not has_native_bf16(device) else precision


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run inference in bf16. ``auto`` does so on GPUs only; on none is bf16 emulated, as in training."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    return trainable_precision(precision, device) == "bf16"


def report_missing_bf16(precision: str, device: torch.device) -> None:
    """Print a line, apart from a program's output, if bf16 is asked for inference on a GPU that only emulates it."""
    if precision == "bf16" and not use_bf16(precision, device):
        print("note: engine.precision: this GPU has no bf16, so fp32 is used", file=sys.stderr)


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products whose speed limits how fast this device can train.

    Always fp32 on CPUs, whatever the precision: most CPUs have no bf16 units and emulate it, up to a hundred times
    slower.
    """
    return AUTOCAST_DTYPES.get(precision, torch.float32) if device.type == "cuda" else torch.float32
