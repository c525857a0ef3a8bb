"""DeepSpeed's configuration: what a run's own keys make of it, and which of DeepSpeed's keys may be set besides.

DeepSpeed accepts unknown keys at the top in silence, and a value it derives as well as one that contradicts it. Here
every key is known: it may be set, or it belongs to another key of the run, or it is refused with the nearest name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from video_swinv2.errors import UsageError

if TYPE_CHECKING:
    from video_swinv2.engine.settings import EngineSettings

# Elements per gradient bucket: 400 MB of fp32. DeepSpeed's own 5e8 takes 2 GB at once; this still holds the largest
# matrix of the largest SwinV2 (giant: 4096 x 16384), so that no parameter needs DeepSpeed's path for larger ones.
BUCKET = 100_000_000

ZERO = "zero_optimization"

# What may be set under engine.deepspeed and its type: how things are done, never what is computed.
TUNABLE: dict[str, type] = {
    "gradient_predivide_factor": float,
    "memory_breakdown": bool,
    "prescale_gradients": bool,
    "wall_clock_breakdown": bool,
    f"{ZERO}.allgather_bucket_size": int,
    f"{ZERO}.allgather_partitions": bool,
    f"{ZERO}.contiguous_gradients": bool,
    f"{ZERO}.overlap_comm": bool,
    f"{ZERO}.reduce_bucket_size": int,
    f"{ZERO}.reduce_scatter": bool,
    f"{ZERO}.round_robin_gradients": bool,
    f"{ZERO}.stage3_max_live_parameters": int,
    f"{ZERO}.stage3_max_reuse_distance": int,
    f"{ZERO}.stage3_module_granularity_threshold": int,
    f"{ZERO}.stage3_param_persistence_threshold": int,
    f"{ZERO}.stage3_prefetch_bucket_size": int,
    f"{ZERO}.sub_group_size": int,
    f"{ZERO}.use_multi_rank_bucket_allreduce": bool,
}

# Keys of DeepSpeed's that follow from a key of the run, so that nothing is typed twice.
DERIVED: dict[str, str] = {
    "activation_checkpointing": "model.checkpoint_blocks",
    "amp": "engine.precision",
    "bf16": "engine.precision",
    "checkpoint": "checkpoint_minutes and keep_checkpoints",
    "communication_data_type": "engine.communication",
    "compile": "engine.compile",
    "csv_monitor": "log_every (metrics.jsonl and TensorBoard are always written)",
    "data_types": "engine.precision",
    "elasticity": "optim.batch (any number of processes that divides it goes on from a checkpoint)",
    "fp16": "engine.precision",
    "gradient_accumulation_steps": "optim.batch and optim.micro_batch",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "steps_per_print": "log_every",
    "tensorboard": "log_every (metrics.jsonl and TensorBoard are always written)",
    "torch_autocast": "engine.precision",
    "train_batch_size": "optim.batch",
    "train_micro_batch_size_per_gpu": "optim.micro_batch",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "engine.offload_optimizer",
    f"{ZERO}.cpu_offload": "engine.offload_optimizer",
    f"{ZERO}.offload_optimizer": "engine.offload_optimizer",
    f"{ZERO}.offload_param": "engine.offload_parameters",
    f"{ZERO}.stage": "engine.zero_stage",
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": "the checkpoint, which holds whole fp32 weights always",
}


def check_section(section: Mapping[str, Any]) -> None:
    """Raise UsageError for the first key of `engine.deepspeed` that is unknown, derived, or of the wrong kind."""
    for key, value in _flat(section).items():
        shown = f"engine.deepspeed.{key}"
        if owner := DERIVED.get(key) or DERIVED.get(key.split(".")[0]):
            raise UsageError(f"{shown}: follows from {owner}; remove it here")
        if key not in TUNABLE:
            near = difflib.get_close_matches(key, [*TUNABLE, *DERIVED], n=1, cutoff=0.0)
            raise UsageError(f"{shown}: is not a key that is passed on; did you mean {near[0]}?")
        kind = TUNABLE[key]
        # In YAML 5e8 is a float and in Python True is an int: both are told apart here.
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        fits = isinstance(value, bool) if kind is bool else whole and (kind is float or float(value).is_integer())
        if not fits:
            wanted = {bool: "true or false", int: "a positive whole number", float: "a positive number"}[kind]
            raise UsageError(f"{shown}: {value!r} is not {wanted}; remove it for the default")


def deepspeed_config(settings: EngineSettings, *, precision: str, cuda: bool) -> dict[str, Any]:
    """The whole of it: batch sizes, clipping and precision from the run's keys, then what the section sets.

    ``precision`` is that of the run here, after what the device can do; ``cuda`` whether host memory may be pinned.
    """
    zero: dict[str, Any] = {
        "stage": settings.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "overlap_comm": False,  # its double buffers have given NaN (DeepSpeed #7965)
    }
    for key, where in (
        ("offload_optimizer", settings.offload_optimizer),
        ("offload_param", settings.offload_parameters),
    ):
        if where != "none":
            # Files are mapped by us (offload.py): DeepSpeed's way to them needs libaio and a compiler.
            zero[key] = {"device": "cpu", "pin_memory": cuda and where == "cpu"}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        # ZeRO-0 is clipped by us, with the norm DeepSpeed would not tell.
        "gradient_clipping": (settings.clip_norm or 0.0) if settings.zero_stage else 0.0,
        ZERO: zero,
        "torch_autocast": _autocast(precision, settings.communication),
        "communication_data_type": settings.communication,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW for CPUs is compiled already, DeepSpeed's is not
        "timers": {"throughput": {"enabled": False}},  # it would synchronise the GPU at every step
    }
    for key, value in settings.deepspeed.items():
        config[key] = config[key] | {inner: _exact(given) for inner, given in value.items()} if key == ZERO else value
    return config


def _autocast(precision: str, communication: str) -> dict[str, Any]:
    section: dict[str, Any] = {"enabled": precision != "fp32"}
    if precision != "fp32":
        section["dtype"] = {"bf16": "bfloat16", "fp16": "float16"}[precision]
    if communication == "fp32":
        # Gradients are averaged in fp32: an empty list keeps Linear and Conv from being reduced in half precision.
        section["lower_precision_safe_modules"] = []
    return section


def _exact(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _flat(section: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in section.items():
        if key == ZERO and isinstance(value, Mapping):
            found |= {f"{key}.{inner}": given for inner, given in value.items()}
        else:
            found[str(key)] = value
    return found
