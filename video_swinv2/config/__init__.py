"""The configuration of a run: one YAML file plus `key.sub=value` overrides, checked in full before anything starts.

`schema` defines the sections, `engine` the one with the most rules, and `deepspeed_keys` what `engine.deepspeed` may
contain. `loading` reads files and explains mistakes. Of this project, this package imports only `errors`.
"""

from video_swinv2.config.engine import EngineConfig
from video_swinv2.config.loading import apply_override, known_keys, load_config, plain_values, to_yaml, validate_config
from video_swinv2.config.schema import (
    STRICT,
    AugmentConfig,
    Config,
    DataConfig,
    MaskConfig,
    ModelConfig,
    NotNegative,
    OptimConfig,
    Positive,
    WeightedSource,
)

__all__ = [
    "STRICT",
    "AugmentConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "MaskConfig",
    "ModelConfig",
    "NotNegative",
    "OptimConfig",
    "Positive",
    "WeightedSource",
    "apply_override",
    "known_keys",
    "load_config",
    "plain_values",
    "to_yaml",
    "validate_config",
]
