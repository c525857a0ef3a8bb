"""The keys of DeepSpeed's own configuration that may be set in `engine.deepspeed`.

DeepSpeed silently accepts unknown top-level keys, and values that contradict the ones it derives. Here a key either may
be set, or follows from another key of the run, or is unknown; the last two are refused, with the key to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from video_swinv2.errors import UsageError, nearest_key

ZERO = "zero_optimization"
MAX_NUMBER = 10**15  # far more than the elements of any model

# Keys that may be set and the types of their values. They tune speed and memory, and do not change what is learned.
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

# Keys that must not be set, because they follow from the keys of the run named here: nothing is configured twice.
DERIVED: dict[str, str] = {
    "activation_checkpointing": "model.checkpoint_blocks",
    "amp": "engine.precision",
    "bf16": "engine.precision",
    "checkpoint": "checkpoint_minutes and keep_checkpoints",
    "communication_data_type": "engine.communication",
    "compile": "engine.compile",
    "csv_monitor": "log_every (metrics.jsonl and TensorBoard are always written)",
    "data_types": "engine.precision",
    "elasticity": "optim.batch (any number of processes that divides it can resume a checkpoint)",
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
    f"{ZERO}.stage3_gather_16bit_weights_on_model_save": "the checkpoint, which always holds whole fp32 weights",
}


def check_deepspeed_section(section: Mapping[str, Any]) -> None:
    """Raise UsageError for the first key of `engine.deepspeed` that is unknown, derived, or of the wrong type."""
    for key, value in _flatten(section).items():
        shown = f"engine.deepspeed.{key}"
        # The first part is looked up too, for keys written in dotted form, such as fp16.enabled.
        if owner := DERIVED.get(key) or DERIVED.get(key.split(".")[0]):
            raise UsageError(f"{shown}: follows from {owner}; remove it here")
        if key not in TUNABLE:
            # Derived keys are suggested too: following the suggestion then leads to the run's own key.
            near = nearest_key(key, [ZERO, *TUNABLE, *DERIVED])
            fix = f"did you mean {near}?" if near else f"known are {', '.join(TUNABLE)}"
            raise UsageError(f"{shown}: not a key that can be set; {fix}")
        kind = TUNABLE[key]
        if not _has_type(value, kind):
            wanted = {bool: "true or false", int: "a positive whole number", float: "a positive number"}[kind]
            raise UsageError(f"{shown}: {repr(value)[:200]} is not {wanted}; remove the key to use the default")


def _has_type(value: Any, kind: type) -> bool:
    """Whether a YAML value is of the kind: bool, int (positive and whole) or float (positive)."""
    if kind is bool:
        return isinstance(value, bool)
    # In Python True is an int, but it is not a number here. In YAML 5.0e+8 is a float, but it counts as whole.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value <= MAX_NUMBER and (kind is float or float(value).is_integer())


def _flatten(section: Mapping[str, Any]) -> dict[str, Any]:
    """The section as a flat dictionary, in which keys below `zero_optimization` are `zero_optimization.KEY`."""
    found: dict[str, Any] = {}
    for key, value in section.items():
        if key == ZERO and isinstance(value, Mapping):
            found |= {f"{key}.{inner}": given for inner, given in value.items()}
        else:
            found[str(key)] = value
    return found
