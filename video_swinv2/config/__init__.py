"""The configuration of a run: one YAML file plus `key.sub=value` overrides, checked in full before anything starts.

`schema` defines the sections, `engine` the one with the most rules, `deepspeed_keys` what `engine.deepspeed` may
contain, and `bounds` the types of values. `loading` reads files, in the part of YAML that `plain_yaml` defines, and
explains mistakes. `changes` compares the configurations of a run that was resumed. Of this project, this package
imports only `errors` and `files`.
"""

from video_swinv2.config.bounds import STRICT, PictureSize, Pixels, Positive, Seconds, Seed, Size, Workers
from video_swinv2.config.changes import CHANGES_LEARNING, Change, changed_settings
from video_swinv2.config.engine import EngineConfig
from video_swinv2.config.loading import (
    invalid_value,
    known_keys,
    load_config,
    parse_override,
    plain_values,
    to_yaml,
    validate_config,
)
from video_swinv2.config.schema import (
    AugmentConfig,
    Config,
    DataConfig,
    DetectionConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    SegmentationConfig,
    WeightedSource,
)

__all__ = [
    "CHANGES_LEARNING",
    "STRICT",
    "AugmentConfig",
    "Change",
    "Config",
    "DataConfig",
    "DetectionConfig",
    "EngineConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "PictureSize",
    "Pixels",
    "Positive",
    "Seconds",
    "Seed",
    "SegmentationConfig",
    "Size",
    "WeightedSource",
    "Workers",
    "changed_settings",
    "invalid_value",
    "known_keys",
    "load_config",
    "parse_override",
    "plain_values",
    "to_yaml",
    "validate_config",
]
