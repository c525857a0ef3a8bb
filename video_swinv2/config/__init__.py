"""Every setting of a run and the rules between them: one YAML file plus `key.sub=value` overrides, checked first.

`schema` holds the sections, `engine` the section with the most rules, `deepspeed_keys` what may stand in
`engine.deepspeed`, and `loading` reads files and explains mistakes. Imports nothing of this project but `errors`.
"""

from video_swinv2.config.engine import EngineConfig
from video_swinv2.config.loading import apply_override, known_keys, load_config, to_yaml, validate_config
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
    "to_yaml",
    "validate_config",
]
