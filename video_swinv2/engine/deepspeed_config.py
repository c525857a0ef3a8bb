"""Builds DeepSpeed's configuration dictionary from the run's configuration.

Users may add keys of DeepSpeed's own in `engine.deepspeed`; `config/deepspeed_keys.py` lists those that are allowed.
"""

from __future__ import annotations

from typing import Any

from video_swinv2.config import EngineConfig
from video_swinv2.config.deepspeed_keys import ZERO
from video_swinv2.engine.base import StepSettings

# Elements per bucket of gradients or weights that are exchanged together: 400 MB of fp32. DeepSpeed's default of 5e8
# allocates 2 GB at once. This size still holds the largest matrix of the largest SwinV2 (giant: 4096 x 16384), so no
# parameter takes DeepSpeed's separate path for tensors larger than a bucket.
BUCKET_ELEMENTS = 100_000_000


def build_deepspeed_config(
    config: EngineConfig, step: StepSettings, *, precision: str, pin_memory: bool
) -> dict[str, Any]:
    """Batch sizes, clipping and precision as the run sets them, then the keys of `engine.deepspeed` on top.

    ``precision`` is the one in use, which differs from `engine.precision` on GPUs without bf16. ``pin_memory`` allows
    offloaded tensors in page-locked host memory, from which GPUs copy faster.
    """
    zero: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        # ZeRO-3 would otherwise replace torch.nn.functional.linear for the rest of the process. Its version does not
        # keep half-precision copies of the weights for the backward pass, but neither does activation checkpointing.
        "memory_efficient_linear": False,
        "overlap_comm": False,  # its double buffers have produced NaN (DeepSpeed #7965)
    }
    offloads = {"offload_optimizer": config.offload_optimizer, "offload_param": config.offload_parameters}
    for key, target in offloads.items():
        if target != "none":
            zero[key] = offload_section(target, pin_memory)
    section: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": step.micro_batch,
        "gradient_accumulation_steps": step.accumulation,
        # At ZeRO-0 `gradients.py` clips, because DeepSpeed does not report the norm there.
        "gradient_clipping": (step.clip_norm or 0.0) if config.zero_stage else 0.0,
        ZERO: zero,
        "torch_autocast": _autocast_section(precision, config.communication),
        "communication_data_type": config.communication,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch ships its fused AdamW for CPUs compiled; DeepSpeed does not
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the GPU at every step
    }
    # The checked keys of `engine.deepspeed`; those below zero_optimization are merged into the section built above.
    for key, value in config.deepspeed.items():
        section[key] = section[key] | {k: _as_int(v) for k, v in value.items()} if key == ZERO else value
    return section


def offload_section(target: str, pin_memory: bool) -> dict[str, Any]:
    """The section of what is offloaded to ``target``, cpu or nvme.

    It names the CPU also for nvme: `offload.py` maps these tensors to files, because DeepSpeed's own NVMe offload needs
    libaio and a compiler. Mapped memory cannot be pinned.
    """
    return {"device": "cpu", "pin_memory": pin_memory and target == "cpu"}


def _autocast_section(precision: str, communication: str) -> dict[str, Any]:
    section: dict[str, Any] = {"enabled": precision != "fp32"}
    if precision != "fp32":
        section["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    if communication == "fp32":
        # By default DeepSpeed reduces the gradients of Linear and Conv layers in the autocast type. With an empty list
        # of "safe" modules it reduces all gradients in fp32.
        section["lower_precision_safe_modules"] = []
    return section


def _as_int(value: Any) -> Any:
    """Turn whole floats into ints: YAML reads 5.0e+8 as a float, and DeepSpeed requires an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value
