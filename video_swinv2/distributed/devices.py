"""Chooses the device on which a process computes and the precision; nothing else in the project decides either."""

from __future__ import annotations

import os
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


def bf16_pays(device: torch.device) -> bool:
    """Whether the device computes faster in bf16 than in fp32: GPUs with bf16 units, and CPUs with AMX.

    AVX-512 instructions for bf16 alone are not enough: there a forward pass takes 1.1 times as long as in fp32, and
    without them 2.2 times. With AMX it takes half as long (docs/results/model-speed.md).
    """
    return has_native_bf16(device) if device.type == "cuda" else _has_amx()


def _has_amx() -> bool:
    """Whether matrix products of this process use AMX: the CPU has it, and oneDNN, which computes them, may use it."""
    # This variable is oneDNN's. It names the newest instructions that oneDNN may use; AMX is among the newest.
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return torch.cpu._is_amx_tile_supported() and ("AMX" in allowed or allowed in ("DEFAULT", "ALL"))


def computing_precision(precision: str, device: torch.device) -> str:
    """The precision to compute in, in training and inference: bf16, fp16 or fp32.

    ``auto`` is bf16 where it pays, and fp32 elsewhere. bf16 becomes fp32 on a GPU that can only emulate it.
    """
    if precision == "auto":
        return "bf16" if bf16_pays(device) else "fp32"
    return "fp32" if precision == "bf16" and not has_native_bf16(device) else precision


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether to run inference in bf16; `computing_precision` says when."""
    return computing_precision(precision, device) == "bf16"


def report_missing_bf16(precision: str, device: torch.device) -> None:
    """Print a line, apart from a program's output, if bf16 is asked for inference on a GPU that only emulates it."""
    if precision == "bf16" and not use_bf16(precision, device):
        print("note: engine.precision: this GPU has no bf16, so fp32 is used", file=sys.stderr)


def product_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type of the matrix products whose speed limits how fast this device can train.

    fp32 on CPUs without AMX, whatever the precision: they emulate bf16, up to a hundred times slower.
    """
    if precision == "auto":
        precision = computing_precision(precision, device)
    return AUTOCAST_DTYPES.get(precision, torch.float32) if device.type == "cuda" or _has_amx() else torch.float32
